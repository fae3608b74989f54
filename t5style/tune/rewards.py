"""Rewards that can be checked: what an answer is worth, by rules, parsers, schemas and tests.

A reward is anything that is called with a prompt's record (its answer, tests, ...: whatever the prompts'
store keeps beside it) and the texts of its completions, and gives a number for each. Here are frozen
dataclasses; a function that can be imported is as good:

    def short(record: Mapping[str, Any], completions: Sequence[str]) -> list[float]:
        return [1.0 if len(text) < 80 else 0.0 for text in completions]

scoring.py calls them in a process of their own, minds the time, and counts what raises or gives no number.
"""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from t5style.run_dir import UserError
from t5style.tune.sandbox import Sandbox

Record = Mapping[str, Any]


class Reward(Protocol):
    """What an answer is worth."""

    def __call__(self, record: Record, completions: Sequence[str]) -> Sequence[float]:
        """A number for each completion, texts without what ended them, of the prompt with this record."""
        ...


def field(record: Record, name: str) -> Any:
    """A record's value; KeyError that names what there is."""
    if name not in record:
        raise KeyError(
            f"the prompt's record has no {name!r}, only {', '.join(map(repr, record)) or 'nothing'}"
        )
    return record[name]


# ---------------------------------------------------------------------------------------------------- matches


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """1 where the completion is the answer, or one of the answers; else 0.

    Attributes:
      answer: the record's field: a text, or a list of texts any of which is right.
      ignore_case, ignore_space: whether "The  Cat " is "the cat".
      pattern: a regular expression whose first group (the last time it is found) is what counts as the
        answer; None: the whole completion. Where it is not found, the reward is 0.
    """

    answer: str = "answer"
    ignore_case: bool = False
    ignore_space: bool = True
    pattern: str | None = None

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, groups=1)

    def _plain(self, text: str) -> str:
        text = " ".join(text.split()) if self.ignore_space else text
        return text.casefold() if self.ignore_case else text

    def __call__(self, record: Record, completions: Sequence[str]) -> list[float]:
        """See Reward."""
        answer = field(record, self.answer)
        right = {self._plain(str(each)) for each in (answer if isinstance(answer, list) else [answer])}
        found = completions if self.pattern is None else [_last(self.pattern, text) for text in completions]
        return [float(text is not None and self._plain(text) in right) for text in found]


def _last(pattern: str, text: str) -> str | None:
    """The first group of the pattern's last match."""
    match = None
    for match in re.finditer(pattern, text, re.DOTALL):  # noqa: B007 - the last is wanted
        pass
    return None if match is None else match[1]


def _check_pattern(pattern: str | None, groups: int = 0) -> None:
    if pattern is None:
        return
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern is {pattern!r}, no regular expression: {error}.") from None
    if compiled.groups < groups:
        raise ValueError(f"pattern is {pattern!r}; it needs a group, as in '<answer>(.*?)</answer>'.")


# A sign, digits with or without thousands separators, a fraction or decimals, an exponent.
_NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?\s?[$€£]?\s?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)/\d+(?![\d/])|\.\d+)?(?:[eE][-+]?\d+)?"
)
_MARKED = (re.compile(r"####\s*(.*)"), re.compile(r"\\boxed\{([^{}]*)\}"))


def number(text: str) -> fractions.Fraction | None:
    """The number that a text gives as its answer: what stands behind the last '####' (GSM8K) or in the last
    \\boxed{}, else the last number of the text; None where there is none.

    Thousands separators, signs of currency, a full stop at the end, simple fractions and exponents are read.
    """
    for mark in _MARKED:
        if found := mark.findall(text):
            numbers = _numbers(found[-1])
            return numbers[0] if numbers else None
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[fractions.Fraction]:
    values = []
    for match in _NUMBER.finditer(text):
        plain = re.sub(r"[\s$€£,+]", "", match[0]).replace("\u2212", "-")
        if not any(character.isdigit() for character in plain):
            continue
        try:
            if "/" in plain:
                values.append(fractions.Fraction(plain))
            # An exponent of a million would take the machine's memory.
            elif abs((value := decimal.Decimal(plain)).adjusted()) < 400:
                values.append(fractions.Fraction(value))
        except (ValueError, ZeroDivisionError, decimal.InvalidOperation):
            continue
    return values


@dataclasses.dataclass(frozen=True)
class NumericAnswer:
    """1 where the completion's answer is the record's number, see `number`; else 0.

    Attributes:
      answer: the record's field: a number, or a text that gives one (GSM8K's whole solution).
      tolerance: how far off it may be, relative to the answer.
      pattern: see ExactMatch: the number is looked for in the group.
      wrong, missing: rewards of a wrong number and of none.
    """

    answer: str = "answer"
    tolerance: float = 1e-6
    pattern: str | None = None
    wrong: float = 0.0
    missing: float = 0.0

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, groups=1)
        if self.tolerance < 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must be 0 or more.")

    def __call__(self, record: Record, completions: Sequence[str]) -> list[float]:
        """See Reward."""
        right = number(str(field(record, self.answer)))
        if right is None:
            raise ValueError(f"the answer {record[self.answer]!r} of the prompt holds no number")
        texts = completions if self.pattern is None else [_last(self.pattern, text) for text in completions]
        return [self._one(right, text) for text in texts]

    def _one(self, right: fractions.Fraction, text: str | None) -> float:
        found = None if text is None else number(text)
        if found is None:
            return self.missing
        close = abs(found - right) <= fractions.Fraction(self.tolerance) * abs(right)
        return 1.0 if close else self.wrong


