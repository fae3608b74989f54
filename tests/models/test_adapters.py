"""Adapters: what they compute, what is trained, and that decoding and meshes know nothing of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.models import adapters, params
from t5style.models.adapters import Lora
from t5style.models.config import TransformerConfig
from t5style.models.transformer import Transformer

DECODER = TransformerConfig(
    vocab_size=32, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, decoder_layers=2, positions="rope",
    dtype="float32", attention_bias=True,
)  # fmt: skip
BOTH = TransformerConfig(
    vocab_size=32, d_model=16, d_ff=32, num_heads=2, encoder_layers=1, decoder_layers=1, dtype="float32"
)
TOKENS = np.random.default_rng(0).integers(3, 32, (2, 8)).astype(np.int32)


def logits(config: TransformerConfig, tree: Any) -> np.ndarray:
    encoder = TOKENS[:, ::-1] if config.encoder_layers else None
    return np.asarray(Transformer(config).apply({"params": tree}, TOKENS, encoder))


def drawn(config: TransformerConfig, adapter: Any, seed: int = 1) -> tuple[Any, Any]:
    """A base, and an adapter for it whose parameters are all random."""
    base = params.init_params(config, jax.random.key(0))
    own = adapter.init(config, jax.random.key(seed), base)
    leaves, tree = jax.tree.flatten(own)
    noise = [
        0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(9), i), x.shape)
        for i, x in enumerate(leaves)
    ]
    return base, jax.tree.unflatten(tree, [x + y for x, y in zip(leaves, noise, strict=True)])


@pytest.mark.parametrize(
    "config", [DECODER, DECODER.replace(scan_layers=False), BOTH], ids=["scan", "loop", "both"]
)
def test_lora_is_the_dense_model_with_the_product_in_its_weights(config: TransformerConfig) -> None:
    adapter = Lora(rank=3, alpha=6.0)
    base, own = drawn(config, adapter)
    fresh = adapter.init(config, jax.random.key(1), base)
    np.testing.assert_array_equal(
        logits(config, adapter.apply(config, base, fresh)), logits(config, base)
    )  # B is 0
    dense = base
    for kernel in adapters.kernels(config):
        pair = adapters.at(own, kernel.path)
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(pair["lora_a"], pair["lora_b"])
        weight = adapters.at(base, kernel.path)["kernel"] + 2.0 * product
        dense = adapters.merged(dense, adapters.nested({(*kernel.path, "kernel"): weight}))
    np.testing.assert_allclose(
        logits(config, adapter.apply(config, base, own)), logits(config, dense), atol=1e-5
    )
