"""T5's attention on a TPU: a Pallas kernel that adds the relative bias, with a head's scores whole in vector
memory.

At T5's lengths (512 tokens in, 114 out) the scores of one head of one row are a megabyte, so that a program
of the kernel computes the softmax of whole rows at once: nothing needs to be kept for the backward pass but
its operands, and scores never go to the chip's main memory, forwards or backwards (the idea is that of Dao et
al. 2022, without its tiles). The splash kernel (nn/attention_splash.py) takes no bias, and XLA's einsum
writes and reads all scores several times: of 8 rows and 32 heads it needs 3.7 ms on a v6e, and this kernel
with its copies 0.5 (the TPU compiler's estimates, kernels at the chip's peak).

Arrays keep the layout of projections, a token's heads side by side; a program takes as many neighbouring
heads as fill a register's 128 lanes, two of T5's. Programs go over the rows of the batch fastest: a head's
bias by distance is spread to scores once, and its gradient is added up, in vector memory. On CPU the kernel
is interpreted, which is slow and meant for tests.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5style.nn import platform
from t5style.nn.attention_scores import MASKED
from t5style.nn.attention_tiles import BiasByDistance
from t5style.nn.settings import LANES
from t5style.parallel.rules import activation_axes, current_mesh

_VECTOR_MEMORY = 48 << 20  # bytes, of 64 MiB (v5p, tpu7x) or 128
_SUBLANES = 8


def refusal(
    query: jax.Array, key: jax.Array, value: jax.Array, *, bias: Any, dropout: bool, precision: str
) -> str | None:
    """Why the kernel cannot compute attention of these operands, or None if it can."""
    if bias is not None and not isinstance(bias, BiasByDistance):
        return "it takes a bias by distance only, not one for each query and key"
    if not query.shape[2:] == key.shape[2:] == value.shape[2:]:
        return "its queries, keys and values have the same heads of the same width"
    if dropout:
        return "it cannot drop attention weights"
    if precision != "default":
        return f"its products have the precision 'default', not {precision!r}"
    if query.dtype not in (jnp.bfloat16, jnp.float32) or not query.dtype == key.dtype == value.dtype:
        return "it takes queries, keys and values of one dtype, bfloat16 or float32"
    if platform.platform() == "gpu":
        return "it is a program for TPUs"
    if bias is not None and not platform.turns_rows():
        return "it spreads a bias with an instruction that TPUs have from v5 on"
    mesh, heads = current_mesh(), query.shape[2]
    if mesh is not None:
        axes = activation_axes(("batch", "heads"), query.shape[:3:2])[1]
        heads //= math.prod(mesh.shape[axis] for axis in axes)
    # At once: the bias and its gradient of each head, and some six arrays of the head at work, or the two
    # that turn its rows.
    queries, keys = _whole(query.shape[1]), _whole(key.shape[1])
    at_work = max(6 * keys, 2 * (queries + keys) if bias is not None else 0)
    needed = 4 * queries * (2 * _together(heads, query.shape[3]) * keys + at_work)
    if needed > _VECTOR_MEMORY:
        return (
            f"scores of {query.shape[1]} queries and {key.shape[1]} keys need {needed >> 20} MiB of vector "
            f"memory, and there are {_VECTOR_MEMORY >> 20}"
        )
    return None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: BiasByDistance | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    causal: bool,
    scale: float,
) -> jax.Array:
    """As nn/attention.py's, of what `refusal` does not refuse: `[batch, length, heads, dim]` in and out.

    Under a mesh each device computes its rows of the batch and its heads, over whole sequences.
    """
    if scale != 1.0:
        query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    line = None if bias is None else bias.values[0]  # [heads, queries + keys - 1]
    run = functools.partial(_local, causal=causal)
    mesh = current_mesh()
    if mesh is not None and mesh.size > 1:
        rows, heads = activation_axes(("batch", "heads"), query.shape[:3:2])
        whole, by_row = PartitionSpec(rows, None, heads), PartitionSpec(rows)
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(whole, whole, whole, PartitionSpec(heads), by_row, by_row),
            out_specs=whole,
            check_vma=False,  # the kernel does not say over which axes its output varies
        )
    return run(query, key, value, line, query_segments, key_segments)


def _local(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    line: jax.Array | None,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    """Of one device's arrays: lengths are filled up to whole registers, and heads joined."""
    (batch, queries, heads, width), keys = query.shape, key.shape[1]
    if query_segments is None:
        query_segments, key_segments = (jnp.ones((batch, size), jnp.int32) for size in (queries, keys))
    assert key_segments is not None
    more = _whole(queries) - queries, _whole(keys) - keys
    query, key, value = (
        jnp.pad(x.reshape(*x.shape[:2], -1), ((0, 0), (0, extra), (0, 0)))
        for x, extra in ((query, more[0]), (key, more[1]), (value, more[1]))
    )
    if line is not None:  # [heads, 1, whole queries + keys]; distance 0 comes first, -1 last
        line = jnp.pad(line, ((0, 0), (0, sum(more) + 1)))[:, None]
        line = jnp.roll(line, 1 - queries, axis=2)
    # A register has its numbers along lanes, or along sublanes: ids of queries stand in a column, of keys in
    # a row.
    column = jnp.pad(query_segments, ((0, 0), (0, more[0])))[:, :, None]
    row = jnp.pad(key_segments, ((0, 0), (0, more[1])))[:, None]
    column = jnp.broadcast_to(column, (*column.shape[:2], LANES))
    row = jnp.broadcast_to(row, (batch, _SUBLANES, row.shape[2]))
    shape = _Shape(heads, width, causal)
    context = _attention(query, key, value, line, column, row, shape)
    return context[:, :queries].reshape(batch, queries, heads, width)


