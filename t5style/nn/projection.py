"""The one place every product with a weight passes; precision and dtypes are decided here."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.nn import platform, quantized_kernel
from t5style.nn.parameter import Init, named, zeros
from t5style.nn.quantized_product import product as quantized_product


def project(
    x: jax.Array,
    kernel: jax.Array,
    *,
    contracted: int = 1,
    precision: str = "default",
    out_dtype: Any = None,
    quantized: str | None = None,
) -> jax.Array:
    """x times a weight, over the last `contracted` dimensions of x and the first ones of the kernel.

    The kernel is taken in x's dtype; sums are in float32 whatever that is.

    Args:
      x: `[..., *inner]`.
      kernel: `[*inner, *outer]`.
      contracted: how many dimensions `inner` has.
      precision: as jax.lax.Precision names it.
      out_dtype: of the result; x's by default.
      quantized: 'int8' or 'fp8': the products, forwards and backwards, are of 8-bit numbers
        (nn/quantized_product.py).

    Returns:
      `[..., *outer]`.
    """
    batch, inner, outer = x.shape[: x.ndim - contracted], kernel.shape[:contracted], kernel.shape[contracted:]
    kernel = kernel.astype(x.dtype)
    if platform.flatten_tokens():
        x = x.reshape(math.prod(batch), math.prod(inner))  # [tokens, inner]
        kernel = kernel.reshape(math.prod(inner), math.prod(outer))  # [inner, outer]
        contracted = 1
    if quantized is not None:
        product = quantized_product(x, kernel, contracted, quantized)
    else:
        dimensions = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
        product = jax.lax.dot_general(
            x, kernel, (dimensions, ((), ())), precision=precision, preferred_element_type=jnp.float32
        )  # [..., *inner] · [*inner, *outer] -> [..., *outer]
    return product.astype(out_dtype or x.dtype).reshape(*batch, *outer)


def project_int8(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array,
    *,
    contracted: int = 1,
    out_dtype: Any = None,
    transposed: bool = False,
) -> jax.Array:
    """As `project`, of an int8 kernel, whose columns are multiplied by scale f32 `[*outer]`.

    transposed: the kernel is `[outer, inner]`, an embedding. (Of a transpose of it XLA makes a copy on CPUs:
    50 ms instead of 2 for one of 32,128 × 512.)

    x becomes integers too, so that the product is one of integers: each token is divided by a 127th of its
    largest value and rounded, and what the rounding left is rounded in turn to a 254th. Two products of int8
    with one reading of the kernel keep 15 bits of x; with the first alone (Dettmers et al. 2022, section 2.1)
    the perplexity of SmolLM2-135M was 3.8 % higher than in float32.
    """
    batch = x.shape[: x.ndim - contracted]
    outer = kernel.shape[:1] if transposed else kernel.shape[contracted:]
    wide = x.reshape(math.prod(batch), -1).astype(jnp.float32)  # [tokens, inner]
    unit = jnp.maximum(jnp.abs(wide).max(axis=1, keepdims=True), 1e-12) / 127  # [tokens, 1]
    wide = wide / unit
    whole = jnp.round(wide)
    rest = jnp.round((wide - whole) * 254)
    product = jax.lax.dot_general(
        jnp.concatenate([whole, rest]).astype(jnp.int8),  # [2 · tokens, inner]
        kernel if transposed else kernel.reshape(wide.shape[1], -1),
        (((1,), (int(transposed),)), ((), ())),
        preferred_element_type=jnp.int32,
    ).astype(jnp.float32)
    tokens = len(wide)
    product = (product[:tokens] + product[tokens:] / 254) * unit * scale.reshape(-1)
    return product.astype(out_dtype or x.dtype).reshape(*batch, *outer)


def quantize_int8(kernel: jax.Array, inner: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """An int8 kernel and the f32 scales of its columns, of shape `kernel.shape` without the dimensions
    `inner`, which are summed over.
    """
    wide = kernel.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(axis=tuple(inner), keepdims=True), 1e-12) / 127
    return jnp.round(wide / scale).astype(jnp.int8), jnp.squeeze(scale, tuple(inner))


class Projection(nn.Module):
    """A learned linear map: `[..., *inner] -> [..., *outer]`, kernel `[*inner, *outer]`, bias `[*outer]`.

    A kernel that is given in int8 has its scales beside it: kernel_scale f32 `[*outer]`. In its place there
    may be kernel_codes and kernel_scales (nn/quantized_kernel.py). What an adapter has put beside it is used
    too (models/adapters.py): lora_a `[*inner, rank]` and lora_b `[rank, *outer]`,
    lora_magnitude `[*outer]`, lora_dropout, ia3_input `[*inner]`, ia3_output `[*outer]`, and a bias.

    Attributes:
      inner, outer: sizes of the dimensions summed over and of those made.
      names: logical axis of each of the kernel's dimensions.
      initializer: the kernel's initializer.
      param_dtype: the kernel's dtype; the computation is in x's.
      precision: see project.
      out_dtype: of the result; x's by default.
      bias: whether there is one.
      quantized: see project.
    """

    inner: tuple[int, ...]
    outer: tuple[int, ...]
    names: tuple[str, ...]
    initializer: Init
    param_dtype: str = "float32"
    precision: str = "default"
    out_dtype: str | None = None
    bias: bool = False
    quantized: str | None = None

    def setup(self) -> None:
        dtype = jnp.dtype(self.param_dtype)
        if not self.has_variable("params", "kernel_codes"):
            self.kernel = self.param(
                "kernel", named(self.initializer, self.names), (*self.inner, *self.outer), dtype
            )
        if self.bias:
            self.offset = self.param("bias", named(zeros, self.names[len(self.inner) :]), self.outer, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., *inner] -> [..., *outer]`."""
        contracted, out_dtype = len(self.inner), self.out_dtype and jnp.dtype(self.out_dtype)
        if self.has_variable("params", "ia3_input"):
            x = x * self._given("ia3_input").astype(x.dtype)
        if self.has_variable("params", "kernel_codes"):
            # The dense kernel is not kept for the backward pass: there it is made again.
            settings: Any = {"contracted": contracted, "precision": self.precision, "out_dtype": out_dtype}
            product = jax.checkpoint(
                lambda x, codes, scales: project(
                    x, quantized_kernel.dequantize(codes, scales, contracted - 1), **settings
                )
            )(x, self._given("kernel_codes"), self._given("kernel_scales"))
        elif self.kernel.dtype == jnp.int8:
            scale = self.get_variable("params", "kernel_scale")
            product = project_int8(x, self.kernel, scale, contracted=contracted, out_dtype=out_dtype)
        else:
            product = project(
                x,
                self.kernel,
                contracted=contracted,
                precision=self.precision,
                out_dtype=out_dtype,
                quantized=self.quantized,
            )
        if self.has_variable("params", "lora_a"):
            product = self._with_lora(x, product)
        if self.bias:
            product = product + self.offset.astype(product.dtype)
        elif self.has_variable("params", "bias"):
            product = product + self._given("bias").astype(product.dtype)
        if self.has_variable("params", "ia3_output"):
            product = product * self._given("ia3_output").astype(product.dtype)
        return product

    def _given(self, name: str) -> jax.Array:
        return self.get_variable("params", name)

    def _with_lora(self, x: jax.Array, product: jax.Array) -> jax.Array:
        """x W + x A B, two thin products more; or that with the columns' magnitudes (DoRA, equation 5)."""
        a, b, contracted = self._given("lora_a"), self._given("lora_b"), len(self.inner)
        if self.has_variable("params", "lora_dropout") and self.has_rng("dropout"):
            rate = self._given("lora_dropout")
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, x.shape)
            x = jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
        low = project(x, a, contracted=contracted, precision=self.precision)  # [..., rank]
        total = product + project(low, b, precision=self.precision, out_dtype=product.dtype)
        if not self.has_variable("params", "lora_magnitude"):
            return total
        if self.has_variable("params", "kernel_codes"):
            codes, scales = self._given("kernel_codes"), self._given("kernel_scales")
            weight = quantized_kernel.dequantize(codes, scales, contracted - 1)
        else:
            weight = self.kernel.astype(jnp.float32)
            if self.kernel.dtype == jnp.int8:
                weight = weight * self._given("kernel_scale")
        weight = weight + jnp.tensordot(a, b, 1).astype(jnp.float32)  # [*inner, *outer]
        norm = jnp.sqrt(jnp.square(jax.lax.stop_gradient(weight)).sum(axis=tuple(range(contracted))))
        return total * (self._given("lora_magnitude") / norm).astype(total.dtype)
