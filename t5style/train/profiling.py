"""Traces of a few training steps for xprof, on request.

    --gin.Pretrain.profile_steps='(10, 12)'          # then: xprof --logdir=<run>/profile

Every process traces its own host and devices. All of them write into one session of `<run>/profile`, so that
xprof shows the slice as a whole. Nothing that goes wrong here ends a run.
"""

from __future__ import annotations

import contextlib
import pathlib
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from t5style import console, run_dir

FOLDER = "profile"
MAX_STEPS = 20  # a trace is kept in memory until it ends: of a large model some 100 MB a step and host
MAX_SECONDS = 300.0  # no step after this one is traced, whatever was asked for


def check_steps(steps: Sequence[int] | None, end: int) -> None:
    """Raises ValueError unless `steps` is None or (first, last) with 1 <= first <= last <= `end`, few."""
    if steps is None:
        return
    if len(steps) != 2 or not all(isinstance(step, int) for step in steps):
        raise ValueError(f"profile_steps is {steps!r}; it must be (first, last), two steps, or None.")
    first, last = steps
    if not 1 <= first <= last <= end:
        raise ValueError(
            f"profile_steps is ({first}, {last}); first and last must lie between 1 and the last step, {end}."
        )
    if last - first >= MAX_STEPS:
        raise ValueError(
            f"profile_steps is ({first}, {last}), {last - first + 1} steps; a trace holds at most "
            f"{MAX_STEPS}: try ({first}, {first + 2})."
        )


class Tracer:
    """Traces the steps from `steps[0]` to `steps[1]`; those of them that have been made before are left out.

    Use: `with tracer.step(n, state): state, metrics = step(...)`, then `tracer.finished(n, metrics)`.
    """

    def __init__(self, run: run_dir.RunDir, steps: Sequence[int] | None) -> None:
        self._run = run
        self._first, self._last = steps if steps is not None else (0, -1)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None  # while a trace is running
        self._began, self._newest, self._until = 0, 0, 0.0

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._scratch is not None:
            self._stop(self._newest)

    @contextlib.contextmanager
    def step(self, number: int, state: Any) -> Iterator[None]:
        """Around the dispatch of step `number`, which gets `state`; starts the trace if it is time."""
        if not self._first <= number <= self._last:
            yield
            return
        if self._scratch is None:
            self._start(number, state)
        self._newest = number
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def finished(self, number: int, result: Any) -> None:
        """After the dispatch of step `number`; stops the trace once its last step's `result` is there."""
        if self._scratch is None or (number < self._last and time.monotonic() < self._until):
            return
        jax.block_until_ready(result)
        self._stop(number)

    def _start(self, number: int, state: Any) -> None:
        jax.block_until_ready(state)  # the steps before do not belong to it
        # Written here and copied: the profiler itself cannot reach every object store, and names its session
        # by the second, in which the hosts' clocks differ.
        scratch = tempfile.TemporaryDirectory(prefix="t5style-profile-")
        try:
            jax.profiler.start_trace(scratch.name)
        except Exception as error:
            scratch.cleanup()
            self._give_up(error)
            return
        self._scratch, self._began = scratch, number
        self._until = time.monotonic() + MAX_SECONDS

    def _stop(self, number: int) -> None:
        scratch, self._scratch = self._scratch, None
        assert scratch is not None
        target = self._run.path / FOLDER / "plugins" / "profile" / f"steps_{self._began}-{number}"
        try:
            jax.profiler.stop_trace()
            target.mkdir(parents=True, exist_ok=True)
            for file in sorted(pathlib.Path(scratch.name).glob("plugins/profile/*/*")):
                # <host>.xplane.pb; two processes of one host would overwrite each other.
                kind = file.name.removeprefix(socket.gethostname()).lstrip(".")
                name = f"{jax.process_index()}-{socket.gethostname()}.{kind}"
                run_dir.atomic_write(target / name, file.read_bytes())
            console.say(
                f"profiled steps {self._began} to {number}; to look at it: "
                f"xprof --logdir={self._run.path / FOLDER}"
            )
        except Exception as error:
            self._give_up(error)
        finally:
            scratch.cleanup()
        self._first = self._last = 0  # one trace is enough

    def _give_up(self, error: Exception) -> None:
        self._first = self._last = 0
        text = f"WARNING: no profile of the steps asked for ({error}); training goes on"
        print(text, file=sys.stderr, flush=True)  # on whichever host it was
