"""Products of groups of rows with a weight for each group: what experts compute."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from t5style.nn import platform

# Tiles of the TPU's kernels: rows, and both sides of a weight. Twice each in bfloat16 (one is computed while
# the next is fetched) and the sums in float32 take 12 MB of vector memory, of which kernels get 16.
ROW_TILE, TILE = 512, 1024


def project_groups(
    x: jax.Array,
    kernel: jax.Array,
    sizes: jax.Array,
    *,
    all_rows: bool = False,
    precision: str = "default",
    out_dtype: Any = None,
) -> jax.Array:
    """Rows of x times the weight of their group: nn/projection.project for groups.

    Args:
      x: `[rows, inner]`, group after group.
      kernel: `[groups, inner, outer]`, taken in x's dtype; sums are in float32.
      sizes: int32 `[groups]`, rows in each; the rows after the last group belong to none.
      all_rows: the caller knows that every row belongs to a group, which spares two passes.
      precision: as jax.lax.Precision names it.
      out_dtype: of the result; x's by default.

    Returns:
      `[rows, outer]`; rows that belong to no group are 0, and have no gradient.
    """
    kernel = kernel.astype(x.dtype)
    if not all_rows:  # what a kernel makes of the other rows, forwards and backwards, is not defined
        grouped = (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
        x = jnp.where(grouped, x, 0)
    choice = platform.grouped_product()
    if choice == "blocks":
        product = blocked_product(x, kernel, sizes, precision)
    elif choice == "megablox" and x.dtype == jnp.bfloat16 and precision == "default":
        product = kernel_product(x, kernel, sizes)
    else:
        product = jax.lax.ragged_dot(
            x, kernel, sizes, precision=precision, preferred_element_type=jnp.float32
        )  # [rows, inner] · [groups, inner, outer] -> [rows, outer]
    if not all_rows:
        product = jnp.where(grouped, product, 0)
    return product.astype(out_dtype or x.dtype)


@jax.custom_vjp
def kernel_product(x: jax.Array, kernel: jax.Array, sizes: jax.Array) -> jax.Array:
    """jax.lax.ragged_dot by the TPU's Pallas kernels ("megablox"; Gale et al. 2022, section 5), in bfloat16.

    Sums are in float32. Only blocks that have rows of a group are computed. On CPU the kernels are
    interpreted, which is slow and meant for tests.

    Args:
      x: bf16 `[rows, inner]`.
      kernel: bf16 `[groups, inner, outer]`.
      sizes: int32 `[groups]`.

    Returns:
      bf16 `[rows, outer]`; rows after the last group are unspecified.
    """
    return _gmm(x, kernel, sizes, transposed=False)


def _kernel_forward(
    x: jax.Array, kernel: jax.Array, sizes: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return kernel_product(x, kernel, sizes), (x, kernel, sizes)


def _kernel_backward(
    kept: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    x, kernel, sizes = kept
    by_x = _gmm(gradient, kernel, sizes, transposed=True)
    tile = _row_tile(x.shape[0])
    by_kernel = tgmm(
        _filled(x, tile).swapaxes(0, 1),
        _filled(gradient, tile),
        sizes,
        kernel.dtype,
        (tile, *(min(size, TILE) for size in kernel.shape[1:])),
        interpret=platform.platform() != "tpu",
    )  # [inner, rows] · [rows, outer] -> [groups, inner, outer]
    return by_x, by_kernel, None


kernel_product.defvjp(_kernel_forward, _kernel_backward)


def _gmm(x: jax.Array, kernel: jax.Array, sizes: jax.Array, *, transposed: bool) -> jax.Array:
    """`[rows, a] · [groups, a, b] -> [rows, b]`, or transposed `[rows, b] · [groups, a, b] -> [rows, a]`."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # Pallas takes 0.15 s to import

    tile = _row_tile(x.shape[0])
    inner, outer = kernel.shape[1:][::-1] if transposed else kernel.shape[1:]
    return gmm(
        _filled(x, tile),
        kernel,
        sizes,
        x.dtype,
        (tile, min(inner, TILE), min(outer, TILE)),
        transpose_rhs=transposed,
        interpret=platform.platform() != "tpu",
    )[: x.shape[0]]


