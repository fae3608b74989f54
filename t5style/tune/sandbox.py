"""Generated code, run where it can harm neither the run nor the machine: limits on time, memory, processes,
files and output, no network, an empty environment, and nothing left behind.

    verdict = Sandbox(seconds=5).run([("answer", "def f(x): return x + 1"), ("tests", "assert f(1) == 2")])
    verdict.passed, verdict.verdict    # True, 'passed'

How it is done, and what it does not promise, stands in sandbox_program.py.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from t5style.run_dir import UserError

_PROGRAM = pathlib.Path(__file__).with_name("sandbox_program.py")
_GRACE = 10.0  # seconds that starting and cleaning up may take, on a busy machine
# One thread per library: threads count as processes, and each reserves memory.
_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

VERDICTS = (
    "passed",
    "failed",
    "error",
    "exit",
    "time",
    "memory",
    "processes",
    "disk",
    "output",
    "killed",
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a program.

    Attributes:
      verdict: 'passed' (it ran to its last line); 'failed' (an assert); 'error' (another exception); 'exit'
        (it left before its last line); 'time', 'memory', 'processes', 'disk' or 'output' (that limit);
        'killed' (a signal).
      text: the end of the traceback, or which limit it was.
      output: the end of what it has printed.
      isolation: 'namespaces', 'user' or 'none', see Sandbox.
      seconds: from the start of the sandbox to its end.
    """

    verdict: str
    text: str = ""
    output: str = ""
    isolation: str = "none"
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every line was run and no assert failed."""
        return self.verdict == "passed"


@dataclasses.dataclass(frozen=True)
class Sandbox:
    """Runs Python programs, each in processes of its own that are gone when it has ended.

    Attributes:
      seconds: wall-clock time of a program, and (plus one) processor time of each of its processes.
      memory: bytes of address space of a process, and bytes in memory of all its processes together.
      processes: processes and threads.
      disk: bytes of all files (of a file, where there are no namespaces, and of all by looking).
      files: open files of a process.
      output: bytes that it may print.
      workers: programs at a time; None for as many as there are processors.
      weak: run on a machine that allows neither namespaces nor, to root, another user. The limits hold there,
        but a program may signal any process of the same user. Without namespaces it also has the network,
        and writes where its user may.
    """

    seconds: float = 5.0
    memory: int = 512 << 20
    processes: int = 16
    disk: int = 32 << 20
    files: int = 64
    output: int = 1 << 20
    workers: int | None = dataclasses.field(default=None, metadata={"affects_result": False})
    weak: bool = False

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "processes", "disk", "files", "output", "workers"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")

    def run(self, parts: Sequence[tuple[str, str]], *, namespaces: bool = True) -> Verdict:
        """What becomes of a program.

        Args:
          parts: (name, source) of what is run one after the other in one module; names stand in tracebacks.
          namespaces: False: as on a machine that has none (for tests).

        Raises:
          UserError: the machine allows no isolation, and `weak` is False.
        """
        if not sys.platform.startswith("linux"):
            raise UserError(
                f"generated code is run on Linux only, this is {sys.platform}: use another reward, or a "
                "container"
            )
        limits = {
            name: getattr(self, name)
            for name in ("seconds", "memory", "processes", "disk", "files", "output")
        }
        folder = os.path.realpath(tempfile.mkdtemp(prefix="t5style-sandbox-"))
        try:
            request = {
                "parts": [list(part) for part in parts],
                "limits": limits,
                "folder": folder,
                "word": secrets.token_hex(16),
                "namespaces": namespaces,
                "other_user": _others_may_read(),
                "weak": self.weak,
            }
            os.chmod(folder, 0o711)
            answer = self._ask(request)
            if answer.get("verdict") == "refused" and namespaces:  # some containers allow half of it
                answer = self._ask(request | {"namespaces": False})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if answer["verdict"] == "refused":
            raise UserError(
                "generated code cannot be run safely here: this machine allows neither namespaces "
                f"({answer['text']}) nor running as another user. Allow user namespaces (sysctl "
                "kernel.unprivileged_userns_clone=1), or set Sandbox.weak to True if nothing here is of "
                "value."
            )
        return Verdict(
            answer["verdict"],
            answer.get("text", ""),
            answer.get("said", ""),
            answer.get("isolation", "none"),
            answer.get("seconds", 0.0),
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
        try:
            said, errors = process.communicate(json.dumps(request).encode(), self.seconds + _GRACE)
        except subprocess.TimeoutExpired:
            said, errors = b"", b"the sandbox itself did not end"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        try:
            return dict(json.loads(said))
        except ValueError:
            return {"verdict": "killed", "text": errors.decode("utf-8", "replace")[-1000:]}

    def run_all(self, programs: Sequence[Sequence[tuple[str, str]]]) -> list[Verdict]:
        """The verdicts of many programs, `workers` at a time."""
        workers = self.workers or os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            return list(pool.map(self.run, programs))


@functools.cache
def _others_may_read() -> bool:
    """Whether the interpreter and its libraries may be read by a user who is nobody."""
    for path in {sys.executable, sys.prefix, sys.base_prefix, str(_PROGRAM)}:
        place = pathlib.Path(os.path.realpath(path))
        for part in (place, *place.parents):
            if not part.stat().st_mode & (stat.S_IXOTH if part.is_dir() else stat.S_IROTH):
                return False
    return True
