"""Parameters on devices <-> tensors on disk, by a family's rows: one layer at a time on the host."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import Row, Shape
from t5style.models.params import abstract_params
from t5style.models.safetensors_files import Planned, copy, solid, some
from t5style.parallel.rules import path_name
from t5style.run_dir import UserError

Index = tuple[slice, ...]
Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Placed:
    """A row in one model.

    Attributes:
      row: it.
      paths, shapes: of our parameters, whole.
      layers: for a row per layer, the number in its stack of each layer of our parameters.
      experts: for a row per expert, how many there are.
    """

    row: Row
    paths: tuple[str, ...]
    shapes: tuple[Shape, ...]
    layers: tuple[int, ...] | None
    experts: int | None

    @functools.cached_property
    def unit_shapes(self) -> tuple[Shape, ...]:
        """Shapes of ours that the transform deals with: of one layer, of one expert."""
        lead = (self.layers is not None) + (self.experts is not None)
        return tuple(shape[lead:] for shape in self.shapes)

    @functools.cached_property
    def their_shapes(self) -> tuple[Shape, ...]:
        """Shapes of their tensors."""
        return self.row.transform.their_shapes(self.unit_shapes)

    def units(self) -> Iterator[tuple[int, int]]:
        """(index of the layer, expert), each what the transform deals with at once."""
        layers = 1 if self.layers is None else len(self.layers)
        return itertools.product(range(layers), range(self.experts or 1))

    def names(self, layer: int, expert: int) -> tuple[str, ...]:
        """Names of their tensors."""
        number = layer if self.layers is None else self.layers[layer]
        return tuple(name.format(layer=number, expert=expert) for name in self.row.names)

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes of all their tensors."""
        for unit in self.units():
            yield from zip(self.names(*unit), self.their_shapes, strict=True)


def place(config: TransformerConfig, rows: Sequence[Row], model: str) -> list[Placed]:
    """The rows that this config's model has.

    Args:
      config: the model's.
      rows: of its family; those for parameters it lacks are left out.
      model: what the family is called in an error.

    Raises:
      UserError: a parameter of the model has no row.
    """
    known = {
        path_name(keys): leaf.shape
        for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))
    }
    placed: list[Placed] = []
    for row in rows:
        paths = row.paths
        if not any(path in known for path in paths):
            continue
        assert all(path in known for path in paths), f"the model lacks some parameters of {row.paths}"
        shapes = tuple(known[path] for path in paths)
        layers = _numbers(config, paths[0]) if row.per_layer else None
        experts = shapes[0][row.per_layer] if row.per_expert else None
        placed.append(Placed(row, paths, shapes, layers, experts))
    claimed = [path for one in placed for path in one.paths]
    assert len(claimed) == len(set(claimed)), "two rows for one parameter"
    if left := sorted(set(known) - set(claimed)):
        raise UserError(f"the parameter {left[0]} has no place in a Hugging Face {model}")
    return placed


def _numbers(config: TransformerConfig, path: str) -> tuple[int, ...]:
    """The number in its stack of each layer of a parameter: `<side>/layers` or `<side>/moe_layers`."""
    side, tree, *_ = path.split("/")
    kinds = enumerate(config.layers_of(side))
    return tuple(number for number, kind in kinds if kind.experts == (tree == "moe_layers"))


def check(
    placed: Sequence[Placed], shapes: Mapping[str, Shape], where: str, described: str = "config.json"
) -> set[str]:
    """Compares what rows call for with what there is; returns the names of the tensors that they use.

    Args:
      placed: the rows.
      shapes: of the tensors that are there.
      where: what holds them, for errors.
      described: what says how they should be, for errors.

    Raises:
      UserError: a tensor is missing or has another shape; the sentence names it.
    """
    wanted = [tensor for one in placed for tensor in one.tensors()]
    for name, shape in wanted:
        if name in shapes and shapes[name] != shape:
            raise UserError(
                f"{where}: the tensor {name} has shape {list(shapes[name])}, and its {described} makes "
                f"it {list(shape)}"
            )
    if missing := [name for name, _ in wanted if name not in shapes]:
        raise UserError(
            f"{where} lacks {len(missing)} tensors that its {described} calls for: {some(missing)}"
        )
    return {name for name, _ in wanted}


