"""Loss and gradients of models whose sequences are divided, against one device, on packed rows."""

import functools

import jax
import numpy as np
import pytest

from t5style.models import params as model_params
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import param_shardings, put_batch, use_mesh
from t5style.train.step import LanguageModelLoss
from tests.train import mesh_run
from tests.train.mesh_run import MODELS, start

SPARSE = {"layer_pattern": ("window", "chunk"), "window": 5, "global_tokens": 2}


def loss_and_gradients(architecture, changes, sizes):
    """Of one batch of 16 rows of 32 positions."""
    config = MODELS[architecture].replace(**changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh_run, "LENGTH", 32)
        batch = mesh_run.batch_at(0, 0, 1, architecture)
    mesh = MeshConfig(**sizes).build()
    loss = LanguageModelLoss(config)

    def objective(params, batch):
        total, weight, _ = loss(params, batch, None)
        return total / weight

    params = start(architecture)
    with use_mesh(mesh):
        params = jax.device_put(params, param_shardings(model_params.logical_axes(config), params, mesh))
        return jax.device_get(jax.jit(jax.value_and_grad(objective))(params, put_batch(batch, mesh)))


@functools.cache
def alone(architecture, sparse):
    return loss_and_gradients(architecture, SPARSE if sparse else {}, {"devices": 1})


@pytest.mark.parametrize(
    ("architecture", "kind", "sizes", "sparse"),
    [
        ("decoder_only", "ring", {"data": 1, "sequence": 8}, False),
        ("decoder_only", "ring", {"data": 1, "sequence": 2, "tensor": 2, "fsdp": 2}, False),
        ("decoder_only", "ulysses", {"data": 1, "sequence": 4, "fsdp": 2}, False),
        ("decoder_only", "ring", {"data": 2, "sequence": 4}, True),
        ("encoder_decoder", "ring", {"data": 2, "sequence": 4}, False),
        ("encoder_decoder", "ulysses", {"data": 1, "sequence": 4, "tensor": 2}, False),
    ],
    ids=str,
)
def test_divided_sequences_give_the_same_loss_and_gradients(architecture, kind, sizes, sparse):
    changes = (SPARSE if sparse else {}) | {"sequence_attention": kind}
    got = loss_and_gradients(architecture, changes, sizes)
    want = alone(architecture, sparse)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), jax.tree_util.keystr(path)


def test_a_length_that_does_not_divide_is_refused_when_the_step_is_traced():
    config = MODELS["decoder_only"].replace(sequence_attention="ring")
    with pytest.raises(ValueError, match="divides 12 positions by sequence=8, and twice"):
        mesh_run.train(config, MeshConfig(data=1, sequence=8), 1, params=start("decoder_only"))
