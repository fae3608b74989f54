"""Writes that are never half done, patterns of paths, and the error whose message is for the user. `run_dir`
offers the same names.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator

from etils import epath

# Paths on object stores go through fsspec: epath would import TensorFlow for them wherever it is installed.
# And what other processes have written must be seen at once, so gcsfs may not remember listings.
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("FSSPEC_GCS", '{"use_listings_cache": false}')

PathLike = str | os.PathLike[str]


class UserError(Exception):
    """An error whose message alone is shown to the user: launch prints it without a traceback and exits with
    status 1.
    """


def is_local(path: PathLike) -> bool:
    """True if `path` is on a file system of this machine (not gs://, s3://, ...)."""
    return "://" not in os.fspath(path)


def check_store(path: PathLike) -> None:
    """Raises UserError if `path` lies where this installation cannot go."""
    if is_local(path):
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(os.fspath(path).partition("://")[0])
    except (ImportError, ValueError) as error:
        raise UserError(f"{os.fspath(path)}: {error} (for gs://: pip install 't5style[gcs]')") from None


def atomic_write(path: PathLike, data: str | bytes) -> None:
    """Writes a whole file so that readers see the old content or the new one and nothing between, even if the
    power goes.

    Local files: temporary sibling, fsync, rename, fsync of the folder. Object stores replace an object in one
    step by themselves.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    target = epath.Path(path)
    if not is_local(path):
        target.write_bytes(content)
        return
    temporary = f"{os.fspath(target.parent)}/.{target.name}.tmp-{uuid.uuid4().hex[:8]}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, os.fspath(target))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Iterator[epath.Path]:
    """Yields a temporary sibling folder to fill; it takes the name `path` when the block ends, and vanishes
    if the block fails.

    An existing folder of that name is replaced as a whole: it is moved aside, and deleted only when the new
    one has its name.
    """
    target = epath.Path(path)
    suffix = uuid.uuid4().hex[:8]
    temporary = target.parent / f".{target.name}.tmp-{suffix}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _sync_tree(temporary)
    except BaseException:
        temporary.rmtree()
        raise
    old: epath.Path | None = None
    if target.exists():
        old = target.parent / f".{target.name}.old-{suffix}"
        target.rename(old)
    temporary.rename(target)
    _sync_folder(target.parent)
    if old is not None:
        old.rmtree()


def _sync_folder(path: PathLike) -> None:
    """Makes renames inside a local folder durable."""
    if is_local(path):
        descriptor = os.open(os.fspath(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_tree(path: PathLike) -> None:
    if not is_local(path):
        return
    for folder, _, names in os.walk(os.fspath(path)):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_folder(folder)


def expand(pattern: PathLike) -> list[epath.Path]:
    """Files a glob pattern matches (``**`` goes through folders, ``~`` is home), sorted; local or
    ``gs://``-like paths.
    """
    text = os.path.expanduser(pattern)
    if not is_local(text):
        import fsspec.core  # epath's own glob knows no `**`

        store, inside = fsspec.core.url_to_fs(text)
        found = store.glob(inside, detail=True)
        names = [name for name, entry in found.items() if entry["type"] == "file"]
        return sorted(epath.Path(store.unstrip_protocol(name)) for name in names)
    return sorted(epath.Path(match) for match in glob.glob(text, recursive=True) if os.path.isfile(match))


def free_bytes(path: PathLike) -> int | None:
    """Bytes free where `path` is or will be; None for object stores."""
    if not is_local(path):
        return None
    place = os.path.abspath(path)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    return shutil.disk_usage(place).free
