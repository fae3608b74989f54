"""A tiny training run, for tests: as a function, and as a program of its own that tests kill and start again.

python tests/train/tiny_run.py RUN_DIR STORE '{"steps": 20, "poison": [7]}'
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax
import numpy as np

from t5style import run_dir
from t5style.corpus.vocabulary import CharacterVocabulary
from t5style.data.objectives import CausalLM, SpanCorruption
from t5style.data.task import Task
from t5style.data.token_store import TokenStoreWriter
from t5style.models.config import TransformerConfig
from t5style.parallel import distributed
from t5style.parallel.mesh import MeshConfig
from t5style.train.optimizer import Optimizer
from t5style.train.pretrain import Pretrain
from t5style.train.schedules import Schedule

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def make_store(folder: str, examples: int = 60, length: int = 80, extra_ids: int = 8) -> str:
    """A store of random words, splits train and validation."""
    vocabulary = CharacterVocabulary(LETTERS, extra_ids=extra_ids)
    generator = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "me"]
    with TokenStoreWriter(folder, ("text",), vocabulary) as writer:
        for split, count in (("train", examples), ("validation", 8)):
            for _ in range(count):
                text = " ".join(generator.choice(words, length // 4))[:length]
                writer.add(split, {"text": [*vocabulary.encode(text), 1]})
    return folder


def job(
    store: str,
    *,
    decoder_only: bool = True,
    peak: float = 1e-2,
    model: dict[str, Any] | None = None,
    **fields: Any,
) -> Pretrain:
    """A job that compiles in seconds and steps in milliseconds; `fields` replace Pretrain's.

    The schedule has a length of its own, so that runs of any length are one compiled program.
    """
    config = TransformerConfig(
        **(
            {
                "vocab_size": 40,
                "d_model": 16,
                "d_ff": 32,
                "num_heads": 2,
                "decoder_layers": 1,
                "encoder_layers": 0 if decoder_only else 1,
                "positions": "rope" if decoder_only else "relative_bias",
                "dtype": "float32",
                "dropout": 0.1,
                "scan_layers": False,
            }
            | (model or {})
        )
    )
    settings: dict[str, Any] = {
        "lengths": {"decoder": 32} if decoder_only else {"encoder": 32, "decoder": 16},
        "steps": 20,
        "batch_size": 8,
        "optimizer": Optimizer(
            learning_rate=Schedule("cosine", peak, warmup_steps=2, steps=24), weight_decay=0.1
        ),
        "checkpoint_every": 4,
        "eval_every": 10,
        "log_every": 3,
    }
    objective = CausalLM() if decoder_only else SpanCorruption()
    return Pretrain(model=config, task=Task("words", store, objective), **(settings | fields))


def poison(batches: list[int]) -> None:
    """Makes the loss weights of these batches NaN, from here on in this process: of all batches they are
    floating-point numbers then.
    """
    from t5style.data.pipeline import BatchSource
    from t5style.train import program

    honest, empty = BatchSource.batch_at, program.empty_batch

    def floating(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return batch | {"decoder_loss_weights": batch["decoder_loss_weights"].astype(np.float32)}

    def batch_at(self: BatchSource, n: int, shard: int = 0, num_shards: int = 1) -> dict[str, np.ndarray]:
        batch = floating(honest(self, n, shard, num_shards))
        if n in batches and self.shuffle:
            batch["decoder_loss_weights"] *= np.float32("nan")
        return batch

    BatchSource.batch_at = batch_at  # type: ignore[method-assign]
    program.empty_batch = lambda rows, lengths: floating(empty(rows, lengths))


def slow_down(seconds: float) -> None:
    """Makes every batch take so long, so that a test has time to kill the process."""
    from t5style.data.pipeline import BatchSource

    honest = BatchSource.batch_at

    def batch_at(self: BatchSource, n: int, shard: int = 0, num_shards: int = 1) -> dict[str, np.ndarray]:
        time.sleep(seconds)
        return honest(self, n, shard, num_shards)

    BatchSource.batch_at = batch_at  # type: ignore[method-assign]


def main() -> int:
    """Runs the job in its folder, as launch does; prints its figures."""
    folder, store, text = sys.argv[1:4]
    if distributed.initialize():
        run_dir.set_process(jax.process_index(), distributed.barrier)
    fields = json.loads(text)
    if batches := fields.pop("poison", None):
        poison(batches)
    if seconds := fields.pop("slow", None):
        slow_down(seconds)
    if mesh := fields.pop("mesh", None):
        fields["mesh"] = MeshConfig(**mesh)
    run = run_dir.RunDir(folder).create()
    with run.lock():
        try:
            figures = job(store, **fields)(run)
        except KeyboardInterrupt:
            return 130
        except SystemExit as stop:
            return int(stop.code or 0)
        except run_dir.UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(distributed.leave(main()))
