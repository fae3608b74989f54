"""Filter for text that is there to sell, to be found, or to fill a page rather than to be read."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.resources
import json
import re

from t5style.corpus.document import Document
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]]+", re.I)
_LONG_WORD = re.compile(r"\w{4,}")
_FEW = 200  # characters: in less, one phrase is a large share and no word is repeated often enough to judge
_NOTICE_LINE = 500  # characters: a longer line is a paragraph that speaks of such things


@dataclasses.dataclass(frozen=True)
class Spam:
    """Drops advertisements, keyword lists, link lists and pages of notices. A limit of 1 or more switches a
    share's rule off.

    Attributes:
      max_url_share: share of the text's characters that are URLs.
      max_link_lines: share of non-blank lines that hold a URL, where there are 5 or more.
      max_keyword_share: share of the words of 4 letters or more that are the most frequent one, of texts with
        50 or more. (Languages without spaces between words have few such words.)
      max_notice_share: share of characters in lines about cookies, scripts, terms and rights.
      max_calls: calls to act for every 1,000 characters, of texts with 3 or more.
      placeholder: drop "lorem ipsum", as C4 does.
    """

    max_url_share: float = 0.2
    max_link_lines: float = 0.5
    max_keyword_share: float = 0.15
    max_notice_share: float = 0.3
    max_calls: float = 6.0
    placeholder: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:5]:
            if not getattr(self, field.name) > 0:
                raise UserError(f"Spam.{field.name} must be more than 0, not {getattr(self, field.name)}")

    def __call__(self, document: Document) -> Document | Drop:
        text = document.text.lower()
        size = max(len(text), 1)
        language = re.split("[-_]", document.language.lower(), maxsplit=1)[0]
        if self.placeholder and "lorem ipsum" in text:
            return Drop("placeholder text", "lorem ipsum")
        if "://" in text or "www." in text:
            urls = _URL.findall(text)
            if (share := sum(map(len, urls)) / size) > self.max_url_share:
                return Drop("mostly urls", f"{len(urls)} URLs, {share:.1%} of the characters")
            lines = [line for line in text.split("\n") if line.strip()]
            share = sum("://" in line or "www." in line for line in lines) / max(len(lines), 1)
            if len(lines) >= 5 and share > self.max_link_lines:
                return Drop("mostly lines with links", f"{share:.1%} of {len(lines)} lines")
        notices = _phrases("notices", language)
        if any(notice in text for notice in notices):
            lines = [line for line in text.split("\n") if len(line) <= _NOTICE_LINE]
            lines = [line for line in lines if any(notice in line for notice in notices)]
            if (share := sum(map(len, lines)) / size) > self.max_notice_share:
                return Drop("mostly notices", f"{len(lines)} lines, {share:.1%} of the characters")
        if size >= _FEW:
            calls = sum(map(text.count, _phrases("calls", language)))
            if calls >= 3 and (rate := 1000 * calls / size) > self.max_calls:
                return Drop("calls to act", f"{calls}, {rate:.1f} for every 1,000 characters")
            words = _LONG_WORD.findall(text)
            if len(words) >= 50:
                word, count = collections.Counter(words).most_common(1)[0]
                if (share := count / len(words)) > self.max_keyword_share:
                    return Drop("keyword stuffing", f"{word!r} is {share:.1%} of {len(words)} long words")
        return document


@functools.cache
def _phrases(kind: str, language: str) -> tuple[str, ...]:
    """The phrases of a language and of English, in which pages in any language sell."""
    file = importlib.resources.files("t5style.corpus") / "spam_phrases.json"
    table = json.loads(file.read_text(encoding="utf-8"))[kind]
    return tuple(dict.fromkeys(table["en"] + table.get(language, [])))
