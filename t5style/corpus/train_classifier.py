"""The job that learns a classifier from a user's own good and bad examples, and says how far to trust it.

What lies in the run folder afterwards:

    classifier.json, classifier.npz    the model (classifier.Classifier.load)
    evaluation.json                    every figure on the held-out examples, and the table per threshold
    errors.jsonl                       held-out documents that it got most wrong, of both kinds
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from t5style import console
from t5style.corpus.classifier import Classifier, Features, calibrate, fit, sigmoid
from t5style.corpus.document import Document
from t5style.corpus.sources import Files, Quarantined, Source
from t5style.run_dir import RunDir, UserError, atomic_write

_FEATURES = Features()
_SHINGLE = 5  # words in a row: near-identical texts share nearly all of them
_LEAST = 50  # examples of a class: fewer hold out no more than 10, of which nothing can be said
_SHOWN = 25  # errors of each kind
_BOOTSTRAP = 2000
_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class TrainClassifier:
    """Learns to tell good documents from bad ones, and measures it on examples held out.

    Examples are dealt out by their text (the smallest hash of five words in a row), so that two that are
    nearly the same land on the same side, whatever else is added. The classes have the same weight in
    learning, however many examples there are of each.

    Attributes:
      good, bad: sources, or files, folders or patterns of documents (Parquet or JSON lines) or text.
      label: name of the score in ``meta["scores"]``.
      score_of: "good" or "bad": whose probability the score is. "bad" suits a filter for harm or spam.
      features: what a text is taken to be made of.
      epochs, learning_rate, seed: of training (see ``classifier.fit``).
      holdout: share of examples to measure on.
      calibration: share of examples that turn margins into probabilities.
      prior: share of the class looked for among the documents to be scored; 0.5 where both are as likely.
      max_examples: of each class; where there are more, so many are drawn, by their text.
      max_characters: what an example has beyond is not read.
      contradictions: a text that is among both good and bad examples: "error", or "drop" from both.
    """

    good: Sequence[Source | str]
    bad: Sequence[Source | str]
    label: str = "quality"
    score_of: str = "good"
    features: Features = _FEATURES
    epochs: int = 5
    learning_rate: float = 0.1
    seed: int = 0
    holdout: float = 0.2
    calibration: float = 0.1
    prior: float = 0.5
    max_examples: int = 200_000
    max_characters: int = 20_000
    contradictions: str = "error"

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("good", "bad"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(f"{name} must be a list, not the string {value!r}: write [{value!r}]")
            if not value:
                raise UserError(f"{name} is empty: name at least one file, folder or pattern of examples")
        if not self.label:
            raise UserError("label is empty: name the score, such as 'quality'")
        if self.score_of not in ("good", "bad"):
            raise UserError(f"score_of must be 'good' or 'bad', not {self.score_of!r}")
        if self.contradictions not in ("error", "drop"):
            raise UserError(f"contradictions must be 'error' or 'drop', not {self.contradictions!r}")
        for name in ("holdout", "calibration", "prior"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.holdout + self.calibration > 0.9:
            raise UserError(
                f"holdout={self.holdout} and calibration={self.calibration} leave less than 0.1 to learn from"
            )
        if self.epochs < 1 or self.max_characters < 1 or not self.learning_rate > 0:
            raise UserError("epochs, max_characters and learning_rate must be positive")
        if self.max_examples < _LEAST:
            raise UserError(f"max_examples must be {_LEAST} or more, not {self.max_examples}")

    def inputs(self) -> Sequence[str]:
        sources = [*self.good, *self.bad]
        return [
            path for source in sources for path in ([source] if isinstance(source, str) else source.inputs())
        ]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Trains, measures, and writes the model into ``run.path``.

        Returns:
          Figures: counts of examples, the classifier's fingerprint, and on the held-out examples those of
          ``measure``.

        Raises:
          UserError: too few examples, an empty class, or (``contradictions="error"``) the same text in both.
        """
        examples, counts = self._examples()
        texts = [example.text for example in examples]
        targets = np.array([example.target for example in examples])
        sides = np.array([side(text, self.seed) for text in texts])
        held_out = sides < self.holdout
        calibrating = ~held_out & (sides < self.holdout + self.calibration)
        learning = ~held_out & ~calibrating
        for purpose, chosen in (("learn from", learning), ("calibrate", calibrating), ("measure", held_out)):
            for target, kind in ((1, self.score_of), (0, "bad" if self.score_of == "good" else "good")):
                if not (found := int((targets[chosen] == target).sum())):
                    raise UserError(
                        f"of the {kind} examples {found} are left to {purpose}: they are too few, or too "
                        "much like each other; give more, or set holdout and calibration otherwise"
                    )
        learners = np.flatnonzero(learning)
        with console.progress("training", self.epochs * len(learners), unit="examples") as progress:
            weights, bias = fit(
                [texts[index] for index in learners],
                targets[learners],
                self.features,
                importance=_balance(targets[learners], 0.5),
                epochs=self.epochs,
                learning_rate=self.learning_rate,
                seed=self.seed,
                advance=lambda done, loss: progress.advance(done, loss=loss),
            )
        raw = Classifier(self.label, self.features, weights, bias)
        margins = np.array([raw.margin(text) for text in texts])
        slope, intercept = calibrate(
            margins[calibrating], targets[calibrating], _balance(targets[calibrating], self.prior)
        )
        scores = sigmoid(slope * margins[held_out] + intercept)
        evaluation = measure(scores, targets[held_out], self.prior, self.seed)
        facts = {
            "score_of": self.score_of,
            "learnt_from": _counts(targets[learning], self.score_of),
            "calibrated_on": _counts(targets[calibrating], self.score_of),
            "measured_on": _counts(targets[held_out], self.score_of),
            **counts,
        }
        model = Classifier(
            self.label,
            self.features,
            weights,
            bias,
            slope,
            intercept,
            facts={**facts, "evaluation": evaluation},
        )
        model.save(run.path)
        atomic_write(run.path / "evaluation.json", json.dumps({**facts, **evaluation}, indent=1) + "\n")
        self._errors(run, [examples[index] for index in np.flatnonzero(held_out)], scores)
        self._say(facts, evaluation)
        flat = {key: value for key, value in evaluation.items() if not isinstance(value, list | dict)}
        return {**facts, **flat, "fingerprint": model.fingerprint}

    def _examples(self) -> tuple[list[_Example], dict[str, Any]]:
        """Examples of both classes, each text once, in an order that depends on the texts alone."""
        classes = {}
        counts: dict[str, Any] = {}
        for name in ("good", "bad"):
            classes[name], seen, unreadable, repeated = self._class(name)
            counts[name] = {"examples": seen, "repeated": repeated, "unreadable": unreadable}
        both = sorted(classes["good"].keys() & classes["bad"].keys())
        if both and self.contradictions == "error":
            shown = "; ".join(
                f"{classes['good'][key].id!r} and {classes['bad'][key].id!r} "
                f"({' '.join(classes['good'][key].text.split())[:60]!r})"
                for key in both[:5]
            )
            raise UserError(
                f"{len(both)} texts are both good and bad examples: {shown}; take them out of one, or set "
                "contradictions='drop'"
            )
        counts["contradictions"] = len(both)
        for name, found in classes.items():
            for key in both:
                del found[key]
            if len(found) < _LEAST:
                raise UserError(
                    f"{len(found)} different {name} examples are too few to learn from and to measure on: "
                    f"give at least {_LEAST}, better some thousands"
                )
        return [example for found in classes.values() for _, example in sorted(found.items())], counts

    def _class(self, name: str) -> tuple[dict[bytes, _Example], int, int, int]:
        """Up to ``max_examples`` of one class, those whose keys are smallest; and counts: read, not readable,
        repeated.
        """
        heap: list[tuple[int, bytes]] = []  # the largest key on top
        kept: dict[bytes, _Example] = {}
        seen = unreadable = repeated = 0
        target = int(name == self.score_of)
        with console.progress(f"reading {name} examples") as progress:
            for item in _documents(getattr(self, name)):
                if isinstance(item, Quarantined):
                    unreadable += 1
                    if unreadable == 1:
                        console.say(f"not read: {item.file} {item.position}: {item.reason} {item.detail}")
                    continue
                text = item.text[: self.max_characters]
                words = text.lower().split()
                if not words:
                    continue
                progress.advance()
                seen += 1
                key = hashlib.blake2b(" ".join(words).encode("utf-8", "replace"), digest_size=16).digest()
                if key in kept:
                    repeated += 1
                elif len(heap) < self.max_examples or key < heap[0][1]:
                    heapq.heappush(heap, (-int.from_bytes(key), key))
                    kept[key] = _Example(item.id, item.source, text, target)
                    if len(heap) > self.max_examples:
                        del kept[heapq.heappop(heap)[1]]
        return kept, seen, unreadable, repeated

    def _errors(self, run: RunDir, examples: Sequence[_Example], scores: np.ndarray) -> None:
        other = "bad" if self.score_of == "good" else "good"
        lines = []
        order = np.argsort(scores, kind="stable")
        for target, indices in ((1, order), (0, order[::-1])):
            wrong = [i for i in indices if examples[i].target == target and (scores[i] >= 0.5) != target]
            for index in wrong[:_SHOWN]:
                example = examples[index]
                lines.append(
                    {
                        "is": self.score_of if target else other,
                        "taken_for": other if target else self.score_of,
                        "score": round(float(scores[index]), 6),
                        "id": example.id,
                        "source": example.source,
                        "text": example.text[:1000],
                    }
                )
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write(run.path / "errors.jsonl", content.encode("utf-8", "replace"))

    def _say(self, facts: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
        other = "bad" if self.score_of == "good" else "good"
        counts = facts["measured_on"]
        console.table(
            f"{self.label}: {counts[self.score_of]:,} {self.score_of} and {counts[other]:,} {other} held out",
            ["figure", "value", "95 % interval"],
            [
                (name, evaluation[name], "{:.4g} to {:.4g}".format(*evaluation["intervals"][name]))
                for name in evaluation["intervals"]
            ],
        )
        confusion = evaluation["confusion"]
        console.table(
            "at score 0.5",
            ["", f"taken for {self.score_of}", f"taken for {other}"],
            [
                (f"is {self.score_of}", confusion["true_positive"], confusion["false_negative"]),
                (f"is {other}", confusion["false_positive"], confusion["true_negative"]),
            ],
        )
        columns = ("threshold", "precision", "recall", "f1", "kept")
        console.table(
            f"what is taken for {self.score_of} at a threshold",
            columns,
            [tuple(row[column] for column in columns) for row in evaluation["thresholds"]],
        )


@dataclasses.dataclass(frozen=True)
class _Example:
    id: str
    source: str
    text: str
    target: int


def _documents(sources: Sequence[Source | str]) -> Iterator[Document | Quarantined]:
    for source in sources:
        for part in (Files([source]) if isinstance(source, str) else source).parts():
            yield from part.read()


def side(text: str, seed: int) -> float:
    """Where a text lands between 0 and 1."""
    from t5style.corpus import classifier_kernels as kernels

    data = np.frombuffer(text.lower().encode("utf-8", "replace"), np.uint8)
    key = int(kernels.smallest_shingle(data, _SHINGLE))
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()) / 2**64


