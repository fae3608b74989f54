"""Several answers to each prompt, of which the best are kept: best-of-n, and data for expert iteration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from t5style import console
from t5style.data.objectives import Supervised
from t5style.data.task import Task
from t5style.infer.chat import located
from t5style.infer.model import Model, load
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir
from t5style.tune import rollouts, scoring
from t5style.tune.prompts import Prompt, PromptSource, write_lines
from t5style.tune.rewards import Reward
from t5style.tune.rollouts import Sample, Sampling

KEEP = ("best", "all")


@dataclasses.dataclass(frozen=True)
class BestOfN:
    """Draws `n` answers to each prompt and keeps the best, as examples to learn from.

    The run folder gets answers.jsonl, every answer with its rewards, and best/<split>.jsonl, lines {"prompt",
    "completion", "reward"} that tune.examples.Examples reads: finetuning on them is rejection sampling, and
    again with the finetuned model expert iteration (Anthony et al. 2017; STaR, Zelikman et al. 2022; RFT,
    Yuan et al. 2023; LLaMA 2, §3.2.3).

    Attributes:
      model: as t5style.load takes it.
      store: prompts with their records, made by tune.examples.Examples with the model's vocabulary.
      rewards, reward_weights, reward_failure, reward_seconds: see reinforce.Reinforce; a None for
        reward_failure leaves out the answers whose rewards failed.
      sampling: how answers are drawn; n: to each prompt.
      threshold: only answers with at least this reward are kept; None: whatever the best one's is.
      keep: 'best': one answer to a prompt; 'all' that reach the threshold, each text once.
      splits: of the store; limit: the first so many prompts of each, None for all.
      seed: of the draws.
    """

    model: str
    store: str
    rewards: Mapping[str, Reward]
    reward_weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    reward_failure: float | None = None
    reward_seconds: float = dataclasses.field(default=10.0, metadata={"affects_result": False})
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    n: int = 8
    threshold: float | None = None
    keep: str = "best"
    splits: Sequence[str] = ("train",)
    limit: int | None = None
    seed: int = 0
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(devices=1))

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("n", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more.")
        if self.keep not in KEEP:
            raise ValueError(f"keep is {self.keep!r}; it must be one of {', '.join(map(repr, KEEP))}.")
        if self.keep == "all" and self.threshold is None:
            raise ValueError("keep is 'all' without a threshold, which would keep every answer: set one.")
        if not self.rewards:
            raise ValueError("rewards is empty; give at least one, as {'answer': @rewards.NumericAnswer()}.")

    def inputs(self) -> Sequence[str]:
        """What decides the result."""
        return (located(self.model), self.store)

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Draws, scores and writes; returns rewards by number of answers, and how many were kept."""
        model = load(located(self.model), mesh=self.mesh)
        figures: dict[str, Any] = {}
        failure = -math.inf if self.reward_failure is None else self.reward_failure
        everything: list[Sample] = []
        with scoring.Scorer(self.rewards, self.reward_weights, failure, self.reward_seconds) as scorer:
            for split in self.splits:
                prompts = self._prompts(model, split)
                groups = self._answers(model, prompts, split, scorer)
                everything += [sample for group in groups for sample in group]
                chosen = [self._chosen(group) for group in groups]
                rows = [
                    {"prompt": sample.prompt, "completion": sample.completion, "reward": sample.reward}
                    for samples in chosen
                    for sample in samples
                ]
                write_lines(run.path / "best" / f"{split}.jsonl", rows)
                kept = sum(map(bool, chosen))
                figures[split] = {
                    "prompts": len(groups),
                    "prompts_with_an_answer": kept,
                    "examples": len(rows),
                    **_best_of([[sample.reward for sample in group] for group in groups]),
                }
                console.say(
                    f"{split}: {len(rows):,} answers to {kept:,} of {len(groups):,} prompts are kept; mean "
                    f"reward {figures[split]['best_of_1']:.4g}, of the best of {self.n} "
                    f"{figures[split][f'best_of_{self.n}']:.4g}"
                )
        rollouts.write(run.path / "answers.jsonl", everything)
        return figures

    def _prompts(self, model: Model, split: str) -> list[Prompt]:
        config, new = model.config, self.sampling.max_new_tokens
        room = 2**30 if config.context_length is None else config.context_length
        if not model.encoder_decoder:
            room -= new
        task = Task("prompts", self.store, Supervised())  # the objective is not looked at
        source = PromptSource(task, split, 1, {}, config.architecture, room, self.seed)
        if model.vocabulary is not None and source.vocabulary != model.vocabulary:
            raise ValueError(
                f"the prompts in {self.store} were made with the vocabulary {source.vocabulary.fingerprint}, "
                f"the model {self.model} has {model.vocabulary.fingerprint}: make them with the model's."
            )
        return source.first(self.limit)

    def _answers(
        self, model: Model, prompts: Sequence[Prompt], split: str, scorer: scoring.Scorer
    ) -> list[list[Sample]]:
        step = max(self.sampling.batch_size // self.n, 1)
        groups: list[list[Sample]] = []
        with console.progress(f"answering {split}", total=len(prompts), unit="prompts") as bar:
            for start in range(0, len(prompts), step):
                part = prompts[start : start + step]
                seed = rollouts.seed_of(self.seed, split, start)
                drawn = rollouts.draw(
                    model.engine, part, model.text_vocabulary(), self.sampling, self.n, seed
                )
                scores = scorer.score(
                    [prompt.record for prompt in part],
                    [prompt.text for prompt in part],
                    [[sample.completion for sample in group] for group in drawn],
                    may_fail=start > 0,
                )
                scoring.tell(scores)
                for i, group in enumerate(drawn):
                    for j, sample in enumerate(group):
                        parts = {name: float(values[i, j]) for name, values in scores.parts.items()}
                        sample.rewards = {n: x if math.isfinite(x) else None for n, x in parts.items()}
                        sample.reward = float(scores.total[i, j])
                        if scores.failed[i, j]:
                            sample.failed = "a reward failed"
                groups += drawn
                bar.advance(len(part))
        return groups

    def _chosen(self, group: Sequence[Sample]) -> list[Sample]:
        """Which answers to a prompt are kept; of equal ones the first."""
        least = -math.inf if self.threshold is None else self.threshold
        good = [s for s in group if s.reward >= least and math.isfinite(s.reward) and s.finish == "stop"]
        if self.keep == "best":
            return [max(good, key=lambda sample: sample.reward)] if good else []
        return list({sample.completion: sample for sample in reversed(good)}.values())[::-1]


def _best_of(rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """The mean reward of the best of k answers, for k = 1, 2, 4, …, n: the mean over all choices of k of the
    n drawn (as Chen et al. 2021 estimate pass@k, which it is for rewards of 0 and 1).
    """
    values = np.sort(np.array(rewards, np.float64), axis=1)  # [prompts, n], ascending
    values = np.where(np.isfinite(values), values, 0.0)
    n = values.shape[1]
    found = {}
    for k in sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n}):
        # The i-th smallest is the best of C(i, k - 1) of the C(n, k) choices.
        shares = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
        found[f"best_of_{k}"] = float((values * shares).sum(axis=1).mean())
    return found
