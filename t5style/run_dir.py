"""What a run leaves behind: its folder, the lock on it, its manifest, metrics and lineage; and fingerprints.

A run folder holds `config.gin` and `operative_config.gin` (written by runner.py), `lineage.json`,
`metrics.jsonl` and `tensorboard/`, the job's own outputs, and, once the job is done, `manifest.json`.

This module imports neither jax nor any other room, so that every room may use it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from t5style.files import PathLike as PathLike
from t5style.files import UserError as UserError
from t5style.files import atomic_folder as atomic_folder
from t5style.files import atomic_write as atomic_write
from t5style.files import check_store as check_store
from t5style.files import expand as expand
from t5style.files import free_bytes as free_bytes
from t5style.files import is_local as is_local

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
METRICS = "metrics.jsonl"
LOCK = ".lock"

# Set by `set_process` once the distributed system is up: asking jax would import it and start its backend.
_process_index = 0
_barrier: Callable[[str], None] | None = None
# Folders locked by this very process: POSIX record locks do not exclude their own process.
_held: set[tuple[int, str]] = set()


def set_process(index: int, barrier: Callable[[str], None] | None = None) -> None:
    """Tells every room which process of the job this is (only process 0 writes and speaks) and how to wait
    for the others.
    """
    global _process_index, _barrier
    _process_index = index
    _barrier = barrier


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name; returns at once in a single process."""
    if _barrier is not None:
        _barrier(name)


def has_company() -> bool:
    """Whether other processes take part in this run."""
    return _barrier is not None


def is_main_process() -> bool:
    """True in process 0 (and in every single-process run)."""
    return _process_index == 0


# ----------------------------------------------------------------------------------------------- fingerprints


