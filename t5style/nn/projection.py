"""The one place every product with a weight passes; precision and dtypes are decided here."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.nn import platform
from t5style.nn.parameter import Init, named, zeros


def project(
    x: jax.Array, kernel: jax.Array, *, contracted: int = 1, precision: str = "default", out_dtype: Any = None
) -> jax.Array:
    """x times a weight, over the last `contracted` dimensions of x and the first ones of the kernel.

    The kernel is taken in x's dtype; sums are in float32 whatever that is.

    Args:
      x: `[..., *inner]`.
      kernel: `[*inner, *outer]`.
      contracted: how many dimensions `inner` has.
      precision: as jax.lax.Precision names it.
      out_dtype: of the result; x's by default.

    Returns:
      `[..., *outer]`.
    """
    batch, inner, outer = x.shape[: x.ndim - contracted], kernel.shape[:contracted], kernel.shape[contracted:]
    kernel = kernel.astype(x.dtype)
    if platform.flatten_tokens():
        x = x.reshape(math.prod(batch), math.prod(inner))  # [tokens, inner]
        kernel = kernel.reshape(math.prod(inner), math.prod(outer))  # [inner, outer]
        contracted = 1
    dimensions = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
    product = jax.lax.dot_general(
        x, kernel, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )  # [..., *inner] · [*inner, *outer] -> [..., *outer]
    return product.astype(out_dtype or x.dtype).reshape(*batch, *outer)


class Projection(nn.Module):
    """A learned linear map: `[..., *inner] -> [..., *outer]`, kernel `[*inner, *outer]`, bias `[*outer]`.

    Attributes:
      inner, outer: sizes of the dimensions summed over and of those made.
      names: logical axis of each of the kernel's dimensions.
      initializer: the kernel's initializer.
      param_dtype: the kernel's dtype; the computation is in x's.
      precision: see project.
      out_dtype: of the result; x's by default.
      bias: whether there is one.
    """

    inner: tuple[int, ...]
    outer: tuple[int, ...]
    names: tuple[str, ...]
    initializer: Init
    param_dtype: str = "float32"
    precision: str = "default"
    out_dtype: str | None = None
    bias: bool = False

    def setup(self) -> None:
        dtype = jnp.dtype(self.param_dtype)
        self.kernel = self.param(
            "kernel", named(self.initializer, self.names), (*self.inner, *self.outer), dtype
        )
        if self.bias:
            self.offset = self.param("bias", named(zeros, self.names[len(self.inner) :]), self.outer, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., *inner] -> [..., *outer]`."""
        product = project(
            x,
            self.kernel,
            contracted=len(self.inner),
            precision=self.precision,
            out_dtype=self.out_dtype and jnp.dtype(self.out_dtype),
        )
        return product + self.offset.astype(product.dtype) if self.bias else product
