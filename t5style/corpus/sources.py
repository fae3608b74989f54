"""Where documents come from.

A source lists its parts, one per file; a part is read on its own, in any process, and yields documents and,
for what cannot be read, ``Quarantined``: a bad file or line is counted and reported, never fatal, never
silently lost.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.resources
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from etils import epath

from t5style.corpus.document import BROKEN_COMPRESSION, Document, open_lines, valid
from t5style.run_dir import UserError, expand


@dataclasses.dataclass(frozen=True)
class Quarantined:
    """Something that could not be read.

    Attributes:
      file: the file it is in.
      position: where in the file, such as "line 3" or "byte 17".
      reason: a few words, the same for all of its kind, for they are counted.
      detail: what exactly is wrong here.
    """

    file: str
    position: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a source.

    Attributes:
      path: the file.
      id: of its document, or what the ids of its documents begin with.
      size: bytes in the file.
      modified: when it was last changed, seconds since 1970.
      reader: the source, which knows how to read it.
    """

    path: str
    id: str
    size: int
    modified: float
    reader: Reader

    def read(self) -> Iterator[Document | Quarantined]:
        """Documents of this file in order."""
        path = epath.Path(self.path)
        if valid(self.path) != self.path:
            # Python marks bytes of a name that are no UTF-8 by lone surrogates, which no document can hold.
            yield Quarantined(valid(self.path), "", "file name not utf-8", ascii(self.path))
            return
        if self.size == 0:
            yield Quarantined(self.path, "byte 0", "empty file")
            return
        try:
            yield from self.reader.read(path, self.id)
        except BROKEN_COMPRESSION as error:
            yield Quarantined(self.path, "", "broken compression", f"{type(error).__name__}: {error}")
        except OSError as error:
            # zstandard and gzip say with OSError (BadGzipFile is one) that what they read is not theirs.
            yield Quarantined(self.path, "", "unreadable file", str(error))


class Reader(Protocol):
    """Reads one file."""

    def read(self, path: epath.Path, id: str, /) -> Iterator[Document | Quarantined]: ...


class Source(Protocol):
    """A collection of files."""

    def inputs(self) -> Sequence[str]:
        """Files, folders and patterns whose content decides the documents."""
        ...

    def parts(self) -> list[Part]:
        """The files, sorted; raises UserError where there are none."""
        ...


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Plain text: each file is a document. May be compressed (.gz, .zst).

    Attributes:
      paths: files, folders or patterns (``**`` goes through folders); folders are read with all they hold.
      source: name of the collection.
      license: licence of the texts.
      language: ISO 639-1 code.
      encoding: of the files. What is not in it is quarantined: nothing is guessed.
      strip_gutenberg: leave out the header and the licence that Project Gutenberg puts around a book.
      max_bytes: larger files, which would have to be held in memory whole, are quarantined.
    """

    paths: Sequence[str]
    source: str = "text"
    license: str = ""
    language: str = ""
    encoding: str = "utf-8"
    strip_gutenberg: bool = False
    max_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        _check_paths(self.paths, "TextFiles")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise UserError(f"TextFiles.encoding {self.encoding!r} is no encoding Python knows") from None

    def inputs(self) -> Sequence[str]:
        return self.paths

    def parts(self) -> list[Part]:
        return _parts(self.paths, self.source, self)

    def read(self, path: epath.Path, id: str) -> Iterator[Document | Quarantined]:
        with open_lines(path) as file:
            data = file.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            yield Quarantined(
                os.fspath(path),
                f"byte {self.max_bytes}",
                "too large",
                f"more than max_bytes={self.max_bytes}",
            )
            return
        if not data:
            yield Quarantined(os.fspath(path), "byte 0", "empty file")
            return
        # A zero byte is in no text of any ASCII-like encoding, and in nearly every other file.
        wide = self.encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32"))
        if not wide and (zero := data.find(b"\0")) >= 0:
            yield Quarantined(os.fspath(path), f"byte {zero}", "binary file", "a zero byte")
            return
        try:
            text = valid(data.decode(self.encoding))  # UTF-7 can say lone surrogates
        except UnicodeDecodeError as error:
            yield Quarantined(
                os.fspath(path),
                f"byte {error.start}",
                f"not {self.encoding}",
                f"{error.reason}; set encoding",
            )
            return
        text = text.removeprefix("\ufeff")
        if self.strip_gutenberg:
            text = strip_gutenberg(text)
        yield Document(
            text, id, source=self.source, url=os.fspath(path), license=self.license, language=self.language
        )


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


_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """JSON lines (.jsonl, also .gz or .zst): each line is an object that holds a document.

    The keys source, url, license and language are taken as the document's own where they are strings,
    ``meta`` where it is an object; all other keys become meta.

    Attributes:
      paths: files, folders or patterns; of a folder, all it holds.
      text_field: key of the text.
      id_field: key of the id; without one a document is named by its file and line.
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
    max_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        _check_paths(self.paths, "JsonLines")

    def inputs(self) -> Sequence[str]:
        return self.paths

    def parts(self) -> list[Part]:
        return _parts(self.paths, self.source, self)

    def read(self, path: epath.Path, id: str) -> Iterator[Document | Quarantined]:
        number = 0
        try:
            with open_lines(path) as file:
                while line := file.readline(self.max_bytes + 1):
                    number += 1
                    if len(line) > self.max_bytes and not line.endswith(b"\n"):
                        yield Quarantined(
                            os.fspath(path), f"line {number}", "too large", f"over {self.max_bytes}"
                        )
                        while (line := file.readline(1 << 20)) and not line.endswith(b"\n"):
                            pass
                    elif line.strip():
                        result = self._document(line, f"{id}:{number}")
                        if isinstance(result, Quarantined):
                            result = dataclasses.replace(
                                result, file=os.fspath(path), position=f"line {number}"
                            )
                        yield result
        except BROKEN_COMPRESSION as error:
            detail = f"{type(error).__name__}: {error}"
            yield Quarantined(os.fspath(path), f"after line {number}", "broken compression", detail)

    def _document(self, line: bytes, id: str) -> Document | Quarantined:
        try:
            record = json.loads(line.decode())
            # A JSON string may hold half a surrogate pair, which no file can: U+FFFD stands for it from here.
            if _SURROGATE_ESCAPE.search(line):
                record = json.loads(valid(json.dumps(record, ensure_ascii=False)))
        except UnicodeDecodeError as error:
            return Quarantined("", "", "not utf-8", f"byte {error.start} of the line: {error.reason}")
        except (ValueError, RecursionError) as error:
            return Quarantined("", "", "malformed JSON", str(error))
        if not isinstance(record, dict):
            return Quarantined("", "", "not a JSON object", type(record).__name__)
        text = record.pop(self.text_field, None)
        if not isinstance(text, str):
            found = "is missing" if text is None else f"is a {type(text).__name__}"
            return Quarantined("", "", "no text", f"the field {self.text_field!r} {found}")
        meta = record.pop("meta", {})
        if not isinstance(meta, dict):
            meta = {"meta": meta}
        given = record.pop(self.id_field, None)
        fields: dict[str, Any] = {
            "source": self.source,
            "url": "",
            "license": self.license,
            "language": self.language,
        }
        for name in fields:
            if isinstance(record.get(name), str):
                fields[name] = record.pop(name) or fields[name]
        return Document(text, str(given) if given not in (None, "") else id, **fields, meta=meta | record)


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
        return JsonLines(self.inputs(), source="samples").parts()


