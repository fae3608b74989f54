"""A linear text classifier over hashed n-grams: what it is, how it is fitted, and the stage that uses it.

The model is fastText's (Joulin et al. 2016, "Bag of Tricks for Efficient Text Classification") with its
hidden layer left out, which for two classes changes nothing that can be expressed: each n-gram of words or
characters has one weight, found by its hash. A text's margin is the sum of its words' weights over the square
root of their number, and the same of its characters'. The square root, as of a vector of length 1, rather
than fastText's mean keeps long texts apart from short ones; apart, the few n-grams of words are not drowned
by the many of characters (ROC AUC on the benchmark's "quality" task 0.965 against 0.947).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5style.corpus.document import Document
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError, atomic_write

MODEL = "classifier.json"
WEIGHTS = "classifier.npz"
_VERSION = 1  # of the features: another way of hashing needs another number
_STEPS = 1024  # of training between two looks at the progress


@dataclasses.dataclass(frozen=True)
class Features:
    """What a text is taken to be made of: see ``classifier_kernels.scan``.

    Attributes:
      words: longest n-gram of words; 0 for none.
      characters: shortest and longest n-gram of characters within a word; (0, 0) for none. Texts without
        spaces between words live from these.
      bits: there are 2**bits weights of 4 bytes. Two n-grams may share one.
    """

    words: int = 2
    characters: Sequence[int] = (2, 4)
    bits: int = 18

    def __post_init__(self) -> None:
        if not 0 <= self.words <= 5:
            raise UserError(f"Features.words must be 0 to 5, not {self.words}")
        valid = len(self.characters) == 2 and (
            tuple(self.characters) == (0, 0) or 1 <= self.characters[0] <= self.characters[1] <= 8
        )
        if not valid:
            raise UserError(
                "Features.characters must be the shortest and the longest n-gram, 1 to 8, or (0, 0) for "
                f"none, not {self.characters!r}"
            )
        if not self.words and not self.characters[1]:
            raise UserError("Features has neither words nor characters: a text would be made of nothing")
        if not 8 <= self.bits <= 28:
            raise UserError(f"Features.bits must be 8 to 28, not {self.bits}")

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """As the kernels take them."""
        return self.words, self.characters[0], self.characters[1], self.bits


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted model.

    Attributes:
      label: what the score is called.
      features: what it looks at.
      weights: float32 [2**bits].
      bias: added to the weights' sum.
      slope, intercept: of Platt's sigmoid, from margin to probability.
      facts: how it was made and how good it is; JSON values.
    """

    label: str
    features: Features
    weights: np.ndarray
    bias: float
    slope: float = 1.0
    intercept: float = 0.0
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def margin(self, text: str) -> float:
        """Log odds before calibration."""
        from t5style.corpus import classifier_kernels as kernels

        total, _, _ = kernels.scan(_bytes(text), *self.features.arguments, self.weights, _NONE, False)
        return self.bias + float(total)

    def score(self, text: str) -> float:
        """Probability, calibrated on examples not learnt from, that the text is of the class looked for."""
        return float(sigmoid(self.slope * self.margin(text) + self.intercept))

    @property
    def fingerprint(self) -> str:
        """16 hex digits of all that decides a score."""
        settings = json.dumps({key: value for key, value in self._settings().items() if key != "label"})
        return hashlib.sha256(settings.encode() + self.weights.astype("<f4").tobytes()).hexdigest()[:16]

    def _settings(self) -> dict[str, Any]:
        features = dataclasses.asdict(self.features) | {"version": _VERSION}
        features["characters"] = list(self.features.characters)
        return {
            "label": self.label,
            "features": features,
            "bias": self.bias,
            "slope": self.slope,
            "intercept": self.intercept,
        }

    def save(self, folder: epath.PathLike) -> None:
        """Writes classifier.npz (weights) and classifier.json (all else) into a folder."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, weights=self.weights)
        atomic_write(folder / WEIGHTS, buffer.getvalue())
        manifest = self._settings() | {"fingerprint": self.fingerprint, "facts": dict(self.facts)}
        atomic_write(folder / MODEL, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        _loaded.cache_clear()

    @classmethod
    def load(cls, folder: epath.PathLike) -> Classifier:
        """Reads what ``save`` wrote.

        Raises:
          UserError: there is no model, it is damaged, or of another version.
        """
        folder = epath.Path(folder)
        if not (folder / MODEL).exists():
            raise UserError(
                f"there is no classifier in {folder} (no {MODEL}): train one with TrainClassifier, "
                "gin/runs/train_classifier.gin"
            )
        try:
            manifest = json.loads((folder / MODEL).read_text())
            features = manifest["features"]
            version = features.pop("version")
            with np.load(io.BytesIO((folder / WEIGHTS).read_bytes()), allow_pickle=False) as arrays:
                weights = np.ascontiguousarray(arrays["weights"], np.float32)
            result = cls(
                manifest["label"],
                Features(**features),
                weights,
                float(manifest["bias"]),
                float(manifest["slope"]),
                float(manifest["intercept"]),
                manifest["facts"],
            )
            whole = manifest["fingerprint"] == result.fingerprint and weights.shape == (
                2 ** features["bits"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError, *_BROKEN) as error:
            raise UserError(f"the classifier in {folder} cannot be read ({error}): train it again") from error
        if version != _VERSION:
            raise UserError(
                f"the classifier in {folder} has features of version {version}, this program those of "
                f"version {_VERSION}: train it again"
            )
        if not whole:
            raise UserError(
                f"the classifier in {folder} is damaged: {WEIGHTS} and {MODEL} do not belong together; copy "
                "both again"
            )
        return result


_NONE = np.empty((2, 0), np.uint32)
_BROKEN = (EOFError, zipfile.BadZipFile, zlib.error)


def _bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.lower().encode("utf-8", "replace"), np.uint8)


def sigmoid(margin: Any) -> Any:
    """1 / (1 + exp(-margin)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(margin, np.float64)))


