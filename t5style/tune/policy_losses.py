"""Losses of policies, as functions of log-likelihoods.

Arrays are float32 `[rows, length]` unless said otherwise, with `mask` 1 on the tokens of the answers. What
is minimised comes as (sum, weight), whose quotient is the loss, so that microbatches and devices can be added
(see train.step.Loss).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token", "sequence", "constant")
RATIOS = ("token", "sequence", "product")

Pair = tuple[jax.Array, jax.Array]


def masked(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The values where the mask is above 0, else 0, whatever stands there."""
    return jnp.where(mask > 0, values, 0.0)


def sequence_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over each row's tokens, `[rows]`; 0 of none."""
    return masked(values, mask).sum(axis=-1) / jnp.maximum((mask > 0).sum(axis=-1), 1)


def log_ratio(new: jax.Array, old: jax.Array, mask: jax.Array, per: str = "token") -> jax.Array:
    """Log of how much more probable the policy makes what was sampled than the one it was sampled from.

    per: 'token' for each token by itself (PPO, GRPO); 'product' for that of the whole answer, of all its
    tokens together (RLOO, an answer being one action; as in TRL), the same for all tokens of a row;
    'sequence' for GSPO's, the geometric mean of the tokens' (Zheng et al. 2025, "Group sequence policy
    optimization", equation 7).
    """
    if per not in RATIOS:
        raise ValueError(f"the ratio is per {per!r}; it must be one of {', '.join(RATIOS)}.")
    tokens = masked(new - old, mask)
    if per == "token":
        return tokens
    of_rows = sequence_mean(tokens, mask) if per == "sequence" else tokens.sum(axis=-1)
    return jnp.broadcast_to(of_rows[:, None], tokens.shape)


def clipped_surrogate(
    log_ratios: jax.Array,
    advantages: jax.Array,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    clip_ratio: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """PPO's loss of each token, and where the clip held it (Schulman et al. 2017, equation 7).

    Args:
      log_ratios: see `log_ratio`.
      advantages: `[rows, length]` or `[rows, 1]`.
      clip_low, clip_high: the ratio counts from 1 - clip_low to 1 + clip_high; a clip_high above clip_low is
        DAPO's clip-higher (Yu et al. 2025, equation 10). None: as clip_low.
      clip_ratio: the ratio counts up to this also where the advantage is negative (dual clip, Ye et al. 2020,
        equation 5; TRL's `delta`); None: without bound.
    """
    high = clip_low if clip_high is None else clip_high
    ratio = jnp.exp(log_ratios)
    held = jnp.clip(ratio, 1 - clip_low, 1 + high)
    free = ratio if clip_ratio is None else jnp.minimum(ratio, clip_ratio)
    clipped = held * advantages < free * advantages
    return -jnp.minimum(free * advantages, held * advantages), clipped


def reinforce(new: jax.Array, advantages: jax.Array) -> jax.Array:
    """REINFORCE's loss of each token (Williams 1992): minus the advantage times the log-likelihood."""
    return -advantages * new


def divergence(new: jax.Array, other: jax.Array, estimator: str = "k3") -> jax.Array:
    """Estimates of KL(policy || other) at each token, from the log-likelihoods of tokens that the policy
    drew (Schulman 2020, "Approximating KL divergence"): k1 without bias; k2 with little variance, biased; k3
    without bias, never negative, what GRPO uses (Shao et al. 2024, equation 4).
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"the KL estimator is {estimator!r}; it must be one of {', '.join(KL_ESTIMATORS)}.")
    difference = new - other
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * jnp.square(difference)
    return jnp.exp(-difference) - 1 + difference


def aggregate(losses: jax.Array, mask: jax.Array, how: str, length: int = 1) -> Pair:
    """Losses of tokens as (sum, weight).

    Args:
      losses, mask: `[rows, length]`. Rows without a token weigh nothing.
      how: 'token': every token weighs the same (DAPO, equation 8); 'sequence': every answer does, its tokens
        share that (GRPO, equation 3); 'constant': every token does, divided by the rows and a constant, so
        that neither a step's tokens nor an answer's length changes a token's weight (Dr. GRPO, §3.2).
      length: of 'constant', the longest possible answer.
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"the loss is aggregated by {how!r}; it must be one of {', '.join(AGGREGATIONS)}.")
    losses = masked(losses, mask)
    rows = (mask > 0).any(axis=-1).sum().astype(jnp.float32)
    if how == "token":
        return losses.sum(), (mask > 0).sum().astype(jnp.float32)
    if how == "sequence":
        return sequence_mean(losses, mask).sum(), rows
    return losses.sum() / length, rows


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float | None = 0.2
) -> jax.Array:
    """Half the squared error of each token's value, the worse of that and of the value held within `clip` of
    the one at sampling (Schulman et al.'s code; Ouyang et al. 2022, TRL's `cliprange_value`); None: no clip.
    """
    error = jnp.square(values - returns)
    if clip is None:
        return 0.5 * error
    held = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum(error, jnp.square(held - returns))


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy in nats of softmax(logits), `[...]` of `[..., vocab]`."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)


@dataclasses.dataclass(frozen=True)
class AdaptiveKL:
    """Moves the KL coefficient so that the divergence comes near a target (Ziegler et al. 2019, §2.2).

    Attributes:
      target: of the divergence of an answer, in nats: the sum over its tokens.
      horizon: answers after which an error of 20 % has moved the coefficient by 20 % (their K is 0.1: a
        horizon of ten times the answers of a rollout).
      clip: the error that counts at most.
    """

    target: float = 6.0
    horizon: float = 10_000.0
    clip: float = 0.2

    def __post_init__(self) -> None:
        for name in ("target", "horizon", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")

    def __call__(self, coefficient: float, measured: float, answers: int) -> float:
        """The next coefficient, after a rollout of so many answers with this mean divergence."""
        error = min(max(measured / self.target - 1.0, -self.clip), self.clip)
        return coefficient * (1.0 + error * answers / self.horizon)
