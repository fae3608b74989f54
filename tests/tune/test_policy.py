"""Advantages and policy losses: their papers' formulas, written out in float64, and TRL's values."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.tune import advantages, policy_losses
from t5style.tune.policy_losses import AdaptiveKL

GOLDEN = np.load(pathlib.Path(__file__).with_name("golden") / "policy.npz")
IN = {name.removeprefix("in/"): GOLDEN[name] for name in GOLDEN.files if name.startswith("in/")}
MASK, NEW, OLD = IN["mask"], IN["new"], IN["old"]
WORTH = IN["advantages"][:, None]
LENGTH = MASK.shape[1]


def loss_of(
    new, per="token", how="sequence", low=0.2, high=None, clip_ratio=None, kl=0.0, estimator="k3"
) -> jax.Array:
    ratios = policy_losses.log_ratio(new, OLD, MASK, per)
    losses, _ = policy_losses.clipped_surrogate(ratios, WORTH, low, high, clip_ratio)
    losses = losses + kl * policy_losses.divergence(new, IN["reference"], estimator)
    total, weight = policy_losses.aggregate(losses, MASK, how, LENGTH)
    return total / weight


CASES = {
    "grpo": {},
    "grpo_kl": {"kl": 0.04},
    "token": {"how": "token"},
    "dr_grpo": {"how": "constant"},
    "dapo": {"how": "token", "high": 0.28},
    "dual": {"clip_ratio": 1.1},
    "gspo": {"per": "sequence", "low": 3e-2, "high": 0.2},
    "rloo": {"per": "product"},
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_trls(name):
    value, gradient = jax.value_and_grad(loss_of)(jnp.asarray(NEW, jnp.float32), **CASES[name])
    np.testing.assert_allclose(value, GOLDEN[f"loss/{name}"], rtol=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN[f"gradient/{name}"], atol=1e-6)


def test_advantages_are_trls():
    rewards = IN["rewards"]
    for name, function in (
        ("group", advantages.group_normalized),
        ("none", advantages.group_centred),
        ("rloo", advantages.leave_one_out),
    ):
        np.testing.assert_allclose(
            function(rewards).reshape(-1), GOLDEN[f"advantages/{name}"], rtol=1e-6, err_msg=name
        )


def written_out(per, how, low, high):
    """The papers' sums, answer by answer and token by token."""
    total, weight = 0.0, 0.0
    for i in range(len(MASK)):
        tokens = [t for t in range(LENGTH) if MASK[i, t]]
        of_token = {t: math.exp(NEW[i, t] - OLD[i, t]) for t in tokens}
        product = math.prod(of_token.values())
        ratio = {
            "token": of_token,
            "product": dict.fromkeys(tokens, product),
            "sequence": dict.fromkeys(tokens, product ** (1 / len(tokens))),
        }[per]
        a = IN["advantages"][i]
        terms = [min(ratio[t] * a, min(max(ratio[t], 1 - low), 1 + high) * a) for t in tokens]
        if how == "sequence":
            total, weight = total - sum(terms) / len(tokens), weight + 1
        elif how == "token":
            total, weight = total - sum(terms), weight + len(tokens)
        else:
            total, weight = total - sum(terms) / LENGTH, weight + 1
    return total / weight


@pytest.mark.parametrize("per", policy_losses.RATIOS)
@pytest.mark.parametrize("how", policy_losses.AGGREGATIONS)
def test_losses_are_their_formulas(per, how):
    found = loss_of(jnp.asarray(NEW, jnp.float32), per, how, 0.1, 0.3)
    np.testing.assert_allclose(found, written_out(per, how, 0.1, 0.3), rtol=1e-5)


def test_padding_changes_nothing():
    new = np.where(MASK > 0, NEW, np.nan)
    ratios = policy_losses.log_ratio(new, OLD, MASK)
    losses, _ = policy_losses.clipped_surrogate(ratios, WORTH)
    total, weight = policy_losses.aggregate(losses, MASK, "sequence")
    np.testing.assert_allclose(total / weight, GOLDEN["loss/grpo"], rtol=1e-5)
    none = policy_losses.aggregate(losses, np.where(np.arange(8)[:, None] == 0, 0, MASK), "sequence")
    assert float(none[1]) == 7
    with pytest.raises(ValueError, match="must be one of token, sequence, constant"):
        policy_losses.aggregate(losses, MASK, "mean")


