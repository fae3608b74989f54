"""Reads the text of a compiled program, `compiled.as_text()`: its computations, instructions and loops.

The text is HLO as XLA prints it, one instruction a line: `%name = type opcode(operands), attribute=value`.
What makes it less simple than that: types are tuples with layouts, `(f32[8]{0:T(128)S(1)}, s32[])`; a
Pallas kernel's metadata is printed raw, with newlines, braces and quotes; and the compiler writes into
strings what looks like an attribute. So instructions end where brackets and quotes say so, and attributes
are looked up outside of strings.

`trip_count` says how often a loop runs: what the compiler has noted, or what follows from the loop's
condition, its step and its first value, all of which must be constants.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

# Bits of an element; others are named after their bits, as f8e4m3fn is.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,<= ]*)\](\{[^{}]*S\(5\)[^{}]*\})?")
_INSTRUCTION = re.compile(r"  +(ROOT )?%?([^\s=]+) = (.*?) ?\b([a-z][a-z0-9\-]*)\(", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\) -> .*\{$")
_MARK = re.compile(r"[{}()\[\],]")
_REFERENCE = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one array: `bf16[8,128]`; on_host: it is in the host's memory."""

    dtype: str
    dims: tuple[int, ...]
    on_host: bool = False

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Without the padding of tiled layouts."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.match(r"[a-z]+(\d+)", self.dtype)
            bits = int(digits[1]) if digits else 0
        return -(-self.elements * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


def read_shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, of a tuple all of them in order. The bound `<=8` of a dynamic size counts."""
    return tuple(
        Shape(
            dtype, tuple(int(size.strip("<= ")) for size in dims.split(",") if size.strip("<= ")), bool(host)
        )
        for dtype, dims, host in _SHAPE.findall(text)
    )


@dataclasses.dataclass(eq=False)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without %.
      opcode: `fusion`.
      type: of the result, as written.
      text: what comes after `opcode(`: operands, attributes.
      computation: name of the one it is in.
      root: its result is the computation's.
    """

    name: str
    opcode: str
    type: str
    text: str
    computation: str
    root: bool = False

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """Arrays of the result."""
        return read_shapes(self.type)

    @functools.cached_property
    def _split(self) -> int:
        """Where the operands end."""
        end = self.text.find(")")
        if self.text.find("(", 0, end) < 0:
            return end
        depth = 1
        for match in re.finditer(r"[()]", _without_strings(self.text)):
            depth += 1 if match[0] == "(" else -1
            if depth == 0:
                return match.start()
        return len(self.text)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(_REFERENCE.findall(self.text, 0, self._split))

    @property
    def argument(self) -> str:
        """What is written between the brackets: of a parameter its number, of a constant its value."""
        return self.text[: self._split]

    @functools.cached_property
    def attributes(self) -> str:
        """All attributes, as written."""
        return self.text[self._split + 1 :]

    @functools.cached_property
    def _bare(self) -> str:
        return _without_strings(self.attributes)

    def attribute(self, name: str) -> str | None:
        """The value of an attribute as written, without the quotes of a string; None if it is not there."""
        match = re.search(rf"(?:^|[ ,]){re.escape(name)}=", self._bare)
        if match is None:
            return None
        start, end, depth = match.end(), len(self._bare), 0
        for mark in _MARK.finditer(self._bare, start):
            if depth == 0 and mark[0] == ",":
                end = mark.start()
                break
            depth += {"{": 1, "[": 1, "(": 1, ",": 0}.get(mark[0], -1)
        value = self.attributes[start:end].strip()
        return value[1:-1] if value.startswith('"') else value

    def names(self, attribute: str) -> tuple[str, ...]:
        """The computations that an attribute names: `calls=%f` or `branch_computations={%f, %g}`."""
        return tuple(_REFERENCE.findall(self.attribute(attribute) or ""))

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the traced program it comes from: `jit(train_step)/.../dot_general`, or ''."""
        metadata = self.attribute("metadata") or ""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', metadata)
        return match[1] if match else ""

    @functools.cached_property
    def config(self) -> str:
        """The compiler's notes about it: `backend_config`, JSON, or ''."""
        return self.attribute("backend_config") or ""

    @functools.cached_property
    def cycles(self) -> int | None:
        """What the TPU compiler estimates that it takes; None where it says nothing (or nothing of use: its
        largest number).
        """
        if "estimated_cycles" not in self.text:
            return None
        match = re.search(r'"estimated_cycles":"(\d+)"', self.config)
        return int(match[1]) if match and int(match[1]) < 1 << 62 else None


@dataclasses.dataclass(eq=False)
class Computation:
    """A list of instructions in the order in which they run."""

    name: str
    instructions: list[Instruction] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction | None:
        """The one whose result is the computation's."""
        return next((each for each in reversed(self.instructions) if each.root), None)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(each.argument): each for each in self.instructions if each.opcode == "parameter"}

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Those instructions whose results it reads."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]


