"""Sending tokens to experts and back, on one device and between those of a mesh.

Each device sorts the choices of its own tokens by expert, so that an expert's tokens lie together for a
grouped product (nn/grouped.py), and puts the results back in order; no array of tokens is ever divided anew.
How experts meet tokens depends on the mesh axes that divide both (parallel/rules.py):

- Experts are not divided: every device has all of them, gathered over fsdp for as long as a layer runs. Their
  gradients leave by the transpose of the gather, a reduce-scatter.
- Experts and rows are divided over `expert` (the rule): each device keeps its experts and sends each token to
  where its experts are, by an all-to-all exchange, and gets the results back by another.
- Experts are divided and rows are not (one row while decoding): each device computes what its own experts
  have to do with the tokens that all have, and the parts are added.

Hidden units of experts are divided over `tensor`; the partial sums are added once, after tokens are back.

Nothing is dropped in an exchange: buffers have room for the most rows that can come, which is all tokens of
all devices that exchange, as many times as a token can choose experts of one device. A capacity
(MoE.capacity_factor), which bounds how many tokens an expert gets of each row, bounds the buffers too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from t5style.nn import activations, platform
from t5style.nn.attention import Dropout
from t5style.nn.grouped import project_groups
from t5style.parallel.rules import activation_axes, current_mesh, parameter_axes

Axes = tuple[str, ...]


class Weights(NamedTuple):
    """A linear map for each expert: kernel `[experts, inner, outer]`, bias `[experts, outer]` or None."""

    kernel: jax.Array
    bias: jax.Array | None


class Parameters(NamedTuple):
    """The MLPs of all experts: inputs to `mlp`, one of plain experts and two of gated ones, and an output."""

    inputs: tuple[Weights, ...]
    output: Weights


class Choices(NamedTuple):
    """What tokens chose.

    Attributes:
      experts: int32 `[batch, length, per_token]`.
      weights: f32 of the same shape.
      kept: bool of the same shape; a choice that is not kept adds 0. None: all are.
    """

    experts: jax.Array
    weights: jax.Array
    kept: jax.Array | None


@dataclasses.dataclass(frozen=True)
class ExpertMlp:
    """What experts are beside their parameters.

    Attributes:
      activations, clamp: see nn/activations.hidden.
      precision: of the products, see nn/projection.project.
      dropout: rate, on the hidden layer.
    """

    activations: tuple[str, ...]
    clamp: float | None = None
    precision: str = "default"
    dropout: float = 0.0

    def __call__(self, parameters: Parameters, rows: "Rows", key: jax.Array | None) -> jax.Array:
        """Each row by its expert, times its weight: `[rows, embed]`.

        The weight is applied to the hidden layer: the output projection is then linear in all that has a
        gradient, and a backward pass that recomputes the layer does without it.
        """

        def project(x: jax.Array, weights: Weights) -> jax.Array:
            y = project_groups(
                x, weights.kernel, rows.sizes, all_rows=rows.all_rows, precision=self.precision
            )
            if weights.bias is not None:
                y = y + jnp.take(weights.bias, rows.expert, axis=0, mode="clip").astype(y.dtype)
            return y

        inputs = [
            checkpoint_name(project(rows.x, weights), f"mlp_input_{i}")
            for i, weights in enumerate(parameters.inputs)
        ]
        hidden = activations.hidden(inputs, self.activations, self.clamp)  # [rows, mlp]
        if key is not None:
            hidden = Dropout(self.dropout, key)(hidden)
        weighted = (hidden.astype(jnp.float32) * rows.weight).astype(hidden.dtype)
        kernel, bias = parameters.output
        y = project(weighted, Weights(kernel, None))
        if bias is not None:
            added = jnp.take(bias, rows.expert, axis=0, mode="clip") * rows.weight
            y = (y.astype(jnp.float32) + added).astype(y.dtype)
        return y


class Rows(NamedTuple):
    """Copies of tokens, those of an expert together, experts in order.

    Attributes:
      x: `[rows, embed]`.
      weight: f32 `[rows, 1]`.
      expert: int32 `[rows]`; rows of no expert have the number of experts, and come last.
      sizes: int32 `[experts]`, rows of each.
      all_rows: every row belongs to an expert.
    """

    x: jax.Array
    weight: jax.Array
    expert: jax.Array
    sizes: jax.Array
    all_rows: bool


def run_experts(
    x: jax.Array,
    choices: Choices,
    parameters: Parameters,
    mlp: ExpertMlp,
    *,
    capacity: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Sum of the outputs of each token's experts, weighted.

    Args:
      x: `[batch, length, embed]`.
      choices: see Choices.
      parameters: of all experts.
      mlp: what they are.
      capacity: how many tokens of a row an expert takes at most, which `choices.kept` honours already.
      key: of dropout, or None. Under a mesh what is dropped depends on how tokens are divided.

    Returns:
      `[batch, length, embed]`.
    """
    mesh = current_mesh()
    if mesh is None or mesh.size == 1:
        return _local(_Layout(), x, choices, parameters, key, mlp, capacity)
    layout = _Layout.of(x.shape, parameters)
    tokens = PartitionSpec(*layout.tokens)

    def body(x: jax.Array, choices: Choices, parameters: Parameters, key: jax.Array | None) -> jax.Array:
        parameters = jax.tree.map(layout.gather, parameters, layout.stored, is_leaf=_is_weights)
        return _local(layout, x, choices, parameters, key, mlp, capacity)

    specs = jax.tree.map(
        lambda weights: Weights(*map(_spec, weights)),
        layout.stored,
        is_leaf=_is_weights,
    )
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(tokens, tokens, specs, PartitionSpec()),
        out_specs=tokens,
        check_vma=False,  # kernels do not say over which axes their outputs vary
    )(x, choices, parameters, key)


