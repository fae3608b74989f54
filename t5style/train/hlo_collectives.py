"""The communication in a compiled program: what is sent, between which devices, how often, and what hides it.

Collectives come as one instruction (`all-gather`), as a pair (`all-gather-start` and `-done`), and on TPU in
fusions: a reduce-scatter is there a fusion `all-reduce-scatter` of an all-reduce and a slice (which looks
like an all-reduce to whoever reads only opcodes), and an asynchronous collective may be a fusion that starts
it, matrix products that carry its steps, and a fusion that ends it, joined by their channel. Between slices,
over the data-centre network, libtpu sends and receives through its hosts (`megascale`); the devices that take
part are then named within their slice, also by the collectives inside of it.

Times are those of rings, in which every link carries as much: of n devices each sends (n-1)/n of the whole
array in an all-gather or a reduce-scatter, twice that in an all-reduce, its part to a neighbour in a
permute (over one link; a bandwidth that is a function can say how fast that is), and in an all-to-all (n-1)/n
of its part over n/4 links on the average.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from t5style.train.hlo import Computation, Instruction, Program, Shape

# What stands for the mesh axis of a collective between slices.
SLICES = "slices"
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Bytes a second that a device sends: a number, or a function of kind, mesh axes and size of the group.
Bandwidth = float | Callable[[str, tuple[str, ...], int], float]
Visit = tuple[Computation, int, tuple[str, ...]]

_OPCODE = re.compile(rf"(ragged-)?({'|'.join(KINDS)})(-start|-done)?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      name: of the instruction (that starts it).
      kind: one of KINDS.
      asynchronous: whether computation may run beside it.
      op_name: where in the traced program it comes from.
      arrays: what it works on, on one device: of an all-gather its result, else its operands.
      group: devices that take part with each other, 0 if that is not to be read.
      axes: of the mesh, which these differ in; `?` after a name if it is only a part of that axis. SLICES
        between slices. Empty where no mesh was given, or no axes fit.
      bytes: that a device sends in one run.
      loop: names of the loops that it is in, outermost first.
      times: how often it runs.
      total_bytes: of all runs.
      seconds: of all runs; None without a bandwidth.
      cover_seconds: of all runs, the computation between its start and its end.
      exposed_seconds: of all runs, what it makes the computation wait.
    """

    name: str
    kind: str
    asynchronous: bool
    op_name: str
    arrays: tuple[str, ...]
    group: int
    axes: tuple[str, ...]
    bytes: int
    loop: tuple[str, ...]
    times: int
    seconds: float | None = None
    cover_seconds: float = 0.0
    exposed_seconds: float | None = None

    @property
    def total_bytes(self) -> int:
        """Of all runs."""
        return self.bytes * self.times


@dataclasses.dataclass(frozen=True)
class _Part:
    """What an instruction has to do with a collective.

    `phase` is sync, start, step or done, `inner` the instruction that says what is sent to whom, and `key`
    joins the parts.
    """

    phase: str
    kind: str
    inner: Instruction
    key: str


def part_of(program: Program, instruction: Instruction) -> _Part | None:
    """What an instruction has to do with a collective, None if nothing."""
    if match := _OPCODE.fullmatch(instruction.opcode):
        phase = (match[3] or "-sync")[1:]
        key = instruction.operands[0] if phase == "done" else instruction.name
        return _Part(phase, match[2], instruction, key)
    if instruction.opcode in ("send", "recv-done"):
        return _between_slices(program, instruction)
    if instruction.opcode not in ("fusion", "async-start", "async-done", "async-update"):
        return None
    return _fused(program, instruction)


def _fused(program: Program, instruction: Instruction) -> _Part | None:
    inner, kind, targets = None, "", set()
    for each in program.inside(instruction):
        if each.opcode == "custom-call":
            targets.add(each.attribute("custom_call_target"))
        elif match := _OPCODE.fullmatch(each.opcode):
            inner, kind = each, match[2]
    if inner is None:
        return None
    if kind == "all-reduce" and "all-reduce-scatter" in inner.computation:
        kind = "reduce-scatter"
    if instruction.opcode != "fusion":
        phase = instruction.opcode.removeprefix("async-").replace("update", "step")
    elif "AsyncCollectiveStart" in targets:
        phase = "start"
    elif "AsyncCollectiveDone" in targets:
        phase = "done"
    else:
        phase = "sync" if instruction.cycles is None else "step"
    return _Part(phase, kind, inner, inner.attribute("channel_id") or inner.name)


