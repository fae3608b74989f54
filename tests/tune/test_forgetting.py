"""The forgetting report says what changed, and what may be chance."""

import json

import pytest

from t5style.report import charts, evaluation
from t5style.report.stage import read_stage
from t5style.run_dir import RunDir
from t5style.train.pretrain import Pretrain
from t5style.tune import forgetting
from t5style.tune.forgetting import Forgetting
from tests.evaluate import tiny_task
from tests.tune.test_continual import ONE


def figure(value, error=0.1, n=9):
    return {"value": value, "standard_error": error, "n": n}


def test_differences_beyond_two_standard_errors_count():
    def report(loss, accuracy, error):
        return {
            "examples": 9,
            "systems": {
                "model": {"loss": figure(2 + loss), "exact_match": figure(50 + accuracy)},
                "reference": {"loss": figure(2.0), "exact_match": figure(50.0)},
            },
            "margins": {"reference": {"loss": figure(loss, error), "exact_match": figure(accuracy, None)}},
        }

    found = {"tasks": {"a": report(0.5, 3, 0.1), "b": report(0.1, 3, 0.1), "c": report(-1.0, 3, 0.1)}}
    document = forgetting.compare(found, ["a", "b"])
    verdicts = {name: task["numbers"]["loss"]["verdict"] for name, task in document["tasks"].items()}
    assert verdicts == {"a": "worse", "b": "within chance", "c": "better"}
    assert (
        document["tasks"]["a"]["numbers"]["exact_match"]["verdict"] == "within chance"
    )  # nobody knows its error
    old = document["summary"]["old"]
    assert (old["loss_change"], old["worse"], old["better"]) == (pytest.approx(0.3), 1, 0)
    assert old["standard_error"] == pytest.approx((2 * 0.1**2) ** 0.5 / 2)
    assert forgetting.verdict("exact_match", 1.0, 0.1) == "better"
    assert document["tasks"]["a"]["numbers"]["loss"] == {
        **{"before": 2.0, "after": 2.5, "difference": 0.5, "standard_error": 0.1},
        **{"n": 9, "verdict": "worse"},
    }


def test_a_report_of_two_models_on_two_tasks(tmp_path):
    store = tiny_task.make_store(str(tmp_path / "store"))
    runs = {}
    for name, steps in (("before", 2), ("after", 40)):
        fields = {"task": tiny_task.task(store), "mesh": ONE} | tiny_task.settings(steps)
        job = Pretrain(model=tiny_task.model(decoder_only=True), **fields)
        job(RunDir(tmp_path / name).create())
        runs[name] = str(tmp_path / name)
    job = Forgetting(
        **runs,
        old=[tiny_task.language_modelling(store)],
        new=[tiny_task.task(store, metrics=())],
        lengths=tiny_task.LENGTHS,
    )
    figures = job(RunDir(tmp_path / "report").create())
    assert figures["new/loss_change"] < 0
    assert figures["new/better"] >= 2
    document = json.loads((tmp_path / "report" / "forgetting.json").read_text())
    assert document["tasks"]["stream"]["is"] == "old"
    table = (tmp_path / "report" / "forgetting.md").read_text()
    assert "| opposites | new | loss ↓ |" in table
    assert "better" in table
    (tmp_path / "report" / "manifest.json").write_text('{"figures": {}, "job": "x", "status": "done"}')
    drawn: dict[str, charts.Figure] = {}
    assert len(evaluation.evaluations(read_stage("report", str(tmp_path / "report")), drawn)) == 2
    assert drawn
    with pytest.raises(ValueError, match="old and new must each hold a task"):
        Forgetting(**runs, old=[], new=[tiny_task.task(store)], lengths=tiny_task.LENGTHS)