def _balance(targets: np.ndarray, prior: float) -> np.ndarray:
    """Weights of examples, 1 in the mean, by which class 1 has the share ``prior``."""
    share = targets.mean()
    return np.where(targets > 0.5, prior / share, (1 - prior) / (1 - share))


def _counts(targets: np.ndarray, score_of: str) -> dict[str, int]:
    other = "bad" if score_of == "good" else "good"
    return {score_of: int((targets == 1).sum()), other: int((targets == 0).sum())}


def measure(scores: np.ndarray, targets: np.ndarray, prior: float = 0.5, seed: int = 0) -> dict[str, Any]:
    """How well scores tell class 1 from class 0.

    Args:
      scores: probabilities of class 1, [examples].
      targets: 0 or 1, [examples]; both occur.
      prior: the share of class 1 that the probabilities are meant for.
      seed: of the bootstrap.

    Returns:
      precision, recall, specificity, accuracy (intervals: Wilson 1927), f1 (bootstrap percentiles) at score
      0.5, roc_auc (interval: Hanley and McNeil 1982), the Brier score and the expected calibration error over
      ten bins (both with class 1 weighing ``prior``), ``confusion``, and ``thresholds``: a row per threshold,
      ``kept`` being the share of all examples at or above it. Precision, F1 and accuracy depend on the
      classes' shares among the examples.
    """
    positive = targets > 0.5
    found = scores >= 0.5
    confusion = {
        "true_positive": int((found & positive).sum()),
        "false_positive": int((found & ~positive).sum()),
        "false_negative": int((~found & positive).sum()),
        "true_negative": int((~found & ~positive).sum()),
    }
    tp, fp, fn, tn = confusion.values()
    area = roc_auc(scores, targets)
    draws = np.random.default_rng(seed).multinomial(
        len(scores), np.array([tp, fp, fn, tn]) / len(scores), _BOOTSTRAP
    )
    f1 = 2 * draws[:, 0] / np.maximum(2 * draws[:, 0] + draws[:, 1] + draws[:, 2], 1)
    error = _auc_error(area, int(positive.sum()), int((~positive).sum()))
    importance = _balance(targets, prior)
    bins = np.minimum((scores * 10).astype(int), 9)
    gaps = np.bincount(bins, importance * (scores - targets), 10)
    rows = []
    for threshold in _THRESHOLDS:
        above = scores >= threshold
        hits = int((above & positive).sum())
        rows.append(
            {
                "threshold": threshold,
                "precision": hits / above.sum() if above.any() else 1.0,
                "recall": hits / positive.sum(),
                "f1": 2 * hits / (above.sum() + positive.sum()),
                "kept": float(above.mean()),
            }
        )
    ratios = {
        "precision": (tp, tp + fp),
        "recall": (tp, tp + fn),
        "specificity": (tn, tn + fp),
        "accuracy": (tp + tn, len(scores)),
    }
    return {
        **{name: part / max(whole, 1) for name, (part, whole) in ratios.items()},
        "f1": 2 * tp / max(2 * tp + fp + fn, 1),
        "roc_auc": area,
        "brier": float((importance * (scores - targets) ** 2).mean()),
        "calibration_error": float(np.abs(gaps).sum() / importance.sum()),
        "intervals": {
            **{name: list(wilson(part, whole)) for name, (part, whole) in ratios.items()},
            "f1": [float(value) for value in np.quantile(f1, (0.025, 0.975))],
            "roc_auc": [max(0.0, area - 1.96 * error), min(1.0, area + 1.96 * error)],
        },
        "confusion": confusion,
        "thresholds": [{name: float(value) for name, value in row.items()} for row in rows],
    }


def wilson(part: int, whole: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's (1927) score interval of a share; (0, 1) where there is nothing to divide by."""
    if not whole:
        return 0.0, 1.0
    share = part / whole
    middle = (share + z * z / (2 * whole)) / (1 + z * z / whole)
    half = z / (1 + z * z / whole) * math.sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole))
    return max(0.0, middle - half), min(1.0, middle + half)


def roc_auc(scores: np.ndarray, targets: np.ndarray) -> float:
    """Probability that an example of class 1 scores more than one of class 0, ties counting half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    positive = targets > 0.5
    n = int(positive.sum())
    return float((ranks[inverse][positive].sum() - n * (n + 1) / 2) / (n * (len(targets) - n)))


def _auc_error(area: float, positive: int, negative: int) -> float:
    """Standard error of an area under the curve (Hanley and McNeil 1982, equation 2)."""
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    square = area * (1 - area) + (positive - 1) * (q1 - area**2) + (negative - 1) * (q2 - area**2)
    return math.sqrt(max(square, 0.0) / (positive * negative))