def _between_slices(program: Program, instruction: Instruction) -> _Part | None:
    computation = program.computations[instruction.computation]
    inner = instruction
    if instruction.opcode == "recv-done":
        inner = next(iter(computation.operands(instruction)), instruction)
    notes = dict(re.findall(r'_xla_(\w+)="([^"]*)"', inner.attribute("frontend_attributes") or ""))
    kind = notes.get("megascale_transfer_type", "").lower().replace("_", "-")
    if kind not in KINDS:
        return None
    phase = "start" if instruction is inner else "done"
    return _Part(phase, kind, inner, notes.get("host_transfer_rendezvous", inner.name))


def is_communication(program: Program, instruction: Instruction) -> bool:
    """Whether an instruction's time is that of a collective: one with computation in it has its cycles."""
    part = part_of(program, instruction)
    return part is not None and instruction.cycles is None


def read_groups(text: str) -> np.ndarray | None:
    """`replica_groups` as an array [groups, devices of a group], None if empty, ragged or not understood.

    Lists `{{0,1},{2,3}}`, iotas `[2,4]<=[4,2]T(1,0)` and meshes `mesh['a'=2,'b'=4] {'b'}`, of whose axes
    parts are written `'b':(2)2`, the 2 after the first 2, and whose devices may be in another order,
    `mesh['b'=4,'a'=2], device_ids=([2,4]T(1,0)) {'b'}`.
    """
    if match := re.match(r"\[([\d,]+)\]<=(\[.*)", text):
        devices = _device_order(match[2])
        return None if devices is None else devices.reshape([int(size) for size in match[1].split(",")])
    if match := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*)\))? \{([^}]*)\}$", text):
        devices = _device_order(match[2] or "")
        groups = _mesh_groups(match[1], match[3])
        return groups if devices is None or groups is None else devices.ravel()[groups]
    if text.startswith("{"):
        lists = [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
        if lists and len({len(group) for group in lists}) == 1:
            return np.array(lists)
    return None


def _device_order(text: str) -> np.ndarray | None:
    """Devices counted in rows of a shape and read along its axes in another order: `[2,4]T(1,0)`."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        return None
    dims = [int(size) for size in match[1].split(",")]
    devices = np.arange(math.prod(dims)).reshape(dims)
    return devices.transpose([int(axis) for axis in match[2].split(",")]) if match[2] else devices


def _mesh_groups(mesh: str, axes: str) -> np.ndarray | None:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    wanted = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)
    dims: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        cuts = {1, size}
        parts = [(int(before or 1), int(part or size)) for axis, before, part in wanted if axis == name]
        for before, part in parts:
            cuts |= {before, before * part}
        ordered = sorted(cuts)
        for low, high in itertools.pairwise(ordered):
            if high % low:
                return None
            if any(before <= low and high <= before * part for before, part in parts):
                inside.append(len(dims))
            dims.append(high // low)
    devices = np.arange(math.prod(dims)).reshape(dims or (1,))
    outside = [axis for axis in range(len(dims)) if axis not in inside]
    size = math.prod(dims[axis] for axis in inside)
    return devices.transpose(outside + inside).reshape(-1, size) if dims else devices[None]


def mesh_axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes in which the devices of a group differ; `?` marks one of which a group holds a part."""
    sizes = list(mesh_shape.values())
    if groups.size == 0 or groups.max() >= math.prod(sizes):
        return ()
    places = np.stack(np.unravel_index(groups[0], sizes), axis=-1)  # [devices, axes]
    found = []
    for axis, (name, size) in enumerate(mesh_shape.items()):
        here = len(set(places[:, axis].tolist()))
        if here > 1:
            found.append(name if here == size else f"{name}?")
    return tuple(found)


def _permute_groups(pairs: str) -> np.ndarray | None:
    """The devices of the ring (or row) that begins with the first pair of a permute."""
    onward = {int(a): int(b) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs)}
    if not onward:
        return None
    begins = set(onward) - set(onward.values())
    ring = [min(begins) if begins else min(onward)]
    while ring[-1] in onward and onward[ring[-1]] not in ring:
        ring.append(onward[ring[-1]])
    return np.array([ring])