@dataclasses.dataclass(eq=False)
class Program:
    """A module.

    Attributes:
      name: of the module.
      computations: all, by name.
      entry: name of the one that is run.
    """

    name: str
    computations: dict[str, Computation]
    entry: str

    @functools.cached_property
    def for_tpu(self) -> bool:
        """Whether TPU's compiler made it, which writes estimates and tiled layouts into it."""
        return any(each.cycles is not None or ":T(" in each.type for each in self.instructions())

    def instructions(self) -> Iterator[Instruction]:
        """All, also those inside of fusions."""
        for computation in self.computations.values():
            yield from computation.instructions

    def called(self, instruction: Instruction, attribute: str) -> list[Computation]:
        """The computations that an attribute of the instruction names."""
        return [self.computations[name] for name in instruction.names(attribute) if name in self.computations]

    def inside(self, instruction: Instruction) -> Iterator[Instruction]:
        """What a fusion (or another instruction with `calls=`) is made of, fusions inside it included."""
        if " calls=" not in instruction.attributes:
            return
        for computation in self.called(instruction, "calls"):
            for each in computation.instructions:
                yield each
                yield from self.inside(each)

    @functools.cached_property
    def loop_of(self) -> dict[str, Instruction]:
        """The loop of which a computation is the body, by the computation's name."""
        return {
            name: each
            for each in self.instructions()
            if each.opcode == "while"
            for name in each.names("body")
        }

    @functools.cache  # noqa: B019  (programs are few, and die with their caches)
    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs; None if that is not to be seen in the program."""
        return trip_count(self, loop)


def read_program(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation in it.
    """
    module = re.match(r"\s*HloModule ([^\s,]+)", text)
    computations: dict[str, Computation] = {}
    entry, computation = "", None
    lines = iter(text.split("\n"))
    for line in lines:
        if computation is None:
            if line.endswith("{") and (header := _COMPUTATION.match(line)):
                computation = computations[header[2]] = Computation(header[2])
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            computation = None
        elif match := _INSTRUCTION.match(line):
            while not _complete(line):
                following = next(lines, None)
                if following is None:
                    break
                line += "\n" + following
            root, name, kind, opcode = match.groups()
            computation.instructions.append(
                Instruction(name, opcode, kind, line[match.end() :], computation.name, bool(root))
            )
    if not entry:
        raise ValueError("This is not the text of a compiled program: no computation in it is the ENTRY.")
    return Program(module[1] if module else "", computations, entry)


def _without_strings(text: str) -> str:
    """The text with blanks in the place of what quotes enclose."""
    return _STRING.sub(lambda match: '"' + " " * (len(match[0]) - 2) + '"', text) if '"' in text else text


def _complete(text: str) -> bool:
    """Whether brackets and quotes that are opened are closed."""
    if text.count("{") == text.count("}") and text.count('"') % 2 == 0:
        return True
    text = _STRING.sub("", text)
    return '"' not in text and text.count("{") <= text.count("}")


# What a scalar of a loop is, as far as it can be told without running it: a number; an element of what the
# loop carries plus a number; a comparison of two such.
@dataclasses.dataclass(frozen=True)
class _Carried:
    index: int
    plus: int = 0


@dataclasses.dataclass(frozen=True)
class _Compared:
    direction: str
    left: int | _Carried
    right: int | _Carried


_Scalar = int | _Carried | _Compared | None
# Their result is their operand, as far as numbers go.
_SAME = {
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "copy-start",
    "copy-done",
    "broadcast",
    "optimization-barrier",
}


