"""Which files make up a corpus, in which chunks: what a killed run goes on from and a later one extends."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from t5style.corpus.document import Document
from t5style.corpus.sources import Part
from t5style.run_dir import UserError, atomic_write

_CHUNK_BYTES = 16 << 20
FILE = "plan.json"
INDEX = "index"  # folder of a finished corpus that has its plan and pass 0


@dataclasses.dataclass
class Plan:
    """The files of a corpus in chunks, and what has been erased of it.

    Attributes:
      settings: fingerprint of the stages; another one's chunks are of no use.
      chunks: for each chunk its files: path, id, size, modified.
      salt: of the hashes in `erased`.
      erased: salted hashes of texts and ids that were erased on request and must not come back.
    """

    settings: str
    chunks: list[list[dict[str, Any]]]
    salt: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))
    erased: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, folder: epath.Path) -> Plan | None:
        """The plan in this folder, None if it has none."""
        path = folder / FILE
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def save(self, folder: epath.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / FILE, json.dumps(dataclasses.asdict(self)))

    def files(self) -> list[dict[str, Any]]:
        return [file for chunk in self.chunks for file in chunk]

    def tombstones(self) -> Tombstones | None:
        return Tombstones(self.salt, frozenset(self.erased)) if self.erased else None


@dataclasses.dataclass(frozen=True)
class Tombstones:
    """Knows what was erased without saying what it was."""

    salt: str
    hashes: frozenset[str]

    def holds(self, document: Document) -> bool:
        """Whether the document's id or its text was erased."""
        return any(tombstone(self.salt, value) in self.hashes for value in (document.id, document.text))


def tombstone(salt: str, value: str) -> str:
    """Keyed 128-bit hash of an id or a text."""
    return hashlib.blake2b(value.encode(), key=bytes.fromhex(salt), digest_size=16).hexdigest()


def describe(part: Part) -> dict[str, Any]:
    """What the plan notes of a file, or of a piece of one."""
    fields = [field.name for field in dataclasses.fields(part) if field.name != "reader"]
    return {name: getattr(part, name) for name in fields}


def _place(file: dict[str, Any]) -> tuple[Any, ...]:
    return file["path"], file.get("start")


def group(parts: Sequence[Part]) -> list[list[Part]]:
    """Consecutive files together up to some 16 MB, a larger file alone."""
    chunks: list[list[Part]] = []
    room = 0
    for part in parts:
        if not chunks or part.size > room:
            chunks.append([])
            room = _CHUNK_BYTES
        chunks[-1].append(part)
        room -= part.size
    return chunks


def new_files(parts: Sequence[Part], old: Plan) -> list[Part]:
    """Those of the files that the plan does not have.

    Raises:
      UserError: a file has changed since.
    """
    known = {_place(file): file for file in old.files()}
    fresh = []
    for part in parts:
        file = known.get(_place(describe(part)))
        if file is None:
            fresh.append(part)
        elif file != describe(part):
            raise UserError(
                f"{part.path} has changed since the corpus that is to be extended was made "
                f"({file['size']:,} bytes then, {part.size:,} now): prepare all anew without "
                "`extends`, or give the new content another name"
            )
    return fresh


def check_names(parts: Iterable[Part], old: Plan | None) -> None:
    """Raises UserError where two files are the same, or documents of two would have the same ids."""
    files = [*(old.files() if old else []), *(describe(part) for part in parts)]
    if twice := [path for (path, _), n in collections.Counter(map(_place, files)).items() if n > 1]:
        raise UserError(f"{twice[0]} is named by two sources: name each file once")
    names: dict[str, str] = {}
    for file in files:
        if (other := names.setdefault(file["id"], file["path"])) != file["path"]:
            raise UserError(
                f"{other} and {file['path']} would both be called {file['id']!r}: name them in one "
                "source, or give the two sources different values of `source`"
            )


def link(source: epath.Path, target: epath.Path) -> None:
    """Puts all files of a folder into another: by hard links where there are such, else by copies."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        try:
            os.link(path, target / path.name)
        except (OSError, TypeError):
            path.copy(target / path.name)
