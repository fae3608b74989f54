"""Which documents are for training and which are held out."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Protocol

from t5style.corpus.document import Document
from t5style.run_dir import UserError


class Split(Protocol):
    """Sends each document to a split."""

    @property
    def names(self) -> tuple[str, ...]:
        """The splits that must not end up empty."""
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

    def route(self, document: Document, start: int, total: int) -> list[tuple[str, Document]]:
        digest = hashlib.sha256(f"{self.seed}/{document.id}".encode()).digest()
        draw = int.from_bytes(digest[:8], "big") / 2**64
        if draw < self.validation:
            return [("validation", document)]
        return [("test" if draw < self.validation + self.test else "train", document)]


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
