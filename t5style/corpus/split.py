"""Which documents are for training and which are held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Protocol

from t5style.corpus.document import Document
from t5style.run_dir import UserError


class Split(Protocol):
    """Sends each document to a split."""

    @property
    def names(self) -> tuple[str, ...]:
        """The splits that must not end up empty."""
        ...

    def fitted(self, ids: Iterable[str], count: int) -> Split:
        """This split for a corpus of ``count`` documents with these ids, in which no split is to be empty."""
        ...

    def route(self, document: Document, start: int, total: int) -> list[tuple[str, Document]]:
        """The document, or the pieces it is cut into, each with the name of its split.

        Args:
          document: the document.
          start: characters of all documents before it.
          total: characters of all documents.
        """
        ...


@dataclasses.dataclass(frozen=True)
class HashSplit:
    """Draws a split for each document by a hash of its id and the seed: independent of order and of others.

    Only in a corpus so small that a split would be empty, the training document drawn least goes there.

    Attributes:
      validation: share of documents held out for validation.
      test: share of documents held out for testing.
      seed: another seed gives another draw.
    """

    validation: float = 0.02
    test: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.validation < 0 or self.test < 0 or self.validation + self.test >= 1:
            raise UserError(
                "HashSplit's shares must be 0 or more and sum to less than 1, "
                f"not validation={self.validation} and test={self.test}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        held_out = {"validation": self.validation, "test": self.test}
        return ("train", *(name for name, share in held_out.items() if share > 0))

    def draw(self, id: str) -> float:
        """A number in [0, 1) that depends on the id and the seed only."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{id}".encode()).digest()[:8], "big") / 2**64

    def fitted(self, ids: Iterable[str], count: int) -> Split:
        smallest = min(share for share in (self.validation, self.test, 1.0) if share > 0)
        if count * smallest > 50:  # empty with a probability below exp(-50)
            return self
        drawn = sorted((self.draw(id), id) for id in ids)
        names = {id: self._name(draw) for draw, id in drawn}
        moved: dict[str, str] = {}
        for name in self.names[1:]:
            if name not in names.values():
                # The least drawn of those in training is the nearest to what is held out.
                id = next((id for _, id in drawn if names[id] == "train"), None)
                if id is not None:
                    names[id] = moved[id] = name
        if empty := [name for name in self.names if name not in names.values()]:
            raise UserError(
                f"{count} documents cannot fill the splits {', '.join(self.names)}: "
                f"{empty[0]!r} would be empty; use split.TailSplit, which cuts the text itself"
            )
        return _Moved(self, moved) if moved else self

    def _name(self, draw: float) -> str:
        if draw < self.validation:
            return "validation"
        return "test" if draw < self.validation + self.test else "train"

    def route(self, document: Document, start: int, total: int) -> list[tuple[str, Document]]:
        return [(self._name(self.draw(document.id)), document)]


@dataclasses.dataclass(frozen=True)
class _Moved:
    """A HashSplit of a small corpus with the few documents that had to be moved."""

    split: HashSplit
    moved: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        return self.split.names

    def fitted(self, ids: Iterable[str], count: int) -> Split:
        return self

    def route(self, document: Document, start: int, total: int) -> list[tuple[str, Document]]:
        if document.id in self.moved:
            return [(self.moved[document.id], document)]
        return self.split.route(document, start, total)


@dataclasses.dataclass(frozen=True)
class TailSplit:
    """Holds out the last part of the whole text, cutting the document at the border in two.

    For corpora of one or a few files: ``TailSplit(0.1)`` of one file is nanoGPT's split of Shakespeare (the
    first ``int(n * 0.9)`` characters train, the rest validates).

    Attributes:
      fraction: share of the characters held out for validation.
    """

    fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"TailSplit.fraction must lie between 0 and 1, not {self.fraction}")

    @property
    def names(self) -> tuple[str, ...]:
        return ("train", "validation")

    def fitted(self, ids: Iterable[str], count: int) -> Split:
        return self

    def route(self, document: Document, start: int, total: int) -> list[tuple[str, Document]]:
        border = int(total * (1 - self.fraction)) - start
        if border <= 0:
            return [("validation", document)]
        if border >= len(document.text):
            return [("train", document)]
        return [
            ("train", dataclasses.replace(document, text=document.text[:border])),
            (
                "validation",
                dataclasses.replace(document, text=document.text[border:], id=document.id + "#tail"),
            ),
        ]