def _row_tile(rows: int) -> int:
    """Rows of a tile: 512, less where there are no more."""
    return min(ROW_TILE, -(-rows // 16) * 16)


def _filled(x: jax.Array, tile: int) -> jax.Array:
    """Rows up to a multiple of the tile; those added belong to no group."""
    missing = -x.shape[0] % tile
    return jnp.pad(x, ((0, missing), (0, 0))) if missing else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def blocked_product(x: jax.Array, kernel: jax.Array, sizes: jax.Array, precision: str) -> jax.Array:
    """jax.lax.ragged_dot, f32, as loops over the groups and over blocks of rows of each, for CPUs.

    The loops end where a group does, so that only rows that are there are computed, and with few rows only
    the weights of the groups that have any are read. Loops of unknown length have no gradient of their own;
    this one's is written below, once: it has no second derivative and no forward mode.

    Args:
      x: `[rows, inner]`.
      kernel: `[groups, inner, outer]`, of the same dtype.
      sizes: int32 `[groups]`.
      precision: as jax.lax.Precision names it.

    Returns:
      f32 `[rows, outer]`; rows after the last group are unspecified.
    """
    return _rows_times_groups(x, kernel, sizes, precision, transposed=False)


def _forward(
    x: jax.Array, kernel: jax.Array, sizes: jax.Array, precision: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return blocked_product(x, kernel, sizes, precision), (x, kernel, sizes)


def _backward(
    precision: str, kept: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    x, kernel, sizes = kept
    gradient = gradient.astype(x.dtype)
    by_x = _rows_times_groups(gradient, kernel, sizes, precision, transposed=True)
    by_kernel = _rows_times_rows(x, gradient, sizes, precision)
    return by_x.astype(x.dtype), by_kernel.astype(kernel.dtype), None


blocked_product.defvjp(_forward, _backward)


def _block(rows: int, groups: int, least: int) -> int:
    """Rows at a time: about half of a group, so that little of the last block belongs to the next group."""
    half = max(rows // (2 * groups), 1)
    return min(max(1 << (half.bit_length() - 1), least), 128)


def _rows_times_groups(
    x: jax.Array, kernel: jax.Array, sizes: jax.Array, precision: str, *, transposed: bool
) -> jax.Array:
    """`[rows, a] · [groups, a, b] -> [rows, b]`, or transposed `[rows, b] · [groups, a, b] -> [rows, a]`."""
    rows, groups = x.shape[0], kernel.shape[0]
    width = kernel.shape[1] if transposed else kernel.shape[2]
    block = min(_block(rows, groups, 4), rows)
    ends = jnp.cumsum(sizes)
    starts = ends - sizes
    padded = jnp.pad(x, ((0, block), (0, 0)))  # a group's last block may reach beyond the rows
    contracted = ((1,), (1 if transposed else 0,))

    def group(index: jax.Array, out: jax.Array) -> jax.Array:
        def multiply(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start, out = state
            # Bound to the loop, or else XLA converts and copies all groups' weights before it: 20 times
            # slower for 8 rows and 64 groups in bfloat16.
            weights = jax.lax.optimization_barrier((kernel, start))[0]
            weight = jax.lax.dynamic_index_in_dim(weights, index, 0, keepdims=False)
            part = jax.lax.dynamic_slice_in_dim(padded, start, block)
            product = jax.lax.dot_general(
                part, weight, (contracted, ((), ())), precision=precision, preferred_element_type=jnp.float32
            )  # [block, a] · [a, b] -> [block, b]
            # Rows of the next group that came along are overwritten when that group's turn comes.
            return start + block, jax.lax.dynamic_update_slice_in_dim(out, product, start, 0)

        return jax.lax.while_loop(lambda state: state[0] < ends[index], multiply, (starts[index], out))[1]

    out = jnp.zeros((rows + block, width), jnp.float32)
    return jax.lax.fori_loop(0, groups, group, out)[:rows]


def _rows_times_rows(x: jax.Array, y: jax.Array, sizes: jax.Array, precision: str) -> jax.Array:
    """For each group the sum over its rows: `[rows, a] · [rows, b] -> [groups, a, b]`, f32."""
    rows, groups = x.shape[0], sizes.shape[0]
    # Each block reads and writes a whole `[a, b]`: not too small.
    block = min(_block(rows, groups, 64), rows)
    ends = jnp.cumsum(sizes)
    padded_x, padded_y = (jnp.pad(array, ((0, block), (0, 0))) for array in (x, y))

    def group(_: None, limits: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        first, end = limits

        def add(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            start, total = state
            part_x = jax.lax.dynamic_slice_in_dim(padded_x, start, block)
            part_y = jax.lax.dynamic_slice_in_dim(padded_y, start, block)
            part_y = jnp.where((start + jnp.arange(block) < end)[:, None], part_y, 0)
            product = jax.lax.dot_general(
                part_x,
                part_y,
                (((0,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )  # [block, a] · [block, b] -> [a, b]
            return start + block, total + product

        zero = jnp.zeros((x.shape[1], y.shape[1]), jnp.float32)
        return None, jax.lax.while_loop(lambda state: state[0] < end, add, (first, zero))[1]

    return jax.lax.scan(group, None, (ends - sizes, ends))[1]
