"""Charts as plain Plotly figures. Colours are names of CSS variables ("var:--c1"), which the page fills in
for its theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

COLORS = ("var:--c1", "var:--c2", "var:--c3", "var:--c4", "var:--c5")
# Beside colour, every kind of line differs in dash or marker: readable without colours too.
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x")
MAX_POINTS = 2_000  # of a line; longer ones are averaged over equal stretches

Figure = dict[str, Any]
Series = tuple[list[int], list[float]]


def thin(steps: Sequence[int], values: Sequence[float]) -> Series:
    """At most MAX_POINTS points: means over equal stretches, each at its last step."""
    stride = -(-len(steps) // MAX_POINTS)
    if stride <= 1:
        return list(steps), list(values)
    chunks = range(0, len(steps), stride)
    return (
        [steps[min(i + stride, len(steps)) - 1] for i in chunks],
        [sum(part) / len(part) for part in (values[i : i + stride] for i in chunks)],
    )


def plain(values: Sequence[float]) -> list[float | None]:
    """JSON has no NaN and no infinity: a gap instead."""
    return [round(value, 6) if math.isfinite(value) else None for value in values]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis in the page's colours."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "var:--grid",
        "zeroline": False,
        "linecolor": "var:--line",
        "automargin": True,
        **more,
    }


def layout(x: str, y: str, height: int, **more: Any) -> dict[str, Any]:
    """A layout in the page's colours, transparent."""
    return {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 12, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var:--ink2", "size": 12, "family": "system-ui, sans-serif"},
        "xaxis": axis(x),
        "yaxis": axis(y),
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "var:--card", "font": {"color": "var:--ink"}, "bordercolor": "var:--line"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        **more,
    }


def curves(series: Mapping[str, Series], y: str, height: int = 340) -> Figure:
    """Lines over steps. The first is what happens at every step (thin, no markers), the others are measured
    now and then.
    """
    traces = []
    for index, (name, (steps, values)) in enumerate(series.items()):
        x, smooth = thin(steps, values)
        color = COLORS[index % len(COLORS)]
        trace: dict[str, Any] = {
            "type": "scatter",
            "name": name,
            "x": x,
            "y": plain(smooth),
            "mode": "lines",
            "line": {"color": color, "width": 1.6},
            "hovertemplate": "%{y:.4g}",
        }
        if index:
            trace["mode"] = "lines+markers"
            trace["line"] = {"color": color, "width": 2, "dash": "dot"}
            trace["marker"] = {"size": 8, "symbol": SYMBOLS[index % len(SYMBOLS)]}
        traces.append(trace)
    more = {
        "showlegend": len(traces) > 1,
        "margin": {"l": 56, "r": 16, "t": 34 if len(traces) > 1 else 12, "b": 44},
    }
    return {"data": traces, "layout": layout("step", y, height, **more)}


def intervals(rows: Sequence[tuple[str, float, float]], x: str) -> Figure:
    """A dot and two standard errors to either side for each (name, value, standard error); the first row
    stands out.
    """
    names = [name for name, _, _ in rows]
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": plain([value]),
            "y": [name],
            "showlegend": False,
            "marker": {
                "size": 11 if index == 0 else 9,
                "color": COLORS[0] if index == 0 else "var:--ink3",
                "symbol": "circle" if index == 0 else "diamond",
            },
            "error_x": {
                "type": "data",
                "array": plain([2 * error]),
                "thickness": 1.8,
                "width": 5,
                "color": COLORS[0] if index == 0 else "var:--ink3",
            },
            "hovertemplate": f"%{{x:.4g}} ± {error:.2g} (standard error)<extra>{name}</extra>",
        }
        for index, (name, value, error) in enumerate(rows)
    ]
    more = {
        "hovermode": "closest",
        "yaxis": axis("", autorange="reversed", type="category", categoryarray=names),
    }
    return {"data": traces, "layout": layout(x, "", 60 + 34 * len(rows), **more)}
