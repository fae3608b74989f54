import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.nn import platform
from t5style.nn.norm import Norm
from t5style.nn.projection import project


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize(("shape", "contracted"), [((6, 4, 2), 1), ((4, 2, 6), 2), ((6, 5), 1)])
def test_project_is_a_product_over_the_inner_dimensions(monkeypatch, flatten, shape, contracted):
    monkeypatch.setattr(platform, "flatten_tokens", lambda: flatten)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, 5, *shape[:contracted])), rng.normal(size=shape)
    weight = rng.normal(size=(3, 5, *shape[contracted:]))

    def loss(x, kernel):
        out = project(x, kernel, contracted=contracted)
        return (out * weight).sum(), out

    args = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(*args)
    np.testing.assert_allclose(out, np.tensordot(x, kernel, contracted), atol=1e-5)
    outer = kernel.ndim - contracted
    np.testing.assert_allclose(
        gradients[0],
        np.tensordot(weight, kernel, (range(2, 2 + outer), range(contracted, kernel.ndim))),
        atol=1e-5,
    )
    np.testing.assert_allclose(gradients[1], np.tensordot(x, weight, ((0, 1), (0, 1))), atol=1e-5)


@pytest.mark.parametrize("flatten", [True, False])
def test_sums_of_bfloat16_products_are_in_float32(monkeypatch, flatten):
    monkeypatch.setattr(platform, "flatten_tokens", lambda: flatten)
    # 4096 ones: a running sum in bfloat16 would stop growing at 256.
    x, kernel = jnp.ones((1, 2, 4096), jnp.bfloat16), jnp.ones((4096, 3), jnp.float32)
    assert float(project(x, kernel)[0, 0, 0]) == 4096
    assert project(x, kernel).dtype == jnp.bfloat16
    assert project(x, kernel, out_dtype=jnp.float32).dtype == jnp.float32


def test_rms_norm_is_its_formula_in_float32():
    x = np.random.default_rng(0).normal(size=(3, 8)) * 1e4
    scale = np.linspace(0.5, 2, 8)
    want = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
    params = {"scale": jnp.asarray(scale, jnp.float32)}
    got = Norm("rms", 1e-6).apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    half = Norm("rms", 1e-6).apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), want, rtol=0.02, atol=0.01)
