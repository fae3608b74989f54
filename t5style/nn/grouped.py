"""Products of groups of rows with a weight for each group: what experts compute."""

from typing import Any

import jax
import jax.numpy as jnp


def project_groups(
    x: jax.Array,
    kernel: jax.Array,
    sizes: jax.Array,
    *,
    precision: str = "default",
    out_dtype: Any = None,
) -> jax.Array:
    """Rows of x times the weight of their group; nn/projection.project for groups.

    Args:
      x: `[rows, inner]`, group after group.
      kernel: `[groups, inner, outer]`, taken in x's dtype; sums are in float32.
      sizes: int32 `[groups]`, rows in each; the rows after the last group belong to none.
      precision: as jax.lax.Precision names it.
      out_dtype: of the result; x's by default.

    Returns:
      `[rows, outer]`; rows that belong to no group are 0.
    """
    kernel = kernel.astype(x.dtype)
    product = jax.lax.ragged_dot(
        x, kernel, sizes, precision=precision, preferred_element_type=jnp.float32
    )  # [rows, inner] · [groups, inner, outer] -> [rows, outer]
    grouped = jnp.arange(x.shape[0]) < sizes.sum()
    return jnp.where(grouped[:, None], product, 0.0).astype(out_dtype or x.dtype)
