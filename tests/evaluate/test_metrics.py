"""Metrics against hand-computed values, against the packages they stand for, and their standard errors
against simulation.
"""

import numpy as np
import pytest
import sacrebleu
from rouge_score import rouge_scorer

from t5style.evaluate import metrics

TARGETS = [
    "the cat sat on the mat . it purred all day long",
    "a small domesticated feline",
    "to run at full speed",
    "an island in the Pacific ocean",
    "the act of giving something away",
]
PREDICTIONS = [
    "the cat sat on a mat . it slept all day long",
    "a small feline",
    "to run at full speed",
    "a city in the Atlantic ocean",
    "something that is given",
]


def test_exact_match_and_sequence_accuracy_differ_by_white_space_only():
    targets, predictions = ["a b", "c", "d"], [" a b\n", "c", "D"]
    assert metrics.exact_match(targets, predictions)["exact_match"] == pytest.approx(200 / 3)
    assert metrics.sequence_accuracy(targets, predictions)["sequence_accuracy"] == pytest.approx(100 / 3)
    assert metrics.exact_match([["x", "y"]], ["y"])["exact_match"] == 100.0


def test_squad_normalisation_and_best_reference():
    assert metrics.normalize_answer("The  Quick, brown-fox!") == "quick brownfox"
    scores = metrics.squad([["The Eiffel Tower", "Eiffel tower in Paris"]], ["an eiffel tower."])
    assert scores == {"em": 100.0, "f1": 100.0}
    # 2 of 3 predicted words are right, 2 of 4 wanted words found: F1 = 2 * 2 / (3 + 4).
    assert metrics.squad(["one two three four"], ["one two five"])["f1"] == pytest.approx(100 * 4 / 7)
    # A word twice counts twice on the side that has it twice only.
    assert metrics.token_f1("x x y", "x z") == pytest.approx(2 * 1 / 5)
    assert metrics.token_f1("the", "a") == 1.0
    assert metrics.token_f1("word", "") == 0.0


def test_rouge_is_the_packages_with_sentences_on_lines():
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"])
    expected = {
        name: np.mean(
            [
                scorer.score(t.replace(" . ", " .\n"), p.replace(" . ", " .\n"))[name].fmeasure
                for t, p in zip(TARGETS, PREDICTIONS, strict=True)
            ]
        )
        for name in ("rouge1", "rouge2", "rougeLsum")
    }
    assert metrics.rouge(TARGETS, PREDICTIONS) == pytest.approx({k: 100 * v for k, v in expected.items()})
    # The line break matters: without it the longest common subsequence runs across sentences.
    two = "b c . a d", "a d . b c"
    assert metrics.rouge([two[0]], [two[1]])["rougeLsum"] > 100 * scorer.score(*two)["rougeLsum"].fmeasure
    assert metrics.rouge([["nothing alike", "to run"]], ["to run"])["rouge1"] == 100.0


def test_bleu_is_sacrebleus_corpus_bleu():
    expected = sacrebleu.corpus_bleu(PREDICTIONS, [TARGETS], tokenize="intl", smooth_method="exp").score
    assert metrics.bleu(TARGETS, PREDICTIONS)["bleu"] == pytest.approx(expected, abs=1e-9)
    references = [[t, p + " indeed"] for t, p in zip(TARGETS, PREDICTIONS, strict=True)]
    streams = [[r[0] for r in references], [r[1] for r in references]]
    expected = sacrebleu.corpus_bleu(PREDICTIONS, streams, tokenize="intl", smooth_method="exp").score
    assert metrics.bleu(references, PREDICTIONS)["bleu"] == pytest.approx(expected, abs=1e-9)


def test_mean_estimate_is_the_error_of_a_mean():
    values = np.array([0.0, 0.0, 100.0, 100.0])
    result = metrics.mean_estimate(values)
    assert (result.value, result.n) == (50.0, 4)
    assert result.standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert metrics.mean_estimate(np.array([3.0])).standard_error is None


def test_ratio_estimate_covers_the_spread_of_repeated_samples():
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        tokens = rng.integers(1, 40, 200)
        nats = tokens * rng.normal(
            2.0, 0.5, 200
        )  # one noise for each example: its tokens are not independent
        return nats, tokens

    samples = [draw() for _ in range(2000)]
    spread = np.std([a.sum() / b.sum() for a, b in samples])
    claimed = np.mean([metrics.ratio_estimate(a, b).standard_error for a, b in samples[:200]])
    assert claimed == pytest.approx(spread, rel=0.08)
    a, b = samples[0]
    assert metrics.ratio_estimate(a, b).value == pytest.approx(a.sum() / b.sum())
    difference = metrics.ratio_estimate(a - (a - b), b)
    assert difference.value == pytest.approx(1.0)
    assert difference.standard_error == pytest.approx(0.0, abs=1e-12)


def test_bleu_bootstrap_is_seeded_and_agrees_with_the_per_example_error_for_means():
    rng = np.random.default_rng(1)
    targets = [TARGETS[i] for i in rng.integers(0, 5, 120)]
    predictions = [p if rng.random() < 0.5 else t for t, p in zip(targets, PREDICTIONS * 24, strict=True)]
    first = metrics.estimate(metrics.bleu, targets, predictions, samples=200)["bleu"]
    assert first == metrics.estimate(metrics.bleu, targets, predictions, samples=200)["bleu"]
    assert first.value == metrics.bleu(targets, predictions)["bleu"]
    assert first.standard_error is not None
    assert 0 < first.standard_error < 20

    def unknown_metric(
        t, p
    ):  # a metric without per-example values goes the slow way and must agree with the quick one
        return metrics.exact_match(t, p)

    slow = metrics.estimate(unknown_metric, targets, predictions, samples=1000)["exact_match"]
    quick = metrics.estimate(metrics.exact_match, targets, predictions)["exact_match"]
    assert slow.value == quick.value
    assert slow.standard_error == pytest.approx(quick.standard_error, rel=0.1)


def test_paired_differences_cancel_what_both_share():
    rng = np.random.default_rng(2)
    targets = [f"word{i}" for i in range(100)]
    mine = [t if rng.random() < 0.5 else "no" for t in targets]
    theirs = list(mine)
    theirs[3] = targets[3] if mine[3] == "no" else "no"  # one example differs
    difference = metrics.estimate_difference(metrics.exact_match, targets, mine, theirs)["exact_match"]
    alone = metrics.estimate(metrics.exact_match, targets, mine)["exact_match"]
    assert abs(difference.value) == pytest.approx(1.0)
    assert difference.standard_error == pytest.approx(1.0)
    assert alone.standard_error > 4
    same = metrics.estimate_difference(metrics.bleu, TARGETS, PREDICTIONS, PREDICTIONS, samples=50)["bleu"]
    assert (same.value, same.standard_error) == (0.0, 0.0)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="2 targets but 1 predictions"):
        metrics.rouge(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no examples to score"):
        metrics.exact_match([], [])
    with pytest.raises(ValueError, match="no scored token"):
        metrics.ratio_estimate(np.zeros(2), np.zeros(2))
