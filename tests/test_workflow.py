"""Workflows: order and references, skipping, going on, replacing; two processes' agreement is in
tests/parallel.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import ClassVar

import pytest

from t5style import run_dir, workflow
from t5style.run_dir import RunDir, UserError
from t5style.workflow import OtherSettings, Workflow
from tests.fake_jobs import Count, Part, Write


def calls(folder: pathlib.Path) -> int:
    return len((folder / "calls.txt").read_text())


def pair(text: str = "hello", **fields: object) -> Workflow:
    return Workflow({"write": Write(text), "count": Count("run:write/out.txt", **fields)})  # type: ignore[arg-type]


def test_stages_get_real_paths_and_are_skipped_when_done(tmp_path, capsys):
    figures = pair()(RunDir(tmp_path))
    assert figures["count"]["characters"] == 5
    said = capsys.readouterr().err
    assert "[1/2] write: Writes its text into a file." in said
    assert str(tmp_path / "count") in said
    assert pair()(RunDir(tmp_path)) == figures
    assert calls(tmp_path / "write") == 1
    assert capsys.readouterr().err.count("done already") == 2


def test_a_changed_stage_is_replaced_and_so_are_those_that_use_it(tmp_path, capsys):
    pair()(RunDir(tmp_path))
    capsys.readouterr()
    assert pair("bye")(RunDir(tmp_path))["count"]["characters"] == 3
    said = capsys.readouterr().err
    assert "settings changed (text: 'hello' -> 'bye')" in said
    assert "settings changed (input run:write changed)" in said
    assert (tmp_path / "write.replaced-1" / "out.txt").read_text() == "hello"
    assert (
        json.loads((tmp_path / "count.replaced-1" / "manifest.json").read_text())["figures"]["characters"]
        == 5
    )
    pair("ciao")(RunDir(tmp_path))
    assert (tmp_path / "write.replaced-2" / "out.txt").read_text() == "bye"


def test_an_unfinished_stage_goes_on_and_a_changed_unfinished_one_starts_anew(tmp_path):
    with pytest.raises(ValueError, match="cannot be done"):
        pair(stop_at=2)(RunDir(tmp_path))
    assert RunDir(tmp_path / "count").read_manifest() is None
    assert pair()(RunDir(tmp_path))["count"]["begun_at"] == 2  # stop_at does not affect the result
    assert calls(tmp_path / "write") == 1
    with pytest.raises(ValueError, match="cannot be done"):
        pair("x", stop_at=2)(RunDir(tmp_path))
    assert pair("y")(RunDir(tmp_path))["count"]["begun_at"] == 0


def test_fields_that_may_change_let_a_finished_stage_go_on(tmp_path, capsys):
    pair()(RunDir(tmp_path))
    assert pair(steps=5)(RunDir(tmp_path))["count"] == {"characters": 5, "steps": 5, "begun_at": 3}
    assert "settings changed (steps: 3 -> 5): going on" in capsys.readouterr().err
    assert not (tmp_path / "count.replaced-1").exists()
    with pytest.raises(ValueError, match="cannot be done"):
        pair(steps=9, stop_at=7)(RunDir(tmp_path))
    assert RunDir(tmp_path / "count").read_manifest() is None  # what it said is not true any more
    assert pair(steps=9)(RunDir(tmp_path))["count"]["begun_at"] == 7


def test_external_inputs_decide_too(tmp_path):
    source = tmp_path / "source"
    source.write_text("one")
    job = Workflow({"count": Count(str(source))})
    assert job(RunDir(tmp_path / "run"))["count"]["characters"] == 3
    source.write_text("three")
    assert job(RunDir(tmp_path / "run"))["count"]["characters"] == 5
    source.unlink()
    with pytest.raises(UserError, match="no file or folder"):
        job(RunDir(tmp_path / "run"))


@dataclasses.dataclass(frozen=True)
class Packaged:
    """Reads a file that lies somewhere else on every machine."""

    where: ClassVar[pathlib.Path]

    def inputs(self) -> list[str]:
        return [str(self.where)]

    def __call__(self, run: RunDir) -> dict[str, object]:
        (run.path / "calls.txt").open("a").write("x")
        return {}


def test_a_moved_run_is_still_done_and_so_is_one_whose_inputs_moved(tmp_path, monkeypatch):
    flow = Workflow({**pair().stages, "packaged": Packaged()})
    monkeypatch.setattr(Packaged, "where", tmp_path / "old" / "sample.txt", raising=False)
    Packaged.where.parent.mkdir()
    Packaged.where.write_text("sample")
    flow(RunDir(tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.setattr(Packaged, "where", tmp_path / "new" / "sample.txt")
    flow(RunDir(tmp_path / "there"))
    assert calls(tmp_path / "there" / "write") == calls(tmp_path / "there" / "packaged") == 1
    Packaged.where.write_text("another")
    assert [how for _, _, how in workflow.plan(flow, RunDir(tmp_path / "there"))][2] == (
        f"done or begun with other settings (input {Packaged.where} changed)"
    )


def test_inputs_beside_the_run_or_inside_it_are_not_taken_for_stages(tmp_path):
    for store in (tmp_path / "runs" / "small_corpus", tmp_path / "runs" / "small" / "corpus"):
        run, job = RunDir(tmp_path / "runs" / "small"), Count(str(store / "text"))
        for text in ("one", "three"):
            store.mkdir(parents=True, exist_ok=True)
            (store / "text").write_text(text)
            inputs = workflow.all_inputs(job, {}, run)
            assert inputs == {str(store / "text"): run_dir.path_fingerprint(store / "text")}
        workflow.perform(job, run.child(store.name), inputs, root=run, replace=False)
        (store / "text").write_text("other")
        again = workflow.all_inputs(job, {}, run)
        assert workflow.state(job, run.child(store.name), again)[0] == "changed"


def test_a_stage_made_anew_is_new_to_those_that_use_it(tmp_path):
    pair()(RunDir(tmp_path))
    shutil.rmtree(tmp_path / "write")
    assert [how for _, _, how in workflow.plan(pair(), RunDir(tmp_path))] == [
        "will run",
        "will run after write",
    ]
    pair()(RunDir(tmp_path))
    assert (tmp_path / "count.replaced-1").exists()


@dataclasses.dataclass(frozen=True)
class Train:
    """Trains until `steps`; how it is laid out and watched may change, and does not change the result."""

    steps: int = 1
    mesh: Part = Part()  # noqa: RUF009
    watch: str = ""

    may_change: ClassVar[tuple[str, ...]] = ("steps", "mesh", "watch")

    def __call__(self, run: RunDir) -> dict[str, object]:
        (run.path / "calls.txt").open("a").write("x")
        return {"fingerprint": f"after {self.steps} steps"}


def test_a_nested_field_may_change_and_an_equal_result_is_not_new(tmp_path, capsys):
    def flow(**fields: object) -> Workflow:
        train = Train(**fields)  # type: ignore[arg-type]
        return Workflow(
            {"a": Write("a"), "b": Write("b"), "train": train, "count": Count("run:train/calls.txt")}
        )

    def counts() -> tuple[int, int]:
        return calls(tmp_path / "train"), len(list(tmp_path.glob("count*")))

    flow()(RunDir(tmp_path))
    assert counts() == (1, 1)
    capsys.readouterr()
    flow(mesh=Part(size=8), watch="run:a/out.txt")(RunDir(tmp_path))
    said = capsys.readouterr().err
    assert "settings changed (mesh.size: 1 -> 8; watch: '' -> 'run:a/out.txt'): going on" in said
    flow(mesh=Part(size=8), watch="run:b/out.txt")(RunDir(tmp_path))
    assert counts() == (3, 1)
    flow(steps=2, mesh=Part(size=8))(RunDir(tmp_path))
    assert counts() == (4, 2)
    assert len(RunDir(tmp_path / "train").read_lineage()["sessions"]) == 4
    # The same for a job by itself.
    run = RunDir(tmp_path / "single")
    for job, how in ((Train(), "new"), (Train(mesh=Part(2)), "continued"), (Train(mesh=Part(2)), "done")):
        assert workflow.state(job, run, {})[0] == how
        workflow.perform(job, run, {}, root=run, replace=False)


def test_a_single_job_refuses_what_a_workflow_replaces(tmp_path):
    run = RunDir(tmp_path)
    workflow.perform(Write("a"), run, {}, root=run, replace=False)
    with pytest.raises(OtherSettings, match="text: 'a' -> 'b'"):
        workflow.perform(Write("b"), run, {}, root=run, replace=False)
    assert (tmp_path / "out.txt").read_text() == "a"


@dataclasses.dataclass(frozen=True)
class Nested:
    """Keeps what it was given."""

    parts: object

    def __call__(self, run: RunDir) -> dict[str, object]:
        (run.path / "parts.json").write_text(json.dumps(run_dir.canonical(self.parts)))
        return {}


def test_references_are_found_and_replaced_at_any_depth(tmp_path):
    inner = [Part(name="run:write"), {"a": ("run:write/x", "run", "other:write", 3)}]
    flow = Workflow({"write": Write("x"), "nested": Nested(inner)})
    assert workflow.stage_references(flow.stages["nested"]) == ["write"]
    flow(RunDir(tmp_path))
    write = str(tmp_path / "write")
    part, table = json.loads((tmp_path / "nested" / "parts.json").read_text())
    assert part["name"] == write
    assert table == {"a": [f"{write}/x", "run", "other:write", 3]}


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({}, "at least one stage"),
        ({"a/b": Write("x")}, "stage name 'a/b' cannot name a folder"),
        ({"..": Write("x")}, "cannot name a folder"),
        ({"a": Write}, r"stage 'a' is Write itself .*write @Write\(\)"),
        ({"a": Part()}, "stage 'a' is a Part, which is not a job"),
        (
            {"a": Count("run:b"), "b": Write("x")},
            "'a' refers to run:b, which does not come before it; the order is a, b",
        ),
        ({"a": Count("run:a")}, "which does not come before it"),
        ({"write": Write("x"), "b": Count("run:wirte/x")}, r"no such stage \(did you mean run:write\?\)"),
        ({"a": Count("run:zzz")}, "no such stage; before it come none"),
        ({"a": pair()}, "stage 'a' is a workflow"),
    ],
)
def test_impossible_workflows_are_refused_when_they_are_made(stages, said):
    with pytest.raises(ValueError, match=said):
        Workflow(stages)


@dataclasses.dataclass(frozen=True)
class Everywhere(Nested):
    """Runs in every process."""

    distributed = True


def test_other_processes_run_distributed_stages_only_and_wait_for_the_rest(tmp_path):
    flow = Workflow({"write": Write("x"), "all": Everywhere([])})
    assert flow.distributed
    waits: list[str] = []
    run_dir.set_process(1, waits.append)
    try:
        (tmp_path / "all").mkdir()  # as process 0 would
        flow(RunDir(tmp_path))
    finally:
        run_dir.set_process(0)
    assert not (tmp_path / "write" / "out.txt").exists()
    assert (tmp_path / "all" / "parts.json").exists()
    assert not (tmp_path / "all" / "manifest.json").exists()
    # Read by all, then put in order by process 0 alone, then worked in: a barrier between each.
    assert [w.split()[0] for w in waits] == ["decided", "prepared", "finished"] * 2


def test_the_folder_is_in_order_before_any_process_works_in_it(tmp_path):
    flow = lambda parts: Workflow({"all": Everywhere(parts)})  # noqa: E731
    flow([1])(RunDir(tmp_path))
    seen = {}

    def barrier(name):
        seen[name.split()[0]] = sorted(p.name for p in (tmp_path / "all").iterdir() if p.name != ".lock")

    run_dir.set_process(0, barrier)
    try:
        flow([2])(RunDir(tmp_path))
    finally:
        run_dir.set_process(0)
    assert "manifest.json" in seen["decided"]
    assert seen["prepared"] == ["lineage.json", "started.json"]


def test_plan_tells_what_would_happen(tmp_path):
    run = RunDir(tmp_path)
    flow = pair()
    assert [how for _, _, how in workflow.plan(flow, run)] == ["will run", "will run after write"]
    with pytest.raises(ValueError, match="cannot be done"):
        pair(stop_at=1)(run)
    assert [how for _, _, how in workflow.plan(flow, run)] == [
        "done, will be skipped",
        "unfinished, will go on",
    ]
    flow(run)
    assert [how for _, _, how in workflow.plan(flow, run)] == ["done, will be skipped"] * 2
    hows = [how for _, _, how in workflow.plan(pair("bye"), run)]
    assert hows == ["done or begun with other settings (text: 'hello' -> 'bye')", "will run after write"]