def canonical(value: Any) -> Any:
    """The JSON tree that stands for a configuration: dataclasses by qualified class name and fields,
    functions by name.

    Tuples equal lists (gin gives either). A field declared with `field(metadata={"affects_result": False})`
    (a number of worker
    processes, a logging interval) is left out, so that changing it does not make finished work look out of
    date.

    Raises TypeError for what has no stable text: lambdas, partials, open files, arrays.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, enum.Enum):
        return {"__enum__": f"{_qualified(type(value))}.{value.name}"}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.metadata.get("affects_result", True)]
        return {"__class__": _qualified(type(value))} | {
            f.name: canonical(getattr(value, f.name)) for f in fields
        }
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: canonical(item) for key, item in value.items()}
        return {"__pairs__": [[canonical(key), canonical(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((canonical(item) for item in value), key=json.dumps)
    if isinstance(value, pathlib.PurePath | epath.Path):
        return os.fspath(value)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        name = _qualified(value)
        if "<" in name:
            raise TypeError(
                f"{name} has no stable name: use a top-level function or a frozen dataclass in configurations"
            )
        return {"__name__": name}
    if isinstance(value, functools.partial):
        raise TypeError(
            f"partial({value.func}) cannot be fingerprinted: use a frozen dataclass in configurations"
        )
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # NumPy scalars
        return canonical(value.item())
    raise TypeError(
        f"{type(value).__name__} {value!r} cannot be part of a configuration: "
        "use plain values and frozen dataclasses"
    )


def _qualified(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def fingerprint(value: Any) -> str:
    """16 hex digits that change when, and only when, the configuration `value` (see `canonical`) changes."""
    text = json.dumps(canonical(value), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def path_fingerprint(path: PathLike) -> str:
    """16 hex digits for what lies at `path`: a finished run folder's manifest fingerprint, else names and
    contents of all files.

    `path` may be a file, a folder or a glob pattern (see `files.expand`). Hidden files do not count. Raises
    UserError where there is nothing, or where the manifest is damaged.
    """
    check_store(path)
    try:
        place = epath.Path(os.path.expanduser(path))
    except KeyError:  # a store that fsspec knows and epath does not, such as memory:// or http://
        return _store_digest(os.fspath(path))
    if place.is_file():
        return _digest([(place.name, place)])
    if place.is_dir():
        manifest = place / MANIFEST
        try:
            content = json.loads(manifest.read_text()) if manifest.exists() else None
        except ValueError as error:
            raise UserError(
                f"{manifest} is damaged ({error}); delete it, and run the job that made this folder again"
            ) from None
        if isinstance(content, dict) and "fingerprint" in content:
            return str(content["fingerprint"])
        return _digest(sorted(_visible_files(place)))
    matches = expand(place)
    if not matches:
        raise UserError(f"there is no file or folder {os.fspath(path)!r} (looked from {os.getcwd()})")
    fixed = re.split(r"[*?\[]", os.fspath(place), maxsplit=1)[0]
    return _digest([(os.path.relpath(match, os.path.dirname(fixed) or "."), match) for match in matches])


def _store_digest(url: str) -> str:
    """For what lies in a store: the names of its files, and by what the store tells a changed one."""
    import fsspec

    files, path = fsspec.core.url_to_fs(url)
    names = files.glob(path) if any(character in url for character in "*?[") else files.find(path)
    if not names:
        raise UserError(f"there is no file or folder {url!r}")
    return hashlib.sha256(repr([(name, files.ukey(name)) for name in sorted(names)]).encode()).hexdigest()[
        :16
    ]


def _visible_files(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _visible_files(entry, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}", entry


def _digest(files: Sequence[tuple[str, epath.Path]]) -> str:
    digest = hashlib.sha256()
    for name, file in files:
        inner = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                inner.update(block)
        digest.update(f"{name}\0{inner.hexdigest()}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------- run folder


@dataclasses.dataclass(frozen=True)
class RunDir:
    """One run's folder. `RunDir(path)` makes nothing on disk; `create()` and the writers do.

    Raises UserError for a path on an object store that this installation cannot reach.
    """

    path: epath.Path

    def __init__(self, path: PathLike) -> None:
        check_store(path)
        object.__setattr__(self, "path", epath.Path(path))

    @property
    def name(self) -> str:
        return self.path.name

    def child(self, name: str) -> RunDir:
        """The folder of a stage inside this run."""
        return RunDir(self.path / name)

    def create(self) -> RunDir:
        """Makes the folder. Raises UserError where that cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"run folder {self.path} cannot be made: a file stands in its way; choose another RUN_DIR"
            ) from None
        except OSError as error:
            raise UserError(
                f"run folder {self.path} cannot be made: {error.strerror or error}; choose another RUN_DIR"
            ) from None
        return self

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process. Raises UserError naming the holder if another one has it.

        A POSIX record lock: the kernel drops it when the process dies, and worker processes do not inherit
        it, so a killed run
        never leaves a folder locked. Object stores have no locks: there the caller alone must see to it. Only
        process 0 locks.
        """
        if not is_main_process() or not is_local(self.path):
            yield
            return
        self.create()
        file = os.path.realpath(self.path / LOCK)
        key = (os.getpid(), file)
        if key in _held:
            raise UserError(
                f"run folder {self.path} is already in use by this same process; give each job its own folder"
            )
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"run folder {self.path} cannot be written to: {error.strerror}; choose another RUN_DIR"
            ) from None
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(self._in_use(os.read(descriptor, 4096))) from None
            holder = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "folder": os.path.abspath(self.path),
                "since": now(),
            }
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode(), 0)
            _held.add(key)
            try:
                yield
            finally:
                _held.discard(key)
        finally:
            os.close(descriptor)

    def _in_use(self, content: bytes) -> str:
        try:
            holder = json.loads(content)
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        folder = os.path.abspath(self.path)
        return f"run folder {folder} is in use by {who}; wait for it, stop it, or choose another RUN_DIR"

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest of a finished job, or None if there is none (or none that can be read)."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return manifest if isinstance(manifest, dict) else None

    def write_manifest(
        self,
        job: Any,
        *,
        inputs: Mapping[str, str] | None = None,
        figures: Mapping[str, Any] | None = None,
        started: str | None = None,
    ) -> dict[str, Any]:
        """Writes `manifest.json`, the sign that the job `job` is done, and returns it. For process 0.

        Args:
          job: the job's dataclass instance, whose canonical tree and fingerprint are recorded.
          inputs: path (or stage name) -> fingerprint of everything the result depends on.
          figures: what the job returned. Its `fingerprint`, of the result's content, is that of the manifest;
            without one the manifest gets a new one, for nobody knows whether the result is the same again.
          started: ISO time; now if not given.
        """
        figures = dict(figures or {})
        manifest = {
            "job": _qualified(type(job)),
            "status": "done",
            "fingerprint": figures.get("fingerprint") or uuid.uuid4().hex[:16],
            "config_fingerprint": fingerprint(job),
            "inputs": dict(inputs or {}),
            "outputs": sorted(e.name for e in self.path.iterdir() if not e.name.startswith(".")),
            "figures": figures,
            "started": started or now(),
            "finished": now(),
            "config": canonical(job),
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False, default=_plain)
        atomic_write(self.path / MANIFEST, text + "\n")
        return manifest

    def write_lineage(self, entries: Mapping[str, Any]) -> None:
        """Adds entries (dataset fingerprints, parent run, ...) to `lineage.json`; an entry that is there is
        replaced.
        """
        if not is_main_process():
            return
        self.create()
        file = self.path / LINEAGE
        lineage = json.loads(file.read_text()) if file.exists() else {}
        atomic_write(
            file, json.dumps(lineage | dict(entries), indent=1, ensure_ascii=False, default=_plain) + "\n"
        )

    def read_lineage(self) -> dict[str, Any]:
        """What `write_lineage` wrote; empty if nothing."""
        file = self.path / LINEAGE
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def metrics(self, resume_step: int | None = None) -> MetricsWriter:
        """A writer of `metrics.jsonl` and TensorBoard events; lines of steps after `resume_step` are dropped
        first.
        """
        return MetricsWriter(self.path, resume_step)

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`, oldest first; a half-written last line is left out."""
        file = self.path / METRICS
        return _parse_lines(file.read_text()) if file.exists() else []


