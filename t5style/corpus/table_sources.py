"""Files of many records: JSON lines, Parquet, and tables of comma- or tab-separated values."""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import IO, Any

from t5style.corpus import charset, records
from t5style.corpus.document import BROKEN_COMPRESSION, Document, open_lines, valid
from t5style.corpus.locations import open_binary
from t5style.corpus.parts import (
    PIECE_BYTES,
    FileSource,
    Quarantined,
    check_paths,
    check_positive,
    suffix,
)
from t5style.run_dir import UserError

_STEP = 1 << 20
_UNPACKED = 1 << 30  # bytes of a Parquet file inside .gz or .zst


def _check(source: Any, name: str) -> None:
    check_paths(source.paths, name)
    check_positive(source.max_bytes, f"{name}.max_bytes")
    if not source.text_field:
        raise UserError(f"{name}.text_field is empty: name the field that holds the text")


@dataclasses.dataclass(frozen=True)
class JsonLines(FileSource):
    """JSON lines (.jsonl, also .gz or .zst): each line is an object that holds a document (see
    `records.document`).

    A document without an id of its own is named by its file and the byte at which its line begins (in what is
    inside a compressed file), which is the same however a file is shared out: ``jsonl/x.jsonl:byte1234``.

    Attributes:
      paths: files, folders or patterns; of a folder, all it holds.
      text_field: key of the text.
      id_field: key of the id.
      source: name of the collection, for documents that do not name theirs.
      license: licence, for documents that do not name theirs.
      language: language, for documents that do not name theirs.
      max_bytes: longer lines are quarantined.
    """

    paths: Sequence[str]
    text_field: str = "text"
    id_field: str = "id"
    source: str = "jsonl"
    license: str = ""
    language: str = ""
    max_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        _check(self, "JsonLines")

    def pieces(self, path: str, size: int) -> list[tuple[int, int, int]]:
        """(first byte, last byte + 1, bytes): a piece has the lines that begin in it."""
        if path.endswith((".gz", ".zst")):
            return []
        borders = [*range(0, size - PIECE_BYTES // 2, PIECE_BYTES), size]
        return [(start, end, end - start) for start, end in itertools.pairwise(borders)]

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        with open_lines(path) as file:
            head = file.read(4)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
            yield Quarantined(path, "byte 0", "not utf-8", "a mark of UTF-16 or 32; JSON lines are UTF-8")
            return
        yield from self.read_piece(path, id, 0, None)

    def read_piece(self, path: str, id: str, start: int, end: int | None) -> Iterator[Document | Quarantined]:
        """The lines that begin at byte ``start`` or after it and before ``end``."""
        number, at = 0, start  # lines read, and the byte after them
        cut = start > 0 or end is not None

        def place() -> str:
            return f"line at byte {at}" if cut else f"line {number}"

        try:
            with open_lines(path) as file:
                if start:
                    file.seek(start - 1)
                    at = start - 1 + _skip_line(file, start - 1, end)
                while (end is None or at < end) and (line := file.readline(self.max_bytes + 1)):
                    number += 1
                    length = len(line)
                    if length > self.max_bytes and not line.endswith(b"\n"):
                        yield Quarantined(path, place(), "too large", f"over {self.max_bytes} bytes")
                        length += _skip_line(file, at + length, end)
                    elif line.strip():
                        if at == 0:
                            line = line.removeprefix(codecs.BOM_UTF8)
                        record = records.from_json(line)
                        if isinstance(record, Quarantined):
                            yield dataclasses.replace(record, file=path, position=place())
                        else:
                            yield records.document(record, self, path, f"{id}:byte{at}", place())
                    at += length
        except BROKEN_COMPRESSION as error:
            detail = f"{type(error).__name__}: {error}"
            yield Quarantined(path, f"after line {number}", "broken compression", detail)


def _skip_line(file: IO[bytes], at: int, end: int | None) -> int:
    """Reads on from byte ``at`` past the end of the line, or to ``end``; returns the number of bytes read."""
    length = 0
    while end is None or at + length < end:
        piece = file.readline(_STEP if end is None else min(_STEP, end - at - length))
        length += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return length


@dataclasses.dataclass(frozen=True)
class ParquetFiles(FileSource):
    """Parquet files: each row is a document (see `records.document`), named by its row where it has no id:
    ``parquet/x.parquet:row7``, counted from 0. Columns of bytes other than the text are not read.

    Attributes:
      paths: files, folders or patterns; of a folder, all it holds.
      text_field: column of the text.
      id_field: column of the id.
      source: name of the collection, for documents that do not name theirs.
      license: licence, for documents that do not name theirs.
      language: language, for documents that do not name theirs.
      columns: those that are read besides text and id; empty for all.
      max_bytes: longer texts are quarantined.
    """

    paths: Sequence[str]
    text_field: str = "text"
    id_field: str = "id"
    source: str = "parquet"
    license: str = ""
    language: str = ""
    columns: Sequence[str] = ()
    max_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        _check(self, "ParquetFiles")

    def pieces(self, path: str, size: int) -> list[tuple[int, int, int]]:
        """(first row group, last + 1, bytes in the file)."""
        import pyarrow

        try:
            with open_binary(path) as raw:
                metadata = _parquet(raw).metadata
                groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
                sizes = [
                    sum(group.column(column).total_compressed_size for column in range(group.num_columns))
                    for group in groups
                ]
        except (pyarrow.ArrowException, OSError):
            return []  # reading it will say what is wrong
        found: list[tuple[int, int, int]] = []
        start = total = 0
        for index, bytes_ in enumerate(sizes):
            total += bytes_
            if total >= PIECE_BYTES or index == len(sizes) - 1:
                found.append((start, index + 1, max(total, 1)))
                start, total = index + 1, 0
        return found

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        yield from self.read_piece(path, id, 0, None)

    def read_piece(self, path: str, id: str, start: int, end: int | None) -> Iterator[Document | Quarantined]:
        """The rows of row groups ``start`` to ``end`` - 1."""
        import pyarrow

        row: int | None = None  # the next to be read
        try:
            with open_lines(path) as raw:
                if path.endswith((".gz", ".zst")):
                    # Parquet is read from its end, which a compressed stream cannot be: it is held whole.
                    data = raw.read(_UNPACKED + 1)
                    if len(data) > _UNPACKED:
                        yield Quarantined(path, "", "too large", "unpack it: Parquet has its own compression")
                        return
                    raw = io.BytesIO(data)
                file = _parquet(raw)
                schema = file.schema_arrow
                if self.text_field not in schema.names:
                    yield Quarantined(
                        path,
                        "",
                        "no text column",
                        f"{self.text_field!r} is none of {', '.join(schema.names)}",
                    )
                    return
                groups = range(start, file.num_row_groups if end is None else end)
                row = sum(file.metadata.row_group(index).num_rows for index in range(start))
                batches = file.iter_batches(64, row_groups=list(groups), columns=self._columns(schema))
                for batch in batches:
                    for offset in range(batch.num_rows):
                        yield self._row(batch, offset, path, id, row)
                        row += 1
        except (pyarrow.ArrowException, OSError) as error:
            where = "" if row is None else f"after row {row - 1}"
            yield Quarantined(path, where, "damaged Parquet", valid(str(error)))

    def _columns(self, schema: Any) -> list[str]:
        from pyarrow import types

        wanted = {self.text_field, self.id_field, *self.columns}
        chosen = [
            field.name
            for field in schema
            if field.name == self.text_field
            or (
                (not self.columns or field.name in wanted)
                and not types.is_binary(field.type)
                and not types.is_large_binary(field.type)
            )
        ]
        return chosen

    def _row(self, batch: Any, offset: int, path: str, id: str, row: int) -> Document | Quarantined:
        record = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                value = column[offset].as_py()
                if name == self.text_field and isinstance(value, bytes):
                    value = value.decode()
            except UnicodeDecodeError as error:
                detail = f"column {name!r}: {error.reason}"
                return Quarantined(path, f"row {row}", "not utf-8", detail)
            if value is not None:
                record[name] = value if name in records.TIMES else records.plain(value)
        text = record.get(self.text_field)
        if isinstance(text, str) and len(text) > self.max_bytes:
            return Quarantined(path, f"row {row}", "too large", f"over {self.max_bytes}")
        result = records.document(record, self, path, f"{id}:row{row}", f"row {row}")
        if isinstance(result, Document):  # a time that is none stays in meta
            return dataclasses.replace(result, meta=records.plain(result.meta))
        return result


def _parquet(raw: Any) -> Any:
    import pyarrow.parquet

    # A small buffer and nothing read ahead: else a whole row group's columns would be held as bytes.
    return pyarrow.parquet.ParquetFile(raw, buffer_size=_STEP, pre_buffer=False)


@dataclasses.dataclass(frozen=True)
class CsvFiles(FileSource):
    """Tables of comma- or tab-separated values (RFC 4180): each row is a document (see `records.document`),
    named by the line on which it begins where it has no id: ``csv/x.csv:line3``.

    A row that is quoted wrongly, or has more or fewer fields than the header, is quarantined, and reading
    goes on with the line after its first.

    Attributes:
      paths: files, folders or patterns; of a folder, all it holds.
      text_field: column of the text.
      id_field: column of the id.
      source: name of the collection, for documents that do not name theirs.
      license: licence, for documents that do not name theirs.
      language: language, for documents that do not name theirs.
      columns: names of the columns; empty where the first line has them.
      delimiter: between fields; empty for a tab in .tsv and .tab files and a comma in others.
      quote: around fields that hold delimiters or line ends; empty where quotes are part of the text.
      encoding: of the files; "detect" finds it out from the first megabyte of each.
      max_bytes: rows of more characters are quarantined.
    """

    paths: Sequence[str]
    text_field: str = "text"
    id_field: str = "id"
    source: str = "csv"
    license: str = ""
    language: str = ""
    columns: Sequence[str] = ()
    delimiter: str = ""
    quote: str = '"'
    encoding: str = charset.DETECT
    max_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        _check(self, "CsvFiles")
        charset.check(self.encoding, "CsvFiles")
        for name, value in (("delimiter", self.delimiter), ("quote", self.quote)):
            if len(value) > 1 or value in ("\n", "\r"):
                raise UserError(f"CsvFiles.{name} must be one character, not {value!r}")
        if self.columns and self.text_field not in self.columns:
            raise UserError(
                f"CsvFiles.text_field {self.text_field!r} is none of columns {', '.join(self.columns)}"
            )

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        with open_lines(path) as file:
            head = file.read(_STEP)
        encoding = self.encoding
        try:
            if encoding == charset.DETECT:
                encoding = charset.sniff(head, len(head) < _STEP)
            elif b"\0" in head and not encoding.lower().startswith(("utf-16", "utf-32", "utf_16", "utf_32")):
                raise charset.Undecodable(head.find(b"\0"), "binary file", "a zero byte")
        except charset.Undecodable as error:
            yield Quarantined(path, f"byte {error.offset}", error.reason, error.detail)
            return
        number = 0
        try:
            with open_lines(path) as file:
                wide = encoding.lower().startswith(("utf-16", "utf-32"))
                # Of a wrong byte no other line suffers: its row is found by the lone surrogate that marks it.
                lines = io.TextIOWrapper(
                    file, encoding, errors="replace" if wide else "surrogateescape", newline=""
                )
                for number, item in self._rows(lines, path):
                    if isinstance(item, Quarantined):
                        yield item
                    else:
                        record = {name: value for name, value in item.items() if value != ""}
                        record.setdefault(self.text_field, "")
                        place = f"line {number}"
                        result = records.document(record, self, path, f"{id}:line{number}", place)
                        if encoding != "utf-8" and isinstance(result, Document):
                            result = dataclasses.replace(
                                result, meta={"encoding": encoding} | dict(result.meta)
                            )
                        yield result
                lines.detach()
        except BROKEN_COMPRESSION as error:
            detail = f"{type(error).__name__}: {error}"
            yield Quarantined(path, f"after line {number}", "broken compression", detail)

    def _rows(self, lines: Any, path: str) -> Iterator[tuple[int, dict[str, str] | Quarantined]]:
        """Line number and either the fields of the row or what is wrong with it."""
        # The csv module's limit is of the process and meant against memory: `max_bytes` is ours.
        csv.field_size_limit(max(csv.field_size_limit(), self.max_bytes + 2))
        feed = _Feed(lines, self.max_bytes)
        options: dict[str, Any] = {
            "delimiter": self.delimiter or ("\t" if suffix(path) in (".tsv", ".tab") else ","),
            "strict": True,
        }
        if self.quote:
            options["quotechar"] = self.quote
        else:
            options["quoting"] = csv.QUOTE_NONE
        names: Sequence[str] = self.columns
        while True:
            number = feed.begin()
            try:
                row = next(csv.reader(feed, **options))
            except StopIteration:
                return
            except _TooLong:
                yield number, Quarantined(path, f"line {number}", "too large", f"over {self.max_bytes}")
                feed.go_back()
                continue
            except csv.Error as error:
                yield number, Quarantined(path, f"line {number}", "broken quoting", str(error))
                feed.go_back()
                continue
            if not row:
                continue
            text = "".join(row)
            if "\0" in text:
                yield number, Quarantined(path, f"line {number}", "binary row", "a zero byte")
            elif valid(text) != text:
                yield number, Quarantined(path, f"line {number}", "not utf-8", "set encoding")
            elif not names:
                names = [name.strip() for name in row]
                names = [names[0].removeprefix("\ufeff"), *names[1:]]
                if self.text_field not in names:
                    detail = f"{self.text_field!r} is none of {', '.join(names)}"
                    yield number, Quarantined(path, f"line {number}", "no text column", detail[:1000])
                    return
            elif len(row) != len(names):
                detail = f"{len(row)} instead of {len(names)}"
                yield number, Quarantined(path, f"line {number}", "wrong number of fields", detail)
            else:
                yield number, dict(zip(names, row, strict=True))


class _TooLong(Exception):
    """A row is longer than may be held."""


class _Feed:
    """Lines for the csv module that can be taken back, so that one stray quote costs one line."""

    def __init__(self, lines: Any, limit: int):
        self._lines, self._limit = lines, limit
        self._given: list[str] = []  # lines of this row
        self._waiting: list[str] = []  # lines taken back, the last first
        self._number = 1  # of the row's first line

    def begin(self) -> int:
        """Begins a row; returns the number of its first line."""
        self._number += len(self._given)
        self._given = []
        self._room = self._limit
        return self._number

    def go_back(self) -> None:
        """Gives all lines of this row but its first again."""
        self._waiting.extend(reversed(self._given[1:]))
        self._given = self._given[:1]

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.pop() if self._waiting else self._lines.readline(self._limit + 1)
        if not line:
            raise StopIteration
        self._given.append(line)
        self._room -= len(line)
        if self._room < 0:
            if len(line) > self._limit and not line.endswith(("\n", "\r")):
                self._given[-1] = ""
                while (line := self._lines.readline(_STEP)) and not line.endswith(("\n", "\r")):
                    pass
            raise _TooLong
        return line