@dataclasses.dataclass(frozen=True)
class Files:
    """Files of any known kind, told by their names: JSON lines, and text (.txt, .md, .rst and names without
    a dot).

    This is what a plain string among ``Prepare.sources`` stands for.
    """

    paths: Sequence[str]

    def __post_init__(self) -> None:
        _check_paths(self.paths, "Files")

    def inputs(self) -> Sequence[str]:
        return self.paths

    def parts(self) -> list[Part]:
        return _parts(self.paths, "files", self)

    def read(self, path: epath.Path, id: str) -> Iterator[Document | Quarantined]:
        suffix = epath.Path(re.sub(r"\.(gz|zst)$", "", path.name)).suffix.lower()
        reader: Reader
        if suffix in (".jsonl", ".ndjson"):
            reader = JsonLines([os.fspath(path)], source="files")
        elif suffix in (".txt", ".text", ".md", ".rst", ""):
            reader = TextFiles([os.fspath(path)], source="files")
        else:
            yield Quarantined(
                os.fspath(path), "", f"no reader for {suffix} files", "name it with TextFiles to force"
            )
            return
        yield from reader.read(path, id)


def _check_paths(paths: Sequence[str], name: str) -> None:
    if isinstance(paths, str):
        raise UserError(f"{name}.paths must be a list of paths, not the string {paths!r}: write [{paths!r}]")
    if not paths:
        raise UserError(f"{name}.paths is empty: name at least one file, folder or pattern")


def _parts(paths: Sequence[str], source: str, reader: Reader) -> list[Part]:
    parts = []
    for path, id in _find(paths, source):
        stat = path.stat()
        parts.append(Part(os.fspath(path), id, stat.length, float(stat.mtime or 0), reader))
    return parts


def _find(paths: Sequence[str], source: str) -> list[tuple[epath.Path, str]]:
    """The files of all paths, each once, with ids: the source, then the path below what was named.

    Ids do not hold the folders that were named, so that a corpus keeps its ids, and with them its splits,
    when it is moved; only where two files would share an id, as many of their folders as tell them apart.
    """
    found: dict[str, tuple[epath.Path, str]] = {}
    for pattern in paths:
        path = epath.Path(os.path.expanduser(pattern))
        if path.is_file():
            files, head = [path], path.parent
        elif path.is_dir():
            files, head = list(_walk(path)), path
            if not files:
                raise UserError(f"the folder {pattern!r} holds no files")
        else:
            fixed = re.split(r"[*?\[]", os.fspath(path), maxsplit=1)[0]
            files, head = expand(path), epath.Path(os.path.dirname(fixed) or ".")
            if not files:
                raise UserError(f"there is no file or folder {pattern!r} (looked from {os.getcwd()})")
        for file in files:
            found.setdefault(os.fspath(file), (file, os.path.relpath(file, head)))
    entries = sorted(found.values(), key=lambda entry: os.fspath(entry[0]))
    files = [file for file, _ in entries]
    depths = [name.count("/") + 1 for _, name in entries]
    while True:
        names = ["/".join(file.parts[-depth:]) for file, depth in zip(files, depths, strict=True)]
        counts = collections.Counter(names)
        if len(counts) == len(names):
            return [(file, f"{source}/{name}") for file, name in zip(files, names, strict=True)]
        depths = [depth + (counts[name] > 1) for depth, name in zip(depths, names, strict=True)]


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry)
        else:
            yield entry
