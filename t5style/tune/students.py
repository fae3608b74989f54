"""The job that cuts a student out of a teacher (models/prune.py)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from t5style import console
from t5style.data.pipeline import Batch, BatchSource
from t5style.data.task import Task
from t5style.data.token_store import TokenStore
from t5style.infer import storage
from t5style.infer.chat import located
from t5style.models.config import TransformerConfig
from t5style.models.params import count_params
from t5style.models.prune import Student, prune
from t5style.run_dir import RunDir, UserError
from t5style.tune import supervised, write_model


@dataclasses.dataclass(frozen=True)
class MakeStudent:
    """Makes a smaller model out of a bigger one, to be trained with its help (distill.Distill).

    Attributes:
      teacher: run folder, checkpoint, Hugging Face directory, .gguf file, or 'package:NAME/PATTERN'.
      student: what stays of it.
      task: what importance is measured on, where it is by activations or influence.
      store: token store with examples, in place of a task.
      lengths: places in a row.
      split: the task's split.
      batches, batch_size: how much of it. Minitron takes 1,024 rows.
      format: 'run' writes a run folder, 'huggingface' a directory of Hugging Face's in the folder `model`.
    """

    teacher: str
    student: Student
    task: Task | None = None
    store: str | None = None
    lengths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"encoder": 512, "decoder": 512})
    split: str = "train"
    batches: int = 32
    batch_size: int = 8
    format: str = "run"

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        write_model.check_format(self.format)
        for name in ("batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.student.needs_batches and (self.task is None) == (self.store is None):
            raise ValueError(
                f"the student's importance is {self.student.importance!r} and its layers are chosen by "
                f"{self.student.layers!r}: give a task or a store to measure them on, one of both"
            )

    def inputs(self) -> Sequence[str]:
        """The teacher, and what importance is measured on."""
        stores = [self.store if self.task is None else self.task.store]
        return [located(self.teacher), *(store for store in stores if store and self.student.needs_batches)]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes the student; returns its parameters and the teacher's."""
        teacher = write_model.read(located(self.teacher))
        batches = self._batches(teacher) if self.student.needs_batches else None
        config, params = prune(teacher.config, teacher.params, self.student, batches)
        lineage = {"parent": teacher.path, "made_by": "pruning", "student": dataclasses.asdict(self.student)}
        where = write_model.write(run, config, params, teacher, self.format, lineage)
        sizes = {"parameters": count_params(params), "teacher_parameters": count_params(teacher.params)}
        console.say(
            f"The student in {where} has {sizes['parameters']:,} of the teacher's "
            f"{sizes['teacher_parameters']:,} parameters: {_shape(config)} of {_shape(teacher.config)}"
        )
        return sizes

    def _batches(self, teacher: storage.Stored) -> Iterator[Batch]:
        task = self.task
        if task is None:
            assert self.store is not None
            task = Task("examples", self.store, supervised.objective_of(TokenStore.open(self.store)))
        sides = ("encoder", "decoder") if teacher.encoder_decoder else ("decoder",)
        lengths = {side: self.lengths[side] for side in sides}
        source = BatchSource(task, self.split, self.batch_size, lengths, teacher.config.architecture)
        if teacher.vocabulary is not None and teacher.vocabulary != source.vocabulary:
            raise UserError(
                f"the teacher {self.teacher} has the vocabulary {teacher.vocabulary.fingerprint}, the store "
                f"{source.tasks[0].store} {source.vocabulary.fingerprint}: tokenize with the teacher's"
            )
        count = min(self.batches, source.evaluation_batches)
        with (
            console.progress("measuring importance", count, "batches") as bar,
            contextlib.closing(source.evaluation_iter(max_batches=count)) as batches,
        ):
            for batch in batches:
                yield jax.tree.map(np.asarray, batch)
                bar.advance()


def _shape(config: TransformerConfig) -> str:
    """A model's sizes in words."""
    sides = [f"{count} {side}" for side in ("encoder", "decoder") if (count := len(config.layers_of(side)))]
    return (
        f"{' and '.join(sides)} layers of {config.num_heads} heads, {config.d_ff} hidden units and "
        f"{config.d_model} channels"
    )
