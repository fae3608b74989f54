"""Token cross-entropy: label smoothing and z-loss as T5X defines them, as sums to be normalised once.

Every figure leaves here as a pair (sum, weight). Pairs from microbatches, steps and hosts are added; only
the reader divides. A mean of means would weigh tokens in short batches more than others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
