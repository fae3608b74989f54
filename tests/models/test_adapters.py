"""Adapters: what they compute, what is trained, and that decoding and meshes know nothing of them."""

from __future__ import annotations

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.models import adapters, params
from t5style.models.adapters import Adapter, Lora
from t5style.models.adapters_bottleneck import Bottleneck
from t5style.models.adapters_vectors import BitFit, Ia3
from t5style.models.adapters_virtual import PrefixTuning, PromptTuning, virtual_ids
from t5style.models.cache import init_cache
from t5style.models.config import TransformerConfig
from t5style.models.transformer import Transformer
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import is_axes, param_shardings, path_name, use_mesh
from tests.models.tiny import params_of, runner

DECODER = TransformerConfig(
    vocab_size=32, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, decoder_layers=2, positions="rope",
    dtype="float32", attention_bias=True,
)  # fmt: skip
BOTH = TransformerConfig(
    vocab_size=32, d_model=16, d_ff=32, num_heads=2, encoder_layers=1, decoder_layers=1, dtype="float32"
)
TOKENS = np.random.default_rng(0).integers(3, 32, (2, 8)).astype(np.int32)


def logits(config: TransformerConfig, tree: Any) -> np.ndarray:
    encoder = [TOKENS[:, ::-1]] if config.encoder_layers else []
    return np.asarray(runner(config)(tree, TOKENS, *encoder))


def noisy(own: Any) -> Any:
    """The parameters with noise added."""
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.normal(size=x.shape), np.float32), own)


def drawn(config: TransformerConfig, adapter: Adapter) -> tuple[Any, Any]:
    """A base, and an adapter for it whose parameters are all random."""
    base = params_of(config)
    return base, noisy(jax.jit(functools.partial(adapter.init, config))(jax.random.key(1), base))


@pytest.mark.parametrize("config", [DECODER, BOTH.replace(scan_layers=False)], ids=["scan", "loop"])
def test_lora_is_the_dense_model_with_the_product_in_its_weights(config: TransformerConfig) -> None:
    adapter = Lora(rank=3, alpha=6.0)
    base, own = drawn(config, adapter)
    dense = base
    for kernel in adapters.kernels(config):
        pair = adapters.at(own, kernel.path)
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(pair["lora_a"], pair["lora_b"])
        weight = adapters.at(base, kernel.path)["kernel"] + 2.0 * product
        dense = adapters.merged(dense, adapters.nested({(*kernel.path, "kernel"): weight}))
    np.testing.assert_allclose(
        logits(config, adapter.apply(config, base, own)), logits(config, dense), atol=1e-5
    )


KINDS: dict[str, Adapter] = {
    "lora": Lora(rank=2, alpha=4.0, dora=True),
    "ia3": Ia3(),
    "bitfit": BitFit(),
    "bottleneck": Bottleneck(3, ("attention", "cross_attention", "mlp")),
    "prompt": PromptTuning(2),
    "prefix": PrefixTuning(2),
}
NEUTRAL = ("lora", "ia3", "bitfit", "bottleneck")  # have no effect at first


def applied(config: TransformerConfig, base: Any, owns: Any) -> Any:
    """The base with several adapters in it."""
    for name, own in owns.items():
        base = KINDS[name].apply(config, base, own)
    return base


