"""Finds, in a compiled program, activations that devices send each other in a loop over layers although no
rule asks for it.

XLA divides what has no constraint as it thinks best, and where two neighbours disagree it inserts
collectives. One too many in the loop over layers costs a multiple of the layer's products, and nothing says
so. What the rules (parallel/rules.py) do ask for in a layer:

- parameters are gathered over fsdp, and their gradients added up over all axes that divide the batch, as
  are those of the position bias `[heads, queries, keys]`;
- over tensor, what a product summed over heads or hidden units is added up, and so are gradients of what
  such a product read;
- over sequence, keys and values go round (ring), or heads are exchanged for tokens (Ulysses), or keys are
  gathered; over expert, tokens go to their experts and back; over stage, microbatches go on.

Everything else of more than a few bytes is reported. A parameter is told from an activation by its shape.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from t5style import console
from t5style.parallel.explain import format_bytes
from t5style.parallel.mesh import BATCH_AXES
from t5style.train import hlo_cost
from t5style.train.hlo import read_shapes
from t5style.train.hlo_collectives import Collective
from t5style.train.program import TrainingProgram

# What a collective sends that is smaller is a statistic (a norm's, a scale's), or too little to matter.
SMALL_BYTES = 1 << 12
# Axes whose work is to send activations.
_SENDING_AXES = {"sequence", "expert", "stage"}
_SUMS = ("all-reduce", "reduce-scatter")
# Parts of an op_name that say nothing of where in the model it is.
_NO_PLACE = re.compile(
    r"closed_call|checkpoint|rematted_computation|while|body|cond|[A-Za-z_]+\..*|jit\(.*|vmap"
)


@dataclasses.dataclass(frozen=True)
class Resharding:
    """Collectives that no rule asks for, of one kind, over the same axes and in the same part of the model.

    Attributes:
      kind: `all-gather`, ...
      part: of the layer, and the direction: `attention/query, backwards`.
      arrays: what is sent, on one device: `bf16[8,2048,1024]`.
      axes: of the mesh, over which.
      bytes: that each device sends in a step.
      times: runs in a step.
      fix: what may be done.
    """

    kind: str
    part: str
    arrays: tuple[str, ...]
    axes: tuple[str, ...]
    bytes: int
    times: int
    fix: str

    def __str__(self) -> str:
        return (
            f"activations are resharded inside the loop over layers: {self.kind} of {', '.join(self.arrays)} "
            f"over {'·'.join(self.axes) or 'devices'} in {self.part}, {self.times} times a step, "
            f"{format_bytes(self.bytes)} from each device: {self.fix}."
        )


def resharding(
    collectives: Sequence[Collective], program: TrainingProgram, mesh: Mesh, *, small: int = SMALL_BYTES
) -> list[Resharding]:
    """Collectives of activations in loops over layers that the rules do not ask for, those that send most
    first.

    Args:
      collectives: of the compiled program, `hlo_cost.cost(compiled.as_text(), ...).collectives`.
      small: arrays of fewer bytes on a device are not looked at.
    """
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(program.abstract(mesh)[0].params)]
    known, summed = _Known(shapes, mesh.shape), _Known([], mesh.shape)
    if program.model.positions == "relative_bias":
        biases = [(program.model.num_heads, length, length) for length in program.sides().values()]
        summed = _Known(biases, mesh.shape)
    found: dict[tuple[str, str, tuple[str, ...]], Resharding] = {}
    for one in collectives:
        sent = [
            shape
            for array in one.arrays
            for shape in read_shapes(array)
            if shape.bytes >= small
            and not known.has(shape.dims)
            and not (one.kind in _SUMS and summed.has(shape.dims))
        ]
        if not one.loop or not one.total_bytes or not sent:
            continue
        if _asked_for(one) or not _in_layers(one.op_name):
            continue
        key = one.kind, part_of(one.op_name), one.axes
        alike = found.get(key)
        arrays = map(str, sent)
        found[key] = Resharding(
            *key[:2],
            arrays=tuple(dict.fromkeys((*alike.arrays, *arrays) if alike else arrays)),
            axes=one.axes,
            bytes=one.total_bytes + (alike.bytes if alike else 0),
            times=one.times + (alike.times if alike else 0),
            fix=_fix(one),
        )
    return sorted(found.values(), key=lambda one: -one.bytes)


def warn(compiled: jax.stages.Compiled, program: TrainingProgram, mesh: Mesh) -> list[Resharding]:
    """Says what `resharding` finds in a compiled program, one line for each, and returns it."""
    if mesh.size == 1:
        return []
    cost = hlo_cost.cost(compiled.as_text() or "", clock_hz=1.0, peak_flops=1.0, mesh_shape=dict(mesh.shape))
    found = resharding(cost.collectives, program, mesh)
    for one in found:
        console.say(f"Warning: {one}")
    return found


def part_of(op_name: str) -> str:
    """The part of the model that an op_name names: `decoder/attention/query dot_general, backwards`."""
    *scopes, operation = op_name.split("/") if op_name else ["", "?"]
    places = [
        scope
        for scope in scopes
        if not _NO_PLACE.fullmatch(scope) and "(" not in scope and scope not in ("", "Layer")
    ]
    where = "/".join(dict.fromkeys(places)) or "the loop"
    return f"{where} {operation}" + (", backwards" if "transpose(" in op_name else "")


def _in_layers(op_name: str) -> bool:
    """Whether an operation may be one of a layer: another loop is that over microbatches."""
    return not op_name or re.search(r"\b(encoder|decoder)\b", op_name) is not None


def _asked_for(one: Collective) -> bool:
    """Whether the rules ask for a collective of activations over these axes."""
    axes = {axis.rstrip("?") for axis in one.axes}
    if axes & _SENDING_AXES:
        return True
    return one.kind in _SUMS and axes == {"tensor"}


def _fix(one: Collective) -> str:
    axes = {axis.rstrip("?") for axis in one.axes}
    over = "·".join(sorted(axes)) or "these axes"
    if axes & set(BATCH_AXES) and one.kind == "all-gather":
        return (
            "every device gets rows of the batch that are not its own: constrain(x, ('batch', ...)) what "
            "this operation reads and makes, and let Rules.activations['batch'] name all of "
            f"{', '.join(BATCH_AXES)}"
        )
    if axes & set(BATCH_AXES) and one.kind in _SUMS:
        return (
            f"a sum over a dimension that {over} divides was left to be added up for each token, where "
            "gathering the weight would do: constrain what the operation makes to ('batch', ...)"
        )
    if "tensor" in axes:
        return (
            "heads, hidden units or the vocabulary are divided before it and whole after it: constrain both "
            "sides alike, and let Rules.activations and Rules.parameters divide the same names over tensor"
        )
    return f"what it reads is divided otherwise over {over} than what it makes: constrain both alike"


class _Known:
    """Shapes that arrays have on a device, whole or divided, and without `layers` in a loop over them."""

    def __init__(self, arrays: Sequence[tuple[int, ...]], mesh_shape: Mapping[str, int]):
        sizes = [size for size in mesh_shape.values() if size > 1]
        self.ways = {
            math.prod(some)
            for count in range(len(sizes) + 1)
            for some in itertools.combinations(sizes, count)
        }
        self.shapes = set()
        for shape in arrays:
            for one in (shape, shape[1:]):
                for merged in _merged(one):
                    self.shapes.add(tuple(size for size in merged if size != 1))

    def has(self, dims: tuple[int, ...]) -> bool:
        """Whether an array, divided along some dimensions, and in any order of them, has this shape."""
        here = tuple(size for size in dims if size != 1)
        return any(
            any(
                all(
                    whole % part == 0 and whole // part in self.ways
                    for whole, part in zip(order, here, strict=True)
                )
                for order in itertools.permutations(shape)
            )
            for shape in self.shapes
            if len(shape) == len(here)
        )


def _merged(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A shape, and those with neighbouring dimensions made one, as products on CPU see weights."""
    ways = [shape]
    for first in range(len(shape)):
        for end in range(first + 2, len(shape) + 1):
            ways.append((*shape[:first], math.prod(shape[first:end]), *shape[end:]))
    return ways
