"""Finds, in a compiled program, activations that devices send each other in a loop over layers although no
rule asks for it.

XLA divides what has no constraint as it thinks best, and where two neighbours disagree it inserts
collectives. One too many in the loop over layers costs a multiple of the layer's products, and nothing says
so. What the rules (parallel/rules.py) do ask for in a layer:

- parameters are gathered over fsdp, and their gradients added up over all axes that divide the batch;
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
from typing import Any

import jax

from t5style import console
from t5style.parallel.explain import format_bytes
from t5style.parallel.mesh import BATCH_AXES
from t5style.train import hlo_cost
from t5style.train.hlo import read_shapes
from t5style.train.hlo_collectives import Collective

# What a collective sends that is smaller is a statistic (a norm's, a scale's), or too little to matter.
SMALL_BYTES = 1 << 12
# Axes whose work is to send activations.
_SENDING_AXES = {"sequence", "expert", "stage"}
# Parts of an op_name that say nothing of where in the model it is.
_NO_PLACE = re.compile(
    r"closed_call|checkpoint|rematted_computation|while|body|cond|[A-Za-z_]+\..*|jit\(.*|vmap"
)


@dataclasses.dataclass(frozen=True)
class Resharding:
    """A collective that no rule asks for.

    Attributes:
      name: of the instruction.
      kind: `all-gather`, ...
      part: of the layer, and the direction: `attention/query, backwards`.
      op_name: as JAX has it.
      arrays: what is sent, on one device: `bf16[8,2048,1024]`.
      axes: of the mesh, over which.
      bytes: that each device sends in a step.
      times: runs in a step.
      fix: what may be done.
    """

    name: str
    kind: str
    part: str
    op_name: str
    arrays: tuple[str, ...]
    axes: tuple[str, ...]
    bytes: int
    times: int
    fix: str

    def __str__(self) -> str:
        return (
            f"{self.kind} of {', '.join(self.arrays)} over {'·'.join(self.axes) or 'devices'} in "
            f"{self.part}, {self.times} times a step, {format_bytes(self.bytes)} from each device: {self.fix}"
        )


def resharding(
    text: str, abstract_params: Any, mesh_shape: Mapping[str, int], *, small: int = SMALL_BYTES
) -> list[Resharding]:
    """Collectives of activations in loops that the rules do not ask for, those that send most first.

    Args:
      text: of the compiled program, `compiled.as_text()`.
      abstract_params: the parameters, or their shapes.
      mesh_shape: sizes by mesh axis, `mesh.shape`.
      small: arrays of fewer bytes on a device are not looked at.
    """
    parameters = [tuple(leaf.shape) for leaf in jax.tree.leaves(abstract_params)]
    known = _Known(parameters, mesh_shape)
    found = []
    for one in hlo_cost.cost(text, clock_hz=1.0, peak_flops=1.0, mesh_shape=mesh_shape).collectives:
        sent = [
            shape
            for array in one.arrays
            for shape in read_shapes(array)
            if shape.bytes >= small and not known.is_parameter(shape.dims)
        ]
        if not one.loop or not sent or _asked_for(one):
            continue
        found.append(
            Resharding(
                name=one.name,
                kind=one.kind,
                part=part_of(one.op_name),
                op_name=one.op_name,
                arrays=tuple(map(str, sent)),
                axes=one.axes,
                bytes=one.total_bytes,
                times=one.times,
                fix=_fix(one),
            )
        )
    return sorted(found, key=lambda one: -one.bytes)


def warn(text: str, abstract_params: Any, mesh_shape: Mapping[str, int]) -> list[Resharding]:
    """Says what `resharding` finds, one line for each, and returns it."""
    found = resharding(text, abstract_params, mesh_shape)
    for one in found:
        console.say(f"Warning: activations are resharded inside the loop over layers: {one}")
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


def _asked_for(one: Collective) -> bool:
    """Whether the rules ask for a collective of activations over these axes."""
    axes = {axis.rstrip("?") for axis in one.axes}
    if axes & _SENDING_AXES:
        return True
    return one.kind in ("all-reduce", "reduce-scatter") and axes == {"tensor"}


def _fix(one: Collective) -> str:
    axes = {axis.rstrip("?") for axis in one.axes}
    over = "·".join(sorted(axes)) or "these axes"
    if axes & set(BATCH_AXES) and one.kind == "all-gather":
        return (
            "every device gets rows of the batch that are not its own: constrain(x, ('batch', ...)) what "
            "this operation reads and makes, and let Rules.activations['batch'] name all of "
            f"{', '.join(BATCH_AXES)}"
        )
    if axes & set(BATCH_AXES) and one.kind in ("all-reduce", "reduce-scatter"):
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
    """Shapes that parameters have on a device, whole or divided, and without `layers` in a loop over them."""

    def __init__(self, parameters: Sequence[tuple[int, ...]], mesh_shape: Mapping[str, int]):
        sizes = [size for size in mesh_shape.values() if size > 1]
        self.ways = {
            math.prod(some)
            for count in range(len(sizes) + 1)
            for some in itertools.combinations(sizes, count)
        }
        self.shapes = set()
        for shape in parameters:
            for one in (shape, shape[1:]):
                for merged in _merged(one):
                    self.shapes.add(tuple(size for size in merged if size != 1))

    def is_parameter(self, dims: tuple[int, ...]) -> bool:
        """Whether some parameter, divided along some dimensions, and in any order of them, has this shape."""
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
