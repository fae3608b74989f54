"""How well a vocabulary fits text, language by language.

Fertility and the share of continued words are those of Rust, Pfeiffer, Vulić, Ruder and Gurevych, "How good
is your tokenizer?" (2021, §4.3). How much they differ between languages says how unequally a model treats
them: in cost, and in how much text its context holds (Petrov, La Malfa, Torr and Bibi, "Language model
tokenizers introduce unfairness between languages", 2023).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from etils import epath

from t5style import console
from t5style.corpus import vocabulary as vocabulary_lib
from t5style.corpus.document import Document, document_files, read_documents
from t5style.corpus.vocabulary import Vocabulary
from t5style.run_dir import RunDir, UserError, atomic_write, fingerprint

REPORT = "vocabulary_report.json"
CHARACTERS = 1_000_000
_READ_CHARACTERS = 200_000_000  # after so many in all, no further language is waited for
_SHOWN = 30  # languages in the table on the console
_ENOUGH_WORDS = 500  # of a language, to compare its fertility with that of others
# Thai, Lao, Burmese, Khmer, kana, CJK ideographs: written without spaces between words.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


@dataclasses.dataclass(frozen=True)
class MeasureVocabulary:
    """Measures any vocabulary on the held-out documents of a corpus, and writes vocabulary_report.json.

    Attributes:
      vocabulary: folder or file of the vocabulary, such as a ``tokenizer.json``.
      corpus: run folder of ``Prepare``, or one folder or file of documents.
      split: split to measure on; ``train`` where it is not there.
      characters: to read of each language.
    """

    vocabulary: str = "run:vocabulary"
    corpus: str = "run:corpus"
    split: str = "validation"
    characters: int = CHARACTERS

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.characters < 1:
            raise UserError(f"characters must be 1 or more, not {self.characters}")

    def inputs(self) -> Sequence[str]:
        return [self.vocabulary, self.corpus]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes the report into ``run.path``.

        Returns:
          Figures: the vocabulary's size and fingerprint, and what ``measure`` says of all languages together.

        Raises:
          UserError: there is no vocabulary, or there are no documents.
        """
        vocabulary = vocabulary_lib.load(self.vocabulary)
        place = held_out(epath.Path(self.corpus), self.split, "train")
        report = measure(vocabulary, read_documents(place), self.characters)
        if not report["held_out_tokens"]:
            raise UserError(f"there is no text in {place} to measure a vocabulary on")
        figures = write_report(run, report, place.name)
        return {
            "vocab_size": vocabulary.vocab_size,
            "vocabulary_fingerprint": vocabulary.fingerprint,
            "fingerprint": fingerprint([vocabulary.fingerprint, report]),
            **figures,
        }


def held_out(corpus: epath.Path, *splits: str) -> epath.Path:
    """The folder of the first of these splits that the corpus has; the corpus itself where it has none.

    Raises:
      UserError: there are no documents.
    """
    place = next((corpus / split for split in splits if (corpus / split).is_dir()), corpus)
    document_files(place)
    return place


def measure(
    vocabulary: Vocabulary, documents: Iterable[Document], characters: int = CHARACTERS
) -> dict[str, Any]:
    """How well a vocabulary fits documents.

    Args:
      vocabulary: any.
      documents: their ``language`` is what the figures are kept apart by.
      characters: to read of each language. Reading ends after 200 million in all, and the last document
        read may be cut.

    Returns:
      Of everything that was read:
        held_out_tokens, bytes_per_token, characters_per_token.
        fertility: tokens per word (see ``words``), those for white space included.
        continued_share: of the words, each encoded alone, those that take two tokens or more.
        byte_token_share: of the tokens, those that spell in bytes a character which has no token.
        unknown_share: of the tokens, those that stand for what the vocabulary cannot say.
        changed: documents that decoding does not give back as they were; first_changed: the id of one.
        languages: the same for each language, with the number of its documents, characters and words, those
          with most characters first. words_are: "characters" where most of the text is in a script without
          spaces, so that fertility is tokens per character and is not compared with other languages'.
        fertility_ratio: the highest fertility over the lowest, fertility_worst and fertility_best: of which
          languages; where two or more have 500 words that can be compared.
    """
    languages: dict[str, _Counts] = collections.defaultdict(_Counts)
    read = 0
    changed = ""
    for document in documents:
        counts = languages[document.language or "unknown"]
        text = document.text[: characters - counts.characters]
        if text and not counts.add(vocabulary, text):
            changed = changed or document.id
        read += len(document.text)
        if read >= _READ_CHARACTERS:
            break
    rows: dict[str, dict[str, Any]] = {
        name: {"documents": counts.documents, "characters": counts.characters, "words": counts.words.total()}
        | {"words_are": "characters" if counts.unspaced() else "words"}
        | counts.figures(vocabulary)
        for name, counts in sorted(languages.items(), key=lambda item: -item[1].characters)
        if counts.documents
    }
    report: dict[str, Any] = {"held_out_tokens": sum(counts.tokens for counts in languages.values())}
    report |= sum(languages.values(), _Counts()).figures(vocabulary)
    if changed:
        report["first_changed"] = changed
    comparable = {
        name: row["fertility"]
        for name, row in rows.items()
        if row["words"] >= _ENOUGH_WORDS and row["words_are"] == "words" and name != "unknown"
    }
    if len(comparable) > 1:
        worst, best = max(comparable, key=comparable.__getitem__), min(comparable, key=comparable.__getitem__)
        report["fertility_ratio"] = comparable[worst] / comparable[best]
        report |= {"fertility_worst": worst, "fertility_best": best}
    return report | {"languages": rows}


