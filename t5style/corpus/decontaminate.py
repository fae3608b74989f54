"""Decontamination: documents that share word n-grams with evaluation data are dropped, or these cut out.

As for GPT-3 (Brown et al. 2020, appendix C): 13-grams of words, case and punctuation apart; an evaluation
text of fewer words counts as a whole, but not one of fewer than 8, which says too little.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import itertools
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from t5style.corpus import locations
from t5style.corpus.document import BROKEN_COMPRESSION, Document, open_lines
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
_EXCERPT = 120  # characters of a match that a dropped document's detail shows


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """The n-grams of evaluation texts.

    Attributes:
      lengths: int64, ascending: how many words they have.
      hashes: uint64 [n], sorted, each once.
      bits: uint64 [2**b]: two bits for each hash (Bloom 1970), so that most others need not be looked for.
      sources: int32 [n], of each hash the place in ``names`` of the first text that has it.
      names: where texts are from.
    """

    lengths: np.ndarray
    hashes: np.ndarray
    bits: np.ndarray
    sources: np.ndarray
    names: tuple[str, ...]


class Overlap(NamedTuple):
    """A passage whose n-grams are in an index: characters ``start`` to ``end`` of the text, and where its
    first n-gram is from.
    """

    start: int
    end: int
    source: str


def build(
    texts: Iterable[str], ngram: int = 13, min_words: int = 8, names: Iterable[str] | None = None
) -> Index:
    """Makes an index of all word n-grams of the texts.

    Args:
      texts: evaluation texts, read once.
      ngram: words in an n-gram. A text of fewer is one by itself.
      min_words: texts of fewer words are left out.
      names: where each text is from; without, all are from "".
    """
    from t5style.corpus import words

    if not 1 <= min_words <= ngram <= 1000:
        raise UserError(
            f"1 <= min_words <= ngram <= 1000 must hold, but min_words is {min_words} and ngram {ngram}"
        )
    numbers: dict[str, int] = {}
    parts: list[np.ndarray] = []
    sources: list[int] = []
    lengths: set[int] = set()
    for text, name in zip(texts, itertools.repeat("") if names is None else names, strict=names is not None):
        hashes = words.split(words.utf8(text), words.table())[0]
        length = min(len(hashes), ngram)
        if length >= min_words:
            lengths.add(length)
            parts.append(words.runs(hashes, length))
            sources.append(numbers.setdefault(name, len(numbers)))
    every = np.concatenate([np.empty(0, np.uint64), *parts])
    origin = np.repeat(np.array(sources, np.int32), [len(part) for part in parts])
    distinct, first = np.unique(every, return_index=True)
    # Two of a word's 64 bits for each hash, 16 bits or more of space for it: of the hashes that are not in
    # the index, fewer than one in 50 are looked for in vain.
    width = max(6, int(16 * len(distinct)).bit_length())
    bits = np.zeros(1 << (width - 6), np.uint64)
    top = distinct >> np.uint64(64 - width)
    np.bitwise_or.at(bits, top >> np.uint64(6), _bit(top) | _bit(distinct))
    return Index(np.array(sorted(lengths), np.int64), distinct, bits, origin[first], tuple(numbers))


def _bit(number: np.ndarray) -> np.ndarray:
    return np.uint64(1) << (number & np.uint64(63))


def _matches(text: str, index: Index) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of the text, where its words start and end, and what ``lookup`` finds, by first word."""
    from t5style.corpus import dedup_kernels, words

    data = words.utf8(text)
    hashes, starts, ends = words.split(data, words.table())
    found = dedup_kernels.lookup(hashes, index.lengths, index.hashes, index.bits)
    return data, starts, ends, found[np.argsort(found[:, 0], kind="stable")]


