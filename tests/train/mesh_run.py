"""A few training steps of a small model on a given mesh: the tests run it in one process and in several.

As a script: `mesh_run.py ARCHITECTURE SIZES STEPS OUT`, sizes as in `data=2,fsdp=4`, joins the processes of
its environment and lets process 0 write the losses to OUT as JSON.
"""

import functools
import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from t5style.models import params as model_params
from t5style.models.config import TransformerConfig
from t5style.parallel import distributed
from t5style.parallel.mesh import MeshConfig, replicated
from t5style.parallel.rules import Rules, check_batch, host_shard, put_batch, use_mesh
from t5style.train.optimizer import Optimizer
from t5style.train.schedules import Schedule
from t5style.train.state import TrainState, abstract_state, init_state, state_shardings
from t5style.train.step import LanguageModelLoss, make_train_step

VOCABULARY, ROWS, LENGTH = 64, 16, 12

MODELS = {
    "encoder_decoder": TransformerConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_ff=64,
        num_heads=8,
        head_dim=8,
        encoder_layers=2,
        decoder_layers=2,
        dtype="float32",
        scan_layers=True,
        attention="reference",
    ),
    # Grouped-query attention, tied embeddings.
    "decoder_only": TransformerConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        d_ff=64,
        num_heads=8,
        num_kv_heads=2,
        head_dim=8,
        decoder_layers=2,
        activations=("silu", "linear"),
        positions="rope",
        scale_attention=True,
        tie_embeddings=True,
        init="normal",
        init_scale=0.05,
        dtype="float32",
        scan_layers=True,
        attention="reference",
    ),
}


def batch_at(n: int, shard: int, shards: int, architecture: str) -> dict[str, np.ndarray]:
    """Rows of batch n for one of `shards` readers: random tokens, two packed examples and padding."""
    rng = np.random.default_rng(n)
    batch = {}
    for side in ("encoder", "decoder") if architecture == "encoder_decoder" else ("decoder",):
        cuts = np.sort(rng.integers(1, LENGTH + 1, (ROWS, 2)), axis=1)  # [rows, 2]: ends of the two examples
        columns = np.arange(LENGTH)[None]
        first, second = columns < cuts[:, :1], columns < cuts[:, 1:]
        segments = np.where(first, 1, np.where(second, 2, 0))
        batch[f"{side}_segment_ids"] = segments
        batch[f"{side}_positions"] = np.where(segments == 2, columns - cuts[:, :1], columns * first)
        batch[f"{side}_input_tokens"] = rng.integers(2, VOCABULARY, (ROWS, LENGTH)) * (segments > 0)
    batch["decoder_target_tokens"] = rng.integers(2, VOCABULARY, (ROWS, LENGTH)) * (segments > 0)
    batch["decoder_loss_weights"] = segments > 0
    rows = ROWS // shards
    return {key: value[shard * rows : (shard + 1) * rows].astype(np.int32) for key, value in batch.items()}


def train(
    config: TransformerConfig,
    mesh_config: MeshConfig,
    steps: int,
    rules: Rules | None = None,
    optimizer: Optimizer | None = None,
    accumulation: int = 1,
    params: Any = None,
) -> tuple[list[float], TrainState]:
    """Losses of the first `steps` steps (from `params`, or random ones), and the state after them."""
    mesh = mesh_config.build()
    check_batch(ROWS, mesh, accumulation)
    shard, shards = host_shard(mesh)
    optimizer = optimizer or Optimizer(learning_rate=Schedule(kind="constant", peak=0.003), weight_decay=0.01)
    transform = optimizer.build(model_params.logical_axes(config), steps)
    shardings = state_shardings(abstract_state(config, transform), config, mesh, rules)
    step = make_train_step(
        LanguageModelLoss(config), transform, optimizer.learning_rate.build(steps), accumulation=accumulation
    )
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    losses = []
    with use_mesh(mesh, rules):
        state = init_state(config, transform, mesh, rules, 1, params)
        key = jax.jit(lambda: jax.random.key(0), out_shardings=replicated(mesh))()
        for n in range(steps):
            batch = put_batch(batch_at(n, shard, shards, config.architecture), mesh)
            if n == 0:
                step = step.lower(state, batch, key).compile()
                distributed.barrier("compiled")  # CPU devices wait for each other no longer than 30 s
            state, metrics = step(state, batch, key)
            total, weight = metrics["loss"]
            losses.append(float(total) / float(weight))
    return losses, state


@functools.cache
def start(architecture: str) -> Any:
    """Parameters to start from, made once for all meshes: compiling their random numbers takes as long as a
    step."""
    make = jax.jit(lambda key: model_params.init_params(MODELS[architecture], key))
    return jax.device_get(make(jax.random.key(1)))


@functools.cache
def alone(architecture: str, steps: int) -> list[float]:
    """The losses on one device, which all others must equal."""
    return train(MODELS[architecture], MeshConfig(devices=1), steps, params=start(architecture))[0]


def main(architecture: str, sizes: str, steps: str, out: str) -> None:
    """See the head of this file."""
    distributed.initialize()
    given = {axis: int(size) for axis, size in (part.split("=") for part in sizes.split(","))}
    losses, _ = train(MODELS[architecture], MeshConfig(**given), int(steps))
    if distributed.is_main():
        pathlib.Path(out).write_text(json.dumps({"losses": losses, "processes": jax.process_count()}))
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
