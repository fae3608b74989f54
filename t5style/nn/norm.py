"""Normalisation."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.nn.parameter import named, ones


class RMSNorm(nn.Module):
    """x / rms(x) · scale over the last dimension (Zhang and Sennrich 2019), in float32; returns x's dtype."""

    epsilon: float
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", named(ones, ("embed",)), (x.shape[-1],), jnp.dtype(self.param_dtype))
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)  # [..., 1]
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale.astype(jnp.float32)).astype(x.dtype)
