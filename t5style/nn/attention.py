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

    def __call__(self, weights: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(self.key, 1.0 - self.rate, weights.shape)
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
    if implementation == "cpu" and causal and masked is not None and dropout is None:
        return _causal_blocks(query, key, value, bias, masked, scale, precision)
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
    """One head after another, with a backward pass that computes the weights again.

    The scores of one head stay in cache where those of all heads would not, and nothing of size queries ×
    keys is kept for the backward pass. With dropout it is the einsum: the random bits of each head would be
    a program of their own.
    """
    if dropout:
        return _reference(query, key, value, bias, masked, scale, dropout, precision)
    heads, groups = query.shape[2], key.shape[2]
    queries, keys, values = _heads(query), _heads(key), _heads(value)
    biases = [None] * heads if bias is None else _heads(bias, axis=1)  # [1 or batch, queries, keys]
    flat_mask = None if masked is None else masked[:, 0]  # [batch or 1, queries, keys]
    contexts = [
        _one_head(
            queries[head],
            keys[head * groups // heads],
            values[head * groups // heads],
            biases[head],
            flat_mask,
            scale,
            precision,
        )
        for head in range(heads)
    ]
    return jnp.stack(contexts, axis=2)  # [batch, queries, heads, head_dim]


def _causal_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masked: jax.Array,
    scale: float,
    precision: str,
) -> jax.Array:
    """_cpu on one block of queries after another, each with the keys up to its own end: it sees no others."""
    parts = []
    for start in range(0, query.shape[1], platform.CAUSAL_BLOCK):
        end = min(start + platform.CAUSAL_BLOCK, query.shape[1])
        rows = (..., slice(start, end), slice(end))
        block_bias = None if bias is None else bias[rows]
        parts.append(
            _cpu(
                query[:, start:end],
                key[:, :end],
                value[:, :end],
                block_bias,
                masked[rows],
                scale,
                None,
                precision,
            )
        )
    return jnp.concatenate(parts, axis=1)


def _heads(x: jax.Array, axis: int = 2) -> list[jax.Array]:
    """One array per head, without that dimension.

    lax.split and not indexing: its transpose is one concatenation, that of indexing a sum of padded arrays.
    """
    return [part.squeeze(axis) for part in jax.lax.split(x, [1] * x.shape[axis], axis=axis)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _one_head(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masked: jax.Array | None,
    scale: float,
    precision: str,
) -> jax.Array:
    """Attention of one head: query `[batch, queries, head_dim]`, key and value `[batch, keys, head_dim]`."""
    return _one_head_forward(query, key, value, bias, masked, scale, precision)[0]


def _one_head_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    masked: jax.Array | None,
    scale: float,
    precision: str,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    scores = _scores(query, key, bias, masked, scale, precision)  # [batch, queries, keys]
    top = scores.max(axis=-1, keepdims=True)  # [batch, queries, 1]
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)  # [batch, queries, 1]
    # Divided after the product, which is narrower than the weights.
    context = _dot("bqk,bkd->bqd", weights.astype(value.dtype), value, precision) / total
    context = context.astype(value.dtype)
    return context, (query, key, value, bias, masked, context, top, total)


def _one_head_backward(
    scale: float, precision: str, residuals: tuple[jax.Array | None, ...], gradient: jax.Array
) -> tuple[jax.Array | None, ...]:
    """The backward pass of FlashAttention (Dao et al. 2022, algorithm 4), without its tiling."""
    query, key, value, bias, masked, context, top, total = residuals
    assert query is not None
    assert key is not None
    assert value is not None
    assert context is not None
    assert top is not None
    assert total is not None
    kind = value.dtype
    weights = jnp.exp(_scores(query, key, bias, masked, scale, precision) - top) / total  # [b, q, k]
    # Row sums of weights × their gradient, from the narrower product.
    inner = jnp.sum((gradient * context).astype(jnp.float32), axis=-1, keepdims=True)  # [batch, queries, 1]
    by_weights = _dot("bqd,bkd->bqk", gradient, value, precision)
    by_scores = weights * (by_weights - inner)  # f32 [batch, queries, keys]
    narrow = by_scores.astype(kind)
    by_bias = by_scores
    if bias is not None and bias.shape[0] == 1:
        by_bias = _sum_rows(by_scores)
    return (
        (scale * _dot("bqk,bkd->bqd", narrow, key, precision)).astype(query.dtype),
        (scale * _dot("bqk,bqd->bkd", narrow, query, precision)).astype(key.dtype),
        _dot("bqk,bqd->bkd", weights.astype(kind), gradient, precision).astype(kind),
        None if bias is None else by_bias,
        None,  # of the mask
    )


def _sum_rows(x: jax.Array) -> jax.Array:
    """x.sum(axis=0, keepdims=True), by adding halves: XLA's CPU backend took 46 ms to reduce the first
    dimension of f32 [8, 512, 512], and takes 5 for these additions.
    """
    while len(x) % 2 == 0:
        first, second = jnp.split(x, 2)
        x = first + second
    return x.sum(axis=0, keepdims=True)


_one_head.defvjp(_one_head_forward, _one_head_backward)


def _dot(equation: str, left: jax.Array, right: jax.Array, precision: str) -> jax.Array:
    """A product of two operands of one dtype, summed and returned in float32."""
    return jnp.einsum(equation, left, right, precision=precision, preferred_element_type=jnp.float32)


def _scores(
    query: jax.Array,
    key: jax.Array,
    bias: jax.Array | None,
    masked: jax.Array | None,
    scale: float,
    precision: str,
) -> jax.Array:
    """f32 `[batch, queries, keys]` of one head, biases added."""
    scores = scale * _dot("bqd,bkd->bqk", query, key, precision)
    for added in (bias, masked):
        scores = scores if added is None else scores + added
    return scores


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
    """cuDNN's fused kernel by jax.nn.dot_product_attention, or the reference for what it does not take."""
    if dropout:
        raise ValueError(
            "attention implementation 'dot_product' cannot drop attention weights: use 'reference'"
        )
    if precision != "default" or not _cudnn_takes(query, key, bias is not None or masked is not None):
        return _reference(query, key, value, bias, masked, scale, None, precision)
    if bias is not None:
        bias = bias.astype(query.dtype)
    mask = None if masked is None else masked > MASKED / 2
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, scale=scale, implementation="cudnn"
    )


def _cudnn_takes(query: jax.Array, key: jax.Array, biased: bool) -> bool:
    """Whether cuDNN's kernel computes attention of these operands on this machine.

    The limits are those of check_layout and check_is_flash_attention in jax/_src/cudnn
    (fused_attention_stablehlo.py, jax 0.10.2), which raise beyond them: 16-bit floats; heads of a multiple
    of 8, up to 128 before Hopper; with a bias, which a mask becomes, even lengths in the backward pass.
    """
    width = query.shape[-1]
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return (
        platform.has_cudnn_attention()
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and width % 8 == 0
        and width <= 128
        and (even or not biased)
    )


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
