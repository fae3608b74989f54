"""What happens between two rollouts: prompts are drawn, answered, judged, compared, and written down."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from t5style.data.pipeline import Batch
from t5style.data.random import mix, seed_of
from t5style.infer.engine import Engine
from t5style.infer.ids import token_ids
from t5style.parallel import rules
from t5style.run_dir import UserError
from t5style.train.loop import Loop
from t5style.tune import advantages, policy, policy_losses, rollouts, scoring
from t5style.tune.prompts import Prompt, PromptSource
from t5style.tune.rollouts import Sample
from t5style.tune.scoring import Scorer, Scores

if TYPE_CHECKING:
    from t5style.tune.reinforce import Reinforce


class Sampler:
    """Makes the rollouts of a run.

    Args:
      job: the run's settings, resolved.
      run: its folder; None where nothing is written.
      source: the prompts.
      mesh: of the parameters.
      frozen: see TrainingProgram.freeze.
      scorer: the rewards.
    """

    def __init__(
        self,
        job: Reinforce,
        run: epath.Path | None,
        source: PromptSource,
        mesh: Mesh,
        frozen: Any,
        scorer: Scorer,
    ) -> None:
        assert job.model is not None
        self.job, self.run, self.source, self.mesh, self.frozen = job, run, source, mesh, frozen
        self.config, self.scorer, self.sides = job.model, scorer, job.program.sides()
        self.ids = token_ids(source.vocabulary)

    # --- models ---

    def _merged(self, params: Any) -> Any:
        """All of the model's parameters, and the heads'."""
        return params if self.job.adapter is None else self.job.merged(params, self.frozen)

    def engine(self, params: Any) -> Engine:
        """What decodes with these trained parameters."""
        whole = {
            name: value for name, value in self._merged(params).items() if name not in self.job.method.heads
        }
        return Engine(self.config, whole, self.ids, self.mesh, self.job.rules)

    def _look(self, params: Any, batch: Batch) -> dict[str, np.ndarray]:
        """policy.log_likelihoods of a batch of any number of rows, some at a time."""
        names = [name for name in batch if name.startswith(("encoder_", "decoder_"))]
        count, step = len(batch["decoder_input_tokens"]), self.job.rows
        look = _look_at(self.config, self.job.sampling.temperature)
        found: dict[str, list[np.ndarray]] = {}
        for start in range(0, count, step):
            part = {name: batch[name][start : start + step] for name in names}
            for name, value in look(params, dict(rules.put_batch(part, self.mesh))).items():
                found.setdefault(name, []).append(np.asarray(jax.device_get(value)))
        return {name: np.concatenate(values) for name, values in found.items()}

    # --- rollouts ---

    def rollout(self, batch: int, is_begun: bool, loop: Loop) -> list[Sample]:
        """The rollout whose first update is of this batch: from its file, where the same policy has made it,
        or anew.

        is_begun: updates have been made with it.
        """
        assert self.run is not None
        file = rollouts.file_of(self.run, batch)
        samples = rollouts.read(file)
        if is_begun:
            if samples is None:
                raise UserError(
                    f"{file} is missing or damaged, and the run was stopped in the middle of learning from "
                    "it: bring it back, or choose another RUN_DIR with init_from this run."
                )
            return samples
        print_ = float(_fingerprint(loop.params))
        if samples is not None and samples[0].policy == print_:
            return samples
        samples = self._make(batch, loop.params)
        for sample in samples:
            sample.step, sample.policy = batch, print_
        rollouts.write(file, samples)
        page = self.run / rollouts.FOLDER / rollouts.PAGE
        rollouts.write_page(page, samples, f"{self.run.name}: the rollout of step {batch}")
        return samples

    def _make(self, batch: int, params: Any) -> list[Sample]:
        job = self.job
        number = batch // job.updates
        engine = self.engine(params)
        groups: list[list[Sample]] = []
        resampled, tries = 0, job.dynamic_tries or 0
        for attempt in range(tries + 1):
            # Always as many, so that nothing is compiled anew; what is too many is not used.
            stream = ("again", attempt) if attempt else ()
            prompts = self.source.drawn(number * job.prompts, job.prompts, stream)
            drawn = rollouts.draw(
                engine,
                prompts,
                self.source.vocabulary,
                job.sampling,
                job.group,
                seed_of(job.seed, "answers", batch, attempt),
            )
            self._judge(prompts, drawn)
            self._shape(drawn)
            missing = job.prompts - len(groups)
            uneven = [group for group in drawn if _spread(group) > 0]
            even = [group for group in drawn if not _spread(group) > 0]
            if attempt < tries:
                groups += uneven[:missing]
                resampled = job.prompts - len(uneven) if attempt == 0 else resampled
            else:  # what is even fills the batch: it teaches nothing
                groups += drawn if not tries else [*uneven, *even][:missing]
            if len(groups) == job.prompts:
                break
        del engine
        return self._compared(groups, params, self._coefficient(batch), resampled)

    def _judge(
        self, prompts: Sequence[Prompt], groups: Sequence[list[Sample]], may_fail: bool = False
    ) -> Scores:
        """Puts rewards into the samples."""
        job = self.job
        scores = self.scorer.score(
            [prompt.record for prompt in prompts],
            [prompt.text for prompt in prompts],
            [[sample.completion for sample in group] for group in groups],
            may_fail=may_fail,
        )
        scoring.tell(scores)
        happened = {(i, j): f"{name}: {what}" for i, j, name, what in scores.failures}
        for i, group in enumerate(groups):
            for j, sample in enumerate(group):
                parts = {name: float(values[i, j]) for name, values in scores.parts.items()}
                sample.rewards = {name: x if math.isfinite(x) else None for name, x in parts.items()}
                sample.reward = float(scores.total[i, j])
                sample.failed = happened.get((i, j))
                is_masked = job.overlong == "mask" and sample.finish == "length"
                sample.learned = not is_masked and not self._is_dropped(sample)
        return scores

    def _shape(self, groups: Sequence[list[Sample]]) -> None:
        """What the answers' lengths cost, in training only."""
        limit, buffer = self.job.sampling.max_new_tokens, self.job.overlong_buffer
        if self.job.overlong == "soft":
            for group in groups:
                for sample in group:
                    sample.reward += rollouts.soft_overlong(len(sample.tokens), limit, buffer)

    def _is_dropped(self, sample: Sample) -> bool:
        return sample.failed is not None and self.job.reward_failure is None

    def _coefficient(self, batch: int) -> float:
        """The KL coefficient of a rollout: moved by the divergence of the one before it."""
        method = self.job.method
        assert self.run is not None and method.kl is not None  # noqa: PT018
        if method.adaptive_kl is None or batch == 0:
            return method.kl
        before = rollouts.read(rollouts.file_of(self.run, batch - self.job.updates))
        if before is None:
            return method.kl
        measured = np.mean(
            [sum(s.log_likelihoods) - sum(s.reference_log_likelihoods) for s in before], dtype=np.float64
        )
        return method.adaptive_kl(before[0].kl_coefficient, float(measured), len(before))

    def _compared(
        self, groups: Sequence[list[Sample]], params: Any, coefficient: float, resampled: int
    ) -> list[Sample]:
        """The samples with log-likelihoods, advantages and figures."""
        job, method = self.job, self.job.method
        samples = [sample for group in groups for sample in group]
        batch = rollouts.lay_out(samples, self.sides, self.ids.start)
        where = rollouts.places(samples, self.sides)
        # Of all answers, also of those that are not learnt from.
        whole = batch | {"decoder_loss_weights": np.zeros_like(batch["decoder_loss_weights"])}
        for row, place in enumerate(where):
            whole["decoder_loss_weights"][row, place] = 1
        ours = self._look(self._merged(params), whole)
        mask = batch["decoder_loss_weights"]
        zeros = np.zeros(mask.shape, np.float32)
        reference: np.ndarray = zeros
        divergence: np.ndarray = zeros
        if method.kl:
            assert method.kl_estimator is not None
            reference = self._look(job.program.reference(self.frozen), whole)["log_likelihoods"]
            divergence = np.asarray(
                policy_losses.divergence(
                    jnp.asarray(ours["log_likelihoods"]), jnp.asarray(reference), method.kl_estimator
                )
            )
        values = ours.get("values", zeros)
        rewards = np.array([[sample.reward for sample in group] for group in groups])
        keep = np.array([[not self._is_dropped(sample) for sample in group] for group in groups])
        found, returns = method.advantages(rewards, keep, mask, divergence, values, coefficient)
        for row, (sample, place) in enumerate(zip(samples, where, strict=True)):
            sample.advantages = _floats(found[row, place])
            sample.returns = _floats(returns[row, place]) if method.heads else []
            sample.log_likelihoods = _floats(ours["log_likelihoods"][row, place])
            sample.reference_log_likelihoods = _floats(reference[row, place]) if method.kl else []
            sample.values = _floats(values[row, place]) if method.heads else []
            sample.kl_coefficient = coefficient
        spread = advantages.group_spread(rewards, keep)
        for i, group in enumerate(groups):
            for sample in group:
                sample.figures = {
                    "reward": sample.reward,
                    "answer_tokens": float(len(sample.tokens)),
                    "truncated": float(sample.finish == "length"),
                    "reward_failed": float(sample.failed is not None),
                    "uniform": float(spread[i] == 0),
                    "resampled": resampled / job.prompts,
                    "spread": float(spread[i]),
                }
        return samples

    # --- batches ---

    def arrays(self, samples: Sequence[Sample]) -> Batch:
        """The rollout as one batch of all its rows, with all that the loss looks at."""
        batch = rollouts.lay_out(samples, self.sides, self.ids.start)
        sampled = rollouts.of_tokens(samples, "sampler_log_likelihoods", self.sides)
        trained = rollouts.of_tokens(samples, "log_likelihoods", self.sides)
        batch |= {
            "advantages": rollouts.of_tokens(samples, "advantages", self.sides),
            "old_log_likelihoods": trained if self.job.old == "trainer" else sampled,
            "sampler_log_likelihoods": sampled,
            "reference_log_likelihoods": rollouts.of_tokens(samples, "reference_log_likelihoods", self.sides),
            "kl_coefficient": np.array([sample.kl_coefficient for sample in samples], np.float32),
        }
        if self.job.method.heads:
            batch["old_values"] = rollouts.of_tokens(samples, "values", self.sides)
            batch["returns"] = rollouts.of_tokens(samples, "returns", self.sides)
        for name in policy.FIGURES:
            batch[name] = np.array([sample.figures[name] for sample in samples], np.float32)
        for name in self.job.rewards:
            given = [sample.rewards[name] for sample in samples]
            values = [math.nan if value is None else value for value in given]
            batch[policy.PART + name] = np.array(values, np.float32)
        return batch

    def order(self, number: int, epoch: int, rows: int) -> np.ndarray:
        """The order in which an epoch goes through the rows of rollout `number`."""
        seed = np.uint64(seed_of(self.job.seed, "minibatches", number, epoch))
        with np.errstate(over="ignore"):
            return np.argsort(mix(np.arange(rows, dtype=np.uint64) + seed), kind="stable")

    # --- evaluation ---

    def evaluate(
        self, params: Any, prompts: Sequence[Prompt], stopping: Callable[[], bool]
    ) -> dict[str, float] | None:
        """Mean rewards of greedy answers, with the standard error of the total's; None once stopping() is
        true.
        """
        engine, size = self.engine(params), self.job.sampling.batch_size
        samples: list[Sample] = []
        for start in range(0, len(prompts), size):
            if stopping():
                return None
            part = prompts[start : start + size]
            groups = rollouts.greedy(engine, part, self.source.vocabulary, self.job.sampling)
            self._judge(part, groups, may_fail=True)
            samples += [group[0] for group in groups]
        totals = np.array([sample.reward for sample in samples])
        figures = {
            "reward": float(totals.mean()),
            "reward_error": float(totals.std(ddof=1) / math.sqrt(len(totals))) if len(totals) > 1 else 0.0,
            "prompts": float(len(totals)),
            "answer_tokens": float(np.mean([len(sample.tokens) for sample in samples])),
            "truncated": float(np.mean([sample.finish == "length" for sample in samples])),
            "reward_failed": float(np.mean([sample.failed is not None for sample in samples])),
        }
        for name in self.job.rewards:
            known = [value for sample in samples if (value := sample.rewards[name]) is not None]
            figures[policy.PART + name] = float(np.mean(known)) if known else math.nan
        return figures


def _spread(group: Sequence[Sample]) -> float:
    rewards = [sample.reward for sample in group if sample.learned]
    return max(rewards) - min(rewards) if rewards else 0.0


def _floats(values: np.ndarray) -> list[float]:
    """Float32 numbers as JSON keeps them exactly."""
    return np.asarray(values, np.float32).tolist()


@functools.lru_cache(maxsize=8)
def _look_at(config: Any, temperature: float) -> Any:
    return jax.jit(functools.partial(_look, config, temperature))


def _look(config: Any, temperature: float, params: Any, batch: Any) -> dict[str, jax.Array]:
    return policy.log_likelihoods(config, params, batch, temperature)


@jax.jit
def _fingerprint(params: Any) -> jax.Array:
    """A number that another policy hardly has."""
    return sum((jnp.abs(leaf).astype(jnp.float32).sum() for leaf in jax.tree.leaves(params)), jnp.float32(0))