class _Shape(NamedTuple):
    """What the arrays do not say.

    Attributes:
      heads: how many.
      width: of a head.
      causal: a query sees no key of a later index.
    """

    heads: int
    width: int
    causal: bool

    @property
    def together(self) -> int:
        """Heads of a program."""
        return _together(self.heads, self.width)

    def head(self, x: Any, index: int) -> Any:
        """One head of a program's array `[length, together · width]`."""
        return x[:, index * self.width : (index + 1) * self.width]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    line: jax.Array | None,
    column: jax.Array,
    row: jax.Array,
    shape: _Shape,
) -> jax.Array:
    """The context, like query.

    Args:
      query, key, value: `[batch, length, heads · width]`, the query scaled.
      line: f32 `[heads, 1, queries + keys]` or None.
      column: int32 `[batch, queries, LANES]`, segments of queries; row: int32 `[batch, 8, keys]`, of keys.
      shape: see _Shape.
    """
    return _call(_forward_kernel, (query, key, value, line, column, row), [query], shape)[0]


def _forward(*operands: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _attention(*operands), operands[:6]


def _backward(shape: _Shape, operands: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, ...]:
    *found, by_line = _call(_backward_kernel, (*operands, gradient), operands[:4], shape)
    if operands[3] is None:
        return *found, by_line, None, None, None
    return *found, jnp.roll(by_line, 1, axis=2), None, None


_attention.defvjp(_forward, _backward)


def _call(kernel: Any, operands: Any, like: Any, shape: _Shape) -> tuple[jax.Array, ...]:
    """Runs a kernel for each group of heads and, within it, each row of the batch; it makes arrays like those
    of `like`. Nones are left out.
    """
    from jax.experimental import pallas as pl  # here: it takes 0.15 s
    from jax.experimental.pallas import tpu as pltpu

    query, key, _, line, *_ = operands
    (batch, queries, _), keys = query.shape, key.shape[1]
    biased, together, forward = line is not None, shape.together, kernel is _forward_kernel

    def block(x: Any) -> Any:
        if x is line:
            return pl.BlockSpec((together, *x.shape[1:]), lambda head, row: (head, 0, 0))
        if x.dtype == jnp.int32:
            return pl.BlockSpec((None, *x.shape[1:]), lambda head, row: (row, 0, 0))
        return pl.BlockSpec((None, x.shape[1], together * shape.width), lambda head, row: (row, 0, head))

    operands, like = ([x for x in arrays if x is not None] for arrays in (operands, like))
    scores = pltpu.VMEM((together, queries, keys), jnp.float32)
    # Forwards S and P·V, backwards S, dP, dV, dQ and dK.
    pairs, products = batch * shape.heads * queries * keys, 2 if forward else 5
    return tuple(
        pl.pallas_call(
            functools.partial(kernel, shape=shape, biased=biased),
            grid=(shape.heads // together, batch),
            in_specs=[block(x) for x in operands],
            out_specs=[block(x) for x in like],
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
            scratch_shapes=[scores] * (biased * (1 if forward else 2)),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VECTOR_MEMORY
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * pairs * products * shape.width,
                transcendentals=pairs,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *like)),
            ),
            interpret=platform.platform() != "tpu",
            name="attention_whole_fwd" if forward else "attention_whole_bwd",
        )(*operands)
    )


