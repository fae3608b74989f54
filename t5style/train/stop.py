"""How a signal stops training: after the step at hand, with everything saved."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Catches SIGTERM and Ctrl-C while training: the loop finishes its step and saves. A second one stops at
    once.

    With several processes, jax's preemption service catches SIGTERM on any of them and agrees on one step at
    which all of them stop; Ctrl-C is handed on to it.
    """

    def __init__(self) -> None:
        self._status: int | None = None
        self._agreed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            alone = jax.process_count() == 1
            for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _caught(self, number: int, frame: Any) -> None:
        self._status = 0 if number == signal.SIGTERM else 130
        self._restore()
        # Not print: its buffer may be the very thing that was interrupted.
        os.write(2, b"\nfinishing this step and saving; once more to stop at once\n")
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def is_caught(self) -> bool:
        """Whether a signal has come, for who need not agree with other processes; with several, False."""
        return self._status is not None and jax.process_count() == 1

    def requested(self, step: int) -> int | None:
        """The exit status if the loop is to stop after this step, else None; once agreed, it stays so."""
        if jax.process_count() == 1:
            return self._status
        self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(step)
        return (self._status or 0) if self._agreed else None
