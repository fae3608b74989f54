"""The same losses on every mesh, and each device holding its part only."""

import jax
import numpy as np
import pytest

from t5style.models import params as model_params
from t5style.parallel.mesh import MeshConfig, replicated
from t5style.parallel.rules import Rules
from t5style.train.checkpoint import Checkpointer
from t5style.train.optimizer import Optimizer
from t5style.train.schedules import Schedule
from t5style.train.state import abstract_state, init_state, state_shardings, with_shardings
from tests.train.mesh_run import MODELS, alone, start, train

STEPS = 5
TENSOR_8 = {"data": 1, "tensor": 8}


# Data, fsdp and tensor alone, and mixtures of all axes with each model: what is missing, test_processes has.
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("encoder_decoder", {"data": 8}),
        ("decoder_only", {"data": 1, "fsdp": 8}),
        ("decoder_only", TENSOR_8),
        ("encoder_decoder", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("encoder_decoder", {"data": 2, "fsdp": 2, "sequence": 2}),
        ("decoder_only", {"data": 2, "fsdp": 2, "sequence": 2}),
    ],
    ids=str,
)
def test_losses_do_not_depend_on_the_mesh(architecture, sizes):
    # The two key-value heads of the decoder-only model do not divide by 8: a copy on each device.
    rules = Rules(parameters={"kv_heads": None}) if sizes is TENSOR_8 else None
    mesh, params = MeshConfig(**sizes), start(architecture)
    losses, _ = train(MODELS[architecture], mesh, STEPS, rules, params=params)
    np.testing.assert_allclose(losses, alone(architecture, STEPS), rtol=1e-5)
    assert len(set(losses)) == STEPS


def test_losses_of_the_program_that_cpus_run():
    """The attention and the unrolled layers that 'auto' chooses on a CPU, with microbatches and Adafactor."""
    config = MODELS["encoder_decoder"].replace(
        scan_layers=False, attention="auto", decoder_layers=1, encoder_layers=1
    )
    optimizer = Optimizer("adafactor", Schedule("constant", peak=0.01))
    one, _ = train(config, MeshConfig(devices=1), 2, optimizer=optimizer, accumulation=2)
    many, _ = train(config, MeshConfig(data=2, fsdp=2, tensor=2), 2, optimizer=optimizer, accumulation=2)
    np.testing.assert_allclose(many, one, rtol=1e-5)


def test_key_value_heads_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match="key/kernel: its axis 'kv_heads' of size 2 does not divide by tensor=8"
    ):
        train(MODELS["decoder_only"], MeshConfig(**TENSOR_8), 1)


@pytest.fixture(scope="module")
def whole():
    """A model whose embedding is larger than all else, and its optimiser."""
    config = MODELS["decoder_only"].replace(vocab_size=4096, decoder_layers=1)
    transform = Optimizer().build(model_params.logical_axes(config), 1)
    return config, transform


def test_initialisation_makes_each_part_where_it_belongs(whole):
    config, transform = whole
    mesh = MeshConfig(data=1, fsdp=4, tensor=2).build()
    abstract = abstract_state(config, transform)
    shardings = state_shardings(abstract, config, mesh)
    state = init_state(config, transform, mesh)
    for leaf, like, sharding in zip(*map(jax.tree.leaves, (state, abstract, shardings)), strict=True):
        assert leaf.sharding == sharding
        assert leaf.shape == like.shape
    embedding = state.params["embedding"]
    assert {shard.data.shape for shard in embedding.addressable_shards} == {(4096 // 2, 32 // 4)}
    # What each device holds in all: an eighth, and the few vectors that are whole.
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for device in mesh.devices.flat:
        held = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(state)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert held < 0.13 * total
    # Nor does the program need the whole on the way.
    alone, parts = (
        jax.jit(lambda key: model_params.init_params(config, key), out_shardings=where)
        .lower(jax.random.key(0))
        .compile()
        .memory_analysis()
        for where in (replicated(MeshConfig(devices=1).build()), shardings.params)
    )
    assert parts.output_size_in_bytes < 0.13 * alone.output_size_in_bytes
    assert parts.temp_size_in_bytes < 0.2 * alone.temp_size_in_bytes


def test_initial_parameters_do_not_depend_on_the_mesh(whole):
    config, transform = whole
    one = init_state(config, transform, MeshConfig(devices=1).build(), seed=3)
    many = init_state(config, transform, MeshConfig(data=2, fsdp=2, tensor=2).build(), seed=3)
    jax.tree.map(np.testing.assert_array_equal, one.params, many.params)


def test_a_checkpoint_goes_onto_any_other_mesh(tmp_path):
    config = MODELS["decoder_only"]
    transform = Optimizer().build(model_params.logical_axes(config), 1)
    saved = init_state(config, transform, MeshConfig(data=1, fsdp=4, tensor=2).build(), seed=5)
    keeper = Checkpointer(tmp_path / "checkpoints")
    keeper.save(0, saved, {"step": 0})
    keeper.close()
    abstract = abstract_state(config, transform)
    for target in (MeshConfig(devices=1), MeshConfig(data=4, tensor=2), MeshConfig(fsdp=2, devices=4)):
        shardings = state_shardings(abstract, config, target.build())
        keeper = Checkpointer(tmp_path / "checkpoints")
        restored, _ = keeper.restore_latest(with_shardings(abstract, shardings))
        keeper.close()
        jax.tree.map(np.testing.assert_array_equal, saved, restored)
        for leaf, sharding in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
