"""The report of a run: one HTML file that needs nothing else, made from what the stages left behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar

from t5style import console
from t5style.report import sections
from t5style.report.stage import Stage, read_stage
from t5style.run_dir import RunDir, UserError, atomic_write, now

if TYPE_CHECKING:
    import jinja2

REPORT = "report.html"
TEMPLATE = "report.html.jinja"


@dataclasses.dataclass(frozen=True)
class Report:
    """Put the whole run into one HTML page: data, training curves, evaluation, samples, lineage.

    Attributes:
      title: the page's heading.
      stages: name -> run folder, in the order to tell them, as {'corpus': 'run:corpus', 'tuned': ...}. What a
        stage contributes follows from the files it has: data_card.json, metrics.jsonl, results.json ...
      summary: a sentence or two under the heading; may be empty.
    """

    title: str
    stages: Mapping[str, str]
    summary: str = ""

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(
                "Report.stages is empty: name the run folders to report, as {'corpus': 'run:corpus'}"
            )

    def inputs(self) -> list[str]:
        return list(self.stages.values())

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes `report.html` into the run folder.

        Raises:
          UserError: a stage's folder is missing, unfinished or damaged.
        """
        stages = [read_stage(name, folder) for name, folder in self.stages.items()]
        page = render(self.title, self.summary, stages)
        run.create()
        path = run.path / REPORT
        atomic_write(path, page)
        console.say(f"    open {os.path.abspath(path)} in a browser")
        return {"report": os.fspath(path), "bytes": len(page.encode())}


def render(title: str, summary: str, stages: list[Stage]) -> str:
    """The page as HTML text, with plotly.js inside."""
    from plotly.offline import get_plotlyjs

    context = sections.build(stages)
    charts = context.pop("charts")
    return (
        environment()
        .get_template(TEMPLATE)
        .render(
            title=title,
            summary=summary,
            made=now(),
            # Inside a script element nothing is escaped but the sign that could end it.
            charts=json.dumps(charts, allow_nan=False).replace("<", "\\u003c"),
            plotly=get_plotlyjs() if charts else "",
            **context,
        )
    )


def environment(autoescape: bool = True) -> jinja2.Environment:
    """Reads this room's templates; what they show is escaped, but where they are no HTML."""
    import jinja2

    folder = resources.files("t5style.report")
    result = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text()),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    result.filters |= {
        "number": number,
        "size": size,
        "duration": console.duration,
        "percent": percent,
        "error": error,
        "signed": signed,
    }
    return result


def number(value: Any) -> str:
    """1234567 -> 1,234,567; 0.00123456 -> 0.001235; 12.3456 -> 12.35; None -> a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def percent(value: float) -> str:
    """0.123 -> 12.3 %; what is not nothing is never shown as 0.0 %: 0.00042 -> 0.042 %."""
    if 0 < abs(value) < 0.0005:
        return f"{100 * value:.2g} %"
    return f"{100 * value:.1f} %"


def error(value: float) -> str:
    """A standard error: two significant digits; 130.2 -> 130."""
    return f"{value:.2g}" if value < 100 else f"{float(f'{value:.2g}'):,.0f}"


def signed(value: float) -> str:
    """A difference: -1.25 -> −1.25; 3 -> +3."""
    return ("−" if value < 0 else "+" if value > 0 else "") + number(abs(value))


def size(value: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:,.0f} bytes" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


__all__ = ["REPORT", "Report", "UserError", "number", "percent", "render", "size"]
