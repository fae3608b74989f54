"""The forgetting report: a model before and after further training, on what it could and what it was to
learn."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from t5style import console
from t5style.data.task import Task
from t5style.evaluate import evaluator, results
from t5style.infer.chat import located
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, atomic_write

FORMAT = 1
REAL = 2.0  # standard errors at which a difference is told from chance
COLUMNS = ("task", "is", "number", "before", "after", "after − before", "its standard error", "n", "verdict")


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """Compares a model before and after further training, on old tasks and new ones.

    Writes what evaluate.evaluator.Evaluate writes (results.json, which a report shows with charts, and
    samples.jsonl), and from it forgetting.json and forgetting.md. Every difference is one of pairs, example
    by example, with its standard error.

    Attributes:
      before, after: run folders, checkpoints, Hugging Face directories, .gguf files.
      old, new: tasks, by what the model had been trained on before and what came after.
      lengths, split, max_examples, batch_size, max_new_tokens, dtype, mesh, seed: see Evaluate.
    """

    before: str
    after: str
    old: Sequence[Task]
    new: Sequence[Task]
    lengths: dict[str, int]
    split: str = "validation"
    max_examples: int | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    dtype: str | None = None
    mesh: MeshConfig | None = None
    seed: int = 0

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.old or not self.new:
            raise ValueError("old and new must each hold a task: forgetting is one against the other")
        self._evaluation()

    def _evaluation(self) -> evaluator.Evaluate:
        return evaluator.Evaluate(
            model=self.after,
            reference_model=self.before,
            tasks=[*self.old, *self.new],
            lengths=self.lengths,
            split=self.split,
            max_examples=self.max_examples,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            baselines=(),
            dtype=self.dtype,
            mesh=self.mesh,
            seed=self.seed,
        )

    def inputs(self) -> Sequence[str]:
        """The models and the tasks' stores."""
        return self._located()._evaluation().inputs()

    def _located(self) -> Forgetting:
        return dataclasses.replace(self, before=located(self.before), after=located(self.after))

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Evaluates both models; returns the mean changes of loss, and how many figures have changed for
        real."""
        self._located()._evaluation()(run)
        found = json.loads((run.path / "results.json").read_text())
        document = compare(found, [task.name for task in self.old])
        document |= {"before": self.before, "after": self.after, "split": self.split, "note": results.NOTE}
        atomic_write(run.path / "forgetting.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        atomic_write(run.path / "forgetting.md", markdown(document))
        console.table("Before and after (↓: lower is better)", COLUMNS, _rows(document))
        console.say(f"Forgetting: {run.path / 'forgetting.json'} (table: forgetting.md)")
        summary = document["summary"]
        return {f"{kind}/{name}": value for kind, values in summary.items() for name, value in values.items()}


def compare(found: Mapping[str, Any], old: Sequence[str]) -> dict[str, Any]:
    """The document of forgetting.json.

    Args:
      found: results.json of an evaluation whose model is the one after, and whose reference the one before.
      old: names of the old tasks; all others are new.

    Returns:
      format; tasks: by name `is` ('old' or 'new'), examples, and numbers: by name before, after, difference
      (after minus before) and its standard error, n, and verdict ('better', 'worse', 'within chance': less
      than two standard errors); summary: for 'old' and 'new' loss_change, the mean over tasks of the loss's
      difference, its standard_error, and how many numbers are better and worse.
    """
    tasks: dict[str, Any] = {}
    for task, report in found["tasks"].items():
        systems, margins = report["systems"], report["margins"]["reference"]
        numbers = {}
        for name, margin in margins.items():
            before, after = systems["reference"][name], systems["model"][name]
            numbers[name] = {
                "before": before["value"],
                "after": after["value"],
                "difference": margin["value"],
                "standard_error": margin["standard_error"],
                "n": after["n"],
                "verdict": verdict(name, margin["value"], margin["standard_error"]),
            }
        tasks[task] = {
            "is": "old" if task in old else "new",
            "examples": report["examples"],
            "numbers": numbers,
        }
    summary = {}
    for kind in ("old", "new"):
        chosen = [task["numbers"] for task in tasks.values() if task["is"] == kind]
        losses = [numbers["loss"] for numbers in chosen]
        verdicts = [number["verdict"] for numbers in chosen for number in numbers.values()]
        summary[kind] = {
            "loss_change": sum(loss["difference"] for loss in losses) / len(losses),
            "standard_error": math.sqrt(sum((loss["standard_error"] or 0.0) ** 2 for loss in losses))
            / len(losses),
            "better": verdicts.count("better"),
            "worse": verdicts.count("worse"),
        }
    return {"format": FORMAT, "tasks": tasks, "summary": summary}


def verdict(name: str, difference: float, error: float | None) -> str:
    """What a difference of a figure means."""
    if error is None or abs(difference) <= REAL * error:
        return "within chance"
    return "better" if (difference < 0) == (name in results.LOWER_IS_BETTER) else "worse"


def _rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for task, report in document["tasks"].items():
        for name, number in report["numbers"].items():
            error = number["standard_error"]
            found.append(
                (
                    task,
                    report["is"],
                    name + (" ↓" if name in results.LOWER_IS_BETTER else ""),
                    f"{number['before']:.4g}",
                    f"{number['after']:.4g}",
                    f"{number['difference']:+.4g}",
                    "" if error is None else f"{error:.2g}",
                    f"{number['n']:,}",
                    number["verdict"],
                )
            )
    return found


def markdown(document: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    lines = [f"# {document['before']} before, {document['after']} after", ""]
    for kind, said in (("old", "What it could before"), ("new", "What it was to learn")):
        part = document["summary"][kind]
        lines.append(
            f"- {said}: the loss changed by {part['loss_change']:+.4g} ± {part['standard_error']:.2g} nats a "
            "token; "
            f"{part['better']} figures are better, {part['worse']} worse, by more than {REAL:g} standard "
            "errors"
        )
    lines += ["", f"↓: lower is better; split {document['split']}; {document['note']}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in _rows(document)]
    return "\n".join(lines) + "\n"