def sent_bytes(kind: str, operand_bytes: int, n: int) -> int:
    """What a device sends, of an operand of so many bytes on each of n devices."""
    if kind == "collective-permute":
        return operand_bytes
    if n <= 1:
        return 0
    share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)
    return round(operand_bytes * share)


def _seconds(kind: str, sent: int, n: int, axes: tuple[str, ...], bandwidth: Bandwidth) -> float:
    speed = bandwidth(kind, axes, n) if callable(bandwidth) else bandwidth
    hops = max(1.0, n * n / (4 * (n - 1))) if kind == "all-to-all" and n > 1 else 1.0
    return sent * hops / speed


def collectives_of(
    program: Program,
    visits: Sequence[Visit],
    mesh_shape: Mapping[str, int] | None = None,
    bandwidth: Bandwidth | None = None,
) -> dict[Instruction, Collective]:
    """All collectives by the instruction that is or starts them.

    Args:
      program: read.
      visits: computations that run, how often, and inside which loops.
      mesh_shape: size by axis, in the order of the device assignment.
      bandwidth: for their seconds.
    """
    found: dict[Instruction, Collective] = {}
    for computation, times, loop in visits:
        for each in computation.instructions:
            part = part_of(program, each)
            if part is None or part.phase not in ("sync", "start"):
                continue
            if each in found:  # its computation runs from several places
                found[each] = dataclasses.replace(found[each], times=found[each].times + times)
                continue
            found[each] = _read(program, each, part, times, loop, mesh_shape)
    if bandwidth is None:
        return found
    return {
        each: dataclasses.replace(
            one, seconds=one.times * _seconds(one.kind, one.bytes, one.group, one.axes, bandwidth)
        )
        for each, one in found.items()
    }


def _groups(inner: Instruction, mesh_shape: Mapping[str, int] | None) -> np.ndarray | None:
    if pairs := inner.attribute("source_target_pairs"):
        return _permute_groups(pairs)
    # Of a mesh the value goes on behind a comma.
    mesh = re.search(r"replica_groups=(mesh\[.*?\](?:, device_ids=\(.*?\))? \{[^}]*\})", inner.attributes)
    text = mesh[1] if mesh else inner.attribute("replica_groups") or "{}"
    if text == "{}" and mesh_shape:
        return np.arange(math.prod(mesh_shape.values()))[None]
    return read_groups(text)


def _read(
    program: Program,
    instruction: Instruction,
    part: _Part,
    times: int,
    loop: tuple[str, ...],
    mesh_shape: Mapping[str, int] | None,
) -> Collective:
    inner, kind = part.inner, part.kind
    computation = program.computations[inner.computation]
    operands = [shape for each in computation.operands(inner) for shape in each.shapes]
    slices = re.search(r'megascale_target="\{([\d,]+)\}', inner.attribute("frontend_attributes") or "")
    if slices or kind == "collective-permute":
        operands = operands[:1]
    arrays: Sequence[Shape] = operands
    if kind == "all-gather" and not slices:
        begun = (
            len(operands) if inner.opcode.endswith("-start") else 0
        )  # whose result begins with the operands
        arrays = inner.shapes[begun : begun + len(operands)]
    groups = _groups(inner, mesh_shape)
    if slices:
        size = len(slices[1].split(","))
        axes: tuple[str, ...] = (SLICES,)
    else:
        size = 0 if groups is None else groups.shape[1]
        axes = mesh_axes(groups, mesh_shape) if groups is not None and mesh_shape else ()
    return Collective(
        name=instruction.name,
        kind=kind,
        asynchronous=part.phase == "start",
        op_name=instruction.op_name or inner.op_name,
        arrays=tuple(str(shape) for shape in arrays),
        group=size,
        axes=axes,
        bytes=sent_bytes(kind, sum(shape.bytes for shape in operands), size),
        loop=loop,
        times=times,
    )


