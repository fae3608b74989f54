"""Attention: one function, several implementations that must agree wherever a query is a real token.

Masks are never arrays `[batch, queries, keys]` given from outside: packed batches say with segment ids which
tokens belong together, `causal` that a token sees no later one, and `window` how far it sees. So every
implementation can build its masks block by block, and one that cannot honour them must refuse.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5style.nn import attention_cpu, attention_sequence, attention_splash, attention_whole, platform
from t5style.nn.attention_scores import MASKED, Added, Scoring, mask_bias
from t5style.nn.attention_tiles import BiasByDistance, Pattern
from t5style.nn.settings import AttentionBlocks


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of attention weights: each is zeroed with probability rate, others grow by 1 / (1 - rate)."""

    rate: float
    key: jax.Array

    def __call__(self, weights: jax.Array) -> jax.Array:
        keep = jax.random.bernoulli(self.key, 1.0 - self.rate, weights.shape)
        return jnp.where(keep, weights / (1.0 - self.rate), 0.0)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | BiasByDistance | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    global_tokens: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    dropout: Dropout | None = None,
    implementation: str = "auto",
    blocks: AttentionBlocks | None = None,
    precision: str = "default",
    sequence: str = "gather",
) -> jax.Array:
    """softmax(scale · query · keyᵀ + bias, over visible keys) · value (Vaswani et al. 2017, equation 1).

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key: `[batch, keys, kv_heads, head_dim]`; head h uses key-value head h // (heads / kv_heads).
      value: `[batch, keys, kv_heads, value_dim]`.
      bias: f32 `[1 or batch, heads, queries, keys]`, added to the scaled scores; or one by distance.
      query_segments, key_segments: int32 `[batch, queries]`, `[batch, keys]`: a query sees keys of its own
        segment; 0 is padding, which nothing sees. None: everything is one segment.
      causal: a query sees no key of a later index (only where both sides are the same sequence).
      window: query i sees keys from i - window + 1 on, and unless causal up to i + window - 1 (again of the
        same sequence).
      global_tokens: with a window: so many first tokens of a row are seen by all, and see all (of their own
        segment, and if causal, before them), as in Longformer and BigBird. Computed in tiles, on any device
        (nn/attention_tiles.py), whatever the implementation.
      scale: factor on the scores.
      softcap: scaled scores x become softcap · tanh(x / softcap) (Gemma 2), before bias and masks.
      sinks: f32 `[heads]`: one more score in the softmax, of a key that every query sees and that has no
        value (GPT-OSS): weights sum to less than 1.
      dropout: of the weights, or None.
      implementation: 'reference', 'cpu', 'dot_product', 'splash', 'whole', or 'auto' (see nn/platform.py).
      blocks: tiles of 'splash'.
      precision: as jax.lax.Precision names it.
      sequence: what happens where the mesh divides sequences: 'gather', 'ring' or 'ulysses'
        (nn/attention_sequence.py). A ring has an implementation of its own, of which 'splash' and on a TPU
        'auto' say that it may use the TPU's kernel.

    Returns:
      `[batch, queries, heads, value_dim]` in value's dtype, which a remat policy may keep under the name
      'attention_context'. What a padding query gets is finite and otherwise unspecified.

    Raises:
      ValueError: arguments that contradict each other, or a combination the implementation cannot compute
        exactly.
    """
    scoring = Scoring(scale, softcap, precision)
    _check(query, key, value, query_segments, key_segments, causal, window, sinks)
    pattern = Pattern(causal, window, global_tokens if window is not None else 0)
    attention_sequence.check(sequence, query.shape[1], key.shape[1], query.shape[2], pattern)
    divided = attention_sequence.devices(query.shape[1], key.shape[1]) > 1
    by_heads = divided and sequence == "ulysses"
    if (divided and sequence == "ring") or (pattern.global_tokens and not by_heads):
        if dropout is not None or isinstance(bias, jax.Array):
            what = "drop attention weights" if dropout is not None else "add a bias of every query and key"
            raise ValueError(
                f"attention in tiles, as a ring and global tokens need it, cannot {what}: use "
                "sequence_attention 'gather' or 'ulysses' without global tokens, dropout 0, or a bias by "
                "distance"
            )
        refusal = attention_splash.refusal(query, key, value, bias=False, dropout=False, precision=precision)
        kernel = implementation == "splash" or (implementation == "auto" and platform.platform() == "tpu")
        return attention_sequence.ring(
            query,
            key,
            value,
            bias=bias,
            query_segments=query_segments,
            key_segments=key_segments,
            pattern=pattern,
            scoring=scoring,
            sinks=sinks,
            kernel=(blocks or AttentionBlocks()) if kernel and refusal is None else None,
        )
    if by_heads:
        return _by_heads(
            query,
            key,
            value,
            bias,
            query_segments,
            key_segments,
            sinks,
            dropout,
            causal=causal,
            window=window,
            global_tokens=global_tokens,
            scale=scale,
            softcap=softcap,
            implementation=implementation,
            blocks=blocks,
            precision=precision,
        )
    implementation = choose(
        implementation,
        query,
        key,
        value,
        bias=bias,
        dropout=dropout is not None,
        precision=precision,
        plain=window is None and softcap is None and sinks is None,
    )
    if implementation == "whole":
        assert bias is None or isinstance(bias, BiasByDistance)  # or it had been refused
        context = attention_whole.attention(
            query,
            key,
            value,
            bias=bias,
            query_segments=query_segments,
            key_segments=key_segments,
            causal=causal,
            scale=scale,
        )
        return checkpoint_name(context, attention_splash.CONTEXT)
    if isinstance(bias, BiasByDistance):
        bias = bias.dense(query.shape[1], key.shape[1])
    if implementation == "splash":
        return attention_splash.attention(
            query,
            key,
            value,
            query_segments=query_segments,
            key_segments=key_segments,
            masking=attention_splash.Masking(causal, window),
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            blocks=blocks or AttentionBlocks(),
        )
    if implementation == "cpu" and (causal or window is not None) and dropout is None:
        context = attention_cpu.blocks(
            query,
            key,
            value,
            bias=bias,
            sinks=sinks,
            query_segments=query_segments,
            key_segments=key_segments,
            causal=causal,
            window=window,
            scoring=scoring,
        )
        return checkpoint_name(context, attention_splash.CONTEXT)
    masked = mask_bias(
        query_segments,
        key_segments,
        causal=causal,
        queries=query.shape[1],
        keys=key.shape[1],
        window=window,
    )
    added = Added(bias, masked, sinks)
    context = _IMPLEMENTATIONS[implementation](query, key, value, added, scoring, dropout)
    return checkpoint_name(context, attention_splash.CONTEXT)


