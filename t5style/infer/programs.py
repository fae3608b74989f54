"""The compiled programs behind Model, other than decoding; shared by all models of one config.

Each takes a dict of int32 arrays [batch, length] under data.pipeline's names.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from t5style.models.config import TransformerConfig
from t5style.models.transformer import Transformer


def _model_inputs(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: value for name, value in batch.items() if name != "decoder_target_tokens"}


@functools.partial(jax.jit, static_argnames="config")
def logits(config: TransformerConfig, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Next-token logits, f32 [batch, length, vocab]."""
    return Transformer(config).apply({"params": params}, **_model_inputs(batch))


@functools.partial(jax.jit, static_argnames="config")
def token_scores(
    config: TransformerConfig, params: Any, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    logits = Transformer(config).apply(
        {"params": params}, **_model_inputs(batch)
    )  # f32 [batch, length, vocab]
    targets = batch["decoder_target_tokens"]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == targets


@functools.partial(jax.jit, static_argnames=("config", "pooling"))
def embed(
    config: TransformerConfig, params: Any, batch: dict[str, jax.Array], pooling: str = "mean"
) -> jax.Array:
    """f32 `[batch, embed]`: pooled as Embedding.pooling says."""
    mask = batch["encoder_segment_ids"]
    encoded = Transformer(config).apply(
        {"params": params}, batch["encoder_input_tokens"], segment_ids=mask, method="encode"
    )
    encoded = encoded.astype(jnp.float32)
    weights = mask[..., None].astype(jnp.float32)  # [batch, length, 1]
    if pooling == "first":
        return encoded[:, 0]
    if pooling == "max":
        return jnp.where(weights > 0, encoded, -jnp.inf).max(axis=1)
    return (encoded * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)


@functools.partial(jax.jit, static_argnames="config")
def classify(config: TransformerConfig, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """f32 `[batch, classes]`."""
    outputs = Transformer(config).apply(
        {"params": params},
        batch["encoder_input_tokens"],
        segment_ids=batch["encoder_segment_ids"],
        method="encoder_outputs",
    )
    return outputs["classes"]
