"""The key-value cache: an explicit tree of arrays that Transformer.decode takes and returns.

layers: a tuple with one dict per decoder layer (nn/cache.py): key, value `[batch, kv_heads, slots,
  head_dim]`, or of latent attention latent `[batch, 1, slots, rank]` and rope_key `[batch, 1, slots,
  rope_dim]`; and for an encoder-decoder cross_key, cross_value `[batch, kv_heads, encoder length, head_dim]`.
  Layers are apart, so that a step writes one token into each in place instead of copying a stack of all.
valid: bool `[batch, slots]`, slots that hold a real token.
positions: int32 `[batch, slots]`, the position of each slot's token in its row.
length: int32 `[batch]`, real tokens so far in each row.
slot: int32 scalar, the slot that the next token takes, the same in every row.
encoder_valid: bool `[batch, encoder length]`, for an encoder-decoder.
"""

from typing import Any

import jax
import jax.numpy as jnp

from t5style.models.attention_layers import attention_layer
from t5style.models.config import LayerKind, TransformerConfig
from t5style.models.transformer import Cache, Transformer


def init_cache(
    config: TransformerConfig,
    batch: int,
    max_length: int,
    *,
    params: Any = None,
    encoded: jax.Array | None = None,
    encoder_segment_ids: jax.Array | None = None,
    dtype: str | None = None,
    chunk: int | None = None,
) -> Cache:
    """An empty cache; for an encoder-decoder, with the cross-attention's keys and values of `encoded` in it.

    Args:
      config: the model.
      batch: rows.
      max_length: slots, at least as many as tokens will be decoded, padding included.
      params: the model's parameters (encoder-decoder only).
      encoded: Transformer.encode's output `[batch, encoder length, embed]` (encoder-decoder only).
      encoder_segment_ids: int32 `[batch, encoder length]`, 0 for padding; None: all real.
      dtype: of keys and values; config.dtype by default. 'int8' keeps a scale for each token and head.
      chunk: the most tokens that decode gets at once. If given, layers with a window keep no more slots than
        they need (window + chunk - 1), which is right if padding stands only on the left of a row.

    Raises:
      ValueError: params or encoded missing for an encoder-decoder, or a size that does not fit.
    """
    dtype = str(jnp.dtype(dtype or config.dtype))
    if batch < 1 or max_length < 1:
        raise ValueError(f"a cache of {batch} rows and {max_length} slots: both must be at least 1")
    if not config.decoder_layers:
        raise ValueError("this model is encoder-only (decoder_layers = 0): it has no decoder to cache for")

    def slots(kind: LayerKind) -> int:
        # A relative bias is computed for all slots.
        windowed = kind.attention == "chunk" or (kind.attention == "window" and not config.global_tokens)
        if chunk is None or not windowed or config.positions == "relative_bias":
            return max_length
        return min(max_length, (config.window or 0) + chunk - 1)

    layers = tuple(
        attention_layer(config, None).new_cache(batch, slots(kind), dtype)
        for kind in config.layers_of("decoder")
    )
    cache: Cache = {
        "layers": layers,
        "valid": jnp.zeros((batch, max_length), bool),
        "positions": jnp.zeros((batch, max_length), jnp.int32),
        "length": jnp.zeros((batch,), jnp.int32),
        "slot": jnp.zeros((), jnp.int32),
    }
    if not config.encoder_layers:
        if encoded is not None:
            raise ValueError(
                "this model is decoder-only (encoder_layers = 0): its cache takes no encoded inputs"
            )
        return cache
    if encoded is None or params is None:
        raise ValueError(
            "the cache of an encoder-decoder needs params and encoded: cross-attention's "
            "keys are computed once"
        )
    if encoded.shape[0] != batch:
        raise ValueError(f"encoded has {encoded.shape[0]} rows and the cache {batch}")
    cross = Transformer(config).apply({"params": params}, encoded, dtype, method="cross_cache")
    cache["layers"] = tuple(own | other for own, other in zip(layers, cross, strict=True))
    if encoder_segment_ids is None:
        cache["encoder_valid"] = jnp.ones(encoded.shape[:2], bool)
    else:
        cache["encoder_valid"] = jnp.asarray(encoder_segment_ids) != 0
    return cache


def rewind(cache: Cache, count: jax.Array | int) -> Cache:
    """The cache without its newest `count` tokens, which are real in every row; not of one with rings
    (init_cache's chunk), where the newest have taken the place of older ones.
    """
    slot = cache["slot"] - count
    kept = jnp.arange(cache["valid"].shape[1]) < slot
    return cache | {"slot": slot, "length": cache["length"] - count, "valid": cache["valid"] & kept}
