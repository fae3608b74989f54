"""Reward models: a number for an answer, learnt from which of two answers people preferred."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from t5style import console, run_dir
from t5style.data.pipeline import BatchSource
from t5style.data.task import Mixture, Task
from t5style.models.config import TransformerConfig
from t5style.train import likelihood
from t5style.train.losses import Metrics, router_losses
from t5style.train.pretrain import Figures
from t5style.train.program import TrainingProgram
from t5style.tune import pairs
from t5style.tune import preference_losses as losses
from t5style.tune.pairs import PairSource
from t5style.tune.supervised import Finetune

Batch = Mapping[str, jax.Array]
HEAD = "value_head"
BINS = 10  # of the reliability table: confidences from 1/2 to 1
_BIN = "calibration_bin_"


def with_last_token(batch: Batch) -> dict[str, jax.Array]:
    """Rows whose decoder also reads its last target, the token that closes the answer.

    A language model never reads the last token of a row, which nothing follows. A reward is said of the whole
    answer.

    Args:
      batch: rows int32 [rows, length], each one example with an empty place behind it; a full row stays as it
        is.
    """
    length = batch["decoder_segment_ids"].shape[1]
    tokens = (batch["decoder_segment_ids"] > 0).sum(axis=1, keepdims=True)  # [rows, 1]
    place = jnp.arange(length)[None]
    added = (place == tokens) & (tokens > 0)  # [rows, length]; nowhere in a full row
    before = jnp.roll(batch["decoder_target_tokens"], 1, axis=1)
    return {
        **batch,
        "decoder_input_tokens": jnp.where(added, before, batch["decoder_input_tokens"]),
        "decoder_segment_ids": jnp.where(added, 1, batch["decoder_segment_ids"]),
        "decoder_positions": jnp.where(added, place, batch["decoder_positions"]),
    }


def rewards(
    config: TransformerConfig, params: Any, batch: Batch, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Rewards f32 [rows], whether a row holds anything [rows], and the routers' statistics.

    The reward is the head's value of the decoder's last hidden state at an answer's last token (Ouyang et
    al., 2022, section 3.4).

    Args:
      config: the model.
      params: with 'value_head'.
      batch: rows [rows, length], or pairs [pairs, 2, length] that become [2 · pairs] rows; one example each.
      dropout_key: None for no dropout.
    """
    rows = with_last_token(likelihood.flatten_pairs(batch))
    hidden, routers = likelihood.hidden_states(config, params, rows, dropout_key)  # [rows, length, embed]
    tokens = (rows["decoder_segment_ids"] > 0).sum(axis=1)
    last = jnp.maximum(tokens - 1, 0)[:, None, None]
    state = jnp.take_along_axis(hidden, last, axis=1)[:, 0].astype(jnp.float32)  # [rows, embed]
    head = params[HEAD]
    return (state @ head["kernel"])[:, 0] + head["bias"][0], tokens > 0, routers


