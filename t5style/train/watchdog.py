"""Tells of a run that hangs: where every thread stands, when no step has been finished for too long.

A hang in a slice (one host's input is stuck, a collective waits for a process that does not come) shows
nothing by itself: all processes wait, silently. So every process watches its own progress. When there is
none, it writes the stacks of all its threads into `<run>/stacks/<process>.txt` and its own standard error.
Whose stacks differ from the others' is the one to look at.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import tempfile
import threading
import time

import jax
from etils import epath

from t5style import run_dir

FOLDER = "stacks"
ON_HANG = ("warn", "exit")
MIN_SECONDS = 600.0  # nobody is woken for less: a checkpoint, or a file system's bad minute
FACTOR = 10.0  # times the median step
EXIT_STATUS = 142  # 128 + SIGALRM; above 126, where job schedulers start the job again (XPK: 42 and 127-255)
KEEP_DUMPS = 8  # in the file


def check(hang_seconds: float | None, on_hang: str) -> None:
    """Raises ValueError for settings that cannot be."""
    if hang_seconds is not None and not hang_seconds > 0:
        raise ValueError(
            f"hang_seconds is {hang_seconds}; it must be above 0, or None for {FACTOR:g} times the median "
            f"step and {MIN_SECONDS:g} s at least."
        )
    if on_hang not in ON_HANG:
        raise ValueError(f"on_hang is {on_hang!r}; it must be one of {', '.join(ON_HANG)}.")


class Watchdog:
    """Watches the block inside `with`; `beat()` is a sign of life.

    Until the first step is finished the limit is `MIN_SECONDS` at least, for a program may have to be
    compiled or loaded before.

    Args:
      seconds: how long there may be no sign of life; None for 10 times the median step, 10 minutes at least.
      on_hang: 'warn' writes and goes on; 'exit' then ends the process with status 142, so that whoever
        started it starts it again.
    """

    def __init__(
        self, run: run_dir.RunDir, seconds: float | None = None, on_hang: str = "warn", step: int = 0
    ) -> None:
        self._run, self._seconds, self._on_hang = run, seconds, on_hang
        self._step = step
        self._last = time.monotonic()
        self._spans: collections.deque[float] = collections.deque(maxlen=50)  # seconds of the newest steps
        self._steps = 0
        self._dumps: collections.deque[str] = collections.deque(maxlen=KEEP_DUMPS)
        self._patience = 1.0  # the limit's factor, doubled by each warning in vain
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._last = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def limit(self) -> float:
        """Seconds without a sign of life that are a hang."""
        if self._steps and self._seconds is not None:
            return self._seconds
        slow = FACTOR * statistics.median(self._spans) if self._spans else 0.0
        return max(MIN_SECONDS, slow, self._seconds or 0.0)

    def beat(self, step: int | None = None) -> None:
        """A sign of life: `step` is finished, or something else went on."""
        now = time.monotonic()
        silent, self._last = now - self._last, now
        if step is not None:
            if self._steps:  # the first one's time is not a step's
                self._spans.append(silent)
            self._step = step
            self._steps += 1
        if self._patience > 1:
            self._patience = 1.0
            self._say(f"going on after {silent:.0f} s")

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.limit() / 10)):
            # A thread that holds Python's lock for ever stops this one too; faulthandler's does not need it.
            with contextlib.suppress(OSError, ValueError, OverflowError):
                faulthandler.dump_traceback_later(2 * self.limit(), file=sys.__stderr__ or 2)
            silent = time.monotonic() - self._last
            if silent > self.limit() * self._patience:
                self._patience *= 2
                self._tell(silent)
        faulthandler.cancel_dump_traceback_later()

    def _tell(self, silent: float) -> None:
        process = jax.process_index()
        place = self._run.path / FOLDER / f"{process}.txt"
        head = (
            f"no step has been finished for {silent:.0f} s (the newest is {self._step}); "
            f"process {process} on {socket.gethostname()}, {run_dir.now()}"
        )
        stacks = all_stacks()
        self._dumps.append(f"{head}\n{stacks}\n")
        self._say(f"{head}. Where its threads stand, also in {place}:\n{stacks}")
        # The file system may be what hangs.
        writer = threading.Thread(target=self._write, args=(place, "\n".join(self._dumps)), daemon=True)
        writer.start()
        writer.join(timeout=60)
        if self._on_hang == "exit":
            self._say(f"on_hang is 'exit': this process ends with status {EXIT_STATUS}")
            os._exit(EXIT_STATUS)

    def _write(self, place: epath.Path, text: str) -> None:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            run_dir.atomic_write(place, text)
        except Exception as error:
            self._say(f"{place} could not be written: {error}")

    def _say(self, text: str) -> None:
        """Not `console.say`, which is for process 0: each host's log has its own."""
        with contextlib.suppress(OSError, ValueError):
            print(f"WARNING: watchdog: {text}", file=sys.stderr, flush=True)


def all_stacks() -> str:
    """The stacks of all threads of this process, the newest call first."""
    with tempfile.TemporaryFile() as file:  # faulthandler writes to a descriptor only
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