def _spec(axes: Any) -> Any:
    return None if axes is None else PartitionSpec(*axes)


def _is_weights(value: Any) -> bool:
    return isinstance(value, Weights)


class _Layout(NamedTuple):
    """Which mesh axes divide what.

    Attributes:
      tokens: axes of batch and of length.
      exchanged: axes over which experts and tokens are divided.
      added: axes over which experts are divided and tokens are not.
      tensor: axes of hidden units.
      stored: like the parameters, axes of each dimension.
    """

    tokens: tuple[Axes, Axes] = ((), ())
    exchanged: Axes = ()
    added: Axes = ()
    tensor: Axes = ()
    stored: Any = None

    @classmethod
    def of(cls, shape: Sequence[int], parameters: Parameters) -> "_Layout":
        batch, length = activation_axes(("batch", "length"), shape[:2])
        tokens = (*batch, *length)

        def stored(weights: Weights, inner: str, outer: str) -> Weights:
            bias = None if weights.bias is None else parameter_axes(("expert", outer))
            return Weights(parameter_axes(("expert", inner, outer)), bias)  # type: ignore[arg-type]

        tree = Parameters(
            tuple(stored(weights, "embed", "mlp") for weights in parameters.inputs),
            stored(parameters.output, "mlp", "embed"),
        )
        experts: Axes = tree.output.kernel[0]  # type: ignore[assignment]
        both = set(experts) & set(tokens)
        return cls(
            (batch, length),
            exchanged=experts if experts and both == set(experts) else (),
            added=() if both else experts,
            tensor=tuple(axis for axis in tree.output.kernel[1] if axis not in tokens),
            stored=tree,
        )

    def gather(self, weights: Weights, stored: Weights) -> Weights:
        """A device's part of weights as it is computed with, all of them but experts and hidden units."""

        def whole(x: jax.Array | None, axes: Sequence[Axes]) -> jax.Array | None:
            for dimension, names in enumerate(axes if x is not None else ()):
                gathered = tuple(
                    axis for axis in names if axis not in (*self.exchanged, *self.added, *self.tensor)
                )
                if gathered:
                    x = jax.lax.all_gather(x, gathered, axis=dimension, tiled=True)
            return x

        return Weights(*(whole(x, axes) for x, axes in zip(weights, stored, strict=True)))  # type: ignore[arg-type]


