"""A task of rewards that a tiny model learns in seconds: say the prompt's first letter three times."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from t5style.corpus.vocabulary import CharacterVocabulary
from t5style.infer.model import Model
from t5style.models import params
from t5style.models.config import TransformerConfig
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir
from t5style.train.optimizer import Optimizer
from t5style.train.schedules import Schedule
from t5style.tune import prompts
from t5style.tune.policy import Method
from t5style.tune.reinforce import Reinforce
from t5style.tune.rollouts import Sampling

VOCABULARY = CharacterVocabulary("abcd=", extra_ids=0)


def doubled(record: Mapping[str, Any], completions: Sequence[str]) -> list[float]:
    """The share of the answer's letters that are the prompt's first one."""
    letter = record["answer"]
    return [sum(character == letter for character in text) / 3 for text in completions]


def doubtful(record: Mapping[str, Any], completions: Sequence[str]) -> list[float]:
    """As doubled; fails for answers that begin with 'd'."""
    if any(text.startswith("d") for text in completions):
        raise RuntimeError("no d, please")
    return doubled(record, completions)


def make_store(folder: str, decoder_only: bool = True) -> str:
    """Prompts of one to three letters, splits train and validation."""
    random = np.random.default_rng(3)
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for split, count in (("train", 20), ("validation", 6)):
        for _ in range(count):
            text = "".join(random.choice(list("abc"), 1 + random.integers(3)))
            rows[split].append({"prompt": text + "=", "answer": text[0]})
    prompts.write_prompts(epath.Path(folder), rows, VOCABULARY, closed=not decoder_only)
    return folder


def model(decoder_only: bool = True) -> TransformerConfig:
    """A model of some thousand parameters."""
    return TransformerConfig(
        vocab_size=8,
        d_model=16,
        d_ff=32,
        num_heads=2,
        encoder_layers=0 if decoder_only else 1,
        decoder_layers=1,
        positions="rope" if decoder_only else "relative_bias",
        scale_attention=decoder_only,
        dtype="float32",
        dropout=0.1,
        scan_layers=False,
    )


def make_parent(folder: str, decoder_only: bool = True) -> str:
    """A run folder with random parameters."""
    config = model(decoder_only)
    made = Model(config, params.init_params(config, jax.random.key(1)), VOCABULARY)
    os.makedirs(folder, exist_ok=True)
    made.save(folder)
    return folder


def job(store: str, parent: str, **fields: Any) -> Reinforce:
    """A job whose rollouts take milliseconds."""
    settings: dict[str, Any] = {
        "model": model(),
        "init_from": parent,
        "store": store,
        "rewards": {"doubled": doubled},
        "method": Method("dr_grpo"),
        "sampling": Sampling(max_new_tokens=3),
        "prompts": 4,
        "group": 4,
        "steps": 4,
        "mesh": MeshConfig(devices=1),
        "optimizer": Optimizer(learning_rate=Schedule("constant", 1e-2, warmup_steps=0)),
        "log_every": 1,
        "eval_prompts": 6,
    }
    return Reinforce(**(settings | fields))


def run(folder: Any, made: Reinforce) -> dict[str, Any]:
    """The job, run in a folder."""
    return made(RunDir(folder).create())
