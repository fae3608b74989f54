"""Attention: one function, several implementations that must agree wherever a query is a real token.

Masks are never arrays `[batch, queries, keys]` given from outside: packed batches say with segment ids which
tokens belong together, and `causal` says that a token sees no later one. So every implementation can build
its masks block by block, and one that cannot honour them must refuse.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from t5style.nn import platform

# Finite, so that a row that sees nothing (padding) gives finite values and gradients.
MASKED = -1e9


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of attention weights: each is zeroed with probability rate, others grow by 1 / (1 - rate)."""

    rate: float
    key: jax.Array

    def __call__(self, weights: jax.Array, fold: int = 0) -> jax.Array:
        keep = jax.random.bernoulli(jax.random.fold_in(self.key, fold), 1.0 - self.rate, weights.shape)
        return jnp.where(keep, weights / (1.0 - self.rate), 0.0)


def mask_bias(
    query_segments: jax.Array | None, key_segments: jax.Array | None, *, causal: bool, queries: int, keys: int
) -> jax.Array | None:
    """What to add to the scores: 0 where query i may see key j and MASKED elsewhere.

    Args:
      query_segments, key_segments: int32 `[batch, queries]` and `[batch, keys]`, 0 for padding; both or
        neither.
      causal: query i sees keys up to i only.
      queries, keys: lengths.

    Returns:
      f32 `[batch or 1, 1, queries, keys]`, or None where everything is visible.
    """
    visible = None
    if query_segments is not None and key_segments is not None:
        visible = (query_segments[:, None, :, None] == key_segments[:, None, None, :]) & (key_segments != 0)[
            :, None, None, :
        ]
    if causal:
        earlier = (jnp.arange(queries)[:, None] >= jnp.arange(keys))[None, None]
        visible = earlier if visible is None else visible & earlier
    return None if visible is None else jnp.where(visible, 0.0, MASKED)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    causal: bool = False,
    scale: float = 1.0,
    dropout: Dropout | None = None,
    implementation: str = "auto",
    precision: str = "default",
) -> jax.Array:
    """softmax(scale · query · keyᵀ + bias, over visible keys) · value (Vaswani et al. 2017, equation 1).

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key, value: `[batch, keys, kv_heads, head_dim]`; head h uses key-value head h // (heads / kv_heads).
      bias: f32 `[1 or batch, heads, queries, keys]`, added to the scaled scores.
      query_segments, key_segments: int32 `[batch, queries]`, `[batch, keys]`: a query sees keys of its own
        segment; 0 is padding, which nothing sees. None: everything is one segment.
      causal: a query sees no key of a later index (only where both sides are the same sequence).
      scale: factor on the scores.
      dropout: of the weights, or None.
      implementation: 'reference', 'cpu', 'dot_product', or 'auto' (see nn/platform.py).
      precision: as jax.lax.Precision names it.

    Returns:
      `[batch, queries, heads, head_dim]` in query's dtype. What a padding query gets is finite and otherwise
      unspecified.

    Raises:
      ValueError: a combination the implementation cannot compute exactly.
    """
    if (query_segments is None) != (key_segments is None):
        raise ValueError("give both query_segments and key_segments, or neither")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads cannot share {key.shape[2]} key-value heads evenly")
    if implementation == "auto":
        implementation = platform.attention_implementation(dropout=dropout is not None)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is not one of {', '.join(_IMPLEMENTATIONS)}, auto"
        )
    masked = mask_bias(query_segments, key_segments, causal=causal, queries=query.shape[1], keys=key.shape[1])
    return _IMPLEMENTATIONS[implementation](query, key, value, bias, masked, scale, dropout, precision)


def _softmax(scores: jax.Array, *biases: jax.Array | None) -> jax.Array:
    """Softmax over the last dimension in float32, after adding the biases there are."""
    for bias in biases:
        if bias is not None:
            scores = scores + bias
    return jax.nn.softmax(scores, axis=-1)


