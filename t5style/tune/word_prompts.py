"""Prompts that ask for an answer of so many words: a format that can be checked without data of anybody."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from t5style import run_dir
from t5style.run_dir import RunDir
from t5style.tune.prompts import write_lines

_THINGS = """
apple bridge candle desert engine feather garden hammer island jacket kettle ladder mirror needle
ocean pencil queen river saddle tunnel umbrella valley window yard anchor bottle camera drum eagle
forest glove harbor insect jungle kitchen lemon mountain notebook orchard piano quilt rabbit statue
teacher uniform village whale balloon castle dolphin elbow flute guitar helmet iceberg jewel kite
lantern magnet nest oven parrot quarry rocket sailor temple volcano wheel blanket carpet doctor
elephant fountain goat hotel knife library market network orange planet radio scissors tiger valve
wagon basket clock donkey envelope farmer grape horse judge lake medal novel owl potato ring spider
train vase wolf bakery cloud dancer
"""
FORMS = (
    "Describe {article} {thing} in exactly {words} words.",
    "What is {article} {thing}? Answer in exactly {words} words.",
    "Write a sentence of exactly {words} words about {article} {thing}.",
)


@dataclasses.dataclass(frozen=True)
class WordPrompts:
    """Writes prompts.jsonl, lines {"id", "prompt", "words"}: things to be described in so many words.

    Attributes:
      words: how many, of which each prompt asks for one.
      seed: of the choice.
    """

    words: tuple[int, ...] = (8,)
    seed: int = 0

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.words or min(self.words) < 1:
            raise ValueError(f"words is {self.words}; it must hold numbers from 1.")

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes the file; returns how many."""
        random = np.random.Generator(np.random.PCG64(self.seed))
        rows = []
        for thing in _THINGS.split():
            for number, form in enumerate(FORMS):
                words = int(self.words[int(random.random() * len(self.words))])
                article = "an" if thing[0] in "aeiou" else "a"
                prompt = form.format(article=article, thing=thing, words=words)
                rows.append({"id": f"{thing}-{number}", "prompt": prompt, "words": words})
        write_lines(run.path / "prompts.jsonl", rows)
        return {"prompts": len(rows), "fingerprint": run_dir.fingerprint(rows)}
