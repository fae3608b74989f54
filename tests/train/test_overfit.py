"""A model of T5-small's shape learns 32 examples by heart: the whole chain from loss to update does learn."""

import jax
import numpy as np
import pytest

from t5style.models import presets
from t5style.parallel.mesh import MeshConfig
from t5style.train import state as state_lib
from t5style.train.optimizer import Optimizer
from t5style.train.schedules import Schedule
from t5style.train.step import LanguageModelLoss, make_eval_step, make_train_step

STEPS = 80


def examples(
    rows: int = 32, inputs: int = 8, targets: int = 4, vocabulary: int = 128
) -> dict[str, np.ndarray]:
    """Random inputs and random targets: nothing to generalise, everything to remember."""
    generator = np.random.default_rng(0)
    read = generator.integers(3, vocabulary, (rows, inputs)).astype(np.int32)
    say = generator.integers(3, vocabulary, (rows, targets)).astype(np.int32)
    say[:, -1] = 1
    return {
        "encoder_input_tokens": read,
        "encoder_segment_ids": np.ones_like(read),
        "encoder_positions": np.tile(np.arange(inputs, dtype=np.int32), (rows, 1)),
        "decoder_input_tokens": np.pad(say[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": say,
        "decoder_loss_weights": np.ones_like(say),
        "decoder_segment_ids": np.ones_like(say),
        "decoder_positions": np.tile(np.arange(targets, dtype=np.int32), (rows, 1)),
    }


@pytest.mark.slow
def test_t5_small_overfits_32_examples() -> None:
    # All of T5-small but the vocabulary; scanned layers compile in a fraction of the time.
    config = presets.t5_small().replace(vocab_size=128, dtype="float32", dropout=0.0, scan_layers=True)
    assert (config.d_model, config.encoder_layers, config.decoder_layers) == (512, 6, 6)
    schedule = Schedule("linear", 3e-4, warmup_steps=10)
    transform = Optimizer(learning_rate=schedule, b2=0.98).build(state_lib.logical_axes(config), STEPS)
    state = state_lib.init_state(config, transform, MeshConfig(devices=1).build())
    loss = LanguageModelLoss(config)
    step = jax.jit(make_train_step(loss, transform, schedule.build(STEPS)), donate_argnums=0)
    batch, key = jax.device_put(examples()), jax.random.key(0)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, batch, key)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        if losses[-1] < 0.009:
            break
    assert losses[0] > 3.0
    total, weight = jax.jit(make_eval_step(loss))(state.params, batch)["loss"]
    assert float(total / weight) < 0.01, losses[::5]
