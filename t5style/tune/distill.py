"""Distillation: a student learns what its teacher finds probable, and not only which token stood in the text.

    live     the teacher runs beside the student, its parameters frozen (Distill)
    cached   its largest probabilities are written once, and the runs after that do without it
             (Distill.cache; teacher_logits.py)
    answers  the student is tuned on what the teacher says (imitate.py)

All of it is training with parameters to start from (supervised.Finetune), for every kind of model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5style.data.pipeline import BatchSource, empty_batch
from t5style.data.task import Mixture, Task
from t5style.infer.chat import located
from t5style.models.config import TransformerConfig
from t5style.models.params import count_params
from t5style.parallel import rules
from t5style.run_dir import RunDir, UserError
from t5style.train import initialize, likelihood
from t5style.train import state as state_lib
from t5style.train.losses import Metrics, cross_entropy
from t5style.train.pretrain import Figures
from t5style.train.program import TrainingProgram
from t5style.train.step import LanguageModelLoss
from t5style.tune import parent as parent_lib
from t5style.tune import teacher_logits, write_model
from t5style.tune.divergences import divergence, with_rest
from t5style.tune.supervised import Finetune

Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DistillationLoss:
    """(1 - hard) · T² · divergence(teacher, student at temperature T) + hard · cross-entropy, for each
    target.

    T² keeps the gradient's size as T grows (Hinton et al. 2015, section 2). The teacher is the reference
    model, or
    comes with the batch: `teacher_ids` int32 and `teacher_log_probs` f32 `[rows, length, ...]`, see
    teacher_logits.py. Then only its k most probable tokens are told apart, and all others are one outcome, of
    the
    teacher as of the student: what is learnt is a lower bound of the divergence (the data processing
    inequality), which is 0 where these probabilities are the teacher's, and the student is pulled neither to
    nor from any single one of the others. A batch with neither teacher is measured by its cross-entropy
    alone.

    Metrics: 'loss' (of the data, as for every run), 'accuracy', 'distillation' (the divergence, without T²),
    and with a live teacher 'teacher_loss', the teacher's own loss.

    Attributes:
      config: the student.
      reference_model: the teacher's config.
      beta, temperature, hard: see above.
      label_smoothing, z_loss: of the cross-entropy.
    """

    config: TransformerConfig
    reference_model: TransformerConfig | None = None
    beta: float = 0.0
    temperature: float = 1.0
    hard: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(
        self, params: Any, batch: Batch, dropout_key: jax.Array | None, reference: Any = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """See step.Loss."""
        hidden, routers = likelihood.hidden_states(self.config, params, batch, dropout_key)
        logits = likelihood.logits(self.config, params, hidden)  # [B·L, V] f32
        targets = batch["decoder_target_tokens"].reshape(-1)
        weights = batch["decoder_loss_weights"].reshape(-1).astype(jnp.float32)
        total = weights.sum()
        objective, metrics = cross_entropy(
            logits, targets, weights, label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )

        def summed(values: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(weights > 0, values * weights, 0.0))

        values: jax.Array | None = None
        if reference is not None:
            teacher = self.reference_model or self.config
            states, _ = likelihood.hidden_states(teacher, reference, batch, None)
            theirs = jax.lax.stop_gradient(likelihood.logits(teacher, reference, states))
            own, its = (jax.nn.log_softmax(x / self.temperature) for x in (logits, theirs))
            values = divergence(own, its, self.beta)
            metrics["teacher_loss"] = (summed(-likelihood.of_targets(theirs, targets)), total)
        elif "teacher_ids" in batch:
            ids = batch["teacher_ids"].reshape(len(targets), -1)  # [B·L, k]
            its = batch["teacher_log_probs"].reshape(len(targets), -1)  # [B·L, k + 1]
            values = divergence(with_rest(logits / self.temperature, ids), its, self.beta)
        if values is not None:
            soft = summed(values)
            metrics["distillation"] = (soft, total)
            objective = (1 - self.hard) * self.temperature**2 * soft + self.hard * objective
        added, figures = self._language.routing(routers, total, training=dropout_key is not None)
        return objective + added, total, metrics | figures

    @property
    def _language(self) -> LanguageModelLoss:
        return LanguageModelLoss(self.config)

    def after_step(self, old: Any, new: Any, metrics: Metrics) -> tuple[Any, Metrics]:
        """See LanguageModelLoss.after_step."""
        return self._language.after_step(old, new, metrics)


# --- the job ---


@dataclasses.dataclass(frozen=True)
class Distill(Finetune):
    """Trains a student to give its teacher's probabilities.

    Everything else is as in Finetune: init_from is the student, a run of its own (`students.MakeStudent` cuts
    one out of the teacher). Both must read the same vocabulary.

    Attributes:
      teacher: run folder, checkpoint, Hugging Face directory, .gguf file or 'package:NAME/PATTERN'.
      teacher_dtype: what it computes in and is kept as, 'bfloat16' for half the memory; None: as it is
        stored.
      beta, temperature, hard: see DistillationLoss.
      cache: folder for the teacher's most probable tokens: what it lacks of this run's batches is written
        before the first step, and the teacher then leaves the memory. Later runs on the same rows find it
        there, whatever the student. None: the teacher runs in every step. Evaluation then measures the data's
        loss alone.
      top_k: how many tokens are kept at each target.
      teacher_model: the teacher's config; None: as the teacher says.
    """

    teacher: str | None = None
    teacher_dtype: str | None = None
    beta: float = 0.0
    temperature: float = 1.0
    hard: float = 0.0
    cache: str | None = dataclasses.field(default=None)
    top_k: int = 64
    teacher_model: TransformerConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise ValueError("teacher is not set: Distill needs a model to learn from")
        for name in ("beta", "hard"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more.")

    def resolved(self) -> Distill:
        """See Finetune.resolved. Raises UserError for a teacher with another vocabulary."""
        assert self.teacher is not None
        teacher = self.teacher_model or parent_lib.config(self.teacher)
        if self.teacher_dtype is not None:
            teacher = teacher.replace(dtype=self.teacher_dtype, param_dtype=self.teacher_dtype)
        made = super().resolved()
        assert isinstance(made, Distill)
        assert made.model is not None
        if made.model.vocab_size != teacher.vocab_size:
            raise UserError(
                f"the student has {made.model.vocab_size} logits, the teacher {self.teacher} "
                f"{teacher.vocab_size}: probabilities are compared token by token, so both need one "
                "vocabulary. "
                "Take another student, or let it learn from the teacher's answers (imitate.Imitate)"
            )
        if made.model.architecture != teacher.architecture:
            raise UserError(
                f"the student is {made.model.architecture}, the teacher {teacher.architecture}: they read "
                "different batches. Let the student learn from the teacher's answers (imitate.Imitate)"
            )
        return dataclasses.replace(made, teacher=located(self.teacher), teacher_model=teacher)

    @property
    def _is_resolved(self) -> bool:
        return super()._is_resolved and self.teacher_model is not None

    def inputs(self) -> Sequence[str]:
        """See Pretrain.inputs."""
        assert self.teacher is not None
        return [*super().inputs(), located(self.teacher)]

    def make_program(self) -> TrainingProgram:
        """See Pretrain.make_program."""
        program = super().make_program()
        if self.teacher_model is None:  # it lies on disk, where nobody looks before the job is started
            return program
        assert self.model is not None
        loss = DistillationLoss(
            self.model,
            self.teacher_model,
            self.beta,
            self.temperature,
            self.hard,
            self.label_smoothing,
            self.z_loss,
        )
        if self.cache is None:
            return dataclasses.replace(
                program, custom_loss=loss, with_reference=True, reference_model=self.teacher_model
            )
        example = teacher_logits.with_places(empty_batch(1, program.sides()), self.top_k)
        return dataclasses.replace(program, custom_loss=loss, example=example)

    # --- the run ---

    def __call__(self, run: RunDir) -> Figures:
        """See Pretrain.__call__."""
        if self._is_resolved and self.cache is not None:
            self._fill()
        return super().__call__(run)

    def _parent(self, mesh: Mesh, source: BatchSource) -> initialize.Start:
        start = super()._parent(mesh, source)
        return dataclasses.replace(start, lineage=start.lineage | {"teacher": self.teacher})

    def _preflight(
        self,
        run: RunDir,
        mesh: Mesh,
        source: BatchSource,
        evaluated: Sequence[BatchSource],
        start: str,
    ) -> None:
        assert self.teacher_model is not None
        size = count_params(state_lib.abstract_params(self.teacher_model))
        where = "in every step" if self.cache is None else f"its {self.top_k} best tokens in {self.cache}"
        said = f"{start}; teacher {self.teacher}, {size:,} parameters, {where}"
        super()._preflight(run, mesh, source, evaluated, said)

    def _teacher(self, mesh: Mesh, source: BatchSource) -> Any:
        """The teacher's parameters, on the mesh."""
        assert self.teacher is not None
        assert self.teacher_model is not None
        abstract = state_lib.abstract_params(self.teacher_model)
        axes = state_lib.logical_axes(self.teacher_model)
        shardings = rules.param_shardings(axes, abstract, mesh, self.rules)
        if write_model.has_adapter(self.teacher):
            stored = write_model.read(self.teacher)
            if stored.vocabulary is not None and stored.vocabulary != source.vocabulary:
                raise UserError(
                    f"the teacher {self.teacher} was trained with the vocabulary "
                    f"{stored.vocabulary.fingerprint}, this "
                    f"run's token store has {source.vocabulary.fingerprint}: the same ids would mean other "
                    "words"
                )
            cast = jax.tree.map(lambda leaf, like: np.asarray(leaf, like.dtype), stored.params, abstract)
            return jax.tree.map(jax.device_put, cast, shardings)
        try:
            found = parent_lib.load(self.teacher, self.teacher_model, abstract, shardings, source.vocabulary)
        except UserError as error:
            raise UserError(str(error).replace("init_from", "the teacher", 1)) from None
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), found.params, abstract)

    def _frozen(self, mesh: Mesh, source: BatchSource, parent: initialize.Start | None) -> Any:
        models = self.program.frozen_models
        if not models:
            return None
        parameters = dict.fromkeys(models, None if parent is None else parent.params)
        if "reference" in models:
            parameters["reference"] = self._teacher(mesh, source)
        return self.program.freeze(mesh, parameters)

    def _logits(self) -> teacher_logits.Kept:
        """The folder of the teacher's logits, for this teacher."""
        assert self.cache is not None
        assert self.teacher is not None
        assert self.teacher_model is not None
        return teacher_logits.Kept.open(
            self.cache,
            teacher_logits.Identity.of(
                self.teacher, self.teacher_model.vocab_size, self.top_k, self.temperature
            ),
        )

    def _source(self, task: Task | Mixture, split: str, rows: int, *, shuffle: bool) -> BatchSource:
        if self.cache is None or not shuffle:
            return super()._source(task, split, rows, shuffle=shuffle)
        assert self.model is not None
        sides, architecture = self.program.sides(), self.model.architecture
        kept = self._logits()
        return teacher_logits.WithTeacher(
            kept, task, split, rows, sides, architecture, self.seed, self.pack, shuffle
        )

    def _fill(self) -> None:
        """Writes what the cache lacks of this run's batches."""
        assert self.teacher_model is not None
        assert self.task is not None
        source = super()._source(self.task, self.split, self.batch_size, shuffle=True)
        kept = self._logits()
        if kept.covers(source.fingerprint, self.seed, self.steps):
            return
        mesh = self.mesh.build()
        rules.check_batch(self.batch_size, mesh)
        with rules.use_mesh(mesh, self.rules):
            teacher = self._teacher(mesh, source)
            find = teacher_logits.finder(self.teacher_model, self.top_k, self.temperature)
            kept.fill(
                source, self.seed, self.steps, lambda batch: find(teacher, rules.put_batch(batch, mesh))
            )