def _last(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keeps what the last call has made, and lets go of it before anything else is made."""
    held: dict[tuple[int, ...], Made] = {}

    def made(*key: int) -> Made:
        if key not in held:
            held.clear()
            held[key] = make(*key)
        return held[key]

    return made


# --- loading ---


def load(
    placed: Sequence[Placed], read: Callable[[str], np.ndarray], dtype: str, shardings: Any = None
) -> Any:
    """The parameters on their devices.

    Args:
      placed: the rows.
      read: gives a tensor by name; a view of a mapped file will be read only where a device needs it.
      dtype: of the parameters, but for those of rows that have their own.
      shardings: a tree of shardings like the parameters'; None: all on the default device.
    """
    kinds = [jnp.dtype(one.row.dtype or dtype) for one in placed]

    @_last  # the parameters of a row, and the devices, use it in turn
    def unit(row: int, layer: int, expert: int) -> Sequence[np.ndarray]:
        one = placed[row]
        theirs = [read(name) for name in one.names(layer, expert)]
        return one.row.transform.to_ours(theirs, one.unit_shapes)

    def part(row: int, which: int, layer: int, index: Index) -> np.ndarray:
        experts = placed[row].experts
        if experts is None:
            return solid(unit(row, layer, 0)[which][index], kinds[row])
        chosen = range(*index[0].indices(experts))
        return np.stack([solid(unit(row, layer, expert)[which][index[1:]], kinds[row]) for expert in chosen])

    params: dict[str, Any] = {}
    for row, one in enumerate(placed):
        for which, (path, shape) in enumerate(zip(one.paths, one.shapes, strict=True)):
            *folders, name = path.split("/")
            sharding, tree = shardings, params
            for key in folders:
                sharding = None if sharding is None else sharding[key]
                tree = tree.setdefault(key, {})
            sharding = None if sharding is None else sharding[name]
            of_leaf = functools.partial(part, row, which)
            if one.layers is None:
                tree[name] = _make(shape, sharding, functools.partial(of_leaf, 0))
            else:
                tree[name] = _make_stacked(shape, kinds[row], sharding, of_leaf)
    return params


def _make(shape: Shape, sharding: Sharding | None, part: Callable[[Index], np.ndarray]) -> jax.Array:
    """An array from its parts; a part that several devices hold is made once."""
    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(shape)))
    parts: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def made(index: Index | None) -> np.ndarray:
        index = index or ()
        key = tuple(one.indices(size) for one, size in zip(index, shape, strict=True))
        if key not in parts:
            parts[key] = part(index)
        return parts[key]

    return jax.make_array_from_callback(shape, sharding, made)


def _make_stacked(
    shape: Shape, dtype: Any, sharding: Sharding | None, part: Callable[[int, Index], np.ndarray]
) -> jax.Array:
    """An array `[layers, ...]`, written layer by layer into memory of the devices: the host holds one layer,
    or, where layers are divided over devices, one of each device's.
    """
    local = shape[0] if sharding is None else sharding.shard_shape(shape)[0]
    layer_shape = (shape[0] // local, *shape[1:])
    write = _writer(sharding)
    whole = jnp.zeros(shape, dtype, device=sharding)
    for layer in range(local):

        def piece(index: Index, layer: int = layer) -> np.ndarray:
            at = index[0].start or 0
            return part(at * local + layer, index[1:])[None]

        whole = write(whole, _make(layer_shape, sharding, piece), np.int32(layer))
        whole.block_until_ready()  # else layers pile up on the host
    return whole


@functools.cache
def _writer(sharding: Sharding | None) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
    """Writes one layer of each device's into an array `[layers, ...]`, in place."""

    def write(whole: jax.Array, layer: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, layer, at, 0)

    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec
        write = jax.shard_map(write, mesh=mesh, in_specs=(spec, spec, PartitionSpec()), out_specs=spec)
    return jax.jit(write, donate_argnums=0)


# --- saving ---


def plan(placed: Sequence[Placed], params: Any) -> list[Planned]:
    """Their tensors, to be made one by one from our parameters, of any placement.

    In a job of several processes all of them must make them, in this order: parameters that no process holds
    whole are gathered, a layer at a time. Only process 0 gets the values; the others get empty arrays.
    """
    known = {path for one in placed for path in one.paths}
    leaves = {path_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    shapes = {path: shape for one in placed for path, shape in zip(one.paths, one.shapes, strict=True)}
    if odd := sorted(set(leaves) - known):
        raise UserError(f"the parameter {odd[0]} has no place in this Hugging Face model")
    for path, shape in shapes.items():
        if path not in leaves:
            raise UserError(f"the parameter {path} is missing")
        if tuple(leaves[path].shape) != shape:
            raise UserError(
                f"the parameter {path} has shape {list(leaves[path].shape)}; "
                f"the config makes it {list(shape)}"
            )

    @_last  # the tensors of a row use it in turn
    def fetched(row: int, layer: int) -> list[np.ndarray]:
        one = placed[row]
        return [_fetch(leaves[path], None if one.layers is None else layer) for path in one.paths]

    @_last
    def unit(row: int, layer: int, expert: int) -> Sequence[np.ndarray]:
        one, ours = placed[row], fetched(row, layer)
        if jax.process_index() != 0:
            return [np.empty(0)] * len(one.row.names)
        return one.row.transform.to_theirs(ours if one.experts is None else [x[expert] for x in ours])

    def make(row: int, layer: int, expert: int, which: int) -> np.ndarray:
        return unit(row, layer, expert)[which]

    return [
        Planned(name, shape, np.dtype(leaves[one.paths[0]].dtype), functools.partial(make, row, *at, which))
        for row, one in enumerate(placed)
        for at in one.units()
        for which, (name, shape) in enumerate(zip(one.names(*at), one.their_shapes, strict=True))
    ]


def _fetch(leaf: Any, layer: int | None) -> np.ndarray:
    """A layer of a parameter, or all of it, on the host; of process 0 if it takes several to know it."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf if layer is None else leaf[layer])
    at = None
    if layer is not None:
        local = leaf.sharding.shard_shape(leaf.shape)[0]
        at = layer // local
        leaf = _reader(leaf.sharding)(leaf, np.int32(layer % local))
    if not leaf.is_fully_addressable:
        assert isinstance(leaf.sharding, NamedSharding)
        leaf = _gather(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
        if jax.process_index() != 0:
            leaf.block_until_ready()  # else gathered layers pile up on the devices
            return np.empty(0)
    value = np.empty(leaf.shape if at is None else leaf.shape[1:], leaf.dtype)
    for shard in leaf.addressable_shards[:1] if leaf.is_fully_replicated else leaf.addressable_shards:
        if at is None:
            # An array keeps the host's copy that is made of it: this one goes away.
            copy(value[shard.index], np.asarray(jnp.copy(shard.data)))
            continue
        first, last, _ = shard.index[0].indices(leaf.shape[0])
        if first <= at < last:
            copy(value[shard.index[1:]], np.asarray(shard.data)[at - first])
    return value


@functools.cache
def _gather(whole: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=whole)


@functools.cache
def _reader(sharding: Sharding) -> Callable[[jax.Array, Any], jax.Array]:
    """Takes one layer of each device's from an array `[layers, ...]`."""

    def read(whole: jax.Array, at: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(whole, at, 1, 0)

    if isinstance(sharding, NamedSharding):
        mesh, spec = sharding.mesh, sharding.spec
        read = jax.shard_map(read, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    return jax.jit(read)
