"""Attention of sequences that are divided over the mesh axis `sequence` (context parallelism).

Three ways, of the same results:

- 'gather': nothing is said, and XLA gathers the keys. Each device holds all keys, and unless the
  implementation works in tiles, its queries × all keys.
- 'ring' (Liu et al. 2023): keys and values travel from device to device (nn/attention_ring.py), and each
  device holds a tile of scores. Memory per device is linear in the length divided by the devices.
- 'ulysses' (DeepSpeed-Ulysses, Jacobs et al. 2023): one exchange makes of a part of the tokens with all heads
  all tokens with a part of the heads, another the reverse; between them any implementation computes whole
  sequences. Less is sent than by a ring, but no more devices can share a sequence than there are heads.

With a causal mask, devices that hold the beginning of a sequence would have little to compute in a ring and
those with its end much. Therefore device i computes parts i and 2n - 1 - i of 2n ("zigzag", as in LLaMA 3's
training, section 3.3.2, and ring-flash-attention). Outside of attention the parts stay in their order:
queries, keys and values go to where they are computed, and contexts come back, by two permutations of halves
each. So nothing but attention knows of it, at the cost of moving four arrays once, where a ring of n moves
two n - 1 times. With a window all devices have the same to do as it is, and keys travel only as far as they
are seen.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from t5style.nn import attention_ring, attention_splash, attention_tiles
from t5style.nn.attention_ring import AXIS, Plan
from t5style.nn.attention_scores import Scoring
from t5style.nn.attention_tiles import BiasByDistance, Pattern, Settings
from t5style.nn.settings import LANES, SEQUENCE_ATTENTIONS, AttentionBlocks
from t5style.parallel.mesh import AXES
from t5style.parallel.rules import activation_axes, current_mesh, use_mesh


def devices(queries: int, keys: int) -> int:
    """Over how many devices sequences of these lengths are divided here; 1 without a mesh.

    Single tokens, with which parameters are made, are never divided.
    """
    mesh = current_mesh()
    if mesh is None or min(queries, keys) == 1 or AXIS not in activation_axes(("length",), (0,))[0]:
        return 1
    return int(mesh.shape[AXIS])


def by_distance(kind: str, length: int) -> bool:
    """Whether self-attention of that kind wants a bias as BiasByDistance: it never makes an array of queries
    × keys.
    """
    return kind == "ring" and devices(length, length) > 1


def check(kind: str, queries: int, keys: int, heads: int, pattern: Pattern) -> None:
    """Refuses what cannot be divided evenly over the mesh in force.

    Raises:
      ValueError: a kind that there is not; lengths or heads that do not divide.
    """
    if kind not in SEQUENCE_ATTENTIONS:
        raise ValueError(f"sequence_attention = {kind!r} is not one of {', '.join(SEQUENCE_ATTENTIONS)}")
    ways = devices(queries, keys)
    mesh = current_mesh()
    if ways == 1 or mesh is None:
        return
    parts = 2 * ways if kind == "ring" and _zigzag(pattern) else ways
    for length in (queries, keys):
        if length % parts:
            why = ", and twice for causal attention" if parts > ways else ""
            near = [n * parts for n in (length // parts, length // parts + 1) if n]
            raise ValueError(
                f"sequence_attention = {kind!r} divides {length} positions by sequence={ways}{why}: make the "
                f"length a multiple of {parts} ({' or '.join(map(str, near))}, say), or sequence smaller"
            )
    tensor = math.prod(mesh.shape[axis] for axis in activation_axes(("heads",), (0,))[0])
    if kind == "ulysses" and heads % (tensor * ways):
        across = f"sequence={ways}" + (f" × tensor={tensor}" if tensor > 1 else "")
        raise ValueError(
            f"sequence_attention = 'ulysses' divides {heads} heads by {across} = {tensor * ways}, which does "
            "not go evenly: choose a smaller sequence, or 'ring', which divides positions only"
        )


def ring(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: BiasByDistance | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    pattern: Pattern,
    scoring: Scoring,
    sinks: jax.Array | None,
    kernel: AttentionBlocks | None = None,
) -> jax.Array:
    """Ring attention over the mesh in force, or on one device in tiles; arrays as nn/attention.py's.

    Args:
      query, key, value, bias, query_segments, key_segments, sinks: of all devices.
      pattern: which keys are seen.
      scoring: how scores are made.
      kernel: tiles of the TPU's kernel, which computes the parts where it can: without bias and window, of
        parts that are not too short.

    Raises:
      ValueError: see `check`.
    """
    queries, keys = query.shape[1], key.shape[1]
    ways = devices(queries, keys)
    check("ring", queries, keys, query.shape[2], pattern)
    zigzag = ways > 1 and _zigzag(pattern)
    parts = 2 * ways if zigzag else ways
    tile = attention_tiles.tile_of(math.gcd(queries // parts, keys // parts))
    if bias is not None or pattern.window is not None or min(queries, keys) // parts < LANES:
        kernel = None
    if kernel is not None and scoring.scale != 1.0:
        query = (query.astype(jnp.float32) * scoring.scale).astype(query.dtype)
        scoring = dataclasses.replace(scoring, scale=1.0)
    settings = Settings(pattern, scoring, queries, keys, tile)
    line = None if bias is None else bias.values[0]
    if ways == 1:
        plan = Plan(settings)
        return attention_ring.ring(query, key, value, line, sinks, query_segments, key_segments, plan)
    plan = Plan(settings, ways, attention_ring.walks(ways, keys // ways, pattern), zigzag, kernel)
    mesh, rows, heads = _division(query, divide_heads=(), mesh=current_mesh())
    key, value = (_for_heads(x, query, mesh, heads) for x in (key, value))
    by_token, by_head = PartitionSpec(rows, AXIS), PartitionSpec(heads)
    run = jax.shard_map(
        functools.partial(_ring_of_device, plan=plan),
        mesh=mesh,
        in_specs=(*[PartitionSpec(rows, AXIS, heads)] * 3, by_head, by_head, by_token, by_token),
        out_specs=PartitionSpec(rows, AXIS, heads),
        check_vma=False,  # no statement of which values are the same on which devices is needed here
    )
    return run(query, key, value, line, sinks, query_segments, key_segments)


def ulysses(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | BiasByDistance | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    sinks: jax.Array | None,
    random: jax.Array | None,
    local: Callable[..., jax.Array],
) -> jax.Array:
    """Attention with heads divided in place of positions; arrays as nn/attention.py's.

    Args:
      query, key, value, bias, query_segments, key_segments, sinks: of all devices.
      random: a key for dropout, or None.
      local: computes attention of whole sequences and some heads, from (query, key, value) and the others by
        these names (of a bias by distance: its values); it sees a mesh of one device.

    Raises:
      ValueError: see `check`.
    """
    check("ulysses", query.shape[1], key.shape[1], query.shape[2], Pattern())
    mesh, rows, heads = _division(query, divide_heads=(AXIS,), mesh=current_mesh())
    key, value = (_for_heads(x, query, mesh, heads) for x in (key, value))
    apart = tuple(axis for axis in heads if axis != AXIS)
    divided, by_head, by_row = PartitionSpec(rows, AXIS, apart), PartitionSpec(heads), PartitionSpec(rows)
    added = bias.values if isinstance(bias, BiasByDistance) else bias
    biases = PartitionSpec(rows if added is not None and added.shape[0] > 1 else None, heads)
    alone = Mesh(mesh.devices.reshape(-1)[:1].reshape((1,) * len(AXES)), AXES)

    def of_device(
        query: jax.Array, key: jax.Array, value: jax.Array, random: jax.Array | None, **others: Any
    ) -> jax.Array:
        # [batch, part of the positions, heads, dim] -> [batch, positions, part of the heads, dim]
        arrays = [
            jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True) for x in (query, key, value)
        ]
        if random is not None:
            for axis in (*rows, *heads):
                random = jax.random.fold_in(random, jax.lax.axis_index(axis))
        with use_mesh(alone):
            context = local(*arrays, random=random, **others)
        return jax.lax.all_to_all(context, AXIS, split_axis=1, concat_axis=2, tiled=True)

    names = ("bias", "sinks", "query_segments", "key_segments")
    run = jax.shard_map(
        lambda query, key, value, random, *others: of_device(
            query, key, value, random, **dict(zip(names, others, strict=True))
        ),
        mesh=mesh,
        in_specs=(divided, divided, divided, PartitionSpec(), biases, by_head, by_row, by_row),
        out_specs=divided,
        check_vma=False,  # kernels do not say over which axes their outputs vary
    )
    return run(query, key, value, random, added, sinks, query_segments, key_segments)


def _zigzag(pattern: Pattern) -> bool:
    return pattern.causal and pattern.window is None


def _division(
    query: jax.Array, divide_heads: tuple[str, ...], mesh: Mesh | None
) -> tuple[Mesh, tuple[str, ...], tuple[str, ...]]:
    """The mesh, and the axes that divide rows and heads."""
    assert mesh is not None
    rows, heads = activation_axes(("batch", "heads"), (query.shape[0], query.shape[2]))
    return mesh, rows, (*heads, *divide_heads)


def _for_heads(x: jax.Array, query: jax.Array, mesh: Mesh, heads: tuple[str, ...]) -> jax.Array:
    """Keys or values `[batch, keys, kv_heads, dim]`, repeated until they divide as the query heads do."""
    ways = math.prod(mesh.shape[axis] for axis in heads)
    return attention_splash.divisible(x, query.shape[2], ways, axis=2)


def _ring_of_device(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    sinks: jax.Array | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    *,
    plan: Plan,
) -> jax.Array:
    if not plan.zigzag:
        return attention_ring.ring(query, key, value, bias, sinks, query_segments, key_segments, plan)
    arrays = [None if x is None else _to_zigzag(x) for x in (query, key, value, query_segments, key_segments)]
    return _from_zigzag(attention_ring.ring(*arrays[:3], bias, sinks, *arrays[3:], plan))


def _home(part: int, ways: int) -> int:
    """The device that computes a part of twice as many parts as there are devices."""
    return part if part < ways else 2 * ways - 1 - part


def _to_zigzag(x: jax.Array) -> jax.Array:
    """Parts 2i and 2i + 1 of device i, along dimension 1, exchanged for parts i and 2n - 1 - i.

    The even parts have homes that are all different, and so have the odd ones; of the two that a device gets,
    the even one comes first on even devices.
    """
    ways = jax.lax.axis_size(AXIS)
    halves = jnp.split(x, 2, axis=1)
    even, odd = (
        jax.lax.ppermute(half, AXIS, [(i, _home(2 * i + which, ways)) for i in range(ways)])
        for which, half in enumerate(halves)
    )
    return _ordered(even, odd)


def _from_zigzag(x: jax.Array) -> jax.Array:
    """The inverse of _to_zigzag."""
    ways = jax.lax.axis_size(AXIS)
    first, second = jnp.split(x, 2, axis=1)
    halves = _ordered(first, second, split=True)
    parts = [
        jax.lax.ppermute(half, AXIS, [(_home(2 * i + which, ways), i) for i in range(ways)])
        for which, half in enumerate(halves)
    ]
    return jnp.concatenate(parts, axis=1)


def _ordered(first: jax.Array, second: jax.Array, split: bool = False) -> Any:
    """The two, exchanged on odd devices; as one array, unless `split`."""
    odd_device = jax.lax.axis_index(AXIS) % 2 == 1
    pair = jnp.where(odd_device, second, first), jnp.where(odd_device, first, second)
    return pair if split else jnp.concatenate(pair, axis=1)
