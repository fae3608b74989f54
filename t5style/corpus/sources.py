"""Where documents come from: every source by its name.

A source lists its parts, one per file or piece of a large file; a part is read on its own, in any process,
and yields documents and, for what cannot be read, ``Quarantined``: a bad file, line, row or record is
counted and reported with its place, never fatal, never silently lost.

A document's id is stable: its own where it has one, else ``source/file`` for a file that is one document and
``source/file:byte17``, ``:row7`` or ``:line3`` for one of many, none of which depends on how files are
shared out to workers. ``meta["file"]`` says which file it is from and ``meta["position"]`` where in it if
the id does not; ``meta["encoding"]`` what the file was read as, if not UTF-8. The time is what the record
says, else empty: files' own dates say when they were copied.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import os
from collections.abc import Iterator, Sequence
from typing import Any

from t5style.corpus.document import Document, open_lines
from t5style.corpus.hub_sources import HuggingFace, TensorFlowDatasets
from t5style.corpus.locations import Entry
from t5style.corpus.parts import (
    FileSource,
    Part,
    Quarantined,
    Reader,
    Source,
    check_paths,
    plain_name,
    suffix,
)
from t5style.corpus.records import from_json
from t5style.corpus.table_sources import CsvFiles, JsonLines, ParquetFiles
from t5style.corpus.text_sources import PdfFiles, TextFiles, is_text
from t5style.corpus.web_sources import HtmlFiles, WarcFiles
from t5style.run_dir import UserError

__all__ = [
    "CsvFiles",
    "Files",
    "HtmlFiles",
    "HuggingFace",
    "JsonLines",
    "ParquetFiles",
    "Part",
    "PdfFiles",
    "Quarantined",
    "Reader",
    "Samples",
    "Source",
    "TensorFlowDatasets",
    "TextFiles",
    "WarcFiles",
]

_KINDS: dict[str, Any] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), JsonLines),
    **dict.fromkeys((".parquet", ".pq"), ParquetFiles),
    **dict.fromkeys((".csv", ".tsv", ".tab"), CsvFiles),
    **dict.fromkeys((".html", ".htm", ".xhtml", ".shtml"), HtmlFiles),
    **dict.fromkeys((".warc", ".wet"), WarcFiles),
    ".pdf": PdfFiles,
}


@dataclasses.dataclass(frozen=True)
class Files(FileSource):
    """Files of any known kind, told by their names and read with the defaults of their sources: text,
    Markdown and code (TextFiles), JSON lines, Parquet, CSV and TSV, HTML, WARC, and PDF; all also .gz and
    .zst.

    A file of another kind is quarantined. This is what a plain string among ``Prepare.sources`` stands for.

    Attributes:
      paths: files, folders or patterns, local or of a store that fsspec knows (``gs://bucket/folder``).
      source: name of the collection.
      license: licence, for documents that do not name theirs.
      language: language, for documents that do not name theirs.
    """

    paths: Sequence[str]
    source: str = "files"
    license: str = ""
    language: str = ""

    def __post_init__(self) -> None:
        check_paths(self.paths, "Files")

    def check_installed(self, entries: Sequence[Entry]) -> None:
        for kind in (PdfFiles, WarcFiles):
            if first := [entry for entry in entries if _kind(entry.path) is kind][:1]:
                self._reader(kind).check_installed(first)

    def _reader(self, kind: Any) -> Any:
        return _reader(kind, self.source, self.license, self.language)

    def pieces(self, path: str, size: int) -> list[tuple[int, int, int]]:
        """As the file's own source cuts it."""
        reader = self._reader(_kind(path))
        if suffix(path) == ".json" or not hasattr(reader, "pieces"):
            return []
        pieces: list[tuple[int, int, int]] = reader.pieces(path, size)
        return pieces

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        kind = _kind(path)
        if kind is None:
            name = suffix(path) or plain_name(path)
            yield Quarantined(path, "", f"no reader for {name} files", "name it with TextFiles to force")
        elif suffix(path) == ".json" and not _is_lines(path):
            yield Quarantined(path, "", "not JSON lines", "its first line is no whole JSON object")
        else:
            yield from self._reader(kind).read(path, id)

    def read_piece(self, path: str, id: str, start: int, end: int) -> Iterator[Document | Quarantined]:
        """As the file's own source reads it."""
        yield from self._reader(_kind(path)).read_piece(path, id, start, end)


@functools.lru_cache(maxsize=64)
def _reader(kind: Any, source: str, license: str, language: str) -> Any:
    return kind(["-"], source=source, license=license, language=language) if kind else None


def _kind(path: str) -> Any:
    return _KINDS.get(suffix(path)) or (TextFiles if is_text(path) else None)


def _is_lines(path: str) -> bool:
    """Whether a .json file, which may be one object over many lines, is JSON lines, as C4's are."""
    with open_lines(path) as file:
        line = file.readline(JsonLines(["-"]).max_bytes)
    return isinstance(from_json(line.removeprefix(b"\xef\xbb\xbf")), dict)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The documents that come with this package (t5style/samples/PROVENANCE.md).

    Attributes:
      names: any of bible-kjv, python-doc, apache-doc, wordnet; all by default.
    """

    names: Sequence[str] = ("bible-kjv", "python-doc", "apache-doc", "wordnet")

    def __post_init__(self) -> None:
        known = ("bible-kjv", "python-doc", "apache-doc", "wordnet")
        if unknown := [name for name in self.names if name not in known]:
            raise UserError(f"there is no sample {unknown[0]!r}; there are {', '.join(known)}")
        if not self.names:
            raise UserError(f"Samples.names is empty; choose from {', '.join(known)}")

    def inputs(self) -> Sequence[str]:
        folder = importlib.resources.files("t5style.samples")
        return [os.fspath(folder / f"{name}.jsonl.zst") for name in self.names]  # type: ignore[call-overload]

    def parts(self) -> list[Part]:
        parts = JsonLines(self.inputs(), source="samples").parts()
        return [dataclasses.replace(part, reader=self) for part in parts]

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        for item in JsonLines([path], source="samples").read(path, id):
            if isinstance(item, Document):  # the same wherever the package lies
                name = path.rpartition("/")[2]
                item = dataclasses.replace(item, meta=dict(item.meta) | {"file": f"t5style/samples/{name}"})
            yield item
