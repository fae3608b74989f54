"""Compiled loops of ``language``; imported only where a text needs them, for numba is slow to import."""

from __future__ import annotations

import numba
import numpy as np

# log(1 + count) for the counts that occur: a logarithm for each feature would take as long as its row.
_LOG1P = np.log1p(np.arange(256, dtype=np.float32))


@numba.njit(cache=True, nogil=True)
def naive_bayes(
    data: np.ndarray,
    next_row: np.ndarray,
    row_of: np.ndarray,
    feature_of: np.ndarray,
    weights: np.ndarray,
    scale: np.float32,
    prior: np.ndarray,
    language_of: np.ndarray,
    languages: int,
) -> tuple[np.ndarray, int]:
    """How likely each language is: the log posterior of langid.py (Lui and Baldwin, 2012), but with
    log(1 + count) in place of the counts and divided by the root of the length, as py3langid has it.

    Args:
      data: [bytes] uint8, the text in UTF-8.
      next_row: [rows * 256] unsigned, the state that follows for each row and byte.
      row_of: [states] unsigned, the row of each state (equal rows are stored once).
      feature_of: [states] int32, the feature that is seen in a state, or -1.
      weights: [features, classes] int16, log probabilities in units of ``scale``.
      scale: what one unit of weights is.
      prior: [classes] float32.
      language_of: [classes] int32, the language that each class means.
      languages: how many there are.

    Returns:
      [languages] float32, 0 for the likeliest and -inf for those without a class; and how many different
      features were seen.
    """
    size = 64
    while size < 2 * data.size:
        size *= 2
    mask = size - 1
    # An open-addressing hash table, since clearing one counter for each of 100,000 features would cost more.
    keys = np.full(size, -1, np.int32)
    counts = np.zeros(size, np.int32)
    slots = np.empty(data.size, np.int32)
    seen = 0
    state = np.int64(0)
    for byte in data:
        state = np.int64(next_row[(np.int64(row_of[state]) << 8) + byte])
        feature = feature_of[state]
        if feature >= 0:
            slot = ((np.int64(feature) * 2654435761) >> 7) & mask
            while keys[slot] >= 0 and keys[slot] != feature:
                slot = (slot + 1) & mask
            if keys[slot] < 0:
                keys[slot] = feature
                slots[seen] = slot
                seen += 1
            counts[slot] += 1
    total = np.zeros(prior.size, np.float32)
    for i in range(seen):
        row = weights[keys[slots[i]]]
        weight = _LOG1P[min(counts[slots[i]], 255)]
        for j in range(total.size):
            total[j] += weight * np.float32(row[j])
    for j in range(total.size):
        total[j] = total[j] * scale + prior[j]
    best = total.max()
    root = np.float32(np.sqrt(np.float32(max(data.size, 1))))
    result = np.full(languages, -np.inf, np.float32)
    for j in range(total.size):
        result[language_of[j]] = max(result[language_of[j]], (total[j] - best) / root)
    return result, seen


@numba.njit(cache=True, nogil=True)
def pool(
    logits: np.ndarray, seen: int, votes: np.ndarray, weight: float, unknown: float, sharpness: float
) -> tuple[int, float]:
    """Adds what another detector found.

    Args:
      logits: [languages] float32, as ``naive_bayes`` has them; changed in place.
      seen: features seen.
      votes: [n, 2] int64, languages (-1: one that is not among ours) and what per cent of the text each has.
      weight: what a whole text adds to its language's logit.
      unknown: how far below the best a language without a class begins.
      sharpness: factor of the pooled logits.

    Returns:
      The likeliest language and its probability; (-1, 0.0) if neither detector saw anything.
    """
    for place, percent in votes:
        if place >= 0:
            if logits[place] == -np.inf:
                logits[place] = -unknown
            logits[place] += weight * percent / 100
            seen += percent
    if not seen:
        return -1, 0.0
    best = logits.argmax()
    total = 0.0
    for logit in logits:
        total += np.exp(sharpness * (logit - logits[best]))
    return int(best), 1 / total