def _forward_kernel(*refs: Any, shape: _Shape, biased: bool) -> None:
    """Some heads of one row: query, key, value, line if there is one, segments; context; the bias."""
    query, key, value = (ref[...] for ref in refs[:3])
    column, row, context, *bias = refs[3 + biased :]
    if biased:
        _spread(refs[3], bias[0], shape)
    found = []
    for index in range(shape.together):
        own = [shape.head(x, index) for x in (query, key, value)]
        weights = _weights(own[0], own[1], bias[0][index] if biased else None, column, row, shape)
        found.append(_dot(weights.astype(value.dtype), own[2], (1, 0)))
    context[...] = jnp.concatenate(found, axis=1).astype(context.dtype)


def _backward_kernel(*refs: Any, shape: _Shape, biased: bool) -> None:
    """The same, and the context's gradient; gradients of query, key, value and line; the bias and its."""
    from jax.experimental import pallas as pl

    query, key, value = (ref[...] for ref in refs[:3])
    column, row, by_context, *outs = refs[3 + biased :]
    if biased:
        by_line, bias, by_bias = outs[3:]
        _spread(refs[3], bias, shape)
    found: list[list[Any]] = [[], [], []]
    for index in range(shape.together):
        own = [shape.head(x, index) for x in (query, key, value, by_context[...])]
        weights = _weights(own[0], own[1], bias[index] if biased else None, column, row, shape)
        by_weights = _dot(own[3], own[2], (1, 1))
        by_scores = weights * (by_weights - (weights * by_weights).sum(axis=1, keepdims=True))
        narrow = by_scores.astype(query.dtype)
        found[0].append(_dot(narrow, own[1], (1, 0)))
        found[1].append(_dot(narrow, own[0], (0, 0)))
        found[2].append(_dot(weights.astype(query.dtype), own[3], (0, 0)))
        if biased:
            seen = jnp.where(pl.program_id(1) == 0, 0.0, by_bias[index])
            by_bias[index] = seen + by_scores
    for out, parts in zip(outs[:3], found, strict=True):
        out[...] = jnp.concatenate(parts, axis=1).astype(out.dtype)
    if biased:
        _gather(by_bias, by_line, shape)


def _spread(line: Any, bias: Any, shape: _Shape) -> None:
    """At a head's first row of the batch: bias[i, j] = line[j - i], by turning each row one further to the
    right than the one before.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    _, queries, keys = bias.shape

    @pl.when(pl.program_id(1) == 0)
    def spread() -> None:
        for index in range(shape.together):
            lines = jnp.broadcast_to(line[index], (queries, queries + keys))
            bias[index] = pltpu.roll(lines, 0, 1, stride=1, stride_axis=0)[:, :keys]


def _gather(by_bias: Any, by_line: Any, shape: _Shape) -> None:
    """At a head's last row of the batch: by_line[d - 1] = the sum of all by_bias[i, i + d].

    Rows can be turned further and further to the right only (and by whole registers to begin with, which is
    where the -1 comes from), so they stand in the opposite order first.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    _, queries, keys = by_bias.shape

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def gather() -> None:
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (queries, queries), axis) for axis in (0, 1))
        opposite = (rows + columns == queries - 1).astype(jnp.float32)
        for index in range(shape.together):
            flipped = jnp.dot(opposite, by_bias[index], precision="highest")
            wide = jnp.concatenate([flipped, jnp.zeros((queries, queries), jnp.float32)], axis=1)
            turned = pltpu.roll(wide, keys, 1, stride=1, stride_axis=0)
            by_line[index] = turned.sum(axis=0, keepdims=True)


def _weights(query: Any, key: Any, bias: Any, column: Any, row: Any, shape: _Shape) -> Any:
    """The softmax of one head's scores, f32 `[queries, keys]`."""
    scores = _dot(query, key, (1, 1))
    if bias is not None:
        scores = scores + bias
    ids = row[:1, :]  # [1, keys]
    visible = (column[:, :1] == ids) & (ids != 0)
    if shape.causal:
        index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        visible = visible & (index >= jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1))
    scores = jnp.where(visible, scores, MASKED)
    weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _dot(left: Any, right: Any, over: tuple[int, int]) -> Any:
    """A product over these dimensions of two matrices, in float32."""
    dimensions = ((over[0],), (over[1],)), ((), ())
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)


def _together(heads: int, width: int) -> int:
    """How many neighbouring heads fill whole lanes; all, if no smaller number does."""
    return next(n for n in range(1, heads + 1) if heads % n == 0 and (n * width % LANES == 0 or n == heads))


def _whole(length: int) -> int:
    """The length, filled up to whole registers."""
    return -(-length // LANES) * LANES
