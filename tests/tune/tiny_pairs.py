"""Preferences that a tiny model learns in seconds: the opposite of words, or its letters in any order."""

from __future__ import annotations

from typing import Any

import numpy as np

from t5style.data.objectives import Preferences, Unpaired
from t5style.data.task import Task
from t5style.data.token_store import TokenStoreWriter
from t5style.parallel.mesh import MeshConfig
from tests.evaluate import tiny_task

VOCABULARY = tiny_task.VOCABULARY
ONE = MeshConfig(devices=1)


def pairs(split: str, count: int) -> list[dict[str, str]]:
    """Records of prompt, chosen and rejected."""
    random = np.random.default_rng(len(split))
    found = []
    for prompt, chosen in tiny_task.examples(split, count):
        letters = list(chosen[:-1])
        random.shuffle(letters)
        found.append({"prompt": prompt, "chosen": chosen, "rejected": "".join(letters) + "é"})
    return found


def make_store(folder: str, train: int = 96, validation: int = 21) -> str:
    """A store of preferences."""
    with TokenStoreWriter(folder, ("prompt", "chosen", "rejected"), VOCABULARY) as writer:
        for split, count in (("train", train), ("validation", validation)):
            for record in pairs(split, count):
                tokens = {name: VOCABULARY.encode(text) for name, text in record.items()}
                writer.add(split, {n: t if n == "prompt" else [*t, 1] for n, t in tokens.items()})
    return folder


def make_unpaired(folder: str) -> str:
    """A store of the same answers one by one, every third one of them rejected."""
    with TokenStoreWriter(folder, ("prompt", "completion", "desirable"), VOCABULARY) as writer:
        for i, record in enumerate(pairs("train", 48)):
            answer = VOCABULARY.encode(record["rejected" if i % 3 == 0 else "chosen"])
            tokens = {"prompt": VOCABULARY.encode(record["prompt"]), "completion": [*answer, 1]}
            writer.add("train", {**tokens, "desirable": [int(i % 3 > 0)]})
    return folder


def task(store: str, objective: Preferences | Unpaired | None = None) -> Task:
    """The pairs of a store."""
    return Task("pairs", store, objective or Preferences())


def settings(steps: int, peak: float = 3e-3) -> dict[str, Any]:
    """What the jobs share here."""
    lengths = {"encoder": 16, "decoder": 24}
    return tiny_task.settings(steps, peak) | {"eval_split": "validation", "mesh": ONE, "lengths": lengths}