def choose(
    implementation: str,
    query: Any,
    key: Any,
    value: Any,
    *,
    bias: Any,
    dropout: bool,
    precision: str = "default",
    plain: bool = True,
) -> str:
    """The implementation that `attention` takes for such operands, of which shapes and dtypes are enough.

    Args:
      implementation: 'auto', or one that is checked.
      query, key, value: as those of `attention`, or their jax.ShapeDtypeStructs.
      bias: as that of `attention`; of one by distance only the type counts.
      dropout: whether weights are dropped.
      precision: as that of `attention`.
      plain: no window, soft cap or sinks.

    Raises:
      ValueError: there is no such implementation, or it cannot compute this.
    """
    limits: dict[str, Any] = {"dropout": dropout, "precision": precision}
    refusals = {
        "splash": attention_splash.refusal(query, key, value, bias=bias is not None, **limits),
        "whole": attention_whole.refusal(query, key, value, bias=bias, **limits)
        if plain
        else "it has no windows, soft caps or sinks",
    }
    if implementation == "auto":
        return platform.attention_implementation(
            dropout=dropout,
            kernels=[name for name, refusal in refusals.items() if refusal is None],
            queries=query.shape[1],
            keys=key.shape[1],
        )
    if implementation not in (*_IMPLEMENTATIONS, *refusals):
        raise ValueError(
            f"attention implementation {implementation!r} is not one of "
            f"{', '.join((*_IMPLEMENTATIONS, *refusals, 'auto'))}"
        )
    if refusals.get(implementation) is not None:
        raise ValueError(
            f"attention implementation {implementation!r} cannot compute this: {refusals[implementation]}; "
            "use 'auto' or 'reference'"
        )
    return implementation


def _by_heads(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | BiasByDistance | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    sinks: jax.Array | None,
    dropout: Dropout | None,
    **settings: Any,
) -> jax.Array:
    """Attention with heads divided over the mesh axis `sequence`, each device calling `attention`."""

    def local(*arrays: jax.Array, random: jax.Array | None, **others: Any) -> jax.Array:
        own = None if random is None or dropout is None else Dropout(dropout.rate, random)
        if isinstance(bias, BiasByDistance):
            others["bias"] = BiasByDistance(others["bias"])
        return attention(*arrays, dropout=own, **others, **settings)  # type: ignore[misc]

    return attention_sequence.ulysses(
        query,
        key,
        value,
        bias=bias,
        query_segments=query_segments,
        key_segments=key_segments,
        sinks=sinks,
        random=None if dropout is None else dropout.key,
        local=local,
    )


def _check(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    causal: bool,
    window: int | None,
    sinks: jax.Array | None,
) -> None:
    heads, groups = query.shape[2], key.shape[2]
    if (query_segments is None) != (key_segments is None):
        raise ValueError("give both query_segments and key_segments, or neither")
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key-value heads evenly")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(
            f"key {key.shape} and value {value.shape} must be alike in batch, length and key-value heads"
        )
    if window is not None and window < 1:
        raise ValueError(f"window = {window} must be at least 1, the token itself, or None")
    if (causal or window is not None) and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"causal and window count along one sequence, but there are {query.shape[1]} queries and "
            f"{key.shape[1]} keys"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks {sinks.shape} must be one number for each of {heads} query heads")


