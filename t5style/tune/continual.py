"""Learning on without forgetting: what keeps parameters near those of an older task.

    penalties   L2-SP and elastic weight consolidation, added to a loss (Penalized) by a job (Continue)
    Fisher      the job that measures how much each parameter matters to the older task
    replay      a data.task.Mixture with rates: the old data again in a share of the rows
    (gin/runs/continual.gin) rates       train.schedules.Schedule: the learning rate goes up again and
    comes down again

Ibrahim et al. 2024 (Simple and scalable strategies to continually pre-train large language models) find that
the last two together reach what training on all data at once reaches, with 1 to 5 % of replay for a weak and
more for a strong shift (sections 6 and 7).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from t5style import console, run_dir
from t5style.data.pipeline import BatchSource
from t5style.data.task import Task
from t5style.data.token_store import TokenStore
from t5style.infer import storage
from t5style.infer.chat import located
from t5style.models.config import TransformerConfig
from t5style.run_dir import RunDir, UserError
from t5style.train import checkpoint, initialize, likelihood
from t5style.train.losses import Metrics
from t5style.train.program import TrainingProgram
from t5style.train.step import Batch, Loss
from t5style.tune import supervised
from t5style.tune.supervised import Finetune

FISHER = "fisher"  # folder of the checkpoint that has it, in the run folder
LABELS = ("model", "data")


# --- the penalties ---


def l2_distance(params: Any, anchor: Any) -> jax.Array:
    """½ Σ (θ - θ₀)², f32 scalar: L2-SP (Li et al. 2018, Explicit inductive bias for transfer learning,
    equation 2)."""
    parts = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b), dtype=jnp.float32), params, anchor)
    return 0.5 * sum(jax.tree.leaves(parts), start=jnp.float32(0.0))


def ewc_distance(params: Any, anchor: Any, fisher: Any) -> jax.Array:
    """½ Σ F (θ - θ₀)², f32 scalar: elastic weight consolidation (Kirkpatrick et al. 2017, equation 3)."""
    parts = jax.tree.map(
        lambda a, b, weight: jnp.sum(weight * jnp.square(a - b), dtype=jnp.float32), params, anchor, fisher
    )
    return 0.5 * sum(jax.tree.leaves(parts), start=jnp.float32(0.0))


@dataclasses.dataclass(frozen=True)
class Penalized:
    """A loss, plus l2_sp · ½ Σ (θ - θ₀)² + ewc · ½ Σ F (θ - θ₀)², which do not depend on the batch.

    The step divides the objective by its weight, so the penalties are multiplied by it. The reference is (θ₀,
    F), F None without ewc; the loss inside gets none.

    Attributes:
      loss: any loss that needs no reference model of its own.
      l2_sp, ewc: factors.
    """

    loss: Loss
    l2_sp: float = 0.0
    ewc: float = 0.0

    def __call__(
        self, params: Any, batch: Batch, dropout_key: jax.Array | None, reference: Any = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """See step.Loss. Metrics: 'l2_sp' and 'ewc', the distances without their factors."""
        objective, weight, metrics = self.loss(params, batch, dropout_key)
        anchor, fisher = reference
        if self.l2_sp:
            distance = l2_distance(params, anchor)
            objective += self.l2_sp * distance * weight
            metrics = metrics | {"l2_sp": (distance * weight, weight)}
        if self.ewc:
            distance = ewc_distance(params, anchor, fisher)
            objective += self.ewc * distance * weight
            metrics = metrics | {"ewc": (distance * weight, weight)}
        return objective, weight, metrics

    def after_step(self, old: Any, new: Any, metrics: Metrics) -> tuple[Any, Metrics]:
        """That of the loss inside."""
        after = getattr(self.loss, "after_step", None)
        return (new, metrics) if after is None else after(old, new, metrics)


@dataclasses.dataclass(frozen=True)
class PenalizedProgram(TrainingProgram):
    """A training step that is also given the anchor, and the Fisher information where `fisher` is True."""

    fisher: bool = False

    @functools.cached_property
    def frozen_models(self) -> dict[str, TransformerConfig]:
        """See TrainingProgram.frozen_models."""
        models = {"reference": self.model}
        return models | ({FISHER: self.model.replace(param_dtype="float32")} if self.fisher else {})

    def reference(self, frozen: Any) -> Any:
        """See Penalized."""
        return frozen["reference"], frozen.get(FISHER)


@dataclasses.dataclass(frozen=True)
class Continue(Finetune):
    """Trains on, and keeps the parameters near those that it began with.

    Everything else is as in Finetune. The parameters of `init_from` are the anchor, in memory beside those
    that are trained.

    Attributes:
      l2_sp: factor of the squared distance to the anchor; 0 for none.
      ewc: factor of the squared distance weighted by Fisher information; 0 for none. Kirkpatrick et al. have
        hundreds to thousands, for information per example.
      fisher: run folder of the Fisher job that measured the parent on the older task.
    """

    l2_sp: float = 0.0
    ewc: float = 0.0
    fisher: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("l2_sp", "ewc"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if not self.l2_sp and not self.ewc:
            raise ValueError("l2_sp and ewc are both 0: nothing holds the parameters; use Finetune")
        if bool(self.ewc) != (self.fisher is not None):
            raise ValueError(
                f"ewc is {self.ewc} and fisher is {self.fisher!r}: elastic weight consolidation needs both, "
                "a factor "
                "and the run folder of a Fisher job"
            )
        if self.adapter is not None:
            raise ValueError(
                "an adapter leaves the parameters as they are, so there is nothing to hold: leave out the "
                "adapter, "
                "or use Finetune"
            )

    def inputs(self) -> Sequence[str]:
        """See Pretrain.inputs."""
        return [*super().inputs(), *([self.fisher] if self.fisher else [])]

    def make_program(self) -> TrainingProgram:
        """See Pretrain.make_program."""
        program = super().make_program()
        fields = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
        loss = Penalized(program.loss, self.l2_sp, self.ewc)
        fields |= {"custom_loss": loss, "with_reference": True, "fisher": self.fisher is not None}
        return PenalizedProgram(**fields)

    def _frozen(self, mesh: Mesh, source: BatchSource, parent: initialize.Start | None) -> Any:
        assert parent is not None
        parameters = {"reference": parent.params}
        if self.fisher is not None:
            assert self.init_from is not None
            place = epath.Path(self.fisher)
            found = checkpoint.find(place / FISHER)
            made_of = checkpoint.read_metadata(found)["model_fingerprint"]
            if made_of != run_dir.path_fingerprint(self.init_from):
                raise UserError(
                    f"the Fisher information in {self.fisher} was measured on another model than "
                    f"{self.init_from}: "
                    "run the Fisher job on the model that training starts from"
                )
            abstract, shardings = (tree[FISHER] for tree in self.program.abstract_frozen(mesh))
            parameters[FISHER] = checkpoint.restore_params(found, shardings, abstract=abstract)
        return self.program.freeze(mesh, parameters)


# --- how much parameters matter ---


def fisher_sum(
    config: TransformerConfig, params: Any, batch: Mapping[str, Any], key: jax.Array | None
) -> tuple[Any, jax.Array]:
    """Σ over rows of the squared gradient of log p(targets of the row), and how many rows have targets.

    Args:
      config, params: the model.
      batch: int32 `[rows, length]` under T5X's names; an example in each row.
      key: each target is drawn from what the model finds probable there: the diagonal of the Fisher
        information (teacher-forced). None: the data's targets, the "empirical" one, which is something else
        away from the optimum (Kunstner et al. 2019).

    Returns:
      A tree like params, f32; and a count, f32.
    """

    def of_row(total: Any, inputs: tuple[Mapping[str, jax.Array], jax.Array]) -> tuple[Any, jax.Array]:
        row, own_key = inputs
        one = {name: value[None] for name, value in row.items()}
        wanted = one["decoder_loss_weights"].reshape(-1) > 0

        def log_probability(params: Any) -> jax.Array:
            hidden, _ = likelihood.hidden_states(config, params, one, None)
            logits = likelihood.logits(config, params, hidden)  # [length, vocab]
            targets = one["decoder_target_tokens"].reshape(-1)
            if key is not None:
                targets = jax.lax.stop_gradient(jax.random.categorical(own_key, logits))
            return jnp.sum(jnp.where(wanted, likelihood.of_targets(logits, targets), 0.0))

        gradient = jax.grad(log_probability)(params)
        total = jax.tree.map(lambda t, g: t + jnp.square(g.astype(jnp.float32)), total, gradient)
        return total, jnp.any(wanted).astype(jnp.float32)

    rows = batch["decoder_loss_weights"].shape[0]
    keys = jax.random.split(jax.random.key(0) if key is None else key, rows)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
    total, counted = jax.lax.scan(of_row, zeros, (dict(batch), keys))
    return total, counted.sum()


@dataclasses.dataclass(frozen=True)
class Fisher:
    """Measures how much each parameter matters to a task: the Fisher information's diagonal, for
    Continue.ewc.

    F = mean over examples of (∂ log p(targets | inputs) / ∂ θ)² (Kirkpatrick et al. 2017, section 2.1).

    Attributes:
      model: run folder, checkpoint, Hugging Face directory or .gguf file.
      task: the older task; or store: a token store of examples.
      lengths: places in a row; split: of the task.
      examples: how many, drawn by `seed`; batch_size: at a time, one gradient after the other.
      labels: 'model' draws targets from the model itself, 'data' takes the data's; see fisher_sum.
    """

    model: str
    task: Task | None = None
    store: str | None = None
    lengths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"encoder": 512, "decoder": 512})
    split: str = "train"
    examples: int = 256
    batch_size: int = 8
    labels: str = "model"
    seed: int = 0

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.task is None) == (self.store is None):
            raise ValueError("give a task or a store of examples to measure on, one of both")
        if self.labels not in LABELS:
            raise ValueError(f"labels is {self.labels!r}; it must be one of {', '.join(LABELS)}.")
        for name in ("examples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")

    def inputs(self) -> Sequence[str]:
        """The model and the data."""
        return [located(self.model), str(self.store if self.task is None else self.task.store)]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes `fisher/0`, a checkpoint like the parameters; returns examples, trace and largest entry."""
        path = located(self.model)
        model = storage.load(path)
        task = self.task
        if task is None:
            assert self.store is not None
            task = Task("examples", self.store, supervised.objective_of(TokenStore.open(self.store)))
        sides = ("encoder", "decoder") if model.encoder_decoder else ("decoder",)
        lengths = {side: self.lengths[side] for side in sides}
        source = BatchSource(
            task, self.split, self.batch_size, lengths, model.config.architecture, self.seed, pack=False
        )
        if model.vocabulary is not None and model.vocabulary != source.vocabulary:
            raise UserError(
                f"the model {self.model} has the vocabulary {model.vocabulary.fingerprint}, the data "
                f"{source.vocabulary.fingerprint}: tokenize with the model's"
            )
        add = jax.jit(
            lambda params, total, batch, key: jax.tree.map(
                jnp.add, total, fisher_sum(model.config, params, batch, key)
            ),
            donate_argnums=1,
        )
        total = (
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), model.params),
            jnp.float32(0.0),
        )
        batches = min(-(-self.examples // self.batch_size), source.evaluation_batches)
        with (
            console.progress("Fisher information", batches, "batches") as bar,
            contextlib.closing(source.evaluation_iter(max_batches=batches)) as iterator,
        ):
            for number, batch in enumerate(iterator):
                key = (
                    jax.random.fold_in(jax.random.key(self.seed), number) if self.labels == "model" else None
                )
                total = add(model.params, total, batch, key)
                jax.block_until_ready(total[1])
                bar.advance()
        count = float(total[1])
        if not count:
            raise UserError(f"split {self.split!r} of task {task.name!r} has no target to measure on")
        fisher = jax.tree.map(lambda leaf: leaf / count, total[0])
        keeper = checkpoint.Checkpointer(run.path / FISHER)
        metadata = {
            "step": 0,
            "examples": count,
            "labels": self.labels,
            "model_fingerprint": run_dir.path_fingerprint(path),
            "data_fingerprint": source.fingerprint,
            "model": json.loads(model.config.to_json()),
        }
        keeper.save(0, {"step": jnp.int32(0), "params": fisher}, metadata)
        keeper.close()
        run.write_lineage({"parent": path, "dataset_fingerprint": source.fingerprint})
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(fisher)]
        return {
            "examples": int(count),
            "trace": float(sum(leaf.sum(dtype=np.float64) for leaf in leaves)),
            "largest": float(max(leaf.max() for leaf in leaves)),
        }
