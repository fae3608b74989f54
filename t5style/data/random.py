"""Random numbers that are a pure function of (seed, row, position), computed for many rows at once.

A NumPy Generator per row would cost more than the work it is for (about 10 µs to make one, against 20 µs to
corrupt a row of 568 tokens), and NumPy does not promise the same stream in every version. SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) is a counter through a
bijective mixer: any number of the stream can be had without those before it.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: uint64 of any shape → uint64 of that shape, a bijection."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * _M1
        values = (values ^ (values >> np.uint64(27))) * _M2
        return values ^ (values >> np.uint64(31))


def seed_of(*parts: int | str) -> int:
    """64 bits that depend on every part; different for different tuples."""
    digest = hashlib.blake2b("\0".join(map(repr, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class RowRandom:
    """One independent stream for each row.

    Args:
      seed: 64 bits, see `seed_of`.
      rows: int [n], which row of all epochs; the stream depends on nothing else.
    """

    def __init__(self, seed: int, rows: np.ndarray) -> None:
        with np.errstate(over="ignore"):
            self._keys = mix(np.asarray(rows).astype(np.uint64) * _GAMMA ^ np.uint64(seed))
        self._used = 0

    def bits(self, count: int) -> np.ndarray:
        """The next `count` numbers of every stream: uint64 [n, count]."""
        counter = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64)
        self._used += count
        with np.errstate(over="ignore"):
            return mix(self._keys[:, None] + counter * _GAMMA)

    def integers(self, low: int, high: int) -> np.ndarray:
        """Uniform integers in [low, high): int64 [n]. The bias of taking 53 bits is below 2⁻³⁰ for ranges <
        2²³.
        """
        fraction = (self.bits(1)[:, 0] >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return low + (fraction * (high - low)).astype(np.int64)

    def choose(self, population: int, count: int) -> np.ndarray:
        """`count` distinct numbers of range(population), every subset equally likely: int64 [n, count],
        ascending.
        """
        index_bits = max(population - 1, 1).bit_length()
        index_mask = np.uint64((1 << index_bits) - 1)
        # The smallest `count` of random keys; the low bits carry the index, so keys are distinct and no
        # argsort is needed.
        keys = self.bits(population) & ~index_mask | np.arange(population, dtype=np.uint64)
        if 0 < count < population:
            keys = np.partition(keys, count - 1, axis=1)
        return np.sort((keys[:, :count] & index_mask).astype(np.int64), axis=1)
