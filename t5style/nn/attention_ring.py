"""Ring attention (Liu et al. 2023): each device keeps its queries, and keys and values come round.

Runs on one device's arrays, inside a jax.shard_map over the mesh axis `sequence` (nn/attention_sequence.py),
or on one device with all there is, where nothing travels. The softmax is an online one, so no device ever
holds more than a tile of scores; the backward pass sends keys and values round once more, with their
gradients' sums, and needs of the forward pass its result and one number per query.

Parts are computed in XLA's tiles (nn/attention_tiles.py), or by the TPU's kernel (nn/attention_splash.py)
where two parts see each other as wholes, not at all, or causally as one and the same.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t5style.nn import attention_splash, attention_tiles
from t5style.nn.attention_splash import CONTEXT, Masking
from t5style.nn.attention_tiles import Gradients, Settings, Side, Softmax
from t5style.nn.settings import AttentionBlocks

AXIS = "sequence"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who holds what, and where it goes.

    Attributes:
      settings: of the tiles.
      devices: along the ring.
      walks: ways that keys and values take from where they are, as (direction, hops): +1 to the next
        device.
      zigzag: device i holds parts i and 2 · devices - 1 - i of twice as many parts, rather than part i. With
        a causal mask all devices then have the same to compute at each step.
      kernel: tiles of the TPU's kernel, for queries that are scaled already, without bias and window; None:
        XLA's tiles.
    """

    settings: Settings
    devices: int = 1
    walks: tuple[tuple[int, int], ...] = ((1, 0),)
    zigzag: bool = False
    kernel: AttentionBlocks | None = None

    def starts(self, device: Any, tokens: int) -> tuple[Any, ...]:
        """Where each piece of a device's tokens begins in the sequence."""
        if not self.zigzag:
            return (device * tokens,)
        half = tokens // 2
        return device * half, (2 * self.devices - 1 - device) * half


def walks(devices: int, tokens: int, pattern: attention_tiles.Pattern) -> tuple[tuple[int, int], ...]:
    """The shortest way of keys and values to all devices whose queries see them.

    Args:
      devices: of the ring, each of which holds the next `tokens` tokens.
      tokens: see devices.
      pattern: what is seen.
    """
    if pattern.window is None or pattern.global_tokens:
        return ((1, devices - 1),)
    reach = -(-(pattern.window - 1) // tokens)
    if pattern.causal:
        return ((1, min(reach, devices - 1)),)
    return ((1, reach), (-1, reach)) if 2 * reach < devices - 1 else ((1, devices - 1),)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def ring(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    plan: Plan,
) -> jax.Array:
    """Attention of one device's queries to the keys of all.

    Args:
      query: `[batch, queries, heads, head_dim]`.
      key, value: `[batch, keys, kv_heads, head_dim]` and `[batch, keys, kv_heads, value_dim]`.
      bias: BiasByDistance.values of the whole sequences, `[heads, distances]`, or None.
      sinks: f32 `[heads]` or None.
      query_segments, key_segments: int32 `[batch, queries]`, `[batch, keys]`, or None.
      plan: see Plan.

    Returns:
      `[batch, queries, heads, value_dim]` in value's dtype.
    """
    return _forward(query, key, value, bias, sinks, query_segments, key_segments, plan)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    plan: Plan,
) -> tuple[jax.Array, tuple[Any, ...]]:
    groups = key.shape[2]
    heads, line = _grouped(sinks, groups), _grouped(bias, groups)
    here = _device(plan)
    queries = _sides(plan, here, (_rows(query, groups),), query_segments)
    travelling = (_heads_first(key), _heads_first(value), key_segments)

    def meet(softmaxes: tuple[Softmax, ...], held: Any, device: Any) -> tuple[Softmax, ...]:
        keys = _sides(plan, device, held[:2], held[2])
        for side in keys:
            softmaxes = tuple(
                _see(softmax, own, side, line, plan) for softmax, own in zip(softmaxes, queries, strict=True)
            )
        return softmaxes

    state = tuple(attention_tiles.empty(side.arrays[0], value.shape[-1], heads) for side in queries)
    for direction, hops in _first_computes(plan):
        state, _ = _walk(plan, direction, hops, travelling, state, meet)
    results = [softmax.result() for softmax in state]
    context, logarithm = (jnp.concatenate(parts, axis=-2) for parts in zip(*results, strict=True))
    context = checkpoint_name(_rows_back(context).astype(value.dtype), CONTEXT)
    logarithm = checkpoint_name(logarithm, CONTEXT)
    inputs = (query, key, value, bias, sinks, query_segments, key_segments)
    return context, (*inputs, context, logarithm)


