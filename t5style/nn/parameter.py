"""Parameters that know the logical names of their dimensions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import struct

Init = Callable[[jax.Array, Sequence[int], Any], jax.Array]


class Named(struct.PyTreeNode, nn.meta.AxisMetadata[jax.Array]):
    """A parameter boxed with the logical names of its dimensions; `init` returns these, `apply` takes arrays.

    Flax has such boxes (nn.LogicallyPartitioned), which also apply sharding constraints of flax's own; here
    parallel/rules.py alone turns names into shardings.
    """

    value: Any
    names: tuple[str, ...] = struct.field(pytree_node=False)

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Named":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Named":
        names = list(self.names)
        names.insert(index, params["name"])
        return self.replace(names=tuple(names))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Named":
        names = list(self.names)
        del names[index]
        return self.replace(names=tuple(names))


def named(init: Init, names: Sequence[str]) -> Callable[..., Named]:
    """An initializer like `init` that boxes its value with the names of its dimensions."""

    def boxed(key: jax.Array, shape: Sequence[int], dtype: Any) -> Named:
        if len(shape) != len(names):
            raise ValueError(f"{len(names)} names {tuple(names)} for a parameter of shape {tuple(shape)}")
        return Named(init(key, shape, dtype), tuple(names))

    return boxed


def is_named(value: object) -> bool:
    """Whether value is a box."""
    return isinstance(value, Named)


def unbox(tree: Any) -> Any:
    """The tree with plain arrays for boxes."""
    return jax.tree.map(lambda leaf: leaf.value if is_named(leaf) else leaf, tree, is_leaf=is_named)


def normal(stddev: float) -> Init:
    """N(0, stddev), drawn in float32 whatever the parameter's dtype."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
        return (jax.random.normal(key, tuple(shape)) * stddev).astype(dtype)

    return init


def ones(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Ones."""
    del key
    return jax.numpy.ones(tuple(shape), dtype)


def zeros(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Zeros."""
    del key
    return jax.numpy.zeros(tuple(shape), dtype)
