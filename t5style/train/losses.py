"""Token cross-entropy: label smoothing and z-loss as T5X defines them, as sums to be normalised once.

Every figure leaves here as a pair (sum, weight). Pairs from microbatches, steps and hosts are added; only
the reader divides. A mean of means would weigh tokens in short batches more than others.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from t5style.nn import moe
from t5style.nn.moe import RouterStats
from t5style.nn.settings import MoE

Metrics = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, weight), both f32 scalars."""


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[jax.Array, Metrics]:
    """Summed training objective and metrics of one batch of tokens.

    The objective follows T5X (`t5x.losses.cross_entropy_with_logits` and `compute_weighted_cross_entropy`):
    the true class gets 1 - s and each other class s / (V - 1), minus the entropy of that distribution, so
    that a perfect prediction costs 0; plus `z_loss * log(Z)^2`, which keeps the logits' normaliser near 1.

    Args:
      logits: f32 [tokens, vocab].
      targets: int32 [tokens].
      weights: [tokens], 0 for tokens that are not learnt from.
      label_smoothing: s above, in [0, 1).
      z_loss: coefficient of log(Z)^2; T5X and PaLM use 1e-4.

    Returns:
      objective: f32 scalar, summed over tokens (smoothed, with z-loss): what is differentiated.
      metrics: 'loss' (plain negative log-likelihood in nats, whatever the smoothing, so that runs compare),
        'accuracy' (how often no logit is above the target's), and 'z_loss' where it is on.
    """
    weights = weights.astype(jnp.float32)
    vocab = logits.shape[-1]
    log_z, target_logit = _log_z_and_target(logits, targets)  # both [tokens]
    nll = log_z - target_logit
    objective = nll
    if label_smoothing > 0:
        low = label_smoothing / (vocab - 1)
        high = 1.0 - label_smoothing
        others = (vocab - 1) * log_z - (jnp.sum(logits, axis=-1) - target_logit)  # -sum of the others' log p
        entropy = -(high * jnp.log(high) + (vocab - 1) * low * jnp.log(low))
        objective = high * nll + low * others - entropy
    total = weights.sum()
    # `where`, not a product alone: padding may hold inf or NaN, and 0 * NaN is NaN.
    keep = weights > 0
    correct = (target_logit >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    metrics: Metrics = {
        "loss": (jnp.sum(jnp.where(keep, nll * weights, 0.0)), total),
        "accuracy": (jnp.sum(correct * weights), total),
    }
    if z_loss > 0:
        z_term = z_loss * jnp.square(log_z)
        objective = objective + z_term
        metrics["z_loss"] = (jnp.sum(jnp.where(keep, z_term * weights, 0.0)), total)
    return jnp.sum(jnp.where(keep, objective * weights, 0.0)), metrics


def router_losses(
    routers: Sequence[RouterStats], settings: MoE, weight: jax.Array
) -> tuple[jax.Array, Metrics]:
    """What the routers of a model with experts add to the objective, and figures of their experts.

    Args:
      routers: statistics of one or more stacks, each `[layers, ...]`, of all tokens of the batch.
      settings: says how much each loss counts.
      weight: that of the objective, its number of target tokens, by which what is added here is multiplied.

    Returns:
      objective: f32 scalar, what is added.
      metrics: means over all layers, weighing as much as the objective: 'moe_balance_loss' and
        'moe_router_z_loss' (not multiplied by their settings), 'moe_most_loaded' and 'moe_least_loaded' (that
        expert's share of all choices), 'moe_load_entropy' (of the shares, divided by log(experts): 1 is
        even); and 'moe_dropped', the share of choices whose expert was full.
    """
    share = [_shares(router.load) for router in routers]  # each [layers, experts]
    by_layer = {
        "moe_balance_loss": [moe.balance_loss(router) for router in routers],
        "moe_router_z_loss": [moe.z_loss(router) for router in routers],
        "moe_most_loaded": [each.max(axis=-1) for each in share],
        "moe_least_loaded": [each.min(axis=-1) for each in share],
        "moe_load_entropy": [_entropy(each) for each in share],
    }
    means = {name: jnp.concatenate(values).mean() for name, values in by_layer.items()}
    objective = jnp.float32(0.0)
    if settings.balance_loss:
        objective += settings.balance_loss * means["moe_balance_loss"]
    if settings.router_z_loss:
        objective += settings.router_z_loss * means["moe_router_z_loss"]
    metrics: Metrics = {name: (mean * weight, weight) for name, mean in means.items()}
    dropped = sum((router.dropped.sum() for router in routers), start=jnp.float32(0.0))
    choices = sum((router.load.sum() for router in routers), start=jnp.float32(0.0))
    metrics["moe_dropped"] = (dropped, choices)
    return objective * weight, metrics


def _shares(load: jax.Array) -> jax.Array:
    """Each expert's share of all choices, `[layers, experts]`."""
    return load / jnp.maximum(load.sum(axis=-1, keepdims=True), 1.0)


def _entropy(shares: jax.Array) -> jax.Array:
    """Of shares `[layers, experts]`, in units of that of even ones."""
    experts = max(shares.shape[-1], 2)
    return jax.scipy.special.entr(shares).sum(axis=-1) / jnp.log(experts)


@jax.custom_vjp
def _log_z_and_target(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log of the softmax's denominator, and the target's logit: f32 [tokens] from [tokens, vocab].

    With a derivative of its own: that of a gather is a scatter into zeros as large as the logits, which are
    then added to the softmax's gradient; this writes the sum of both at once.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z, jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def _log_z_and_target_forward(
    logits: jax.Array, targets: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    log_z, target_logit = _log_z_and_target(logits, targets)
    return (log_z, target_logit), (logits, targets, log_z)


def _log_z_and_target_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], gradients: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None]:
    logits, targets, log_z = residuals
    by_log_z, by_target = (gradient[:, None] for gradient in gradients)  # [tokens, 1]
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1)
    softmax = jnp.exp(logits - log_z[:, None])  # [tokens, vocab]
    return softmax * by_log_z + jnp.where(ids == targets[:, None], by_target, 0.0), None


_log_z_and_target.defvjp(_log_z_and_target_forward, _log_z_and_target_backward)
