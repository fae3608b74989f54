"""What a compiled program costs, read in its text: time, loops, kernels and collectives.

The TPU compiler writes into each scheduled instruction how many cycles it thinks that it takes. `cost` adds
them up over all that runs, a loop's body as often as the loop runs; loops themselves carry no estimate.
Pallas kernels have none either: theirs is their FLOPs at the chip's peak. Communication is counted apart
(`train.hlo_collectives`), so `Cost.seconds` is the time if all of it were hidden, and
`Cost.exposed_seconds` what comes on top under the stated bandwidths.

This is the compiler's model of the chip and no measurement. It lacks copies that the compiler starts beside
other work (their number of bytes is in `Cost.uncounted`) and all that is outside of the program.
Programs for CPU and GPU carry no estimates: of them FLOPs, loops and collectives are told.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from t5style.train import hlo_flops
from t5style.train.hlo import Computation, Instruction, Program, read_program
from t5style.train.hlo_collectives import (
    Bandwidth,
    Collective,
    collectives_of,
    is_communication,
    timeline,
)

# Kinds of work, in the order in which reports list them.
CATEGORIES = ("matmul", "fusion", "copy", "kernel", "other")
_COPIES = {"copy", "transpose", "copy-start", "copy-done", "slice-start", "slice-done", "slice"}
# What a fusion may hold and still only move numbers about.
_MOVES = _COPIES | {
    "bitcast", "broadcast", "concatenate", "constant", "dynamic-slice", "dynamic-update-slice", "fusion",
    "get-tuple-element", "pad", "parameter", "reshape", "reverse", "tuple",
}  # fmt: skip
# Custom calls that only tell the compiler something.
_NOTES = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
# Without an estimate and no work: names for what is there.
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "add-dependency", "while",
    "call", "conditional", "partition-id", "replica-id", "optimization-barrier", "copy-done", "slice-done",
    "async-start", "async-update", "async-done",
}  # fmt: skip
# Smaller results of instructions without an estimate are not worth a line.
_LARGE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Work:
    """An instruction's share of a step.

    Attributes:
      name: of the instruction.
      category: one of CATEGORIES.
      op_name: where in the traced program it comes from.
      times: how often it runs.
      seconds: of all its runs.
      flops: of all its runs.
      bytes: of its results, once.
      note: how its time was found, if not from the compiler's cycles.
    """

    name: str
    category: str
    op_name: str
    times: int
    seconds: float
    flops: float = 0.0
    bytes: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while`.

    Attributes:
      name: of the instruction.
      op_name: where in the traced program it comes from.
      trips: of one run; 1 where it is not known.
      known: whether it is.
      times: trips of all its runs.
      seconds: of all of them, loops inside included.
    """

    name: str
    op_name: str
    trips: int
    known: bool
    times: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Figures of one run of a program, for one device.

    Attributes:
      seconds: estimated, communication hidden; None where the compiler gives no estimates (CPU, GPU).
      categories: seconds by kind of work.
      flops: multiplications and additions, kernels included, loops multiplied.
      kernel_flops: of them those in Pallas kernels.
      top: what takes longest.
      kernels: all Pallas kernels.
      loops: all loops, longest first.
      collectives: all of them, longest first.
      communication_seconds: of the collectives, under the stated bandwidth; None without one.
      exposed_seconds: of these, what no computation covers.
      uncounted: large copies and the like for which the compiler gives no cycles; the seconds are those of
        their results at the memory's bandwidth, if that was given, and are in no sum.
      assumptions: what the figures rest on.
      warnings: what could not be told.
    """

    seconds: float | None
    categories: Mapping[str, float]
    flops: float
    kernel_flops: float
    top: tuple[Work, ...]
    kernels: tuple[Work, ...]
    loops: tuple[Loop, ...]
    collectives: tuple[Collective, ...]
    communication_seconds: float | None
    exposed_seconds: float | None
    uncounted: tuple[Work, ...]
    assumptions: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def step_seconds(self) -> float | None:
        """With the communication that is exposed, as far as it is known."""
        return None if self.seconds is None else self.seconds + (self.exposed_seconds or 0.0)

    def to_json(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dictionaries."""
        return dataclasses.asdict(self) | {"step_seconds": self.step_seconds}


def cost(
    program: Program | str,
    *,
    clock_hz: float,
    peak_flops: float,
    hbm_bytes_per_second: float | None = None,
    bandwidth: Bandwidth | None = None,
    mesh_shape: Mapping[str, int] | None = None,
    attention_fraction: hlo_flops.AttentionFraction = 0.5,
    top: int = 20,
) -> Cost:
    """Reads the cost of a program.

    Args:
      program: read, or its text.
      clock_hz: cycles a second, of the device that it is compiled for.
      peak_flops: FLOP/s of the device's matrix units, at which Pallas kernels are counted.
      hbm_bytes_per_second: memory bandwidth, for `Cost.uncounted`.
      bandwidth: bytes/s of a device in one direction, for its collectives: a number or a function of the
        collective's kind, mesh axes and group size; None leaves their times open.
      mesh_shape: size by axis, in the order of the device assignment: names the axes of collectives.
      attention_fraction: share of the pairs of queries and keys that attention kernels compute, 0.5 if
        causal (whatever the size of their blocks), or a function of a kernel's op_name, its number of queries
        and of keys, for programs whose attention is not all of one kind.
      top: how many of the longest instructions to tell.

    Raises:
      ValueError: this is no program's text.
    """
    if isinstance(program, str):
        program = read_program(program)
    return _Reader(
        program, clock_hz, peak_flops, hbm_bytes_per_second, bandwidth, mesh_shape, attention_fraction
    ).read(top)


