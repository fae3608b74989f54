"""Tiny models of both kinds for the tests of this room."""

import functools

import jax
import numpy as np

from t5style.models.config import TransformerConfig
from t5style.models.params import init_params
from t5style.models.transformer import Transformer

T5 = TransformerConfig(
    vocab_size=61, d_model=16, d_ff=24, num_heads=2, head_dim=6, encoder_layers=2, decoder_layers=2,
    relative_buckets=8, relative_max_distance=20, dtype="float32",
)  # fmt: skip
LLAMA = TransformerConfig(
    vocab_size=61, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, decoder_layers=2, positions="rope",
    activations=("silu", "linear"), scale_attention=True, tie_embeddings=True, init="normal", init_scale=0.2,
    dtype="float32",
)  # fmt: skip
KINDS = {"t5": T5, "llama": LLAMA}


@functools.cache
def params_of(config: TransformerConfig):
    return jax.jit(functools.partial(init_params, config))(jax.random.key(0))


@functools.cache
def runner(config: TransformerConfig, method: str = "__call__"):
    """apply, jitted; keyword arguments are arrays."""
    return jax.jit(
        lambda params, *args, **kwargs: Transformer(config).apply(
            {"params": params}, *args, **kwargs, method=method
        )
    )


def tokens_of(config: TransformerConfig, rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, config.vocab_size, (rows, length)).astype(np.int32)
