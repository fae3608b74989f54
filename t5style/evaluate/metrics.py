"""Text metrics, as seqio spells them: `metric(targets, predictions) -> {name: score}`.

Scores run from 0 to 100, as in T5's own metrics. A target is one reference or a list of acceptable
references.
Every metric can also say how far it may be trusted: `estimate` gives value, standard error and n, and
`estimate_difference` does so for two systems on the same examples (paired, so what both find hard or easy
cancels). Metrics that are means over examples (all but BLEU) have per-example values and the usual error of a
mean; any other metric is bootstrapped over examples.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Target = str | Sequence[str]
MetricFn = Callable[[Sequence[Target], Sequence[str]], Mapping[str, float]]
PerExampleFn = Callable[[Sequence[Target], Sequence[str]], dict[str, np.ndarray]]

# 1,000 resamples give the standard error itself to about 1/sqrt(2 * 1000) = 2 %.
BOOTSTRAP_SAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score, its standard error (None with fewer than two examples) and the number of examples."""

    value: float
    standard_error: float | None
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """{"value", "standard_error", "n"}."""
        return {"value": self.value, "standard_error": self.standard_error, "n": self.n}

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" ± {self.standard_error:.3g}"
        return f"{self.value:.4g}{error}"


def _references(target: Target) -> list[str]:
    return [target] if isinstance(target, str) else list(target)


def _check(targets: Sequence[Target], predictions: Sequence[str]) -> None:
    if len(targets) != len(predictions):
        raise ValueError(
            f"{len(targets)} targets but {len(predictions)} predictions: give one prediction for each target"
        )
    if not targets:
        raise ValueError("no examples to score: targets is empty; check the split and max_examples")


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean of per-example values [n] with the standard error of a mean, s / sqrt(n) with s from n - 1."""
    values = np.asarray(values, np.float64)
    n = values.size
    error = float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    return Estimate(float(values.mean()), error, n)


def ratio_estimate(numerators: np.ndarray, denominators: np.ndarray) -> Estimate:
    """sum(numerators) / sum(denominators) over n examples, both [n], such as nats per token.

    Standard error by the delta method (Cochran, Sampling Techniques, 3rd ed., §6.4): tokens of one example
    are not independent, so the example is the unit that is sampled.
    """
    a, b = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    total = b.sum()
    if total <= 0:
        raise ValueError(f"{a.size} examples hold no scored token: check the loss weights of the task")
    value = a.sum() / total
    n = a.size
    error = float(np.sqrt(n / (n - 1) * np.square(a - value * b).sum()) / total) if n > 1 else None
    return Estimate(float(value), error, n)


# ---------------------------------------------------------------- per-example values, each dict of [n] arrays


def sequence_accuracy_per_example(
    targets: Sequence[Target], predictions: Sequence[str]
) -> dict[str, np.ndarray]:
    """100 where the prediction equals a reference, character for character."""
    _check(targets, predictions)
    hits = [
        prediction in _references(target) for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"sequence_accuracy": 100.0 * np.asarray(hits, np.float64)}


def exact_match_per_example(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, np.ndarray]:
    """100 where prediction and a reference agree but for surrounding white space."""
    _check(targets, predictions)
    hits = [
        prediction.strip() in [reference.strip() for reference in _references(target)]
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {"exact_match": 100.0 * np.asarray(hits, np.float64)}


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no English articles, single spaces (Rajpurkar
    et al. 2016).
    """
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def token_f1(target: str, prediction: str) -> float:
    """F1 in [0, 1] of the bags of normalised words; two texts that are both empty after normalisation agree
    (SQuAD 2.0).
    """
    want, got = normalize_answer(target).split(), normalize_answer(prediction).split()
    if not want or not got:
        return float(want == got)
    common = sum((collections.Counter(want) & collections.Counter(got)).values())
    return 2.0 * common / (len(want) + len(got))


def squad_per_example(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, np.ndarray]:
    """SQuAD's exact match and F1, the best over the references (Rajpurkar et al. 2016, §6.1)."""
    _check(targets, predictions)
    exact, f1 = [], []
    for target, prediction in zip(targets, predictions, strict=True):
        references = _references(target)
        exact.append(max(normalize_answer(r) == normalize_answer(prediction) for r in references))
        f1.append(max(token_f1(r, prediction) for r in references))
    return {"em": 100.0 * np.asarray(exact, np.float64), "f1": 100.0 * np.asarray(f1, np.float64)}


@functools.cache
def _rouge_scorer() -> object:
    from rouge_score import rouge_scorer  # imported late: it loads nltk

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=False)


def _sentence_lines(text: str) -> str:
    """One sentence per line, which is where rougeLsum cuts; the rule " . " → new line is T5's
    `_prepare_summary_rouge`.
    """
    return text.replace(" . ", " .\n")


def rouge_per_example(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, np.ndarray]:
    """F-measures of rouge1, rouge2, rougeLsum (Lin 2004) by the rouge-score package with T5's settings: no
    stemmer.

    With several references the best F-measure is taken for each name, as
    `rouge_score.RougeScorer.score_multi` does.
    """
    _check(targets, predictions)
    scorer = _rouge_scorer()
    rows = [
        scorer.score_multi([_sentence_lines(r) for r in _references(target)], _sentence_lines(prediction))  # type: ignore[attr-defined]
        for target, prediction in zip(targets, predictions, strict=True)
    ]
    return {name: 100.0 * np.asarray([row[name].fmeasure for row in rows], np.float64) for name in rows[0]}