class MetricsWriter:
    """Writes figures by step: one JSON object a line, and TensorBoard events. Does nothing but in process 0.

    A line is {"step": int, "time": Unix seconds, name: float, ...}; NaN and infinities are written as JSON's
    usual extension
    (NaN, Infinity), which Python and pandas read.
    """

    def __init__(
        self, folder: PathLike, resume_step: int | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._active = is_main_process()
        self._clock = clock
        if not self._active:
            return
        self._file = epath.Path(folder) / METRICS
        self._local = is_local(folder)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        before = self._file.read_text() if self._file.exists() else ""
        lines = [x for x in _parse_lines(before) if resume_step is None or x["step"] <= resume_step]
        self._text = "".join(json.dumps(line) + "\n" for line in lines)
        if self._text != before:
            atomic_write(self._file, self._text)
        self._stream = open(os.fspath(self._file), "a", encoding="utf-8") if self._local else None  # noqa: SIM115
        self._flushed = self._clock()
        tensorboardX = _import_tensorboardx()  # here: it costs 0.2 s that --help need not spend
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # else a line for every NaN

        self._event_folder = self._file.parent / "tensorboard"
        # Event files are appended to, which object stores cannot: written here, and copied there.
        self._scratch = None if self._local else tempfile.TemporaryDirectory(prefix="t5style-events-")
        self._events = tensorboardX.SummaryWriter(
            os.fspath(self._event_folder) if self._scratch is None else self._scratch.name,
            purge_step=None if resume_step is None else resume_step + 1,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line. Values may be Python or NumPy scalars, or 0-d arrays."""
        if not self._active:
            return
        figures = {name: float(value) for name, value in values.items()}
        line = json.dumps({"step": int(step), "time": round(self._clock(), 3)} | figures) + "\n"
        if self._stream is not None:
            self._stream.write(line)
            self._stream.flush()
        for name, value in figures.items():
            self._events.add_scalar(name, value, int(step))
        if self._stream is None:  # object stores cannot append: the whole object again, at most once a minute
            self._text += line
            if self._clock() - self._flushed > 60:
                self.flush()

    def flush(self) -> None:
        """Brings every line where it outlasts this machine's end; call it before a checkpoint that says that
        these steps are done. Of the newest events some may follow later.
        """
        if not self._active:
            return
        self._events.flush()
        if self._stream is not None:
            os.fsync(self._stream.fileno())
        else:
            atomic_write(self._file, self._text)
            self._copy_events()
            self._flushed = self._clock()

    def _copy_events(self) -> None:
        if self._scratch is not None:
            for file in epath.Path(self._scratch.name).iterdir():
                atomic_write(self._event_folder / file.name, file.read_bytes())

    def close(self) -> None:
        if not self._active:
            return
        self.flush()
        self._active = False
        self._events.close()
        self._copy_events()
        if self._stream is not None:
            self._stream.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _import_tensorboardx() -> Any:
    """tensorboardX, which would import torch (3 s and 200 MB) just because it is installed."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` an ImportError
    try:
        import tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX


def _parse_lines(text: str) -> list[dict[str, Any]]:
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # only ever the last line, cut off when the process was killed
            continue
    return lines


def now() -> str:
    """The local time with its offset, as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _plain(value: Any) -> Any:
    """NumPy scalars, small arrays and paths, for json."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} {value!r} cannot be written as JSON")
