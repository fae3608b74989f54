"""The methods of reinforcement learning: what each means in numbers, and its loss as the training step takes
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5style.models.config import TransformerConfig
from t5style.parallel import rules
from t5style.train import likelihood
from t5style.train.losses import Metrics, router_losses
from t5style.tune import advantages, policy_losses
from t5style.tune.policy_losses import AdaptiveKL

Batch = Mapping[str, jax.Array]

VALUE_HEAD = "value_head"

# What stands beside T5X's features in a batch: f32, of tokens [rows, length], and of rows [rows].
OF_TOKENS = ("advantages", "old_log_likelihoods", "sampler_log_likelihoods", "reference_log_likelihoods")
OF_VALUES = ("old_values", "returns")
FIGURES = ("reward", "answer_tokens", "truncated", "reward_failed", "uniform", "resampled", "spread")
# A reward's own figure.
PART = "reward/"

# method -> (advantages, ratio per, aggregation, clip_low, clip_high, kl, where the KL goes, estimator)
METHODS: dict[str, tuple[str, str, str, float, float, float, str, str]] = {
    # Shao et al. 2024, "DeepSeekMath"
    "grpo": ("group", "token", "sequence", 0.2, 0.2, 0.04, "loss", "k3"),
    # Liu et al. 2025, "Understanding R1-Zero-like training"
    "dr_grpo": ("centred", "token", "constant", 0.2, 0.2, 0.0, "loss", "k3"),
    # Yu et al. 2025, "DAPO"
    "dapo": ("group", "token", "token", 0.2, 0.28, 0.0, "loss", "k3"),
    # Zheng et al. 2025, "Group sequence policy optimization" (§5.1 for the clip)
    "gspo": ("group", "sequence", "sequence", 3e-4, 4e-4, 0.0, "loss", "k3"),
    # Ahmadian et al. 2024, "Back to basics"
    "rloo": ("leave_one_out", "product", "sequence", 0.2, 0.2, 0.05, "reward", "k1"),
    # Hu et al. 2025, "REINFORCE++"
    "reinforce_pp": ("global", "token", "token", 0.2, 0.2, 0.01, "reward", "k1"),
    # Schulman et al. 2017; Ouyang et al. 2022 for the KL
    "ppo": ("gae", "token", "token", 0.2, 0.2, 0.05, "reward", "k1"),
}
GROUPED = ("group", "centred", "leave_one_out")


@dataclasses.dataclass(frozen=True)
class Method:
    """A method and its numbers; None stands for what its authors take, see METHODS.

    Attributes:
      name: 'grpo', 'dr_grpo', 'dapo', 'gspo', 'rloo', 'reinforce_pp' or 'ppo'.
      clip_low, clip_high, clip_ratio: see policy_losses.clipped_surrogate.
      ratio: 'token', 'sequence' or 'product', see policy_losses.log_ratio.
      aggregation: 'token', 'sequence' or 'constant', see policy_losses.aggregate.
      kl: how much the divergence from the reference, the model at the start, counts; 0: there is none.
      kl_in: 'loss': it is added to the loss of each token; 'reward': it is taken from the reward.
      kl_estimator: 'k1', 'k2' or 'k3', see policy_losses.divergence.
      adaptive_kl: moves kl from rollout to rollout; None: it stays.
      entropy: how much the policy's entropy, per token, is rewarded.
      gamma, lam: of 'ppo' and 'reinforce_pp' the discount; of 'ppo' GAE's lambda.
      value_weight, value_clip: of 'ppo', how much the value head's loss counts, and its clip.
    """

    name: str = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    clip_ratio: float | None = None
    ratio: str | None = None
    aggregation: str | None = None
    kl: float | None = None
    kl_in: str | None = None
    kl_estimator: str | None = None
    adaptive_kl: AdaptiveKL | None = None
    entropy: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    value_weight: float = 0.1
    value_clip: float | None = 0.2

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise ValueError(f"method is {self.name!r}; it must be one of {', '.join(map(repr, METHODS))}.")
        _, ratio, aggregation, low, high, kl, kl_in, estimator = METHODS[self.name]
        given_low = self.clip_low
        for field, value in (
            ("clip_low", low),
            ("clip_high", high if given_low is None else max(high, given_low)),
            ("ratio", ratio),
            ("aggregation", aggregation),
            ("kl", kl),
            ("kl_in", kl_in),
            ("kl_estimator", estimator),
        ):
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        for field, choices in (
            ("ratio", policy_losses.RATIOS),
            ("aggregation", policy_losses.AGGREGATIONS),
            ("kl_in", ("loss", "reward")),
            ("kl_estimator", policy_losses.KL_ESTIMATORS),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(map(repr, choices))}."
                )
        for field in ("clip_low", "clip_high", "kl", "entropy", "value_weight"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be 0 or more.")
        for field in ("gamma", "lam"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must lie in [0, 1].")
        if self.adaptive_kl is not None and not self.kl:
            raise ValueError("adaptive_kl moves kl, which is 0: set kl to what it starts from, as 0.05.")

    @property
    def kind(self) -> str:
        """Which advantages: 'group', 'centred', 'leave_one_out', 'global' or 'gae'."""
        return METHODS[self.name][0]

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads that are trained beside the model."""
        return (VALUE_HEAD,) if self.kind == "gae" else ()

    def advantages(
        self,
        rewards: np.ndarray,
        keep: np.ndarray,
        mask: np.ndarray,
        divergence: np.ndarray,
        values: np.ndarray,
        coefficient: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Advantages and returns of tokens, float64 `[rows, length]`, 0 beside the answers.

        Args:
          rewards: `[prompts, n]`.
          keep: bool `[prompts, n]`, which of them count.
          mask: `[rows, length]`, rows = prompts · n, 1 on the answers' tokens.
          divergence: of tokens, from the reference, by the method's estimator; zeros without one.
          values: of tokens, by the value head; zeros without one.
          coefficient: of the divergence.
        """
        mask = np.asarray(mask) > 0
        cost = coefficient if self.kl_in == "reward" else 0.0
        if self.kind in GROUPED:
            answers = np.where(mask, divergence, 0.0).sum(axis=1).reshape(rewards.shape)
            function = {
                "group": advantages.group_normalized,
                "centred": advantages.group_centred,
                "leave_one_out": advantages.leave_one_out,
            }[self.kind]
            found = function(rewards - cost * answers, keep).reshape(-1, 1)  # [prompts, n] -> [rows, 1]
            return np.where(mask, found, 0.0), np.zeros(mask.shape)
        counted = mask & keep.reshape(-1, 1)
        of_tokens = advantages.token_rewards(rewards.reshape(-1), mask, divergence, cost)
        if self.kind == "global":
            to_go = advantages.rewards_to_go(of_tokens, mask, self.gamma)
            return advantages.normalized(to_go, counted), to_go
        found, returns = advantages.generalized(of_tokens, values, mask, self.gamma, self.lam)
        return advantages.normalized(found, counted), returns


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What the trained model says of a batch, each f32 `[rows, length]`: log-likelihoods of the targets and
    entropies at its temperature, and values (None without a value head); and the routers' statistics.
    """

    log_likelihoods: jax.Array
    entropy: jax.Array
    values: jax.Array | None
    routers: Any


def outputs(
    config: TransformerConfig, params: Any, batch: Batch, temperature: float, learns_entropy: bool = False
) -> Outputs:
    """See Outputs; 0 where loss weights are 0. Without dropout, as the sampler: the ratio of the policy to
    itself is 1. learns_entropy: the entropies have a gradient.
    """
    hidden, routers = likelihood.hidden_states(config, params, batch, None)  # [rows, length, embed]
    shape = hidden.shape[:2]
    flat = hidden.reshape(-1, hidden.shape[-1])  # [rows · length, embed]
    values = None
    if VALUE_HEAD in params:
        head = params[VALUE_HEAD]
        values = (flat.astype(jnp.float32) @ head["kernel"] + head["bias"]).reshape(shape)

    def told(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        """Log-likelihoods and entropies, [2, positions]."""
        logits = likelihood.logits(config, params, hidden) / temperature  # [positions, vocab]
        kept = logits if learns_entropy else jax.lax.stop_gradient(logits)
        return jnp.stack([likelihood.of_targets(logits, targets), policy_losses.entropy(kept)])

    found = _of_wanted(
        told, flat, batch["decoder_target_tokens"].reshape(-1), batch["decoder_loss_weights"].reshape(-1) > 0
    )
    return Outputs(found[0].reshape(shape), found[1].reshape(shape), values, routers)


def _of_wanted(told: Any, hidden: jax.Array, targets: jax.Array, wanted: jax.Array) -> jax.Array:
    """`told` of the positions that are wanted, [2, positions], 0 of the others: as likelihood.of_wanted, the
    logits of few positions are in memory at once, and prompts and padding have none.
    """
    targets = jnp.asarray(targets)  # a batch may come as NumPy's
    count, piece = len(targets), likelihood.PIECE
    mesh = rules.current_mesh()
    if count <= piece or (mesh is not None and mesh.size > 1):
        return jnp.where(wanted, told(hidden, targets), 0.0)
    order = jnp.argsort(~wanted, stable=True)  # the wanted ones first
    pieces = -(-count // piece)
    places = jnp.pad(order, (0, pieces * piece - count)).reshape(pieces, piece)
    many = wanted.sum()

    @jax.checkpoint
    def one(number: jax.Array, places: jax.Array) -> jax.Array:
        return jax.lax.cond(
            number * piece < many,
            lambda: told(hidden[places], targets[places]),
            lambda: jnp.zeros((2, piece), jnp.float32),
        )

    parts = jax.lax.map(lambda item: one(*item), (jnp.arange(pieces), places))  # [pieces, 2, piece]
    flat = parts.swapaxes(0, 1).reshape(2, -1)[:, :count]
    return jnp.where(wanted, jnp.zeros((2, count)).at[:, order].set(flat), 0.0)


def log_likelihoods(
    config: TransformerConfig, params: Any, batch: Batch, temperature: float
) -> dict[str, jax.Array]:
    """'log_likelihoods' and, of a model with a value head, 'values', 0 beside the answers."""
    found = outputs(config, params, batch, temperature)
    mask = batch["decoder_loss_weights"]
    result = {"log_likelihoods": policy_losses.masked(found.log_likelihoods, mask)}
    if found.values is not None:
        result["values"] = policy_losses.masked(found.values, mask)
    return result


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """The loss of a method, see train.step.Loss.

    The batch holds the answers in T5X's features, loss weights 1 on their tokens, and what OF_TOKENS,
    OF_VALUES (with a value head), FIGURES and PART name, and 'kl_coefficient' `[rows]`.

    Attributes:
      config: the model.
      method: see Method.
      temperature: at which the answers were drawn.
      length: the longest possible answer.
    """

    config: TransformerConfig
    method: Method
    temperature: float = 1.0
    length: int = 1

    def __call__(
        self, params: Any, batch: Batch, dropout_key: jax.Array | None, reference: Any = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """See train.step.Loss."""
        method, mask = self.method, batch["decoder_loss_weights"]
        found = outputs(self.config, params, batch, self.temperature, bool(method.entropy))
        new, old = found.log_likelihoods, batch["old_log_likelihoods"]
        assert method.ratio is not None and method.clip_low is not None  # noqa: PT018
        assert method.aggregation is not None and method.kl_estimator is not None  # noqa: PT018
        ratios = policy_losses.log_ratio(new, old, mask, method.ratio)
        losses, clipped = policy_losses.clipped_surrogate(
            ratios, batch["advantages"], method.clip_low, method.clip_high, method.clip_ratio
        )
        tokens = (mask > 0).sum().astype(jnp.float32)

        def of_tokens(values: jax.Array) -> tuple[jax.Array, jax.Array]:
            return policy_losses.masked(values, mask).sum(), tokens

        metrics: Metrics = {
            "policy_loss": policy_losses.aggregate(losses, mask, method.aggregation, self.length),
            "entropy": of_tokens(found.entropy),
            "clipped": of_tokens(clipped.astype(jnp.float32)),
            "ratio": of_tokens(jnp.exp(ratios)),
            "kl_old": of_tokens(policy_losses.divergence(old, new, "k3")),
            "mismatch": of_tokens(jnp.abs(batch["sampler_log_likelihoods"] - old)),
            "mismatch_kl": of_tokens(batch["sampler_log_likelihoods"] - old),
        }
        worst = jnp.abs(policy_losses.masked(batch["sampler_log_likelihoods"] - old, mask)).max()
        metrics["mismatch_max"] = (worst, jnp.float32(1.0))
        if method.kl:
            far = policy_losses.divergence(new, batch["reference_log_likelihoods"], method.kl_estimator)
            metrics["kl"] = of_tokens(far)
            metrics["kl_coefficient"] = (batch["kl_coefficient"].mean(), jnp.float32(1.0))
            if method.kl_in == "loss":
                losses = losses + batch["kl_coefficient"][:, None] * far
        if method.entropy:
            losses = losses - method.entropy * found.entropy
        if found.values is not None:
            errors = policy_losses.value_loss(
                found.values, batch["old_values"], batch["returns"], method.value_clip
            )
            metrics["value_loss"] = of_tokens(errors)
            losses = losses + method.value_weight * errors
        objective, weight = policy_losses.aggregate(losses, mask, method.aggregation, self.length)
        if self.config.moe is not None and found.routers:
            added, figures = router_losses(list(found.routers.values()), self.config.moe, weight)
            objective, metrics = objective + added, metrics | figures
        for name in [name for name in batch if name in FIGURES or name.startswith(PART)]:
            known = jnp.isfinite(batch[name])  # a reward that failed is NaN
            metrics[name] = jnp.where(known, batch[name], 0.0).sum(), known.sum().astype(jnp.float32)
        return objective, weight, {"loss": (objective, weight), **metrics}
