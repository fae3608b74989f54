"""Quality rules: Gopher's (quality and repetition), C4's and FineWeb's, with their published thresholds.

Each is a function of a text and a stage. The thresholds are those of datatrove 0.10, whose decisions on
English these are (``experiments/benchmarks/corpus_quality.py``). Other languages have thresholds and stop
words of their own where such are known (``quality_languages``); rules that make no sense for a language are
left out.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from t5style.corpus import quality_languages
from t5style.corpus.document import Document
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

if TYPE_CHECKING:
    import numpy as np

_LONGEST = 32  # n-gram


def gopher(text: str, language: str = "en") -> str | None:
    """Why Gopher's rules drop a text, or None to keep it. See ``Gopher``.

    Args:
      text: any text.
      language: ISO 639-1 code of its language.
    """
    return _reason(_published(Gopher).check(text, language))


def c4(text: str, language: str = "en") -> str | None:
    """Why C4's rules drop a text, or None to keep it (what of it, ``C4().edit`` says). See ``C4``."""
    edited = _published(C4).edit(text, language)
    return None if isinstance(edited, str) else edited.reason


def fineweb(text: str, language: str = "en") -> str | None:
    """Why FineWeb's rules drop a text, or None to keep it. See ``FineWeb``."""
    return _reason(_published(FineWeb).check(text, language))


