"""What is counted while documents go through the stages; tallies of several processes add up."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from t5style.corpus.document import Document, numbers
from t5style.corpus.stages import Drop, Stage
from t5style.run_dir import UserError

_FIRST, _EVERY = 100, 64  # documents of a chunk that are measured: the first so many, then one in so many
_SHARES = [i / 40 for i in range(41)]
_LENGTHS = [i / 2 for i in range(31)]  # of words, in characters
_COUNTS = [10 ** (i / 8) for i in range(65)]  # to 10^8
_NGRAM_WORDS = 1000  # of each measured document that its n-grams are counted in
_NGRAM_KEPT = 50_000  # n-grams of an order held at once


@dataclasses.dataclass
class Row:
    """What one stage did.

    Attributes:
      name: of its class.
      documents: that came to it.
      kept: that it let through.
      changed: that it let through with another text.
      dropped: how many for each reason.
      characters: that came to it.
      seconds: its share of the processes' time.
    """

    name: str
    documents: int = 0
    kept: int = 0
    changed: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    characters: int = 0
    seconds: float = 0.0

    def add(self, other: Row) -> None:
        for name in ("documents", "kept", "changed", "characters", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, n in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + n

    def drop(self, reason: str) -> int:
        """Counts one; how many there are now for this reason."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        return self.dropped[reason]


class Measured:
    """Histograms and frequent n-grams of a fixed sample of the documents.

    The sample is the first documents of each chunk and then one of sixty-four, so that it is the same
    whichever process reads the chunk.
    """

    def __init__(self, ngrams: bool = False) -> None:
        self.histograms: dict[str, list[int]] = {}
        self.ngrams: dict[str, collections.Counter[str]] = (
            {n: collections.Counter() for n in "123"} if ngrams else {}
        )
        self._seen = 0

    def add(self, document: Document) -> None:
        """Counts the document, if it is of the sample."""
        self._seen += 1
        if self._seen > _FIRST and zlib.crc32(document.id.encode()) % _EVERY:
            return
        for name, value in _values(document).items():
            edges = edges_of(name)
            counts = self.histograms.setdefault(name, [0] * (len(edges) - 1))
            # What is beyond the last edge counts in the last bin.
            counts[min(max(bisect.bisect_right(edges, value) - 1, 0), len(counts) - 1)] += 1
        if self.ngrams:
            words = document.text[: 8 * _NGRAM_WORDS].split()[:_NGRAM_WORDS]
            for order, counter in self.ngrams.items():
                n = int(order)
                counter.update(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
                if len(counter) > 4 * _NGRAM_KEPT:
                    self.ngrams[order] = collections.Counter(dict(counter.most_common(_NGRAM_KEPT)))

    def to_json(self) -> dict[str, Any]:
        """Histograms and the most frequent n-grams as JSON values."""
        top = {order: counter.most_common(_NGRAM_KEPT // 10) for order, counter in self.ngrams.items()}
        return {"histograms": self.histograms, "ngrams": top}

    def merge(self, record: Mapping[str, Any]) -> None:
        """Adds what `to_json` gave."""
        for name, counts in record["histograms"].items():
            have = self.histograms.setdefault(name, [0] * len(counts))
            self.histograms[name] = [a + b for a, b in zip(have, counts, strict=True)]
        for order, pairs in record["ngrams"].items():
            counter = self.ngrams.setdefault(order, collections.Counter())
            for text, n in pairs:
                counter[text] += n


def edges_of(name: str) -> list[float]:
    """Borders of the bins of a quantity: shares lie in [0, 1], the rest are counts, spaced by their
    logarithm.
    """
    if name in ("characters", "words"):
        return _COUNTS
    return _LENGTHS if name == "mean_word_length" else _SHARES


def _values(document: Document) -> dict[str, float]:
    from t5style.corpus import quality

    values = {"characters": float(len(document.text))}
    measured = quality.statistics(document.text, document.language or "en")
    for name, value in measured.items():
        if name not in ("characters", "lines", "stop_words"):
            values[name] = float(value)
    # Documents may bring fields of these names that are something else.
    scores = {f"score: {label}": value for label, value in numbers(document, "scores").items()}
    probability = document.meta.get("language_probability")
    if isinstance(probability, int | float) and 0 <= probability <= 1:
        values["language_probability"] = float(probability)
    return values | scores


def apply(
    stages: Sequence[Stage], rows: Sequence[Row], document: Document
) -> tuple[Document, Drop | None, int]:
    """Puts the document through the stages, counting in their rows.

    Returns:
      The document as it is at the end or where it is dropped; why it is dropped; the index of that stage. A
      stage that fails on a document drops it for that reason, and the others go on; a UserError ends the
      run.
    """
    clock = time.perf_counter
    for index, (stage, row) in enumerate(zip(stages, rows, strict=True)):
        row.documents += 1
        row.characters += len(document.text)
        began = clock()
        try:
            result = stage(document)
        except UserError:  # wrong settings, a package that is missing: true of every document
            raise
        except Exception as error:
            result = Drop(f"{type(stage).__name__} failed: {type(error).__name__}", str(error))
        row.seconds += clock() - began
        if not isinstance(result, Document | Drop):
            raise UserError(
                f"the stage {type(stage).__name__} returned {type(result).__name__} for document "
                f"{document.id}: a stage returns a Document or a Drop"
            )
        if isinstance(result, Drop):
            return document, result, index
        row.kept += 1
        row.changed += result.text is not document.text and result.text != document.text
        document = result
    return document, None, -1
