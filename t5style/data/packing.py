"""Which examples share a row, decided once from their lengths.

Best-fit decreasing on the histogram of lengths (after Krell, Kosec, Perez and Fitzgibbon, "Efficient
sequence packing without cross-contamination", 2021, there for one length; here each example has two, for
encoder and decoder): examples of equal lengths are handled together, largest first, and each goes to the
open row with the least room left that still takes it. The work depends on the number of different lengths,
not of examples. Which of the examples of equal lengths go together is decided by the seed.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from t5style.data.random import RowRandom

# Kinds of rows kept open at most; beyond it the fullest is closed. Measured on 200,000 examples of random
# lengths in rows of 512 and 114: 1024 kinds fill 88 % of the scarcer side, 4096 fill 96 %, 16384 99.7 % (2
# s on one core).
_MAX_OPEN = 16384


@dataclasses.dataclass(frozen=True)
class Plan:
    """Row r holds the examples members[offsets[r]:offsets[r + 1]].

    Attributes:
      offsets: int64 [rows + 1].
      members: int64 [examples].
    """

    offsets: np.ndarray
    members: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1


def one_per_row(members: np.ndarray) -> Plan:
    """No packing: each example has its own row, in order."""
    return Plan(np.arange(len(members) + 1), np.asarray(members, np.int64))


def efficiency(lengths: np.ndarray, limits: tuple[int, int], plan: Plan) -> tuple[float, float]:
    """Share of the rows' places that hold tokens, for encoder and decoder (0 where the limit is 0)."""
    used = lengths[plan.members].sum(axis=0)
    places = np.array(limits) * plan.rows
    return tuple(float(u / p) if p else 0.0 for u, p in zip(used, places, strict=True))  # type: ignore[return-value]


def pack(lengths: np.ndarray, members: np.ndarray, limits: tuple[int, int], seed: int = 0) -> Plan:
    """Packs examples into rows.

    Args:
      lengths: int64 [all examples, 2], encoder and decoder tokens of each example, none above `limits`.
      members: int64 [n], which examples to pack.
      limits: places for encoder and decoder tokens in a row; a limit of 0 is for a side that has none.
      seed: 64 bits; decides which examples of equal lengths go together.

    Returns: the plan; every member is in it exactly once, and no row exceeds the limits.
    """
    members = np.asarray(members, np.int64)
    if not len(members):
        return Plan(np.zeros(1, np.int64), members)
    if (lengths[members] > np.array(limits)).any():
        raise ValueError(f"An example is longer than the row's limits {limits}.")
    # `seed` decides the order among equals: shuffle, then sort stably by lengths.
    members = members[RowRandom(seed, members).bits(1)[:, 0].argsort()]
    sizes = lengths[members]
    scale = np.maximum(np.array(limits, np.float64), 1.0)
    weight = (sizes / scale).sum(axis=1)
    order = np.lexsort((sizes[:, 1], sizes[:, 0], -weight))
    members, sizes = members[order], sizes[order]
    starts = np.flatnonzero(np.r_[True, (np.diff(sizes, axis=0) != 0).any(axis=1)])
    counts = np.diff(np.r_[starts, len(members)])

    kinds = _fit(sizes[starts], counts, limits, scale)

    # Every kind of row is a list of length classes and a number of such rows: hand out the classes' examples.
    taken = starts.copy()
    rows: list[np.ndarray] = []
    fill: list[np.ndarray] = []
    for composition, count in kinds:
        columns = []
        for kind in composition:
            columns.append(members[taken[kind] : taken[kind] + count])
            taken[kind] += count
        rows.append(np.stack(columns, axis=1).reshape(-1))  # [count, examples of a row] -> flat
        fill.append(np.full(count, len(composition)))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(fill))])
    return Plan(offsets.astype(np.int64), np.concatenate(rows))


