"""Products of 8-bit numbers in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.nn.quantized_product import KINDS, product
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import batch_sharding, use_mesh

# Of the largest possible error of a scaled sum, what is seen.
ERROR = {"int8": 0.02, "fp8": 0.06}


def operands(seed=0, batch=8):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (batch, 16, 4, 8)) * jnp.exp2(jnp.arange(16.0))[:, None, None]
    kernel = jax.random.normal(keys[1], (4, 8, 6, 5))
    return x, kernel, jax.random.normal(keys[2], (batch, 16, 6, 5))


def exact(x, kernel):
    return jnp.einsum("blhd,hdno->blno", x, kernel, precision="highest")


def gradients(function, x, kernel, weight):
    return jax.grad(lambda x, kernel: (function(x, kernel) * weight).sum(), argnums=(0, 1))(x, kernel)


@pytest.mark.parametrize("kind", KINDS)
def test_products_forwards_and_backwards_are_close(kind):
    x, kernel, weight = operands()
    made, want = product(x, kernel, 2, kind), exact(x, kernel)
    # By token: each has its own scale, though they differ by 2^15.
    size = jnp.linalg.norm(want.reshape(8, 16, -1), axis=-1)
    assert (jnp.linalg.norm((made - want).reshape(8, 16, -1), axis=-1) < ERROR[kind] * size).all()
    for got, right in zip(
        gradients(lambda *a: product(*a, 2, kind), x, kernel, weight),
        gradients(exact, x, kernel, weight),
        strict=True,
    ):
        assert got.shape == right.shape
        assert jnp.linalg.norm(got - right) < 2 * ERROR[kind] * jnp.linalg.norm(right)
        assert not np.array_equal(got, right)


def test_int8_gradients_are_right_on_average():
    """One element is a thousand times the others, which nearest rounding makes 0."""
    rows = 4096
    gradient = jnp.full((rows, 4), 1e-3).at[0].set(1.0)
    x = jnp.ones((rows, 2))
    made = jax.vjp(lambda w: product(x, w, 1, "int8"), jnp.ones((2, 4)))[1](gradient)[0]
    np.testing.assert_allclose(made, gradient.sum(0, keepdims=True).repeat(2, 0), rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_the_largest_value_stay(kind):
    x = jnp.zeros((3, 4)).at[1, 2].set(-3.0)
    np.testing.assert_allclose(product(x, jnp.eye(4), 1, kind), x, rtol=1e-6)
    gradient = jax.grad(lambda x: product(x, jnp.zeros((4, 4)), 1, kind).sum())(x)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_operands_are_of_8_bits(kind):
    x, kernel, weight = operands()
    text = str(jax.make_jaxpr(lambda *a: gradients(lambda *b: product(*b, 2, kind), *a, weight))(x, kernel))
    dots = [line for line in text.splitlines() if "dot_general[" in line]
    assert len(dots) == 3
    assert text.count("i8[" if kind == "int8" else "f8_e4m3fn[") >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_gives_nearly_the_same_and_asks_no_other_device_for_scales(kind):
    x, kernel, weight = operands()
    mesh = MeshConfig(data=4, fsdp=2).build()

    def run(x, kernel, weight):
        return gradients(lambda *a: product(*a, 2, kind), x, kernel, weight)

    alone = jax.jit(run)(x, kernel, weight)
    with use_mesh(mesh):
        rows = batch_sharding(mesh)
        lowered = jax.jit(run).lower(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
            kernel,
            jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=rows),
        )
        compiled = lowered.compile()
        divided = compiled(jax.device_put(x, rows), kernel, jax.device_put(weight, rows))
    np.testing.assert_allclose(divided[0], alone[0], rtol=1e-4, atol=1e-4 * float(jnp.abs(alone[0]).max()))
    assert jnp.linalg.norm(divided[1] - alone[1]) < 3 * ERROR[kind] * jnp.linalg.norm(alone[1])
    assert compiled.as_text().count(" all-reduce(") == 1  # the weight's gradient