class _Reader:
    def __init__(
        self,
        program: Program,
        clock_hz: float,
        peak_flops: float,
        hbm: float | None,
        bandwidth: Bandwidth | None,
        mesh_shape: Mapping[str, int] | None,
        attention_fraction: hlo_flops.AttentionFraction,
    ) -> None:
        self.program, self.clock, self.peak, self.hbm = program, clock_hz, peak_flops, hbm
        self.bandwidth, self.mesh_shape, self.fraction = bandwidth, mesh_shape, attention_fraction
        self.warnings: dict[str, None] = {}  # in order, each once

    def read(self, top: int) -> Cost:
        work: list[Work] = []
        loops: list[Loop] = []
        visits: list[tuple[Computation, int, tuple[str, ...]]] = []
        entry = self.program.computations[self.program.entry]
        pending: list[tuple[Computation, int, tuple[str, ...]]] = [(entry, 1, ())]
        while pending:
            computation, times, inside = pending.pop()
            visits.append((computation, times, inside))
            for each in computation.instructions:
                if (own := self.work(each)) is not None:
                    work.append(
                        dataclasses.replace(
                            own, times=times, seconds=own.seconds * times, flops=own.flops * times
                        )
                    )
                if each.opcode == "while":
                    loops.append(self.loop(each, times))
                    below = (*inside, each.name)
                else:
                    below = inside
                pending.extend((other, times * runs, below) for other, runs in self.runs(each))
        found = collectives_of(self.program, visits, self.mesh_shape, self.bandwidth)
        for one in found.values():
            if not one.group:
                self.warnings[f"Which devices take part in {one.name} is not understood."] = None
        exposed = None
        if self.bandwidth is not None:
            exposed, found = timeline(self.program, found, self.own_seconds, self.runs)
        return self.summary(work, loops, list(found.values()), exposed, top)

    def summary(
        self,
        work: list[Work],
        loops: list[Loop],
        found: list[Collective],
        exposed: float | None,
        top: int,
    ) -> Cost:
        costed = self.program.for_tpu
        if not costed:
            self.warnings["The compiler gives no estimates of time in this program (only TPU's does)."] = None
        counted = [each for each in work if each.note != _UNCOUNTED]
        categories = {
            name: sum(each.seconds for each in counted if each.category == name) for name in CATEGORIES
        }
        uncounted = [each for each in work if each.note == _UNCOUNTED and each.bytes >= _LARGE]
        longest = sorted(counted, key=lambda each: each.seconds, reverse=True)
        kernels = [each for each in longest if each.category == "kernel"]
        return Cost(
            seconds=sum(categories.values()) if costed else None,
            categories=categories if costed else {},
            flops=sum(each.flops for each in counted),
            kernel_flops=sum(each.flops for each in kernels),
            top=tuple(longest[:top]) if costed else (),
            kernels=tuple(kernels),
            loops=tuple(sorted(loops, key=lambda each: each.seconds, reverse=True)),
            collectives=tuple(sorted(found, key=lambda each: (-(each.seconds or 0), -each.total_bytes))),
            communication_seconds=None
            if self.bandwidth is None
            else sum(each.seconds or 0.0 for each in found),
            exposed_seconds=exposed if costed else None,
            uncounted=tuple(sorted(uncounted, key=lambda each: -each.bytes * each.times)) if costed else (),
            assumptions={
                "clock_hz": self.clock,
                "peak_flops": self.peak,
                "hbm_bytes_per_second": self.hbm,
                "bandwidth": self.bandwidth if isinstance(self.bandwidth, int | float) else None,
                "attention_fraction": None if callable(self.fraction) else self.fraction,
            },
            warnings=tuple(self.warnings),
        )

    def runs(self, instruction: Instruction) -> list[tuple[Computation, int]]:
        """The computations that an instruction runs as control flow, and how often."""
        called = functools.partial(self.program.called, instruction)
        if instruction.opcode == "while":
            trips = self.trips(instruction)
            return [(each, trips) for name in ("condition", "body") for each in called(name)]
        if instruction.opcode == "call":
            return [(each, 1) for each in called("to_apply") + called("calls")]
        if instruction.opcode == "async-start" and not is_communication(self.program, instruction):
            return [(each, 1) for each in called("calls")]
        if instruction.opcode == "conditional":
            branches = called("branch_computations") or called("true_computation") + called(
                "false_computation"
            )
            self.warnings[
                f"{instruction.name} runs one of {len(branches)} branches: the longest is counted."
            ] = None
            return [(max(branches, key=self.seconds_of), 1)] if branches else []
        return []

    def trips(self, loop: Instruction) -> int:
        trips = self.program.trips(loop)
        if trips is None:
            self.warnings[
                f"How often the loop {loop.name} ({loop.op_name or 'no name'}) runs is not in the program: "
                "counted once."
            ] = None
        return 1 if trips is None else trips

    def loop(self, loop: Instruction, times: int) -> Loop:
        trips = self.trips(loop)
        return Loop(
            name=loop.name,
            op_name=loop.op_name,
            trips=trips,
            known=self.program.trips(loop) is not None,
            times=trips * times,
            seconds=times * self.seconds_of_instruction(loop),
        )

    @functools.cache  # noqa: B019  (lives as long as one reading)
    def seconds_of(self, computation: Computation) -> float:
        """One run of a computation, what it runs included."""
        return sum(self.seconds_of_instruction(each) for each in computation.instructions)

    def own_seconds(self, instruction: Instruction) -> float:
        """One run of an instruction, without what it runs as control flow."""
        one = self.work(instruction)
        return one.seconds if one is not None and one.note != _UNCOUNTED else 0.0

    def seconds_of_instruction(self, instruction: Instruction) -> float:
        """One run of an instruction, what it runs included."""
        inside = sum(times * self.seconds_of(each) for each, times in self.runs(instruction))
        return self.own_seconds(instruction) + inside

    @functools.cache  # noqa: B019  (lives as long as one reading)
    def work(self, instruction: Instruction) -> Work | None:
        """One run of an instruction, without what it runs as control flow; None if it is no work."""
        if instruction.opcode in _FREE or is_communication(self.program, instruction):
            return None
        target = instruction.attribute("custom_call_target") if instruction.opcode == "custom-call" else None
        if target == "tpu_custom_call":
            return self.kernel(instruction)
        if target in _NOTES:
            return None
        flops = hlo_flops.instruction_flops(self.program, instruction)
        one = Work(
            name=instruction.name,
            category=self.category(instruction, flops),
            op_name=instruction.op_name,
            times=1,
            seconds=(instruction.cycles or 0) / self.clock,
            flops=flops,
            bytes=_bytes(instruction),
        )
        if flops and hlo_flops.is_ragged(instruction):
            # The compiler's cycles are those of all rows for each group and more, or its largest number.
            cycles = f"{one.seconds:.3g} s" if instruction.cycles else "without end"
            self.warnings[
                f"{instruction.name} ({instruction.op_name}) is counted as {flops / self.peak:.3g} s a run, "
                f"its FLOPs at peak; the compiler's estimate is {cycles}."
            ] = None
            return dataclasses.replace(
                one, category="kernel", seconds=flops / self.peak, note="FLOPs at peak: rows × in × out"
            )
        if instruction.cycles is None:
            if flops and self.program.for_tpu:
                self.warnings[f"{instruction.name} has no estimate: its FLOPs are counted at peak."] = None
                return dataclasses.replace(one, seconds=flops / self.peak, note="FLOPs at peak")
            moved = 0.0 if self.hbm is None else one.bytes / self.hbm
            return one if flops else dataclasses.replace(one, seconds=moved, note=_UNCOUNTED)
        return one

    def kernel(self, instruction: Instruction) -> Work:
        """A Pallas kernel."""
        computation = self.program.computations[instruction.computation]
        found = hlo_flops.kernel_flops(computation, instruction, self.fraction)
        name, flops, note = found or (hlo_flops.kernel_name(instruction), 0.0, "unknown: counted as nothing")
        if found is None:
            self.warnings[
                f"The kernel {name} ({instruction.name}) is not known and says nothing about its cost: its "
                "time is counted as 0."
            ] = None
        return Work(
            name=f"{name} ({instruction.name})",
            category="kernel",
            op_name=instruction.op_name,
            times=1,
            seconds=flops / self.peak,
            flops=flops,
            bytes=sum(shape.bytes for shape in instruction.shapes),
            note=f"FLOPs at peak: {note}" if found else note,
        )

    def category(self, instruction: Instruction, flops: float) -> str:
        if flops:
            return "matmul"
        if instruction.opcode in _COPIES:
            return "copy"
        if instruction.opcode == "fusion":
            moves = all(each.opcode in _MOVES for each in self.program.inside(instruction))
            return "copy" if moves else "fusion"
        return "other"


_UNCOUNTED = "no estimate"


def _bytes(instruction: Instruction) -> int:
    """Of its results; of an asynchronous copy, whose result also holds its operand, what is copied."""
    sizes = [shape.bytes for shape in instruction.shapes]
    if instruction.opcode in ("copy-start", "slice-start"):
        return min(sizes[:2])
    return sum(sizes)