@pytest.mark.parametrize("config", [DECODER, BOTH], ids=["decoder", "both"])
def test_every_kind_starts_trains_and_decodes(config: TransformerConfig) -> None:
    """No effect at first, axes for every parameter, gradients to each, the same with a cache: all at once,
    for what takes time is compiling."""
    base, key = params_of(config), jax.random.key(1)
    fresh = jax.jit(lambda base: {name: KINDS[name].init(config, key, base) for name in KINDS})(base)
    for name, adapter in KINDS.items():
        axes = jax.tree.map(len, adapter.axes(config), is_leaf=is_axes)
        assert jax.tree.map(lambda x: x.ndim, fresh[name]) == axes
    tokens = np.concatenate([np.tile(virtual_ids(config, 2), (2, 1)), TOKENS], axis=1).astype(np.int32)
    encoder = TOKENS[:, ::-1] if config.encoder_layers else None
    transformer = Transformer(config)

    def run(owns: Any, base: Any) -> tuple[jax.Array, jax.Array]:
        given = transformer.apply({"params": applied(config, base, owns)}, tokens, encoder)
        return (given**2).mean(), given

    graded = jax.jit(jax.value_and_grad(run, has_aux=True))
    neutral = {"prompt": fresh["prompt"], "prefix": fresh["prefix"]}
    want = runner(config)(applied(config, base, neutral), tokens, *([] if encoder is None else [encoder]))
    np.testing.assert_allclose(graded(fresh, base)[0][1], want, atol=5e-6)
    owns = noisy(fresh)
    (_, want), gradient = graded(owns, base)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        # Where keys are not turned, the softmax does not see what is added to all of them.
        unseen = path_name(path).endswith("key/bias") and config is BOTH
        assert unseen or np.abs(leaf).max() > 0, path_name(path)
    tree = jax.jit(functools.partial(applied, config))(base, owns)

    @jax.jit
    def decode(tree: Any, tokens: jax.Array, cache: Any) -> Any:
        return transformer.apply({"params": tree}, tokens, cache, method="decode")

    encoded = None if encoder is None else runner(config, "encode")(tree, encoder)
    cache = init_cache(config, 2, 10, params=tree, encoded=encoded)
    first, cache = decode(tree, tokens[:, :5], cache)
    second, _ = decode(tree, tokens[:, 5:], cache)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), want, atol=2e-5)


def test_a_prompt_of_embeddings_of_the_vocabulary_is_those_tokens() -> None:
    base, ids = params_of(DECODER), np.array([7, 4])
    merged = PromptTuning(2).apply(DECODER, base, {"prompt_embedding": base["embedding"][ids]})
    plain, virtual = (
        np.concatenate([np.tile(each, (2, 1)), TOKENS], axis=1).astype(np.int32)
        for each in (ids, virtual_ids(DECODER, 2))
    )
    np.testing.assert_allclose(runner(DECODER)(merged, virtual), runner(DECODER)(base, plain), atol=1e-6)


def test_lora_on_a_mesh_computes_what_it_does_on_one_device() -> None:
    adapter, tokens = Lora(rank=2, alpha=4.0), np.tile(TOKENS, (4, 1))
    base, own = drawn(DECODER, adapter)
    mesh = MeshConfig(data=1, fsdp=4, tensor=2).build()

    def loss(own: Any, base: Any) -> jax.Array:
        tree = adapter.apply(DECODER, base, own)
        return (Transformer(DECODER).apply({"params": tree}, tokens) ** 2).mean()

    want = jax.jit(jax.value_and_grad(loss))(own, base)
    with use_mesh(mesh):
        placed = jax.device_put(own, param_shardings(adapter.axes(DECODER), own, mesh))
        whole = jax.device_put(base, param_shardings(params.logical_axes(DECODER), base, mesh))
        got = jax.jit(jax.value_and_grad(loss))(placed, whole)
    a = placed["decoder"]["layers"]["attention"]["query"]["lora_a"]
    assert a.addressable_shards[0].data.size < a.size
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_settings_that_cannot_be_are_named() -> None:
    for make, because in (
        (lambda: Bottleneck(0), "Bottleneck.size"),
        (lambda: Bottleneck(after=("norm",)), "'norm'"),
        (lambda: PromptTuning(0), "PromptTuning.length"),
        (lambda: PrefixTuning(sides=()), "PrefixTuning.sides"),
        (lambda: Ia3((), ()), "Ia3.outputs"),
        (lambda: BitFit(()), "BitFit.targets"),
        (lambda: Bottleneck().axes(DECODER.replace(parallel_layers=True)), "parallel"),
        (lambda: PrefixTuning(sides=("encoder",)).axes(DECODER), "no such stack"),
    ):
        with pytest.raises(ValueError, match=because):
            make()


def test_every_kind_is_read_back_from_its_description() -> None:
    base = params_of(BOTH)
    for adapter in KINDS.values():
        described = json.loads(json.dumps(adapters.describe(adapter, base, "x")))
        assert adapters.described(described) == adapter