def _local(
    layout: _Layout,
    x: jax.Array,
    choices: Choices,
    parameters: Parameters,
    key: jax.Array | None,
    mlp: ExpertMlp,
    capacity: int | None,
) -> jax.Array:
    """run_experts for one device's tokens `[batch, length, embed]` and experts."""
    batch, length, width = x.shape
    count, per_token = parameters.output.kernel.shape[0], choices.experts.shape[-1]
    tokens = batch * length
    dtype = x.dtype
    parameters = jax.tree.map(lambda each: each.astype(dtype), parameters)
    if key is not None and (axes := (*sum(layout.tokens, ()), *layout.added, *layout.tensor)):
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
    if layout.tensor and parameters.output.bias is not None:  # added by one of those that will be summed
        first = jax.lax.axis_index(layout.tensor) == 0
        output = parameters.output._replace(bias=jnp.where(first, parameters.output.bias, 0))
        parameters = parameters._replace(output=output)

    expert, kept = choices.experts, choices.kept
    total = count * math.prod(jax.lax.axis_size(axis) for axis in layout.exchanged)
    if layout.added:
        expert = expert - count * jax.lax.axis_index(layout.added)
        own = (expert >= 0) & (expert < count)
        kept = own if kept is None else kept & own
    weights = choices.weights
    if kept is not None:
        expert, weights = jnp.where(kept, expert, total), jnp.where(kept, weights, 0.0)
    expert = expert.reshape(-1)  # [tokens · per_token]
    order = jnp.argsort(expert)  # stable, so that an expert's tokens stay in order
    inverse = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(total), axis=0, dtype=jnp.int32)
    rows = Rows(
        take_rows(x.reshape(tokens, width), order, inverse, per_token),  # [tokens · per_token, embed]
        take_rows(weights.reshape(-1, 1), order, inverse, 1),
        jnp.take(expert, order),
        sizes,
        kept is None,
    )
    if layout.exchanged:
        most = min(per_token, count) * tokens
        if capacity is not None:
            most = min(most, count * min(capacity, length) * batch)
        out = _exchange(layout.exchanged, rows, most, lambda rows: mlp(parameters, rows, key))
    else:
        out = mlp(parameters, rows, key)
    y = add_rows(out, order, inverse, per_token)  # f32 [tokens, embed]
    if added := (*layout.added, *layout.tensor):
        y = jax.lax.psum(y, added)
    return y.astype(dtype).reshape(batch, length, width)


def _exchange(axes: Axes, rows: Rows, most: int, compute: Callable[[Rows], jax.Array]) -> jax.Array:
    """Sends rows to the devices that have their experts, computes there, and brings the results back.

    Args:
      axes: of the mesh, over which experts are divided.
      rows: of this device, for experts of all devices.
      most: rows that a device can have for another.
      compute: `[rows, embed]` of rows for the experts of this device.

    Returns:
      `[rows, embed]`, of this device's rows again; 0 for those of no expert.
    """
    ways = math.prod(jax.lax.axis_size(axis) for axis in axes)
    me = jax.lax.axis_index(axes)
    count = rows.sizes.shape[0] // ways
    # sizes[s, d, e]: rows that device s has for expert e of device d
    sizes = jax.lax.all_gather(rows.sizes, axes).reshape(ways, ways, count)
    moving = _ragged if platform.ragged_exchange() else _padded
    send, bring_back = moving(axes, sizes.sum(axis=2), rows.x.shape[0], most)
    place = jnp.arange(ways * most)
    expert = _expert_of(sizes[:, me], place, most if moving is _padded else None)
    order = jnp.argsort(expert)
    inverse = jnp.argsort(order)
    out = compute(
        Rows(
            take_rows(send(rows.x), order, inverse, 1),
            take_rows(send(rows.weight), order, inverse, 1),
            jnp.take(expert, order),
            sizes[:, me].sum(axis=0),
            False,
        )
    )
    return bring_back(take_rows(out, inverse, order, 1))


def _expert_of(sizes: jax.Array, place: jax.Array, stride: int | None) -> jax.Array:
    """Which expert each place of a buffer is for, `count` for none.

    Args:
      sizes: int32 `[devices, count]`, rows from each device for each expert, which come in this order.
      place: int32 `[places]`, 0, 1, ...
      stride: places of each device; None: the rows of all devices follow each other.
    """
    devices, count = sizes.shape
    if stride is None:
        segment = jnp.searchsorted(jnp.cumsum(sizes), place, side="right", method="compare_all")
        return jnp.where(segment < devices * count, segment % count, count).astype(jnp.int32)
    ends = jnp.cumsum(sizes, axis=1)
    within = (place % stride).reshape(devices, stride)
    return jnp.sum(within[:, :, None] >= ends[:, None, :], axis=-1, dtype=jnp.int32).reshape(-1)


Move = Callable[[jax.Array], jax.Array]


def _starts(sizes: jax.Array, axis: int) -> jax.Array:
    return jnp.cumsum(sizes, axis=axis) - sizes


