"""What a result was made with: code, command, machine and packages."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from t5style import run_dir

ROOT = Path(__file__).resolve().parent.parent


def session() -> dict[str, Any]:
    """This process as an entry of `sessions` in a stage's lineage.json; `started` is now."""
    return {
        "code": _code(),
        "command": shlex.join(sys.orig_argv),
        "started": run_dir.now(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": _packages(),
    }


@functools.cache
def _packages() -> dict[str, str]:
    versions = {
        d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


@functools.cache
def _code() -> dict[str, Any]:
    """Commit of the code that runs, and whether files differ from it; the version alone if it is not in a
    repository. Asked once: what is edited later is not what this process runs.
    """
    code: dict[str, Any] = {"version": importlib.metadata.version("t5style")}
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            code["commit"] = _git("rev-parse", "HEAD").strip()
            code["changed_files"] = [line[3:] for line in _git("status", "--porcelain").splitlines()]
    return code


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=20,
        stdin=subprocess.DEVNULL,
    ).stdout
