"""The quickstart from raw text to the report, made short by settings on the command line only."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import ROOT, clean_env, run_main
from tests.test_readme import QUICKSTART

STAGES = [
    "corpus",
    "vocabulary",
    "text",
    "definitions",
    "topics",
    "pretrained",
    "tuned",
    "language",
    "evaluation",
    "report",
]


def losses(run: pathlib.Path, stage: str) -> list[float]:
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [row["train/loss"] for row in map(json.loads, lines) if "train/loss" in row]


@pytest.mark.timeout(900)
def test_stops_goes_on_is_skipped_and_runs_again_from_its_saved_config(tmp_path):
    run = tmp_path / "run"
    settings = ["--gin_file=experiments/quickstart.gin", *QUICKSTART, f"--gin.RUN_DIR={run}"]
    # Ctrl-C while the vocabulary is made or just after it: nothing of the corpus is lost.
    begun = subprocess.Popen(
        [sys.executable, "-m", "t5style.main", *settings],
        cwd=ROOT,
        env=clean_env(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (run / "corpus" / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    begun.send_signal(signal.SIGINT)
    _, said = begun.communicate(timeout=120)
    assert begun.returncode == 130, said
    made = (run / "corpus" / "manifest.json").stat().st_mtime_ns

    done = run_main(*settings, timeout=600)
    assert done.returncode == 0, done.output
    assert done.loaded() == []
    assert (run / "corpus" / "manifest.json").stat().st_mtime_ns == made
    assert all((run / stage / "manifest.json").exists() for stage in STAGES)
    results = json.loads((run / "evaluation" / "results.json").read_text())
    assert set(results["tasks"]) == {"definitions", "topics"}
    page = (run / "report" / "report.html").read_text()
    assert "http-equiv" not in page
    assert "<script src=" not in page, "the report must be self-contained"

    again = run_main(*settings)
    assert again.returncode == 0
    assert again.output.count("done already:") == len(STAGES), again.output

    moved = run_main(f"--gin_file={run}/config.gin", f"--gin.RUN_DIR={tmp_path}/again", timeout=600)
    assert moved.returncode == 0, moved.output
    for stage in ("pretrained", "tuned"):
        assert losses(tmp_path / "again", stage) == losses(run, stage) != []
