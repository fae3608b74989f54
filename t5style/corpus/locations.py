"""Where files lie: local paths, and URLs of the stores that fsspec knows (gs://, s3://, hf://, memory://
...).
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from typing import IO, Any

from t5style.run_dir import UserError, check_store, is_local


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file.

    Attributes:
      path: local path or URL.
      id: its name below what the user named, with as many folders as tell it from others.
      size: in bytes; 1 where the store does not say.
      modified: when it was last changed, seconds since 1970; 0 where unknown.
    """

    path: str
    id: str
    size: int
    modified: float


def open_binary(path: str | os.PathLike[str]) -> IO[bytes]:
    """Opens a file for reading, wherever it lies."""
    name = os.path.expanduser(os.fspath(path))
    if is_local(name):
        return open(name, "rb")
    store, inside = _store(name)
    return store.open(inside, "rb")


def find(paths: Sequence[str]) -> list[Entry]:
    """The files of all paths, each once, sorted by path.

    Args:
      paths: files, folders (with all they hold but hidden files) and patterns (``**`` goes through folders).

    Ids do not hold the folders that were named, so that a corpus keeps its ids, and with them its splits,
    when it is moved; only where two files would share an id, as many of their folders as tell them apart.

    Raises:
      UserError: there is nothing at one of the paths.
    """
    found: dict[str, tuple[Entry, int]] = {}
    for pattern in paths:
        name = os.path.expanduser(os.fspath(pattern))
        check_store(name)
        listed = list(_local(name) if is_local(name) else _remote(name))
        if not listed:
            if _is_folder(name):
                raise UserError(f"the folder {pattern!r} holds no files")
            raise UserError(f"there is no file or folder {pattern!r} (looked from {os.getcwd()})")
        for entry, depth in listed:
            found.setdefault(entry.path, (entry, depth))
    ordered = [found[path] for path in sorted(found)]
    steps = [[step for step in entry.path.split("/") if step] for entry, _ in ordered]
    depths = [depth for _, depth in ordered]
    while True:
        ids = ["/".join(step[-depth:]) for step, depth in zip(steps, depths, strict=True)]
        counts = collections.Counter(ids)
        if len(counts) == len(ids):
            pairs = zip(ordered, ids, strict=True)
            return [dataclasses.replace(entry, id=id) for (entry, _), id in pairs]
        depths = [depth + (counts[id] > 1) for depth, id in zip(depths, ids, strict=True)]


def _is_folder(name: str) -> bool:
    if is_local(name):
        return os.path.isdir(name)
    store, inside = _store(name)
    return bool(store.isdir(inside))


def _local(name: str) -> Iterator[tuple[Entry, int]]:
    """Files with the number of steps of their paths that make the id."""
    if os.path.isfile(name):
        files, head = [os.path.normpath(name)], os.path.dirname(os.path.normpath(name))
    elif os.path.isdir(name):
        head = os.path.normpath(name)
        files = list(_walk(head))
    else:
        fixed = re.split(r"[*?\[]", name, maxsplit=1)[0]
        head = os.path.dirname(fixed) or "."
        files = [
            os.path.normpath(match) for match in glob.glob(name, recursive=True) if os.path.isfile(match)
        ]
    for file in files:
        depth = os.path.relpath(file, head or ".").count("/") + 1
        try:
            status = os.stat(file)
        except OSError:  # a link to nothing: reading it will say so
            yield Entry(file, "", 1, 0.0), depth
            continue
        if stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            yield Entry(file, "", status.st_size, status.st_mtime), depth


def _walk(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        listed = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    for name, is_folder in listed:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path)
        else:
            yield path


def _store(url: str) -> tuple[Any, str]:
    import fsspec.core

    store, inside = fsspec.core.url_to_fs(url)
    return store, inside


def _remote(url: str) -> Iterator[tuple[Entry, int]]:
    store, inside = _store(url)
    pattern = re.search(r"[*?\[]", inside)
    head = inside.rstrip("/")
    if pattern:
        found = store.glob(inside, detail=True)
        head = inside[: pattern.start()].rpartition("/")[0]
    elif store.isfile(inside):
        found = {inside: store.info(inside)}
        head = inside.rpartition("/")[0]
    elif store.isdir(inside):
        found = store.find(inside, detail=True)
    else:
        return
    for name, info in sorted(found.items()):
        below = name[len(head) :].strip("/")
        if info["type"] != "file" or (not pattern and any(s.startswith(".") for s in below.split("/"))):
            continue
        # fsspec's stores name the time differently: local, gcsfs, s3fs, adlfs.
        stamps = (info.get(key) for key in ("mtime", "updated", "LastModified", "last_modified", "created"))
        modified = next((stamp for stamp in stamps if stamp), 0)
        size = info.get("size")
        yield (
            Entry(store.unstrip_protocol(name), "", 1 if size is None else size, _seconds(modified)),
            below.count("/") + 1,
        )


def _seconds(stamp: Any) -> float:
    if isinstance(stamp, str):
        try:
            stamp = datetime.datetime.fromisoformat(stamp)
        except ValueError:
            return 0.0
    return float(stamp.timestamp() if isinstance(stamp, datetime.datetime) else stamp)
