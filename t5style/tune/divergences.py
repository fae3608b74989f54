"""How far two distributions over tokens are apart, for distillation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def divergence(student: jax.Array, teacher: jax.Array, beta: float) -> jax.Array:
    """How far two distributions are apart: float32 `[tokens]`, in nats.

    With P the teacher's and Q the student's (Agarwal et al. 2024, On-Policy Distillation, equation 1):

        beta = 0        KL(P || Q), forward: the student covers all that the teacher may say (Hinton et al.
        2015) beta = 1        KL(Q || P), reverse: it says what the teacher finds likely (Gu et al. 2024,
        MiniLLM) 0 < beta < 1    beta · KL(P || M) + (1 - beta) · KL(Q || M), M = beta · P + (1 - beta) · Q:
                        the generalised Jensen-Shannon divergence, at 0.5 the usual one. Divided by beta it
                        goes to the forward KL as beta goes to 0, so the ends are not its limits.

    Args:
      student, teacher: log-probabilities `[tokens, outcomes]`; those of all outcomes sum to 1.
      beta: see above.
    """
    if beta == 0:
        return jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    if beta == 1:
        return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)
    mixed = jnp.logaddexp(teacher + np.log(beta), student + np.log1p(-beta))
    from_teacher = jnp.sum(jnp.exp(teacher) * (teacher - mixed), axis=-1)
    from_student = jnp.sum(jnp.exp(student) * (student - mixed), axis=-1)
    return beta * from_teacher + (1 - beta) * from_student


def with_rest(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probabilities of some tokens, and of all others together: float32 `[tokens, k + 1]`.

    Args:
      logits: `[tokens, vocab]`.
      ids: int32 `[tokens, k]`, different ones in each row, fewer than the vocabulary has.
    """
    log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, ids, axis=-1) - log_z
    rows = jnp.arange(len(ids))[:, None]
    others = logits.at[rows, ids].set(-jnp.inf)
    return jnp.concatenate([chosen, jax.nn.logsumexp(others, axis=-1, keepdims=True) - log_z], axis=-1)
