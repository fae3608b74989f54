"""The evaluation's part of the report, from results.json and samples.jsonl of an evaluation's run folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t5style.report import charts
from t5style.report.stage import Stage
from t5style.run_dir import UserError

FORMAT = 1  # of results.json; its layout is told in t5style/evaluate/results.py
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte"})
REAL = 2.0  # standard errors from zero at which a difference is called real
SAMPLES = 8  # of each task
# How the two models are called; baselines have names of their own.
SYSTEMS = {"model": "this model", "reference": "before tuning"}


def evaluations(stage: Stage, figures: dict[str, charts.Figure]) -> list[dict[str, Any]]:
    """For each task of an evaluation, its table and its charts; empty for another stage.

    Raises:
      UserError: results.json has a layout this version does not know.
    """
    document = stage.json("results.json")
    if document is None:
        return []
    if document.get("format") != FORMAT:
        raise UserError(
            f"{stage.folder / 'results.json'} has format {document.get('format')!r} and this report reads "
            f"{FORMAT}: evaluate again with this version"
        )
    parts = []
    for task, report in document["tasks"].items():
        names = list(dict.fromkeys(name for values in report["systems"].values() for name in values))
        systems = {name: values for name, values in report["systems"].items() if values}
        places = []
        for name in headline(names):
            rows = [
                (
                    SYSTEMS.get(system, label(system)),
                    values[name]["value"],
                    values[name]["standard_error"] or 0.0,
                )
                for system, values in systems.items()
                if name in values
            ]
            if len(rows) > 1:
                identity = f"{stage.name}-{task}-{name}"
                figures[identity] = charts.intervals(rows, label(name))
                places.append(
                    (
                        identity,
                        f"{label(name)} ({'lower' if name in LOWER_IS_BETTER else 'higher'} is better)",
                    )
                )
        entries = [values[name] for values in systems.values() for name in values]
        parts.append(
            {
                "title": f"{stage.name}: {label(task)}, split {document['split']}",
                "note": (
                    f"{report['examples']:,} examples, {report['tokens']:,} target tokens, "
                    f"{report['bytes']:,} bytes of target text; {report['cut']:,} examples cut and "
                    f"{report['dropped']:,} dropped for their length. "
                    f"n = {max((entry['n'] for entry in entries), default=0):,} for every figure"
                    + ("." if len({entry["n"] for entry in entries}) == 1 else " at most.")
                ),
                "columns": [(label(name), "down" if name in LOWER_IS_BETTER else "up") for name in names],
                "rows": [
                    {
                        "name": SYSTEMS.get(system, label(system)),
                        "cells": [
                            {
                                "value": values[name]["value"],
                                "error": values[name]["standard_error"],
                                "margin": margin(name, report["margins"].get(system, {}).get(name)),
                            }
                            if name in values
                            else None
                            for name in names
                        ],
                    }
                    for system, values in systems.items()
                ],
                "places": places,
            }
        )
    return parts


def label(name: str) -> str:
    """A name of the code for a reader."""
    return name.replace("_", " ")


def headline(names: list[str]) -> list[str]:
    """The metrics that get a chart: at most four, the task's own first."""
    order = ("rougeLsum", "rougeL", "rouge1", "exact_match", "f1", "bleu", "accuracy")
    own = [name for name in order if name in names]
    return [*own[:2], *(name for name in ("bits_per_byte", "token_accuracy", "loss") if name in names)][:4]


def margin(name: str, entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The model minus another system by one metric, and whether that is more than chance; None where there
    is nothing to compare, or a single example, which says nothing.
    """
    if entry is None or entry["standard_error"] is None:
        return None
    difference, error = entry["value"], entry["standard_error"]
    good = (difference < 0) == (name in LOWER_IS_BETTER)
    real = abs(difference) > REAL * error
    return {
        "difference": difference,
        "error": error,
        "verdict": ("better" if good else "worse") if real else "within chance",
    }


def samples(stage: Stage) -> list[dict[str, Any]]:
    """The first answers of each task: rows of (label, text, kind of text)."""
    groups: dict[str, list[list[tuple[str, str, str]]]] = {}
    for line in stage.lines("samples.jsonl"):
        group = groups.setdefault(line["task"], [])
        if len(group) == SAMPLES or "model" not in line:
            continue  # tasks that are not answered by generation have likelihoods only
        rows = [("input", line["inputs"], ""), ("target", line["target"], "")]
        if "reference" in line:
            rows.append((SYSTEMS["reference"], line["reference"], ""))
        rows.append((SYSTEMS["model"], line["model"], "after"))
        group.append(rows)
    return [{"title": label(task), "rows": rows} for task, rows in groups.items() if rows]