def write_report(run: RunDir, report: dict[str, Any], measured_on: str) -> dict[str, Any]:
    """Writes ``measure``'s report into the run's folder and shows it; returns the figures of all languages
    together.
    """
    report = {"measured_on": measured_on} | report
    atomic_write(run.path / REPORT, json.dumps(report, ensure_ascii=False, indent=1) + "\n")
    rows = [
        (
            name if row["words_are"] == "words" else f"{name} (per character)",
            *(row[key] for key in ("documents", "words", "fertility", "continued_share")),
            *(row[key] for key in ("characters_per_token", "bytes_per_token")),
            *(row[key] for key in ("byte_token_share", "unknown_share")),
        )
        for name, row in report["languages"].items()
    ]
    columns = ["language", "documents", "words", "tokens per word", "continued words", "characters per token"]
    columns += ["bytes per token", "byte tokens", "unknown"]
    console.table(f"vocabulary on {measured_on}", columns, rows[:_SHOWN])
    if len(rows) > _SHOWN:
        console.say(f"{len(rows) - _SHOWN} more languages are in {run.path / REPORT}")
    if "fertility_ratio" in report:
        console.say(
            f"fertility differs {report['fertility_ratio']:.2f}-fold: {report['fertility_worst']} is split "
            f"most, {report['fertility_best']} least"
        )
    return {name: value for name, value in report.items() if name != "languages"}


def words(text: str) -> list[str]:
    """The words of a text: runs of letters, digits and their marks, and runs of other signs.

    In scripts that are written without spaces every character is a word, as in Unicode's Annex 29 for most
    of them where there is no dictionary.
    """
    return _words().findall(text)


@functools.cache
def _words() -> re.Pattern[str]:
    # Python's \w has no marks: without them a Hindi word would fall apart at its vowel signs.
    marks = "".join(chr(code) for code in range(0x300, 0x1F000) if unicodedata.category(chr(code))[0] == "M")
    marks += "\u200c\u200d\U000e0100-\U000e01ef"
    return re.compile(rf"[{_UNSPACED}][{marks}]*|(?:[^\W{_UNSPACED}]|[{marks}])+|[^\w\s{marks}]+")


@dataclasses.dataclass
class _Counts:
    """What is counted of one language, or several."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    byte_tokens: int = 0
    unknown: int = 0
    changed: int = 0
    # How often each word came, with a space before it where one stood.
    words: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def __add__(self, other: _Counts) -> _Counts:
        names = [field.name for field in dataclasses.fields(self)]
        return _Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def add(self, vocabulary: Vocabulary, text: str) -> bool:
        """Counts a text; returns whether the vocabulary gives it back as it was."""
        ids = vocabulary.encode(text)
        same = vocabulary.decode(ids) == text
        self.documents += 1
        self.characters += len(text)
        self.bytes += len(text.encode("utf-8", "replace"))
        self.tokens += len(ids)
        self.byte_tokens += sum(map(vocabulary.byte_ids.__contains__, ids))
        self.unknown += ids.count(vocabulary.unk_id)
        self.changed += not same
        self.words.update(_spaced_words(text))
        return same

    def unspaced(self) -> bool:
        single = re.compile(f" ?[{_UNSPACED}]")
        return 2 * sum(n for word, n in self.words.items() if single.match(word)) > self.words.total()

    def figures(self, vocabulary: Vocabulary) -> dict[str, float | int]:
        tokens, count = max(self.tokens, 1), max(self.words.total(), 1)
        return {
            "fertility": self.tokens / count,
            "continued_share": _continued(vocabulary, self.words) / count,
            "characters_per_token": self.characters / tokens,
            "bytes_per_token": self.bytes / tokens,
            "byte_token_share": self.byte_tokens / tokens,
            "unknown_share": self.unknown / tokens,
            "changed": self.changed,
        }


def _spaced_words(text: str) -> Iterator[str]:
    for match in _words().finditer(text):
        start = match.start()
        yield " " + match[0] if start and text[start - 1] == " " else match[0]


def _continued(vocabulary: Vocabulary, counted: collections.Counter[str]) -> int:
    """How many of the words take two tokens or more, a token that is nothing but the space not counted."""
    blank: dict[int, bool] = {}
    found = 0
    for (_, times), ids in zip(counted.items(), vocabulary.encode_batch(list(counted)), strict=True):
        if len(ids) > 1:
            first = int(ids[0])
            if first not in blank:
                blank[first] = not vocabulary.decode([first]).strip()
            found += times * (len(ids) - blank[first] > 1)
    return found
