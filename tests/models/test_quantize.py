import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.models.params import unstack_layers
from t5style.models.quantize import quantize
from t5style.models.transformer import Transformer
from t5style.nn.projection import project, project_int8, quantize_int8
from tests.models import tiny


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_a_product_of_integers_is_near_the_real_one(rows):
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (rows, 3, 8))
    kernel = jax.random.normal(keys[1], (3, 8, 4, 5))
    small, scale = quantize_int8(kernel, (0, 1))
    assert (small.dtype, scale.shape) == (jnp.int8, (4, 5))
    assert int(jnp.abs(small).max()) == 127
    want = project(x, kernel, contracted=2)
    got = project_int8(x, small, scale, contracted=2)
    assert got.shape == want.shape
    error = jnp.abs(got - want).max() / jnp.abs(want).max()
    assert 0 < error < 0.01


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("apart", [True, False])
def test_logits_of_a_quantised_model_are_near(name, apart):
    config = tiny.KINDS[name]
    params = tiny.params_of(config)
    small = quantize(config, unstack_layers(params) if apart else params)
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(small)
        if str(path[-1]).find("'kernel'") >= 0
    ]
    assert kernels
    assert all(kernel.dtype == jnp.int8 for kernel in kernels)
    tokens = jnp.arange(12).reshape(2, 6) % config.vocab_size
    inputs = (tokens, tokens) if config.encoder_layers else (tokens,)
    want = Transformer(config).apply({"params": params}, *inputs)
    got = Transformer(config).apply({"params": small}, *inputs)
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 0 < error < 0.1
