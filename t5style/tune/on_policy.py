"""On-policy distillation: the student is corrected by its teacher on what it says itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5style import run_dir
from t5style.data.pipeline import Batch, BatchSource
from t5style.data.random import seed_of
from t5style.infer.engine import Engine
from t5style.infer.ids import token_ids
from t5style.run_dir import UserError
from t5style.train.loop import Loop
from t5style.train.pretrain import Figures
from t5style.tune import rollouts
from t5style.tune.distill import Distill
from t5style.tune.prompts import Prompt
from t5style.tune.rollouts import Sample, Sampling

SAMPLES = "samples/latest.jsonl"


@dataclasses.dataclass(frozen=True)
class OnPolicy(Distill):
    """Trains a student to give its teacher's probabilities where its own answers lead (GKD).

    Agarwal et al. 2024, On-policy distillation of language models, algorithm 1: for a share of the batches
    the targets are answers that the student of that very step draws to the batch's prompts, and the rest is
    the data's. The loss is the divergence on the answers' tokens; it is not differentiated through the
    drawing. Which batches, and the draws, follow from the seed and the parameters, so that a run that was
    stopped goes on exactly. The newest answers are in samples/latest.jsonl.

    Attributes:
      on_policy: λ, the share of the batches that are answers of the student.
      sampling: how they are drawn.
      beta: as in Distill; 1, the reverse KL, by default.
      pack: an example has a row of its own.
    """

    beta: float = 1.0
    pack: bool = False
    on_policy: float = 1.0
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.on_policy <= 1:
            raise ValueError(f"on_policy is {self.on_policy}; it must be above 0 and at most 1 (0: Distill).")
        if self.pack or self.cache is not None:
            raise ValueError(
                f"pack is {self.pack} and cache is {self.cache!r}: answers are drawn for one prompt in each "
                "row, and "
                "the teacher reads them as they come. Leave out both"
            )
        if self.hard:
            raise ValueError(
                f"hard is {self.hard}: the student's own answers are no data to learn by heart. Leave it 0"
            )

    def __call__(self, run: run_dir.RunDir) -> Figures:
        """See Pretrain.__call__."""
        if run_dir.has_company():
            raise UserError(
                "on-policy distillation runs in one process, on all of its devices: start it on one host"
            )
        return super().__call__(run)

    def _batches(
        self, start: int, source: BatchSource, mesh: Mesh, loop: Loop, frozen: Any
    ) -> Iterator[Mapping[str, np.ndarray]]:
        merged = jax.jit(self.program.merged)
        for number in itertools.count(start):
            batch = source.batch_at(number)
            if np.random.default_rng(seed_of(self.seed, "on policy", number)).random() >= self.on_policy:
                yield batch
                continue
            params = loop.params if self.adapter is None else merged(loop.params, frozen)
            assert self.model is not None
            engine = Engine(self.model, params, token_ids(source.vocabulary), mesh, self.rules)
            answered, samples = self._answered(engine, batch, source, number)
            del engine, params
            rollouts.write(loop.run.path / SAMPLES, samples)
            yield answered

    def _answered(
        self, engine: Engine, batch: Batch, source: BatchSource, number: int
    ) -> tuple[Batch, list[Sample]]:
        """The batch with the student's answers for targets."""
        sides, rows = self.program.sides(), np.flatnonzero(batch["decoder_loss_weights"].any(axis=1))
        prompts = [_prompt(batch, row, source) for row in rows.tolist()]
        seed = seed_of(self.seed, "answers", number)
        drawn = rollouts.draw(engine, prompts, source.vocabulary, self.sampling, 1, seed)
        samples = [group[0] for group in drawn]
        for sample in samples:  # no more than the row takes
            before = 0 if "encoder" in sides else len(sample.prompt_tokens) - 1
            sample.tokens = sample.tokens[: sides["decoder"] - before]
        full = rollouts.lay_out(samples, sides, token_ids(source.vocabulary).start)
        answered = {name: np.zeros_like(batch[name]) for name in full}
        for name, value in full.items():
            answered[name][rows] = value
        return answered, samples


def _prompt(batch: Batch, row: int, source: BatchSource) -> Prompt:
    """What stands before a row's first target, as it enters the model."""
    if "encoder_input_tokens" in batch:
        tokens = batch["encoder_input_tokens"][row][batch["encoder_segment_ids"][row] > 0]
    else:
        first = int(batch["decoder_loss_weights"][row].argmax())
        tokens = batch["decoder_input_tokens"][row][: first + 1]
    return Prompt(row, tokens.astype(np.int32), source.vocabulary.decode(tokens), {})
