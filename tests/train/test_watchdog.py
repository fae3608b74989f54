"""A run whose steps stop coming says where it stands."""

import io
import re
import sys
import threading
import time

import pytest

from t5style import run_dir
from t5style.parallel import local
from t5style.parallel.mesh import MeshConfig
from t5style.train import watchdog
from t5style.train.loop import LoopOptions
from tests.train import tiny_run


def waiting_for_godot(event):
    event.wait(30)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_step_that_does_not_end_is_told_of(tmp_path, capfd):
    """The stacks of every thread, once for each doubling of the time, and a line when it goes on."""
    godot = threading.Event()
    other = threading.Thread(target=waiting_for_godot, args=(godot,), daemon=True)
    other.start()
    file = tmp_path / "stacks" / "0.txt"
    with watchdog.Watchdog(run_dir.RunDir(tmp_path), seconds=0.3, step=7) as dog:
        dog.beat(8)
        wait_for(lambda: file.exists() and file.read_text().count("no step has been finished") == 2)
        dog.beat(9)
    godot.set()
    text = file.read_text()
    assert re.search(r"no step has been finished for \d+ s \(the newest is 8\); process 0 on", text)
    for function in ("waiting_for_godot", "test_a_step_that_does_not_end_is_told_of", "_watch"):
        assert f"in {function}" in text
    said = capfd.readouterr().err
    assert "in waiting_for_godot" in said
    assert f"also in {file}" in said
    assert "WARNING: watchdog: going on after" in said


def test_signs_of_life_keep_it_silent(tmp_path):
    with watchdog.Watchdog(run_dir.RunDir(tmp_path), seconds=1.0) as dog:
        for step in range(15):
            dog.beat(step if step % 2 else None)
            time.sleep(0.1)
    assert not (tmp_path / "stacks").exists()


def test_limit(tmp_path, monkeypatch):
    """10 minutes, or ten median steps if that is more; before the first step's end a program may compile."""
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog, strict = (watchdog.Watchdog(run_dir.RunDir(tmp_path), seconds) for seconds in (None, 30))
    assert (dog.limit(), strict.limit()) == (600, 600)
    now[0] = 500.0
    for each in (dog, strict):
        each.beat(1)
    assert (dog.limit(), strict.limit()) == (600, 30)
    for step in (2, 3, 4):
        now[0] += 100.0
        dog.beat(step)
    assert dog.limit() == 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hang_seconds": 0}, "hang_seconds is 0; it must be above 0, or None for 10 times the median step"),
        ({"on_hang": "kill"}, "on_hang is 'kill'; it must be one of warn, exit"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoopOptions(steps=3, **settings)


def test_a_run_that_hangs(tmp_path, store, monkeypatch, capfd):
    """Its data do not come for a second in the middle: the run is warned of, and ends as it would have."""
    from t5style.data.pipeline import BatchSource

    honest = BatchSource.batch_at

    def batch_at(self, n, shard=0, num_shards=1):
        if n == 8 and self.shuffle:
            time.sleep(1.5)
        return honest(self, n, shard, num_shards)

    monkeypatch.setattr(BatchSource, "batch_at", batch_at)
    settings = {"steps": 12, "checkpoint_every": None, "hang_seconds": 0.5, "mesh": MeshConfig(devices=1)}
    job = tiny_run.job(store, eval_split=None, **settings)
    figures = job(run_dir.RunDir(tmp_path).create())
    assert figures["steps"] == 12
    assert "in batch_at" in (tmp_path / "stacks" / "0.txt").read_text()
    assert "going on after" in capfd.readouterr().err


def test_on_hang_exit_ends_the_process(tmp_path):
    code = f"""if True:
        import time
        from t5style import run_dir
        from t5style.train import watchdog
        with watchdog.Watchdog(run_dir.RunDir({str(tmp_path)!r}), 0.3, "exit") as dog:
            dog.beat(1)
            time.sleep(60)
    """
    said = io.BytesIO()
    assert local.run([sys.executable, "-c", code], 1, 1, said) == watchdog.EXIT_STATUS
    assert "time.sleep(60)" not in said.getvalue().decode()  # stacks name lines, not their text
    assert (tmp_path / "stacks" / "0.txt").exists()
