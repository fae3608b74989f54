"""Sparse attention by means that every implementation has.

Windows are a setting of attention, and so are global tokens. Chunks are made here of segments and a window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def chunk_segments(segments: jax.Array | None, positions: jax.Array, chunk: int) -> jax.Array:
    """Segment ids with which a window of `chunk` tokens is attention within chunks (LLaMA 4's local layers).

    Positions p and q of one example see each other if p // chunk = q // chunk. Neighbouring chunks get
    different ids, and the window hides those beyond. So a row may hold several examples, each of which has
    chunks of its own, as when it stands alone.

    Args:
      segments: int32 `[batch, length]`, 0 for padding; None: all tokens are one segment.
      positions: int32 `[batch or 1, length]`, of tokens in their segments, ascending by one.
      chunk: tokens of a chunk.

    Returns:
      int32 `[batch, length]`, 0 for padding.
    """
    if segments is None:
        segments = jnp.ones(positions.shape, jnp.int32)
    parity = positions // chunk % 2
    return jnp.where(segments == 0, 0, 2 * segments + parity)
