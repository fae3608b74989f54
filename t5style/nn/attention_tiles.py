"""Attention tile by tile in plain XLA: memory grows with the length and not with its square.

The online softmax and the backward pass are FlashAttention's (Dao et al. 2022, algorithms 1 and 4). What it
serves are patterns that no kernel here has: part of a sequence against part of another that has travelled
from elsewhere (nn/attention_sequence.py), and windows with global tokens. Tiles that no query of theirs can
see, by its index, are not computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from t5style.nn.attention_scores import Scoring

State = TypeVar("State")

# Tokens along each side of a tile: f32 scores of 32 heads then take 32 MB.
TILE = 512
# Below all scores, and finite: the difference of two of them is 0.
LOWEST = -1e30


class Pattern(NamedTuple):
    """Which keys a query may see, by their indices in the whole sequence.

    Attributes:
      causal: none after itself.
      window: none before i - window + 1 and, unless causal, none after i + window - 1.
      global_tokens: the sequence's first tokens, which all see whatever the window, and which see all (if
        causal, all before them).
    """

    causal: bool = False
    window: int | None = None
    global_tokens: int = 0

    def ranges(self, first: Any, last: Any, length: int) -> Iterator[tuple[Any, Any, bool | None]]:
        """Keys [low, high) that some query from first to last may see, and what `visible` takes them for."""
        high = last + 1 if self.causal else length
        if self.window is None:
            yield 0, high, None
            return
        low = first - self.window + 1
        if not self.causal:
            high = last + self.window
        if not self.global_tokens:
            yield low, high, None
            return
        all_keys = first < self.global_tokens
        low = jnp.where(all_keys, 0, low)
        yield low, high if self.causal else jnp.where(all_keys, length, high), False
        yield 0, jnp.minimum(high, self.global_tokens) if self.causal else self.global_tokens, True

    def visible(self, query: jax.Array, key: jax.Array, are_global: bool | None) -> jax.Array | None:
        """Bool, of indices that broadcast; None: all. are_global: of keys that are global tokens, or others,
        or both alike.
        """
        rules = []
        if self.causal:
            rules.append(key <= query)
        if are_global is not None:
            rules.append((key < self.global_tokens) == are_global)
        if self.window is not None and not are_global:
            near = query - key < self.window
            near = near if self.causal else near & (key - query < self.window)
            rules.append(near | (query < self.global_tokens) if self.global_tokens else near)
        return functools.reduce(jnp.logical_and, rules) if rules else None


class BiasByDistance(NamedTuple):
    """A bias of the scores that depends on the distance of key and query only, as T5's does.

    Attributes:
      values: f32 `[1, heads, queries + keys - 1]`; that of key j for query i is entry j - i + queries - 1.
    """

    values: jax.Array

    def dense(self, queries: int, keys: int) -> jax.Array:
        """f32 `[1, heads, queries, keys]`."""
        return _spread(self.values, queries, keys)


def _spread(values: jax.Array, queries: int, keys: int) -> jax.Array:
    """`[..., queries + keys - 1] -> [..., queries, keys]`: row i is the window that begins at queries-1-i.

    Repeating the line and cutting it into rows one shorter than itself shifts each row by one.
    """
    width = queries + keys
    lead = values.shape[:-1]
    line = jnp.pad(values, [(0, 0)] * len(lead) + [(0, 1)])
    rows = jnp.broadcast_to(line[..., None, :], (*lead, queries, width)).reshape(*lead, queries * width)
    rows = rows[..., : queries * (width - 1)].reshape(*lead, queries, width - 1)
    return rows[..., queries - 1 :]


class Side(NamedTuple):
    """A contiguous piece of a sequence.

    Attributes:
      start: index of its first token, an int or a traced one.
      arrays: queries `[batch, kv_heads, heads / kv_heads, tokens, dim]`, or keys or values `[batch, kv_heads,
        tokens, dim]`, and what else has its tokens along the last dimension but one.
      segments: int32 `[batch, tokens]` or None.
    """

    start: Any
    arrays: tuple[jax.Array, ...]
    segments: jax.Array | None

    @property
    def tokens(self) -> int:
        """How many it has."""
        return self.arrays[0].shape[-2]


class Settings(NamedTuple):
    """What stays the same from tile to tile.

    Attributes:
      pattern: which keys are seen.
      scoring: how scores are made.
      queries, keys: lengths of the whole sequences.
      tile: tokens along a side of a tile.
    """

    pattern: Pattern
    scoring: Scoring
    queries: int
    keys: int
    tile: int


class Softmax(NamedTuple):
    """A softmax over the keys seen so far, of queries `[batch, kv_heads, heads / kv_heads, tokens]`.

    Attributes:
      context: f32 `[..., value_dim]`, the weighted sum of values times total.
      top: f32 `[..., 1]`, the largest score.
      total: f32 `[..., 1]`, the sum of exp(score - top).
    """

    context: jax.Array
    top: jax.Array
    total: jax.Array

    def result(self) -> tuple[jax.Array, jax.Array]:
        """The weighted sum, f32, and the logarithm of the sum of exp(score); 0 where nothing was seen."""
        total = jnp.where(self.total > 0, self.total, 1.0)
        return self.context / total, self.top + jnp.log(total)


def empty(query: jax.Array, value_dim: int, sinks: jax.Array | None) -> Softmax:
    """Of queries `[batch, kv_heads, heads / kv_heads, tokens, dim]` that have seen nothing but their sinks,
    f32 `[kv_heads, heads / kv_heads]`.
    """
    rows = (*query.shape[:-1], 1)
    context = jnp.zeros((*rows[:-1], value_dim), jnp.float32)
    if sinks is None:
        return Softmax(context, jnp.full(rows, LOWEST), jnp.zeros(rows))
    return Softmax(context, jnp.broadcast_to(sinks[..., None, None], rows), jnp.ones(rows))


def tile_of(tokens: int) -> int:
    """The largest divisor of a number of tokens up to TILE."""
    return next(size for size in range(min(TILE, tokens), 0, -1) if tokens % size == 0)


def see(softmax: Softmax, queries: Side, keys: Side, bias: jax.Array | None, settings: Settings) -> Softmax:
    """The softmax after its queries have seen these keys: keys.arrays are keys and values."""
    (query,), (key, value) = queries.arrays, keys.arrays
    scoring = settings.scoring

    def column(at: _Tile, held: Softmax) -> Softmax:
        scores, visible, _ = _scores(at, query, key, queries, keys, bias, settings)
        if visible is not None:
            scores = jnp.where(visible, scores, LOWEST)
        top = jnp.maximum(held.top, scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - top)
        if visible is not None:
            weights = jnp.where(visible, weights, 0.0)
        before = jnp.exp(held.top - top)
        part = scoring.dot("bgrqk,bgkd->bgrqd", weights.astype(value.dtype), at.key(value))
        return Softmax(
            held.context * before + part,
            top,
            held.total * before + weights.sum(axis=-1, keepdims=True),
        )

    def row(number: Any, whole: Softmax) -> Softmax:
        held = jax.tree.map(lambda x: _cut(x, number, _size(queries, settings)), whole)
        held = _columns(number, queries, keys, settings, column, held)
        return jax.tree.map(lambda x, part: _put(x, part, number), whole, held)

    return jax.lax.fori_loop(0, queries.tokens // _size(queries, settings), row, softmax)


class Gradients(NamedTuple):
    """Sums of gradients, f32.

    Attributes:
      query, key, value: as those.
      bias: as BiasByDistance.values `[kv_heads, heads / kv_heads, distances]`, or None.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None


