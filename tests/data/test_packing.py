"""Packing: every example once, no row too full, few places empty."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.data import packing


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=0, max_size=80),
    st.integers(0, 2**63),
)
def test_every_example_once_and_no_row_too_full(sizes: list[tuple[int, int]], seed: int) -> None:
    lengths = np.array(sizes, np.int64).reshape(-1, 2)
    members = np.arange(len(lengths))[::2]  # only those asked for
    plan = packing.pack(lengths, members, (20, 12), seed)
    assert sorted(plan.members.tolist()) == members.tolist()
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(members)
    assert (np.diff(plan.offsets) > 0).all()
    for start, stop in zip(plan.offsets[:-1], plan.offsets[1:], strict=True):
        assert (lengths[plan.members[start:stop]].sum(axis=0) <= (20, 12)).all()


def first_fit(lengths: np.ndarray, limits: tuple[int, int]) -> int:
    """Rows that first fit needs, in the order given."""
    room: list[np.ndarray] = []
    for size in lengths:
        for left in room:
            if (left >= size).all():
                left -= size
                break
        else:
            room.append(np.array(limits) - size)
    return len(room)


def test_no_worse_than_first_fit_and_close_to_the_bound() -> None:
    random = np.random.default_rng(0)
    lengths = np.stack([random.integers(1, 200, 1500), random.integers(1, 40, 1500)], axis=1)
    limits = (512, 114)
    plan = packing.pack(lengths, np.arange(1500), limits, 0)
    bound = int(np.ceil((lengths.sum(axis=0) / limits).max()))
    assert bound <= plan.rows <= first_fit(lengths, limits)
    assert plan.rows <= bound * 1.02
    encoder, decoder = packing.efficiency(lengths, limits, plan)
    assert encoder == pytest.approx(lengths[:, 0].sum() / (512 * plan.rows))
    assert decoder == pytest.approx(lengths[:, 1].sum() / (114 * plan.rows))


def test_one_side_only() -> None:
    random = np.random.default_rng(1)
    lengths = np.stack([np.zeros(5000, int), random.integers(1, 257, 5000)], axis=1)
    plan = packing.pack(lengths, np.arange(5000), (0, 256), 3)
    assert plan.rows <= np.ceil(lengths[:, 1].sum() / 256) * 1.03
    assert packing.efficiency(lengths, (0, 256), plan)[0] == 0.0


def test_seed_decides_who_sits_together() -> None:
    lengths = np.full((100, 2), 5)
    plans = [packing.pack(lengths, np.arange(100), (10, 10), seed) for seed in (1, 1, 2)]
    assert plans[0].members.tolist() == plans[1].members.tolist() != plans[2].members.tolist()


def test_the_order_is_the_same_in_every_version_of_numpy() -> None:
    plan = packing.pack(np.full((12, 2), 5), np.arange(12), (10, 10), seed=2**63 + 7)
    # SplitMix64 gives the order 5 8 0 3 6 9 10 11 2 7 4 1; row r has its places r and r + 6.
    assert plan.members.tolist() == [5, 10, 8, 11, 0, 2, 3, 7, 6, 4, 9, 1]


def test_too_long_an_example_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than the row's limits"):
        packing.pack(np.array([[11, 1]]), np.array([0]), (10, 10))


def test_many_different_lengths_still_fill_the_rows() -> None:
    random = np.random.default_rng(2)
    count = 60_000
    encoder = random.lognormal(4.0, 0.8, count).astype(int).clip(1, 512)
    lengths = np.stack([encoder, random.integers(1, 114, count)], axis=1)
    plan = packing.pack(lengths, np.arange(count), (512, 114), 0)
    assert (np.add.reduceat(lengths[plan.members], plan.offsets[:-1]) <= (512, 114)).all()
    assert max(packing.efficiency(lengths, (512, 114), plan)) > 0.97


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 12)), min_size=0, max_size=80),
    st.randoms(use_true_random=False),
)
def test_packing_in_order_keeps_the_order_and_fills_every_row(
    sizes: list[tuple[int, int]], random: random.Random
) -> None:
    lengths = np.array(sizes, np.int64).reshape(-1, 2)
    members = np.array(random.sample(range(len(sizes)), len(sizes) * 3 // 4), np.int64)
    plan = packing.pack_in_order(lengths, members, (20, 12))
    assert plan.members.tolist() == members.tolist()
    # Row by row: what was taken fits, and the next example would not have fitted.
    row: list[int] = []
    rows = []
    for member in members.tolist():
        if (lengths[[*row, member]].sum(axis=0) > (20, 12)).any():
            rows.append(row)
            row = []
        row.append(member)
    rows += [row] if row else []
    assert [part.tolist() for part in np.split(members, plan.offsets[1:-1]) if len(part)] == rows
    if len(members):
        with pytest.raises(ValueError, match="longer than the row's limits"):
            packing.pack_in_order(lengths + 30, members, (20, 12))