@dataclasses.dataclass(frozen=True)
class PlacesRight:
    """The share of places at which completion and answer have the same character: credit for a part.

    Attributes:
      answer: the record's field.
    """

    answer: str = "answer"

    def __call__(self, record: Record, completions: Sequence[str]) -> list[float]:
        """See Reward."""
        right = str(field(record, self.answer))
        same = [sum(a == b for a, b in zip(right, text, strict=False)) for text in completions]
        sizes = [max(len(right), len(text), 1) for text in completions]
        return [count / size for count, size in zip(same, sizes, strict=True)]


@dataclasses.dataclass(frozen=True)
class Matches:
    """1 where the whole completion matches a regular expression ('.' also for a new line); else 0.

    Attributes:
      pattern: the expression; `search` makes it enough that it is found somewhere.
    """

    pattern: str
    search: bool = False

    def __post_init__(self) -> None:
        _check_pattern(self.pattern)

    def __call__(self, record: Record, completions: Sequence[str]) -> list[float]:
        """See Reward."""
        compiled = re.compile(self.pattern, re.DOTALL)
        match = compiled.search if self.search else compiled.fullmatch
        return [float(match(text) is not None) for text in completions]


@dataclasses.dataclass(frozen=True)
class WordCount:
    """1 for a completion of the wanted number of words, less by `slope` for each word too many or too few,
    at least 0.

    Attributes:
      words: how many; or the record's field that says it.
    """

    words: int | str
    slope: float = 0.1

    def __call__(self, record: Record, completions: Sequence[str]) -> list[float]:
        """See Reward."""
        wanted = self.words if isinstance(self.words, int) else int(field(record, self.words))
        return [max(0.0, 1.0 - self.slope * abs(len(text.split()) - wanted)) for text in completions]


# ------------------------------------------------------------------------------------------- schema and tests


@dataclasses.dataclass(frozen=True)
class JsonSchema:
    """1 where the completion is JSON that a schema allows; `json_only` where it is JSON at all; else 0.

    Validated by the library jsonschema (extra: `t5style[rewards]`); references to other documents are not
    followed.

    Attributes:
      schema: the schema, or the record's field that holds it.
      fenced: look into a block ```json ... ``` where the completion has one.
      json_only: the reward of JSON that the schema does not allow.
    """

    schema: Mapping[str, Any] | str
    fenced: bool = True
    json_only: float = 0.0

    def __call__(self, record: Record, completions: Sequence[str]) -> list[float]:
        """See Reward."""
        try:
            import jsonschema
            import referencing
        except ImportError:
            raise UserError(
                "JsonSchema needs the library jsonschema: pip install 't5style[rewards]'"
            ) from None
        schema = field(record, self.schema) if isinstance(self.schema, str) else self.schema
        kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        validator = kind(schema, registry=referencing.Registry())
        return [self._one(validator, text) for text in completions]

    def _one(self, validator: Any, text: str) -> float:
        try:
            value = json.loads(fenced(text) if self.fenced else text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if validator.is_valid(value) else self.json_only


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def fenced(text: str) -> str:
    """What stands in the last block ```...``` of a text; the whole text where there is none."""
    found = re.findall(r"```[^\n`]*\n(.*?)(?:```|\Z)", text, re.DOTALL)
    return found[-1] if found else text


@dataclasses.dataclass(frozen=True)
class UnitTests:
    """1 where the completion's code passes the record's tests in a sandbox, `partial` where it runs but fails
    one; else 0.

    What is run: the record's `before`, if there is one, and the completion's code (its last fenced block, or
    all of it) as one piece, then the tests. Passed has who reaches the tests' last line: the tests should
    end with a call (HumanEval: 'check(name)').

    Attributes:
      tests: the record's field with the tests: a text, or a list of texts run one after the other.
      before: the record's field with what stands before the completion (HumanEval: its prompt); None:
        nothing.
      entry: the record's field with a name that `check` of the tests is called with (HumanEval:
        'entry_point'); None: the tests call what they test.
      sandbox: the limits.
    """

    tests: str = "tests"
    before: str | None = None
    entry: str | None = None
    partial: float = 0.0
    sandbox: Sandbox = dataclasses.field(default_factory=Sandbox)

    def __call__(self, record: Record, completions: Sequence[str]) -> list[float]:
        """See Reward."""
        tests = field(record, self.tests)
        text = "\n".join(tests) if isinstance(tests, list) else str(tests)
        if self.entry is not None:
            text += f"\ncheck({field(record, self.entry)})\n"
        before = "" if self.before is None else str(field(record, self.before))
        programs = [[("answer", before + fenced(code)), ("tests", text)] for code in completions]
        verdicts = self.sandbox.run_all(programs)
        worth = {"passed": 1.0, "failed": self.partial}
        return [worth.get(verdict.verdict, 0.0) for verdict in verdicts]


# ---------------------------------------------------------------------------------------------------- several


@dataclasses.dataclass(frozen=True)
class Weighted:
    """The weighted sum of rewards, as one.

    Attributes:
      rewards: at least one.
      weights: of each; None: 1.
    """

    rewards: Sequence[Reward]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError("rewards is empty; give at least one.")
        if self.weights is not None and len(self.weights) != len(self.rewards):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {len(self.rewards)} rewards; give one for each."
            )

    def __call__(self, record: Record, completions: Sequence[str]) -> list[float]:
        """See Reward."""
        total = [0.0] * len(completions)
        for reward, weight in zip(self.rewards, self.weights or [1.0] * len(self.rewards), strict=True):
            values = reward(record, completions)
            total = [sum_ + weight * float(value) for sum_, value in zip(total, values, strict=True)]
        return total
