"""The losses of preferences and rewards in the training step: accumulation, meshes, references."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5style.data.objectives import Examples
from t5style.data.pipeline import empty_batch, lay_out
from t5style.models.config import TransformerConfig
from t5style.models.params import init_params
from t5style.parallel import rules
from t5style.parallel.mesh import MeshConfig
from t5style.train import likelihood
from t5style.train import state as state_lib
from t5style.train.schedules import Schedule
from t5style.train.step import make_train_step
from t5style.tune.preferences import REFERENCE, Preference, PreferenceLoss, answers
from t5style.tune.reward_model import BINS, HEAD, RewardLoss, calibration_bins, reliability, with_last_token

SMALL: dict[str, Any] = {
    "vocab_size": 24, "d_model": 16, "d_ff": 24, "num_heads": 2, "dtype": "float32", "scan_layers": False,
}  # fmt: skip
# Rotary positions in both: a relative bias takes three times as long to compile.
T5 = TransformerConfig(encoder_layers=1, decoder_layers=1, positions="rope", scale_attention=True, **SMALL)
LLAMA = TransformerConfig(decoder_layers=1, positions="rope", scale_attention=True, **SMALL)
PAIRS = 8
KEY = jax.random.key(3)


@functools.cache
def pair_batch(architecture: str, seed: int = 0, rows: int = PAIRS) -> dict[str, np.ndarray]:
    """Pairs [rows, 2, 12] with prompts and answers of very different lengths; the last pair is padding."""
    random = np.random.default_rng(seed)
    lengths = {"decoder": 12} | ({"encoder": 6} if architecture == "encoder_decoder" else {})
    prompts = [random.integers(3, 24, random.integers(1, 6)) for _ in range(rows - 1)]
    both = []
    for _ in range(2):
        targets = [random.integers(3, 24, random.integers(1, 7)) for _ in prompts]
        flat = [np.concatenate(x).astype(np.int32) for x in (prompts, targets)]
        sizes = [np.array([len(row) for row in x]) for x in (prompts, targets)]
        examples = Examples(flat[0], sizes[0], flat[1], sizes[1], np.ones(len(flat[1]), np.int32))
        batch = empty_batch(rows, lengths)
        lay_out(batch, examples if "encoder" in lengths else examples.joined(), np.arange(rows - 1), bos_id=0)
        both.append(batch)
    return {name: np.stack([each[name] for each in both], axis=1) for name in both[0]}


def run_step(
    config: TransformerConfig,
    loss: Any,
    batch: Any,
    params: Any,
    accumulation: int = 1,
    mesh: Any = None,
    reference: Any = None,
) -> tuple[Any, dict[str, float]]:
    """The parameters after a step of SGD, which show the gradient, and the metrics."""
    step = make_train_step(
        loss, optax.sgd(1.0), Schedule("constant", 1e-2).build(10), accumulation=accumulation,
        reference=None if reference is None else (lambda frozen: frozen),
    )  # fmt: skip
    if mesh is None:
        state = state_lib.TrainState(step=jnp.int32(0), params=params, opt_state=optax.sgd(1.0).init(params))
        new, metrics = jax.jit(step)(state, batch, KEY, reference)
    else:
        with rules.use_mesh(mesh):
            state = state_lib.init_state(config, optax.sgd(1.0), mesh, params=params)
            new, metrics = jax.jit(step)(state, rules.put_batch(batch, mesh), KEY, reference)
    return jax.device_get(new.params), {name: float(s) / max(float(w), 1) for name, (s, w) in metrics.items()}


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@functools.cache
def models(config: TransformerConfig) -> tuple[Any, Any]:
    return tuple(init_params(config, jax.random.key(seed)) for seed in (1, 2))


@pytest.mark.parametrize(("config", "method"), [(T5, "dpo"), (LLAMA, "kto")], ids=["t5-dpo", "llama-kto"])
def test_accumulation_and_a_mesh_change_nothing(config, method):
    preference = Preference(method, nll_weight=0.0 if method == "kto" else 0.5)
    loss = PreferenceLoss(config, preference)
    batch = dict(pair_batch(config.architecture))
    if method == "kto":
        batch["desirable"] = np.array([1, 0, 0, 1, 1, 1, 0, 0], np.int32)
    reference, policy = models(config)
    if method == "dpo":  # computed beforehand
        batch[REFERENCE] = np.random.default_rng(0).normal(-9, 3, (PAIRS, 2)).astype(np.float32)
    reference = reference if method == "kto" else None
    whole, metrics = run_step(config, loss, batch, policy, reference=reference)
    sizes = {"data": 2, "tensor": 2} if method == "dpo" else {"data": 2, "fsdp": 2}
    mesh = MeshConfig(devices=4, **sizes).build()
    cut, cut_metrics = run_step(config, loss, batch, policy, 2, mesh, reference)
    close(cut, whole)
    close(cut_metrics, metrics)
    assert method != "kto" or metrics["kl"] > 0


def test_padding_and_what_the_reference_said_beforehand():
    """Log-likelihoods from the batch are those of the live reference; a pair of padding counts nothing."""
    policy, reference = models(LLAMA)
    batch = pair_batch("decoder_only")
    loss = jax.jit(lambda batch, reference=None: PreferenceLoss(LLAMA)(policy, batch, None, reference))
    live = loss(batch, reference)
    known = answers(LLAMA, reference, batch).log_likelihood.reshape(-1, 2)
    close(loss({**batch, REFERENCE: known}), live, 1e-6)
    assert live[1] == PAIRS - 1
    real = {name: value[:-1] for name, value in batch.items()}
    close(loss(real, reference), live, 1e-6)


def test_only_answers_have_logits_and_nothing_changes(monkeypatch):
    """Log-likelihoods and gradients by pieces, some of them empty, are those of all positions at once."""
    policy, _ = models(LLAMA)
    batch = pair_batch("decoder_only")

    def run(params):
        found = likelihood.log_likelihoods(LLAMA, params, batch)
        return jnp.sum(jnp.square(found)), found

    plain = jax.jit(jax.value_and_grad(run, has_aux=True))(policy)
    monkeypatch.setattr(likelihood, "PIECE", 40)  # 192 positions, 5 pieces, the last one not full
    pieces = jax.jit(jax.value_and_grad(run, has_aux=True))(policy)
    assert int((batch["decoder_loss_weights"] > 0).sum()) <= 80
    close(pieces, plain)


def test_the_reward_is_read_off_the_last_token_where_there_is_room():
    batch = pair_batch("decoder_only")
    rows = {name: value[:, 0] for name, value in batch.items()}
    extended = jax.device_get(with_last_token(rows))
    for row in range(PAIRS):
        tokens = int(rows["decoder_segment_ids"][row].sum())
        read = extended["decoder_input_tokens"][row][extended["decoder_segment_ids"][row] > 0]
        targets = rows["decoder_target_tokens"][row][:tokens]
        assert read.tolist() == ([0, *targets] if 0 < tokens < 12 else [0, *targets][:tokens])
        assert extended["decoder_positions"][row].max() == max(len(read) - 1, 0)


def test_reward_models_in_the_step_and_their_calibration():
    head = {HEAD: {"kernel": jax.random.normal(KEY, (16, 1)), "bias": jnp.ones(1)}}
    params = {**models(LLAMA)[0], **head}
    batch = {**pair_batch("decoder_only"), "margin": np.linspace(0, 1, PAIRS, dtype=np.float32)}
    loss = RewardLoss(LLAMA, centering=0.1)
    whole, metrics = run_step(LLAMA, loss, batch, params)
    cut, cut_metrics = run_step(LLAMA, loss, batch, params, accumulation=2)
    close(cut, whole)
    close(cut_metrics, metrics)
    assert not np.allclose(whole[HEAD]["kernel"], params[HEAD]["kernel"])
    # Calibration: of margins whose confidences are .525, .725 (twice), .975 and a tie at .5.
    sure = np.array([0.525, 0.725, 0.725, 0.975, 0.5, 0.9])
    margins = np.log(sure / (1 - sure)) * np.array([1, 1, -1, 1, 1, 1])
    found = calibration_bins(jnp.asarray(margins), jnp.asarray([1.0, 1, 1, 1, 1, 0]))
    assert len(found) == 3 * BINS
    figures = {f"eval/x/{n}": float(s) / float(w) if w else np.nan for n, (s, w) in found.items()}
    figures["eval/x/pairs"] = 5.0
    result = reliability(figures, "x")
    assert [row["pairs"] for row in result["bins"]] == [2, 2, 1]
    expected = (2 * abs(0.5125 - 0.75) + 2 * abs(0.725 - 0.5) + abs(0.975 - 1)) / 5
    assert abs(result["calibration_error"] - expected) < 1e-6
    assert list(figures) == ["eval/x/pairs"]
