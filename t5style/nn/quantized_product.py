"""Products of low precision for training: int8 or 8-bit floats forwards and backwards, scaled as they go.

Each operand is divided, along the dimensions that the product sums over, by its largest absolute value:
each token of activations, each column of a weight (dynamic scales: nothing is kept between steps). The
product is one of 8-bit numbers with sums in int32 or float32, which is then multiplied by both scales. All
three products of a layer, `x·w` forwards, `g·wᵀ` and `xᵀ·g` backwards, are quantised, each with scales of its
own; gradients pass the rounding as if it were not there (straight-through; Bengio et al. 2013). Parameters,
moments and what lies between products stay as they are.

int8: Gradients are rounded stochastically, up with the probability of what is cut off, so that sums over many
tokens are right on average: their largest value is far above most, which nearest rounding would make 0
(Jacob et al. 2018 have the integer arithmetic, Gupta et al. 2015 the rounding, AQT the recipe for TPUs).

fp8: all operands are E4M3, rounded to the nearest. With a scale for each token or column gradients need no
more range, and E5M2 would keep one bit less of each (DeepSeek-V3 2024, section 3.3.2).
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from t5style.parallel.rules import activation_axes, current_mesh

KINDS = ("int8", "fp8")
Dimensions = Sequence[int]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def product(x: jax.Array, kernel: jax.Array, contracted: int, kind: str) -> jax.Array:
    """x times a weight, as nn/projection.project.

    Args:
      x: `[..., *inner]`.
      kernel: `[*inner, *outer]`.
      contracted: how many dimensions `inner` has.
      kind: one of KINDS.

    Returns:
      f32 `[..., *outer]`.
    """
    inner = range(x.ndim - contracted, x.ndim)
    return _dot(x, kernel, inner, range(contracted), kind)


def _forward(
    x: jax.Array, kernel: jax.Array, contracted: int, kind: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, kernel, contracted, kind), (x, kernel)


def _backward(
    contracted: int, kind: str, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    gradient = gradient.astype(x.dtype)  # it comes from an array of that dtype
    tokens = x.ndim - contracted
    # [..., *outer] · [*inner, *outer] -> [..., *inner]
    by_x = _dot(
        gradient, kernel, range(tokens, gradient.ndim), range(contracted, kernel.ndim), kind, gradient=0
    )
    # Scales are those of one device's rows: its product is scaled before it is added to others', so that no
    # device waits to hear the largest values of the others (AQT's local quantisation).
    mesh = current_mesh()
    shards = 1
    if mesh is not None:
        shards = math.prod(mesh.shape[axis] for axis in activation_axes(("batch",), x.shape[:1])[0])
    x, gradient = (y.reshape(shards, -1, *y.shape[1:]) for y in (x, gradient))
    over = range(1, tokens + 1)
    # [shards, ..., *inner] · [shards, ..., *outer] -> [shards, *inner, *outer]
    by_kernel = _dot(x, gradient, over, over, kind, gradient=1, batch=True).sum(axis=0)
    return by_x.astype(x.dtype), by_kernel.astype(kernel.dtype)


product.defvjp(_forward, _backward)


def _dot(
    x: jax.Array,
    y: jax.Array,
    over_x: Dimensions,
    over_y: Dimensions,
    kind: str,
    *,
    gradient: int | None = None,
    batch: bool = False,
) -> jax.Array:
    """dot_general, f32, of quantised operands, over these dimensions and, if batch, along the first.

    gradient: which of the two is one.
    """
    over_x, over_y = tuple(over_x), tuple(over_y)
    (x, scale_x), (y, scale_y) = (
        _quantize(operand, over, kind, gradient == index)
        for index, (operand, over) in enumerate(((x, over_x), (y, over_y)))
    )
    along = ((0,), (0,)) if batch else ((), ())
    sums = jnp.int32 if kind == "int8" else jnp.float32
    made = jax.lax.dot_general(x, y, ((over_x, over_y), along), preferred_element_type=sums)
    common, own_x = int(batch), x.ndim - len(over_x)  # dimensions of the result: x's, with those in common
    scale_x = scale_x.reshape(*made.shape[:own_x], *[1] * (made.ndim - own_x))
    scale_y = scale_y.reshape(*made.shape[:common], *[1] * (own_x - common), *made.shape[own_x:])
    return made.astype(jnp.float32) * scale_x * scale_y


def _quantize(x: jax.Array, over: Dimensions, kind: str, gradient: bool) -> tuple[jax.Array, jax.Array]:
    """x in 8 bits, and the f32 scale by which to multiply it, of size 1 in the dimensions `over`."""
    dtype = jnp.int8 if kind == "int8" else jnp.float8_e4m3fn
    limit = 127.0 if kind == "int8" else float(jnp.finfo(dtype).max)
    largest = jnp.abs(x).max(axis=tuple(over), keepdims=True).astype(jnp.float32)
    scale = jnp.maximum(largest, 1e-30) / limit
    wide = x.astype(jnp.float32) * (1 / scale)
    if kind == "int8":
        wide = jnp.floor(wide + _dither(wide)) if gradient else jnp.round(wide)
    return jnp.clip(wide, -limit, limit).astype(dtype), scale


def _dither(x: jax.Array) -> jax.Array:
    """f32 in [0, 1), drawn for each element by a hash of its place and its value.

    So it needs no key, is the same when it is computed again, and on any mesh. The hash is the finaliser of
    MurmurHash3.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    for dimension, size in enumerate(x.shape):
        if size > 1:
            place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension)
            bits = bits ^ (place * jnp.uint32((0x9E3779B1 * (2 * dimension + 1)) & 0xFFFFFFFF))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return ((bits ^ (bits >> 16)) >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24
