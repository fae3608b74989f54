"""Losses of preferences: as TRL has them, as the papers write them, and through a converted model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5style
from t5style.tune import preference_losses as losses
from t5style.tune.preferences import Preference, PreferenceLoss
from tests.tune.make_golden_preferences import BETA, GAMMA, GOLDEN, PAIRS, SMOOTHING

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN / "preference_losses.npz"))


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


# The papers' formulas in float64: of log-likelihoods of the policy and the reference, and lengths.
def _logistic(margin):
    return -np.log(sigmoid(margin))


def _odds(mean):
    return np.exp(mean) / (1 - np.exp(mean))


PAPERS = {
    "dpo": lambda c, r, rc, rr, nc, nr: _logistic(BETA * np.log(np.exp(c - rc) / np.exp(r - rr))),
    "cdpo": lambda c, r, rc, rr, nc, nr: (
        (1 - SMOOTHING) * _logistic(BETA * (c - rc) - BETA * (r - rr))
        + SMOOTHING * _logistic(BETA * (r - rr) - BETA * (c - rc))
    ),
    "robust": lambda c, r, rc, rr, nc, nr: (
        (
            (1 - SMOOTHING) * _logistic(BETA * (c - rc - r + rr))
            - SMOOTHING * _logistic(BETA * (r - rr - c + rc))
        )
        / (1 - 2 * SMOOTHING)
    ),
    "hinge": lambda c, r, rc, rr, nc, nr: np.maximum(0, 1 - BETA * (c - r - (rc - rr))),
    "ipo": lambda c, r, rc, rr, nc, nr: ((c - rc) / nc - (r - rr) / nr - 1 / (2 * BETA)) ** 2,
    "ipo_sums": lambda c, r, rc, rr, nc, nr: (c - rc - (r - rr) - 1 / (2 * BETA)) ** 2,
    "normalised": lambda c, r, rc, rr, nc, nr: _logistic(BETA / nc * (c - rc) - BETA / nr * (r - rr)),
    "simpo": lambda c, r, rc, rr, nc, nr: _logistic(BETA / nc * c - BETA / nr * r - GAMMA),
    "cpo": lambda c, r, rc, rr, nc, nr: _logistic(BETA * c - BETA * r),
    "cpo_smoothed": lambda c, r, rc, rr, nc, nr: (
        (1 - SMOOTHING) * _logistic(BETA * c - BETA * r) + SMOOTHING * _logistic(BETA * r - BETA * c)
    ),
    "orpo": lambda c, r, rc, rr, nc, nr: BETA * _logistic(np.log(_odds(c / nc) / _odds(r / nr))),
}
# Our settings, and under which name TRL's values are stored.
CASES = {
    "dpo": (Preference("dpo", BETA), "sigmoid/loss"),
    "cdpo": (Preference("dpo", BETA, SMOOTHING), "cdpo/losses"),
    "robust": (Preference("robust", BETA, SMOOTHING), "robust/loss"),
    "hinge": (Preference("hinge", BETA), "hinge/loss"),
    "ipo": (Preference("ipo", BETA), "ipo/loss"),
    "ipo_sums": (Preference("ipo", BETA, length_normalized=False), None),
    "normalised": (Preference("dpo", BETA, length_normalized=True), "sigmoid_norm/loss"),
    "simpo": (Preference("simpo", BETA, gamma=GAMMA), "simpo/losses"),
    "cpo": (Preference("cpo", BETA), "cpo/losses"),
    "cpo_smoothed": (Preference("cpo", BETA, SMOOTHING), "cpo_smoothed/losses"),
    "orpo": (Preference("orpo", BETA), "orpo/losses"),
}


def of_tokens(method: Preference, policy, reference, mask):
    """Losses f32 [pairs] of log-likelihoods by token [2 * pairs, length], as PreferenceLoss computes them."""
    found = policy.sum(-1) - (reference.sum(-1) if method.has_reference else 0.0)
    if method.by_token:
        found = found / mask.sum(-1)
    return method.losses(found[:PAIRS], found[PAIRS:])


@pytest.mark.parametrize("name", CASES)
def test_pairs_equal_the_paper_and_trl(golden, name):
    method, stored = CASES[name]
    policy, reference, mask = (jnp.asarray(golden[key]) for key in ("policy", "reference", "mask"))
    ours = of_tokens(method, policy, reference, mask)
    exact = [golden[key].astype(np.float64).sum(-1) for key in ("policy", "reference", "mask")]
    (c, r), (rc, rr), (nc, nr) = (np.split(value, 2) for value in exact)
    np.testing.assert_allclose(ours, PAPERS[name](c, r, rc, rr, nc, nr), **TOLERANCE)
    if stored is None:
        return
    theirs = golden[stored]
    np.testing.assert_allclose(ours if theirs.ndim else ours.mean(), theirs, **TOLERANCE)
    if (key := stored.replace("/loss", "/gradient")) in golden:
        grads = jax.grad(lambda p: of_tokens(method, p, reference, mask).mean())(policy)
        np.testing.assert_allclose(np.where(mask, grads, 0), golden[key] * np.asarray(mask), **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [("kto", "policy_kl", "reference_kl"), ("kto_clipped", "reference_kl", "policy_kl")],
)
def test_kto_equals_the_paper_and_trl(golden, name, ours, theirs):
    desirable = golden["desirable"]

    def loss(policy):
        ratios = policy.sum(-1) - golden["reference"].sum(-1)
        kl = losses.kto_kl(
            (jnp.asarray(golden[ours]).sum(-1) - golden[theirs].sum(-1)).mean() + 0 * policy.sum()
        )
        return losses.kto(ratios, desirable, kl, BETA, 1.3, 0.8).mean(), kl

    (found, kl), grads = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(golden["policy"]))
    np.testing.assert_allclose([found, kl], [golden[f"{name}/loss"], golden[f"{name}/kl"]], **TOLERANCE)
    np.testing.assert_allclose(
        grads * golden["mask"], golden[f"{name}/gradient"] * golden["mask"], **TOLERANCE
    )
    exact = {key: golden[key].astype(np.float64).sum(-1) for key in ("policy", "reference", ours, theirs)}
    z = max(0.0, (exact[ours] - exact[theirs]).mean())
    r = exact["policy"] - exact["reference"]
    value = np.where(desirable, 1.3 * sigmoid(BETA * (r - z)), 0.8 * sigmoid(BETA * (z - r)))
    np.testing.assert_allclose(found, (np.where(desirable, 1.3, 0.8) - value).mean(), **TOLERANCE)
    assert (kl == 0) == (name == "kto_clipped")


def test_bradley_terry_equals_the_paper_and_trl(golden):
    rewards = jnp.asarray(golden["policy"].sum(-1) - golden["reference"].sum(-1))
    margin = np.linspace(0, 1, PAIRS)
    for name, extra in (("bradley_terry", {}), ("centered", {"margin": margin, "centering": 0.05})):
        found, grads = jax.value_and_grad(
            lambda r, extra=extra: losses.bradley_terry(r[:PAIRS], r[PAIRS:], **extra).mean()
        )(rewards)
        np.testing.assert_allclose(found, golden[f"{name}/loss"], **TOLERANCE)
        np.testing.assert_allclose(grads, golden[f"{name}/gradient"], **TOLERANCE)
    c, r = np.split(np.asarray(rewards, np.float64), 2)
    exact = _logistic(c - r - margin) + 0.05 * (c + r) ** 2
    np.testing.assert_allclose(losses.bradley_terry(c, r, margin, 0.05), exact, **TOLERANCE)
    assert losses.wins(c, r).mean() == golden["bradley_terry/accuracy"]


def test_metrics_are_trls_and_padding_counts_nothing(golden):
    sums = {key: golden[key].sum(-1).reshape(2, PAIRS).T for key in ("policy", "reference")}
    rewards = BETA * (sums["policy"] - sums["reference"])
    padded = [
        np.pad(x, [(0, 2), *[(0, 0)] * (x.ndim - 1)], constant_values=np.nan)
        for x in (rewards[:, 0], rewards, sums["policy"])
    ]
    found = losses.pair_metrics(*padded, np.r_[np.ones(PAIRS), 0, 0])
    names = {"reward_accuracy": "accuracies", "reward_margin": "margins", "reward_chosen": "chosen"}
    names |= {
        "reward_rejected": "rejected",
        "log_likelihood_chosen": "logps_chosen",
        "log_likelihood_rejected": "logps_rejected",
    }
    for ours, theirs in names.items():
        assert found[ours][1] == PAIRS
        np.testing.assert_allclose(found[ours][0] / PAIRS, golden[f"sigmoid/{theirs}"], **TOLERANCE)


def test_a_certain_answer_has_finite_odds():
    found, grads = jax.value_and_grad(lambda x: losses.orpo(x, jnp.float32(-1e-9), 1.0))(jnp.float32(0.0))
    assert np.isfinite(found)
    assert np.isfinite(grads)


# ---------------------------------------------------------------------------------- through a converted model


def pair_batch(ids: np.ndarray, attention: np.ndarray, completion: np.ndarray, extra: int = 0):
    """Rows as TRL has them, chosen ones first [2 * pairs, length], as [pairs, 2, length - 1 + extra]."""

    def laid(values):
        values = np.pad(values, ((0, 0), (0, extra))).astype(np.int32)
        return np.stack(np.split(values, 2), axis=1)  # [2 * pairs, length] -> [pairs, 2, length]

    targets, real = ids[:, 1:] * attention[:, 1:], attention[:, 1:]
    positions = np.tile(np.arange(targets.shape[1]), (len(ids), 1)) * real
    return {
        "decoder_input_tokens": laid(ids[:, :-1] * real),
        "decoder_target_tokens": laid(targets),
        "decoder_loss_weights": laid(completion[:, 1:]),
        "decoder_segment_ids": laid(real),
        "decoder_positions": laid(positions),
    }


@pytest.mark.parametrize(
    ("loss_type", "method"),
    [
        ("sigmoid", Preference("dpo", BETA)),
        ("ipo", Preference("ipo", BETA)),
    ],
)
def test_a_tiny_llama_has_the_loss_and_gradients_of_trls_trainer(loss_type, method):
    stored = np.load(GOLDEN / "tiny_dpo.npz")
    model, reference = (t5style.load(GOLDEN / name) for name in ("tiny_llama", "tiny_llama_reference"))
    batch = pair_batch(stored["input_ids"], stored["attention_mask"], stored["completion_mask"], extra=3)
    loss = PreferenceLoss(model.config, method)

    @jax.jit
    def run(params):
        def mean(params):
            total, weight, metrics = loss(params, batch, None, reference.params)
            return total / weight, metrics

        return jax.value_and_grad(mean, has_aux=True)(params)

    (found, metrics), grads = run(model.params)
    np.testing.assert_allclose(found, stored[f"{loss_type}/loss"], **TOLERANCE)
    np.testing.assert_allclose(
        grads["embedding"], stored[f"{loss_type}/embedding_gradient"], rtol=1e-4, atol=1e-6
    )
    if loss_type == "sigmoid":
        for ours, theirs in {"reward_accuracy": "accuracies", "reward_margin": "margins"}.items():
            value = metrics[ours][0] / metrics[ours][1]
            np.testing.assert_allclose(value, stored[f"{loss_type}/rewards/{theirs}"], rtol=1e-4)


def test_settings_that_cannot_be_meant_are_refused():
    for fields, said in [
        ({"method": "ppo"}, "method is 'ppo'; it must be one of 'dpo'"),
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ({"method": "ipo", "label_smoothing": 0.1}, "the method 'ipo' does not have"),
        ({"method": "robust"}, "'robust' is told by it"),
        ({"method": "simpo", "length_normalized": False}, "'simpo' is defined by means of"),
        ({"method": "kto", "length_normalized": True}, "'kto' is defined by sums over"),
        ({"method": "kto", "nll_weight": 1.0}, "learns from single answers"),
        ({"gamma": -1.0}, "gamma is -1.0; it must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=said):
            Preference(**fields)