def see_backward(
    sums: Gradients, queries: Side, keys: Side, bias: jax.Array | None, settings: Settings
) -> Gradients:
    """Adds the gradients of what these queries got of these keys.

    Args:
      sums: so far.
      queries: its arrays are queries, the gradient of the context, f32 `[..., tokens, 1]` of the softmax's
        logarithms (Softmax.result), and of the sums of context · its gradient.
      keys: its arrays are keys and values.
      bias: as for `see`.
      settings: as for `see`.
    """
    (query, gradient, logarithm, inner), (key, value) = queries.arrays, keys.arrays
    scoring, kind = settings.scoring, value.dtype

    def column(at: _Tile, held: Gradients) -> Gradients:
        scores, visible, plain = _scores(at, query, key, queries, keys, bias, settings)
        weights = jnp.exp(scores - at.query(logarithm))
        if visible is not None:
            weights = jnp.where(visible, weights, 0.0)
        by_context = at.query(gradient)
        by_weights = scoring.dot("bgrqd,bgkd->bgrqk", by_context, at.key(value))
        by_scores = weights * (by_weights - at.query(inner))
        by_bias = held.bias
        if by_bias is not None:
            spread = functools.partial(_spread, queries=at.query_size, keys=at.key_size)
            line = jax.ShapeDtypeStruct((*by_bias.shape[:-1], at.query_size + at.key_size - 1), jnp.float32)
            (part,) = jax.linear_transpose(spread, line)(by_scores.sum(axis=0))
            where = _place(at, queries, keys, settings)
            by_bias = jax.lax.dynamic_update_slice_in_dim(
                by_bias,
                jax.lax.dynamic_slice_in_dim(by_bias, where, part.shape[-1], axis=-1) + part,
                where,
                axis=-1,
            )
        if scoring.softcap is not None:
            by_scores = by_scores * (1 - (plain / scoring.softcap) ** 2)
        narrow = (scoring.scale * by_scores).astype(kind)
        by_key = scoring.dot("bgrqk,bgrqd->bgkd", narrow, at.query(query))
        by_value = scoring.dot("bgrqk,bgrqd->bgkd", weights.astype(kind), by_context)
        return Gradients(
            held.query + scoring.dot("bgrqk,bgkd->bgrqd", narrow, at.key(key)),
            _put(held.key, at.key(held.key) + by_key, at.key_number),
            _put(held.value, at.key(held.value) + by_value, at.key_number),
            by_bias,
        )

    def row(number: Any, whole: Gradients) -> Gradients:
        held = whole._replace(query=_cut(whole.query, number, _size(queries, settings)))
        held = _columns(number, queries, keys, settings, column, held)
        return held._replace(query=_put(whole.query, held.query, number))

    return jax.lax.fori_loop(0, queries.tokens // _size(queries, settings), row, sums)


class _Tile(NamedTuple):
    query_number: Any
    query_size: int
    key_number: Any
    key_size: int
    are_global: bool | None

    def query(self, x: jax.Array) -> jax.Array:
        return _cut(x, self.query_number, self.query_size)

    def key(self, x: jax.Array) -> jax.Array:
        return _cut(x, self.key_number, self.key_size)


def _size(side: Side, settings: Settings) -> int:
    return settings.tile if side.tokens % settings.tile == 0 else tile_of(side.tokens)


def _columns(
    number: Any,
    queries: Side,
    keys: Side,
    settings: Settings,
    column: Callable[[_Tile, State], State],
    state: State,
) -> State:
    """`column` on each tile of keys that the queries of tile `number` may see."""
    size, width = _size(queries, settings), _size(keys, settings)
    count = keys.tokens // width
    first = queries.start + number * size
    for low, high, are_global in settings.pattern.ranges(first, first + size - 1, settings.keys):
        begin = jnp.clip((low - keys.start) // width, 0, count)
        end = jnp.clip((high - keys.start + width - 1) // width, begin, count)

        def step(index: Any, held: State, are_global: bool | None = are_global) -> State:
            return column(_Tile(number, size, index, width, are_global), held)

        state = jax.lax.fori_loop(begin, end, step, state)
    return state


def _scores(
    at: _Tile,
    query: jax.Array,
    key: jax.Array,
    queries: Side,
    keys: Side,
    bias: jax.Array | None,
    settings: Settings,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Scores of a tile, which of them count (None: all), and the scores before the bias."""
    scoring = settings.scoring
    plain = scoring.scores(scoring.dot("bgrqd,bgkd->bgrqk", at.query(query), at.key(key)))
    scores = plain
    if bias is not None:
        where = _place(at, queries, keys, settings)
        line = jax.lax.dynamic_slice_in_dim(bias, where, at.query_size + at.key_size - 1, axis=-1)
        scores = plain + _spread(line, at.query_size, at.key_size)
    index = queries.start + at.query_number * at.query_size + jnp.arange(at.query_size)[:, None]
    key_index = keys.start + at.key_number * at.key_size + jnp.arange(at.key_size)
    visible = settings.pattern.visible(index, key_index, at.are_global)
    if queries.segments is not None and keys.segments is not None:
        own = at.query(queries.segments[..., None])  # [batch, queries, 1]
        other = at.key(keys.segments[..., None]).swapaxes(1, 2)  # [batch, 1, keys]
        same = ((own == other) & (other != 0))[:, None, None]
        visible = same if visible is None else same & visible
    return scores, visible, plain


def _place(at: _Tile, queries: Side, keys: Side, settings: Settings) -> Any:
    """Where in the bias's line that of a tile begins: with its first key and its last query."""
    last = queries.start + (at.query_number + 1) * at.query_size - 1
    return keys.start + at.key_number * at.key_size - last + settings.queries - 1


def _cut(x: jax.Array, number: Any, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis=-2)


def _put(x: jax.Array, part: jax.Array, number: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part, number * part.shape[-2], axis=-2)
