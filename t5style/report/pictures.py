"""Pictures as plain numbers for HTML and SVG: they need no script, and text in them keeps its size on any
screen.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

_TICKS = 6
_HEIGHT = 100.0


def histogram(
    name: str, counts: Mapping[str, Sequence[float]], documents_in: int, documents_kept: int
) -> dict[str, Any] | None:
    """Documents read and kept over the same bins; None if nothing was counted.

    Every bin is as wide as the next one in the picture, so bins that grow by a factor make a logarithmic
    axis. Empty bins at either end are left out.

    Args:
      name: what was measured.
      counts: "edges" (k + 1 ascending numbers; the outermost may be infinite), "read" and "kept" (k counts
        each, of all documents or of samples).
      documents_in, documents_kept: how many there are in all: what the areas are in proportion to.

    Returns:
      "bins", their number; "read" and "kept", outlines as SVG paths, x in bins and y in 0 (top) ... 100;
      "ticks", pairs (x in percent, label); "top", the share of the documents read at the top;
      "medians", of read and kept.
    """
    edges = _finite(counts["edges"])
    if len(edges) != len(counts["read"]) + 1 or not sum(counts["read"]):
        return None
    pairs = zip(counts["read"], counts["kept"], strict=True)
    filled = [i for i, pair in enumerate(pairs) if any(pair)]
    first, last = filled[0], filled[-1] + 1
    edges = edges[first : last + 1]
    kept_share = documents_kept / max(documents_in, 1)
    read, kept = (
        [share * n / (sum(counts[key]) or 1) for n in counts[key][first:last]]
        for key, share in (("read", 1.0), ("kept", kept_share))
    )
    top = max(*read, *kept)
    return {
        "name": name,
        "bins": len(read),
        "read": _outline(read, top),
        "kept": _outline(kept, top),
        "ticks": [(100 * _place(value, edges) / len(read), short(value)) for value in _ticks(edges)],
        "top": top,
        "medians": tuple(short(_median(side, edges)) if sum(side) else "–" for side in (read, kept)),
    }


def _finite(edges: Sequence[float]) -> list[float]:
    values = list(edges)
    if len(values) > 2:
        if math.isinf(values[0]):
            values[0] = 2 * values[1] - values[2]
        if math.isinf(values[-1]):
            values[-1] = 2 * values[-2] - values[-3]
    return values


def _outline(counts: Sequence[float], top: float) -> str:
    steps = "".join(f"V{_HEIGHT * (1 - n / top):.2f}H{i + 1}" for i, n in enumerate(counts))
    return f"M0 {_HEIGHT:.0f}{steps}V{_HEIGHT:.0f}Z"


def _place(value: float, edges: Sequence[float]) -> float:
    """Where a value lies, in bins from the left."""
    index = min(max(bisect.bisect_right(edges, value) - 1, 0), len(edges) - 2)
    width = edges[index + 1] - edges[index]
    return index + (min(max((value - edges[index]) / width, 0.0), 1.0) if width > 0 else 0.0)


def _median(counts: Sequence[float], edges: Sequence[float]) -> float:
    half, below = sum(counts) / 2, 0.0
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        if below + count >= half and count:
            return low + (high - low) * (half - below) / count
        below += count
    return edges[-1]


def _ticks(edges: Sequence[float]) -> list[float]:
    """Round numbers: powers of ten where bins grow by a factor, equal steps otherwise."""
    low, high = edges[0], edges[-1]
    widths = [b - a for a, b in itertools.pairwise(edges)]
    positive = next((edge for edge in edges if edge > 0), 0.0)
    if low >= 0 and positive and max(widths) > 4 * min(widths):
        decades = range(math.floor(math.log10(positive)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if len(decades) <= 3 else (1,)
        values = [factor * 10.0**power for power in decades for factor in factors]
        slack = 1 + 1e-9  # edges are products of a factor and seldom exact
        inside = [value for value in values if positive / slack <= value <= high * slack]
        inside = inside[:: max(-(-len(inside) // _TICKS), 1)]
        # A bin from 0 to the first edge has its own tick where there is room for it.
        roomy = not inside or _place(inside[0], edges) > 0.08 * len(widths)
        return [0.0, *inside] if low == 0 and roomy else inside
    if high <= low:
        return [low]
    raw = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """1500 -> 1.5 k; 0.25 -> 0.25; 3 significant digits."""
    if abs(value) >= 1000:
        for unit in ("k", "M", "B", "T"):
            value /= 1000
            if abs(value) < 999.5 or unit == "T":
                return f"{value:.3g} {unit}"
    return f"{round(value, 12):.3g}"


def stream(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How the stream of documents narrows from stage to stage, as SVG paths 1000 wide and 40 high: "kept"
    goes straight on, "lost" leaves to the right.
    """
    total = max((row["in"] for row in stages), default=0)
    rows = []
    for row in stages:
        start, end = (860 * row[key] / max(total, 1) for key in ("in", "kept"))
        end = min(start, end)
        lost = row["in"] - row["kept"]
        # What is left out of a million must be seen: at least two units wide.
        thick = max(start - end, 2.0) if lost > 0 else 0.0
        begin, away = start - thick, 110.0
        rows.append(
            {
                "name": row["name"],
                "in": row["in"],
                "kept": row["kept"],
                "lost": lost,
                "share": lost / max(row["in"], 1),
                "kept_path": f"M0 0H{start:.1f}L{end:.1f} 40H0Z" if lost <= 0 else f"M0 0H{begin:.1f}V40H0Z",
                "lost_path": (
                    f"M{begin:.1f} 0H{start:.1f}C{start:.1f} 22 {start + away:.1f} 16 {start + away:.1f} 40"
                    f"H{begin + away:.1f}C{begin + away:.1f} 16 {begin:.1f} 22 {begin:.1f} 0Z"
                )
                if thick
                else "",
            }
        )
    return rows
