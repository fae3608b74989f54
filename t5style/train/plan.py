"""`plan`: what a training step needs and how fast it can be, before anything is rented."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, ClassVar

from t5style import console, run_dir
from t5style.parallel import topologies
from t5style.parallel.explain import format_bytes
from t5style.train import plan_report, plan_search
from t5style.train.estimate import estimate
from t5style.train.plan_search import Search
from t5style.train.program import TrainingProgram

HLO_FILE = "program.hlo.txt"
PLAN_FILE = "plan.json"
EXECUTABLE_FILE = "step.executable"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Compiles the training step for a slice and reports what it needs and how fast it can be.

    Writes plan.json, plan.txt and program.hlo.txt into the run folder.

    Attributes:
      program: the training step; what pretrain.Pretrain has the fields of.
      slice: 'v5e-256', 'v5p-128', '2xv5e-256', 'v5p:4x4x4' (see parallel/topologies.py), or None for the
        devices of this machine.
      tokens: how many to train on, for time, chip-hours and cost.
      chip_hour_price: of one chip, in any currency; None for no cost.
      search: knobs to try (plan_search.Search); None plans what is given.
      keep_executable: also write the compiled step, for pretrain.Pretrain.executable.
    """

    program: TrainingProgram
    slice: str | None = None
    tokens: float | None = None
    chip_hour_price: float | None = None
    search: Search | None = None
    keep_executable: bool = False

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("tokens", "chip_hour_price"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0, or None.")
        if self.slice is not None:
            topologies.parse_slice(self.slice)

    def inputs(self) -> Sequence[str]:
        """Nothing is read."""
        return []

    def dry_run(self, run: run_dir.RunDir) -> None:
        """Says what would be compiled."""
        name = self.slice or "this machine"
        program = self.program
        console.say(f"would compile a step of {program.batch_size} rows x {program.sides()} for {name}")

    def __call__(self, run: run_dir.RunDir) -> dict[str, Any]:
        """Plans; returns the main figures.

        Raises:
          UserError: libtpu is missing, the slice does not exist, or nothing fits it.
        """
        where = None if self.slice is None else topologies.parse_slice(self.slice)
        program, made = self.program, None
        found: list[dict[str, Any]] = []
        if self.search is not None:
            program, made, found = plan_search.search(self.search, program, where, run)
        if made is None or self.keep_executable:
            made = estimate(program, where, run.path / EXECUTABLE_FILE if self.keep_executable else None)
        bill = plan_report.bill(made, where, self.tokens, self.chip_hour_price)
        text = plan_report.report(program, made, where, bill, found)
        figures = made.to_json() | {"slice": self.slice, "bill": bill}
        if found:
            figures["front"] = found
        run_dir.atomic_write(run.path / PLAN_FILE, json.dumps(figures, indent=1))
        run_dir.atomic_write(run.path / "plan.txt", text)
        run_dir.atomic_write(run.path / HLO_FILE, made.hlo)
        console.say(text)
        if not made.memory.fits:
            raise run_dir.UserError(
                f"this does not fit {self.slice}: it needs {format_bytes(made.memory.peak)} on each device, "
                f"which has {format_bytes(made.memory.limit or 0)}. {plan_report.remedies(program, made)[0]}"
            )
        return {
            name: figures[name] for name in ("parameters", "step_seconds", "mfu", "tokens_per_second", "fits")
        } | {"peak_bytes": made.memory.peak}
