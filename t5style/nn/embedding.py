"""Looking up rows of a table that is divided over the mesh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from t5style.parallel.rules import activation_axes, constrain, current_mesh, current_rules


def lookup(table: jax.Array, ids: jax.Array, dtype: Any) -> jax.Array:
    """Rows of a table `[vocab, embed]` in dtype: `[*ids.shape, embed]`. An id beyond the table gives its last
    row.

    Where fsdp divides both the table's columns and the batch, each device looks up its columns for all rows
    of the batch that fsdp divides (ids are a few bytes a token), and an all-to-all then exchanges columns for
    rows; gradients go the same way back. XLA left to itself goes from one division to the other through
    whole arrays on every device ("involuntary full rematerialization") as soon as there is another axis.
    """
    mesh, rules = current_mesh(), current_rules()
    if mesh is None or ids.ndim != 2:
        return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)
    rows = activation_axes(("batch", "length"), ids.shape)
    columns = tuple(
        axis for axis in rules.parameter_axes("embed") if axis in {a for row in rows for a in row}
    )
    if not columns or table.shape[1] % math.prod(mesh.shape[axis] for axis in columns):
        return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)
    others = [tuple(axis for axis in row if axis not in columns) for row in rows]
    ids = jax.lax.with_sharding_constraint(ids, NamedSharding(mesh, PartitionSpec(*others)))
    x = jnp.take(table, ids, axis=0, mode="clip").astype(dtype)
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*others, columns)))
    return constrain(x, ("batch", "length", "embed"))
