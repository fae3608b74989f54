"""The training step: accumulation, weights, dropout, non-finite updates, shardings."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5style.models.config import TransformerConfig
from t5style.models.transformer import Transformer
from t5style.parallel.mesh import MeshConfig
from t5style.train import state as state_lib
from t5style.train.optimizer import Optimizer
from t5style.train.schedules import Schedule
from t5style.train.step import LanguageModelLoss, make_eval_step, make_train_step

CONFIG = TransformerConfig(
    vocab_size=32, d_model=16, d_ff=32, num_heads=2, decoder_layers=1, positions="rope", dtype="float32",
    dropout=0.2, scan_layers=False,
)  # fmt: skip
PLAIN = CONFIG.replace(dropout=0.0)
SCHEDULE = Schedule("constant", 1e-2)
KEY = jax.random.key(7)


def batch(rows: int = 8, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows whose numbers of target tokens differ widely."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(3, CONFIG.vocab_size, (rows, length)).astype(np.int32)
    weights = (np.arange(length) < np.arange(1, rows + 1)[:, None]).astype(np.int32)
    return {
        "decoder_input_tokens": np.pad(tokens[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": weights,
        "decoder_segment_ids": np.ones_like(tokens),
        "decoder_positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }


def setup(
    config: TransformerConfig, optimizer: optax.GradientTransformation | None = None, **options: Any
) -> tuple[Any, Any]:
    mesh = MeshConfig(devices=1).build()
    transform = optimizer or optax.sgd(1.0)
    state = state_lib.init_state(config, transform, mesh, seed=1)
    loss = LanguageModelLoss(config, label_smoothing=0.1, z_loss=1e-3)
    return state, jax.jit(make_train_step(loss, transform, SCHEDULE.build(10), **options))


def test_embedding_noise_is_in_training_only_and_as_large_as_it_should_be() -> None:
    config = PLAIN.replace(embedding_noise=5.0)
    params = state_lib.init_state(config, optax.sgd(1.0), MeshConfig(devices=1).build(), seed=1).params
    noisy, plain = LanguageModelLoss(config), LanguageModelLoss(PLAIN)
    rows = batch(2)
    assert noisy(params, rows, None)[0] == plain(params, rows, KEY)[0]
    losses = {float(noisy(params, rows, jax.random.key(seed))[0]) for seed in range(3)}
    assert len(losses) == 3
    # Two rows with a mean of 8 and of 3 tokens an example.
    segments = np.array([[1] * 8 + [0] * 4, [1, 1, 1, 2, 2, 2] + [0] * 6], np.int32)
    noise = Transformer(config).apply(
        {"params": params}, jnp.zeros((2, 12, 16)), segments, rngs={"dropout": KEY}, method="_noise"
    )
    for row, length in zip(noise, (8, 3), strict=True):
        most = 5.0 / (length * 16) ** 0.5
        assert 0.95 * most < jnp.abs(row).max() <= most
        assert abs(float(row.std()) / (most / 3**0.5) - 1) < 0.1


def test_accumulation_equals_the_big_batch() -> None:
    """SGD's new parameters show the gradient itself; microbatches have very unequal numbers of target
    tokens.
    """
    parts = 4
    state, whole = setup(PLAIN)
    _, cut = setup(PLAIN, accumulation=parts)
    one, metrics = whole(state, batch(), KEY)
    two, cut_metrics = cut(state, batch(), KEY)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one.params), jax.tree.leaves(two.params), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=0, err_msg=str(path))
    assert metrics.keys() == cut_metrics.keys()
    for name, pair in metrics.items():
        np.testing.assert_allclose(pair, cut_metrics[name], rtol=1e-5, err_msg=name)
    # The mean of the microbatches' means is something else: the test would notice.
    evaluate = jax.jit(make_eval_step(LanguageModelLoss(PLAIN)))
    rows = [evaluate(state.params, _rows(r, parts))["loss"] for r in range(parts)]
    naive = np.mean([float(total / weight) for total, weight in rows])
    assert abs(naive - float(metrics["loss"][0] / metrics["loss"][1])) > 1e-3


def _rows(first: int, stride: int) -> dict[str, np.ndarray]:
    return {name: x[first::stride] for name, x in batch().items()}


def test_padding_does_not_count() -> None:
    state, step = setup(PLAIN)
    full = batch()
    padded = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in full.items()}
    one, a = step(state, full, KEY)
    two, b = step(state, padded, KEY)
    assert float(b["tokens"][0]) == float(a["tokens"][0]) == 8 * 12
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), one.params, two.params)


def test_dropout_depends_on_seed_and_step_only() -> None:
    state, step = setup(CONFIG, optax.sgd(0.0))
    later = state.replace(step=state.step + 1)
    losses = [float(step(s, batch(), k)[1]["loss"][0]) for s, k in ((state, KEY), (state, KEY), (later, KEY))]
    assert losses[0] == losses[1] != losses[2]
    assert float(step(state, batch(), jax.random.key(8))[1]["loss"][0]) != losses[0]
    evaluate = jax.jit(make_eval_step(LanguageModelLoss(CONFIG)))
    assert float(evaluate(state.params, batch())["loss"][0]) == float(
        evaluate(state.params, batch())["loss"][0]
    )


def test_skip_keeps_the_old_state() -> None:
    transform = Optimizer(learning_rate=SCHEDULE).build(state_lib.logical_axes(PLAIN), 10)
    state, step = setup(PLAIN, transform, skip_nonfinite=True)
    state, metrics = step(state, batch(), KEY)
    assert float(metrics["nonfinite"][0]) == 0.0
    bad = batch() | {"decoder_loss_weights": batch()["decoder_loss_weights"] * np.float32("nan")}
    after, metrics = step(state, bad, KEY)
    assert float(metrics["nonfinite"][0]) == 1.0
    assert all(float(part) == 0.0 for name in ("loss", "grad_norm") for part in metrics[name])
    assert int(after.step) == int(state.step) + 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)


def test_bf16_compute_keeps_f32_masters() -> None:
    state, step = setup(PLAIN.replace(dtype="bfloat16"))
    after, metrics = step(state, batch(), KEY)
    assert {x.dtype for x in jax.tree.leaves(after.params)} == {jnp.dtype("float32")}
    exact = setup(PLAIN)[1](state, batch(), KEY)[1]
    assert metrics["loss"][0].dtype == jnp.float32
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=2e-2)
    assert float(metrics["loss"][0]) != float(exact["loss"][0])


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_state_is_sharded_from_the_start(name: str) -> None:
    """Every moment lies where its parameter lies, and the values are those of one device."""
    config = PLAIN.replace(d_model=128, d_ff=256, num_heads=4)
    transform = Optimizer(name, SCHEDULE).build(state_lib.logical_axes(config), 10)
    abstract = state_lib.abstract_state(config, transform)
    mesh = MeshConfig(data=1, fsdp=4, tensor=2).build()
    shardings = state_lib.state_shardings(abstract, config, mesh)
    state = state_lib.init_state(config, transform, mesh, seed=3)
    alone = state_lib.init_state(config, transform, MeshConfig(devices=1).build(), seed=3)
    jax.tree.map(np.testing.assert_array_equal, state.params, alone.params)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    assert state_lib.bytes_per_device(abstract, shardings) < whole / 6
    if name == "adamw":
        nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        (adam,) = [node for node in nodes if hasattr(node, "mu")]
        for p, m, v in zip(*(jax.tree.leaves(t) for t in (state.params, adam.mu, adam.nu)), strict=True):
            assert p.sharding == m.sharding == v.sharding
