"""Every file of gin/mesh compiles a training step for devices of its kind, and its options are known."""

import re

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5style import launch
from t5style.nn.settings import MoE
from t5style.parallel import topologies
from t5style.parallel.mesh import AXES
from t5style.parallel.topologies import parse_slice
from t5style.train.program import TrainingProgram
from tests import helpers
from tests.train.mesh_run import MODELS

DENSE = MODELS["decoder_only"].replace(dtype="bfloat16", attention="auto", d_model=64)
MIXTURE = DENSE.replace(moe=MoE(experts=4, per_token=2, d_ff=32))
# File -> a small slice to compile for, and the axes that the file divides there. XLA's options come with a
# layout of their generation; those for GPUs are known to jaxlib on every machine.
RECIPES = {
    "data": ("v5e-8", {"data": 8}),
    "fsdp": ("v5e-8", {"fsdp": 8}),
    "fsdp_tensor": ("v5e-8", {"fsdp": 4, "tensor": 2}),
    "sequence": ("v5p-16", {"fsdp": 2, "sequence": 4}),
    "expert": ("v5p-16", {"fsdp": 2, "expert": 4}),
    "stage": ("v5p-16", {"fsdp": 4, "stage": 2}),
    "slices": ("2xv5e-4", {"data": 2, "fsdp": 4}),
    "cpu8": ("v5e-8", {"data": 2, "fsdp": 2, "tensor": 2}),
    "single": ("v5e-4", {}),
    "v4_128": ("v4-16", {"fsdp": 8}),
    "v5e_256": ("v5e-16", {"fsdp": 16}),
    "v5p_128": ("v5p-16", {"fsdp": 8}),
    "v6e_256": ("v6e-16", {"fsdp": 16}),
    "tpu7x_128": ("tpu7x-8", {"fsdp": 8}),
}
OPTIONS = {"xla_v4", "xla_v5e", "xla_v5p", "xla_v6e", "xla_tpu7x", "gpu"}


def recipe(name):
    """The MeshConfig that the file makes."""
    pieces = ["models/llama_tiny", "data/causal_lm", f"mesh/{name}", "optim/adamw", "runs/pretrain"]
    files = [str(helpers.ROOT / f"gin/{piece}.gin") for piece in pieces]
    return launch.load(files, ["RUN_DIR='runs/test'", "STORE='tokens'"], [str(helpers.ROOT)]).job.mesh


def test_every_recipe_is_tested():
    files = {file.stem: file.read_text() for file in (helpers.ROOT / "gin/mesh").glob("*.gin")}
    assert files.keys() == RECIPES.keys() | OPTIONS
    included = {
        name for text in files.values() for name in re.findall(r"^include '.*/(xla_\w+)\.gin'", text, re.M)
    }
    assert included | {"gpu"} == OPTIONS


def test_jaxlib_knows_the_options_for_gpus():
    config = recipe("gpu")
    assert config.compiler_options["xla_gpu_enable_latency_hiding_scheduler"] is True
    assert config.compile(jax.jit(lambda x: x + 1).lower(1.0))(1.0) == 2.0


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_compiles_the_training_step(name):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    config, (where, sizes) = recipe(name), RECIPES[name]
    mesh = config.build(topologies.devices(parse_slice(where)))
    assert {axis: mesh.shape[axis] for axis in AXES if mesh.shape[axis] > 1} == sizes
    model = MIXTURE if "expert" in sizes else DENSE
    if "sequence" in sizes:
        model = model.replace(sequence_attention="ring")
    program = TrainingProgram(model, {"decoder": 16}, batch_size=16, mesh=config, steps=10)
    compiled = program.compile(mesh)
    text = compiled.as_text()
    assert compiled.memory_analysis().peak_memory_in_bytes < parse_slice(where).chip.usable_hbm_bytes
    assert ("all-reduce" in text) == bool(sizes)
    assert ("all-gather" in text) == ("fsdp" in sizes)
    assert ("collective-permute" in text) or not sizes.keys() & {"sequence", "stage"}


@pytest.mark.tpu_aot
@pytest.mark.parametrize("name", ["v5e-256", "v5p-128"])
def test_the_options_keep_reduce_scatters_over_a_whole_torus(name):
    """What gin/mesh/xla_v5e.gin says of its first options."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    config = recipe(name.replace("-", "_"))
    mesh = config.build(topologies.devices(parse_slice(name)))
    rows, columns = PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")

    def gradient(x):  # [4096, 256/n] -> [4096/n, 128]: summed over the devices, each of which keeps its rows
        return jax.lax.psum_scatter(x @ x[:128].T, "fsdp", tiled=True)

    program = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=columns, out_specs=rows, check_vma=False))
    x = jax.ShapeDtypeStruct((4096, 256), "bfloat16", sharding=NamedSharding(mesh, columns))
    lowered = program.lower(x)
    assert re.search(r" all-reduce\(", lowered.compile().as_text())
    text = config.compile(lowered).as_text()
    assert re.search(r" reduce-scatter\(|calls=%all-reduce-scatter", text)