def _softmax(scores: jax.Array, added: Added) -> jax.Array:
    """Weights of scores `[batch, heads, queries, keys]`, in float32."""
    scores = added.to(scores)
    if added.sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = added.sinks[:, None, None]  # [heads, 1, 1]
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1, keepdims=True), sinks))
    weights = jnp.exp(scores - top)
    return weights / (weights.sum(axis=-1, keepdims=True) + jnp.exp(sinks - top))


def _reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    added: Added,
    scoring: Scoring,
    dropout: Dropout | None,
) -> jax.Array:
    batch, queries, heads, width = query.shape
    keys, groups = key.shape[1:3]
    query = query.reshape(batch, queries, groups, heads // groups, width)
    scores = scoring.scores(
        scoring.dot("bqgnd,bkgd->bgnqk", query, key)
    )  # [batch, kv_heads, heads / kv_heads, queries, keys]
    weights = _softmax(scores.reshape(batch, heads, queries, keys), added)  # [batch, heads, queries, keys]
    if dropout:
        weights = dropout(weights)
    weights = weights.astype(value.dtype).reshape(batch, groups, heads // groups, queries, keys)
    context = scoring.dot("bgnqk,bkgd->bqgnd", weights, value).astype(value.dtype)
    return context.reshape(batch, queries, heads, value.shape[-1])


def _cpu(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    added: Added,
    scoring: Scoring,
    dropout: Dropout | None,
) -> jax.Array:
    """nn/attention_cpu.py, but with dropout the einsum: random bits of each head would be a program each."""
    if dropout:
        return _reference(query, key, value, added, scoring, dropout)
    return attention_cpu.heads_apart(query, key, value, added, scoring)


def _dot_product(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    added: Added,
    scoring: Scoring,
    dropout: Dropout | None,
) -> jax.Array:
    """cuDNN's fused kernel by jax.nn.dot_product_attention, or the reference for what it does not take."""
    if dropout:
        raise ValueError(
            "attention implementation 'dot_product' cannot drop attention weights: use 'reference'"
        )
    if not _cudnn_takes(query, key, value, added, scoring):
        return _reference(query, key, value, added, scoring, None)
    bias = None if added.bias is None else added.bias.astype(query.dtype)
    mask = None if added.masked is None else added.masked > MASKED / 2
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, mask=mask, scale=scoring.scale, implementation="cudnn"
    )


def _cudnn_takes(query: jax.Array, key: jax.Array, value: jax.Array, added: Added, scoring: Scoring) -> bool:
    """Whether cuDNN's kernel computes attention of these operands on this machine.

    The limits are those of check_layout and check_is_flash_attention in jax/_src/cudnn
    (fused_attention_stablehlo.py, jax 0.10.2), which raise beyond them: 16-bit floats; heads of a multiple
    of 8, up to 128 before Hopper, with values as wide as keys; with a bias, which a mask becomes, even
    lengths in the backward pass. It knows no soft caps, sinks or precisions.
    """
    width = query.shape[-1]
    biased = added.bias is not None or added.masked is not None
    even = query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0
    return (
        scoring.precision == "default"
        and scoring.softcap is None
        and added.sinks is None
        and platform.has_cudnn_attention()
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and width % 8 == 0
        and width <= 128
        and value.shape[-1] == width
        and (even or not biased)
    )


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": _reference,
    "cpu": _cpu,
    "dot_product": _dot_product,
}


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: jax.Array,
    *,
    bias: jax.Array | None = None,
    scale: float = 1.0,
    precision: str = "default",
    softcap: float | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of a few new tokens to a cache, which keeps each head's keys together (nn/cache.py).

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key, value: `[batch, kv_heads, slots, head_dim]` and `[batch, kv_heads, slots, value_dim]`.
      visible: bool `[batch, queries or 1, slots]`.
      bias: f32 `[1 or batch, heads, queries, slots]` or None.
      scale, precision, softcap, sinks: see attention.

    Returns:
      `[batch, queries, heads, value_dim]` in query's dtype.
    """
    scoring = Scoring(scale, softcap, precision)
    batch, queries, heads, width = query.shape
    groups, slots = key.shape[1:3]
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    # The query heads that share a key-value head become further rows of one product.
    rows = query.reshape(batch, queries, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, groups, heads // groups * queries, width)
    # [batch, kv_heads, heads / kv_heads · queries, slots]
    scores = scoring.scores(scoring.dot("bgrd,bgsd->bgrs", rows, key))
    scores = scores.reshape(batch, heads, queries, slots)
    weights = _softmax(scores, Added(bias, jnp.where(visible, 0.0, MASKED)[:, None], sinks))
    weights = weights.astype(query.dtype).reshape(batch, groups, heads // groups * queries, slots)
    context = scoring.dot("bgrs,bgsd->bgrd", weights, value)
    context = context.astype(query.dtype).reshape(batch, groups, heads // groups, queries, -1)
    return context.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, value.shape[-1])
