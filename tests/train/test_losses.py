"""Cross-entropy against T5X's definition (written with one-hot targets) and optax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5style.train.losses import cross_entropy

TOKENS, VOCAB = 40, 13


@pytest.fixture
def case() -> tuple[jax.Array, jax.Array, jax.Array]:
    generator = np.random.default_rng(0)
    logits = jnp.asarray(generator.normal(0, 3, (TOKENS, VOCAB)), jnp.float32)
    targets = jnp.asarray(generator.integers(0, VOCAB, TOKENS), jnp.int32)
    weights = jnp.asarray(generator.integers(0, 2, TOKENS), jnp.int32)
    return logits, targets, weights


def reference(
    logits: jax.Array, targets: jax.Array, weights: jax.Array, smoothing: float, z_loss: float
) -> jax.Array:
    """T5X: soft targets, minus their entropy, plus z_loss * log(Z)^2."""
    high, low = 1 - smoothing, smoothing / (VOCAB - 1)
    soft = jnp.where(jax.nn.one_hot(targets, VOCAB) > 0, high, low)
    constant = 0.0 if smoothing == 0 else -(high * np.log(high) + (VOCAB - 1) * low * np.log(low))
    loss = -jnp.sum(soft * jax.nn.log_softmax(logits), axis=-1) - constant
    loss = loss + z_loss * jnp.square(jax.nn.logsumexp(logits, axis=-1))
    return jnp.sum(loss * weights)


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_value_and_gradient(
    case: tuple[jax.Array, jax.Array, jax.Array], smoothing: float, z_loss: float
) -> None:
    logits, targets, weights = case

    def ours(x: jax.Array) -> jax.Array:
        return cross_entropy(x, targets, weights, label_smoothing=smoothing, z_loss=z_loss)[0]

    def theirs(x: jax.Array) -> jax.Array:
        return reference(x, targets, weights, smoothing, z_loss)

    np.testing.assert_allclose(ours(logits), theirs(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(theirs)(logits), atol=2e-6)


def test_metrics_are_sums_with_weights(case: tuple[jax.Array, jax.Array, jax.Array]) -> None:
    logits, targets, weights = case
    _, metrics = cross_entropy(logits, targets, weights, label_smoothing=0.3, z_loss=1e-3)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    count = float(weights.sum())
    assert float(metrics["loss"][1]) == float(metrics["accuracy"][1]) == count
    # 'loss' is the plain log-likelihood, whatever the smoothing.
    np.testing.assert_allclose(metrics["loss"][0], jnp.sum(nll * weights), rtol=1e-5)
    right = np.asarray(logits).argmax(-1) == np.asarray(targets)
    assert float(metrics["accuracy"][0]) == float((right * np.asarray(weights)).sum())
    z = 1e-3 * np.square(np.asarray(jax.nn.logsumexp(logits, axis=-1)))
    np.testing.assert_allclose(metrics["z_loss"][0], (z * np.asarray(weights)).sum(), rtol=1e-5)


def test_perfect_prediction_costs_nothing() -> None:
    for smoothing in (0.0, 0.1):
        soft = np.full((1, VOCAB), smoothing / (VOCAB - 1) if smoothing else 1e-30)
        soft[0, 4] = 1 - smoothing
        loss, _ = cross_entropy(jnp.log(soft), jnp.array([4]), jnp.array([1]), label_smoothing=smoothing)
        np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_padding_may_hold_nan() -> None:
    logits = jnp.array([[0.0, 1.0], [jnp.nan, jnp.inf]])
    loss, metrics = cross_entropy(logits, jnp.array([1, 0]), jnp.array([1, 0]))
    np.testing.assert_allclose(loss, np.log1p(np.exp(-1.0)), rtol=1e-6)
    assert float(metrics["loss"][1]) == 1.0