def pack_in_order(lengths: np.ndarray, members: np.ndarray, limits: tuple[int, int]) -> Plan:
    """Fills one row after the other with the members in the order in which they come (next fit).

    Arguments and result are those of `pack`. On 200,000 pairs of random lengths it takes 1.33 times `pack`'s
    rows, 1.27 times where inputs and targets are long together, and then 1.17 times ordered by length.
    """
    members = np.asarray(members, np.int64)
    before = np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(lengths[members], axis=0)])  # [n + 1, 2]
    # For each member, where a row that it begins ends: where the first of the two sides is full.
    encoder, decoder = (
        np.searchsorted(side, side[:-1] + limit, "right") - 1
        for side, limit in zip(before.T, limits, strict=True)
    )
    ends = np.minimum(encoder, decoder)
    if (ends <= np.arange(len(members))).any():
        raise ValueError(f"An example is longer than the row's limits {limits}.")
    next_row, offsets = ends.tolist(), [0]
    while offsets[-1] < len(members):
        offsets.append(next_row[offsets[-1]])
    return Plan(np.array(offsets, np.int64), members)


def _fit(
    sizes: np.ndarray, counts: np.ndarray, limits: tuple[int, int], scale: np.ndarray
) -> list[tuple[list[int], int]]:
    """Best fit for length classes in the order given: a list of (classes in the row, number of such rows)."""
    # What is left in each kind of open row (one array for each side: a search is four passes over them),
    # and how many such rows there are.
    encoder_room, decoder_room = np.zeros(_MAX_OPEN), np.zeros(_MAX_OPEN)
    number = np.zeros(_MAX_OPEN, np.int64)
    compositions: list[list[int]] = [[] for _ in range(_MAX_OPEN)]
    open_kinds = 0
    closed: list[tuple[list[int], int]] = []
    # No class from here on is smaller than this, so rows with less room are full.
    smallest = np.minimum.accumulate(sizes[::-1], axis=0)[::-1].tolist()

    def remove(index: int) -> None:
        nonlocal open_kinds
        open_kinds -= 1
        for values in (encoder_room, decoder_room, number):
            values[index] = values[open_kinds]
        compositions[index] = compositions[open_kinds]

    def put(encoder: float, decoder: float, count: int, composition: list[int], kind: int) -> None:
        nonlocal open_kinds
        if encoder < smallest[kind][0] or decoder < smallest[kind][1]:
            closed.append((composition, count))
            return
        if open_kinds == _MAX_OPEN:
            fullest = int((encoder_room / scale[0] + decoder_room / scale[1]).argmin())
            closed.append((compositions[fullest], int(number[fullest])))
            remove(fullest)
        encoder_room[open_kinds], decoder_room[open_kinds], number[open_kinds] = encoder, decoder, count
        compositions[open_kinds] = composition
        open_kinds += 1

    for kind, ((encoder, decoder), count) in enumerate(zip(sizes.tolist(), counts.tolist(), strict=True)):
        while count:
            best = -1
            if open_kinds:
                encoder_left = encoder_room[:open_kinds] - encoder
                decoder_left = decoder_room[:open_kinds] - decoder
                slack = encoder_left / scale[0] + decoder_left / scale[1]
                slack[(encoder_left < 0) | (decoder_left < 0)] = np.inf
                best = int(slack.argmin())
                if slack[best] == np.inf:
                    best = -1
            if best < 0:  # open new rows, each with as many of this class as it takes
                fits = [limit // size for limit, size in zip(limits, (encoder, decoder), strict=True) if size]
                copies = min([count, *fits])
                new = count // copies
                put(limits[0] - copies * encoder, limits[1] - copies * decoder, new, [kind] * copies, kind)
                count -= new * copies
                continue
            use = min(count, int(number[best]))
            left, composition = (float(encoder_left[best]), float(decoder_left[best])), compositions[best]
            number[best] -= use
            if not number[best]:
                remove(best)
            put(*left, use, [*composition, kind], kind)
            count -= use
    closed += [(compositions[i], int(number[i])) for i in range(open_kinds)]
    return closed
