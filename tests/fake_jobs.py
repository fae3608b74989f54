"""Small jobs for the tests of launching and workflows; gin files import them as `from tests import
fake_jobs`.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from t5style.console import progress, say
from t5style.run_dir import RunDir, UserError


def double(x: int) -> int:
    return 2 * x


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a job."""

    size: int = 1
    name: str = "part"


@dataclasses.dataclass(frozen=True)
class Write:
    """Writes its text into a file."""

    text: str
    size: int = 1
    rate: float = 0.5
    part: Part = Part()
    parts: Sequence[Part] = ()
    function: Callable[[int], int] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, not {self.size}; give the number of copies")

    def __call__(self, run: RunDir) -> dict[str, Any]:
        with progress("writing", self.size, unit="copies") as bar:
            for _ in range(self.size):
                bar.advance()
        (run.path / "out.txt").write_text(self.text * self.size)
        (run.path / "calls.txt").open("a").write("x")
        return {"characters": len(self.text) * self.size, "rate": self.rate}


@dataclasses.dataclass(frozen=True)
class Count:
    """Counts the characters of a file, one step each, and remembers how far it came."""

    file: str
    steps: int = 3
    stop_at: int | None = dataclasses.field(default=None, metadata={"affects_result": False})
    how: str = dataclasses.field(default="error", metadata={"affects_result": False})

    may_change: ClassVar[tuple[str, ...]] = ("steps",)

    def inputs(self) -> Sequence[str]:
        return (self.file,)

    def __call__(self, run: RunDir) -> dict[str, Any]:
        state = pathlib.Path(run.path) / "state"
        begun = int(state.read_text()) if state.exists() else 0
        for step in range(begun, self.steps):
            if step == self.stop_at:
                self._stop()
            state.write_text(str(step + 1))
        return {
            "characters": len(pathlib.Path(self.file).read_text()),
            "steps": self.steps,
            "begun_at": begun,
        }

    def _stop(self) -> None:
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "wait":
            say("waiting")
            time.sleep(60)
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "user":
            raise UserError("the tape is full; put in another")
        if self.how == "bug":
            raise ZeroDivisionError("a mistake in the program")
        raise ValueError("step 1 cannot be done; use another")


@dataclasses.dataclass(frozen=True)
class Hold:
    """Holds anything, so that it is built."""

    parts: Sequence[Any] = ()

    def __call__(self, run: RunDir) -> dict[str, Any]:
        return {}