def test_divergences_estimate_kl():
    generator = np.random.default_rng(0)
    p, q = (generator.dirichlet(np.ones(5)) for _ in range(2))
    kl = float((p * np.log(p / q)).sum())
    new, other = np.log(p), np.log(q)
    k1, k2, k3 = (np.asarray(policy_losses.divergence(new, other, name)) for name in ("k1", "k2", "k3"))
    np.testing.assert_allclose((p * k1).sum(), kl, rtol=1e-5)  # expectations, exactly
    np.testing.assert_allclose((p * k3).sum(), kl, rtol=1e-5)
    assert (k3 >= 0).all()
    np.testing.assert_allclose(k2, (new - other) ** 2 / 2, rtol=1e-5)
    with pytest.raises(ValueError, match="one of k1, k2, k3"):
        policy_losses.divergence(new, other, "k4")


def test_entropy_and_value_loss():
    p = np.array([0.5, 0.25, 0.25])
    np.testing.assert_allclose(policy_losses.entropy(jnp.log(p)), -(p * np.log(p)).sum(), rtol=1e-5)
    np.testing.assert_allclose(policy_losses.entropy(jnp.array([0.0, -jnp.inf])), 0.0, atol=1e-7)
    values, old, returns = np.array([1.0, 0.5, -1.0]), np.array([0.0, 0.4, 0.0]), np.array([2.0, 0.0, -0.1])
    expected = [
        0.5 * max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2)
        for v, o, r in zip(values, old, returns, strict=True)
    ]
    np.testing.assert_allclose(policy_losses.value_loss(values, old, returns, 0.2), expected, rtol=1e-6)
    np.testing.assert_allclose(
        policy_losses.value_loss(values, old, returns, None), (values - returns) ** 2 / 2, rtol=1e-6
    )


def test_answers_that_do_not_count_move_no_baseline():
    rewards = np.array([[1.0, 3.0, 100.0], [1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    keep = np.array([[True, True, False], [True, True, True], [True, False, False]])
    np.testing.assert_allclose(advantages.group_centred(rewards, keep), [[-1, 1, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(advantages.leave_one_out(rewards, keep), [[-2, 2, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_allclose(advantages.group_spread(rewards, keep), [math.sqrt(2), 0, 0])
    scale = math.sqrt(2) + 1e-4
    np.testing.assert_allclose(
        advantages.group_normalized(rewards, keep), [[-1 / scale, 1 / scale, 0], [0, 0, 0], [0, 0, 0]]
    )
    centred = advantages.normalized(np.array([1.0, 2.0, 9.0]), np.array([True, True, False]))
    np.testing.assert_allclose(centred, [-1, 1, 0], atol=1e-6)


def test_generalised_advantages_and_returns():
    generator = np.random.default_rng(1)
    gamma, lam = 0.9, 0.8
    mask = np.array([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])
    values = generator.normal(size=mask.shape)
    divergence = generator.normal(size=mask.shape)
    rewards = advantages.token_rewards(np.array([1.0, -2.0, 0.5]), mask, divergence, 0.1)
    found, returns = advantages.generalized(rewards, values, mask, gamma, lam)
    to_go = advantages.rewards_to_go(rewards, mask, gamma)
    for row in range(3):
        tokens = [t for t in range(5) if mask[row, t]]
        for k, t in enumerate(tokens):
            expected = -0.1 * divergence[row, t] + ([1.0, -2.0, 0.5][row] if t == tokens[-1] else 0.0)
            np.testing.assert_allclose(rewards[row, t], expected)
            rest = tokens[k:]
            deltas = [
                rewards[row, u]
                + (gamma * values[row, rest[j + 1]] if j + 1 < len(rest) else 0)
                - values[row, u]
                for j, u in enumerate(rest)
            ]
            np.testing.assert_allclose(
                found[row, t], sum((gamma * lam) ** j * d for j, d in enumerate(deltas))
            )
            np.testing.assert_allclose(
                to_go[row, t], sum(gamma**j * rewards[row, u] for j, u in enumerate(rest))
            )
    np.testing.assert_allclose(returns, np.where(mask, found + values, 0))
    assert (found[mask == 0] == 0).all()
    plain, _ = advantages.generalized(rewards, values, mask, 1.0, 1.0)  # lambda 1: rewards minus value
    np.testing.assert_allclose(plain, np.where(mask, advantages.rewards_to_go(rewards, mask) - values, 0))


def test_adaptive_kl():
    control = AdaptiveKL(target=6.0, horizon=1000.0)
    assert control(0.1, 6.0, 100) == 0.1
    np.testing.assert_allclose(control(0.1, 60.0, 100), 0.1 * (1 + 0.2 * 0.1))  # the error is held at 20 %
    np.testing.assert_allclose(control(0.1, 5.7, 500), 0.1 * (1 - 0.05 * 0.5))
    with pytest.raises(ValueError, match="target is 0"):
        AdaptiveKL(target=0)
