"""What the implementations of attention share: how scores are made of products, and which are masked."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that a row that sees nothing (padding) gives finite values and gradients.
MASKED = -1e9


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores are made of products of queries and keys.

    Attributes:
      scale: factor on the products.
      softcap: the scaled products x become softcap · tanh(x / softcap) (Gemma 2); None: they stay.
      precision: of all matrix products, as jax.lax.Precision names it.
    """

    scale: float = 1.0
    softcap: float | None = None
    precision: str = "default"

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap = {self.softcap} must be positive, or None")

    def dot(self, equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
        """A product of two operands of one dtype, summed and returned in float32."""
        return jnp.einsum(equation, left, right, precision=self.precision, preferred_element_type=jnp.float32)

    def scores(self, products: jax.Array) -> jax.Array:
        """Scores of products of queries and keys, both float32 `[..., queries, keys]`."""
        scores = self.scale * products
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)


class Added(NamedTuple):
    """What else enters the softmax, of all heads (or of one, without that dimension).

    Attributes:
      bias: f32 `[1 or batch, heads, queries, keys]`, added to the scores; or None.
      masked: f32 `[1 or batch, 1, queries, keys]`, added to the scores: 0 or MASKED; or None.
      sinks: f32 `[heads]`: one more score of every query, for a key without a value; or None.
    """

    bias: jax.Array | None
    masked: jax.Array | None
    sinks: jax.Array | None

    def to(self, scores: jax.Array) -> jax.Array:
        """The scores `[batch, heads, queries, keys]` with bias and mask added."""
        for added in (self.bias, self.masked):
            scores = scores if added is None else scores + added
        return scores


def mask_bias(
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    *,
    causal: bool,
    queries: int,
    keys: int,
    window: int | None = None,
    offset: int = 0,
) -> jax.Array | None:
    """What to add to the scores: 0 where query i may see key j and MASKED elsewhere.

    Args:
      query_segments, key_segments: int32 `[batch, queries]` and `[batch, keys]`, 0 for padding; both or
        neither.
      causal: query i sees keys up to i only.
      queries, keys: lengths.
      window: query i sees keys from i - window + 1 on, and unless causal up to i + window - 1.
      offset: in a block of a longer sequence: the first query's index less the first key's.

    Returns:
      f32 `[batch or 1, 1, queries, keys]`, or None where everything is visible.
    """
    visible = None
    if query_segments is not None and key_segments is not None:
        same = query_segments[:, None, :, None] == key_segments[:, None, None, :]
        visible = same & (key_segments != 0)[:, None, None, :]
    index, key_index = jnp.arange(queries)[:, None] + offset, jnp.arange(keys)  # [queries, 1], [keys]
    rules = []
    if causal and keys > 1 + offset:  # else the first query sees the last key
        rules.append(index >= key_index)
    if window is not None and queries + offset > window:  # else the last query sees the first key
        rules.append(index - key_index < window)
    if window is not None and not causal and keys > window + offset:
        rules.append(key_index - index < window)
    for rule in rules:
        visible = rule[None, None] if visible is None else visible & rule
    return None if visible is None else jnp.where(visible, 0.0, MASKED)
