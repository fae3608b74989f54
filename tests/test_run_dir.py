"""Run folders: writes, fingerprints, locks, manifests, metrics."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, ClassVar

import numpy as np
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from hypothesis import given
from hypothesis import strategies as st

from t5style import run_dir, workflow
from t5style.run_dir import RunDir, UserError
from tests import fake_jobs, helpers


@dataclasses.dataclass(frozen=True)
class Inner:
    a: int = 1
    workers: int = dataclasses.field(default=4, metadata={"affects_result": False})


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    items: tuple[Inner, ...] = ()
    options: dict[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Twin:
    a: int = 1


def test_atomic_write_leaves_the_old_content_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "f.json"
    run_dir.atomic_write(file, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run_dir.atomic_write(file, "new" * 1000)
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_atomic_write_takes_bytes_and_text(tmp_path):
    run_dir.atomic_write(tmp_path / "b", b"\x00\xff")
    run_dir.atomic_write(tmp_path / "t", "ä")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert (tmp_path / "t").read_text(encoding="utf-8") == "ä"


def test_atomic_folder_appears_whole_replaces_whole_and_vanishes_on_failure(tmp_path):
    target = tmp_path / "out"
    with run_dir.atomic_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["one"]
    with run_dir.atomic_folder(target) as folder:
        (folder / "two").write_text("2")
        assert (target / "one").exists()
    assert [p.name for p in target.iterdir()] == ["two"]

    def fail():
        with run_dir.atomic_folder(target) as folder:
            (folder / "three").write_text("3")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in target.iterdir()] == ["two"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_fingerprint_changes_with_the_configuration_and_with_nothing_else():
    base = run_dir.fingerprint(Outer(items=(Inner(2),), options={"x": 1}))
    assert len(base) == 16
    assert int(base, 16) >= 0
    assert run_dir.fingerprint(Outer(items=[Inner(2)], options={"x": 1})) == base  # gin gives lists
    assert run_dir.fingerprint(Outer(items=(Inner(2, workers=8),), options={"x": 1})) == base
    different = [
        Outer(items=(Inner(3),), options={"x": 1}),
        Outer(items=(Inner(2),), options={"x": 1.5}),
        Outer(items=(Inner(2), Inner(2)), options={"x": 1}),
        Outer(items=(Twin(2),), options={"x": 1}),
        Outer(items=(Inner(2),), options={"x": fake_jobs.double}),
    ]
    assert len({base, *map(run_dir.fingerprint, different)}) == 6


_PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_TREES = st.recursive(_PLAIN, lambda t: st.lists(t) | st.dictionaries(st.text(), t), max_leaves=8)


@given(_TREES, _TREES)
def test_fingerprints_are_equal_exactly_when_the_trees_are_equal(a, b):
    same = json.dumps(a) == json.dumps(b)
    assert (run_dir.fingerprint(a) == run_dir.fingerprint(b)) == same
    assert json.loads(json.dumps(run_dir.canonical(a))) == a


@pytest.mark.parametrize(
    "value",
    [lambda x: x, functools.partial(fake_jobs.double, 1), np.zeros(3), open(os.devnull)],  # noqa: SIM115
)
def test_what_has_no_stable_text_is_refused(value):
    with pytest.raises(TypeError, match="frozen dataclass"):
        run_dir.fingerprint({"x": [value]})


def test_path_fingerprint_sees_names_and_contents_but_not_where_or_hidden_files(tmp_path, monkeypatch):
    def make(name, files):
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return run_dir.path_fingerprint(tmp_path / name)

    first = make("a", {"x/1": "one", "2": "two"})
    assert make("b", {"x/1": "one", "2": "two", ".lock": "me"}) == first
    assert make("c", {"x/1": "one", "3": "two"}) != first
    assert make("d", {"x/1": "one!", "2": "two"}) != first
    assert run_dir.path_fingerprint(tmp_path / "*" / "x" / "1") != first
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run_dir.path_fingerprint("~/a") == first
    pattern = run_dir.path_fingerprint("~/[ab]/**/*")
    (tmp_path / "away").mkdir()
    for name in ("a", "b"):
        (tmp_path / name).rename(tmp_path / "away" / name)
    assert run_dir.path_fingerprint("~/away/[ab]/**/*") == pattern
    (tmp_path / "away" / "b" / "2").write_text("three")
    assert run_dir.path_fingerprint("~/away/[ab]/**/*") != pattern
    with pytest.raises(UserError, match=r"no file or folder .*/nothing"):
        run_dir.path_fingerprint(tmp_path / "nothing")


def test_path_fingerprint_of_a_finished_run_is_its_manifests(tmp_path):
    run = RunDir(tmp_path / "run").create()
    (run.path / "big").write_text("x")
    manifest = run.write_manifest(Inner(), inputs={"in": "abc"})
    assert run_dir.path_fingerprint(run.path) == manifest["fingerprint"]
    (run.path / "big").write_text("y")
    assert run_dir.path_fingerprint(run.path) == manifest["fingerprint"]
    again = run.write_manifest(Inner(), inputs={"in": "abc"})
    assert again["fingerprint"] != manifest["fingerprint"]  # nobody knows that the result is the same
    known = run.write_manifest(Inner(), figures={"fingerprint": "0123"})
    assert run_dir.path_fingerprint(run.path) == known["fingerprint"] == "0123"
    (run.path / "manifest.json").write_text('{"fingerprint": "01')
    with pytest.raises(UserError, match=r"run/manifest.json is damaged .*; delete it, and run the job"):
        run_dir.path_fingerprint(run.path)


def test_manifest_says_what_was_done(tmp_path):
    run = RunDir(tmp_path / "run").create()
    (run.path / "out.txt").write_text("x")
    run.write_manifest(Outer(), inputs={"in": "abc"}, figures={"loss": np.float32(0.5), "n": np.int64(3)})
    manifest = run.read_manifest()
    assert manifest is not None
    assert manifest["status"] == "done"
    assert manifest["job"].endswith("Outer")
    assert manifest["config_fingerprint"] == run_dir.fingerprint(Outer())
    assert manifest["figures"] == {"loss": 0.5, "n": 3}
    assert manifest["outputs"] == ["out.txt"]
    (run.path / "manifest.json").write_text('{"half')
    assert run.read_manifest() is None


def test_lineage_entries_add_up(tmp_path):
    run = RunDir(tmp_path / "run")
    assert run.read_lineage() == {}
    run.write_lineage({"a": 1, "b": 2})
    run.write_lineage({"b": 3, "parent": tmp_path})
    assert run.read_lineage() == {"a": 1, "b": 3, "parent": str(tmp_path)}


_HOLD = """
import sys, time
from t5style.run_dir import RunDir
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_names_its_holder_and_a_killed_holder_leaves_it_free(tmp_path):
    run = RunDir(tmp_path / "run")
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(run.path)], cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .*choose another RUN_DIR"):
            with run.lock():
                pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with run.lock(), pytest.raises(UserError, match="this same process"), run.lock():
            pass
    finally:
        holder.kill()
        holder.wait()