def fit(
    texts: Sequence[str],
    targets: np.ndarray,
    features: Features,
    *,
    importance: np.ndarray | None = None,
    epochs: int = 5,
    learning_rate: float = 0.1,
    seed: int = 0,
    advance: Callable[[int, float], None] | None = None,
) -> tuple[np.ndarray, float]:
    """Logistic regression by AdaGrad; the same arguments give the same bits.

    Args:
      texts: examples.
      targets: 1 for the class looked for and 0 for the other, [examples].
      features: what to look at.
      importance: weight of each example in the loss, [examples]; 1 if not given.
      epochs: times that each example is seen, in a new order each time.
      learning_rate: at the beginning; it falls to 0 in a straight line.
      seed: of the order.
      advance: is told, now and then, of so many further examples seen and their mean loss in nats.

    Returns:
      weights float32 [2**bits], and the bias.
    """
    from t5style.corpus import classifier_kernels as kernels

    arrays = [_bytes(text) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])]).astype(np.int64)
    data = np.concatenate(arrays)
    words, least, most, bits = features.arguments
    room = kernels.room(int(np.diff(offsets).max()), words, least, most)
    out = np.empty((2, room), np.uint32)
    weights, squares = np.zeros(2**bits, np.float32), np.zeros(2**bits, np.float32)
    bias = np.zeros(2)
    targets = np.asarray(targets, np.float64)
    importance = np.ones(len(targets)) if importance is None else np.asarray(importance, np.float64)
    generator = np.random.default_rng(seed)
    steps, done = epochs * len(targets), 0
    for _ in range(epochs):
        order = generator.permutation(len(targets))
        for begin in range(0, len(order), _STEPS):
            part = order[begin : begin + _STEPS]
            rates = learning_rate * (1.0 - (done + np.arange(len(part))) / steps)
            loss = kernels.train(
                *(data, offsets, targets, importance, part, rates),
                *(words, least, most, bits, weights, squares, bias, out),
            )
            done += len(part)
            if advance is not None:
                advance(len(part), loss / len(part))
    return weights, float(bias[0])