@dataclasses.dataclass(frozen=True)
class RewardLoss:
    """Bradley and Terry's loss of pairs as `train.step.Loss`; see preference_losses.bradley_terry.

    In evaluation (without a dropout key) its metrics also hold the reliability table's bins.

    Attributes:
      config: the model.
      centering: coefficient that holds rewards around 0.
    """

    config: TransformerConfig
    centering: float = 0.0

    def __call__(
        self, params: Any, batch: Batch, dropout_key: jax.Array | None, reference: Any = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """See `Loss`. Batches of pairs, int32 [pairs, 2, length], and `margin` f32 [pairs]."""
        found, real, routers = rewards(self.config, params, batch, dropout_key)
        both = found.reshape(-1, 2)  # [2 · pairs] -> [pairs, 2]
        weights = real.reshape(-1, 2).all(axis=1).astype(jnp.float32)
        chosen, rejected = both[:, 0], both[:, 1]
        objective, weight = losses.weighted(
            losses.bradley_terry(chosen, rejected, batch["margin"], self.centering), weights
        )
        figures = {
            "loss": losses.bradley_terry(chosen, rejected),
            "accuracy": losses.wins(chosen, rejected),
            "reward_margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_squared": jnp.square(both).mean(axis=1),
        }
        metrics = {name: losses.weighted(values, weights) for name, values in figures.items()}
        if dropout_key is None:
            metrics |= calibration_bins(chosen - rejected, weights)
        if self.config.moe is not None and routers:
            added, of_routers = router_losses(list(routers.values()), self.config.moe, weight)
            return objective + added, weight, metrics | of_routers
        return objective, weight, metrics


def calibration_bins(margins: jax.Array, weights: jax.Array) -> Metrics:
    """How sure a reward model is of its preferences, and how often it is right, as (sum, weight) by bin.

    P(chosen) = σ(margin); its confidence is the larger of P and 1 - P, and it is right where P > 1/2 (half
    right at 1/2). Guo et al., "On calibration of modern neural networks" (2017), section 2.

    Args:
      margins: reward of the chosen minus that of the rejected answer, f32 [pairs].
      weights: 0 for padding, f32 [pairs].
    """
    sure = jax.nn.sigmoid(jnp.abs(margins))
    right = (margins > 0) + 0.5 * (margins == 0)
    index = jnp.minimum(((sure - 0.5) * 2 * BINS).astype(jnp.int32), BINS - 1)
    metrics: Metrics = {}
    for number in range(BINS):
        inside = weights * (index == number)
        metrics[f"{_BIN}{number}_share"] = inside.sum(), weights.sum()
        metrics[f"{_BIN}{number}_confidence"] = losses.weighted(sure, inside)
        metrics[f"{_BIN}{number}_accuracy"] = losses.weighted(right, inside)
    return metrics


def reliability(figures: dict[str, float], task: str) -> dict[str, Any]:
    """Takes a task's bins out of an evaluation's figures: 'calibration_error', the expected one, and 'bins':
    'from', 'to', 'pairs', 'confidence' and 'accuracy' of those that are not empty.
    """
    table, error = [], 0.0
    pairs = figures[f"eval/{task}/pairs"]
    for number in range(BINS):
        share, confidence, accuracy = (
            figures.pop(f"eval/{task}/{_BIN}{number}_{what}") for what in ("share", "confidence", "accuracy")
        )
        if not share or math.isnan(share):
            continue
        edges = {"from": 0.5 + 0.5 * number / BINS, "to": 0.5 + 0.5 * (number + 1) / BINS}
        table.append({**edges, "pairs": round(share * pairs), "confidence": confidence, "accuracy": accuracy})
        error += share * abs(confidence - accuracy)
    return {"calibration_error": error, "bins": table}


@dataclasses.dataclass(frozen=True)
class RewardModel(Finetune):
    """Trains a model with a scalar head to give chosen answers larger rewards than rejected ones.

    `store` (or `task`) holds preferences: prompt, chosen, rejected, and a margin where the data has one;
    tune.examples.Examples makes such stores of raw files. batch_size counts pairs. The head reads the last
    token's hidden state and begins at 0. `reward_scorer.RewardScorer` uses the run folder.

    Metrics are means over pairs: loss (plain Bradley-Terry), accuracy (ties count half), reward_margin,
    reward_chosen, reward_rejected. Evaluations also give the number of pairs, the accuracy's standard error
    and the calibration error, and write the reliability table to <run>/eval/reliability.json and .txt, and
    accuracy by epoch to <run>/eval/accuracy.txt.

    Attributes:
      lengths: one place of a decoder's row is kept for its last token.
      centering: coefficient that holds rewards around 0; Eisenstein et al. (2023) take 0.01.
      margins: pairs with a margin, how much better the chosen answer is, must be told apart by as much.
      epochs: how often every pair is learnt from; None: as many times as `steps` say. With it the model is
        evaluated after each epoch, if eval_every does not say otherwise.
    """

    centering: float = 0.0
    margins: bool = True
    epochs: float | None = None
    pack: bool = False

    accuracies: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centering < 0:
            raise ValueError(f"centering is {self.centering}; it must be 0 or more.")
        if self.epochs is not None and not self.epochs > 0:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0, or None for `steps`.")
        for name, what in (("label_smoothing", "losses of pairs"), ("z_loss", "rewards")):
            if getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, which {what} here do not have: set it to 0."
                )
        if self.pack:
            raise ValueError("pack is True, but answers that are compared do not share a row: leave it out.")

    def resolved(self) -> Finetune:
        """See Finetune.resolved; also with the steps that `epochs` means."""
        job = super().resolved()
        assert isinstance(job, RewardModel)
        if job.epochs is None:
            return job
        rows = job._source(job.task, job.split, job.batch_size, shuffle=True)  # type: ignore[arg-type]
        an_epoch = rows.batches_per_epoch
        steps = max(1, round(job.epochs * an_epoch))
        every = job.eval_every or (math.ceil(an_epoch) if job.epochs > 1 else None)
        return dataclasses.replace(job, steps=steps, eval_every=every, epochs=None)

    @property
    def _is_resolved(self) -> bool:
        return super()._is_resolved and self.epochs is None

    def make_program(self) -> TrainingProgram:
        """See Pretrain.make_program."""
        assert self.model is not None
        program = super().make_program()
        return dataclasses.replace(
            program,
            heads=(HEAD,),
            custom_loss=RewardLoss(self.model, self.centering),
            example=pairs.example(program.sides(), ("margin",)),
        )

    def _source(self, task: Task | Mixture, split: str, rows: int, *, shuffle: bool) -> BatchSource:
        assert self.model is not None
        sides, architecture = self.program.sides(), self.model.architecture
        # One place is kept for the last token, see with_last_token.
        lengths = {**sides, "decoder": sides["decoder"] - 1}
        source = BatchSource(task, split, rows, lengths, architecture, self.seed, self.pack, shuffle)
        return PairSource(source, ("margin",), use_margins=self.margins, room=1)  # type: ignore[return-value]

    def _preflight(
        self,
        run: run_dir.RunDir,
        mesh: Mesh,
        source: BatchSource,
        evaluated: Sequence[BatchSource],
        start: str,
    ) -> None:
        pairs.check(source)  # type: ignore[arg-type]
        super()._preflight(run, mesh, source, evaluated, start)

    def __call__(self, run: run_dir.RunDir) -> Figures:
        """See Pretrain.__call__."""
        if not self._is_resolved:
            return self.resolved()(run)
        self._folder.append(run.path)
        figures = super().__call__(run)
        if run_dir.is_main_process():
            _write_accuracies(run.path, self.steps / figures["epochs"])
        return figures

    @functools.cached_property
    def _folder(self) -> list[epath.Path]:
        """Of the run that was called last, at the end."""
        return []

    def _evaluator(self, sources: Sequence[BatchSource], mesh: Mesh, frozen: Any) -> Any:
        names = [source.task.name for source in sources]
        counted = pairs.counting_pairs(super()._evaluator(sources, mesh, frozen), names, self.accuracies)

        def evaluate(params: Any, stopping: Callable[[], bool]) -> dict[str, float] | None:
            figures = counted(params, stopping)
            if figures is None:
                return None
            found = {name: reliability(figures, name) for name in names}
            figures |= {f"eval/{name}/calibration_error": found[name]["calibration_error"] for name in names}
            if run_dir.is_main_process():
                _write_reliability(self._folder[-1] / "eval", found)
            return figures

        return evaluate