def _ragged(axes: Axes, sizes: jax.Array, rows: int, most: int) -> tuple[Move, Move]:
    """An exchange that moves the rows that are there and no others, one device's after the other's.

    Args:
      axes: see _exchange.
      sizes: int32 `[from, to]`, how many rows each device has for each.
      rows: how many rows this device has, those of no expert included.
      most: how many it can have for another.

    Returns:
      Functions `[rows, width] -> [devices · most, width]` and back.
    """
    me, ways = jax.lax.axis_index(axes), sizes.shape[0]
    here, there = _starts(sizes, 1), _starts(sizes, 0)  # where rows begin in their sender, and receiver

    def send(x: jax.Array) -> jax.Array:
        buffer = jnp.zeros((ways * most, x.shape[1]), x.dtype)
        return jax.lax.ragged_all_to_all(
            x, buffer, here[me], sizes[me], there[me], sizes[:, me], axis_name=axes
        )

    def bring_back(y: jax.Array) -> jax.Array:
        buffer = jnp.zeros((rows, y.shape[1]), y.dtype)
        return jax.lax.ragged_all_to_all(
            y, buffer, there[:, me], sizes[:, me], here[:, me], sizes[me], axis_name=axes
        )

    return send, bring_back


def _padded(axes: Axes, sizes: jax.Array, rows: int, most: int) -> tuple[Move, Move]:
    """As _ragged, with buffers of the same size for each device, filled up with zeros."""
    me, ways = jax.lax.axis_index(axes), sizes.shape[0]
    starts, own = _starts(sizes, 1)[me], sizes[me]  # [devices]
    within = jnp.arange(most)
    # Of each place in the buffers the row that goes there, and of each row its place; -1 for none.
    source = jnp.where(within < own[:, None], starts[:, None] + within, -1).reshape(-1)
    row = jnp.arange(rows)
    owner = jnp.sum(row[:, None] >= (starts + own), axis=1)  # [rows]
    target = jnp.where(owner < ways, owner * most + row - jnp.take(starts, owner, mode="clip"), -1)

    def all_to_all(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True)

    def send(x: jax.Array) -> jax.Array:
        return all_to_all(place_rows(x, source, target))

    def bring_back(y: jax.Array) -> jax.Array:
        return place_rows(all_to_all(y), target, source)

    return send, bring_back


# --- moving rows: the gradient of a gather would be a scatter; where the way back is known it is a gather ---


@jax.custom_vjp
def place_rows(x: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Rows of x elsewhere: row source[j] in place j, zeros where that is -1.

    Args:
      x: `[rows, width]`.
      source: int32 `[places]`, no row twice.
      target: int32 `[rows]`, its inverse: in which place a row is, or -1.
    """
    del target
    taken = jnp.take(x, jnp.maximum(source, 0), axis=0)
    return jnp.where((source >= 0)[:, None], taken, 0)


def _place_rows_forward(
    x: jax.Array, source: jax.Array, target: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return place_rows(x, source, target), (source, target)


def _place_rows_backward(
    kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    source, target = kept
    return place_rows(gradient, target, source), None, None


place_rows.defvjp(_place_rows_forward, _place_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_rows(x: jax.Array, order: jax.Array, inverse: jax.Array, copies: int) -> jax.Array:
    """Rows of x, each repeated `copies` times, in another order.

    Args:
      x: `[rows, width]`.
      order: int32 `[rows · copies]`, a permutation of the repeated rows.
      inverse: its inverse.
      copies: how often each row is there.
    """
    del inverse
    return jnp.take(x, order // copies, axis=0)  # [rows · copies, width]


def _take_rows_forward(
    x: jax.Array, order: jax.Array, inverse: jax.Array, copies: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return take_rows(x, order, inverse, copies), (order, inverse)


def _take_rows_backward(
    copies: int, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    return add_rows(gradient, *kept, copies).astype(gradient.dtype), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def add_rows(y: jax.Array, order: jax.Array, inverse: jax.Array, copies: int) -> jax.Array:
    """The transpose of take_rows: rows in their order again, the copies of each added in float32.

    One gather for each copy. Of an array `[rows, copies, width]` a TPU makes tiles that are mostly empty: of
    a layer of Mixtral on v5p it cost 27 ms of 450, the broadcast in its gradient among them.
    """
    if copies == 1:
        return jnp.take(y, inverse, axis=0).astype(jnp.float32)
    places = inverse.reshape(-1, copies)
    parts = [jnp.take(y, places[:, copy], axis=0).astype(jnp.float32) for copy in range(copies)]
    return functools.reduce(jnp.add, parts)  # [rows, width]


def _add_rows_forward(
    y: jax.Array, order: jax.Array, inverse: jax.Array, copies: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    # An empty array remembers the type.
    return add_rows(y, order, inverse, copies), (order, inverse, jnp.zeros(0, y.dtype))


def _add_rows_backward(
    copies: int, kept: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    order, inverse, like = kept
    return take_rows(gradient.astype(like.dtype), order, inverse, copies), None, None


add_rows.defvjp(_add_rows_forward, _add_rows_backward)
