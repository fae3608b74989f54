"""What program this process runs: code and libraries, as short texts that hosts can compare."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import pathlib
import platform

PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# Of other versions of these a process may compile another program from the same code, or cannot talk to the
# others' devices.
LIBRARIES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "flax", "optax")


@functools.cache
def sources(folder: pathlib.Path = PACKAGE) -> str:
    """12 hex digits of all Python files in `folder`: of what runs, whether it is committed or not."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()[:12]


def program() -> dict[str, str]:
    """Name → value of what must be the same in all processes of a run; 'none' for what is not installed."""
    return {
        "code": f"{_version('t5style')}+{sources()}",
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{library: _version(library) for library in LIBRARIES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