def statistics(text: str, language: str = "en") -> dict[str, float]:
    """The numbers that the rules look at: counts of words and lines, and shares between 0 and 1.

    For each n of a language's thresholds ``top_{n}_gram`` is the share of all characters in the most
    frequent n-gram of words, ``duplicate_{n}_grams`` that in n-grams seen before.
    """
    settings = _published(Gopher).settings(language)
    count = _Counts(text, language, settings)
    return {
        "characters": float(count["characters"]),
        "words": float(count["words"]),
        "mean_word_length": count.ratio("real_characters", "real_words"),
        "hash_ratio": count.ratio("hashes", "words"),
        "ellipsis_ratio": count.ratio("ellipses", "words"),
        "lines": float(count["lines"]),
        "bullet_lines": count.ratio("bullet_lines", "lines"),
        "ellipsis_lines": count.ratio("ellipsis_lines", "lines"),
        "letter_words": count.ratio("letter_words", "words"),
        "stop_words": float(count["stop_words"]),
        "duplicate_lines": count.ratio("repeated_runs", "runs"),
        "duplicate_line_characters": count.ratio("repeated_run_characters", "characters"),
        "duplicate_paragraphs": count.ratio("repeated_paragraphs", "paragraphs"),
        "duplicate_paragraph_characters": count.ratio("repeated_paragraph_characters", "characters"),
        **{f"top_{n}_gram": count.top(n) for n, _ in settings["max_top_ngrams"] or ()},
        **{f"duplicate_{n}_grams": count.repeated(n) for n, _ in settings["max_duplicate_ngrams"] or ()},
        "ended_lines": count.ratio("ended_lines", "full_lines"),
        "short_lines": count.ratio("short_lines", "full_lines"),
        "line_feeds_per_word": count.ratio("line_feeds", "words"),
    }


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What the stages share: settings by language.

    Attributes:
      language: of documents that do not name theirs.
      languages: settings by language (ISO 639-1) and field, for this stage. They go before the language's
        own, known to ``quality_languages``; and these go before fields left at their defaults, but not
        before fields that were set.
    """

    language: str = "en"
    languages: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_settings", {})
        name = type(self).__name__
        if not self.language:
            raise UserError(
                f"{name}.language is empty; name the language of documents that do not, such as 'en'"
            )
        known = {field.name for field in dataclasses.fields(self)} - {"language", "languages"}
        own = {field: getattr(self, field) for field in known}
        _check(name, own)
        for language, settings in self.languages.items():
            if unknown := sorted(set(settings) - known):
                raise UserError(
                    f"{name}.languages[{language!r}] sets {unknown[0]!r}, which is no rule; there are "
                    f"{', '.join(sorted(known))}"
                )
            _check(f"{name}.languages[{language!r}]", own | dict(settings))

    def settings(self, language: str = "") -> Mapping[str, Any]:
        """All settings that hold for a language; None where a rule is off."""
        cache: dict[str, Mapping[str, Any]] = self._settings  # type: ignore[attr-defined]
        if language not in cache:
            code = quality_languages.base(language or self.language)
            settings = {}
            special = quality_languages.of(type(self).__name__, code)
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                if field.name in special and value == field.default:
                    value = special[field.name]
                settings[field.name] = value
            cache[language] = settings | dict(self.languages.get(language) or self.languages.get(code) or {})
        return cache[language]


def _check(name: str, settings: Mapping[str, Any]) -> None:
    """Raises UserError where settings cannot be meant."""
    for field, value in settings.items():
        if value is None or isinstance(value, bool) or field in ("stop_words", "line_ends", "policy_phrases"):
            if isinstance(value, str):
                raise UserError(f"{name}.{field} must be a list of strings, not {value!r}: write [{value!r}]")
            continue
        if field.endswith("_ngrams"):
            for entry in value:
                if len(entry) != 2 or not (1 <= entry[0] <= _LONGEST and 0 <= entry[1] <= 1):
                    raise UserError(
                        f"{name}.{field} must be pairs of n (1 to {_LONGEST}) and a share of the characters "
                        f"(0 to 1), not {entry!r}"
                    )
        elif not isinstance(value, (int, float)) or value < 0:
            raise UserError(
                f"{name}.{field} must be a number of 0 or more, or None for no such rule, not {value!r}"
            )
    for low, high in (("min_words", "max_words"), ("min_mean_word_length", "max_mean_word_length")):
        if (
            settings.get(low) is not None
            and settings.get(high) is not None
            and settings[low] > settings[high]
        ):
            raise UserError(
                f"{name}.{low}={settings[low]} is more than {high}={settings[high]}: nothing would be kept"
            )


@dataclasses.dataclass(frozen=True)
class Gopher(_Rules):
    """Drops documents by the quality and repetition rules of Gopher (Rae et al. 2021, section A.1.1 and table
    A1), decided as datatrove 0.10's GopherQualityFilter and GopherRepetitionFilter do. None switches a rule
    off.

    Attributes:
      min_words: fewest words, not counting those of symbols alone.
      max_words: most.
      min_mean_word_length: characters.
      max_mean_word_length: characters.
      max_symbol_ratio: hash signs, or ellipses, for each word.
      max_bullet_lines: share of lines that begin with a bullet.
      max_ellipsis_lines: share of lines that end with an ellipsis.
      min_letter_words: share of words with a letter in them.
      min_stop_words: how many different stop words there must be.
      stop_words: these; None for the language's own.
      max_duplicate_lines: share of lines that are there before.
      max_duplicate_line_characters: their share of all characters.
      max_duplicate_paragraphs: the same of paragraphs.
      max_duplicate_paragraph_characters: the same of paragraphs.
      max_top_ngrams: n, and the largest share of characters in the most frequent n-gram of words.
      max_duplicate_ngrams: n, and the largest share of characters in n-grams that are there before.
      language: see ``_Rules``.
      languages: see ``_Rules``.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_mean_word_length: float | None = 3
    max_mean_word_length: float | None = 10
    max_symbol_ratio: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_letter_words: float | None = 0.8
    min_stop_words: int | None = 2
    stop_words: Sequence[str] | None = None
    max_duplicate_lines: float | None = 0.3
    max_duplicate_line_characters: float | None = 0.2
    max_duplicate_paragraphs: float | None = 0.3
    max_duplicate_paragraph_characters: float | None = 0.2
    max_top_ngrams: Sequence[tuple[int, float]] | None = ((2, 0.20), (3, 0.18), (4, 0.16))
    max_duplicate_ngrams: Sequence[tuple[int, float]] | None = (
        *((5, 0.15), (6, 0.14), (7, 0.13)),
        *((8, 0.12), (9, 0.11), (10, 0.10)),
    )

    def __call__(self, document: Document) -> Document | Drop:
        return self.check(document.text, document.language) or document

    def check(self, text: str, language: str = "") -> Drop | None:
        """Why the text is dropped, or None."""
        rule = self.settings(language)
        count = _Counts(text, language or self.language, rule)
        words = count["real_words"]
        length = count.ratio("real_characters", "real_words")
        found: list[Drop | None] = [
            _below("too few words", words, rule["min_words"]),
            _above("too many words", words, rule["max_words"]),
            _below("words too short", length, rule["min_mean_word_length"]) if words else None,
            _above("words too long", length, rule["max_mean_word_length"]),
            _above("too many hash signs", count.ratio("hashes", "words"), rule["max_symbol_ratio"]),
            _above("too many ellipses", count.ratio("ellipses", "words"), rule["max_symbol_ratio"]),
            _above("too many bullets", count.ratio("bullet_lines", "lines"), rule["max_bullet_lines"]),
            _above(
                "lines end in ellipses", count.ratio("ellipsis_lines", "lines"), rule["max_ellipsis_lines"]
            ),
            _below(
                "too few words with letters", count.ratio("letter_words", "words"), rule["min_letter_words"]
            ),
            _below("too few stop words", count["stop_words"], rule["min_stop_words"]),
        ]
        for unit, rest in (("paragraph", "paragraph"), ("run", "line")):
            share = count.ratio(f"repeated_{unit}s", f"{unit}s")
            characters = count.ratio(f"repeated_{unit}_characters", "characters")
            found += [
                _above(f"duplicate {rest}s", share, rule[f"max_duplicate_{rest}s"]),
                _above(
                    f"characters in duplicate {rest}s", characters, rule[f"max_duplicate_{rest}_characters"]
                ),
            ]
        found += [
            _above(f"frequent {n}-gram", count.top(n), most) for n, most in rule["max_top_ngrams"] or ()
        ]
        found += [
            _above(f"duplicate {n}-grams", count.repeated(n), most)
            for n, most in rule["max_duplicate_ngrams"] or ()
        ]
        return next(filter(None, found), None)


