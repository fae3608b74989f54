"""Who does the work: processes of this machine (`Local`), or Apache Beam (beam.py); with the same result."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from t5style.run_dir import UserError

ENTRY_FIELDS = ["key", "document", "unit"]
ENTRY = np.dtype([("key", "<u8"), ("document", "<i8"), ("unit", "<i8")])
_SPILL = 1 << 23  # entries sorted at once, 24 bytes each
_PIECES = 256


class Keys(Protocol):
    """Keys of documents, chunk by chunk."""

    @property
    def chunks(self) -> int: ...

    @property
    def bands(self) -> Sequence[Sequence[int]]:
        """Documents are linked that have the same keys in all rows of one of these."""
        ...

    def chunk(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of documents, int64 [n], and their keys, uint64 [rows, n]."""
        ...


class Entries(Protocol):
    """Keys of parts of documents, chunk by chunk."""

    @property
    def chunks(self) -> int: ...

    def chunk(self, index: int) -> np.ndarray:
        """ENTRY [n]."""
        ...


class Engine(Protocol):
    """Does independent work, and brings equal keys together."""

    def each(self, work: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Does the work for all tasks; yields each one's index and result as it is done."""
        ...

    def close(self) -> None:
        """Lets go of what it holds from one work to the next."""
        ...

    def pairs(self, keys: Keys) -> Iterator[np.ndarray]:
        """Pairs of documents, int64 [m, 2], that connect all documents of the same keys; band by band."""
        ...

    def repeats(self, entries: Entries, folder: epath.Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """In pieces, all entries whose key occurs more than once, and which of them are the first of theirs
        (by document and unit); `folder` is room for intermediate files.
        """
        ...


class Local:
    """Processes of this machine. They stay until `close`, for a second passes before one is ready to work.

    Args:
      workers: how many; 0 means one per core.
    """

    def __init__(self, workers: int = 0):
        if workers < 0:
            raise UserError(f"workers must be 0 or more, not {workers}")
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def close(self) -> None:
        """Ends the processes; the next work starts new ones."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def each(self, work: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = self.workers or cores
        if min(workers, len(tasks)) <= 1:
            for index, task in enumerate(tasks):
                yield index, work(task)
            return
        if self._pool is None:
            # Spawned, not forked: the fork of a process with running threads, such as JAX's, can hang.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_die_with,
                initargs=(os.getpid(),),
            )
        try:
            futures = {self._pool.submit(work, task): index for index, task in enumerate(tasks)}
            for future in concurrent.futures.as_completed(futures):
                yield futures.pop(future), future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            self.close()
            raise RuntimeError(
                f"one of {workers} worker processes died, perhaps for want of memory: run again with "
                "fewer workers; it goes on from the finished chunks"
            ) from error
        except BaseException:
            self.close()
            raise

    def pairs(self, keys: Keys) -> Iterator[np.ndarray]:
        for band in keys.bands:
            held = []
            for index in range(keys.chunks):
                numbers, values = keys.chunk(index)
                held.append((numbers, *(np.array(values[row]) for row in band)))
            numbers, *rows = (np.concatenate(column) for column in zip(*held, strict=True))
            order = np.lexsort((numbers, *rows))
            same = np.ones(max(len(order) - 1, 0), bool)
            for row in rows:
                same &= row[order][1:] == row[order][:-1]
            yield np.stack([numbers[order][:-1][same], numbers[order][1:][same]], axis=1)

    def repeats(self, entries: Entries, folder: epath.Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Sorted by key in memory, or where there are many in pieces on disk: each has all entries of its
        keys.
        """
        held: list[np.ndarray] = [np.empty(0, ENTRY)]
        files: dict[int, Any] = {}
        with contextlib.ExitStack() as stack:
            for index in range(entries.chunks):
                held.append(entries.chunk(index))
                if sum(map(len, held)) > _SPILL:
                    if not files:
                        for n in range(_PIECES):
                            files[n] = stack.enter_context((folder / f"{n:03d}").open("wb"))
                    _spill(held, files)
                    held = []
            if files:
                _spill(held, files)
        if not files:
            yield repeated(np.concatenate(held))
            return
        held = []
        for piece in files:
            path = folder / f"{piece:03d}"
            yield repeated(np.frombuffer(path.read_bytes(), ENTRY))
            path.unlink()


def _die_with(parent: int) -> None:
    """Ends this process soon after its parent has gone: kill -9 of the parent would leave it at work."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _spill(held: Sequence[np.ndarray], files: dict[int, Any]) -> None:
    for entries in held:
        where = (entries["key"] >> np.uint64(56)).astype(np.int64)
        order = np.argsort(where, kind="stable")
        borders = np.searchsorted(where[order], np.arange(_PIECES + 1))
        for piece, file in files.items():
            file.write(entries[order[borders[piece] : borders[piece + 1]]].tobytes())


def repeated(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those entries whose key occurs more than once, and which of them are the first of theirs."""
    entries = entries[np.lexsort((entries["unit"], entries["document"], entries["key"]))]
    same = entries["key"][1:] == entries["key"][:-1]
    again, next_too = np.r_[False, same][: len(entries)], np.r_[same, False][: len(entries)]
    chosen = again | next_too
    return entries[chosen], ~again[chosen]
