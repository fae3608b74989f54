"""Attention on a CPU: one head after another, in blocks of queries where these see a part of the keys only.

The scores of one head stay in cache where those of all heads would not; the backward pass computes them
again, and nothing of size queries × keys is kept for it.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from t5style.nn import platform
from t5style.nn.attention_scores import Added, Scoring, mask_bias
from t5style.parallel.rules import activation_axes, current_mesh


def heads_apart(
    query: jax.Array, key: jax.Array, value: jax.Array, added: Added, scoring: Scoring
) -> jax.Array:
    """Attention of all queries to all keys; shapes as for attention."""
    heads, groups = query.shape[2], key.shape[2]
    queries, keys, values = _heads(query), _heads(key), _heads(value)
    biases = [None] * heads if added.bias is None else _heads(added.bias, axis=1)
    sinks = [None] * heads if added.sinks is None else _heads(added.sinks, axis=0)
    masked = None if added.masked is None else added.masked[:, 0]  # [batch or 1, queries, keys]
    contexts = [
        _one_head(
            queries[head],
            keys[head * groups // heads],
            values[head * groups // heads],
            Added(biases[head], masked, sinks[head]),
            scoring,
        )
        for head in range(heads)
    ]
    return jnp.stack(contexts, axis=2)  # [batch, queries, heads, value_dim]


def blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    causal: bool,
    window: int | None,
    scoring: Scoring,
) -> jax.Array:
    """heads_apart on one block of queries after another, each with the keys that one of them may see."""
    parts = []
    for start, end, first, last in visible_blocks(query.shape[1], causal=causal, window=window):
        masked = mask_bias(
            None if query_segments is None else query_segments[:, start:end],
            None if key_segments is None else key_segments[:, first:last],
            causal=causal,
            queries=end - start,
            keys=last - first,
            window=window,
            offset=start - first,
        )
        block_bias = None if bias is None else bias[..., start:end, first:last]
        added = Added(block_bias, masked, sinks)
        parts.append(
            heads_apart(query[:, start:end], key[:, first:last], value[:, first:last], added, scoring)
        )
    return jnp.concatenate(parts, axis=1)


def visible_blocks(length: int, *, causal: bool, window: int | None) -> list[tuple[int, int, int, int]]:
    """Blocks of queries [start, end), and for each the keys [first, last) that its queries may see."""
    found = []
    for start in range(0, length, platform.CAUSAL_BLOCK):
        end = min(start + platform.CAUSAL_BLOCK, length)
        reach = length if window is None else window - 1
        found.append((start, end, max(start - reach, 0), end if causal else min(end + reach, length)))
    return found


def _heads(x: jax.Array, axis: int = 2) -> list[jax.Array]:
    """One array per head, without that dimension.

    lax.split and not indexing: its transpose is one concatenation, that of indexing a sum of padded arrays.
    """
    return [part.squeeze(axis) for part in jax.lax.split(x, [1] * x.shape[axis], axis=axis)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _one_head(
    query: jax.Array, key: jax.Array, value: jax.Array, added: Added, scoring: Scoring
) -> jax.Array:
    """Attention of one head: query `[batch, queries, head_dim]`, key `[batch, keys, head_dim]`, value
    `[batch, keys, value_dim]`, bias and mask `[1 or batch, queries, keys]`, its sink a scalar.
    """
    return _forward(query, key, value, added, scoring)[0]


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, added: Added, scoring: Scoring
) -> tuple[jax.Array, tuple[Any, ...]]:
    scores = added.to(scoring.scores(scoring.dot("bqd,bkd->bqk", query, key)))  # [batch, queries, keys]
    top = scores.max(axis=-1, keepdims=True)  # [batch, queries, 1]
    if added.sinks is not None:
        top = jnp.maximum(top, added.sinks)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)  # [batch, queries, 1]
    if added.sinks is not None:
        total = total + jnp.exp(added.sinks - top)
    # Divided after the product, which is narrower than the weights.
    context = scoring.dot("bqk,bkd->bqd", weights.astype(value.dtype), value) / total
    context = context.astype(value.dtype)
    return context, (query, key, value, added, context, top, total)


def _backward(scoring: Scoring, residuals: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    """The backward pass of FlashAttention (Dao et al. 2022, algorithm 4), without its tiling."""
    query, key, value, added, context, top, total = residuals
    kind = value.dtype
    scores = scoring.scores(scoring.dot("bqd,bkd->bqk", query, key))
    weights = jnp.exp(added.to(scores) - top) / total  # [batch, queries, keys]
    # Row sums of weights × their gradient, from the narrower product.
    inner = jnp.sum((gradient * context).astype(jnp.float32), axis=-1, keepdims=True)  # [batch, queries, 1]
    by_weights = scoring.dot("bqd,bkd->bqk", gradient, value)
    by_scores = weights * (by_weights - inner)  # f32 [batch, queries, keys]
    by_bias = None
    if added.bias is not None:
        by_bias = _sum_rows(by_scores) if added.bias.shape[0] == 1 else by_scores
    by_sink = None
    if added.sinks is not None:  # its weight × -inner: it has no value
        by_sink = -jnp.sum(jnp.exp(added.sinks - top) / total * inner)
    by_products = by_scores
    if scoring.softcap is not None:
        by_products = by_scores * (1 - (scores / scoring.softcap) ** 2)
    narrow = by_products.astype(kind)
    return (
        (scoring.scale * scoring.dot("bqk,bkd->bqd", narrow, key)).astype(query.dtype),
        (scoring.scale * scoring.dot("bqk,bqd->bkd", narrow, query)).astype(key.dtype),
        scoring.dot("bqk,bqd->bkd", weights.astype(kind), gradient).astype(kind),
        Added(by_bias, None, by_sink),
    )


def _sum_rows(x: jax.Array) -> jax.Array:
    """x.sum(axis=0, keepdims=True), by adding halves of each device's rows: XLA's CPU backend took 46 ms to
    reduce the first dimension of f32 [8, 512, 512], and takes 5 for these additions.
    """
    mesh = current_mesh()
    rows = activation_axes(("batch", None, None), x.shape)[0]
    devices = math.prod(mesh.shape[axis] for axis in rows) if mesh else 1
    x = x.reshape(devices, -1, *x.shape[1:])
    while x.shape[1] % 2 == 0:
        first, second = jnp.split(x, 2, axis=1)
        x = first + second
    return x.sum(axis=(0, 1))[None]


_one_head.defvjp(_forward, _backward)
