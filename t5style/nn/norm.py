"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.nn.parameter import named, ones, zeros

KINDS = ("rms", "layer")


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, computed in float32; returns x's dtype.

    Implementations differ in where they round to a 16-bit dtype (LLaMA's before the scale, Gemma's and
    GPT-OSS's after it, as here); in float32 they are the same.

    Attributes:
      kind: 'rms', x / sqrt(mean(x²) + epsilon) (Zhang and Sennrich 2019), or 'layer', which takes the mean
        from x first (Ba et al. 2016).
      epsilon: see kind.
      bias: there is a bias.
      plus_one: the factor is 1 + scale, and scale is initialised with zeros (Gemma).
      param_dtype: dtype of the parameters.
      names: logical name of the last dimension.
    """

    kind: str
    epsilon: float
    bias: bool = False
    plus_one: bool = False
    param_dtype: str = "float32"
    names: tuple[str, ...] = ("embed",)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind not in KINDS:
            raise ValueError(f"norm kind {self.kind!r} is not one of {', '.join(KINDS)}")
        shape, dtype = x.shape[-1:], jnp.dtype(self.param_dtype)
        scale = self.param("scale", named(zeros if self.plus_one else ones, self.names), shape, dtype)
        scale = scale.astype(jnp.float32) + (1.0 if self.plus_one else 0.0)
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)  # [..., 1]
        wide = wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale
        if self.bias:
            wide = wide + self.param("bias", named(zeros, self.names), shape, dtype).astype(jnp.float32)
        return wide.astype(x.dtype)
