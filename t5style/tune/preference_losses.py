"""Losses of preference learning, as functions of log-likelihoods alone: no model, no batch, no reduction.

Two answers to a prompt x are told apart: the chosen y_w and the rejected y_l. Where a loss compares with a
reference model it is given log-ratios, log π(y|x) - log π_ref(y|x), of whole answers: sums over their tokens,
or means where the loss is said to be normalised by length. All arrays are float32 `[pairs]`, and so is every
loss: who calls divides by how many pairs there are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from t5style.train.losses import Metrics

# The largest mean log-likelihood of a token of which odds are taken: at 0 they are infinite.
_ALMOST_CERTAIN = -1e-6


def dpo(chosen: jax.Array, rejected: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """Direct preference optimisation: -log σ(β (ρ_w - ρ_l)), ρ the log-ratios.

    Rafailov et al., "Direct preference optimization" (2023), equation 7. With label smoothing ε it is the
    conservative form of Mitchell, "A note on DPO with noisy preferences" (2023): (1 - ε) of that and ε of the
    same with the answers exchanged. Of means per token in place of sums it is the length-normalised form of
    Lambert et al., "Tülu 3" (2024).

    Args:
      chosen, rejected: log-ratios f32 [pairs].
      beta: how much staying with the reference counts.
      label_smoothing: ε, the share of pairs that are thought to be labelled the wrong way round, in [0, 0.5).
    """
    margin = beta * (chosen - rejected)
    loss = -jax.nn.log_sigmoid(margin)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * jax.nn.log_sigmoid(-margin)
    return loss


def robust_dpo(chosen: jax.Array, rejected: jax.Array, beta: float, flipped: float) -> jax.Array:
    """DPO's loss without the bias of labels that are flipped with a known probability ε:
    ((1 - ε) L(y_w, y_l) - ε L(y_l, y_w)) / (1 - 2 ε).

    Chowdhury et al., "Provably robust DPO: aligning language models with noisy feedback" (2024).

    Args:
      chosen, rejected, beta: see `dpo`.
      flipped: ε in [0, 0.5).
    """
    margin = beta * (chosen - rejected)
    right, wrong = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    return ((1.0 - flipped) * right - flipped * wrong) / (1.0 - 2.0 * flipped)


def hinge(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """max(0, 1 - β (ρ_w - ρ_l)): SLiC's margin on log-ratios, normalised as in RSO.

    Zhao et al., "SLiC-HF" (2023); Liu et al., "Statistical rejection sampling improves preference
    optimization" (2024), the normalised hinge loss.
    """
    return jax.nn.relu(1.0 - beta * (chosen - rejected))


def ipo(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """Identity preference optimisation: (ρ_w - ρ_l - 1 / (2 τ))², τ = β.

    Azar et al., "A general theoretical paradigm to understand learning from human preferences" (2023),
    equation 17. Its authors' experiments take the log-ratios' means per token.
    """
    return jnp.square(chosen - rejected - 0.5 / beta)


def kto(
    ratios: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> jax.Array:
    """Kahneman-Tversky optimisation, of single answers: λ_D (1 - σ(β (ρ - z))) of a desirable one and
    λ_U (1 - σ(β (z - ρ))) of an undesirable one.

    Ethayarajh et al., "KTO: model alignment as prospect theoretic optimization" (2024), section 4.

    Args:
      ratios: the answers' log-ratios ρ, f32 [examples].
      desirable: 1 or 0, [examples].
      kl: z, f32 scalar, see `kto_kl`.
      beta: how averse to risk.
      desirable_weight, undesirable_weight: λ_D and λ_U.
    """
    gain = desirable_weight * jax.nn.sigmoid(beta * (kl - ratios))  # 1 - σ(a) = σ(-a)
    loss = undesirable_weight * jax.nn.sigmoid(beta * (ratios - kl))
    return jnp.where(desirable > 0, gain, loss)


def kto_kl(mean_ratio: jax.Array) -> jax.Array:
    """KTO's reference point: the mean log-ratio of answers to other prompts than their own over the whole
    batch, an estimate of KL(π || π_ref); from 0, and without a gradient (the same section).

    Args:
      mean_ratio: f32 scalar.
    """
    return jnp.maximum(jax.lax.stop_gradient(mean_ratio), 0.0)


def orpo(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """The odds ratio's part of ORPO: -λ log σ(log odds(y_w) - log odds(y_l)), odds = P / (1 - P), λ = β.

    Hong et al., "ORPO: monolithic preference optimization without reference model" (2024), equations 4 and 7;
    equation 6 adds the cross-entropy of the chosen answer, which the caller does.

    Args:
      chosen, rejected: log P, the mean log-likelihood of an answer's tokens, f32 [pairs].
      beta: λ.
    """

    def log_odds(log_p: jax.Array) -> jax.Array:
        log_p = jnp.minimum(log_p, _ALMOST_CERTAIN)
        return log_p - jnp.log(-jnp.expm1(log_p))

    return -beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def simpo(
    chosen: jax.Array, rejected: jax.Array, beta: float, gamma: float, label_smoothing: float = 0.0
) -> jax.Array:
    """SimPO: -log σ(β (ℓ_w - ℓ_l) - γ), ℓ the mean log-likelihood of an answer's tokens.

    Meng et al., "SimPO: simple preference optimization with a reference-free reward" (2024), equation 6.

    Args:
      chosen, rejected: ℓ, f32 [pairs].
      beta: scale of the reward.
      gamma: the margin by which the chosen answer's reward is to be larger.
      label_smoothing: see `dpo`.
    """
    return dpo(chosen - gamma / beta, rejected, beta, label_smoothing)


def cpo(chosen: jax.Array, rejected: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """The preferences' part of CPO: -log σ(β (log π(y_w|x) - log π(y_l|x))).

    Xu et al., "Contrastive preference optimization" (2024), equation 3; equation 5 adds the cross-entropy of
    the chosen answer, which the caller does.

    Args:
      chosen, rejected: log-likelihoods of whole answers, f32 [pairs].
      beta: see `dpo`.
      label_smoothing: see `dpo`.
    """
    return dpo(chosen, rejected, beta, label_smoothing)


def bradley_terry(
    chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0, centering: float = 0.0
) -> jax.Array:
    """A reward model's loss: -log σ(r_w - r_l - m), plus c (r_w + r_l)².

    Bradley and Terry, "Rank analysis of incomplete block designs" (1952); Ouyang et al., "Training language
    models to follow instructions with human feedback" (2022), equation 1; the margin is that of Touvron et
    al., "Llama 2" (2023), equation 2; the centring, which holds rewards around 0, that of Eisenstein et al.,
    "Helping or herding? Reward model ensembles mitigate but do not eliminate reward hacking" (2023),
    equation 2.

    Args:
      chosen, rejected: rewards f32 [pairs].
      margin: m, f32 [pairs], how much better the chosen answer is.
      centering: c.
    """
    loss = -jax.nn.log_sigmoid(chosen - rejected - margin)
    return loss + centering * jnp.square(chosen + rejected) if centering else loss


def wins(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
    """1 where the chosen answer has the larger reward, ½ where both have the same, else 0: f32 [pairs]."""
    return (chosen > rejected) + 0.5 * (chosen == rejected).astype(jnp.float32)


def pair_metrics(
    losses: jax.Array, rewards: jax.Array, log_likelihoods: jax.Array, weights: jax.Array
) -> Metrics:
    """What is logged of pairs, as (sum, weight).

    Args:
      losses: f32 [pairs].
      rewards: β times the log-ratios (or, without a reference, the log-likelihoods that are compared) of
        chosen and rejected answers, f32 [pairs, 2].
      log_likelihoods: of whole answers, f32 [pairs, 2].
      weights: 1 for a pair, 0 for padding, f32 [pairs].

    Returns: 'loss', 'reward_accuracy', 'reward_margin', 'reward_chosen', 'reward_rejected',
      'log_likelihood_chosen', 'log_likelihood_rejected', 'log_likelihood_accuracy'.
    """
    figures = {
        "loss": losses,
        "reward_accuracy": wins(rewards[:, 0], rewards[:, 1]),
        "reward_margin": rewards[:, 0] - rewards[:, 1],
        "reward_chosen": rewards[:, 0],
        "reward_rejected": rewards[:, 1],
        "log_likelihood_chosen": log_likelihoods[:, 0],
        "log_likelihood_rejected": log_likelihoods[:, 1],
        "log_likelihood_accuracy": wins(log_likelihoods[:, 0], log_likelihoods[:, 1]),
    }
    return {name: weighted(values, weights) for name, values in figures.items()}


def weighted(values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum, weight) of values where the weight is above 0: what stands in padding may be inf or NaN."""
    weights = weights.astype(jnp.float32)
    return jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), weights.sum()
