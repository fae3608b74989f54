"""The report: one file that needs nothing else, with what the stages found in it."""

import dataclasses
import html.parser
import json
import math
import re

import pytest

from t5style.report import charts, evaluation, report, sections
from t5style.report.report import Report
from t5style.report.stage import read_stage
from t5style.run_dir import RunDir, UserError


@dataclasses.dataclass(frozen=True)
class Job:
    """Stands for any job: the report reads folders and does not know jobs."""

    name: str
    features: dict[str, str] = dataclasses.field(default_factory=dict)


def entry(value, error, n=200):
    return {"value": value, "standard_error": error, "n": n}


def results(model_score=41.0):
    """results.json as t5style/evaluate/results.py describes it."""
    return {
        "format": 1,
        "model": "runs/x/tuned",
        "reference_model": "runs/x/pretrained",
        "split": "test",
        "tasks": {
            "glosses": {
                "examples": 200,
                "cut": 1,
                "dropped": 0,
                "tokens": 3100,
                "bytes": 9400,
                "systems": {
                    "model": {
                        "loss": entry(3.21, 0.04),
                        "bits_per_byte": entry(1.61, 0.02),
                        "token_accuracy": entry(0.42, 0.01),
                        "rougeL": entry(model_score, 1.2),
                    },
                    "reference": {
                        "loss": entry(4.9, 0.05),
                        "bits_per_byte": entry(2.4, 0.03),
                        "token_accuracy": entry(0.22, 0.01),
                        "rougeL": entry(10.0, 0.8),
                    },
                    "majority_target": {"rougeL": entry(12.5, 0.9)},
                    "unigram_tokens": {"loss": entry(6.4, 0.05), "token_accuracy": entry(0.08, 0.005)},
                },
                "margins": {
                    "reference": {"loss": entry(-1.69, 0.05), "rougeL": entry(31.0, 1.3)},
                    "majority_target": {"rougeL": entry(28.5, 1.4)},
                    "unigram_tokens": {"token_accuracy": entry(0.004, 0.003), "loss": entry(0.5, 0.1)},
                },
            }
        },
    }


@pytest.fixture
def stages(tmp_path):
    """A workflow's finished stages: name -> folder."""
    root = RunDir(tmp_path / "run").create()
    session = {
        "code": {"version": "0.1.0", "commit": "abc123", "changed_files": ["x.py"]},
        "command": "python -m t5style.main",
        "started": "2026-01-01T00:00:00+0000",
        "python": "3.11.2",
        "packages": {"jax": "0.10.2", "zzz": "9"},
    }
    (root.path / "config.gin").write_text("RUN_DIR = 'runs/x'\n")
    count = {"documents": 90, "characters": 1000, "bytes": 1100}
    split = {"train": {**count, "bytes": 880}, "validation": {**count, "bytes": 220}}
    files = {
        "corpus": {
            "data_card.json": {
                "documents_in": 100,
                "documents": 90,
                "cut_in_two": 0,
                "quarantined": 2,
                "bytes_in": 1400,
                "dropped": {"exact duplicate": 10},
                "sources": {"A <b>source</b>": count},
                "licenses": {"PSF-2.0": count},
                "languages": {"en": count},
                "splits": split,
            }
        },
        "vocabulary": {"vocabulary.json": {"kind": "sentencepiece"}},
        "tokens": {"store.json": {"format": 1}},
        "pretrained": {
            "model.json": {
                "decoder_layers": 2,
                "encoder_layers": 2,
                "d_model": 64,
                "d_ff": 128,
                "activations": ["gelu", "linear"],
                "num_heads": 4,
                "positions": "relative_bias",
                "vocab_size": 1024,
                "dtype": "bfloat16",
                "param_dtype": "float32",
            },
            "goodput.json": [
                {"seconds": {"step": 60.0, "compile": 20.0, "data_wait": 0.5}, "devices": "1 × cpu"},
                {"seconds": {"step": 15.0, "start": 4.5}, "devices": "1 × cpu"},
            ],
        },
        "evaluation": {"results.json": results()},
    }
    figures = {
        "vocabulary": {"vocab_size": 1024, "bytes_per_token": 3.25},
        "tokens": {"splits": {"train": {"examples": 90, "text_tokens": 300, "text_bytes": 880}}},
        "pretrained": {"parameters": 1_234_567},
    }
    for name, contents in files.items():
        run = root.child(name).create()
        for file, content in contents.items():
            (run.path / file).write_text(json.dumps(content))
        if name == "pretrained":
            (run.path / "preflight.txt").write_text("row 0 reads: 'In the beginning <extra_id_0>'")
            with run.metrics() as writer:
                for step in range(1, 101):
                    writer.write(
                        step,
                        {
                            "train/loss": 7 * math.exp(-step / 40) + 2,
                            "train/accuracy": step / 300,
                            "train/learning_rate": 1e-3,
                            "train/tokens": 1000.0 * step,
                        },
                    )
                    if step % 25 == 0:
                        writer.write(
                            step,
                            {"eval/text/loss": 7 * math.exp(-step / 40) + 2.2, "eval/text/accuracy": 0.2},
                        )
                writer.write(101, {"train/loss": math.nan})
        if name == "evaluation":
            rows = [
                {
                    "task": "glosses",
                    "inputs": f"define noun: thing {i}",
                    "target": "<i>an object</i>",
                    "nats": 9.0,
                    "model": f"answer {i}",
                    "reference": f"babble {i}",
                    "majority_target": "m",
                }
                for i in range(30)
            ]
            (run.path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        inputs = {"run:corpus": "feed"} if name == "vocabulary" else {}
        run.write_manifest(Job(name, {"text": "{text}"}), inputs=inputs, figures=figures.get(name, {}))
        run.write_lineage({"sessions": [session]})
    return {name: str(root.path / name) for name in files}


def page(stages, tmp_path, **fields):
    run = RunDir(tmp_path / "report")
    figures = Report("A <tiny> run", stages, **fields)(run)
    text = (run.path / "report.html").read_text()
    assert figures == {"report": str(run.path / "report.html"), "bytes": len(text.encode())}
    return text


class Outside(html.parser.HTMLParser):
    """Collects what a page would fetch, its ids and its places for charts."""

    def __init__(self):
        super().__init__()
        self.fetched, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        if tag in ("link", "img", "script", "iframe") and (values.get("src") or values.get("href")):
            self.fetched.append(values)
        if tag == "a":
            self.links.append(values["href"])


def test_page_is_self_contained_and_its_charts_have_places(stages, tmp_path):
    text = page(stages, tmp_path)
    outside = Outside()
    outside.feed(text)
    assert outside.fetched == []
    assert len(set(outside.ids)) == len(outside.ids)
    assert {link[1:] for link in outside.links} <= set(outside.ids)
    # json.loads accepts NaN, which browsers' JSON.parse does not.
    refuse = lambda name: pytest.fail(f"{name} in the charts' JSON")  # noqa: E731
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.S)[1], parse_constant=refuse)
    assert {"pretrained-loss", "pretrained-accuracy", "evaluation-glosses-rougeL"} <= set(figures)
    assert set(figures) <= set(outside.ids)
    loss = figures["pretrained-loss"]["data"]
    assert [trace["name"] for trace in loss] == ["train", "eval/text"]
    assert loss[0]["y"][-1] is None
    assert len(loss[0]["y"]) == 101
    assert loss[1]["x"] == [25, 50, 75, 100]
    assert "Plotly" in text
    assert len(text) > 1_000_000  # plotly.js is inside


