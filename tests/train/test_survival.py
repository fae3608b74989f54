"""What a run survives, shown with real processes: kill -9, SIGTERM, Ctrl-C, a full disk."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from t5style.parallel import local
from t5style.train import checkpoint

STEPS = 20
Start = Callable[..., "subprocess.Popen[str]"]
Finish = Callable[..., "tuple[int, str, str]"]


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Metrics without what a clock decides."""
    text = (folder / "metrics.jsonl").read_text().splitlines()
    clock = ("time", "train/tokens_per_second", "train/mfu")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in text]


def same_params(a: pathlib.Path, b: pathlib.Path) -> None:
    one, two = checkpoint.restore_params(a), checkpoint.restore_params(b)
    for path, value in jax.tree_util.tree_leaves_with_path(one):
        other = dict(jax.tree_util.tree_leaves_with_path(two))[path]
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other), err_msg=str(path))


def wait_for_step(folder: pathlib.Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until metrics of this step are on disk."""
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        file = folder / "metrics.jsonl"
        if file.exists() and any(f'"step": {s},' in file.read_text() for s in range(step, STEPS + 1)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never reached: {process.communicate()}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, start: Start, finish: Finish) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    status, _, err = finish(start(folder, steps=STEPS))
    assert status == 0, err
    assert [line["step"] for line in lines(folder)] == [3, 6, 9, 10, 12, 15, 18, 20, 20]
    return folder


def test_killed_run_resumes_bit_identically(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path, start: Start, finish: Finish
) -> None:
    folder = tmp_path / "killed"
    at = random.randrange(5, 17)
    process = start(folder, steps=STEPS, slow=0.15)
    wait_for_step(folder, at - at % 3, process)
    time.sleep(random.random() * 0.3)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    status, _, err = finish(start(folder, steps=STEPS))
    assert status == 0, err
    assert "resumes this run at step" in err
    assert lines(folder) == lines(uninterrupted), f"killed about step {at}"
    same_params(folder, uninterrupted)


def test_sigterm_saves_exits_0_and_resumes(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path, start: Start, finish: Finish
) -> None:
    folder = tmp_path / "terminated"
    process = start(folder, steps=STEPS, slow=0.15, checkpoint_every=None)
    wait_for_step(folder, 3, process)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    assert status == 0, err
    (stopped,) = checkpoint.all_steps(folder / "checkpoints")
    assert f"stopped at step {stopped}; run the same command to go on" in err
    assert 3 <= stopped < STEPS
    status, _, err = finish(start(folder, steps=STEPS, checkpoint_every=None))
    assert status == 0, err
    assert f"resumes this run at step {stopped} of {STEPS}" in err
    assert lines(folder) == lines(uninterrupted)
    same_params(folder, uninterrupted)
    sessions = json.loads((folder / "goodput.json").read_text())
    assert [(s["first_step"], s["last_step"]) for s in sessions] == [(0, stopped), (stopped, STEPS)]


def test_ctrl_c_saves_and_exits_130(tmp_path: pathlib.Path, start: Start, finish: Finish) -> None:
    folder = tmp_path / "interrupted"
    process = start(folder, steps=STEPS, slow=0.15, checkpoint_every=None)
    wait_for_step(folder, 3, process)
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130, err
    (stopped,) = checkpoint.all_steps(folder / "checkpoints")
    assert f"stopped at step {stopped}" in err


def fill(file: pathlib.Path) -> None:
    """Writes until the file system is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while stream.write(b"\0" * 4096):
            pass


def test_full_disk_while_saving(
    uninterrupted: pathlib.Path, tmp_path: pathlib.Path, start: Start, finish: Finish
) -> None:
    """A file system of 3 MB, filled up once a checkpoint is on it."""
    folder = tmp_path / "small"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("no right to mount a small tmpfs here")
    try:
        process = start(folder / "run", steps=STEPS, slow=0.3, keep=2)
        deadline = time.time() + 200
        while not checkpoint.all_steps(folder / "run" / "checkpoints") and time.time() < deadline:
            time.sleep(0.02)
        filler = folder / "filler"
        fill(filler)
        status, _, err = finish(process)
        assert status == 1, err
        told = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(told) == 1, err
        assert "could not be written to" in told[0]
        good = checkpoint.all_steps(folder / "run" / "checkpoints")
        assert good
        assert all(checkpoint.check(folder / "run" / "checkpoints" / str(step)) is None for step in good)
        filler.unlink()
        status, _, err = finish(start(folder / "run", steps=STEPS, keep=2))
        assert status == 0, err
        assert lines(folder / "run") == lines(uninterrupted)
        same_params(folder / "run", uninterrupted)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(
    store: str, tmp_path: pathlib.Path, finish: Finish
) -> None:
    """Two processes of two devices; the one that is not the main one gets the signal: SIGTERM, as in a
    preemption, and the second time Ctrl-C.
    """
    here = pathlib.Path(__file__).parent
    mesh = {"data": 2, "fsdp": 2}

    def begin(folder: pathlib.Path, **fields: Any) -> list[subprocess.Popen[str]]:
        port = local.free_port()
        text = json.dumps({"steps": STEPS, "mesh": mesh, "eval_split": None, **fields})
        command = [sys.executable, str(here / "tiny_run.py"), str(folder), store, text]
        base = os.environ | {"PYTHONPATH": str(here.parent.parent)}
        return [
            subprocess.Popen(
                command,
                env=local.environment(base, port, processes=2, process=process, devices=2),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for process in range(2)
        ]

    folder = tmp_path / "run"
    both = begin(folder, slow=0.3, checkpoint_every=None)
    wait_for_step(folder, 3, both[0])
    both[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in both]
    assert [status for status, _, _ in ends] == [0, 0], ends
    (stopped,) = checkpoint.all_steps(folder / "checkpoints")
    assert f"stopped at step {stopped}; run the same command to go on" in ends[0][2]
    assert {p.name for p in (folder / "checkpoints" / str(stopped)).glob("seal-*")} == {
        "seal-0-of-2.json",
        "seal-1-of-2.json",
    }
    both = begin(folder, slow=0.3, checkpoint_every=None)
    wait_for_step(folder, stopped + 3, both[0])
    both[1].send_signal(signal.SIGINT)
    ends = [finish(process) for process in both]
    assert [status for status, _, _ in ends] == [0, 130], ends
    assert f"resumes this run at step {stopped} of {STEPS}" in ends[0][2]
    again = max(checkpoint.all_steps(folder / "checkpoints"))
    assert stopped < again < STEPS
    assert f"stopped at step {again}; run the same command to go on" in ends[0][2]


def test_training_loads_neither_tensorflow_nor_torch(store: str, tmp_path: pathlib.Path) -> None:
    here = pathlib.Path(__file__).parent
    code = (
        f"import sys; sys.path.insert(0, {str(here)!r}); import tiny_run\n"
        "from t5style import run_dir\n"
        f"tiny_run.job({store!r}, steps=4)(run_dir.RunDir({str(tmp_path / 'run')!r}).create())\n"
        "print([m for m in ('tensorflow', 'torch', 'transformers', 'seqio') if m in sys.modules])"
    )
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(here.parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
