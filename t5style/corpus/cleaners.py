"""Stages that take away what collections put around their texts."""

from __future__ import annotations

import dataclasses
import re

from t5style.corpus.document import Document
from t5style.corpus.stages import Drop

_GUTENBERG_START = re.compile(
    r"^\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.*?\*{3}\s*?$", re.M | re.I | re.S
)
_GUTENBERG_END = re.compile(
    r"^(?:\*{3} ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK|End of (?:the |this )?Project Gutenberg)",
    re.M | re.I,
)


def strip_gutenberg(text: str) -> str:
    """The book between Project Gutenberg's start and end lines; the whole text where there are none."""
    if start := _GUTENBERG_START.search(text):
        text = text[start.end() :]
    if end := _GUTENBERG_END.search(text):
        text = text[: end.start()]
    return text.strip() + "\n" if start or end else text


@dataclasses.dataclass(frozen=True)
class StripGutenberg:
    """The stage that applies ``strip_gutenberg``: a document without Project Gutenberg's lines stays as it
    is.
    """

    def __call__(self, document: Document) -> Document | Drop:
        text = strip_gutenberg(document.text)
        return document if text == document.text else dataclasses.replace(document, text=text)