def test_lock_where_nothing_can_be_written_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands in its way"), RunDir(tmp_path / "file" / "run").lock():
        pass


def test_metrics_resume_drops_later_steps_and_the_torn_line(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.metrics() as metrics:
        for step in range(1, 6):
            metrics.write(step, {"train/loss": np.float32(step / 2), "eval/x/loss": float("nan")})
    file = run.path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 6, "ti')
    with run.metrics(resume_step=3) as metrics:
        metrics.write(4, {"train/loss": 9.0})
    lines = run.read_metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2]["train/loss"] == 1.5
    assert np.isnan(lines[2]["eval/x/loss"])
    assert lines[3]["train/loss"] == 9.0
    assert abs(lines[3]["time"] - time.time()) < 60
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))


class Bucket(MemoryFileSystem):
    """An object store: folders are nothing but parts of names."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs:/"))

    def mkdir(self, path, create_parents=True, **kwargs):
        pass

    def makedirs(self, path, exist_ok=False):
        pass


@pytest.fixture
def bucket(monkeypatch):
    """A gs:// path to a bucket in memory."""
    for scheme in Bucket.protocol:
        monkeypatch.setitem(_registry, scheme, Bucket)
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    yield "gs://bucket"
    Bucket.store.clear()


def test_metrics_of_a_remote_folder_are_written_whole(bucket):
    clock = [0.0]
    run = RunDir(f"{bucket}/run")
    metrics = run_dir.MetricsWriter(run.path, clock=lambda: clock[0])
    metrics.write(1, {"a": 1.0})
    assert run.read_metrics() == []
    clock[0] = 61.0
    metrics.write(2, {"a": 2.0})
    assert [line["step"] for line in run.read_metrics()] == [1, 2]
    metrics.write(3, {"a": 3.0})
    metrics.flush()
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3]
    metrics.write(4, {"a": 4.0})
    metrics.close()
    assert [line["step"] for line in run.read_metrics()] == [1, 2, 3, 4]
    (events,) = (run.path / "tensorboard").iterdir()
    assert events.read_bytes().count(b"\x0a\x01a") == 4  # the tag of each value
    with run.metrics(resume_step=2) as metrics:
        metrics.write(3, {"a": 9.0})
    assert [line["a"] for line in run.read_metrics()] == [1.0, 2.0, 9.0]