# ---------------------------------------------------------------------------------- the seqio-style functions


def _means(per_example: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in per_example.items()}


def sequence_accuracy(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of predictions equal to a reference, character for character."""
    return _means(sequence_accuracy_per_example(targets, predictions))


def exact_match(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Percentage of predictions equal to a reference but for surrounding white space."""
    return _means(exact_match_per_example(targets, predictions))


def squad(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """SQuAD's {"em", "f1"}, in percent."""
    return _means(squad_per_example(targets, predictions))


def rouge(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Mean F-measures {"rouge1", "rouge2", "rougeLsum"}, in percent.

    The plain mean over examples (T5's `rouge_mean`); T5's older `rouge` reports a bootstrap median of the
    same values, which differs from it by chance.
    """
    return _means(rouge_per_example(targets, predictions))


def bleu_statistics(targets: Sequence[Target], predictions: Sequence[str]) -> np.ndarray:
    """What corpus BLEU sums over examples: int64 [n, 10] = 4 matched n-gram counts, 4 totals, system and
    reference length.
    """
    _check(targets, predictions)
    scorer = _bleu_scorer()
    rows = []
    for target, prediction in zip(targets, predictions, strict=True):
        score = scorer.corpus_score([prediction], [[reference] for reference in _references(target)])  # type: ignore[attr-defined]
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.asarray(rows, np.int64)


@functools.cache
def _bleu_scorer() -> object:
    from sacrebleu.metrics import BLEU

    # T5's settings for WMT: mteval-v14's "intl" tokeniser, exponential smoothing, cased.
    return BLEU(tokenize="intl", smooth_method="exp", lowercase=False, force=True, effective_order=False)


def _bleu_of(sums: np.ndarray) -> float:
    """BLEU of summed statistics [10], by sacrebleu's own formula."""
    numbers = [int(v) for v in sums]
    return float(
        _bleu_scorer()  # type: ignore[attr-defined]
        .compute_bleu(numbers[:4], numbers[4:8], numbers[8], numbers[9], smooth_method="exp")
        .score
    )


def bleu(targets: Sequence[Target], predictions: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu with T5's settings: {"bleu"}, in percent."""
    return {"bleu": _bleu_of(bleu_statistics(targets, predictions).sum(axis=0))}


PER_EXAMPLE: dict[MetricFn, PerExampleFn] = {
    sequence_accuracy: sequence_accuracy_per_example,
    exact_match: exact_match_per_example,
    squad: squad_per_example,
    rouge: rouge_per_example,
}


# -------------------------------------------------------------------------------------------- standard errors


def _resamples(n: int, samples: int, seed: int) -> np.ndarray:
    """Indices int64 [samples, n], drawn with replacement (Efron & Tibshirani 1993, §6)."""
    return np.random.default_rng(seed).integers(0, n, (samples, n))


def _replicates(
    metric: MetricFn, targets: Sequence[Target], predictions: Sequence[str], indices: np.ndarray
) -> dict[str, np.ndarray]:
    """The metric on each row of `indices` [samples, n]: {name: [samples]}."""
    if metric is bleu:
        statistics = bleu_statistics(targets, predictions)
        return {"bleu": np.asarray([_bleu_of(statistics[row].sum(axis=0)) for row in indices])}
    scores = [metric([targets[i] for i in row], [predictions[i] for i in row]) for row in indices]
    return {name: np.asarray([score[name] for score in scores], np.float64) for name in scores[0]}


def estimate(
    metric: MetricFn,
    targets: Sequence[Target],
    predictions: Sequence[str],
    seed: int = 0,
    samples: int = BOOTSTRAP_SAMPLES,
) -> dict[str, Estimate]:
    """Every score of `metric` with its standard error. The bootstrap, where one is needed, is seeded: same
    call, same answer.
    """
    _check(targets, predictions)
    if metric in PER_EXAMPLE:
        return {k: mean_estimate(v) for k, v in PER_EXAMPLE[metric](targets, predictions).items()}
    n = len(targets)
    values = metric(targets, predictions)
    if n < 2:
        return {name: Estimate(float(value), None, n) for name, value in values.items()}
    replicates = _replicates(metric, targets, predictions, _resamples(n, samples, seed))
    return {k: Estimate(float(values[k]), float(replicates[k].std(ddof=1)), n) for k in values}


def estimate_difference(
    metric: MetricFn,
    targets: Sequence[Target],
    predictions: Sequence[str],
    others: Sequence[str],
    seed: int = 0,
    samples: int = BOOTSTRAP_SAMPLES,
) -> dict[str, Estimate]:
    """score(predictions) - score(others) on the same examples, with the standard error of that paired
    difference.
    """
    _check(targets, predictions)
    _check(targets, others)
    if metric in PER_EXAMPLE:
        mine, theirs = PER_EXAMPLE[metric](targets, predictions), PER_EXAMPLE[metric](targets, others)
        return {name: mean_estimate(mine[name] - theirs[name]) for name in mine}
    n = len(targets)
    left, right = metric(targets, predictions), metric(targets, others)
    differences = {name: float(left[name]) - float(right[name]) for name in left}
    if n < 2:
        return {name: Estimate(value, None, n) for name, value in differences.items()}
    indices = _resamples(
        n, samples, seed
    )  # the same resamples for both: that is what pairs them (Koehn 2004)
    a, b = _replicates(metric, targets, predictions, indices), _replicates(metric, targets, others, indices)
    return {k: Estimate(differences[k], float((a[k] - b[k]).std(ddof=1)), n) for k in differences}
