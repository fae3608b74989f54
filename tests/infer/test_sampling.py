"""Sampling: what changes logits equals transformers, support sets are exact, draws follow the softmax, and a
request's draw is its own.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from t5style.infer import sampling
from t5style.infer.settings import Settings, settings_of

EOS = (1,)


def prepared(settings, vocab, contexts=None, samples=None):
    n = len(settings)
    contexts = [np.zeros(0, np.int32)] * n if contexts is None else contexts
    return sampling.arrays(settings, samples or [0] * n, contexts, EOS, n, vocab)


def draw(logits, settings, step=0, samples=None):
    logits = jnp.asarray(logits, jnp.float32)
    rows, kinds = prepared(settings, logits.shape[-1], samples=samples)
    return np.asarray(jax.jit(sampling.draw, static_argnums=3)(logits, jnp.int32(step), rows, kinds))


def processed(logits, row, context, answer):
    """Logits [vocab] after all that changes them, where the answer follows the context."""
    rows, kinds = prepared([row], logits.shape[-1], [np.asarray(context, np.int32)])
    state = sampling.history(rows, kinds)
    for token in answer:
        state = sampling.remember(state, jnp.asarray([token], jnp.int32))
    changed = sampling.process(jnp.asarray(logits, jnp.float32)[None], rows, state, kinds)
    return np.asarray(changed)[0], np.asarray(sampling.warp(changed, rows))[0]


LOGITS = np.log(np.array([0.04, 0.30, 0.06, 0.25, 0.20, 0.15]))


def support(logits=LOGITS, **fields):
    _, warped = processed(np.asarray(logits), Settings(temperature=1.0, **fields), [], [])
    return set(np.flatnonzero(np.isfinite(warped)).tolist())


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
    # Min-p: relative to the most probable token, whatever the others left.
    assert support(min_p=0.49) == {1, 3, 4, 5}
    assert support(min_p=0.51) == {1, 3, 4}
    assert support(min_p=1.0) == {1}
    assert support(min_p=0.51, top_k=2) == {1, 3}
    # Ties: exactly k stay, the lower ids.
    assert support(np.zeros(5), top_k=2) == {0, 1}
    # A peaked float32 distribution whose cumulative sum reaches 1 early still keeps every token at p = 1.
    assert support(np.array([50.0, 0.0, -50.0]), top_p=1.0) == {0, 1, 2}


def test_what_changes_logits_is_as_defined():
    """Worked by hand: transformers' definitions, which the next test compares where torch is there."""
    logits = np.array([2.0, -1.0, 0.5, 3.0, -2.0, 1.0])
    context, answer = [0, 1], [2, 3, 3]
    changed, _ = processed(logits, Settings(repetition_penalty=2.0), context, answer)
    assert changed.tolist() == [1.0, -2.0, 0.25, 1.5, -2.0, 1.0]
    changed, _ = processed(logits, Settings(presence_penalty=0.5, frequency_penalty=0.25), context, answer)
    assert changed.tolist() == [2.0, -1.0, -0.25, 2.0, -2.0, 1.0]  # the prompt's 0 and 1 do not count
    changed, _ = processed(logits, Settings(logit_bias={4: 5.0, 0: -math.inf}), context, answer)
    assert changed.tolist() == [-math.inf, -1.0, 0.5, 3.0, 3.0, 1.0]

    def banned(*what, answer=answer):
        changed, _ = processed(logits, Settings(banned=what), context, answer)
        assert (changed[np.isfinite(changed)] == logits[np.isfinite(changed)]).all()
        return np.flatnonzero(np.isinf(changed)).tolist()

    assert banned(4) == [4]
    assert banned([3, 3, 5]) == [5]
    assert banned([3, 5], [3, 0], [2, 5]) == [0, 5]
    assert banned([2, 3, 5]) == []
    assert banned([1, 2, 3, 3, 0], answer=answer) == [0]  # across the border of prompt and answer
    assert banned([0, 1, 4], answer=[]) == [4]
    assert banned([0, 0, 1, 4], answer=[]) == []  # longer than everything so far
    assert banned([1]) == []  # the end of sequence
    assert banned([3, 1]) == [1]  # but in a sequence


