"""Virtual tokens (prompt and prefix tuning): ids from vocab_size on, before each example's tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from t5style.models.adapters_virtual import Counts, virtual_ids
from t5style.models.config import TransformerConfig


def insert(
    config: TransformerConfig, batch: Mapping[str, np.ndarray], found: Counts
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """A batch with virtual tokens before each example of a row, and where the decoder's tokens now stand.

    Args:
      config: the model's.
      batch: int32 `[rows, length]` under data.pipeline's names, segment ids among them.
      found: see models.adapters_virtual.counts.

    Returns:
      the batch, its rows longer by the virtual tokens of the row with most examples; and int32 `[rows,
      length]`, the place of each of the decoder's tokens, None if they stand where they did.
    """
    made, places = dict(batch), None
    for side, count in zip(("encoder", "decoder"), found, strict=True):
        if not count or f"{side}_input_tokens" not in batch:
            continue
        segments = np.asarray(batch[f"{side}_segment_ids"])
        rows, length = segments.shape
        before = np.pad(segments, ((0, 0), (1, 0)))[:, :-1]
        starts = (segments != before) & (segments > 0)  # [rows, length]
        where = np.arange(length) + count * np.cumsum(starts, axis=1)
        width = length + count * int(starts.sum(axis=1).max())
        row, column = np.nonzero(starts)
        new = where[row, column][:, None] - count + np.arange(count)  # [examples, count]
        for name, value in batch.items():
            if not name.startswith(side):
                continue
            wide = np.zeros((rows, width), np.int32)
            np.put_along_axis(wide, where, np.asarray(value) + count * name.endswith("positions"), axis=1)
            if name.endswith("input_tokens"):
                wide[row[:, None], new] = virtual_ids(config, count)
            if name.endswith("segment_ids"):
                wide[row[:, None], new] = segments[row, column][:, None]
            if name.endswith("positions"):
                wide[row[:, None], new] = np.arange(count)
            made[name] = wide
        if side == "decoder":
            places = where.astype(np.int32)
    return made, places