def _reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masked: jax.Array | None,
    scale: float,
    dropout: Dropout | None,
    precision: str,
) -> jax.Array:
    batch, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    query = query.reshape(batch, queries, groups, heads // groups, width)
    scores = scale * jnp.einsum(
        "bqgnd,bkgd->bgnqk", query, key, precision=precision, preferred_element_type=jnp.float32
    )  # [batch, kv_heads, heads / kv_heads, queries, keys]
    weights = _softmax(
        scores.reshape(batch, heads, queries, keys), bias, masked
    )  # [batch, heads, queries, keys]
    if dropout:
        weights = dropout(weights)
    weights = weights.astype(value.dtype).reshape(batch, groups, heads // groups, queries, keys)
    context = jnp.einsum(
        "bgnqk,bkgd->bqgnd", weights, value, precision=precision, preferred_element_type=jnp.float32
    )
    return context.astype(value.dtype).reshape(batch, queries, heads, width)


def _cpu(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masked: jax.Array | None,
    scale: float,
    dropout: Dropout | None,
    precision: str,
) -> jax.Array:
    """One head after another, each recomputed in the backward pass.

    The scores of one head of one batch stay in cache where those of all heads would not, and nothing of size
    queries × keys is kept for the backward pass.
    """
    heads, groups = query.shape[2], key.shape[2]

    @functools.partial(jax.checkpoint, static_argnums=(5,))
    def one_head(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        head_bias: jax.Array | None,
        masked: jax.Array | None,
        head: int,
    ) -> jax.Array:
        scores = scale * jnp.einsum(
            "bqd,bkd->bqk", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        weights = _softmax(scores, head_bias, masked)  # [batch, queries, keys]
        if dropout:
            weights = dropout(weights, head)
        weights = weights.astype(v.dtype)
        context = jnp.einsum(
            "bqk,bkd->bqd", weights, v, precision=precision, preferred_element_type=jnp.float32
        )
        return context.astype(v.dtype)

    flat_mask = None if masked is None else masked[:, 0]  # [batch or 1, queries, keys]
    contexts = []
    for head in range(heads):
        shared = head * groups // heads
        head_bias = None if bias is None else bias[:, head]  # [1 or batch, queries, keys]
        contexts.append(
            one_head(query[:, :, head], key[:, :, shared], value[:, :, shared], head_bias, flat_mask, head)
        )
    return jnp.stack(contexts, axis=2)  # [batch, queries, heads, head_dim]


def _dot_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masked: jax.Array | None,
    scale: float,
    dropout: Dropout | None,
    precision: str,
) -> jax.Array:
    """jax.nn.dot_product_attention, for which a GPU may use cuDNN's fused kernel."""
    del precision  # the library's own choice
    if dropout:
        raise ValueError(
            "attention implementation 'dot_product' cannot drop attention weights: use 'reference'"
        )
    if bias is not None:
        bias = bias.astype(query.dtype)
    mask = None if masked is None else masked > MASKED / 2
    return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale)


_IMPLEMENTATIONS = {"reference": _reference, "cpu": _cpu, "dot_product": _dot_product}


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    *,
    bias: jax.Array | None = None,
    scale: float = 1.0,
    precision: str = "default",
) -> jax.Array:
    """Attention of a few new tokens to a cache, which keeps each head's keys together (models/cache.py).

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key, value: `[batch, kv_heads, slots, head_dim]`.
      visible: bool `[batch, queries or 1, slots]`.
      bias: f32 `[1 or batch, heads, queries, slots]` or None.
      scale: factor on the scores.
      precision: as jax.lax.Precision names it.

    Returns:
      `[batch, queries, heads, head_dim]` in query's dtype.
    """
    batch, queries, heads, width = query.shape
    groups, slots = key.shape[1:3]
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    # The query heads that share a key-value head become further rows of one product.
    rows = query.reshape(batch, queries, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, groups, heads // groups * queries, width)
    scores = scale * jnp.einsum(
        "bgrd,bgsd->bgrs", rows, key, precision=precision, preferred_element_type=jnp.float32
    )  # [batch, kv_heads, heads / kv_heads · queries, slots]
    scores = scores.reshape(batch, heads, queries, slots)
    weights = _softmax(scores, bias, jnp.where(visible, 0.0, MASKED)[:, None])
    weights = weights.astype(query.dtype).reshape(batch, groups, heads // groups * queries, slots)
    context = jnp.einsum(
        "bgrs,bgsd->bgrd", weights, value, precision=precision, preferred_element_type=jnp.float32
    )
    context = context.astype(query.dtype).reshape(batch, groups, heads // groups, queries, width)
    return context.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, width)