def test_equal_to_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(0)
    for trial in range(20):
        logits = rng.normal(0, 3, 300).astype(np.float32)  # more than are looked at as candidates
        context, answer = rng.integers(2, 300, 6), rng.integers(2, 300, 5)
        sequence = [int(token) for token in [*answer[-2:], rng.integers(2, 300)]]
        row = Settings(
            temperature=float(rng.uniform(0.3, 2)),
            top_k=int(rng.integers(1, 300)),
            top_p=float(rng.uniform(0.05, 0.99)),
            min_p=float(rng.uniform(0, 0.2)),
            repetition_penalty=float(rng.uniform(0.7, 1.5)),
            banned=[[7], sequence, [1], [5, 6]],
        )
        ids = torch.tensor(np.r_[context, answer])[None]
        scores = process.RepetitionPenaltyLogitsProcessor(row.repetition_penalty)(
            ids, torch.tensor(logits)[None]
        )
        bans = [list(item) for item in row.banned]
        scores = process.NoBadWordsLogitsProcessor(bans, eos_token_id=list(EOS))(ids, scores)
        changed, warped = processed(logits, row, context, answer)
        np.testing.assert_allclose(changed, scores[0].numpy(), atol=1e-6, rtol=1e-6)
        for warper in (
            process.TemperatureLogitsWarper(row.temperature),
            process.TopKLogitsWarper(row.top_k),
            process.TopPLogitsWarper(row.top_p),
            process.MinPLogitsWarper(row.min_p),
        ):
            scores = warper(ids, scores)
        np.testing.assert_allclose(warped, scores[0].numpy(), atol=1e-6, rtol=1e-6, err_msg=str(trial))
        if trial < 5:
            drawn = {int(draw(warped[None], [Settings(temperature=1.0, seed=s)])[0]) for s in range(5)}
            assert drawn <= set(np.flatnonzero(np.isfinite(warped)).tolist())


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "min_p": 0.4},
    ],
)
def test_draws_follow_the_distribution(fields):
    n = 20_000
    drawn = draw(np.tile(LOGITS, (n, 1)), settings_of(n, fields={**fields, "seed": 11}))
    kept = sorted(
        support(LOGITS / fields["temperature"], **{k: v for k, v in fields.items() if k != "temperature"})
    )
    probabilities = np.exp(LOGITS / fields["temperature"])[kept]
    counts = np.bincount(drawn, minlength=6)
    assert counts.sum() == counts[kept].sum()  # never a token outside the support
    # Chi-square; seeded, so the outcome is fixed: 1e-3 would be a one-in-a-thousand accident of the seed.
    assert scipy.stats.chisquare(counts[kept], n * probabilities / probabilities.sum()).pvalue > 1e-3