def _evaluate(
    program: Program,
    computation: Computation,
    name: str,
    arguments: Sequence[_Scalar] | None = None,
    element: int | None = None,
) -> _Scalar:
    """What an instruction's result is (its `element`, of a tuple).

    `arguments` are those of a fusion; without them the computation's parameter is what a loop carries.
    """
    each = computation.by_name.get(name)
    if each is None:
        return None
    again = functools.partial(_evaluate, program, computation, arguments=arguments)
    if each.opcode == "constant":
        return int(each.argument) if re.fullmatch(r"-?\d+", each.argument) else None
    if each.opcode == "parameter":
        if arguments is None:
            return None if element is None else _Carried(element)
        number = int(each.argument)
        return arguments[number] if number < len(arguments) else None
    if each.opcode == "get-tuple-element":
        return again(each.operands[0], element=int(each.attribute("index") or 0))
    if each.opcode == "tuple" and element is not None:
        return again(each.operands[element])
    if each.opcode in _SAME and each.operands:
        return again(each.operands[0], element=element if each.opcode == "optimization-barrier" else None)
    if each.opcode in ("add", "subtract", "compare"):
        left, right = (again(operand) for operand in each.operands)
        return _combine(each, left, right)
    if each.opcode in ("fusion", "call"):
        inner = program.called(each, "calls") or program.called(each, "to_apply")
        if inner and inner[0].root:
            values = [again(operand) for operand in each.operands]
            return _evaluate(program, inner[0], inner[0].root.name, values, element)
    return None


def _combine(each: Instruction, left: _Scalar, right: _Scalar) -> _Scalar:
    if left is None or right is None or isinstance(left, _Compared) or isinstance(right, _Compared):
        return None
    if each.opcode == "compare":
        return _Compared(each.attribute("direction") or "", left, right)
    if isinstance(left, int) and isinstance(right, int):
        return left + right if each.opcode == "add" else left - right
    if isinstance(left, _Carried) and isinstance(right, int):
        return _Carried(left.index, left.plus + (right if each.opcode == "add" else -right))
    if isinstance(right, _Carried) and isinstance(left, int) and each.opcode == "add":
        return _Carried(right.index, right.plus + left)
    return None


def _before(program: Program, loop: Instruction, index: int) -> int | None:
    """An element of what a loop carries, before its first trip, if it is a constant.

    In a loop inside a loop it may be what the outer one carries, unchanged from trip to trip.
    """
    for _ in range(16):  # loops inside each other
        computation = program.computations[loop.computation]
        value = _evaluate(program, computation, loop.operands[0], element=index)
        if not isinstance(value, _Carried):
            return value if isinstance(value, int) else None
        outer = program.loop_of.get(computation.name)
        if outer is None or value.plus or _step(program, outer, value.index) != 0:
            return None
        loop, index = outer, value.index
    return None


def _step(program: Program, loop: Instruction, index: int) -> int | None:
    """By how much a trip changes an element of what the loop carries."""
    bodies = program.called(loop, "body")
    if not bodies or bodies[0].root is None:
        return None
    value = _evaluate(program, bodies[0], bodies[0].root.name, element=index)
    return value.plus if isinstance(value, _Carried) and value.index == index else None


def trip_count(program: Program, loop: Instruction) -> int | None:
    """How often a `while` runs; None if its condition is not the comparison of a counter with a constant."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.config):
        return int(known[1])
    conditions = program.called(loop, "condition")
    if not conditions or conditions[0].root is None:
        return None
    test = _evaluate(program, conditions[0], conditions[0].root.name)
    if not isinstance(test, _Compared):
        return None
    left, right, direction = test.left, test.right, test.direction
    if not isinstance(left, _Carried) or (
        isinstance(right, _Carried) and _step(program, loop, left.index) == 0
    ):
        left, right = right, left
        direction = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}.get(direction, direction)
    if not isinstance(left, _Carried):
        return None
    if isinstance(right, _Carried):
        if _step(program, loop, right.index) != 0:
            return None
        limit = _before(program, loop, right.index)
        limit = None if limit is None else limit + right.plus
    else:
        limit = right
    first, step = _before(program, loop, left.index), _step(program, loop, left.index)
    if limit is None or first is None or not step:
        return None
    distance = (limit - first - left.plus) * (1 if step > 0 else -1)
    if direction in ("LE", "GE"):
        distance += 1
    elif direction not in ("LT", "GT", "NE"):
        return None
    if direction in (("LT", "LE") if step < 0 else ("GT", "GE")):
        return None  # runs away from the limit: not a counted loop
    return max(0, -(-distance // abs(step)))
