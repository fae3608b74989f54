"""Steps that look at all documents at once: deduplication of documents, lines and passages.

Among ``Prepare.stages`` they stand wherever they are wanted. Each takes keys from one document at a time, in
any process; documents (or their parts) with the same key belong together, and grouping.py, or Beam, brings
them together. Two kinds:

* ``Deduplicator``: keeps one document of each group and drops the others.
* ``Remover``: keeps the first copy of each line or passage and cuts the others out of their documents.
"""

from __future__ import annotations

import abc
import dataclasses
import datetime
from typing import Any

import numpy as np

from t5style.corpus import dedup
from t5style.corpus.document import Document, numbers
from t5style.run_dir import UserError

_KEEP = ("first", "longest", "newest")


@dataclasses.dataclass(frozen=True)
class Deduplicator(abc.ABC):
    """Drops documents of which a copy is kept.

    Attributes:
      keep: which copy: the "first" (in the order of the sources, then of their files), the "longest", the
        "newest" (by the document's time; unknown is oldest), or the label of a classifier: the one with the
        highest ``meta['scores'][label]``. Among equals the first.
    """

    keep: str = "first"

    reason = "duplicate"
    width = 1  # keys per document

    @abc.abstractmethod
    def keys(self, text: str) -> np.ndarray:
        """uint64 [width]."""

    def preference(self, document: Document) -> float:
        """The copy with the highest is kept."""
        if self.keep == "first":
            return 0.0
        if self.keep == "longest":
            return float(len(document.text))
        if self.keep == "newest":
            return _timestamp(document.time)
        score = numbers(document, "scores").get(self.keep)
        if score is None:
            raise UserError(
                f"{type(self).__name__}.keep={self.keep!r} is none of {', '.join(_KEEP)}, nor has document "
                f"{document.id} a score of that name: put the classifier with label={self.keep!r} before it"
            )
        return float(score)


@dataclasses.dataclass(frozen=True)
class ExactDuplicates(Deduplicator):
    """Keeps one of the documents with the same text (by a 128-bit hash)."""

    width = 2

    def keys(self, text: str) -> np.ndarray:
        return np.frombuffer(dedup.text_digest(text), np.uint64)


@dataclasses.dataclass(frozen=True)
class NearDuplicates(Deduplicator):
    """Keeps one of each cluster of similar documents: MinHash with banding (Broder 1997; Leskovec, Rajaraman
    & Ullman, Mining of Massive Datasets, section 3.4), clusters being connected components.

    Two documents whose word n-grams have Jaccard similarity s share a band with probability
    1 - (1 - s**rows)**bands: 0.5 at s = 0.69 with FineWeb's (Penedo et al. 2024) 14 bands of 8 rows of word
    5-grams, the defaults.

    Attributes:
      ngram: words in a shingle.
      bands: number of bands.
      rows: hashes in a band.
      seed: of the hash functions.
    """

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1

    reason = "near duplicate"

    def __post_init__(self) -> None:
        self._minhash()  # checks the numbers

    def _minhash(self) -> dedup.MinHash:
        return dedup.MinHash(self.ngram, self.bands, self.rows, self.seed)

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.bands

    def keys(self, text: str) -> np.ndarray:
        return self._minhash().band_keys(text)


class Remover(abc.ABC):
    """Cuts repeated parts out of documents."""

    @abc.abstractmethod
    def keys(self, text: str) -> np.ndarray:
        """uint64, one for each part that may be repeated; 0 where it never counts."""

    @abc.abstractmethod
    def remove(self, text: str, parts: np.ndarray) -> str:
        """The text without these parts (their indices, or for passages their positions)."""

    @property
    def reason(self) -> str:
        """Why a document is dropped of which nothing is left."""
        return f"nothing left by {type(self).__name__}"


@dataclasses.dataclass(frozen=True)
class DuplicateLines(Remover):
    """Keeps the first of equal lines, or paragraphs, of the whole corpus, as CCNet does (Wenzek et al. 2020,
    section 3.1).

    Attributes:
      unit: "line" or "paragraph" (what blank lines separate).
      min_characters: shorter ones stay.
    """

    unit: str = "line"
    min_characters: int = 20

    def __post_init__(self) -> None:
        if self.unit not in ("line", "paragraph"):
            raise UserError(f"DuplicateLines.unit must be 'line' or 'paragraph', not {self.unit!r}")
        if self.min_characters < 1:
            raise UserError(f"DuplicateLines.min_characters must be 1 or more, not {self.min_characters}")

    def keys(self, text: str) -> np.ndarray:
        return dedup.line_keys(text, unit=self.unit, min_characters=self.min_characters)

    def remove(self, text: str, parts: np.ndarray) -> str:
        drop = np.zeros(len(self.keys(text)), bool)
        drop[parts] = True
        return dedup.remove_units(text, drop, unit=self.unit)


@dataclasses.dataclass(frozen=True)
class RepeatedSubstrings(Remover):
    """Keeps the first of equal passages of ``min_words`` words or more of the whole corpus (Lee et al. 2021,
    ExactSubstr, with 50 tokens), found by hashes of all windows.

    A first look at winnowed hashes (Schleimer et al. 2003) tells where repeated passages can be; the hashes
    of all windows are taken only there.

    Attributes:
      min_words: shorter passages may repeat.
    """

    min_words: int = 50

    def __post_init__(self) -> None:
        self._substrings()

    def _substrings(self) -> dedup.Substrings:
        return dedup.Substrings(self.min_words)

    def keys(self, text: str) -> np.ndarray:
        return self._substrings().fingerprints(text)

    def windows(self, text: str, repeated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hashes and positions of the windows around the fingerprints that are repeated (sorted)."""
        return self._substrings().windows(text, repeated)

    def remove(self, text: str, parts: np.ndarray) -> str:
        return self._substrings().remove(text, parts)


Operator = Deduplicator | Remover


def _timestamp(time: str) -> float:
    try:
        moment = datetime.datetime.fromisoformat(time)
    except ValueError:
        return float("-inf")
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


@dataclasses.dataclass(frozen=True)
class Segment:
    """Stages, and the operators at their end: deduplicators, then at most one remover."""

    stages: tuple[Any, ...]
    operators: tuple[Operator, ...]

    @property
    def deduplicators(self) -> tuple[Deduplicator, ...]:
        return tuple(item for item in self.operators if isinstance(item, Deduplicator))

    @property
    def remover(self) -> Remover | None:
        return next((item for item in self.operators if isinstance(item, Remover)), None)


def segments(stages: Any) -> list[Segment]:
    """Cuts the stages behind their operators. One pass over the documents does one segment.

    The operators of a segment see the same texts, so after a remover a new segment begins, and the last
    segment never ends in one.
    """
    result: list[Segment] = []
    plain: list[Any] = []
    operators: list[Operator] = []
    for stage in stages:
        if operators and not (
            isinstance(stage, Deduplicator | Remover) and not isinstance(operators[-1], Remover)
        ):
            result.append(Segment(tuple(plain), tuple(operators)))
            plain, operators = [], []
        (operators if isinstance(stage, Deduplicator | Remover) else plain).append(stage)
    result.append(Segment(tuple(plain), tuple(operators)))
    if result[-1].remover is not None:
        result.append(Segment((), ()))
    return result