def _backward(plan: Plan, residuals: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    query, key, value, bias, sinks, query_segments, key_segments, context, logarithm = residuals
    groups = key.shape[2]
    line = _grouped(bias, groups)
    here = _device(plan)
    inner = _rows(jnp.sum((gradient * context).astype(jnp.float32), axis=-1, keepdims=True), groups)
    arrays = (_rows(query, groups), _rows(gradient, groups), logarithm, inner)
    if plan.kernel is not None:  # it makes the last of them itself
        arrays = (*arrays[:3], _rows(context, groups))
    queries = _sides(plan, here, arrays, query_segments)
    pair = (_heads_first(key), _heads_first(value))
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in pair)

    def meet(state: Any, held: Any, device: Any) -> Any:
        (by_queries, by_line), ((keys, values, segments), sums) = state, held
        starts = plan.starts(device, keys.shape[-2])
        parts = [jnp.split(x, len(starts), axis=-2) for x in sums]
        for number, side in enumerate(_sides(plan, device, (keys, values), segments)):
            by_key, by_value = parts[0][number], parts[1][number]
            for own, by_query in enumerate(by_queries):
                sums_here = Gradients(by_query, by_key, by_value, by_line)
                found = _see_backward(sums_here, queries[own], side, line, plan)
                by_key, by_value, by_line = found.key, found.value, found.bias
                by_queries = (*by_queries[:own], found.query, *by_queries[own + 1 :])
            parts[0][number], parts[1][number] = by_key, by_value
        sums = tuple(jnp.concatenate(x, axis=-2) for x in parts)
        return (by_queries, by_line), ((keys, values, segments), sums)

    by_queries = tuple(jnp.zeros(side.arrays[0].shape, jnp.float32) for side in queries)
    state = (by_queries, None if line is None else jnp.zeros(line.shape, jnp.float32))
    total = zeros
    for direction, hops in _first_computes(plan):
        held = ((*pair, key_segments), zeros)
        state, (_, sums) = _walk(plan, direction, hops, held, state, meet, carries=True)
        sums = _send(plan, sums, -direction * hops)  # home
        total = tuple(a + b for a, b in zip(total, sums, strict=True))
    by_queries, by_line = state
    by_sinks = None
    if sinks is not None:  # a sink's weight × -inner: it has no value
        weights = jnp.exp(_grouped(sinks, groups)[..., None, None] - logarithm)
        by_sinks = -(weights * inner).sum(axis=(0, 3, 4)).reshape(sinks.shape)
    return (
        _rows_back(jnp.concatenate(by_queries, axis=-2)).astype(query.dtype),
        total[0].swapaxes(1, 2).astype(key.dtype),
        total[1].swapaxes(1, 2).astype(value.dtype),
        None if bias is None or by_line is None else by_line.reshape(bias.shape),
        by_sinks,
        None,
        None,
    )


ring.defvjp(_forward, _backward)


# --- parts ---


def _see(softmax: Softmax, queries: Side, keys: Side, bias: jax.Array | None, plan: Plan) -> Softmax:
    """attention_tiles.see, by the kernel if the plan has one."""
    kernel, (key, value) = plan.kernel, keys.arrays
    if kernel is None:
        return attention_tiles.see(softmax, queries, keys, bias, plan.settings)

    def part(causal: bool) -> Softmax:
        (query,) = queries.arrays
        context, logarithm = attention_splash.local_forward(
            _flat(query),
            key,
            value,
            queries.segments,
            keys.segments,
            masking=Masking(causal),
            softcap=plan.settings.scoring.softcap,
            blocks=kernel,
        )
        rows = softmax.top.shape
        logarithm = logarithm.reshape(rows)
        top = jnp.maximum(softmax.top, logarithm)
        before, weight = jnp.exp(softmax.top - top), jnp.exp(logarithm - top)
        context = context.astype(jnp.float32).reshape(softmax.context.shape)
        return Softmax(softmax.context * before + context * weight, top, softmax.total * before + weight)

    return _by_order(plan, queries, keys, softmax, part)


