"""Positions: T5's bucketed relative bias, and rotary embeddings."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.nn import platform
from t5style.nn.parameter import Init, named


def relative_bucket(
    distance: jax.Array, *, bidirectional: bool, buckets: int, max_distance: int
) -> jax.Array:
    """Bucket of each relative position (Raffel et al. 2020, section 2.1; Mesh TensorFlow's rule).

    Half of the buckets hold one distance each, the other half hold ranges that grow by a constant factor up
    to max_distance; all that is farther shares the last. Bidirectional: half of the buckets for each
    direction. Otherwise the future shares bucket 0 with distance 0 (it is masked anyway).

    Args:
      distance: key position minus query position, int32 of any shape.
      bidirectional: an encoder's rule rather than a decoder's.
      buckets: how many in all.
      max_distance: from here on everything shares a bucket.

    Returns:
      int32 in [0, buckets), shaped like distance.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    # The published rule takes the floor of a logarithm. Comparing with the distances at which each range
    # begins gives the same buckets without depending on how a device rounds its logarithm.
    growth = (max_distance / exact) ** (1 / (buckets - exact))
    starts = [math.ceil(exact * growth**k - 1e-6) for k in range(1, buckets - exact)]
    wide = exact + sum((distance >= start).astype(jnp.int32) for start in starts)
    return offset + jnp.where(distance < exact, distance, wide)


class RelativeBias(nn.Module):
    """T5's learned bias on attention scores, one table for all layers of a stack."""

    heads: int
    buckets: int
    max_distance: int
    bidirectional: bool
    initializer: Init
    param_dtype: str = "float32"

    def setup(self) -> None:
        names = ("relpos_buckets", "heads")
        self.table = self.param(
            "table", named(self.initializer, names), (self.buckets, self.heads), jnp.dtype(self.param_dtype)
        )

    def _values(self, distance: jax.Array) -> jax.Array:
        bucket = relative_bucket(
            distance, bidirectional=self.bidirectional, buckets=self.buckets, max_distance=self.max_distance
        )
        return jnp.take(self.table.astype(jnp.float32), bucket, axis=0)  # [..., heads]

    def between(self, queries: int, keys: int) -> jax.Array:
        """Bias when query i and key j stand at positions i and j: f32 `[1, heads, queries, keys]`.

        Only queries + keys - 1 distances occur, so that many rows are looked up, and each query's row of the
        result is a window of them; the gradient is then a sum over windows and not a scatter of queries ×
        keys updates.
        """
        width = queries + keys
        line = self._values(
            jnp.arange(width, dtype=jnp.int32) - (queries - 1)
        ).T  # [heads, width], last one unused
        # Repeating the line and cutting it into rows one shorter than itself shifts each row by one.
        rows = jnp.broadcast_to(line[:, None, :], (self.heads, queries, width)).reshape(
            self.heads, queries * width
        )
        rows = rows[:, : queries * (width - 1)].reshape(self.heads, queries, width - 1)
        return rows[None, :, :, queries - 1 :]  # [1, heads, queries, keys]

    def at(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Bias for int32 `[batch, queries]` and `[batch, keys]`: f32 `[batch, heads, queries, keys]`."""
        distance = key_positions[:, None, :] - query_positions[:, :, None]  # [batch, queries, keys]
        return self._values(distance).transpose(0, 3, 1, 2)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines, sines f32 `[batch, length, 1, head_dim / 2]` of int32 `[batch, length]` (Su et al. 2021)."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)  # [head_dim / 2]

    def table() -> tuple[jax.Array, jax.Array]:
        angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
        return jnp.cos(angle), jnp.sin(angle)

    if not platform.separate_angles():
        return table()
    # A branch is a program of its own; this one is always taken.
    zeros = jnp.zeros((*positions.shape, 1, frequency.size), jnp.float32)
    return jax.lax.cond(positions[0, 0] >= 0, table, lambda: (zeros, zeros))


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding of x `[batch, length, heads, head_dim]`, in float32, returned in x's dtype.

    Dimension i turns with dimension i + head_dim / 2: the order of the Hugging Face LLaMA checkpoints
    ("rotate half"), not the neighbouring pairs of the paper.
    """
    cosine, sine = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
