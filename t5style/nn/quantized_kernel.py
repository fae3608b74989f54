"""Kernels kept in int8 or nf4 while others train (QLoRA): quantised by qwix, dense where they are used.

Beside where the kernel would lie there are kernel_codes and kernel_scales: one f32 scale for each block of
the last dimension that the product sums over. Codes of nf4 (NormalFloat, Dettmers et al. 2023, section 3 and
appendix E) are two to a byte, uint8, the first in the lower half; those of int8 are int8.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("nf4", "int8")


def _qwix() -> Any:
    try:
        import qwix
    except ImportError:
        raise ImportError("int8 and nf4 bases need the package qwix: pip install 't5style[qlora]'") from None
    return qwix


def block_of(size: int, block: int) -> int:
    """The length of blocks along a dimension of this size: at most `block`, and a divisor of both."""
    return math.gcd(size, block)


def quantize(kernel: jax.Array, axis: int, kind: str, block: int) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of a kernel, in blocks along `axis`.

    Args:
      kernel: `[*inner, *outer]`, floating point.
      axis: of an even size.
      kind: one of KINDS.
      block: see block_of.

    Returns:
      codes, int8 like the kernel, or uint8 with half the size along `axis`; f32 scales, with one for each
      block along it.
    """
    size = kernel.shape[axis]
    others = [i for i in range(kernel.ndim) if i != axis]
    found = _qwix().quantize(
        kernel.astype(jnp.float32),
        jnp.int8 if kind == "int8" else kind,
        channelwise_axes=others,
        tiled_axes={axis: block_of(size, block)},
    )
    if kind == "int8":
        return found.qvalue, found.scale
    codes = jnp.moveaxis(found.qvalue.astype(jnp.uint8), axis, -1)
    codes = codes.reshape(*codes.shape[:-1], size // 2, 2)
    packed = codes[..., 0] | (codes[..., 1] << 4)
    return jnp.moveaxis(packed, -1, axis), found.scale


def dequantize(codes: jax.Array, scales: jax.Array, axis: int) -> jax.Array:
    """The kernel in the scales' dtype, of what `quantize` gave."""
    qwix, kind = _qwix(), "int8" if codes.dtype == jnp.int8 else "nf4"
    if kind == "nf4":
        packed = jnp.moveaxis(codes, axis, -1)
        pairs = jnp.stack([packed & 15, packed >> 4], axis=-1)
        codes = jnp.moveaxis(pairs.reshape(*packed.shape[:-1], -1), -1, axis).astype(jnp.uint4)
    dense: jax.Array = qwix.dequantize(
        qwix.QArray(codes, scales, None, codes.dtype if kind == "int8" else kind)
    )
    return dense