@dataclasses.dataclass(frozen=True)
class FineWeb(_Rules):
    """Drops documents by the rules that FineWeb added to Gopher's and C4's (Penedo et al. 2024, section 3.6),
    decided as datatrove 0.10's FineWebQualityFilter does. None switches a rule off.

    Attributes:
      min_ended_lines: smallest share of lines that end with a full stop, question or exclamation mark.
      allow_no_ended_lines: whether a share of 0 is good all the same.
      max_short_lines: largest share of lines of ``short_line_length`` characters or fewer.
      short_line_length: characters.
      max_duplicate_line_characters: largest share of characters in lines that are there before.
      max_line_feeds_per_word: more than so many make it a list.
      language: see ``_Rules``.
      languages: see ``_Rules``.
    """

    min_ended_lines: float | None = 0.12
    allow_no_ended_lines: bool = False
    max_short_lines: float | None = 0.67
    short_line_length: int = 30
    max_duplicate_line_characters: float | None = 0.01
    max_line_feeds_per_word: float | None = 0.3

    def __call__(self, document: Document) -> Document | Drop:
        return self.check(document.text, document.language) or document

    def check(self, text: str, language: str = "") -> Drop | None:
        """Why the text is dropped, or None."""
        rule = self.settings(language)
        count = _Counts(text, language or self.language, rule)
        if not count["full_lines"]:
            return Drop("empty")
        ended = count.ratio("ended_lines", "full_lines")
        repeated = count["repeated_line_characters"] / (count["characters"] - count["line_feeds"])
        found = (
            None
            if ended == 0 and rule["allow_no_ended_lines"]
            else _below("too few lines end in punctuation", ended, rule["min_ended_lines"]),
            _above("too many short lines", count.ratio("short_lines", "full_lines"), rule["max_short_lines"]),
            _above("characters in duplicate lines", repeated, rule["max_duplicate_line_characters"]),
            _above("a list", count.ratio("line_feeds", "words"), rule["max_line_feeds_per_word"]),
        )
        return next(filter(None, found), None)


_CITATIONS = re.compile(r"\[(?:\d*|edit|citation needed)\]")


@dataclasses.dataclass(frozen=True)
class C4(_Rules):
    """Removes lines that are no sentences, and drops documents of which too little is left: the rules of C4
    (Raffel et al. 2020, section 2.2), decided as datatrove 0.10's C4QualityFilter does. None switches a rule
    off. C4's list of bad words is another stage's.

    Attributes:
      min_sentences: fewest sentences in the lines kept.
      min_words_per_line: lines of fewer words are removed.
      max_word_length: lines with a longer word are.
      line_ends: lines that end otherwise are, and those that end with three dots; None for all.
      remove_citations: takes [1], [edit] and [citation needed] out of lines.
      drop_lorem_ipsum: drops documents with that phrase.
      drop_curly_bracket: drops documents with {, which are code.
      remove_javascript: removes lines with that word.
      policy_phrases: lines with any of these (in lower case) are removed.
      language: see ``_Rules``.
      languages: see ``_Rules``.
    """

    min_sentences: int | None = 5
    min_words_per_line: int | None = 3
    max_word_length: int | None = 1000
    line_ends: Sequence[str] | None = (".", "?", "!", '"', "'")
    remove_citations: bool = True
    drop_lorem_ipsum: bool = True
    drop_curly_bracket: bool = True
    remove_javascript: bool = True
    policy_phrases: Sequence[str] | None = (
        *("terms of use", "privacy policy", "cookie policy"),
        *("uses cookies", "use of cookies", "use cookies"),
    )

    def __call__(self, document: Document) -> Document | Drop:
        edited = self.edit(document.text, document.language)
        if isinstance(edited, Drop):
            return edited
        return document if edited == document.text else dataclasses.replace(document, text=edited)

    def edit(self, text: str, language: str = "") -> str | Drop:
        """The lines of the text that are kept, or why none is."""
        rule = self.settings(language)
        longest, fewest = rule["max_word_length"], rule["min_words_per_line"] or 0
        ends = None if rule["line_ends"] is None else tuple(rule["line_ends"])
        lower = text.lower()
        ipsum = rule["drop_lorem_ipsum"] and "lorem ipsum" in lower
        phrases = [phrase for phrase in rule["policy_phrases"] or () if phrase in lower]
        if rule["remove_javascript"] and "javascript" in lower:
            phrases.append("javascript")
        bracket = rule["drop_curly_bracket"] and "{" in text
        citations = rule["remove_citations"] and "[" in text
        kept = []
        for line in text.splitlines():
            line = line.strip()
            words = line.split()
            if longest is not None and len(line) > longest and max(map(len, words)) > longest:
                continue
            if citations:
                line = _CITATIONS.sub("", line)
            if ends is not None and (not line.endswith(ends) or line.endswith("...")):
                continue
            if len(words) < fewest:
                continue
            if ipsum and "lorem ipsum" in line.lower():
                return Drop("lorem ipsum")
            if phrases and any(phrase in line.lower() for phrase in phrases):
                # A line about JavaScript may have the bracket; one about cookies may not.
                script = rule["remove_javascript"] and "javascript" in line.lower()
                if bracket and "{" in line and not script:
                    return Drop("curly bracket")
                continue
            if bracket and "{" in line:
                return Drop("curly bracket")
            kept.append(line)
        edited = "\n".join(kept)
        sentences = _sentences(edited, language or self.language)
        if too_few := _below("too few sentences", sentences, rule["min_sentences"]):
            return too_few
        return edited.strip()


