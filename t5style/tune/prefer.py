"""Learning from preferences: DPO and its kin on pairs of answers, KTO on single ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from t5style import run_dir
from t5style.data.pipeline import BatchSource
from t5style.data.task import Mixture, Task
from t5style.infer.chat import located
from t5style.parallel import mesh as mesh_lib
from t5style.train import checkpoint
from t5style.train.loop import Progress
from t5style.train.program import TrainingProgram
from t5style.tune import pairs, reference
from t5style.tune.pairs import PairSource
from t5style.tune.preferences import REFERENCE, Preference, PreferenceLoss, answers
from t5style.tune.supervised import Finetune

LIVE, PRECOMPUTED = "live", "precomputed"


@dataclasses.dataclass(frozen=True)
class Prefer(Finetune):
    """Tunes a model towards the chosen and away from the rejected answers.

    `store` (or `task`) holds preferences: prompt, chosen and rejected; of method 'kto' prompt, completion and
    whether it is desirable. tune.examples.Examples makes such stores of raw files. A row is one answer with
    its prompt, and batch_size counts pairs.

    The reference model is the parent, `init_from`, as it is: with an adapter its base, which is in memory
    anyway; without one a second copy, unless its log-likelihoods are computed beforehand.

    Metrics, in training and in evaluation, are means over pairs: loss, reward_accuracy (how often the chosen
    answer has the larger reward; ties count half), reward_margin, reward_chosen, reward_rejected,
    log_likelihood_chosen and log_likelihood_rejected, log_likelihood_accuracy (how often the chosen answer is
    the more probable one), nll (per token of chosen answers). Evaluations also say how many pairs there are
    and the accuracies' standard errors.

    Attributes:
      method, beta, length_normalized, gamma, nll_weight, desirable_weight, undesirable_weight: see
        preferences.Preference.
      label_smoothing: see there too; it is no smoothing over the vocabulary here.
      reference: 'live': the reference reads every batch. 'precomputed': it reads all pairs once, before the
        first step, and what it says is kept in <run>/reference/; for several epochs, or where there is no
        room for a second model. Methods without a reference take no notice.
    """

    method: str = "dpo"
    beta: float | None = None
    length_normalized: bool | None = None
    gamma: float = 1.0
    nll_weight: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: str = LIVE
    pack: bool = False

    accuracies: ClassVar[tuple[str, ...]] = ("reward_accuracy", "log_likelihood_accuracy")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.preference  # which checks its fields
        if self.reference not in (LIVE, PRECOMPUTED):
            raise ValueError(f"reference is {self.reference!r}; it must be {LIVE!r} or {PRECOMPUTED!r}.")
        if self.pack:
            raise ValueError("pack is True, but answers that are compared do not share a row: leave it out.")
        if self.z_loss:
            raise ValueError(
                f"z_loss is {self.z_loss}, which losses of preferences do not have: set it to 0."
            )
        if self.is_precomputed and isinstance(self.task, Mixture):
            raise ValueError(
                f"reference is 'precomputed', but task {self.task.name!r} is a mixture, whose pairs have no "
                "numbers of their own: set reference to 'live'."
            )

    @functools.cached_property
    def preference(self) -> Preference:
        """The method with its numbers."""
        fields = [field.name for field in dataclasses.fields(Preference)]
        return Preference(**{name: getattr(self, name) for name in fields})

    @property
    def is_precomputed(self) -> bool:
        """Whether batches hold the reference's log-likelihoods."""
        return self.reference == PRECOMPUTED and self.preference.has_reference

    @property
    def _extras(self) -> tuple[str, ...]:
        desirable = () if self.preference.is_paired else ("desirable",)
        return (*desirable, REFERENCE) if self.is_precomputed else desirable

    def make_program(self) -> TrainingProgram:
        """See Pretrain.make_program."""
        assert self.model is not None
        program = super().make_program()
        return dataclasses.replace(
            program,
            label_smoothing=0.0,
            custom_loss=PreferenceLoss(self.model, self.preference),
            with_reference=self.preference.has_reference and not self.is_precomputed,
            example=pairs.example(program.sides(), self._extras),
        )

    @functools.cached_property
    def _sources(self) -> list[PairSource]:
        """The sources of this run, whose reference is still to be computed."""
        return []

    def _source(self, task: Task | Mixture, split: str, rows: int, *, shuffle: bool) -> BatchSource:
        source = PairSource(super()._source(task, split, rows, shuffle=shuffle), self._extras)
        self._sources.append(source)
        return source  # type: ignore[return-value]

    def _preflight(
        self,
        run: run_dir.RunDir,
        mesh: Mesh,
        source: BatchSource,
        evaluated: Sequence[BatchSource],
        start: str,
    ) -> None:
        if self.preference.is_paired:
            pairs.check(source)  # type: ignore[arg-type]
        super()._preflight(run, mesh, source, evaluated, start)

    def _start(
        self, run: run_dir.RunDir, mesh: Mesh, source: BatchSource, keeper: checkpoint.Checkpointer
    ) -> tuple[Any, Any, Progress, str]:
        if self.is_precomputed:
            self._precompute(run, mesh, source)
        return super()._start(run, mesh, source, keeper)

    def _precompute(self, run: run_dir.RunDir, mesh: Mesh, source: BatchSource) -> None:
        """Gives all sources what the reference says of their pairs, computed or from the run folder."""
        assert self.init_from is not None
        assert self.model is not None
        model = self.model
        parent = run_dir.path_fingerprint(located(self.init_from))
        identity = run_dir.fingerprint([parent, model.to_json()])

        @functools.cache
        def compute() -> reference.Compute:
            params = self._parent(mesh, source).params

            def of_batch(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
                found = answers(model, params, batch)
                return batch["example"], found.log_likelihood.reshape(-1, 2), found.tokens.reshape(-1, 2)

            step = jax.jit(of_batch, out_shardings=mesh_lib.replicated(mesh))
            return functools.partial(step, params)

        (run.path / "reference").mkdir(parents=True, exist_ok=True)
        for each in self._sources:
            path = run.path / "reference" / f"{each.task.name}-{each.split}.npz"
            each.reference = reference.table(path, identity, each, mesh, compute)

    def _evaluator(self, sources: Sequence[BatchSource], mesh: Mesh, frozen: Any) -> Any:
        names = [source.task.name for source in sources]
        return pairs.counting_pairs(super()._evaluator(sources, mesh, frozen), names, self.accuracies)