def _see_backward(
    sums: Gradients, queries: Side, keys: Side, bias: jax.Array | None, plan: Plan
) -> Gradients:
    """attention_tiles.see_backward, by the kernel if the plan has one: then the last of the queries' arrays
    is the context.
    """
    kernel, (key, value) = plan.kernel, keys.arrays
    if kernel is None:
        return attention_tiles.see_backward(sums, queries, keys, bias, plan.settings)

    def part(causal: bool) -> Gradients:
        query, gradient, logarithm, context = queries.arrays
        found = attention_splash.local_backward(
            _flat(query),
            key,
            value,
            queries.segments,
            keys.segments,
            _flat(context),
            _flat(logarithm)[..., 0],
            _flat(gradient),
            masking=Masking(causal),
            softcap=plan.settings.scoring.softcap,
            blocks=kernel,
        )
        added = [
            whole + one.astype(jnp.float32).reshape(whole.shape)
            for whole, one in zip(sums[:3], found, strict=True)
        ]
        return Gradients(added[0], added[1], added[2], None)

    return _by_order(plan, queries, keys, sums, part)


def _by_order(plan: Plan, queries: Side, keys: Side, before: Any, part: Callable[[bool], Any]) -> Any:
    """`part`, causal where queries and keys are the same tokens, or `before` where keys come later."""
    if not plan.settings.pattern.causal:
        return part(False)
    order = jnp.sign(queries.start - keys.start) + 1
    return jax.lax.switch(order, [lambda: before, lambda: part(True), lambda: part(False)])


def _flat(x: jax.Array) -> jax.Array:
    """`[batch, kv_heads, heads / kv_heads, ...] -> [batch, heads, ...]`."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


# --- travelling ---


def _device(plan: Plan) -> Any:
    return jax.lax.axis_index(AXIS) if plan.devices > 1 else 0


def _send(plan: Plan, tree: Any, distance: int) -> Any:
    """What each device holds to the one so far along the ring."""
    if distance % plan.devices == 0:
        return tree
    pairs = [(i, (i + distance) % plan.devices) for i in range(plan.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)


def _first_computes(plan: Plan) -> list[tuple[int, int]]:
    """The walks, of which the first begins where keys are."""
    return [walk for index, walk in enumerate(plan.walks) if index == 0 or walk[1] > 0]


def _walk(
    plan: Plan,
    direction: int,
    hops: int,
    held: Any,
    state: Any,
    meet: Callable[..., Any],
    carries: bool = False,
) -> tuple[Any, Any]:
    """Lets `held` meet the devices along a walk: (state there, what is held at its end).

    With `carries`, meet returns the state and held, otherwise the state alone, and held is sent on while it
    is looked at. A walk beginning after the first leaves its own device out.
    """
    here = _device(plan)
    begin = 0 if (direction, hops) == plan.walks[0] else 1
    held = _send(plan, held, direction * begin)

    def step(carry: Any, number: Any) -> tuple[Any, None]:
        state, held = carry
        device = (here - direction * number) % plan.devices
        if carries:
            state, held = meet(state, held, device)
            return (state, _send(plan, held, direction)), None
        onward = _send(plan, held, direction)
        return (meet(state, held, device), onward), None

    if hops > begin:
        (state, held), _ = jax.lax.scan(step, (state, held), jnp.arange(begin, hops))
    last = (here - direction * hops) % plan.devices
    return meet(state, held, last) if carries else (meet(state, held, last), held)


# --- layouts ---


def _sides(
    plan: Plan, device: Any, arrays: tuple[jax.Array, ...], segments: jax.Array | None
) -> tuple[Side, ...]:
    """A device's tokens, as the contiguous pieces that they are."""
    starts = plan.starts(device, arrays[0].shape[-2])
    parts = [jnp.split(x, len(starts), axis=-2) for x in arrays]
    ids = [None] * len(starts) if segments is None else jnp.split(segments, len(starts), axis=1)
    return tuple(
        Side(start, tuple(part[number] for part in parts), ids[number]) for number, start in enumerate(starts)
    )


def _rows(x: jax.Array, groups: int) -> jax.Array:
    """`[batch, queries, heads, dim] -> [batch, kv_heads, heads / kv_heads, queries, dim]`."""
    batch, queries, heads, width = x.shape
    return x.reshape(batch, queries, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)


def _rows_back(x: jax.Array) -> jax.Array:
    batch, groups, share, queries, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, queries, groups * share, width)


def _heads_first(x: jax.Array) -> jax.Array:
    """`[batch, keys, kv_heads, dim] -> [batch, kv_heads, keys, dim]`."""
    return x.swapaxes(1, 2)


def _grouped(x: jax.Array | None, groups: int) -> Any:
    """`[heads, ...] -> [kv_heads, heads / kv_heads, ...]`."""
    return None if x is None else x.reshape(groups, x.shape[0] // groups, *x.shape[1:])
