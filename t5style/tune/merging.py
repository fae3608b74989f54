"""How models of one architecture are merged: arithmetic on one parameter after the other, float32 in NumPy.

Parameters are arrays of one shape; `deltas` are what fine-tuning has added to a common base ("task vectors").
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

Array = np.ndarray


def linear(models: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted mean Σ w θ / Σ w (Wortsman et al. 2022, Model soups; of one run's checkpoints Izmailov et
    al. 2018).
    """
    total = np.zeros(models[0].shape, np.float64)
    for model, weight in zip(models, weights, strict=True):
        total += weight * model.astype(np.float64)
    return (total / sum(weights)).astype(np.float32)


def slerp(first: Array, second: Array, t: float) -> Array:
    """Spherical interpolation from `first` (t = 0) to `second` (t = 1), as vectors (Shoemake 1985, section
    3.3): sin((1 - t) Ω) / sin Ω · first + sin(t Ω) / sin Ω · second, with Ω the angle between them; the
    straight line where they are parallel to within 1e-6, or one is 0.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float(np.clip(np.sum(a * b) / size, -1, 1)) if size else 1.0
    if abs(cosine) > 1 - 1e-6:
        return ((1 - t) * a + t * b).astype(np.float32)
    angle = np.arccos(cosine)
    return ((np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)).astype(np.float32)


def dare(delta: Array, drop: float, generator: np.random.Generator) -> Array:
    """A delta of which each entry is dropped with probability `drop`, and the others divided by 1 - drop (Yu
    et al. 2024, Language models are super Mario, equation 3).
    """
    kept = generator.random(delta.shape, np.float32) >= drop
    return np.where(kept, delta / np.float32(1 - drop), np.float32(0))


def generator(seed: int, model: str, parameter: str) -> np.random.Generator:
    """That of one model's parameter: the order of models and of parameters does not matter."""
    digest = hashlib.blake2b(f"{seed}/{model}/{parameter}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def task_arithmetic(base: Array, deltas: Sequence[Array], weights: Sequence[float], scale: float) -> Array:
    """base + scale · Σ w τ (Ilharco et al. 2023, Editing models with task arithmetic, section 2); a negative
    weight takes a task out.
    """
    total = np.zeros(base.shape, np.float64)
    for delta, weight in zip(deltas, weights, strict=True):
        total += weight * delta.astype(np.float64)
    return (base + scale * total).astype(np.float32)


def ties(
    base: Array,
    deltas: Sequence[Array],
    weights: Sequence[float],
    thresholds: Sequence[float],
    scale: float,
) -> Array:
    """TIES-Merging (Yadav et al. 2023, algorithm 1): of each delta only entries of at least its threshold
    stay; each entry's sign is that of their weighted sum; and the weighted mean of those of that sign is
    added.

    Args:
      base, deltas: arrays of one shape.
      weights: of the deltas; the paper's are all 1.
      thresholds: absolute values, see Thresholds.
      scale: λ of the paper.
    """
    trimmed = [
        np.where(np.abs(delta) >= limit, delta, 0).astype(np.float64)
        for delta, limit in zip(deltas, thresholds, strict=True)
    ]
    weighted = [weight * delta for weight, delta in zip(weights, trimmed, strict=True)]
    sign = np.sign(sum(weighted))
    total, weight_of = np.zeros(base.shape, np.float64), np.zeros(base.shape, np.float64)
    for delta, share, weight in zip(trimmed, weighted, weights, strict=True):
        agrees = (np.sign(delta) == sign) & (sign != 0)
        total += np.where(agrees, share, 0)
        weight_of += np.where(agrees, weight, 0)
    mean = np.divide(total, weight_of, out=np.zeros_like(total), where=weight_of != 0)
    return (base + scale * mean).astype(np.float32)


def threshold(parts: Callable[[], Iterable[Array]], density: float) -> float:
    """The absolute value of which a share of all entries is at least: exactly, without all of them in memory.

    Non-negative floats are ordered as their bits are, so entries are counted by their upper 16 bits, and
    those that share the threshold's by their lower ones, in a second pass.

    Args:
      parts: gives the arrays, each time it is called.
      density: share of the entries that stays, rounded up to a whole number of them.
    """
    upper = np.zeros(1 << 16, np.int64)
    for part in parts():
        upper += np.bincount(_bits(part) >> 16, minlength=1 << 16)
    wanted = int(np.ceil(density * upper.sum()))
    if wanted >= upper.sum():
        return 0.0
    above = np.cumsum(upper[::-1])[::-1]  # entries at or above each
    high = int(np.flatnonzero(above >= wanted)[-1])
    lower = np.zeros(1 << 16, np.int64)
    for part in parts():
        bits = _bits(part)
        lower += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
    more = above[high] - upper[high]
    low = int(np.flatnonzero(np.cumsum(lower[::-1])[::-1] + more >= wanted)[-1])
    return float(np.array([high << 16 | low], np.uint32).view(np.float32)[0])


def _bits(part: Array) -> Array:
    return np.abs(part.astype(np.float32)).view(np.uint32).reshape(-1).astype(np.int64)