def calibrate(margins: np.ndarray, targets: np.ndarray, importance: np.ndarray) -> tuple[float, float]:
    """Platt's sigmoid: the slope and intercept that make margins of unseen examples probabilities.

    Targets are drawn in from 0 and 1 as Platt (1999, section 2.2) does, which keeps the slope finite where
    the classes do not overlap; Newton's steps are damped as in Lin, Lin and Weng (2007).

    Args:
      margins, targets, importance: float64 [examples]; targets 0 or 1.
    """
    positive, negative = targets.sum(), (1 - targets).sum()
    soft = np.where(targets > 0.5, (positive + 1) / (positive + 2), 1 / (negative + 2))
    design = np.stack([margins, np.ones_like(margins)], axis=1)

    def loss(parameters: np.ndarray) -> float:
        line = design @ parameters
        return float((importance * (np.logaddexp(0, line) - soft * line)).sum())

    parameters = np.array([1.0, 0.0])
    for _ in range(100):
        probability = sigmoid(design @ parameters)
        gradient = design.T @ (importance * (probability - soft))
        if np.abs(gradient).max() < 1e-9 * importance.sum():
            break
        curvature = importance * probability * (1 - probability)
        direction = np.linalg.solve((design * curvature[:, None]).T @ design + 1e-10 * np.eye(2), gradient)
        step, before = 1.0, loss(parameters)
        while (
            step > 1e-10 and loss(parameters - step * direction) > before - 1e-4 * step * gradient @ direction
        ):
            step /= 2
        parameters = parameters - step * direction
    return float(parameters[0]), float(parameters[1])


@functools.lru_cache(maxsize=8)
def _loaded(folder: str) -> Classifier:
    return Classifier.load(folder)


@dataclasses.dataclass(frozen=True)
class Classify:
    """Scores documents with a trained classifier (``meta["scores"][label]``), and drops by the score.

    Attributes:
      model: folder with the classifier, such as the run folder of ``TrainClassifier``.
      keep_above: documents that score less than this are dropped.
      drop_above: documents that score this or more are dropped. Give at most one of the two.
      label: name of the score; the model's own where empty.
      languages: score only documents in these languages (ISO 639-1), and let all others pass; empty: all.
    """

    model: str
    keep_above: float | None = None
    drop_above: float | None = None
    label: str = ""
    languages: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.model:
            raise UserError("Classify.model is empty: name the folder of a classifier")
        if self.keep_above is not None and self.drop_above is not None:
            raise UserError("Classify.keep_above and drop_above contradict each other: set one of them")
        for name in ("keep_above", "drop_above"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UserError(f"Classify.{name} is a probability between 0 and 1, not {value}")
        if isinstance(self.languages, str):
            raise UserError(
                f"Classify.languages must be a list, not {self.languages!r}: write [{self.languages!r}]"
            )

    def inputs(self) -> Sequence[str]:
        """What decides the result besides the fields."""
        return [self.model]

    def __call__(self, document: Document) -> Document | Drop:
        if self.languages and document.language not in self.languages:
            return document
        model = _loaded(self.model)
        label = self.label or model.label
        score = round(model.score(document.text), 6)
        if self.keep_above is not None and score < self.keep_above:
            return Drop(f"{label} score below {self.keep_above:g}", f"{score:.3g}")
        if self.drop_above is not None and score >= self.drop_above:
            return Drop(f"{label} score {self.drop_above:g} or above", f"{score:.3g}")
        scores = {**document.meta.get("scores", {}), label: score}
        return dataclasses.replace(document, meta={**document.meta, "scores": scores})
