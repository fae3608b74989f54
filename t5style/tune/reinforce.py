"""Reinforcement learning from rewards: GRPO and its kin, RLOO, REINFORCE++ and PPO on the training loop."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5style import console, run_dir
from t5style.data.objectives import Supervised
from t5style.data.pipeline import Batch, BatchSource, empty_batch
from t5style.data.task import Mixture, Task
from t5style.data.token_store import TokenStore
from t5style.models.config import TransformerConfig
from t5style.train import preflight
from t5style.train.loop import Loop
from t5style.train.pretrain import Figures
from t5style.train.program import TrainingProgram
from t5style.tune import parent, policy
from t5style.tune.policy import GROUPED, Method, PolicyLoss
from t5style.tune.prompts import FEATURE, PromptSource
from t5style.tune.rewards import Reward
from t5style.tune.rollouts import Sampling
from t5style.tune.sampler import Sampler
from t5style.tune.scoring import Scorer
from t5style.tune.supervised import Finetune

OVERLONG = ("keep", "mask", "soft")
BEFORE = "before.json"


@dataclasses.dataclass(frozen=True)
class Reinforce(Finetune):
    """Learns from rewards of its own answers.

    A rollout: `prompts` prompts get `group` answers each, drawn by the decoding engine from the newest
    parameters on the same mesh, and their rewards; then epochs · minibatches updates learn from them. The
    run folder gets rollouts/step_XXXXXXXX.jsonl (number of the first update's batch), rollouts/latest.html,
    and before.json, the evaluation of the parent. A run that was killed goes on with the rollout it was at,
    exactly.

    Attributes:
      store: prompts with their records, made by tune.examples.Examples.
      method: which, and its numbers.
      rewards: by name, see rewards.py; any function that can be imported. reward_weights: of those that do
        not count 1.
      reward_failure: the reward of an answer for which a reward function raised, gave no finite number, or
        never returned; None: it is not learnt from.
      reward_seconds: that a reward may take for an answer.
      sampling: how answers are drawn.
      prompts, group, minibatches, epochs: see above. batch_size, the rows of an update, is
        prompts · group / minibatches.
      dynamic_tries: how often groups whose answers all have the same reward are replaced by other prompts
        (dynamic sampling, DAPO §3.2); None: 2 of 'dapo', 0 of the others.
      overlong: answers cut at max_new_tokens are learnt from as they are ('keep') or not ('mask'), or lengths
        near the limit cost up to 1 of reward ('soft', within overlong_buffer tokens of it); None: 'soft' of
        'dapo', 'keep' of the others.
      old: whose log-likelihoods the policy is compared with: 'trainer' (computed again) or 'sampler' (as the
        engine told them). Their difference is always measured.
      eval_prompts: so many prompts of eval_split get a greedy answer; None: all.
      lengths: None for what the longest prompt and answer take.
    """

    method: Method = dataclasses.field(default_factory=Method)
    rewards: Mapping[str, Reward] = dataclasses.field(default_factory=dict)
    reward_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reward_failure: float | None = 0.0
    reward_seconds: float = dataclasses.field(default=10.0, metadata={"affects_result": False})
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    prompts: int = 16
    group: int = 8
    minibatches: int = 1
    epochs: int = 1
    dynamic_tries: int | None = None
    overlong: str | None = None
    overlong_buffer: int = 16
    old: str = "trainer"
    eval_prompts: int | None = 256
    batch_size: int | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in ("prompts", "group", "minibatches", "epochs", "overlong_buffer", "eval_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more.")
        rows = self.prompts * self.group
        if rows % self.minibatches:
            raise ValueError(
                f"{self.prompts} prompts with a group of {self.group} are {rows} answers, which cannot be "
                f"cut into {self.minibatches} equal minibatches."
            )
        if self.batch_size not in (None, rows // self.minibatches):
            raise ValueError(
                f"batch_size is {self.batch_size}, but {self.prompts} prompts · {self.group} answers / "
                f"{self.minibatches} minibatches are {rows // self.minibatches}: leave batch_size out."
            )
        object.__setattr__(self, "batch_size", self.rows)
        if self.method.kind in GROUPED and self.group < 2:
            raise ValueError(
                f"group is {self.group}, but {self.method.name!r} compares the answers to a prompt with each "
                "other: set it to 2 or more."
            )
        if not self.rewards:
            raise ValueError("rewards is empty; give at least one, as {'answer': @rewards.NumericAnswer()}.")
        if unknown := sorted(self.reward_weights.keys() - self.rewards.keys()):
            raise ValueError(f"reward_weights names {unknown[0]!r}, which is none of the rewards.")
        if self.method.name == "dapo":
            if self.dynamic_tries is None:
                object.__setattr__(self, "dynamic_tries", 2)
            if self.overlong is None:
                object.__setattr__(self, "overlong", "soft")
        if (self.overlong or "keep") not in OVERLONG:
            raise ValueError(f"overlong is {self.overlong!r}; it must be one of {', '.join(OVERLONG)}.")
        if self.old not in ("trainer", "sampler"):
            raise ValueError(f"old is {self.old!r}; it must be 'trainer' or 'sampler'.")
        super().__post_init__()
        if isinstance(self.task, Mixture):
            raise ValueError("task is a mixture; reinforcement learning takes the prompts of one store.")

    @property
    def rows(self) -> int:
        """Rows of an update."""
        return self.prompts * self.group // self.minibatches

    @property
    def updates(self) -> int:
        """Updates that learn from one rollout."""
        return self.epochs * self.minibatches

    def resolved(self) -> Finetune:
        """See Finetune.resolved."""
        assert self.init_from is not None
        task = self.task
        if task is None:
            assert self.store is not None
            task = Task("prompts", self.store, Supervised())  # the objective is not looked at
        assert isinstance(task, Task)
        model = parent.config(self.init_from) if self.model is None else self.model
        job = dataclasses.replace(
            self, task=task, store=None, model=model, lengths=self.lengths or self._lengths(task, model)
        )
        return Finetune.resolved(job)

    def _lengths(self, task: Task, model: TransformerConfig) -> dict[str, int]:
        store, new = TokenStore.open(task.store), self.sampling.max_new_tokens
        if FEATURE not in store.features:
            raise run_dir.UserError(
                f"the token store {store.folder} has the features {', '.join(store.features)}, no "
                f"{FEATURE!r}: make one from prompts with tune.examples.Examples."
            )
        splits = [self.split, *([self.eval_split] if self.eval_split else [])]
        sizes = [store.lengths(task.store_split(split), FEATURE) for split in splits]
        longest = max((int(size.max()) for size in sizes if len(size)), default=1)
        if model.architecture == "encoder_decoder":
            return {"encoder": longest, "decoder": new}
        whole = longest + new  # with the start token, without the last one, which nothing follows
        return {"decoder": whole if model.context_length is None else min(whole, model.context_length)}

    def _room(self) -> int:
        """Tokens that a prompt may have, with the start token."""
        sides = self.program.sides()
        return sides.get("encoder", sides["decoder"] + 1 - self.sampling.max_new_tokens)

    # --- what Pretrain asks for ---

    def make_program(self) -> TrainingProgram:
        """See Pretrain.make_program."""
        assert self.model is not None
        loss = PolicyLoss(self.model, self.method, self.sampling.temperature, self.sampling.max_new_tokens)
        program = dataclasses.replace(
            super().make_program(),
            heads=self.method.heads,
            custom_loss=loss,
            with_reference=bool(self.method.kl),
        )
        return dataclasses.replace(program, example=self._example(program.sides()))

    def _example(self, sides: Mapping[str, int]) -> Batch:
        names = [*policy.OF_TOKENS, *(policy.OF_VALUES if self.method.heads else ())]
        figures = ["kl_coefficient", *policy.FIGURES, *(policy.PART + name for name in self.rewards)]
        return {
            **empty_batch(1, sides),
            **{name: np.zeros((1, sides["decoder"]), np.float32) for name in names},
            **{name: np.zeros(1, np.float32) for name in figures},
        }

    def _source(self, task: Task | Mixture, split: str, rows: int, *, shuffle: bool) -> BatchSource:
        assert isinstance(task, Task)
        assert self.model is not None
        source = PromptSource(
            task, split, rows, self.program.sides(), self.model.architecture, self._room(), self.seed
        )
        return source  # type: ignore[return-value]

    @functools.cached_property
    def merged(self) -> Any:
        """program.merged, compiled."""
        return jax.jit(self.program.merged)

    @functools.cached_property
    def scorer(self) -> Scorer:
        """The rewards, in a process of their own."""
        failure = 0.0 if self.reward_failure is None else self.reward_failure
        return Scorer(self.rewards, self.reward_weights, failure, self.reward_seconds)

    def __call__(self, run: run_dir.RunDir) -> Figures:
        """See Pretrain.__call__."""
        if not self._is_resolved:
            return self.resolved()(run)
        if run_dir.has_company():
            raise run_dir.UserError(
                "reinforcement learning runs in one process, on all of its devices: start it on one host."
            )
        with self.scorer:
            figures = super().__call__(run)
        before = run.path / BEFORE
        told = json.loads(before.read_text()) if before.exists() else {}
        return {**{f"before/{name}": value for name, value in told.items()}, **figures}

    def _preflight(
        self,
        run: run_dir.RunDir,
        mesh: Mesh,
        source: BatchSource,
        evaluated: Sequence[BatchSource],
        start: str,
    ) -> None:
        """Shows prompts and what their own answers are worth; refuses rewards that fail on the first one."""
        assert isinstance(source, PromptSource)
        preflight.verify_stores([source.task, *(other.task for other in evaluated)])
        costs, first = self.costs(mesh), source.first(2)
        lines = [
            "Preflight",
            f"  start      {start}",
            f"  model      {preflight.parameters(costs.parameters, costs.trained)}; {costs.mesh}",
            f"  prompts    {len(source.members):,}, the longest of {source.longest} tokens; "
            f"{source.left_out} of more than {source.room} are left out",
            f"  rollout    {self.prompts} prompts · {self.group} answers of up to "
            f"{self.sampling.max_new_tokens} tokens, {self.updates} updates of {self.batch_size} rows",
            f"  method     {json.dumps(run_dir.canonical(self.method))}",
        ]
        for prompt in first:
            lines.append(f"  prompt     {prompt.text[:400]!r}")
            lines.append(f"             {json.dumps(dict(prompt.record), ensure_ascii=False)[:400]}")
        tried = ["", *(str(value) for value in first[0].record.values() if isinstance(value, str | int))][:4]
        scores = self.scorer.score(
            [first[0].record] * len(tried), [first[0].text] * len(tried), [[text] for text in tried]
        )
        for text, total in zip(tried, scores.total[:, 0], strict=True):
            lines.append(f"  reward     of the answer {text[:80]!r} to the first: {total:g}")
        text = "\n".join(lines)
        console.say(text)
        run_dir.atomic_write(run.path / "preflight.txt", text + "\n")

    def _batches(
        self, start: int, source: BatchSource, mesh: Mesh, loop: Loop, frozen: Any
    ) -> Iterator[Mapping[str, np.ndarray]]:
        assert isinstance(source, PromptSource)
        sampler = Sampler(self, loop.run.path, source, mesh, frozen, self.scorer)
        if start == 0 and self.eval_split is not None:
            self._measure_parent(loop)
        number, rows = start, self.prompts * self.group
        while True:
            made, within = divmod(number, self.updates)
            arrays = sampler.arrays(sampler.rollout(made * self.updates, within > 0, loop))
            for update in range(within, self.updates):
                epoch, part = divmod(update, self.minibatches)
                order = sampler.order(made, epoch, rows)
                chosen = order[part * rows // self.minibatches : (part + 1) * rows // self.minibatches]
                yield {name: values[chosen] for name, values in arrays.items()}
            number = (made + 1) * self.updates

    def _measure_parent(self, loop: Loop) -> None:
        """Writes what the evaluation says before the first step."""
        assert loop.evaluate is not None
        figures = loop.evaluate(loop.params, lambda: False)
        run_dir.atomic_write(loop.run.path / BEFORE, json.dumps(figures, indent=1) + "\n")
        told = {name: value for name, value in (figures or {}).items() if not math.isnan(value)}
        console.say("before: " + ", ".join(f"{name} {value:.4g}" for name, value in told.items()))

    def _evaluator(self, sources: Sequence[BatchSource], mesh: Mesh, frozen: Any) -> Any:
        """(params, stopping) -> {'eval/<task>/reward': ...} of greedy answers, or None once stopping() is
        true.
        """

        def evaluate(params: Any, stopping: Callable[[], bool]) -> dict[str, float] | None:
            figures: dict[str, float] = {}
            for source in sources:
                assert isinstance(source, PromptSource)
                sampler = Sampler(self, None, source, mesh, frozen, self.scorer)
                found = sampler.evaluate(params, source.first(self.eval_prompts), stopping)
                if found is None:
                    return None
                figures |= {f"eval/{source.task.name}/{name}": value for name, value in found.items()}
            return figures

        return evaluate
