"""How a model's parameters are laid out over a mesh, in a table, before anything is allocated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5style import console
from t5style.parallel.mesh import describe
from t5style.parallel.rules import Rules, is_axes, param_shardings, path_name

# A parameter of which each device holds this much or more, whole, is worth a warning when the mesh could
# divide it.
LARGE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one parameter lies.

    Attributes:
      path: `decoder/layers/mlp/wi_0`.
      shape: of the whole parameter.
      dtype: its name.
      logical_axes: name of each dimension.
      mesh_axes: mesh axes of each dimension, `-` for a dimension that is not divided.
      bytes: of the whole parameter.
      bytes_per_device: of the part that one device holds.
      flagged: large, and whole on every device although the mesh divides other parameters.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    logical_axes: tuple[str | None, ...]
    mesh_axes: tuple[str, ...]
    bytes: int
    bytes_per_device: int
    flagged: bool


def placements(
    logical_axes: Any, abstract_params: Any, mesh: Mesh, rules: Rules | None = None
) -> list[Placement]:
    """Placements of all parameters, in tree order.

    Args:
      logical_axes: tree like the parameters' with a tuple of logical axis names at each leaf.
      abstract_params: ShapeDtypeStructs (or arrays).
      mesh: of real devices or of described ones.
      rules: the table; None for the defaults.

    Raises:
      ValueError: the parameters cannot be laid out so (see `rules.param_shardings`).
    """
    shardings = jax.tree.leaves(param_shardings(logical_axes, abstract_params, mesh, rules))
    axes = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=is_axes)
    }
    divides = any(mesh.shape[axis] > 1 for axis in mesh.axis_names if axis != "data")
    result = []
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(abstract_params), shardings, strict=True
    ):
        item = np.dtype(leaf.dtype).itemsize
        entries = tuple(sharding.spec) + (None,) * (len(leaf.shape) - len(sharding.spec))
        here = math.prod(sharding.shard_shape(leaf.shape)) * item
        result.append(
            Placement(
                path=path_name(path),
                shape=tuple(leaf.shape),
                dtype=np.dtype(leaf.dtype).name,
                logical_axes=tuple(axes[path_name(path)]),
                mesh_axes=tuple(
                    "-" if entry is None else entry if isinstance(entry, str) else "·".join(entry)
                    for entry in entries
                ),
                bytes=math.prod(leaf.shape) * item,
                bytes_per_device=here,
                flagged=divides and here >= LARGE_BYTES and here == math.prod(leaf.shape) * item,
            )
        )
    return result


def explain(
    logical_axes: Any, abstract_params: Any, mesh: Mesh, rules: Rules | None = None
) -> list[Placement]:
    """Prints the table of `placements` with its totals and warnings, and returns the placements."""
    rows = placements(logical_axes, abstract_params, mesh, rules)
    console.table(
        f"Parameters on {describe(mesh)}",
        ["parameter", "shape", "logical axes", "mesh axes", "per device", "note"],
        [
            [
                row.path,
                " × ".join(map(str, row.shape)) + f" {row.dtype}",
                ", ".join(str(axis) for axis in row.logical_axes),
                ", ".join(row.mesh_axes),
                format_bytes(row.bytes_per_device),
                "large, whole on each device" if row.flagged else "",
            ]
            for row in rows
        ],
    )
    console.say(summary(rows, mesh))
    return rows


def summary(rows: Sequence[Placement], mesh: Mesh) -> str:
    """Totals and warnings in words."""
    total, here = sum(row.bytes for row in rows), sum(row.bytes_per_device for row in rows)
    parameters = sum(math.prod(row.shape) for row in rows)
    text = (
        f"{parameters:,} parameters, {format_bytes(total)}; each of {mesh.size} devices holds "
        f"{format_bytes(here)} ({here / total:.1%}). Gradients and each optimiser moment take as much again."
    )
    flagged = [row for row in rows if row.flagged]
    if flagged:
        text += (
            f"\n{len(flagged)} large parameter{'s are' if len(flagged) > 1 else ' is'} whole on every device "
            f"({format_bytes(sum(row.bytes_per_device for row in flagged))}): "
            f"{', '.join(row.path for row in flagged)}. More tensor or fsdp would divide them, unless "
            f"Rules.parameters keeps them whole."
        )
    elif mesh.size > 1 and here == total:
        text += (
            "\nEvery device holds the whole model (data parallelism only): set fsdp or tensor to divide it."
        )
    return text


def format_bytes(count: int) -> str:
    """`1.5 MiB`."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, _ = size / 1024, units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.2f} {units[0]}"
