"""Sampling: the support sets of top-k and top-p are exact, draws follow the softmax, and a request's draw is
its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from t5style.infer import sampling


def draw(logits, settings, step=0):
    return np.asarray(
        sampling.next_token(
            jnp.asarray(logits, jnp.float32),
            jnp.int32(step),
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.seed,
            sampled=settings.sampled,
            truncated=settings.truncated,
        )
    )


LOGITS = np.log(np.array([0.04, 0.30, 0.06, 0.25, 0.20, 0.15]))


def support(top_k=0, top_p=1.0, logits=LOGITS):
    ranked, order = sampling.truncate(
        jnp.asarray(logits, jnp.float32)[None], jnp.array([top_k], jnp.int32), jnp.array([top_p], jnp.float32)
    )
    return set(np.asarray(order)[0][np.isfinite(np.asarray(ranked)[0])].tolist())


def test_support_sets_are_exact():
    assert support() == {0, 1, 2, 3, 4, 5}
    assert support(top_k=1) == {1}
    assert support(top_k=3) == {1, 3, 4}
    assert support(top_k=99) == {0, 1, 2, 3, 4, 5}
    assert support(top_p=1e-6) == {1}
    assert support(top_p=0.29) == {1}
    assert support(top_p=0.31) == {1, 3}
    assert support(top_p=0.74) == {1, 3, 4}
    assert support(top_p=0.76) == {1, 3, 4, 5}
    # Top-p works on what top-k left, renormalised: 0.30 / 0.75 = 0.4, 0.55 / 0.75 = 0.73.
    assert support(top_k=3, top_p=0.39) == {1}
    assert support(top_k=3, top_p=0.72) == {1, 3}
    assert support(top_k=3, top_p=0.74) == {1, 3, 4}
    # Ties: exactly k stay, the lower ids.
    assert support(top_k=2, logits=np.zeros(5)) == {0, 1}
    # A peaked float32 distribution whose cumulative sum reaches 1 early still keeps every token at p = 1.
    assert support(top_p=1.0, logits=np.array([50.0, 0.0, -50.0])) == {0, 1, 2}


def test_support_agrees_with_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    for trial in range(20):
        logits = rng.normal(0, 2, (1, 50)).astype(np.float32)
        k, p = int(rng.integers(1, 50)), float(rng.uniform(0.05, 0.99))
        scores = process.TopPLogitsWarper(p)(None, process.TopKLogitsWarper(k)(None, torch.tensor(logits)))
        assert support(k, p, logits[0]) == set(np.flatnonzero(np.isfinite(scores.numpy()[0]))), trial


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.5, 4, 1.0), (1.0, 0, 0.6)]
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    n = 20_000
    settings = sampling.Sampling.of(n, temperature, top_k, top_p, seed=11)
    drawn = draw(np.tile(LOGITS, (n, 1)), settings)
    kept = sorted(support(top_k, top_p, LOGITS / temperature))
    probabilities = np.exp(LOGITS / temperature)[kept]
    counts = np.bincount(drawn, minlength=6)
    assert counts.sum() == counts[kept].sum()  # never a token outside the support
    # Chi-square; seeded, so the outcome is fixed: 1e-3 would be a one-in-a-thousand accident of the seed.
    assert scipy.stats.chisquare(counts[kept], n * probabilities / probabilities.sum()).pvalue > 1e-3


def test_successive_steps_are_independent():
    n = 5000
    settings = sampling.Sampling.of(n, 1.0, seed=3)
    logits = np.zeros((n, 4))
    table = np.zeros((4, 4))
    np.add.at(table, (draw(logits, settings, 0), draw(logits, settings, 1)), 1)
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_a_request_draws_the_same_whatever_else_is_in_the_batch():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(6, 40))
    together = draw(logits, sampling.Sampling.of(6, 0.9, 10, 0.8, seed=100))
    for i in range(6):
        alone = draw(logits[i : i + 1], sampling.Sampling.of(1, 0.9, 10, 0.8, seed=100 + i))
        assert alone[0] == together[i]
    mixed = sampling.Sampling.of(6, [0, 0.9, 0, 0.9, 0.9, 0], 10, 0.8, seed=[0, 101, 0, 103, 104, 0])
    drawn = draw(logits, mixed)
    assert drawn[[0, 2, 5]].tolist() == logits.argmax(-1)[[0, 2, 5]].tolist()
    assert drawn[[1, 3, 4]].tolist() == together[[1, 3, 4]].tolist()


def test_greedy_takes_the_lowest_of_tied_ids_and_needs_no_sort():
    settings = sampling.Sampling.of(1, 0.0, top_k=5)
    assert not settings.sampled
    assert not settings.truncated
    assert draw(np.array([[1.0, 3.0, 3.0]]), settings).tolist() == [1]
    program = jax.jit(
        lambda x: sampling.next_token(
            x, 0, *(jnp.zeros(1),) * 3, jnp.zeros(1, jnp.uint32), sampled=False, truncated=False
        )
    )
    assert "sort" not in program.lower(jnp.zeros((1, 8))).as_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"temperature": [1.0, 2.0]}, "temperature has shape"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sampling.Sampling.of(3, **arguments)


def test_seeds_wrap_instead_of_failing():
    assert sampling.Sampling.of(2, seed=2**32 - 1).seed.tolist() == [2**32 - 1, 0]
    assert sampling.Sampling.of(1, seed=-1).seed.tolist() == [2**32 - 1]
