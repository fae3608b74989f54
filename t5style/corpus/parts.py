"""What every source is made of: its parts, which are read on their own in any process, and what could not be
read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from t5style.corpus.document import BROKEN_COMPRESSION, Document, valid
from t5style.corpus.locations import Entry, find
from t5style.run_dir import UserError

# A larger file is cut into pieces of about PIECE_BYTES where its reader can, so that several workers share
# it.
CUT_BYTES = 32 << 20
PIECE_BYTES = 16 << 20


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
    """One file of a source, or a piece of a large one.

    Attributes:
      path: the file.
      id: of its document, or what the ids of its documents begin with; the same for all pieces of a file.
      size: bytes of it in the file.
      modified: when the file was last changed, seconds since 1970.
      reader: the source, which knows how to read it.
      start: where the piece begins, in what its reader counts (bytes, row groups, rows, shards).
      end: where it ends; None for the whole file.
    """

    path: str
    id: str
    size: int
    modified: float
    reader: Reader
    start: int = 0
    end: int | None = None

    def read(self) -> Iterator[Document | Quarantined]:
        """Documents of this part in order. Whatever is wrong with the file comes as ``Quarantined``.

        Raises:
          UserError: a package that the reader needs is not installed.
        """
        if valid(self.path) != self.path:
            # Python marks bytes of a name that are no UTF-8 by lone surrogates, which no document can hold.
            yield Quarantined(valid(self.path), "", "file name not utf-8", ascii(self.path))
            return
        if self.size == 0:
            yield Quarantined(self.path, "byte 0", "empty file")
            return
        try:
            if self.end is None:
                yield from self.reader.read(self.path, self.id)
            else:
                reader: Any = self.reader
                yield from reader.read_piece(self.path, self.id, self.start, self.end)
        except UserError:
            raise
        except BROKEN_COMPRESSION as error:
            yield Quarantined(self.path, "", "broken compression", f"{type(error).__name__}: {error}")
        except OSError as error:
            yield Quarantined(self.path, "", "unreadable file", str(error))
        except (ValueError, RuntimeError, ArithmeticError, LookupError, TypeError) as error:
            # A parser that stumbles over one file must not end the run.
            name = type(self.reader).__name__
            yield Quarantined(
                self.path, "", f"{name} cannot read it", valid(f"{type(error).__name__}: {error}")
            )


class Reader(Protocol):
    """Reads one file. One that can also read a piece has two more methods: ``pieces(path, size)``, which
    lists (start, end, bytes) or nothing, and ``read_piece(path, id, start, end)``.
    """

    def read(self, path: str, id: str, /) -> Iterator[Document | Quarantined]: ...


class Source(Protocol):
    """A collection of files."""

    def inputs(self) -> Sequence[str]:
        """Files, folders and patterns whose content decides the documents."""
        ...

    def parts(self) -> list[Part]:
        """The files, sorted; raises UserError where there are none."""
        ...


class FileSource:
    """What sources of files share: ``paths`` and ``source`` are fields of the dataclass that has it as
    base.
    """

    paths: Sequence[str]
    source: str

    def inputs(self) -> Sequence[str]:
        return self.paths

    def parts(self) -> list[Part]:
        entries = find(self.paths)
        self.check_installed(entries)
        return [part for entry in entries for part in self._cut(entry)]

    def check_installed(self, entries: Sequence[Entry]) -> None:
        """Raises UserError where a package is missing that these files need."""

    def _cut(self, entry: Entry) -> list[Part]:
        reader: Any = self
        whole = Part(entry.path, f"{self.source}/{entry.id}", entry.size, entry.modified, reader)
        if entry.size < CUT_BYTES or not hasattr(self, "pieces"):
            return [whole]
        pieces = self.pieces(entry.path, entry.size)
        return [
            dataclasses.replace(whole, start=start, end=end, size=size) for start, end, size in pieces
        ] or [whole]


def check_paths(paths: Sequence[str], name: str) -> None:
    """Raises UserError where ``paths`` is a string or empty."""
    if isinstance(paths, str):
        raise UserError(f"{name}.paths must be a list of paths, not the string {paths!r}: write [{paths!r}]")
    if not paths:
        raise UserError(f"{name}.paths is empty: name at least one file, folder or pattern")


def check_positive(value: int, name: str) -> None:
    """Raises UserError where a limit is below 1."""
    if value < 1:
        raise UserError(f"{name} must be 1 or more, not {value}")


def plain_name(path: str) -> str:
    """The file's name without folders and without .gz or .zst, in lower case."""
    name = path.rpartition("/")[2].lower()
    return name.removesuffix(".gz").removesuffix(".zst")


def suffix(path: str) -> str:
    """The end of the file's name that tells its kind, such as ".jsonl"; empty without one."""
    stem, dot, end = plain_name(path).rpartition(".")
    return f".{end}" if dot and stem else ""