def _links(part: _Part, collective: Collective) -> str:
    """Names what a collective occupies; those that occupy the same follow each other."""
    if SLICES in collective.axes:
        return SLICES
    return part.inner.attribute("source_target_pairs") or ""


_Key = TypeVar("_Key", str, Instruction)


@dataclasses.dataclass
class _Run:
    """One run of a computation: how long, how long which links are busy, and by collective the seconds of
    computation that cover it and those that wait for it.
    """

    elapsed: float = 0.0
    busy: dict[str, float] = dataclasses.field(default_factory=dict)
    cover: dict[Instruction, float] = dataclasses.field(default_factory=dict)
    exposed: dict[Instruction, float] = dataclasses.field(default_factory=dict)

    @staticmethod
    def add(total: dict[_Key, float], which: _Key, seconds: float) -> None:
        """To what is in a dictionary already."""
        total[which] = total.get(which, 0.0) + seconds


def timeline(
    program: Program,
    found: Mapping[Instruction, Collective],
    own_seconds: Callable[[Instruction], float],
    runs: Callable[[Instruction], Sequence[tuple[Computation, int]]],
) -> tuple[float, dict[Instruction, Collective]]:
    """Lays computation and communication beside each other, in the order of the schedule.

    Collectives follow each other on the links; the computation waits where one ends that is not done. What
    is in flight when a loop begins goes on beside it. Permutes to different neighbours do not hinder each
    other, nor do they or what goes between slices hinder other collectives.

    Args:
      program: read.
      found: its collectives with their seconds.
      own_seconds: of one run of an instruction, without what it runs as control flow.
      runs: that: computations, and how often.

    Returns:
      Seconds of one run of the program that wait for communication, and the collectives with theirs.
    """

    @functools.cache
    def run(name: str) -> _Run:
        result = _Run()
        # By links: when they are free, and the asynchronous collective that then ends.
        free: dict[str, tuple[float, Instruction | None]] = {}
        flying: dict[str, tuple[Instruction, float, float]] = {}  # key: start, its time, its end
        for each in program.computations[name].instructions:
            part = part_of(program, each)
            if part is not None and part.phase in ("sync", "start"):
                links = _links(part, found[each])
                seconds = (found[each].seconds or 0.0) / max(found[each].times, 1)
                result.add(result.busy, links, seconds)
                begin, holder = free.get(links, (0.0, None))
                begin = max(begin, result.elapsed)
                if part.phase == "start":
                    flying[part.key] = (each, result.elapsed, begin + seconds)
                    free[links] = (begin + seconds, each)
                else:
                    result.add(result.exposed, holder or each, begin - result.elapsed)
                    result.add(result.exposed, each, seconds)
                    result.elapsed = begin + seconds
            elif part is not None and part.phase == "done" and part.key in flying:
                start, begin, end = flying.pop(part.key)
                result.add(result.cover, start, result.elapsed - begin)
                result.add(result.exposed, start, max(0.0, end - result.elapsed))
                result.elapsed = max(result.elapsed, end)
            if part is None or each.cycles is not None:
                result.elapsed += own_seconds(each)
            for computation, times in runs(each):
                inner = run(computation.name)
                for links, seconds in inner.busy.items():
                    end, holder = free.get(links, (0.0, None))
                    free[links] = (max(end, result.elapsed) + seconds * times, holder)
                    result.add(result.busy, links, seconds * times)
                result.elapsed += inner.elapsed * times
                for total, one in ((result.cover, inner.cover), (result.exposed, inner.exposed)):
                    for start, seconds in one.items():
                        result.add(total, start, seconds * times)
        return result

    whole = run(program.entry)
    return sum(whole.exposed.values()), {
        each: dataclasses.replace(
            one,
            cover_seconds=whole.cover.get(each, 0.0),
            exposed_seconds=whole.exposed.get(each, 0.0),
        )
        for each, one in found.items()
    }