def test_page_tells_what_the_stages_found(stages, tmp_path):
    text = page(stages, tmp_path)
    visible = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    for expected in (
        "A &lt;tiny&gt; run",
        "100 documents were read and 90 kept",
        "2 files or lines could not be read",
        "A &lt;b&gt;source&lt;/b&gt;",
        "PSF-2.0",
        "exact duplicate",
        "3.25",
        "1.23 M",
        "2 + 2 layers",
        "t5style 0.1.0, commit abc123, 1 file changed since",
        "jax 0.10.2",
        "&lt;i&gt;an object&lt;/i&gt;",
        "babble 3",
        "answer 7",
        "run:corpus",
        "1.61",
        "± 0.02",
        "RUN_DIR = &#39;runs/x&#39;",
        "In the beginning &lt;extra_id_0&gt;",
    ):
        assert expected in visible, expected
    assert "answer 8" not in visible  # eight samples, no more
    assert "zzz" not in visible
    assert "75.0 %" in visible  # 75 of 100 seconds stepping, over both starts


def test_differences_are_called_real_only_beyond_two_standard_errors(stages):
    parts = evaluation.evaluations(read_stage("evaluation", stages["evaluation"]), {})
    names = [name for name, _ in parts[0]["columns"]]
    assert parts[0]["rows"][0]["name"] == "this model"
    assert all(cell is None or cell["margin"] is None for cell in parts[0]["rows"][0]["cells"])
    verdicts = {
        (name, row["name"]): cell["margin"]["verdict"]
        for row in parts[0]["rows"]
        for name, cell in zip(names, row["cells"], strict=True)
        if cell and cell["margin"]
    }
    assert verdicts == {
        ("loss", "before tuning"): "better",
        ("rougeL", "before tuning"): "better",
        ("rougeL", "majority target"): "better",
        ("token accuracy", "unigram tokens"): "within chance",
        ("loss", "unigram tokens"): "worse",
    }