@pytest.mark.parametrize("width", [0.1, 3.0])
@pytest.mark.parametrize(
    "fields", [{"top_p": 0.9}, {"top_k": 20}, {"top_k": 900, "top_p": 0.7}, {"min_p": 0.05}, {}]
)
def test_a_large_vocabulary_is_cut_the_same_whether_sorted_or_not(width, fields):
    """Flat distributions end beyond the candidates and are sorted, steep ones are not."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, width, (4, 3000)).astype(np.float32)
    settings = settings_of(4, fields={"temperature": 0.9, "seed": 5, **fields})
    rows, _ = prepared(settings, 3000)
    noise = np.asarray(sampling._gumbel(rows, jnp.int32(2), jnp.arange(3000, dtype=jnp.int32)[None]))
    expected = (np.asarray(sampling.warp(jnp.asarray(logits), rows)) + noise).argmax(-1)
    assert draw(logits, settings, 2).tolist() == expected.tolist()
    # Beside a row that is flat, and so sorted, and one that is not cut at all.
    flat = [*settings, Settings(temperature=1.0, top_p=0.99), Settings(temperature=1.0), Settings()]
    beside = np.concatenate([logits, np.zeros((3, 3000))])
    assert draw(beside, flat, 2)[:4].tolist() == expected.tolist()


def test_steps_and_samples_are_independent():
    n = 5000
    settings, logits = settings_of(n, fields={"temperature": 1.0, "seed": 3}), np.zeros((n, 4))
    first = draw(logits, settings, 0)
    for other in (draw(logits, settings, 1), draw(logits, settings, 0, samples=[1] * n)):
        table = np.zeros((4, 4))
        np.add.at(table, (first, other), 1)
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_a_request_draws_the_same_whatever_else_is_in_the_batch():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(6, 40))
    fields = {"temperature": 0.9, "top_k": 10, "top_p": 0.8}
    together = draw(logits, settings_of(6, fields={**fields, "seed": 100}))
    for i in range(6):
        alone = draw(logits[i : i + 1], [Settings(**fields, seed=100 + i)])
        assert alone[0] == together[i]
    mixed = settings_of(6, fields={**fields, "temperature": [0, 0.9, 0, 0.9, 0.9, 0], "seed": 100})
    drawn = draw(logits, mixed)
    assert drawn[[0, 2, 5]].tolist() == logits.argmax(-1)[[0, 2, 5]].tolist()
    assert drawn[[1, 3, 4]].tolist() == together[[1, 3, 4]].tolist()


def test_greedy_takes_the_lowest_of_tied_ids_and_needs_no_sort():
    settings = [Settings(top_k=5)]
    rows, kinds = prepared(settings, 8)
    assert kinds == sampling.Kinds()
    assert draw(np.array([[1.0, 3.0, 3.0]]), settings).tolist() == [1]
    program = jax.jit(lambda x: sampling.draw(x, jnp.int32(0), rows, kinds))
    assert "sort" not in program.lower(jnp.zeros((1, 8))).as_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: give a finite number ≥ 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot': give a number"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5: give a whole number"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"min_p": -0.1}, "min_p is -0.1: give a number from 0"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0: give a number above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf"),
        ({"n": 0}, "n is 0: give 1 to 128"),
        ({"n": 129, "temperature": 1.0}, "n is 129: give 1 to 128"),
        ({"n": 2}, "n is 2 and temperature 0"),
        ({"logprobs": 21}, "logprobs is 21: give None, or 0 to 20"),
        ({"stop": ["a", ""]}, "stop holds ''"),
        ({"banned": [[]]}, r"banned holds \[\]"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 is nan"),
        ({"logit_bias": {"x": 1}}, "logit_bias is"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_bad_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Settings(**fields)
    with pytest.raises(ValueError, match="temperature has shape"):
        settings_of(3, fields={"temperature": [1.0, 2.0]})
    with pytest.raises(ValueError, match="2 settings for 3 requests"):
        settings_of(3, [Settings()] * 2)
    with pytest.raises(TypeError, match="there is no setting 'heat'"):
        settings_of(3, fields={"heat": 1})


def test_seeds_count_up_and_wrap():
    assert [row.seed for row in settings_of(3, fields={"seed": 7})] == [7, 8, 9]
    assert [row.seed for row in settings_of(3, Settings(seed=7))] == [7, 8, 9]
    assert [row.seed for row in settings_of(2, [Settings(seed=7)] * 2)] == [7, 7]
    for seed in (2**32 - 1, -1):
        assert prepared([Settings(seed=seed)], 5)[0]["seed"].tolist() == [2**32 - 1]


def test_a_steep_distribution_is_not_sorted():
    rows, kinds = prepared([Settings(temperature=1.0, top_p=0.9)], 3000)
    program = jax.jit(lambda x, rows: sampling.draw(x, jnp.int32(0), rows, kinds))
    compiled = program.lower(jnp.zeros((1, 3000)), rows).compile().as_text()
    assert compiled.count('custom_call_target="TopK"') == 1
    assert compiled.count(" sort(") == 1  # in the branch for flat ones
