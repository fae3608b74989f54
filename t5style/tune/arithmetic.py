"""Sums to try reinforcement learning on: a task without data of anybody, whose answers can be checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from t5style.corpus.vocabulary import CharacterVocabulary
from t5style.data.token_store import TokenStoreWriter
from t5style.run_dir import RunDir
from t5style.tune.prompts import write_lines, write_prompts

SIGNS = "0123456789+="


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Writes all sums of two numbers of so many digits, as text and as token stores.

    The run folder gets problems/<split>.jsonl, a line {"prompt": "27+85=", "completion": "211", "answer":
    "211"} each; examples/, a token store for supervised training; and prompts/, one for reinforcement
    learning. A token is a character.

    Attributes:
      digits: of both numbers, the first of which is not 0.
      reverse: answers are written from the units on (27+85=211), so that no digit depends on a later one
        (Lee et al., "Teaching arithmetic to small transformers", 2023, §4).
      wrong: for each right example (not prompt) so many whose last digit is one too large, 9 becoming 0, as
        texts are of mixed quality: what is said most often need not be right.
      validation: so many problems, drawn by the seed, are no part of the split train.
      seed: of the order.
    """

    digits: int = 2
    reverse: bool = True
    wrong: int = 0
    validation: int = 500
    seed: int = 0

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 3:
            raise ValueError(f"digits is {self.digits}; it must be 1, 2 or 3 (a million sums).")
        if self.wrong < 0:
            raise ValueError(f"wrong is {self.wrong}; it must be 0 or more.")
        if not 0 < self.validation < self._count():
            raise ValueError(
                f"validation is {self.validation}; it must be from 1 to {self._count() - 1}, there are "
                f"{self._count()} sums."
            )

    def _numbers(self) -> range:
        return range(10 ** (self.digits - 1) if self.digits > 1 else 0, 10**self.digits)

    def _count(self) -> int:
        return len(self._numbers()) ** 2

    def _written(self, value: int) -> str:
        return str(value)[:: -1 if self.reverse else 1]

    def _said(self, answer: str) -> list[str]:
        """The targets of a problem's examples."""
        value = int(answer[:: -1 if self.reverse else 1])
        other = value // 10 * 10 + (value + 1) % 10
        return [answer, *[self._written(other)] * self.wrong]

    def problems(self) -> Iterator[tuple[str, dict[str, str]]]:
        """(split, problem), in their order."""
        numbers = self._numbers()
        order = np.random.Generator(np.random.PCG64(self.seed)).random(self._count()).argsort()
        for place, index in enumerate(order.tolist()):
            a, b = numbers[index // len(numbers)], numbers[index % len(numbers)]
            answer = self._written(a + b)
            problem = {"prompt": f"{a}+{b}=", "completion": answer, "answer": answer}
            yield ("validation" if place < self.validation else "train"), problem

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes the files; returns counts and the stores' fingerprint."""
        problems: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
        for split, problem in self.problems():
            problems[split].append(problem)
        for split, rows in problems.items():
            write_lines(run.path / "problems" / f"{split}.jsonl", rows)
        vocabulary = CharacterVocabulary(SIGNS, extra_ids=0)
        end = vocabulary.eos_id
        with TokenStoreWriter(run.path / "examples", ("inputs", "targets"), vocabulary) as writer:
            for split, rows in problems.items():
                for row in rows:
                    inputs = vocabulary.encode(row["prompt"])
                    for said in self._said(row["answer"]):
                        targets = vocabulary.encode(said)
                        writer.add(split, {"inputs": [*inputs, end], "targets": [*targets, end]})
        fingerprint = write_prompts(run.path / "prompts", problems, vocabulary)
        counts = {split: len(rows) for split, rows in problems.items()}
        return {"problems": counts, "fingerprint": fingerprint}