def _write_reliability(folder: epath.Path, found: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    run_dir.atomic_write(folder / "reliability.json", json.dumps(found, indent=1) + "\n")
    lines = []
    for name, each in found.items():
        lines += [f"{name}: expected calibration error {each['calibration_error']:.4f}"]
        lines += ["  said to be preferred with   pairs   said   were   (. said, # were)"]
        for row in each["bins"]:
            bar = [" "] * 41  # from 0 to 1
            bar[round(40 * row["confidence"])] = "."
            bar[round(40 * row["accuracy"])] = "#"
            lines.append(
                f"  {row['from']:.2f} to {row['to']:.2f}              {row['pairs']:7,}  "
                f"{row['confidence']:.3f}  {row['accuracy']:.3f}  |{''.join(bar)}|"
            )
    run_dir.atomic_write(folder / "reliability.txt", "\n".join(lines) + "\n")


def _write_accuracies(folder: epath.Path, steps_per_epoch: float) -> None:
    """Writes and says how accuracy went, evaluation by evaluation."""
    lines = []
    for line in map(json.loads, (folder / run_dir.METRICS).read_text().splitlines()):
        for name in [name for name in line if name.startswith("eval/") and name.endswith("/accuracy")]:
            task = name.removeprefix("eval/").removesuffix("/accuracy")
            lines.append(
                f"{task}: epoch {line['step'] / steps_per_epoch:.2f} (step {line['step']}): accuracy "
                f"{line[name]:.4f} +- {line[f'{name}_error']:.4f} of {line[f'eval/{task}/pairs']:.0f} pairs, "
                f"loss {line[f'eval/{task}/loss']:.4f}, "
                f"calibration error {line[f'eval/{task}/calibration_error']:.4f}"
            )
    if lines:
        (folder / "eval").mkdir(parents=True, exist_ok=True)
        run_dir.atomic_write(folder / "eval" / "accuracy.txt", "\n".join(lines) + "\n")
        console.say("\n".join(lines))
