"""Schedules against their closed forms."""

import math

import numpy as np
import pytest

from t5style.train.schedules import Schedule


def values(schedule: Schedule, steps: int = 100) -> np.ndarray:
    rate = schedule.build(steps)
    return np.array([float(rate(n)) for n in range(steps + 1)])


def ramp(n: np.ndarray, warmup: int) -> np.ndarray:
    return np.minimum(1.0, n / warmup)


N = np.arange(101)


def test_constant() -> None:
    np.testing.assert_allclose(
        values(Schedule("constant", 0.3, warmup_steps=10)), 0.3 * ramp(N, 10), rtol=1e-6
    )
    np.testing.assert_allclose(values(Schedule("constant", 0.3)), 0.3, rtol=1e-6)


@pytest.mark.parametrize("kind", ["constant", "rsqrt"])
def test_the_ramp_may_begin_above_0(kind) -> None:
    got = values(Schedule(kind, 0.4, warmup_steps=10, initial_fraction=0.25, timescale=200))
    np.testing.assert_allclose(got, 0.4 * (0.25 + 0.75 * ramp(N, 10)), rtol=1e-5)
    with pytest.raises(ValueError, match="initial_fraction is 2; it must lie between 0 and 1"):
        Schedule(initial_fraction=2)


def test_linear() -> None:
    got = values(Schedule("linear", 0.5, warmup_steps=20, final_fraction=0.1))
    want = np.where(N < 20, 0.5 * N / 20, 0.5 + (0.05 - 0.5) * (N - 20) / 80)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_cosine() -> None:
    got = values(Schedule("cosine", 2.0, warmup_steps=20, final_fraction=0.1))
    cosine = 0.5 * (1 + np.cos(np.pi * (N - 20) / 80))
    np.testing.assert_allclose(got, np.where(N < 20, 2.0 * N / 20, 2.0 * (0.1 + 0.9 * cosine)), rtol=1e-5)


def test_rsqrt_is_t5s() -> None:
    rate = Schedule("rsqrt", 0.01, timescale=10_000).build(1_000_000)
    for n in (0, 1, 9_999, 10_000, 20_000, 524_288):
        assert math.isclose(float(rate(n)), 1 / math.sqrt(max(n, 10_000)), rel_tol=1e-6)


def test_rsqrt_with_a_ramp() -> None:
    rate = Schedule("rsqrt", 1.0, warmup_steps=4, timescale=4).build(100)
    np.testing.assert_allclose(
        [float(rate(n)) for n in (0, 1, 2, 4, 16)], [0, 0.25, 0.5, 1.0, 0.5], rtol=1e-6
    )


def test_wsd() -> None:
    got = values(Schedule("wsd", 1.0, warmup_steps=10, decay_fraction=0.2, final_fraction=0.1))
    np.testing.assert_allclose(got[:11], N[:11] / 10, rtol=1e-6)
    np.testing.assert_allclose(got[10:81], 1.0, rtol=1e-6)
    np.testing.assert_allclose(got[80:], 1.0 - 0.9 * (N[80:] - 80) / 20, rtol=1e-5)


def test_own_length_instead_of_the_runs() -> None:
    rate = Schedule("linear", 1.0, steps=10).build(1000)
    assert float(rate(10)) == 0.0
    assert float(rate(500)) == 0.0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "cosin"}, "'cosin'; it must be one of constant"),
        ({"peak": 0.0}, "peak is 0.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"final_fraction": 2.0}, "final_fraction is 2.0"),
        ({"decay_fraction": 0.0}, "decay_fraction is 0.0"),
        ({"timescale": 0}, "timescale is 0"),
    ],
)
def test_bad_values_are_named(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Schedule(**fields)  # type: ignore[arg-type]


def test_warmup_longer_than_the_run() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps \(100\) leaves nothing of the 100 steps"):
        Schedule("cosine", warmup_steps=100).build(100)
