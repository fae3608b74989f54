"""The record that passes between corpus stages, and its files: Parquet or (compressed) JSON lines.

Parquet files have one row per document with the columns ``text, id, source, url, license, language, time``
(strings) and ``meta`` (a JSON object as a string, because its keys differ from source to source), so that
Hugging Face datasets, Beam, Spark and DuckDB read them as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import numpy as np
import zstandard
from etils import epath

from t5style.corpus.locations import open_binary
from t5style.run_dir import UserError, expand

COLUMNS = ("text", "id", "source", "url", "license", "language", "time", "meta")
# Of a run folder, and no documents.
_OTHERS = ("dropped.jsonl", "clusters.jsonl", "quarantine.jsonl", "metrics.jsonl")
# What `open_lines` raises where what it reads is cut short or not compressed as its name says.
BROKEN_COMPRESSION = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError)
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
# A row group is what a reader holds in memory at once: bounded both in rows and in characters.
_GROUP_ROWS = 4096
_GROUP_CHARACTERS = 8 << 20


@dataclasses.dataclass(frozen=True)
class Document:
    """One text with where it comes from.

    Attributes:
      text: the text itself.
      id: unique within the corpus and stable from run to run (splits are drawn from it).
      source: name of the collection it comes from.
      url: where it can be found, a URL or a path.
      license: SPDX identifier or name of the licence, empty where unknown.
      language: ISO 639-1 code, empty where unknown.
      meta: further fields, JSON values only.
      time: when it was published or fetched, ISO 8601, empty where unknown.
    """

    text: str
    id: str
    source: str = ""
    url: str = ""
    license: str = ""
    language: str = ""
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    time: str = ""

    def to_json(self) -> dict[str, Any]:
        """The document as a JSON object; empty fields other than text and id are left out."""
        record: dict[str, Any] = {"id": self.id, "text": self.text}
        for name in COLUMNS[2:]:
            if value := getattr(self, name):
                record[name] = dict(value) if name == "meta" else value
        return record


def numbers(document: Document, field: str) -> dict[str, float]:
    """The finite numbers under this key of ``meta``, by name; whatever else is there is left out."""
    values = document.meta.get(field)
    if not isinstance(values, Mapping):
        return {}
    plain = {name: value for name, value in values.items() if type(value) in (int, float)}
    return {name: value for name, value in plain.items() if math.isfinite(value)}


def valid(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot say, replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def write_documents(path: epath.PathLike, documents: Iterable[Document], level: int = 3) -> int:
    """Writes documents to one file, in bounded memory; the file appears whole or not at all.

    Args:
      path: ends in .parquet, .jsonl, .jsonl.gz or .jsonl.zst.
      documents: any iterable, read once.
      level: of zstd compression, 1 (fast) to 22 (small), for .parquet and .zst.

    Returns:
      The number of documents written.

    Raises:
      UserError: the file name has another suffix.
      OSError: the file cannot be written; nothing is left behind.
    """
    path = epath.Path(path)
    _check_suffix(path)
    count = 0
    with DocumentWriter(path, level) as writer:
        for document in documents:
            writer.write(document)
            count += 1
    return count


class DocumentWriter:
    """Writes one file of documents piece by piece; it appears under its name when the ``with`` block ends
    well.
    """

    def __init__(self, path: epath.PathLike, level: int = 3):
        self.path = epath.Path(path)
        self._level = level
        _check_suffix(self.path)
        self._stack = contextlib.ExitStack()
        self._group: list[Document] = []
        self._characters = 0

    def __enter__(self) -> DocumentWriter:
        with contextlib.ExitStack() as stack:
            raw = stack.enter_context(atomic_open(self.path))
            if self.path.suffix == ".parquet":
                import pyarrow.parquet

                self._schema = pyarrow.schema([(name, pyarrow.large_string()) for name in COLUMNS])
                self._parquet = stack.enter_context(
                    pyarrow.parquet.ParquetWriter(
                        raw, self._schema, compression="zstd", compression_level=self._level
                    )
                )
            elif self.path.name.endswith(".gz"):
                # mtime 0: the same documents give the same bytes.
                self._lines: IO[bytes] = stack.enter_context(
                    gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0)  # type: ignore[arg-type]
                )
            elif self.path.name.endswith(".zst"):
                compressor = zstandard.ZstdCompressor(self._level)
                self._lines = stack.enter_context(compressor.stream_writer(raw, closefd=False))
            else:
                self._lines = raw
            self._stack = stack.pop_all()
        return self

    def write(self, document: Document) -> None:
        """Adds one document."""
        self._group.append(document)
        self._characters += len(document.text)
        if len(self._group) >= _GROUP_ROWS or self._characters >= _GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        group, self._group, self._characters = self._group, [], 0
        if not group:
            return
        if self.path.suffix == ".parquet":
            import pyarrow

            columns: dict[str, list[str]] = {
                name: [getattr(document, name) for document in group] for name in COLUMNS[:-1]
            }
            columns["meta"] = [json.dumps(dict(document.meta), ensure_ascii=False) for document in group]
            self._parquet.write_table(pyarrow.table(columns, schema=self._schema))
        else:
            for document in group:
                self._lines.write(json.dumps(document.to_json(), ensure_ascii=False).encode() + b"\n")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            try:
                self._flush()
            except BaseException as flush_error:
                self._stack.__exit__(type(flush_error), flush_error, flush_error.__traceback__)
                raise
        self._stack.__exit__(kind, error, trace)


class ShardWriter:
    """Writes documents to a folder's files ``documents-00000-of-00002.parquet`` and so on, a new one begun
    when one holds ``shard_bytes`` of text. Used in a ``with`` block; the files get their last names when it
    ends well.
    """

    def __init__(self, folder: epath.PathLike, shard_bytes: int):
        self._folder = epath.Path(folder)
        self._limit = shard_bytes
        self._room = 0
        self._paths: list[epath.Path] = []
        self._writer: DocumentWriter | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, document: Document) -> None:
        """Adds one document."""
        if self._writer is None or self._room <= 0:
            self._close(None, None, None)
            self._paths.append(self._folder / f"documents-{len(self._paths):05d}.parquet")
            self._writer = DocumentWriter(self._paths[-1]).__enter__()
            self._room = self._limit
        self._writer.write(document)
        self._room -= len(document.text.encode())

    def _close(self, kind: Any, error: Any, trace: Any) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.__exit__(kind, error, trace)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._close(kind, error, trace)
        if kind is None:
            for path in self._paths:
                path.rename(path.parent / f"{path.stem}-of-{len(self._paths):05d}.parquet")


def read_ids(path: epath.PathLike) -> Iterator[str]:
    """Ids of the documents of a Parquet file, without reading their texts."""
    import pyarrow.parquet

    with epath.Path(path).open("rb") as raw:
        for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(columns=["id"]):
            yield from batch.column(0).to_pylist()


def count_documents(path: epath.PathLike) -> int:
    """The number of documents in Parquet files, from their footers."""
    import pyarrow.parquet

    count = 0
    for file in document_files(path):
        with file.open("rb") as raw:
            count += pyarrow.parquet.ParquetFile(raw).metadata.num_rows
    return count


@contextlib.contextmanager
def atomic_open(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Opens a temporary sibling for writing; renames it to ``path`` on success, removes it on failure."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if "://" not in os.fspath(path):
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_array(path: epath.PathLike, values: np.ndarray) -> None:
    """Writes an array to a .npy file, which appears whole or not at all."""
    with atomic_open(path) as file:
        np.save(file, values)


def read_documents(path: epath.PathLike) -> Iterator[Document]:
    """Yields the documents of a file, of every document file of a folder, or of every file a pattern matches.

    Args:
      path: a .parquet, .jsonl, .jsonl.gz or .jsonl.zst file; a folder of them, such as a prepared corpus's
        ``train`` folder; or a glob pattern. Files are read in the order of their names.

    Raises:
      UserError: nothing is found there, or a file is not one of documents.
    """
    for file in document_files(path):
        yield from _read_file(file)


def document_files(path: epath.PathLike) -> list[epath.Path]:
    """The document files that ``read_documents`` reads for this path, sorted by name."""
    path = epath.Path(path)
    if path.is_dir():
        visible = [entry for entry in path.iterdir() if not entry.name.startswith((".", *_OTHERS))]
        files = sorted(entry for entry in visible if entry.name.endswith(_SUFFIXES))
        if not files:
            splits = sorted(entry.name for entry in visible if entry.is_dir())
            hint = f"; it has the folders {', '.join(splits)}: name one of them" if splits else ""
            raise UserError(f"no document files ({', '.join(_SUFFIXES)}) in the folder {path}{hint}")
        return files
    if path.exists():
        _check_suffix(path)
        return [path]
    if any(character in os.fspath(path) for character in "*?["):
        files = expand(path)
        if files:
            for file in files:
                _check_suffix(file)
            return files
    raise UserError(f"no documents at {path}: no such file or folder")


def _check_suffix(path: epath.Path) -> None:
    if not path.name.endswith(_SUFFIXES):
        raise UserError(f"{path} is not a document file: its name must end in one of {', '.join(_SUFFIXES)}")


def _read_file(path: epath.Path) -> Iterator[Document]:
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    number = 0
    try:
        with open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    yield Document(**{name: record[name] for name in COLUMNS if name in record})
                except (ValueError, TypeError) as error:
                    raise UserError(f"{path}, line {number}: not a document in JSON ({error})") from error
    except BROKEN_COMPRESSION as error:
        raise UserError(
            f"{path} cannot be decompressed after line {number} ({type(error).__name__}: {error}); it is cut "
            "short, or of another kind than its name says: copy or make it again"
        ) from error


def read_rows(path: epath.Path, first: int) -> Iterator[Document]:
    """Documents of a Parquet file from row `first` on; row groups before it are not read."""
    return _read_parquet(path, first)


def _read_parquet(path: epath.Path, first: int = 0) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as raw:
            file = pyarrow.parquet.ParquetFile(raw)
            if missing := [name for name in ("text", "id") if name not in file.schema_arrow.names]:
                raise UserError(
                    f"{path} has no column {missing[0]!r} (its columns: {', '.join(file.schema_arrow.names)})"
                )
            present = [name for name in COLUMNS if name in file.schema_arrow.names]
            groups: list[int] = []
            for group in range(file.metadata.num_row_groups):
                if not groups and first >= (rows := file.metadata.row_group(group).num_rows):
                    first -= rows
                else:
                    groups.append(group)
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=present):
                batch, first = batch[first:], max(0, first - len(batch))
                for row in batch.to_pylist():
                    if "meta" in row:
                        row["meta"] = json.loads(row["meta"] or "{}")
                    yield Document(**row)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from error


class _ZstdReader(io.RawIOBase):
    """What is inside a zstd file of one or more frames, in pieces of bounded size: a few bytes can stand for
    gigabytes. Raises EOFError where the file was cut off, at which zstandard's stream_reader ends quietly.
    """

    def __init__(self, raw: IO[bytes]):
        import pyarrow

        self._inside = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._inside.read(len(buffer))
        except OSError as error:
            if error.errno is not None:  # the file's own error, not Arrow's about what it holds
                raise
            if "runcated" in str(error):
                raise EOFError("the file ends inside a zstd frame") from None
            raise zstandard.ZstdError(str(error)) from None
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def open_lines(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Opens a plain, .gz or .zst file, local or of a store that fsspec knows, as a binary stream of what is
    inside it; it can be iterated by line.
    """
    name = os.fspath(path)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(open_binary(name))
        if name.endswith(".gz"):
            yield stack.enter_context(gzip.GzipFile(fileobj=raw, mode="rb"))  # type: ignore[arg-type]
        elif name.endswith(".zst"):
            yield stack.enter_context(io.BufferedReader(_ZstdReader(raw), 1 << 20))
        else:
            yield raw
