import functools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from t5style.models import presets
from t5style.models.params import (
    abstract_params,
    count_params,
    flops_per_example,
    flops_per_token,
    init_params,
    logical_axes,
    unstack_layers,
)
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import is_axes, param_shardings
from tests.models.tiny import KINDS, LLAMA, T5, params_of

GOLDEN = pathlib.Path(__file__).parent / "golden"

# As the published checkpoints have them (transformers' num_parameters of each).
PUBLISHED = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
}


def described(config):
    """path -> [shape, dtype, logical axes], which the golden files hold."""
    axes = jax.tree.leaves(logical_axes(config), is_leaf=is_axes)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {
        "/".join(key.key for key in path): [list(leaf.shape), str(leaf.dtype), list(names)]
        for (path, leaf), names in zip(leaves, axes, strict=True)
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert count_params(presets.PRESETS[name]()) == PUBLISHED[name]


@pytest.mark.parametrize("name", ["t5_small", "t5_1_1_base", "llama3_8b"])
def test_shapes_and_names_are_the_golden_ones(name):
    """Checkpoints depend on these: a change is a change of format. make_golden.py writes them."""
    assert described(presets.PRESETS[name]()) == json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scan", [True, False])
def test_the_tree_does_not_depend_on_how_layers_run(kind, scan):
    config = KINDS[kind]
    other = jax.jit(functools.partial(init_params, config.replace(scan_layers=scan, remat="full")))(
        jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, other, params_of(config))
    layers = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(other) if "layers" in str(path)]
    assert {len(leaf) for leaf in layers} <= {config.encoder_layers, config.decoder_layers}


def test_layers_are_initialised_differently_and_at_t5s_scales():
    config = presets.t5_tiny(vocab_size=512)
    params = params_of(config)
    layers = params["encoder"]["layers"]
    d, ff, heads, width = config.d_model, config.d_ff, config.num_heads, config.heads_width
    want = {
        ("attention", "query"): 1 / math.sqrt(d * width),
        ("attention", "key"): 1 / math.sqrt(d),
        ("attention", "value"): 1 / math.sqrt(d),
        ("attention", "output"): 1 / math.sqrt(heads * width),
        ("mlp", "inputs_0"): 1 / math.sqrt(d),
        ("mlp", "output"): 1 / math.sqrt(ff),
    }
    for (module, part), deviation in want.items():
        kernel = np.asarray(layers[module][part]["kernel"])
        np.testing.assert_allclose(kernel.std(), deviation, rtol=0.02)
        assert abs(kernel.mean()) < 0.02 * deviation
        assert not np.allclose(kernel[0], kernel[1])
    np.testing.assert_allclose(np.asarray(params["embedding"]).std(), 1.0, rtol=0.02)
    np.testing.assert_allclose(np.asarray(params["head"]["kernel"]).std(), 1 / math.sqrt(d), rtol=0.02)
    assert (np.asarray(layers["mlp_norm"]["scale"]) == 1).all()
    assert not np.allclose(
        layers["attention"]["key"]["kernel"], params["decoder"]["layers"]["attention"]["key"]["kernel"]
    )


def test_normal_init_has_one_scale():
    params = params_of(LLAMA)
    kernel = np.asarray(params["decoder"]["layers"]["mlp"]["output"]["kernel"])
    np.testing.assert_allclose(kernel.std(), LLAMA.init_scale, rtol=0.1)
    np.testing.assert_allclose(np.asarray(params["embedding"]).std(), LLAMA.init_scale, rtol=0.1)


def test_sharded_init_makes_the_same_values_in_parts():
    config = KINDS["t5"].replace(vocab_size=64)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    shardings = param_shardings(logical_axes(config), abstract_params(config), mesh)
    sharded = jax.jit(functools.partial(init_params, config), out_shardings=shardings)(jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), sharded, params_of(config))
    kernel = sharded["decoder"]["layers"]["mlp"]["output"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


@pytest.mark.parametrize("kind", KINDS)
def test_param_dtype_is_every_parameters(kind):
    leaves = jax.tree.leaves(abstract_params(KINDS[kind].replace(param_dtype="bfloat16")))
    assert {str(leaf.dtype) for leaf in leaves} == {"bfloat16"}


def test_unstacked_layers():
    params = params_of(T5)
    apart = unstack_layers(params)
    assert len(apart["encoder"]["layers"]) == 2
    np.testing.assert_array_equal(
        apart["decoder"]["layers"][1]["mlp"]["output"]["kernel"],
        params["decoder"]["layers"]["mlp"]["output"]["kernel"][1],
    )
    again = unstack_layers(apart)
    assert again["encoder"]["layers"] is apart["encoder"]["layers"]


def test_flops_follow_the_stated_convention():
    # Decoder-only: 6 per weight that multiplies (not the embedding, not the norms), plus attention.
    config = LLAMA.replace(tie_embeddings=False)
    weights = sum(math.prod(shape) for path, (shape, _, _) in described(config).items() if "kernel" in path)
    length = 100
    attention = (
        6 * config.decoder_layers * length * config.num_heads * config.heads_width
    )  # causal: half of 12
    assert flops_per_token(config, length) == 6 * weights + attention
    assert flops_per_token(config, length, training=False) == (6 * weights + attention) / 3
    # Encoder-decoder, forward: each weight times the tokens that meet it.
    shapes = described(T5)
    size = lambda *parts: sum(  # noqa: E731
        math.prod(shape)
        for path, (shape, _, _) in shapes.items()
        if "kernel" in path and all(p in path for p in parts)
    )
    queries, keys = 20, 30
    cross_kv = size("cross_attention", "key") + size("cross_attention", "value")
    want = 2 * keys * (size("encoder/") + cross_kv) + 2 * queries * (
        size("decoder/") - cross_kv + size("head")
    )
    width = T5.num_heads * T5.heads_width
    want += 4 * width * (T5.encoder_layers * keys**2 + T5.decoder_layers * (queries**2 / 2 + queries * keys))
    assert flops_per_example(T5, queries, keys, training=False) == want
    assert flops_per_token(T5, queries, keys) == 3 * want / (queries + keys)
    with pytest.raises(ValueError, match="encoder_length"):
        flops_per_token(T5, queries)
