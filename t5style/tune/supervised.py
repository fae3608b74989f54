"""Supervised fine-tuning: training with parameters to start from, all of them trained or an adapter's own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from t5style import console, run_dir
from t5style.corpus.vocabulary import Vocabulary
from t5style.data.objectives import Objective, objective_for
from t5style.data.pipeline import BatchSource
from t5style.data.task import Mixture, Task
from t5style.data.token_store import TokenStore
from t5style.infer import chat_template, chat_tokens, storage
from t5style.infer.chat import located
from t5style.models import adapters
from t5style.models.adapters import Adapter
from t5style.models.adapters_virtual import PrefixTuning, PromptTuning
from t5style.models.config import TransformerConfig
from t5style.parallel import rules
from t5style.train import initialize
from t5style.train import state as state_lib
from t5style.train.pretrain import Figures, Pretrain
from t5style.train.program import TrainingProgram
from t5style.tune import parent
from t5style.tune.examples import TEMPLATES


@dataclasses.dataclass(frozen=True)
class Finetune(Pretrain):
    """Trains on, from a run folder, a checkpoint of one, a Hugging Face directory or a .gguf file.

    Everything else is as in Pretrain; the optimiser and the schedule start anew. Typically `task` has the
    Supervised or the Chat objective, and the learning rate is a tenth to a third of pretraining's.

    With an adapter the parent's parameters stay as they are: optimiser and checkpoints hold the adapter's
    alone, and `t5style.load` of the run folder puts both together.

    Attributes:
      init_from: the parent; also `package:NAME/PATTERN`, a file in an installed Python package.
      model: None for the parent's.
      changes: fields of the model to set otherwise: {'embedding_noise': 5.0} is NEFTune, {'remat': 'full'}
        saves memory, {'dtype': 'bfloat16'} computes in it.
      task: what to learn; None for what `store` holds.
      store: token store that tune.examples.Examples has made, in place of a task; its features say what the
        objective is.
      lengths: None for rows of 512 tokens (and of the encoder).
      adapter: what is trained in place of the parameters (models.adapters); None for the parameters.
    """

    model: TransformerConfig | None = None  # type: ignore[assignment]
    task: Task | Mixture | None = None  # type: ignore[assignment]
    lengths: Mapping[str, int] | None = None  # type: ignore[assignment]
    store: str | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.init_from:
            raise ValueError(
                f"init_from is not set: {type(self).__name__} needs a model to start from (from scratch: "
                "Pretrain)"
            )
        if (self.task is None) == (self.store is None):
            raise ValueError(
                "a task and a store were given: leave one out"
                if self.store
                else "there is nothing to learn: give a task, or the store that tune.examples.Examples made"
            )
        if isinstance(self.adapter, PromptTuning | PrefixTuning) and self.pack:
            raise ValueError(
                f"{type(self.adapter).__name__} puts its virtual tokens before rows of one example: set "
                "pack = False"
            )
        known = {field.name for field in dataclasses.fields(TransformerConfig)}
        if unknown := sorted(self.changes.keys() - known):
            raise ValueError(f"changes has {unknown[0]!r}, which is no field of TransformerConfig.")

    def resolved(self) -> Finetune:
        """This job with the model, the task and the lengths that it takes from elsewhere written out."""
        assert self.init_from is not None
        model = parent.config(self.init_from) if self.model is None else self.model
        task = self.task
        if task is None:
            assert self.store is not None
            task = Task("examples", self.store, objective_of(TokenStore.open(self.store)))
        return dataclasses.replace(
            self,
            init_from=located(self.init_from),
            model=model.replace(**self.changes),
            changes={},
            task=task,
            store=None,
            lengths=self.lengths or {"encoder": 512, "decoder": 512},
        )

    @property
    def _is_resolved(self) -> bool:
        return None not in (self.model, self.task, self.lengths) and not self.changes

    # --- the job ---

    def inputs(self) -> Sequence[str]:
        """See Pretrain.inputs."""
        assert self.init_from is not None
        if self.task is not None:
            return [*super().inputs()[:-1], located(self.init_from)]
        assert self.store is not None
        return [self.store, located(self.init_from)]

    def explain_sharding(self) -> None:
        """See Pretrain.explain_sharding."""
        Pretrain.explain_sharding(self.resolved())

    def dry_run(self, run: run_dir.RunDir) -> None:
        """See Pretrain.dry_run; what an earlier stage has still to make cannot be asked."""
        assert self.init_from is not None
        for place in (located(self.init_from), self.store):
            if place is not None and not epath.Path(place).exists():
                console.say(f"    {place} is not there yet: what this costs is known once it is")
                return
        Pretrain.dry_run(self.resolved(), run)

    def __call__(self, run: run_dir.RunDir) -> Figures:
        """See Pretrain.__call__."""
        if not self._is_resolved:
            return self.resolved()(run)
        return super().__call__(run)

    def make_program(self) -> TrainingProgram:
        """See Pretrain.make_program."""
        return dataclasses.replace(super().make_program(), adapter=self.adapter)

    def _describe(self, run: run_dir.RunDir, source: BatchSource, frozen: Any) -> None:
        super()._describe(run, source, frozen)
        assert self.init_from is not None
        # What the parent's texts begin and end with, and how its chats look: a template of the data first,
        # whose answers may end otherwise than the parent's.
        ids = storage.describe(self.init_from).ids
        for place in (*(f"{task.store}/{TEMPLATES}" for task in source.tasks), self.init_from):
            if templates := chat_template.of(place):
                chat_template.save(templates, run.path / "vocabulary")
                template = chat_template.choose(templates)
                if ids is not None and template is not None and place != self.init_from:
                    ends = (*ids.eos, *_ends(source.vocabulary, template))
                    ids = dataclasses.replace(ids, eos=tuple(dict.fromkeys(ends)))
                break
        if ids is not None:
            run_dir.atomic_write(run.path / storage.IDS, json.dumps(dataclasses.asdict(ids)) + "\n")
        if self.adapter is not None:
            described = adapters.describe(self.adapter, frozen["base"], self.init_from)
            run_dir.atomic_write(run.path / adapters.FILE, json.dumps(described, indent=1) + "\n")

    def _parent(self, mesh: Mesh, source: BatchSource) -> initialize.Start:
        assert self.init_from is not None and self.model is not None  # noqa: PT018
        abstract = state_lib.abstract_params(self.model)
        shardings = rules.param_shardings(state_lib.logical_axes(self.model), abstract, mesh, self.rules)
        return parent.load(self.init_from, self.model, abstract, shardings, source.vocabulary)


def _ends(vocabulary: Vocabulary, template: chat_template.ChatTemplate) -> tuple[int, ...]:
    """What closes an answer in a template; nothing where it does not take the question that tells."""
    try:
        return chat_tokens.stop_tokens(vocabulary, template)
    except run_dir.UserError:
        return ()


def objective_of(store: TokenStore) -> Objective:
    """What is asked of a store's tokens: its features say it."""
    return objective_for(store.features, str(store.folder))
