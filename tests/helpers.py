"""What several test files use: running the command line in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What planning, training, generation and serving must never load.
HEAVY = ("tensorflow", "torch", "transformers", "seqio", "tensorflow_datasets", "clu")

_RUN = """
import sys, time
from t5style.main import main
report, *arguments = sys.argv[1:]
status = main(["t5style", *arguments])
with open(report, "w") as file:
    print(time.process_time(), *sys.modules, sep="\\n", file=file)
sys.exit(status)
"""


@dataclasses.dataclass(frozen=True)
class Ran:
    """A finished command: `modules` and `cpu_seconds` are empty and NaN if it was killed."""

    returncode: int
    stdout: str
    stderr: str
    modules: frozenset[str]
    cpu_seconds: float

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    def loaded(self, packages: Sequence[str] = HEAVY) -> list[str]:
        """Those of the packages that the process had imported when it ended."""
        assert self.modules, f"the process ended early:\n{self.output}"
        return [name for name in packages if name in self.modules]


def clean_env(extra: Mapping[str, str] | None = None, devices: int = 1) -> dict[str, str]:
    """The environment for a process on the CPU with this many devices, as one of no cluster."""
    drop = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID", "TPU_WORKER_ID", "COLUMNS")
    env = {name: value for name, value in os.environ.items() if name not in drop}
    env["JAX_PLATFORMS"] = "cpu"
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return env | dict(extra or {})


def run_main(
    *arguments: str,
    cwd: str | os.PathLike[str] = ROOT,
    env: Mapping[str, str] | None = None,
    devices: int = 1,
    timeout: float = 300,
) -> Ran:
    """Runs `python -m t5style.main arguments...` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report"
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(report), *arguments],
            cwd=cwd,
            env=clean_env(env, devices),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        seconds, *modules = report.read_text().split("\n") if report.exists() else ["nan"]
    return Ran(done.returncode, done.stdout, done.stderr, frozenset(modules), float(seconds))


def gin_file(folder: pathlib.Path, text: str, name: str = "test.gin") -> str:
    """Writes a gin file with the usual imports above `text`; returns its path."""
    head = (
        "from __gin__ import dynamic_registration\n"
        "from t5style import launch\nfrom t5style import workflow\nfrom tests import fake_jobs\n"
    )
    file = folder / name
    file.write_text(head + text)
    return str(file)
