"""The report of a plan, in words and tables that people read."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import rich.console

from t5style import console
from t5style.parallel.explain import format_bytes
from t5style.parallel.topologies import Slice
from t5style.train.estimate import Estimate
from t5style.train.hlo_collectives import Collective
from t5style.train.program import TrainingProgram

HOUR = 3600.0


def bill(
    made: Estimate, where: Slice | None, tokens: float | None, chip_hour_price: float | None
) -> dict[str, float]:
    """Hours, chip-hours and price of training on so many tokens; empty where time or tokens are unknown."""
    if tokens is None or where is None or made.step_seconds is None:
        return {}
    hours = tokens / made.tokens * made.step_seconds / HOUR
    figures = {"tokens": tokens, "hours": hours, "chip_hours": hours * where.chips}
    if chip_hour_price is not None:
        figures["price"] = figures["chip_hours"] * chip_hour_price
    return figures


def report(
    program: TrainingProgram,
    made: Estimate,
    where: Slice | None,
    cost: dict[str, float],
    compiled: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole report as plain text; compiled: what a search found (plan_search.search)."""
    out = rich.console.Console(file=io.StringIO(), width=110, color_system=None)
    name = "this machine" if where is None else str(where)
    if compiled:
        out.print(_search(compiled))
    out.print(
        f"{made.parameters:,} parameters on {name}, {made.mesh}; a step of {program.batch_size:,} rows, "
        f"{made.tokens:,} tokens, {made.model_flops:.4g} model FLOPs (causal attention counted by half, "
        "recomputation not).",
        highlight=False,
    )
    out.print(_memory(made))
    for line in _time(made, where, cost):
        out.print(line, highlight=False)
    if made.cost is not None and made.cost.collectives:
        out.print(_collectives(made))
    for note in (*(made.cost.warnings if made.cost is not None else ()), *made.reshardings):
        out.print(f"Note: {note}", highlight=False)
    if not made.memory.fits:
        out.print("What would make it fit, the most first:", highlight=False)
        for line in remedies(program, made):
            out.print(f"  {line}", highlight=False)
    out.print(
        f"Traced and lowered in {made.lower_seconds:.1f} s, compiled in {made.compile_seconds:.0f} s. All of "
        "this is the compiler's model of the program, not a measurement.",
        highlight=False,
    )
    return out.file.getvalue()  # type: ignore[attr-defined]


def _search(compiled: Sequence[Mapping[str, Any]]) -> Any:
    rows = [
        [
            row["words"],
            "-" if row["step_seconds"] is None else f"{row['step_seconds']:.3f}",
            "-" if row["compute_seconds"] is None else f"{row['compute_seconds']:.3f}",
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            format_bytes(row["peak_bytes"]),
            "front" if row["front"] else "" if row["fits"] else "does NOT fit",
        ]
        for row in compiled
    ]
    columns = ["compiled, the fastest a token first", "s a step", "communication hidden", "MFU", "peak", ""]
    return console.make_table("Search", columns, rows)


def _memory(made: Estimate) -> Any:
    memory = made.memory
    parts = {
        "parameters": memory.parameters,
        "optimiser state": memory.optimizer,
        "gradients": memory.gradients,
        "activations kept for the backward pass": memory.activations,
        "temporaries (what is left)": memory.temporaries,
        "peak": memory.peak,
    }
    if made.cost is None:  # it did not compile
        del parts["activations kept for the backward pass"]
        parts["activations and temporaries"] = memory.activations + parts.pop("temporaries (what is left)")
        parts["peak"] = parts.pop("peak")
    rows = [[name, format_bytes(size), f"{size / memory.peak:.0%}"] for name, size in parts.items()]
    if memory.limit is not None:
        rows.append(["there is", format_bytes(memory.limit), "fits" if memory.fits else "does NOT fit"])
    if memory.offloaded:
        rows.append(["activations kept in the host's memory", format_bytes(memory.offloaded), ""])
    return console.make_table("Memory of one device", ["", "bytes", ""], rows)


def _time(made: Estimate, where: Slice | None, cost: dict[str, float]) -> list[str]:
    seconds, compute = made.step_seconds, made.compute_seconds
    if made.cost is None:
        return ["The program does not fit, so there is nothing to estimate times of."]
    if seconds is None or compute is None or where is None:
        return [
            f"{made.cost.flops:.4g} FLOPs of matrix products on one device; the compiler of these devices "
            "estimates no times."
        ]
    chip = where.chip
    lines = [
        f"A step: {seconds:.3f} s, of which {compute:.3f} s of computation and {seconds - compute:.3f} s of "
        f"communication that nothing covers; MFU {made.mfu(seconds):.1%} ({made.mfu(compute):.1%} were all "
        f"of it covered), {made.tokens / seconds:,.0f} tokens/s.",
        f"Assumed: {chip.clock / 1e9:g} GHz for the compiler's cycles, {chip.bf16_flops / 1e12:g} TFLOP/s a "
        f"chip for kernels, {chip.ici_link_bytes_per_second / 1e9:g} GB/s a link and direction.",
    ]
    if cost:
        line = (
            f"{cost['tokens']:.4g} tokens: {cost['hours']:,.1f} hours, {cost['chip_hours']:,.0f} chip-hours"
        )
        lines.append(line + (f", price {cost['price']:,.0f}." if "price" in cost else "."))
    return lines


def _collectives(made: Estimate) -> Any:
    assert made.cost is not None
    groups: dict[tuple[str, ...], list[Collective]] = {}
    for each in made.cost.collectives:
        where = "a loop" if each.loop else "once"
        how = "overlapped" if each.asynchronous else "synchronous"
        key = (each.kind, " ".join(each.axes) or "-", where, how)
        groups.setdefault(key, []).append(each)
    rows = [
        [
            *key,
            f"{sum(each.times for each in found):,}",
            format_bytes(sum(each.total_bytes for each in found)),
            f"{sum(each.seconds or 0 for each in found):.4f}",
            f"{sum(each.exposed_seconds or 0 for each in found):.4f}",
        ]
        for key, found in sorted(groups.items())
    ]
    columns = ["collective", "over", "in", "", "times", "bytes sent", "seconds", "exposed"]
    return console.make_table("Communication of one device in a step", columns, rows)


def remedies(program: TrainingProgram, made: Estimate) -> list[str]:
    """Changes that would save memory, the most first, with what they would save by shapes alone."""
    model, memory = program.model, made.memory
    state = memory.parameters + memory.optimizer + memory.gradients
    rest = max(0, memory.peak - state)
    found = [(rest // 2, f"accumulation={2 * program.accumulation}: half the activations")]
    if model.remat == "none":
        found.append((int(rest * 0.7), "remat='full' or 'qkv': activations are computed again"))
    elif model.remat != "full":
        found.append((rest // 2, f"remat='full' instead of {model.remat!r}: only layers' inputs are kept"))
    if program.mesh.fsdp == 1 and made.devices > 1:
        found.append(
            (state * (made.devices - 1) // made.devices, "fsdp=-1, data=1: state is divided over all devices")
        )
    found.append((rest // 2 + state // 2, "twice the chips, and fsdp twice as large, at the same batch"))
    return [f"{text} (about {format_bytes(saved)})" for saved, text in sorted(found, reverse=True)]
