"""The report's part on plans: what a training step needs on a slice, and what a search has found."""

from __future__ import annotations

from typing import Any

from t5style.report import charts
from t5style.report.stage import Stage

PLAN = "plan.json"
MEMORY = ("parameters", "optimizer", "gradients", "activations", "temporaries")
GB = 1e9


def plans(stages: list[Stage], figures: dict[str, charts.Figure]) -> list[dict[str, Any]]:
    """What the template shows of each stage that planned; the picture of a search goes into `figures`."""
    found = []
    for stage in stages:
        if (plan := stage.json(PLAN)) is None:
            continue
        compiled = plan.get("front", [])
        place = f"{stage.name}-search"
        if timed := [row for row in compiled if row["step_seconds"]]:
            figures[place] = front(timed)
        found.append(
            {
                "stage": stage.name,
                "plan": plan,
                "memory": shares({name: plan["memory"][name] for name in MEMORY}),
                "time": shares(times(plan)),
                "compiled": compiled,
                "place": place if timed else "",
            }
        )
    return found


def shares(parts: dict[str, float]) -> list[tuple[str, float, float]]:
    """(name, value, share of the sum) of what is above 0."""
    total = sum(value for value in parts.values() if value > 0)
    return [(name, value, value / total) for name, value in parts.items() if value > 0]


def times(plan: dict[str, Any]) -> dict[str, float]:
    """Estimated seconds of a step, by what takes them; empty without an estimate."""
    if not plan.get("step_seconds"):
        return {}
    return plan["cost"]["categories"] | {"communication that nothing covers": plan["cost"]["exposed_seconds"]}


def front(rows: list[dict[str, Any]]) -> charts.Figure:
    """What was compiled by memory and time; those on the front are joined."""
    kinds = {
        "on the front": [row for row in rows if row["front"]],
        "slower and no smaller": [row for row in rows if row["fits"] and not row["front"]],
        "does not fit": [row for row in rows if not row["fits"]],
    }
    traces = []
    for index, (name, some) in enumerate(kinds.items()):
        some = sorted(some, key=lambda row: row["peak_bytes"])
        traces.append(
            {
                "type": "scatter",
                "name": name,
                "mode": "markers" if index else "lines+markers",
                "x": [row["peak_bytes"] / GB for row in some],
                "y": charts.plain([1e9 * row["step_seconds"] / row["tokens"] for row in some]),
                "text": [f"{row['words']}<br>{row['step_seconds']:.3f} s a step" for row in some],
                "line": {"color": charts.COLORS[0], "width": 1.6, "dash": "dot"},
                "marker": {"size": 10, "symbol": charts.SYMBOLS[index], "color": charts.COLORS[index]},
                "hovertemplate": "%{text}<br>%{x:.2f} GB<extra></extra>",
            }
        )
    more = {"hovermode": "closest", "margin": {"l": 56, "r": 16, "t": 34, "b": 44}}
    title = "ns a token (estimate)"
    return {"data": traces, "layout": charts.layout("peak GB of a device", title, 300, **more)}
