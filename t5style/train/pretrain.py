"""The job that trains a model on a task or mixture. Finetuning is the same job with parameters to start
from.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from t5style import console, run_dir
from t5style.data.pipeline import BatchSource
from t5style.data.task import Mixture, Task
from t5style.models import params as model_params
from t5style.models.config import TransformerConfig
from t5style.parallel import explain, rules
from t5style.parallel import mesh as mesh_lib
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import Rules
from t5style.train import checkpoint, evaluation, initialize, preflight, resharding
from t5style.train import state as state_lib
from t5style.train.goodput import Goodput
from t5style.train.loop import Loop, LoopOptions, Progress
from t5style.train.optimizer import Optimizer
from t5style.train.program import TrainingProgram, load_executable

Figures = dict[str, Any]


def _unseen(default: Any) -> Any:
    """A field that changes what is kept on disk or shown, and not the result."""
    return dataclasses.field(default=default, metadata={"affects_result": False})


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Trains `model` on `task` for `steps` steps.

    The run folder gets model.json, vocabulary/, checkpoints/, metrics.jsonl, tensorboard/, preflight.txt and
    .json, goodput.json and lineage.json. Run again, it goes on from its newest checkpoint, exactly.

    Attributes:
      model: the model.
      task: what to learn, a Task or a Mixture.
      lengths: places in a row, {'encoder': 512, 'decoder': 114}; only 'decoder' for a decoder-only model.
      steps: updates to make in all.
      batch_size: rows of the global batch; a multiple of data × fsdp × accumulation.
      optimizer, mesh, rules: see their classes.
      seed: of parameters, order of the data, corruption and dropout.
      split: the task's split to learn from.
      eval_tasks: what to evaluate on; None for `task` itself (each task of a mixture by itself).
      eval_split: their split; None for no evaluation.
      eval_every: steps between evaluations; None for only at the end.
      eval_batches: batches of each evaluation task to read, from its beginning; None for all of the split.
      eval_batch_size: rows of an evaluation batch; None for batch_size / accumulation.
      checkpoint_every: steps between checkpoints; None for only at the end (and on SIGTERM).
      keep: newest checkpoints to keep; keep_every: also keep those at multiples of this step for good;
        keep_best: also keep the one with the lowest value of this metric, for example 'eval/<task>/loss', of
        those saved at a step at which it was measured; with a minus sign before it the highest.
      patience: end the run after so many evaluations in a row without a better keep_best; None: never.
      log_every: steps between lines of metrics.
      accumulation: microbatches per step.
      on_nan: 'stop', 'skip' or 'rollback', see `loop.LoopOptions`.
      executable: a compiled step that a plan has kept (plan.Plan.keep_executable), which is run instead of
        compiling it here; an error if it is of another program.
      profile_steps: (first, last) of the steps to trace for xprof; hang_seconds, on_hang: when it counts as a
        hang that no step is finished, and whether to 'warn' or 'exit' then. See `loop.LoopOptions`.
      label_smoothing, z_loss: see `losses.cross_entropy`.
      pack: several supervised examples share a row.
      init_from: run folder, checkpoint or Hugging Face directory whose parameters to start from; None for
        random ones.
    """

    model: TransformerConfig
    task: Task | Mixture
    lengths: Mapping[str, int]
    steps: int = 1000
    batch_size: int = 8
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rules: Rules = dataclasses.field(default_factory=Rules)
    seed: int = 0
    split: str = "train"
    eval_tasks: Sequence[Task] | None = None
    eval_split: str | None = "validation"
    eval_every: int | None = None
    eval_batches: int | None = None
    eval_batch_size: int | None = None
    checkpoint_every: int | None = _unseen(None)
    keep: int = _unseen(3)
    keep_every: int | None = _unseen(None)
    keep_best: str | None = _unseen(None)
    patience: int | None = None
    log_every: int = _unseen(10)
    accumulation: int = 1
    on_nan: str = "stop"
    executable: str | None = _unseen(None)
    profile_steps: Sequence[int] | None = _unseen(None)
    hang_seconds: float | None = _unseen(None)
    on_hang: str = _unseen("warn")
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    pack: bool = True
    init_from: str | None = None

    distributed: ClassVar[bool] = True
    # A run may be made longer, go on on other devices, and be watched otherwise, without starting over.
    may_change: ClassVar[tuple[str, ...]] = (
        "steps",
        "mesh",
        "rules",
        "on_nan",
        "patience",
        "eval_tasks",
        "eval_split",
        "eval_every",
        "eval_batches",
    )

    def __post_init__(self) -> None:
        self.options()
        if self.model is not None and self.lengths is not None:  # a tuning job may take its parent's model
            self.program.sides()  # which checks the program's fields
        if self.keep < 1:
            raise ValueError(f"keep is {self.keep}; it must be 1 or more.")
        for name in ("eval_batches", "eval_batch_size", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more, or None.")
        if self.patience is not None and (self.keep_best or "").lstrip("-")[:5] != "eval/":
            raise ValueError(
                f"patience is {self.patience}, but keep_best is {self.keep_best!r}: name the metric "
                "that shall get better, as 'eval/<task>/loss'."
            )
        if self.eval_split is None and (self.keep_best or "").lstrip("-").startswith("eval/"):
            raise ValueError(
                f"keep_best is {self.keep_best!r}, but with eval_split None nothing is evaluated."
            )

    def options(self) -> LoopOptions:
        """The loop's options."""
        return LoopOptions(
            steps=self.steps,
            log_every=self.log_every,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            on_nan=self.on_nan,
            patience=self.patience,
            profile_steps=self.profile_steps,
            hang_seconds=self.hang_seconds,
            on_hang=self.on_hang,
        )

    def inputs(self) -> Sequence[str]:
        """Folders whose content decides the parameters: what they are evaluated on may change."""
        stores = [task.store for task in _tasks(self.task)]
        orders = [task.split_order("train") for task in _tasks(self.task)]
        orders = [order for order in orders if order.endswith(".npy")]
        return [*dict.fromkeys([*stores, *orders]), *([self.init_from] if self.init_from else [])]

    # --- abstract questions: nothing is allocated ---

    def explain_sharding(self) -> None:
        """Prints how the parameters lie on the mesh, and what is resharded inside the loop over layers."""
        mesh, abstract = self.mesh.build(), model_params.abstract_params(self.model)
        explain.explain(model_params.logical_axes(self.model), abstract, mesh, self.rules)
        if mesh.size == 1:
            return
        console.say("compiles the training step, to see what devices send each other")
        options = dict(self.mesh.compiler_options)
        if mesh.devices.flat[0].platform == "cpu":  # the same collectives in a tenth of the time
            options["xla_backend_optimization_level"] = 0
        looped = dataclasses.replace(
            self.program,
            model=self.model.replace(scan_layers=True),
            mesh=dataclasses.replace(self.mesh, compiler_options=options),
        )
        if not resharding.warn(looped.compile(mesh), looped, mesh):
            console.say("no activation is resharded inside the loop over layers")

    def dry_run(self, run: run_dir.RunDir) -> None:
        """Prints what the run would cost, from shapes alone; checks batch, mesh and lengths against each
        other.
        """
        mesh = self.mesh.build()
        rules.check_batch(self.batch_size, mesh, self.accumulation)
        costs = self.costs(mesh)
        positions = self.steps * self.batch_size * sum(self.program.sides().values())
        console.say(
            f"{preflight.parameters(costs.parameters, costs.trained)}; "
            f"{explain.format_bytes(costs.state_bytes)} of parameters and "
            "optimiser "
            f"state and {explain.format_bytes(costs.gradient_bytes)} of gradients on each device "
            f"({costs.mesh}); "
            f"{self.steps:,} steps of {self.batch_size} rows: up to {positions:,} tokens, "
            f"{positions * costs.flops_per_token:.3g} FLOPs"
        )

    def costs(self, mesh: Mesh) -> preflight.Costs:
        """Parameters, bytes per device and FLOPs per token, from shapes alone."""
        abstract, shardings = self.program.abstract(mesh)
        return preflight.Costs(
            parameters=model_params.count_params(self.model),
            trained=model_params.count_params(abstract.params),
            state_bytes=state_lib.bytes_per_device(abstract, shardings),
            frozen_bytes=state_lib.bytes_per_device(*self.program.abstract_frozen(mesh)),
            gradient_bytes=state_lib.bytes_per_device(abstract.params, shardings.params),
            flops_per_token=self.program.flops_per_token(),
            mesh=mesh_lib.describe(mesh),
        )

    @functools.cached_property
    def program(self) -> TrainingProgram:
        """The training step, which plan.Plan compiles too."""
        return self.make_program()

    def make_program(self) -> TrainingProgram:
        """See program; what jobs with another loss override."""
        return TrainingProgram(
            model=self.model,
            lengths=self.lengths,
            batch_size=self.batch_size,
            optimizer=self.optimizer,
            mesh=self.mesh,
            rules=self.rules,
            steps=self.steps,
            accumulation=self.accumulation,
            skip_nonfinite=self.on_nan == "skip",
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )

    # --- the run ---

    def __call__(self, run: run_dir.RunDir) -> Figures:
        """Trains; returns final losses, tokens, seconds, tokens per second and shares of time.

        Raises:
          UserError, ValueError: what preflight refuses; a loss that is not finite; a checkpoint that cannot
            be written.
          SystemExit: SIGTERM came; the state is saved.
        """
        goodput = Goodput()
        began = time.perf_counter()
        mesh = self.mesh.build()
        rules.check_batch(self.batch_size, mesh, self.accumulation)
        source = self._source(self.task, self.split, self.batch_size, shuffle=True)
        preflight.check_vocabulary(self.model, source.vocabulary, source.tasks[0].store)
        evaluated = self._eval_sources(source, mesh)
        keeper = checkpoint.Checkpointer(
            run.path / "checkpoints", self.keep, self.keep_every, best_metric=self.keep_best
        )
        with goodput.timed("compile"):  # what the mesh cannot do is said before anything is allocated
            lowered = self.program.lower(mesh)
        with rules.use_mesh(mesh, self.rules):
            state, frozen, progress, start = self._start(run, mesh, source, keeper)
            self._preflight(run, mesh, source, evaluated, start)
            if run_dir.is_main_process():
                self._describe(run, source, frozen)
            loop = self._loop(run, mesh, source, evaluated, keeper, goodput, lowered, frozen)
            state, progress = loop.run_to_end(state, progress)
        return self._figures(state, progress, goodput, source, time.perf_counter() - began)

    def _preflight(
        self,
        run: run_dir.RunDir,
        mesh: Mesh,
        source: BatchSource,
        evaluated: Sequence[BatchSource],
        start: str,
    ) -> None:
        """Shows and checks what is about to be learnt; start: what from, in words."""
        preflight.preflight(
            run,
            config=self.model,
            source=source,
            eval_tasks=[task for other in evaluated for task in other.tasks],
            split=self.split,
            seed=self.seed,
            steps=self.steps,
            costs=self.costs(mesh),
            start=start,
        )

    def _source(self, task: Task | Mixture, split: str, rows: int, *, shuffle: bool) -> BatchSource:
        """Batches of `rows` rows of a split."""
        sides, architecture = self.program.sides(), self.model.architecture
        return BatchSource(task, split, rows, sides, architecture, self.seed, self.pack, shuffle)

    def _describe(self, run: run_dir.RunDir, source: BatchSource, frozen: Any) -> None:
        """Writes what is needed to use the checkpoints."""
        run_dir.atomic_write(run.path / "model.json", self.model.to_json())
        source.vocabulary.save(run.path / "vocabulary")

    def _parent(self, mesh: Mesh, source: BatchSource) -> initialize.Start:
        """The parameters of `init_from`, on the mesh."""
        assert self.init_from is not None
        abstract = state_lib.abstract_params(self.model)
        shardings = rules.param_shardings(state_lib.logical_axes(self.model), abstract, mesh, self.rules)
        return initialize.load_params(self.init_from, self.model, abstract, shardings, source.vocabulary)

    def _frozen(self, mesh: Mesh, source: BatchSource, parent: initialize.Start | None) -> Any:
        """Parameters that the step is given and does not change: None, or a tree (program.freeze)."""
        if not self.program.frozen_models:
            return None
        assert parent is not None
        return self.program.freeze(mesh, dict.fromkeys(self.program.frozen_models, parent.params))

    def _start(
        self, run: run_dir.RunDir, mesh: Mesh, source: BatchSource, keeper: checkpoint.Checkpointer
    ) -> tuple[Any, Any, Progress, str]:
        """The state to begin with, and what is frozen. Precedence: 1. this run's own newest checkpoint; 2.
        init_from; 3. random.
        """
        abstract, shardings = self.program.abstract(mesh)
        # 1. Resume.
        restored = keeper.restore_latest(state_lib.with_shardings(abstract, shardings))
        parent = None
        if self.init_from is not None and (restored is None or self.program.frozen_models):
            parent = self._parent(mesh, source)
        frozen = self._frozen(mesh, source, parent)
        if restored is not None:
            state, metadata = restored
            self._check_same_run(run, metadata, source)
            step = int(state.step)
            if step > self.steps:
                raise run_dir.UserError(
                    f"steps is {self.steps}, but {run.path} has been trained to step {step}: set steps to "
                    f"{step} or more, or choose another RUN_DIR."
                )
            progress = Progress.from_json(metadata["progress"])
            return state, frozen, progress, f"resumes this run at step {step} of {self.steps}"
        lineage: dict[str, Any] = {
            "dataset_fingerprint": source.fingerprint,
            "vocabulary_fingerprint": source.vocabulary.fingerprint,
            "seed": self.seed,
        }
        # 2. Parameters of another run, fresh optimiser state.
        if parent is not None:
            run.write_lineage(lineage | parent.lineage)
            state = self.program.begin(mesh, self.seed, parent.params)
            return state, frozen, Progress(), parent.source
        # 3. From scratch.
        run.write_lineage(lineage | {"parent": None})
        state = self.program.begin(mesh, self.seed)
        return state, frozen, Progress(), f"random parameters, seed {self.seed}"

    def _check_same_run(self, run: run_dir.RunDir, metadata: Mapping[str, Any], source: BatchSource) -> None:
        for name, theirs, ours in (
            ("data", metadata["data_fingerprint"], source.fingerprint),
            ("seed", metadata["seed"], self.seed),
        ):
            if theirs != ours:
                raise run_dir.UserError(
                    f"the checkpoints in {run.path} were trained with {name} {theirs}, this configuration "
                    f"has {name} "
                    f"{ours}: resuming would repeat or skip examples. Choose another RUN_DIR, with "
                    f"init_from={str(run.path)!r} to start from these parameters."
                )

    def _loop(
        self,
        run: run_dir.RunDir,
        mesh: Mesh,
        source: BatchSource,
        evaluated: Sequence[BatchSource],
        keeper: checkpoint.Checkpointer,
        goodput: Goodput,
        lowered: jax.stages.Lowered,
        frozen: Any,
    ) -> Loop:
        abstract, shardings = self.program.abstract(mesh)
        put = functools.partial(rules.put_batch, mesh=mesh)
        # A typed key on every device of the mesh, once: the hot loop moves nothing but batches.
        key = jax.jit(lambda: jax.random.key(self.seed), out_shardings=mesh_lib.replicated(mesh))()
        with goodput.timed("compile"):
            if self.executable is None:
                compiled = self.mesh.compile(lowered)
            else:
                compiled = load_executable(self.executable, lowered, mesh)
        if run_dir.is_main_process():
            resharding.warn(compiled, self.program, mesh)
        # A process that finds the program in its cache is far ahead; CPU devices wait 30 s for each other.
        run_dir.barrier("training step compiled")
        target = state_lib.with_shardings(abstract, shardings)
        extra = () if frozen is None else (frozen,)
        loop = Loop(
            run=run,
            options=self.options(),
            step=lambda state, batch, key: compiled(state, batch, key, *extra),
            key=key,
            batches=lambda start: self._batches(start, source, mesh, loop, frozen),
            put=put,
            checkpointer=keeper,
            metadata={
                "data_fingerprint": source.fingerprint,
                "vocabulary_fingerprint": source.vocabulary.fingerprint,
                "seed": self.seed,
                "model": json.loads(self.model.to_json()),
                **({"heads": list(self.program.heads)} if self.program.heads else {}),
            },
            restore=lambda: keeper.restore_latest(target),
            evaluate=self._evaluator(evaluated, mesh, frozen) if evaluated else None,
            eval_settings=run_dir.fingerprint(
                [[other.fingerprint for other in evaluated], self.eval_batches]
            ),
            flops_per_token=self.program.flops_per_token(),
            goodput=goodput,
        )
        return loop

    def _batches(
        self, start: int, source: BatchSource, mesh: Mesh, loop: Loop, frozen: Any
    ) -> Iterator[Mapping[str, np.ndarray]]:
        """This process's rows of the batches from number `start` on; `loop.params` are the newest trained
        parameters.
        """
        shard, shards = rules.host_shard(mesh)
        return source.iter(start, shard, shards)

    def _eval_sources(self, trained: BatchSource, mesh: Mesh) -> list[BatchSource]:
        """What to evaluate on, task by task.

        Raises:
          UserError: a store that is missing, lacks the split, or was made with another vocabulary.
        """
        if self.eval_split is None:
            return []
        rows = self.eval_batch_size or self.batch_size // self.accumulation
        rules.check_batch(rows, mesh)
        sources = [
            self._source(task, self.eval_split, rows, shuffle=False)
            for task in (self.eval_tasks if self.eval_tasks is not None else _tasks(self.task))
        ]
        for source in sources:
            if source.vocabulary != trained.vocabulary:
                raise run_dir.UserError(
                    f"eval task {source.task.name!r} has a store of vocabulary "
                    f"{source.vocabulary.fingerprint}, the run is trained with "
                    f"{trained.vocabulary.fingerprint}: the same ids would mean other words. Tokenize both "
                    "with one vocabulary."
                )
        return sources

    def _evaluator(self, sources: Sequence[BatchSource], mesh: Mesh, frozen: Any) -> Any:
        """See evaluation.evaluator."""
        return evaluation.evaluator(self.program, sources, mesh, frozen, self.eval_batches)

    def _figures(
        self, state: Any, progress: Progress, goodput: Goodput, source: BatchSource, seconds: float
    ) -> Figures:
        shares = goodput.fractions()
        return {
            "steps": int(state.step),
            "parameters": model_params.count_params(self.model),
            "trained_parameters": model_params.count_params(state.params),
            "train_loss": progress.last.get("train/loss"),
            **({"best_step": progress.best["step"]} if progress.best else {}),
            **progress.evaluation.get("figures", {}),
            "tokens": progress.tokens,
            "epochs": self.steps / source.batches_per_epoch,
            "training_seconds": round(progress.seconds, 3),
            "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else None,
            "seconds_of_this_process": round(seconds, 3),
            "data_wait": round(shares["data_wait"], 5),
            "goodput": round(shares["goodput"], 4),
            "skipped_updates": progress.skipped,
            "dataset_fingerprint": source.fingerprint,
        }


def _tasks(task: Task | Mixture) -> tuple[Task, ...]:
    return tuple(task.tasks) if isinstance(task, Mixture) else (task,)