class _Counts:
    """The counts of one text under their names."""

    def __init__(self, text: str, language: str, rule: Mapping[str, Any]):
        from t5style.corpus import quality_kernels, quality_tables

        words = tuple(rule.get("stop_words") or ())
        wanted = _wanted(*(tuple(n for n, _ in rule.get(grams) or ()) for grams in _GRAMS))
        self._size = len(wanted)
        self._values = quality_kernels.measure(
            quality_tables.codes_of(text),
            *_splitting(language),
            _dictionary(words),
            quality_languages.base(language) in quality_languages.UNSPACED,
            rule.get("short_line_length", 30),
            wanted,
        ).tolist()

    def __getitem__(self, name: str) -> float:
        return self._values[_COUNTS[name]]

    def ratio(self, name: str, of: str) -> float:
        """One count over another; 0 where that is 0."""
        return self[name] / self[of] if self[of] else 0.0

    def top(self, n: int) -> float:
        """Share of the characters in the most frequent n-gram."""
        return self._values[len(_COUNTS) + n] / max(self["characters"], 1)

    def repeated(self, n: int) -> float:
        """Share of the characters in n-grams that are there before."""
        return self._values[len(_COUNTS) + self._size + n] / max(self["characters"], 1)


_GRAMS = ("max_top_ngrams", "max_duplicate_ngrams")
# In the order of ``quality_kernels.measure``.
_COUNTS = {
    name: place
    for place, name in enumerate(
        (
            *("characters", "words", "real_words", "real_characters", "letter_words", "hashes", "ellipses"),
            *("lines", "bullet_lines", "ellipsis_lines", "stop_words"),
            *("runs", "repeated_runs", "repeated_run_characters"),
            *("paragraphs", "repeated_paragraphs", "repeated_paragraph_characters"),
            *("full_lines", "ended_lines", "short_lines", "repeated_line_characters", "line_feeds"),
        )
    )
}


def _sentences(text: str, language: str) -> int:
    from t5style.corpus import quality_kernels, quality_tables

    unspaced = quality_languages.base(language) in quality_languages.UNSPACED
    return quality_kernels.sentences(quality_tables.codes_of(text), *_splitting(language), unspaced)


@functools.cache
def _splitting(language: str) -> tuple[Any, Any]:
    from t5style.corpus import quality_lookup

    return quality_lookup.splitting(quality_languages.base(language) == "en")


@functools.cache
def _published(stage: Any) -> Any:
    """The stage with its published settings."""
    return stage()


@functools.cache
def _wanted(top: tuple[int, ...], repeated: tuple[int, ...]) -> np.ndarray:
    """By n, what ``quality_kernels.measure`` counts of n-grams."""
    import numpy as np

    wanted = np.zeros(max((0, *top, *repeated)) + 1, np.uint8)
    wanted[list(top)] |= 1
    wanted[list(repeated)] |= 2
    return wanted


@functools.cache
def _dictionary(words: tuple[str, ...]) -> Any:
    from t5style.corpus import quality_lookup

    return quality_lookup.dictionary({word: i for i, word in enumerate(words)})


def _below(reason: str, value: float, least: float | None) -> Drop | None:
    return Drop(reason, f"{value:.4g} < {least:g}") if least is not None and value < least else None


def _above(reason: str, value: float, most: float | None) -> Drop | None:
    return Drop(reason, f"{value:.4g} > {most:g}") if most is not None and value > most else None


def _reason(drop: Drop | None) -> str | None:
    return drop.reason if drop else None