def overlaps(text: str, index: Index) -> list[Overlap]:
    """The passages of a text whose n-grams are in the index.

    N-grams that overlap, or follow one another, make one passage.
    """
    data, starts, ends, found = _matches(text, index)
    if not len(found):
        return []
    raw = data.tobytes()
    result: list[Overlap] = []
    character = byte = 0
    for first, last, place in _merged(found):
        start = character + len(_decode(raw[byte : starts[first]]))
        character = start + len(_decode(raw[starts[first] : ends[last]]))
        byte = ends[last]
        result.append(Overlap(start, character, index.names[index.sources[place]]))
    return result


def _merged(found: np.ndarray) -> list[tuple[int, int, int]]:
    """(first word, last word, place of the first n-gram in the index) of each passage."""
    merged: list[tuple[int, int, int]] = []
    for first, length, place in found.tolist():
        if merged and first <= merged[-1][1] + 1:
            start, last, known = merged[-1]
            merged[-1] = (start, max(last, first + length - 1), known)
        else:
            merged.append((first, first + length - 1, place))
    return merged


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """Drops documents that share n-grams of words with evaluation data, or cuts the passages out.

    Attributes:
      files: evaluation data: files, folders or patterns of .jsonl, .json (also in SQuAD's format), .csv,
        .tsv, .txt and .parquet, plain, .gz or .zst (not .parquet), and .zip files of these.
      ngram: words in an n-gram; a shorter text counts as a whole.
      fields: names of the fields (at any depth), or columns, whose strings count; empty: all.
      action: "drop", or "remove": cuts out what matches with ``context`` characters on either side, leaves
        out pieces shorter than ``context``, and drops the document where more than ``max_pieces`` would be
        left (Brown et al. 2020 take 200 characters and 10 pieces).
      max_overlap: a document may share this many n-grams.
      min_words: evaluation texts of fewer words are left out.
      context: see ``action``.
      max_pieces: see ``action``.
    """

    files: Sequence[str]
    ngram: int = 13
    fields: Sequence[str] = ()
    action: str = "drop"
    max_overlap: int = 0
    min_words: int = 8
    context: int = 200
    max_pieces: int = 10

    def __post_init__(self) -> None:
        for name in ("files", "fields"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise UserError(f"Decontaminate.{name} must be a list of strings, not {value!r}")
            object.__setattr__(self, name, tuple(value))
        if not self.files:
            raise UserError("Decontaminate.files is empty: name the evaluation files")
        if self.action not in ("drop", "remove"):
            raise UserError(f"Decontaminate.action must be 'drop' or 'remove', not {self.action!r}")
        if not 1 <= self.min_words <= self.ngram <= 1000:
            raise UserError(
                "Decontaminate: 1 <= min_words <= ngram <= 1000 must hold, but min_words is "
                f"{self.min_words} and ngram {self.ngram}"
            )
        for name, least in (("max_overlap", 0), ("context", 0), ("max_pieces", 1)):
            if getattr(self, name) < least:
                raise UserError(f"Decontaminate.{name} must be {least} or more, not {getattr(self, name)}")

    def inputs(self) -> Sequence[str]:
        """The files that decide what is left out."""
        return self.files

    def __call__(self, document: Document) -> Document | Drop:
        index = _index(tuple(self.files), self.ngram, tuple(self.fields), self.min_words)
        data, starts, ends, found = _matches(document.text, index)
        if len(found) <= self.max_overlap:
            return document
        raw = data.tobytes()
        passages = _merged(found)
        first, last, place = passages[0]
        excerpt = _decode(raw[starts[first] : ends[last]])
        if len(excerpt) > _EXCERPT:
            excerpt = excerpt[: _EXCERPT - 1] + "…"
        detail = f"{len(found)} n-grams, first in {index.names[index.sources[place]]}: {excerpt}"
        if self.action == "drop":
            return Drop("overlaps evaluation data", detail)
        pieces = []
        begin = 0
        for first, last, _ in passages:
            pieces.append(_decode(raw[begin : starts[first]]))
            begin = ends[last]
        pieces.append(_decode(raw[begin:]))
        if n := self.context:
            pieces = [pieces[0][:-n], *(piece[n:-n] for piece in pieces[1:-1]), pieces[-1][n:]]
        pieces = [piece.strip() for piece in pieces]
        pieces = [piece for piece in pieces if piece and len(piece) >= self.context]
        if not pieces or len(pieces) > self.max_pieces:
            return Drop("overlaps evaluation data", f"{len(pieces)} pieces would be left; {detail}")
        return dataclasses.replace(document, text="\n\n".join(pieces))


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


@functools.cache
def _index(files: tuple[str, ...], ngram: int, fields: tuple[str, ...], min_words: int) -> Index:
    names: list[str] = []

    def texts() -> Iterator[str]:
        for entry in locations.find(files):
            any_text = False
            for text in read_texts(entry.path, fields):
                any_text = True
                names.append(entry.id)
                yield text
            if not any_text:
                wanted = f" in the fields {', '.join(fields)}" if fields else ""
                raise UserError(f"Decontaminate: there is no text{wanted} in {entry.path}")

    every = list(texts())
    index = build(every, ngram, min_words, names)
    if not len(index.hashes):
        raise UserError(
            f"Decontaminate: none of the {len(every)} texts in {', '.join(files)} has {min_words} words or "
            "more; set min_words lower to look for shorter ones"
        )
    return index


def read_texts(path: str, fields: Sequence[str] = ()) -> Iterator[str]:
    """Every string in a file of evaluation data.

    Args:
      path: see ``Decontaminate.files``. A .txt file is one text for each paragraph.
      fields: only strings under these names.

    Raises:
      UserError: the file's kind is not known, or it is not what its name says.
    """
    inner = path.removesuffix(".gz").removesuffix(".zst")
    try:
        if path.endswith((".parquet", ".zip")):
            with locations.open_binary(path) as file:
                if path.endswith(".parquet"):
                    yield from _read(file, path, fields)
                else:
                    yield from _read_zip(file, path, fields)
        else:
            with open_lines(path) as lines:
                yield from _read(lines, inner, fields)
    except (ValueError, csv.Error, zipfile.BadZipFile, RecursionError, *BROKEN_COMPRESSION) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"evaluation data cannot be read from {path}: {error}") from error


