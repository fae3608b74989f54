"""What the compiler makes of the sharding rules: read in the compiled training step, on CPU and for a
described TPU."""

import collections
import re

import jax
import pytest

from t5style.models import params as model_params
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import batch_sharding, use_mesh
from t5style.train.optimizer import Optimizer
from t5style.train.state import abstract_state, state_shardings, with_shardings
from t5style.train.step import LanguageModelLoss, make_train_step
from tests.train.mesh_run import LENGTH, MODELS, ROWS, VOCABULARY, batch_at


def compiled_step(config, mesh):
    """The training step for abstract arguments: nothing is allocated."""
    optimizer = Optimizer()
    transform = optimizer.build(model_params.logical_axes(config), 1)
    abstract = abstract_state(config, transform)
    shardings = state_shardings(abstract, config, mesh)
    step = make_train_step(LanguageModelLoss(config), transform, optimizer.learning_rate.build(1))
    batch = {
        name: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=batch_sharding(mesh))
        for name, rows in batch_at(0, 0, 1, config.architecture).items()
    }
    key = jax.eval_shape(lambda: jax.random.key(0))
    with use_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(
            with_shardings(abstract, shardings), batch, key
        )
        return lowered.compile()


def collectives(text):
    """Shapes by kind of collective, f32[32,64] say, from a program's text."""
    found = collections.defaultdict(set)
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        found[kind].update(re.findall(r"\w+\[[\d,]*\]", shapes))
    return found


def test_fsdp_gathers_parameters_and_keeps_activations_divided():
    config = MODELS["decoder_only"]
    text = compiled_step(config, MeshConfig(data=1, fsdp=8).build()).as_text()
    found = collectives(text)
    # Weights, whole for as long as they are used: MLP [embed, mlp], queries [embed, heads · head_dim].
    assert "f32[32,64]" in found["all-gather"]
    # Their gradients are summed over the devices (XLA's CPU backend has no pass that makes it a
    # reduce-scatter).
    assert {"f32[32,64]", "f32[64,32]"} <= found["all-reduce"] | found["reduce-scatter"]
    # No device ever has all rows of an activation: width of the model, of the MLP, of the vocabulary.
    for width in (config.d_model, config.d_ff, VOCABULARY):
        assert f"f32[{ROWS},{LENGTH},{width}]" not in text
        assert f"f32[{ROWS * LENGTH},{width}]" not in text


def test_data_parallelism_sums_gradients_and_nothing_else():
    text = compiled_step(MODELS["decoder_only"], MeshConfig(data=8).build()).as_text()
    assert set(collectives(text)) == {"all-reduce"}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("architecture", MODELS)
def test_the_rules_compile_for_a_tpu_slice(architecture, monkeypatch):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build(devices)
    # Tensor parallelism lies on chips that are neighbours on the torus.
    for pair in mesh.devices.reshape(-1, 2):
        assert sum(abs(a - b) for a, b in zip(pair[0].coords, pair[1].coords, strict=True)) == 1
    config = MODELS[architecture].replace(dtype="bfloat16", attention="auto", scan_layers=None)
    compiled = compiled_step(config, mesh)
    text = compiled.as_text()
    assert "all-reduce" in text  # gradients over data
    for width in (config.d_model, config.d_ff, VOCABULARY):
        assert f"[{ROWS},{LENGTH},{width}]" not in text
    assert compiled.memory_analysis().peak_memory_in_bytes < 16 << 30