def test_an_object_store_without_its_package_says_which_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # whether it is installed or not
    for place in (RunDir, run_dir.path_fingerprint):
        with pytest.raises(UserError, match=r"gs://bucket/run: .*gcsfs.* pip install 't5style\[gcs\]'"):
            place("gs://bucket/run")


def test_a_workflow_works_in_a_remote_folder(bucket):
    def flow(text):
        return workflow.Workflow(
            {"write": fake_jobs.Write(text), "again": fake_jobs.Write(text, options={"after": "run:write"})}
        )

    run = RunDir(f"{bucket}/runs/a")
    for text in ("one", "two", "two"):
        flow(text)(run)
    assert (run.path / "write" / "calls.txt").read_text() == "x"
    assert (run.path / "write.replaced-1" / "out.txt").read_text() == "one"
    assert [how for _, _, how in workflow.plan(flow("two"), run)] == ["done, will be skipped"] * 2
    texts = run_dir.expand(f"{bucket}/runs/a/**/out.txt")
    assert len(texts) == 4
    assert run_dir.path_fingerprint(f"{bucket}/runs/a/write/*.txt") != run_dir.path_fingerprint(
        f"{bucket}/runs/a/write.replaced-1/*.txt"
    )


def test_only_process_0_writes(tmp_path):
    run = RunDir(tmp_path / "run")
    run_dir.set_process(1)
    try:
        with run.lock(), run.metrics() as metrics:
            metrics.write(1, {"a": 1.0})
        run.write_lineage({"a": 1})
        assert not run.path.exists()
    finally:
        run_dir.set_process(0)


def test_free_bytes_of_a_folder_to_be(tmp_path):
    free = run_dir.free_bytes(tmp_path / "a" / "b" / "c")
    assert free is not None
    assert free > 0
    assert run_dir.free_bytes("gs://bucket/run") is None


def test_a_path_in_any_store_has_a_fingerprint():
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.pipe("/fingerprint/a.txt", b"one")
    first = run_dir.path_fingerprint("memory://fingerprint/a.txt")
    assert run_dir.path_fingerprint("memory://fingerprint") == first
    assert run_dir.path_fingerprint("memory://fingerprint/*.txt") == first
    store.pipe("/fingerprint/a.txt", b"other")
    assert run_dir.path_fingerprint("memory://fingerprint/a.txt") != first
    with pytest.raises(run_dir.UserError, match="there is no file or folder 'memory://nowhere'"):
        run_dir.path_fingerprint("memory://nowhere")
