"""How often training sees each document, and in which order: weights, temperature, curriculum."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5style.corpus.document import Document, numbers
from t5style.run_dir import UserError

_BUCKETS = 1 << 18  # of the word counts that rarity is taken from


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Copies of each training document: the product of the weights below, its fraction drawn by a hash of the
    document's id. 0.5 keeps half of the documents, 2.5 writes two copies of half and three of the rest.

    Attributes:
      sources: weight per source; those not named have 1.
      temperature: of the languages: their shares of the characters become proportional to
        n ** (1 / temperature), at the same total. 1 leaves them as they are; mT5 (Xue et al. 2021, section
        3.2) takes 1 / 0.3.
      score: label of a classifier whose `meta['scores'][label]` chooses among `levels`.
      levels: pairs (least score, weight), the highest first: ((0.9, 3.0), (0.5, 1.0)) writes the best
        documents three times, and leaves out those below 0.5.
      seed: of the draws.
    """

    sources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0
    score: str = ""
    levels: Sequence[Sequence[float]] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, weight in self.sources.items():
            if not (0 <= weight <= 1000):
                raise UserError(f"Sampling.sources[{name!r}] must lie between 0 and 1000, not {weight}")
        if not self.temperature >= 0.1:
            raise UserError(f"Sampling.temperature must be 0.1 or more, not {self.temperature}")
        if bool(self.score) != bool(self.levels):
            raise UserError("Sampling.score and Sampling.levels go together: give both or none")
        scores = [level[0] for level in self.levels]
        if scores != sorted(scores, reverse=True):
            raise UserError(f"Sampling.levels must go from the highest score down, not {scores}")

    def group_weights(self, characters: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], float]:
        """Weights of documents by (source, language).

        Args:
          characters: of all training documents, by (source, language).

        Raises:
          UserError: a source that has a weight has no documents.
        """
        present = {source for source, _ in characters}
        if unknown := [name for name in self.sources if name not in present]:
            raise UserError(
                f"Sampling.sources names {unknown[0]!r}, but the documents come from "
                f"{', '.join(sorted(present))}"
            )
        languages: dict[str, float] = {}
        for (source, language), n in characters.items():
            languages[language] = languages.get(language, 0.0) + n * self.sources.get(source, 1.0)
        total = sum(languages.values())
        raised = {name: n ** (1 / self.temperature) for name, n in languages.items() if n > 0}
        factors = {
            name: total * value / sum(raised.values()) / languages[name] for name, value in raised.items()
        }
        return {
            (source, language): self.sources.get(source, 1.0) * factors.get(language, 0.0)
            for source, language in characters
        }

    def copies(self, document: Document, weight: float) -> int:
        """How many copies of a training document are written."""
        if self.score:
            score = numbers(document, "scores").get(self.score)
            if score is None:
                raise UserError(
                    f"document {document.id} has no score {self.score!r}: put the classifier of that label "
                    "among the stages"
                )
            weight *= next((level for least, level in self.levels if score >= least), 0.0)
        digest = hashlib.blake2b(f"{self.seed}/{document.id}".encode(), digest_size=8).digest()
        return math.floor(weight + int.from_bytes(digest, "big") / 2**64)


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Records an order for training from easy to hard: `train/order.npy` (int64 indices of documents) and
    `train/difficulty.npy` (float64), which a task's `order` can name.

    Attributes:
      by: "length" in characters; "rarity", the mean negative log frequency of a document's words in the
        corpus (Platanios et al. 2019, section 3.1); or the label of a classifier (its score).
      hardest_first: turns the order round.
    """

    by: str = "length"
    hardest_first: bool = False

    def difficulty(self, document: Document, frequencies: np.ndarray | None) -> float:
        """The greater, the later."""
        if self.by == "length":
            return float(len(document.text))
        if self.by == "rarity":
            assert frequencies is not None
            hashes = word_buckets(document.text)
            return float(-np.log(frequencies[hashes]).mean()) if len(hashes) else 0.0
        score = numbers(document, "scores").get(self.by)
        if score is None:
            raise UserError(
                f"Curriculum.by={self.by!r} is neither 'length' nor 'rarity', nor has document {document.id} "
                "a score of that name"
            )
        return float(score)


def word_buckets(text: str) -> np.ndarray:
    """Each word's bucket in [0, 2^18), int64 [words]: words are counted by their hashes."""
    from t5style.corpus import words

    hashes = words.split(words.utf8(text), words.table())[0]
    return (hashes % np.uint64(_BUCKETS)).astype(np.int64)


def count_words(texts: Any) -> np.ndarray:
    """int64 [2^18]: how many words of these texts fall into each bucket."""
    counts = np.zeros(_BUCKETS, np.int64)
    for text in texts:
        counts += np.bincount(word_buckets(text), minlength=_BUCKETS)
    return counts
