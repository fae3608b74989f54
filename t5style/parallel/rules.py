"""Which logical axis is divided over which mesh axes.

Layers name the dimensions of what they make (`embed`, `mlp`, `heads`, ...) and never a mesh axis. Two tables
turn names into mesh axes: one for parameters (decides where they are stored) and one for activations (decides
how work is divided). They differ: `embed` of a parameter is divided over `fsdp`, while `embed` of an
activation is whole, because there the batch already uses `fsdp`.

Parameters must divide evenly. A dimension that does not is an error before anything is allocated: padding
would change the model, and replicating silently can cost gigabytes. Who wants a copy on every device says so
with `Rules(parameters={'vocab': None})`. Activations are only hints for the partitioner, change no result,
and a dimension that does not divide (a batch of one while decoding) is left whole.

The idea of logical axis names and rules is that of Mesh TensorFlow (Shazeer et al. 2018) and T5X; fsdp is
ZeRO stage 3 (Rajbhandari et al. 2020); tensor is Megatron-LM's split of heads, hidden units and vocabulary
(Shoeybi et al. 2019).
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5style.parallel.mesh import AXES, BATCH_AXES

MeshAxes = str | Sequence[str] | None
LogicalAxes = Sequence[str | None]

# `layers` is the dimension over which equal layers are stacked; pipeline stages (nn/pipeline.py) divide it.
PARAMETER_RULES: dict[str, MeshAxes] = {
    "embed": ("fsdp", "expert"),  # of experts' own weights `expert` divides the experts already
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "layers": "stage",
    "relpos_buckets": None,
    "length": None,
    "token_types": None,
    "latent": None,
    "expert": "expert",
    "one": None,  # a dimension of size 1
}
ACTIVATION_RULES: dict[str, MeshAxes] = {
    "batch": BATCH_AXES,
    # Of the batch outside of layers: pipeline stages share the work of embedding, head and loss.
    "rows": (*BATCH_AXES, "stage"),
    "stage": "stage",
    "length": "sequence",
    "embed": None,
    "vocab": "tensor",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "layers": None,
    "expert": "expert",
}


@dataclasses.dataclass(frozen=True)
class Rules:
    """Changes to the two tables, by logical axis name; what is not named keeps its default.

    Attributes:
      parameters: for example `{'vocab': None}` keeps the embedding whole on every device of the tensor axis.
      activations: for example `{'length': None}`.
    """

    parameters: Mapping[str, MeshAxes] = dataclasses.field(default_factory=dict)
    activations: Mapping[str, MeshAxes] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind, table, defaults in (
            ("parameters", self.parameters, PARAMETER_RULES),
            ("activations", self.activations, ACTIVATION_RULES),
        ):
            for name, axes in table.items():
                if name not in defaults:
                    raise ValueError(f"Rules.{kind} names the logical axis {_unknown(name, defaults)}")
                for axis in _as_tuple(axes):
                    if axis not in AXES:
                        raise ValueError(f"Rules.{kind}[{name!r}] names the mesh axis {_unknown(axis, AXES)}")

    def __hash__(self) -> int:
        return hash(
            (
                tuple(sorted(map(str, self.parameters.items()))),
                tuple(sorted(map(str, self.activations.items()))),
            )
        )

    def parameter_axes(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes over which this dimension of a parameter is divided."""
        return _lookup(logical, self.parameters, PARAMETER_RULES)

    def activation_axes(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes over which this dimension of an activation is divided."""
        return _lookup(logical, self.activations, ACTIVATION_RULES)


def spec(
    axes: LogicalAxes, shape: Sequence[int], mesh: Mesh, rules: Rules, name: str = "parameter"
) -> PartitionSpec:
    """PartitionSpec of one parameter: `axes` names its dimensions, `shape` gives their sizes.

    Where two dimensions want the same mesh axis, the first has it. Mesh axes of size 1 are left out.

    Raises:
      ValueError: a dimension does not divide by its mesh axes; the sentence names `name`, the sizes and the
        fix.
    """
    if len(axes) != len(shape):
        raise ValueError(
            f"{name} has shape {tuple(shape)} but {len(axes)} logical axes {tuple(axes)}: name each one."
        )
    entries = _parameter_entries(axes, mesh, rules)
    for logical, size, entry in zip(axes, shape, entries, strict=True):
        ways = math.prod(mesh.shape[axis] for axis in entry)
        if size % ways:
            fits = [way for way in range(1, ways + 1) if size % way == 0]
            upward = -(-size // ways) * ways
            raise ValueError(
                f"{name}: its axis {logical!r} of size {size} does not divide by {'·'.join(entry)}={ways}. "
                f"Choose {'·'.join(entry)} among {', '.join(map(str, fits))}, make the size a multiple of "
                f"{ways} ({upward}, say), or keep a whole copy on each device with "
                f"Rules(parameters={{{logical!r}: None}})."
            )
    return _partition_spec(entries)


def _parameter_entries(axes: LogicalAxes, mesh: Mesh, rules: Rules) -> list[tuple[str, ...]]:
    entries: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for logical in axes:
        entry = tuple(
            axis for axis in rules.parameter_axes(logical) if mesh.shape[axis] > 1 and axis not in taken
        )
        taken.update(entry)
        entries.append(entry)
    return entries


def param_shardings(
    logical_axes: Any, abstract_params: Any, mesh: Mesh, rules: Rules | None = None, *, part: bool = False
) -> Any:
    """Tree of NamedShardings for a tree of parameters; nothing is allocated.

    Args:
      logical_axes: tree like the parameters' with a tuple of logical axis names at each leaf.
      abstract_params: the parameters, or ShapeDtypeStructs of them.
      mesh: where they go.
      rules: the table; None for the defaults.
      part: these are an adapter's: a mesh axis that divides none of them divides its base.

    Raises:
      ValueError: the trees differ, a dimension does not divide by its mesh axes, or a mesh axis divides
        nothing.
    """
    rules = rules or Rules()
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params)
    named = [(path_name(path), leaf) for path, leaf in leaves]
    axes = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(logical_axes, is_leaf=is_axes)
    }
    if unmatched := sorted(axes.keys() ^ {name for name, _ in named}):
        raise ValueError(
            f"The tree of parameters and the tree of their logical axes differ at {unmatched[0]}."
        )
    specs = [spec(axes[name], leaf.shape, mesh, rules, name) for name, leaf in named]
    used = {axis for one in specs for entry in one for axis in _as_tuple(entry)}
    used.update(rules.activation_axes("batch"), rules.activation_axes("length"))
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used and not part:
            raise ValueError(
                f"The mesh axis {axis}={size} divides nothing in this model, so {size} groups of devices "
                f"would all do the same work: set {axis}=1."
            )
    return jax.tree.unflatten(tree, [NamedSharding(mesh, one) for one in specs])


def is_axes(value: Any) -> bool:
    """Whether `value` is a tuple of logical axis names, a leaf of a tree of them."""
    return isinstance(value, tuple) and all(item is None or isinstance(item, str) for item in value)


def path_name(path: Sequence[Any]) -> str:
    """A tree path as `decoder/layers/mlp/kernel`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


# --- batches ---


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of `[batch, ...]` arrays that come from the input pipeline: rows over data, fsdp, expert."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Refuses a batch whose rows cannot be dealt out evenly.

    Raises:
      ValueError: `batch_size` is no multiple of data × fsdp × expert × accumulation.
    """
    # The expert axis is named where there is one.
    ways = {axis: mesh.shape[axis] for axis in BATCH_AXES if axis != "expert" or mesh.shape[axis] > 1}
    unit = math.prod(ways.values()) * accumulation
    if batch_size % unit:
        accumulated = f" × accumulation {accumulation}" if accumulation > 1 else ""
        near = sorted({max(1, batch_size // unit) * unit, -(-batch_size // unit) * unit})
        raise ValueError(
            f"The batch of {batch_size} rows does not divide by "
            f"{' × '.join(f'{axis} {size}' for axis, size in ways.items())}{accumulated} = "
            f"{unit}: choose {' or '.join(map(str, near))} rows, or a mesh with a smaller "
            f"{' × '.join(ways)}."
        )


def host_shard(mesh: Mesh) -> tuple[int, int]:
    """Which part of each batch this process reads: (shard, number of shards) for `BatchSource.batch_at`.

    Processes whose devices hold the same rows (tensor or sequence parallelism across hosts) read the same
    shard. Where the topology interleaves the hosts' devices, a shard's rows land on the host's own devices:
    the global batch is then the same rows in another order.

    Raises:
      ValueError: the processes share some rows but not all, which no even split can serve.
    """
    # [data, fsdp, expert, everything else]: the position along the first three is the batch position.
    order = [AXES.index(axis) for axis in BATCH_AXES]
    order += [index for index in range(len(AXES)) if index not in order]
    rows = mesh.devices.transpose(order).reshape(math.prod(mesh.shape[axis] for axis in BATCH_AXES), -1)
    positions: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            positions.setdefault(device.process_index, set()).add(row)
    groups = sorted({tuple(sorted(held)) for held in positions.values()})
    if sum(map(len, groups)) != len(rows) or len({len(group) for group in groups}) != 1:
        raise ValueError(
            f"The mesh {dict(mesh.shape)} gives the {len(positions)} processes overlapping parts of the "
            f"batch: make {' × '.join(BATCH_AXES)} = {len(rows)} a multiple or a divisor of the number of "
            "processes."
        )
    mine = positions.get(jax.process_index())
    if mine is None:
        raise ValueError(
            "This process has no device in the mesh: build the mesh over the devices of every process."
        )
    return groups.index(tuple(sorted(mine))), len(groups)


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays `[batch, ...]` from this process's rows `[batch / number of shards, ...]` (see
    `host_shard`)."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return {key: jax.device_put(value, sharding) for key, value in batch.items()}
    shards = host_shard(mesh)[1]
    return {
        key: jax.make_array_from_process_local_data(
            sharding, value, (value.shape[0] * shards, *value.shape[1:])
        )
        for key, value in batch.items()
    }


# --- activations ---

# A jit-aware context: a function traced under one mesh is traced again under another.
_context = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use_mesh(mesh: Mesh, rules: Rules | None = None) -> Iterator[Mesh]:
    """Within this context, and in this thread, `constrain` divides activations over `mesh`.

    Call (or lower) the jitted function inside it; the context is part of jit's cache key.
    """
    with _context((mesh, rules or Rules())):
        yield mesh


@contextlib.contextmanager
def no_mesh() -> Iterator[None]:
    """Within this context, inside `use_mesh` too, there is no mesh: for questions about shapes alone."""
    with _context(None):
        yield


def current_mesh() -> Mesh | None:
    """The mesh of the enclosing `use_mesh`, if any."""
    context = _context.value
    return None if context is None else context[0]


def current_rules() -> Rules:
    """The rules of the enclosing `use_mesh`, or the defaults."""
    context = _context.value
    return Rules() if context is None else context[1]


def constrain(x: jax.Array, logical_axes: LogicalAxes) -> jax.Array:
    """Says how an activation is divided: one logical axis name (or None) per dimension of `x`.

    Outside `use_mesh`, and on a mesh of one device, `x` is returned as it is. A dimension that does not
    divide is left whole. Works under jit, scan, remat, grad, vmap and abstract evaluation.

    Raises:
      ValueError: the number of names is not the number of dimensions, or a name is unknown.
    """
    context = _context.value
    if context is None or context[0].size == 1:
        return x
    entries = activation_axes(logical_axes, x.shape)
    return jax.lax.with_sharding_constraint(x, NamedSharding(context[0], _partition_spec(entries)))


def activation_axes(logical_axes: LogicalAxes, shape: Sequence[int]) -> list[tuple[str, ...]]:
    """The mesh axes over which `constrain` divides each dimension of an activation of that shape.

    Raises:
      ValueError: the number of names is not the number of dimensions, or a name is unknown.
    """
    context = _context.value
    if len(logical_axes) != len(shape):
        raise ValueError(
            f"constrain: an array of shape {tuple(shape)} with {len(logical_axes)} names "
            f"{tuple(logical_axes)}."
        )
    if context is None:
        return [()] * len(shape)
    mesh, rules = context
    entries: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for logical, size in zip(logical_axes, shape, strict=True):
        entry = tuple(
            axis for axis in rules.activation_axes(logical) if mesh.shape[axis] > 1 and axis not in taken
        )
        if size % math.prod(mesh.shape[axis] for axis in entry):
            entry = ()
        taken.update(entry)
        entries.append(entry)
    return entries


def parameter_axes(logical_axes: LogicalAxes) -> list[tuple[str, ...]]:
    """The mesh axes over which each dimension of a parameter is divided in the enclosing `use_mesh`."""
    context = _context.value
    return [()] * len(logical_axes) if context is None else _parameter_entries(logical_axes, *context)


# --- small parts ---


def _as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _lookup(
    logical: str | None, changes: Mapping[str, MeshAxes], defaults: Mapping[str, MeshAxes]
) -> tuple[str, ...]:
    if logical is None:
        return ()
    if logical not in defaults:
        raise ValueError(f"There is no rule for the logical axis {_unknown(logical, defaults)}")
    return _as_tuple(changes.get(logical, defaults[logical]))


def _unknown(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{name!r}, which is not one of {', '.join(known)}.{hint}"


def _partition_spec(entries: list[tuple[str, ...]]) -> PartitionSpec:
    """Entries as a PartitionSpec in its plain form: a lone axis by itself, no trailing None."""
    plain = [None if not entry else entry[0] if len(entry) == 1 else entry for entry in entries]
    while plain and plain[-1] is None:
        plain.pop()
    return PartitionSpec(*plain)
