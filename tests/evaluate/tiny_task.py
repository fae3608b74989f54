"""A little task that a tiny model learns in seconds: say the opposite of one or two words."""

from __future__ import annotations

from typing import Any

import numpy as np

from t5style.corpus.vocabulary import CharacterVocabulary
from t5style.data.objectives import CausalLM, Supervised
from t5style.data.task import Task
from t5style.data.token_store import TokenStoreWriter
from t5style.evaluate import metrics
from t5style.models.config import TransformerConfig
from t5style.train.optimizer import Optimizer
from t5style.train.schedules import Schedule

OPPOSITES = {"hot": "cold", "up": "down", "big": "small", "yes": "no", "old": "new", "dry": "wet"}
VOCABULARY = CharacterVocabulary("abcdefghijklmnopqrstuvwxyzé ", extra_ids=4)
LENGTHS = {"encoder": 16, "decoder": 16}


def examples(split: str, count: int) -> list[tuple[str, str]]:
    """(input, target) pairs; "é" makes characters and bytes differ."""
    random = np.random.default_rng(len(split))
    words = [random.choice(list(OPPOSITES), 1 + random.integers(2)) for _ in range(count)]
    return [(" ".join(row), " ".join(OPPOSITES[w] for w in row) + "é") for row in words]


def make_store(folder: str, validation: int = 21) -> str:
    """A store with the features inputs, targets and text (both joined)."""
    with TokenStoreWriter(folder, ("inputs", "targets", "text"), VOCABULARY) as writer:
        for split, count in (("train", 200), ("validation", validation)):
            for source, target in examples(split, count):
                texts = {"inputs": source, "targets": target, "text": f"{source} {target}"}
                writer.add(split, {name: [*VOCABULARY.encode(text), 1] for name, text in texts.items()})
    return folder


def task(store: str, **fields: Any) -> Task:
    """The supervised task."""
    settings = {"metrics": (metrics.exact_match, metrics.rouge, metrics.bleu)} | fields
    return Task("opposites", store, Supervised(), **settings)


def language_modelling(store: str) -> Task:
    """The same text as a stream, for a decoder-only model."""
    return Task("stream", store, CausalLM())


def model(decoder_only: bool = False) -> TransformerConfig:
    """A config small enough to train in a test."""
    return TransformerConfig(
        vocab_size=40,
        d_model=32,
        d_ff=64,
        num_heads=2,
        encoder_layers=0 if decoder_only else 1,
        decoder_layers=1,
        positions="rope" if decoder_only else "relative_bias",
        scale_attention=decoder_only,
        dtype="float32",
        scan_layers=False,
    )


def settings(steps: int, peak: float = 1e-2) -> dict[str, Any]:
    """What Pretrain and Finetune share here."""
    return {
        "lengths": LENGTHS,
        "steps": steps,
        "batch_size": 16,
        "optimizer": Optimizer(learning_rate=Schedule("cosine", peak, warmup_steps=min(20, steps - 1))),
        "log_every": 100,
        "eval_split": None,
    }