def plan(**changes):
    """plan.json as t5style/train/estimate.py describes it, with two candidates of a search."""
    memory = {"parameters": 4e8, "optimizer": 8e8, "gradients": 4e8, "activations": 3e9, "temporaries": -1.0}
    row = {"words": "fsdp 64, remat <full>", "step_seconds": 0.5, "compute_seconds": 0.4, "mfu": 0.55}
    row |= {"tokens": 1000, "peak_bytes": 5e9, "fits": True, "front": True}
    plan = {
        "slice": "v5p-128",
        "mesh": "fsdp 64",
        "parameters": 7_000_000_000,
        "tokens": 1000,
        "step_seconds": 0.5,
        "mfu": 0.55,
        "tokens_per_second": 2000.0,
        "memory": memory | {"peak": 4.6e9, "limit": 95e9},
        "cost": {"categories": {"matmul": 0.3, "kernel": 0.1}, "exposed_seconds": 0.1},
        "bill": {"tokens": 1e9, "hours": 138.9, "chip_hours": 8889.0},
        "front": [
            row,
            row | {"words": "fsdp 64, remat none", "step_seconds": None, "mfu": None, "fits": False},
        ],
    }
    return plan | changes


def test_a_plan_and_its_search_are_told_and_drawn(stages, tmp_path):
    without = {"step_seconds": None, "mfu": None, "tokens_per_second": None, "bill": {}, "front": []}
    for name, content in (("chosen", plan()), ("cpu", plan(slice=None, **without))):
        run = RunDir(tmp_path / "run").child(name).create()
        (run.path / "plan.json").write_text(json.dumps(content))
        run.write_manifest(Job(name))
        stages[name] = str(run.path)
    text = page(stages, tmp_path)
    for words in ("chip-hours", "Plans", "remat &lt;full&gt;", "does not fit", "this machine"):
        assert words in text
    assert text.count('id="chosen-search"') == 1
    assert 'id="cpu-search"' not in text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.S)[1])
    drawn = figures["chosen-search"]["data"]
    assert [trace["x"] for trace in drawn] == [[5.0], [], []]  # GB; what has no time has no place
    assert [trace["y"] for trace in drawn] == [[0.5 / 1000 * 1e9], [], []]


def test_any_part_may_be_missing(stages, tmp_path):
    for name, folder in stages.items():
        assert f"<td>{name}</td>" in page({name: folder}, tmp_path)
    assert "Plotly" not in page({"corpus": stages["corpus"]}, tmp_path)  # no chart, no library


def test_long_curves_are_averaged(monkeypatch):
    monkeypatch.setattr(charts, "MAX_POINTS", 4)
    steps, values = charts.thin(list(range(1, 11)), [float(i) for i in range(1, 11)])
    assert steps == [3, 6, 9, 10]
    assert values == [2.0, 5.0, 8.0, 10.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.00012345, "0.000123"),
        (12.3456, "12.35"),
        (None, "–"),
        (True, "True"),
        ("x", "x"),
        (12345.6, "12,346"),
        (float("nan"), "nan"),
        (0.0, "0"),
    ],
)
def test_number(value, text):
    assert report.number(value) == text


def test_errors_and_differences():
    assert [report.error(value) for value in (0.02345, 1.0, 131.2, 12345.0)] == [
        "0.023",
        "1",
        "130",
        "12,000",
    ]
    assert [report.signed(value) for value in (-1.25, 3.0, 0.0)] == ["−1.25", "+3", "0"]


@pytest.mark.parametrize(
    ("value", "text"), [(12, "12 bytes"), (1234, "1.23 kB"), (5.5e12, "5.5 TB"), (9e15, "9e+03 TB")]
)
def test_size(value, text):
    assert report.size(value) == text


def test_configuration_as_text():
    config = {
        "__class__": "a.b.Job",
        "steps": 3,
        "f": {"__name__": "m.rouge"},
        "tasks": [{"__class__": "T"}],
        "x": [],
    }
    assert sections.tree(config) == "Job(\n  steps = 3\n  f = m.rouge\n  tasks = [\n    T()\n  ]\n  x = []\n)"


def test_bad_stages_are_named(stages, tmp_path):
    with pytest.raises(ValueError, match="stages is empty"):
        Report("x", {})
    with pytest.raises(UserError, match=r"'tuned': there is no run folder"):
        page({"tuned": str(tmp_path / "nothing")}, tmp_path)
    (tmp_path / "begun").mkdir()
    with pytest.raises(UserError, match=r"'tuned': .*begun has no manifest.json, so its job is not done"):
        page({"tuned": str(tmp_path / "begun")}, tmp_path)
    folder = RunDir(stages["evaluation"]).path
    (folder / "results.json").write_text(json.dumps(results() | {"format": 2}))
    with pytest.raises(UserError, match="has format 2 and this report reads 1"):
        page(stages, tmp_path)
    (folder / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results.json is not JSON"):
        page(stages, tmp_path)
    assert not (tmp_path / "report" / "report.html").exists()
