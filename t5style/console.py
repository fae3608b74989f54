"""What the user sees: lines, progress and tables, on standard error, from process 0 only."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import rich.console
import rich.markup
import rich.progress
import rich.table

from t5style import run_dir

# Standard error, so that a job may write its product to standard output. Colours only on a terminal.
# Tables in a log file may be wider than the 80 columns that rich takes there.
console = rich.console.Console(
    stderr=True, highlight=False, soft_wrap=True, width=None if sys.stderr.isatty() else 160
)

LINE_SECONDS = 10.0  # without a terminal, progress is a line this often


def say(text: str) -> None:
    """Prints one line, as it is (no markup), on process 0."""
    if run_dir.is_main_process():
        console.print(text, markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table on process 0; floats with 4 significant digits, everything else as str(value)."""
    if run_dir.is_main_process():
        console.print(make_table(title, columns, rows))


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> rich.table.Table:
    """The same as an object of rich, for callers with a console of their own. Columns that hold only numbers
    align right.
    """
    result = rich.table.Table(title=rich.markup.escape(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        result.add_column(rich.markup.escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(rich.markup.escape(_cell(value)) for value in row))
    return result


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


class Progress:
    """Handed out by `progress`: `advance(n)` counts; keyword fields (loss=1.23) are shown beside it."""

    def __init__(self, description: str, total: int | None, unit: str, start: int) -> None:
        self.description = description
        self.total = total
        self.unit = unit
        self.start = start
        self.done = start
        self.fields: dict[str, Any] = {}
        self._began = time.monotonic()
        self._next_line = self._began + LINE_SECONDS
        self._bar: rich.progress.Progress | None = None

    def advance(self, n: int = 1, **fields: Any) -> None:
        """Counts `n` more; `fields` replace those shown before."""
        self.done += n
        self.fields.update(fields)
        if not run_dir.is_main_process():
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, details=self._details())
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            say(self.line())

    def rate(self) -> float:
        """Units per second since the start of this process."""
        return (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)

    def line(self) -> str:
        """The state as one line of text."""
        parts = [f"{self.description}: {self.done:,}"]
        if self.total is not None:
            parts[0] += f"/{self.total:,}"
        parts[0] += f" {self.unit}"
        if self.done > self.start:
            parts.append(f"{self.rate():,.1f} {self.unit}/s")
            if self.total is not None and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / self.rate())} left")
        details = " ".join(f"{name} {_cell(value)}" for name, value in self.fields.items())
        return ", ".join(parts + ([details] if details else []))

    def _details(self) -> str:
        details = "  ".join(f"{name} {_cell(value)}" for name, value in self.fields.items())
        return f"{self.rate():,.1f} {self.unit}/s  {rich.markup.escape(details)}"


@contextlib.contextmanager
def progress(
    description: str, total: int | None = None, unit: str = "docs", start: int = 0
) -> Iterator[Progress]:
    """Shows how far a loop is: a bar with rate and time left on a terminal, otherwise a line about every 10 s
    and one at the end.

    Args:
      description: what is being done, in a few words.
      total: how many units there are; None if unknown.
      unit: what is counted.
      start: units done by an earlier process (resume): not part of the rate.
    """
    state = Progress(description, total, unit, start)
    if not run_dir.is_main_process():
        yield state
        return
    if not console.is_terminal:
        yield state
        say(f"{state.line()} in {duration(time.monotonic() - state._began)}")
        return
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn(unit),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[details]}"),
    )
    with rich.progress.Progress(*columns, console=console, refresh_per_second=4) as bar:
        bar.add_task(rich.markup.escape(description), total=total, completed=start, details="")
        state._bar = bar
        yield state


def duration(seconds: float) -> str:
    """`12.3 s`, `4 min 05 s` or `2 h 10 min`."""
    seconds = round(seconds, 1)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