def _read_zip(file: IO[bytes], path: str, fields: Sequence[str]) -> Iterator[str]:
    with zipfile.ZipFile(file) as archive:
        members = sorted(name for name in archive.namelist() if name.endswith(_SUFFIXES))
        # What macOS adds beside each file.
        members = [name for name in members if not name.split("/")[-1].startswith("._")]
        if not members:
            raise UserError(f"{path} has no member whose name ends in {', '.join(_SUFFIXES)}")
        for name in members:
            with archive.open(name) as member:
                yield from _read(member, name, fields)


def _read(file: IO[bytes], name: str, fields: Sequence[str]) -> Iterator[str]:
    wanted = frozenset(fields)
    if name.endswith(".jsonl"):
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{name}, line {number}: not JSON ({error})") from error
                yield from _strings(value, wanted)
    elif name.endswith(".json"):
        yield from _strings(json.load(file), wanted)
    elif name.endswith((".csv", ".tsv")):
        lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
        for row in csv.DictReader(lines, delimiter="\t" if name.endswith(".tsv") else ","):
            yield from _strings(row, wanted)
    elif name.endswith(".txt"):
        paragraph: list[str] = []
        for row_text in io.TextIOWrapper(file, "utf-8-sig"):
            if row_text.strip():
                paragraph.append(row_text)
            elif paragraph:
                yield "".join(paragraph)
                paragraph = []
        if paragraph:
            yield "".join(paragraph)
    elif name.endswith(".parquet"):
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield from _strings(row, wanted)
    else:
        raise UserError(f"evaluation data in {name}: its name must end in {', '.join(_SUFFIXES)} or .zip")


def _strings(value: Any, fields: frozenset[str]) -> Iterator[str]:
    """All strings in it, or those under names in ``fields``."""
    if isinstance(value, str):
        if not fields:
            yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(item, frozenset() if name in fields else fields)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, fields)
