"""What happens to one document on its way into a corpus.

A stage is a frozen dataclass that is called with a document and returns it, possibly changed, or
``Drop(reason)``. It knows nothing of other documents, so stages can run in any process. ``Prepare`` composes
them in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from t5style.corpus.document import Document
from t5style.run_dir import UserError


@dataclasses.dataclass(frozen=True)
class Drop:
    """A document is left out.

    Attributes:
      reason: why; the same words for all documents of which it is true, for reasons are counted.
      detail: what there is to say about this document.
    """

    reason: str
    detail: str = ""


class Stage(Protocol):
    """One step of preparation."""

    def __call__(self, document: Document, /) -> Document | Drop: ...


@dataclasses.dataclass(frozen=True)
class MinLength:
    """Drops documents of fewer than ``characters`` characters, white space at either end not counted."""

    characters: int = 1

    def __post_init__(self) -> None:
        _check(self.characters, "MinLength.characters")

    def __call__(self, document: Document) -> Document | Drop:
        if len(document.text.strip()) < self.characters:
            return Drop(f"shorter than {self.characters} characters" if self.characters > 1 else "blank")
        return document


@dataclasses.dataclass(frozen=True)
class MaxLength:
    """Drops documents of more than ``characters`` characters."""

    characters: int

    def __post_init__(self) -> None:
        _check(self.characters, "MaxLength.characters")

    def __call__(self, document: Document) -> Document | Drop:
        if len(document.text) > self.characters:
            return Drop(f"longer than {self.characters} characters")
        return document


@dataclasses.dataclass(frozen=True)
class Where:
    """Puts only some documents through stages: those that match all of what is given.

    Attributes:
      stages: in order.
      source: names of sources.
      language: ISO 639-1 codes.
      format: values of ``meta['format']``: "page" for the text of web pages.
    """

    stages: Sequence[Stage]
    source: Sequence[str] = ()
    language: Sequence[str] = ()
    format: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("source", "language", "format"):
            if isinstance(value := getattr(self, name), str):
                raise UserError(f"Where.{name} must be a list, not the string {value!r}: write [{value!r}]")
        for stage in self.stages:
            check_stage(stage, "Where.stages")
        if not (self.source or self.language or self.format):
            raise UserError("Where matches every document: give source, language or format")

    def __call__(self, document: Document) -> Document | Drop:
        for wanted, value in (
            (self.source, document.source),
            (self.language, document.language),
            (self.format, document.meta.get("format", "")),
        ):
            if wanted and value not in wanted:
                return document
        for stage in self.stages:
            result = stage(document)
            if isinstance(result, Drop):
                return result
            document = result
        return document


def check_stage(stage: object, where: str) -> None:
    """Raises UserError for what is no stage: a class that was not called, or an operator inside of Where."""
    if isinstance(stage, type) or not callable(stage):
        raise UserError(
            f"{where} has {stage!r}, which is no stage that takes one document at a time: write classes with "
            "() (@normalize.Normalize() in gin), and operators outside of Where"
        )


def _check(characters: int, name: str) -> None:
    if characters < 1:
        raise UserError(f"{name} must be 1 or more, not {characters}")
