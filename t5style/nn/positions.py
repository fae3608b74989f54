"""Positions: T5's bucketed relative bias, and rotary embeddings."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from t5style.nn import platform
from t5style.nn.attention_tiles import BiasByDistance
from t5style.nn.parameter import Init, named
from t5style.nn.settings import RopeScaling


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

    def by_distance(self, queries: int, keys: int) -> BiasByDistance:
        """Bias when query i and key j stand at positions i and j.

        Only queries + keys - 1 distances occur, so that many rows are looked up, and each query's row of the
        scores' bias is a window of them; the gradient is then a sum over windows and not a scatter of queries
        × keys updates.
        """
        distances = jnp.arange(queries + keys - 1, dtype=jnp.int32) - (queries - 1)
        return BiasByDistance(self._values(distances).T[None])  # [1, heads, queries + keys - 1]

    def at(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Bias for int32 `[batch, queries]` and `[batch, keys]`: f32 `[batch, heads, queries, keys]`."""
        distance = key_positions[:, None, :] - query_positions[:, :, None]  # [batch, queries, keys]
        return self._values(distance).transpose(0, 3, 1, 2)


def rotary_frequencies(width: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """How far each pair of the rotated dimensions turns from one position to the next (Su et al. 2021).

    Rounded to float32 step by step as in transformers' modeling_rope_utils, because an error of a frequency
    is multiplied by the position.

    Args:
      width: rotated dimensions of a head.
      theta: wavelengths reach from 2π to nearly 2π · theta positions.
      scaling: see RopeScaling.

    Returns:
      float32 `[width / 2]`.

    Raises:
      ValueError: longrope's factors are not width / 2.
    """
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = (theta ** exponent.astype(np.float64)).astype(np.float32)  # [width / 2]
    frequency = np.float32(1) / powers
    if scaling is None:
        return frequency
    factor = np.float32(scaling.factor)
    if scaling.kind == "linear":
        return frequency / factor
    assert scaling.original_length is not None
    if scaling.kind == "longrope":
        long = scaling.length_in_use is not None and scaling.length_in_use > scaling.original_length
        own = np.asarray(scaling.long_factors if long else scaling.short_factors, np.float32)
        if own.shape != frequency.shape:
            raise ValueError(
                f"RopeScaling has {own.size} short_factors and long_factors, but {width} rotated dimensions "
                f"are {frequency.size} pairs: give one number for each"
            )
        return np.float32(1) / (own * powers)
    if scaling.kind == "llama3":
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        assert low is not None
        assert high is not None
        # Turns within the original length: from `high` on kept, up to `low` stretched.
        turns = np.float32(scaling.original_length) / (np.float32(2 * math.pi) / frequency)
        kept = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
    else:
        first, last = (
            width * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.beta_fast, scaling.beta_slow)
        )  # pairs that turn so many times within the original length, as real numbers
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        last = last + 0.001 if first == last else last
        pairs = np.arange(width // 2, dtype=np.float32)
        kept = 1 - np.clip((pairs - np.float32(first)) / np.float32(last - first), 0, 1)
    return (frequency / factor * (1 - kept) + frequency * kept).astype(np.float32)


def rotary_angles(
    positions: jax.Array,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    fraction: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for rotate.

    Args:
      positions: int32 `[batch, length]`.
      head_dim: width of a head.
      theta, scaling: see rotary_frequencies.
      fraction: the part of a head that is rotated, from its beginning.

    Returns:
      Two of f32 `[batch, length, 1, rotated / 2]`, times the scaling's table_factor.

    Raises:
      ValueError: the rotated part is not an even number of dimensions, or the scaling does not fit it.
    """
    width = int(head_dim * fraction)
    if width < 2 or width % 2 or width > head_dim:
        raise ValueError(
            f"fraction = {fraction} of head_dim = {head_dim} is {width} rotated dimensions: it must be an "
            "even number from 2 to head_dim"
        )
    frequency = rotary_frequencies(width, theta, scaling)
    factor = 1.0 if scaling is None else scaling.table_factor

    def table() -> tuple[jax.Array, jax.Array]:
        angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
        cosine, sine = jnp.cos(angle), jnp.sin(angle)
        return (cosine, sine) if factor == 1 else (cosine * factor, sine * factor)

    if not platform.separate_angles():
        return table()
    # A branch is a program of its own; this one is always taken.
    zeros = jnp.zeros((*positions.shape, 1, frequency.size), jnp.float32)
    return jax.lax.cond(positions[0, 0] >= 0, table, lambda: (zeros, zeros))


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array], scale: float = 1.0) -> jax.Array:
    """Rotary embedding of x `[batch, length, heads, head_dim]`, in float32, returned in x's dtype.

    Of angles `[batch, length, 1, rotated / 2]`, the first `rotated` dimensions turn, and the others stay.
    Dimension i turns with dimension i + rotated / 2: the order of the Hugging Face LLaMA checkpoints
    ("rotate half"), not the neighbouring pairs of the paper. All is multiplied by `scale`.
    """
    cosine, sine = angles if scale == 1.0 else (angles[0] * scale, angles[1] * scale)
    if platform.rotate_by_product() and x.dtype == jnp.bfloat16:
        rest = jnp.broadcast_to(jnp.float32(scale), (*cosine.shape[:-1], x.shape[-1] - 2 * cosine.shape[-1]))
        factor = jnp.concatenate([cosine, cosine, rest], axis=-1)  # [batch, length, 1, head_dim]
        return _turn(
            x, factor, jnp.concatenate([sine, sine, jnp.zeros_like(rest)], axis=-1), cosine.shape[-1]
        )
    half = cosine.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    parts = [first * cosine - second * sine, second * cosine + first * sine]
    if rest.shape[-1]:
        parts.append(rest.astype(jnp.float32) * scale)
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _turn(x: jax.Array, cosine: jax.Array, sine: jax.Array, half: int) -> jax.Array:
    """x · cosine + (x with its halves exchanged, the first negated) · sine, of angles for every dimension.

    The exchange is a product with a matrix of 0, 1 and -1, exact because each element of it has one term.
    """
    exchange = np.zeros((x.shape[-1], x.shape[-1]), np.float32)
    index = np.arange(half)
    exchange[index + half, index], exchange[index, index + half] = -1, 1
    other = jnp.einsum("blhk,kj->blhj", x, jnp.asarray(exchange, x.dtype), preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cosine + other * sine).astype(x.dtype)


def _turn_forward(
    x: jax.Array, cosine: jax.Array, sine: jax.Array, half: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _turn(x, cosine, sine, half), (cosine, sine)


def _turn_backward(
    half: int, tables: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None, None]:
    """The transpose of a rotation turns back. Positions have no gradient."""
    cosine, sine = tables
    return _turn(gradient, cosine, -sine, half), None, None


_turn.defvjp(_turn_forward, _turn_backward)
