"""Shared by the training tests: one token store, and tiny runs in processes of their own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.train import tiny_run

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small token store."""
    return tiny_run.make_store(str(tmp_path_factory.mktemp("store") / "tokens"))


@pytest.fixture(scope="session")
def start(store: str) -> Callable[..., subprocess.Popen[str]]:
    """start(folder, **fields) -> the running process of a tiny run on one CPU device."""
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(HERE.parent.parent)}

    def begin(folder: Any, **fields: Any) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "tiny_run.py"), str(folder), store, json.dumps(fields)]
        return subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return begin


@pytest.fixture(scope="session")
def finish() -> Callable[..., tuple[int, str, str]]:
    """finish(process) -> (exit status, stdout, stderr)."""

    def wait(process: subprocess.Popen[str]) -> tuple[int, str, str]:
        try:
            out, err = process.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, out, err

    return wait
