"""What is learnt from preferences: the methods' settings, and their loss as the training step takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5style.models.config import TransformerConfig
from t5style.nn.moe import RouterStats
from t5style.train import likelihood
from t5style.train.losses import Metrics, router_losses
from t5style.tune import preference_losses as losses

Batch = Mapping[str, jax.Array]

# Method -> default of beta; all but the last three compare with a reference model.
BETAS = {
    "dpo": 0.1,
    "hinge": 0.1,
    "ipo": 0.1,
    "robust": 0.1,
    "kto": 0.1,
    "cpo": 0.1,
    "orpo": 0.1,
    "simpo": 2.0,
}
WITHOUT_REFERENCE = ("cpo", "orpo", "simpo")
_SMOOTHED = ("dpo", "robust", "cpo", "simpo")
_BY_TOKEN = ("ipo", "orpo", "simpo")  # as their authors do
_SUMS_ONLY = ("kto",)

# The reference's log-likelihoods of a batch's rows, f32 [pairs, 2], where they were computed beforehand.
REFERENCE = "reference_log_likelihoods"


@dataclasses.dataclass(frozen=True)
class Preference:
    """A method and its numbers; the formulas stand in preference_losses.

    Attributes:
      method: 'dpo', 'hinge', 'ipo', 'robust', 'kto', 'cpo', 'orpo' or 'simpo'.
      beta: None for 0.1, of 'simpo' 2.0.
      label_smoothing: of 'dpo' (then conservative DPO), 'cpo' and 'simpo' the share of pairs thought to be
        labelled the wrong way round; of 'robust' that share as it is known.
      length_normalized: means of log-likelihoods per token are compared, not their sums; None for what the
        method's authors do: yes of 'ipo', 'orpo', 'simpo'.
      gamma: the margin of 'simpo'.
      nll_weight: how much the cross-entropy of the chosen answers, per token, is added; None for 1 of 'cpo'
        and 'orpo', else 0. Of 'dpo' it is that of Pang et al., "Iterative reasoning preference optimization"
        (2024), equation 1.
      desirable_weight, undesirable_weight: of 'kto'.
    """

    method: str = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    length_normalized: bool | None = None
    gamma: float = 1.0
    nll_weight: float | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in BETAS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(map(repr, BETAS))}.")
        if self.beta is not None and not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; it must lie in [0, 0.5): from a half on, the "
                "labels say nothing, or the opposite."
            )
        if self.label_smoothing and self.method not in _SMOOTHED:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, which the method {self.method!r} does not have: "
                f"leave it out, or choose one of {', '.join(map(repr, _SMOOTHED))}."
            )
        if self.method == "robust" and not self.label_smoothing:
            raise ValueError(
                "label_smoothing is 0, but the method 'robust' is told by it which share of the pairs is "
                "labelled wrong: set it, as 0.1, or choose 'dpo', which is the same at 0."
            )
        wanted = self.length_normalized
        if (wanted is False and self.method in ("orpo", "simpo")) or (wanted and self.method in _SUMS_ONLY):
            raise ValueError(
                f"length_normalized is {wanted}, but {self.method!r} is defined by "
                f"{'sums over' if wanted else 'means of'} an answer's tokens: leave it out."
            )
        for name in ("gamma", "nll_weight", "desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more.")
        if self.nll_weight and self.method == "kto":
            raise ValueError(
                f"nll_weight is {self.nll_weight}, but 'kto' learns from single answers, without a "
                "cross-entropy: leave it out."
            )

    @property
    def strength(self) -> float:
        """beta, or its default."""
        return BETAS[self.method] if self.beta is None else self.beta

    @property
    def by_token(self) -> bool:
        """Whether means per token are compared."""
        return self.method in _BY_TOKEN if self.length_normalized is None else self.length_normalized

    @property
    def nll(self) -> float:
        """nll_weight, or its default."""
        if self.nll_weight is not None:
            return self.nll_weight
        return float(self.method in ("cpo", "orpo"))

    @property
    def has_reference(self) -> bool:
        """Whether it compares with a reference model."""
        return self.method not in WITHOUT_REFERENCE

    @property
    def is_paired(self) -> bool:
        """Whether it learns from pairs, not from single answers that are desirable or not."""
        return self.method != "kto"

    def losses(self, chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        """Of pairs, f32 [pairs], given what the method compares."""
        beta, smoothing = self.strength, self.label_smoothing
        match self.method:
            case "dpo":
                return losses.dpo(chosen, rejected, beta, smoothing)
            case "hinge":
                return losses.hinge(chosen, rejected, beta)
            case "ipo":
                return losses.ipo(chosen, rejected, beta)
            case "robust":
                return losses.robust_dpo(chosen, rejected, beta, smoothing)
            case "cpo":
                return losses.cpo(chosen, rejected, beta, smoothing)
            case "orpo":
                return losses.orpo(chosen, rejected, beta)
            case "simpo":
                return losses.simpo(chosen, rejected, beta, self.gamma, smoothing)
        raise ValueError(f"{self.method!r} has no loss of pairs.")


class Answers(NamedTuple):
    """The answers of a batch as a model finds them.

    Attributes:
      log_likelihood: summed over an answer's tokens, f32 [rows].
      tokens: how many those are, f32 [rows]; 0 for padding.
      routers: of a model with experts, see likelihood.hidden_states.
    """

    log_likelihood: jax.Array
    tokens: jax.Array
    routers: dict[str, RouterStats]


def answers(
    config: TransformerConfig, params: Any, batch: Batch, dropout_key: jax.Array | None = None
) -> Answers:
    """What a model makes of the answers in a batch of rows [rows, length] or of pairs [pairs, 2, length],
    whose rows then are chosen, rejected, chosen, …
    """
    rows = likelihood.flatten_pairs(batch)
    hidden, routers = likelihood.hidden_states(config, params, rows, dropout_key)
    wanted = rows["decoder_loss_weights"] > 0
    found = likelihood.of_wanted(config, params, hidden, rows["decoder_target_tokens"], wanted)
    return Answers(found.sum(axis=-1), wanted.sum(axis=-1).astype(jnp.float32), routers)


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """Preferences as `train.step.Loss`; policy and reference read chosen and rejected rows in one pass each.

    Batches are data's: every array of tokens int32 [pairs, 2, length], index 0 chosen, 1 rejected; of 'kto'
    index 0 the example and 1 the same prompt with another answer, and `desirable` int32 [rows]. With
    `reference_log_likelihoods` f32 [pairs, 2] in the batch no reference model is read.

    The objective is a sum over pairs, its weight their number; pairs that are padding count nothing. What it
    needs of the batch as a whole are `batch_means`.

    Attributes:
      config: the model.
      preference: the method.
    """

    config: TransformerConfig
    preference: Preference = dataclasses.field(default_factory=Preference)

    def __call__(
        self, params: Any, batch: Batch, dropout_key: jax.Array | None, reference: Any = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """See `Loss`."""
        if not self.preference.is_paired:
            return self._kto(params, batch, dropout_key, reference)
        method = self.preference
        found = answers(self.config, params, batch, dropout_key)
        sums = found.log_likelihood.reshape(-1, 2)  # [2 · pairs] -> [pairs, 2]
        tokens = found.tokens.reshape(-1, 2)
        real = (tokens > 0).all(axis=1).astype(jnp.float32)
        ratios = sums - self._of_reference(batch, reference) if method.has_reference else sums
        compared = ratios / jnp.maximum(tokens, 1.0) if method.by_token else ratios
        each = method.losses(compared[:, 0], compared[:, 1])
        metrics = losses.pair_metrics(each, method.strength * compared, sums, real)
        objective, weight = metrics["loss"]
        metrics["nll"] = (jnp.sum(-sums[:, 0] * real), jnp.sum(tokens[:, 0] * real))
        if method.nll:
            mean_tokens = self._means(params, batch, reference)["mean_tokens"]
            objective = objective + method.nll * metrics["nll"][0] / jnp.maximum(mean_tokens, 1.0)
            metrics["loss"] = objective, weight
        return self._with_routers(objective, weight, metrics, found.routers)

    def _kto(
        self, params: Any, batch: Batch, dropout_key: jax.Array | None, reference: Any
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        method = self.preference
        own = _column(batch, 0)
        found = answers(self.config, params, own, dropout_key)
        real = (found.tokens > 0).astype(jnp.float32)
        ratios = found.log_likelihood - self._of_reference(own, reference)[:, 0]
        kl = losses.kto_kl(self._means(params, batch, reference)["mean_ratio"])
        desirable = batch["desirable"] > 0
        each = losses.kto(
            ratios, desirable, kl, method.strength, method.desirable_weight, method.undesirable_weight
        )
        rewards, wanted = method.strength * ratios, desirable.astype(jnp.float32)
        metrics = {
            "loss": losses.weighted(each, real),
            "kl": (kl * real.sum(), real.sum()),
            "reward_desirable": losses.weighted(rewards, real * wanted),
            "reward_undesirable": losses.weighted(rewards, real * (1.0 - wanted)),
            "log_likelihood_desirable": losses.weighted(found.log_likelihood, real * wanted),
            "log_likelihood_undesirable": losses.weighted(found.log_likelihood, real * (1.0 - wanted)),
        }
        return self._with_routers(*metrics["loss"], metrics, found.routers)

    def batch_means(
        self, params: Any, batch: Batch, reference: Any = None
    ) -> dict[str, tuple[jax.Array, jax.Array]]:
        """What the loss needs of the whole batch, as (sum, weight): of 'kto' the mean log-ratio of answers to
        other prompts; with a cross-entropy the mean number of tokens of a chosen answer. Without a gradient.

        The step adds these up over its microbatches and gives the means to the loss, in the batch: with
        accumulation the objective is that of the whole batch.
        """
        if self.preference.is_paired:
            if not self.preference.nll:
                return {}
            tokens = (batch["decoder_loss_weights"] > 0).sum(axis=-1).astype(jnp.float32)  # [pairs, 2]
            real = (tokens > 0).all(axis=1).astype(jnp.float32)
            return {"mean_tokens": losses.weighted(tokens[:, 0], real)}
        other = _column(batch, 1)
        found = answers(self.config, jax.lax.stop_gradient(params), other)
        ratios = found.log_likelihood - self._of_reference(other, reference, 1)[:, 0]
        return {"mean_ratio": losses.weighted(ratios, found.tokens > 0)}

    def _means(self, params: Any, batch: Batch, reference: Any) -> dict[str, jax.Array]:
        """The means that the step has put into the batch; else those of this batch."""
        pairs = self.batch_means(params, batch, reference)
        return {
            name: batch[name] if name in batch else total / jnp.maximum(weight, 1.0)
            for name, (total, weight) in pairs.items()
        }

    def _of_reference(self, batch: Batch, reference: Any, column: int = 0) -> jax.Array:
        """The reference's log-likelihoods, f32 [pairs, 2]; of rows without pairs [rows, 1]."""
        paired = batch["decoder_loss_weights"].ndim == 3
        if REFERENCE in batch:
            known = batch[REFERENCE]
            return known if paired else known[:, column : column + 1]
        found = answers(self.config, jax.lax.stop_gradient(reference), batch).log_likelihood
        return found.reshape(-1, 2 if paired else 1)

    def _with_routers(
        self, objective: jax.Array, weight: jax.Array, metrics: Metrics, routers: dict[str, RouterStats]
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        if self.config.moe is not None and routers:
            added, figures = router_losses(list(routers.values()), self.config.moe, weight)
            return objective + added, weight, metrics | figures
        return objective, weight, metrics


def _column(batch: Batch, column: int) -> dict[str, jax.Array]:
    """The first or the second row of each pair: arrays [pairs, 2, length] -> [pairs, length]."""
    return {name: value[:, column] if value.ndim == 3 else value for name, value in batch.items()}
