"""What an evaluation found: the layout of results.json, and its tables.

    format: 1
    model, reference_model, split: what was evaluated, as given
    note: what the numbers count, as below
    tasks: for each task's name examples, tokens, bytes: how much was scored (target tokens; bytes of target
      text) cut, dropped: examples that were longer than the lengths systems: "model", "reference", and each
      baseline's name; for each loss (nats per target token), perplexity, bits_per_byte, token_accuracy (0 to
      1), and the task's metrics (0 to 100): each {"value", "standard_error" (null for a single example), "n"
      (examples)} margins: for each system but the model: value of the model minus value of that system, by
      the same names (no perplexity), with the standard error of the paired difference

Loss, perplexity and bits_per_byte are better when lower, everything else when higher. What they count
(NOTE) is what T5X's evaluation counts; lm-eval's bits_per_byte leave the end-of-sequence token out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from t5style import console

FORMAT = 1
NOTE = (
    "loss, perplexity and bits_per_byte count every target token, sentinels and end-of-sequence included; "
    "bits_per_byte divide by the bytes of the text alone"
)
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte"})
COLUMNS = ("task", "number", "system", "value", "standard error", "n", "model − system", "its standard error")


def rows(document: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The table's rows, as text, in the order of COLUMNS; the model first, then what it is compared with."""
    for task, report in document["tasks"].items():
        names = dict.fromkeys(name for system in report["systems"].values() for name in system)
        for name in names:
            for system, values in report["systems"].items():
                if name in values:
                    entry = values[name]
                    margin = report["margins"].get(system, {}).get(name)
                    yield (
                        task,
                        name + (" ↓" if name in LOWER_IS_BETTER else ""),
                        system,
                        _number(entry["value"]),
                        _number(entry["standard_error"]),
                        f"{entry['n']:,}",
                        "" if margin is None else f"{margin['value']:+.4g}",
                        "" if margin is None else _number(margin["standard_error"]),
                    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def show(document: Mapping[str, Any]) -> None:
    """Prints the table."""
    console.table(f"Evaluation of {document['model']} (↓: lower is better)", COLUMNS, list(rows(document)))


def markdown(document: Mapping[str, Any]) -> str:
    """The table as Markdown, with how much was evaluated."""
    lines = [f"# Evaluation of {document['model']}", ""]
    if document["reference_model"]:
        lines += [f"Reference: {document['reference_model']}.", ""]
    for task, report in document["tasks"].items():
        lines.append(
            f"- {task}, split {document['split']}: {report['examples']:,} examples, "
            f"{report['tokens']:,} target tokens, {report['bytes']:,} bytes; {report['cut']:,} cut, "
            f"{report['dropped']:,} dropped for their length"
        )
    lines += [
        "",
        f"↓: lower is better; {NOTE}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(document)]
    return "\n".join(lines) + "\n"


def figures(document: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that go to the manifest: flat, the model's values and its margins."""
    flat: dict[str, Any] = {}
    for task, report in document["tasks"].items():
        flat[f"{task}/examples"] = report["examples"]
        for name, entry in report["systems"]["model"].items():
            flat[f"{task}/{name}"] = entry["value"]
            flat[f"{task}/{name}/standard_error"] = entry["standard_error"]
        for system, margins in report["margins"].items():
            for name, entry in margins.items():
                flat[f"{task}/{name}/minus_{system}"] = entry["value"]
                flat[f"{task}/{name}/minus_{system}/standard_error"] = entry["standard_error"]
    return flat
