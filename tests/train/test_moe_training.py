"""Training of models with experts: routers' losses, balancing, figures, and the same on every mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5style.models import params as model_params
from t5style.models.transformer import Transformer
from t5style.nn import platform
from t5style.nn.settings import MoE
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import param_shardings, put_batch, use_mesh
from t5style.train.optimizer import Optimizer
from t5style.train.schedules import Schedule
from t5style.train.state import TrainState
from t5style.train.step import LanguageModelLoss, make_train_step
from tests.train.mesh_run import MODELS, batch_at
from tests.train.test_partitioning import compiled_step

KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"
LOSSES = {"balance_loss": 0.02, "router_z_loss": 0.003}
SETTINGS = MoE(8, 2, 16, normalize=True, shared_d_ff=8, **LOSSES)

# Compiled in a third of the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def model(architecture, moe=SETTINGS, **fields):
    if architecture == "encoder_decoder":
        fields |= {"encoder_layers": 1, "decoder_layers": 1}
    return MODELS[architecture].replace(moe=moe, **fields)


@functools.cache
def start(config):
    rng = np.random.default_rng(1)  # jax's random numbers take longer to compile than a step
    params = jax.tree.map(
        lambda leaf: (rng.normal(size=leaf.shape) / leaf.shape[-1] ** 0.5).astype(np.float32),
        model_params.abstract_params(config),
    )
    if config.moe.correction_bias:
        bias = params["decoder"]["moe_layers"]["mlp"]["router_bias"]
        bias[...] = 0.01 * bias
    return params


def gradient(config, mesh=None):
    """Objective per target, gradients, and metrics, of batch 0; on a mesh or on one device."""
    loss = LanguageModelLoss(config)

    def mean(params, batch):
        total, weight, metrics = loss(params, batch, jax.random.key(0))
        return total / weight, metrics

    run = jit(jax.value_and_grad(mean, has_aux=True))
    params, batch = start(config), batch_at(0, 0, 1, config.architecture)
    if mesh is None:
        return jax.device_get(run(params, batch))
    mesh = mesh.build()
    with use_mesh(mesh):
        shardings = param_shardings(model_params.logical_axes(config), params, mesh)
        return jax.device_get(run(jax.device_put(params, shardings), put_batch(batch, mesh)))


alone = functools.cache(gradient)


def assert_same(got, want, rtol=1e-5):
    (loss, metrics), gradients = got
    (want_loss, want_metrics), want_gradients = want
    np.testing.assert_allclose(loss, want_loss, rtol=rtol)
    for name, pair in want_metrics.items():
        np.testing.assert_allclose(metrics[name], pair, rtol=1e-4, atol=1e-6, err_msg=name)
    whole = optax.tree.norm(want_gradients)
    apart = optax.tree.norm(jax.tree.map(np.subtract, gradients, want_gradients))
    assert apart <= rtol * whole, apart / whole
    named = zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(want_gradients), strict=True)
    for (path, a), b in named:
        np.testing.assert_allclose(
            a, b, rtol=1e-3, atol=1e-5 * max(np.abs(b).max(), 1e-3), err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("decoder_only", {"data": 4, "expert": 2}),
        ("encoder_decoder", {"data": 2, "expert": 4}),
        ("decoder_only", {"data": 1, "expert": 8}),
        ("decoder_only", {"data": 1, "fsdp": 2, "expert": 4}),
        ("encoder_decoder", {"data": 1, "fsdp": 4, "expert": 2}),
        ("decoder_only", {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}),
        ("encoder_decoder", {"data": 2, "expert": 2, "sequence": 2}),
        ("decoder_only", {"data": 1, "fsdp": 8}),
    ],
    ids=str,
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(architecture, sizes):
    config = model(architecture)
    assert_same(gradient(config, MeshConfig(**sizes)), alone(config))


@pytest.mark.parametrize("fields", [{"remat": "full"}, {"scan_layers": False, "remat": "mlp"}], ids=str)
def test_scan_and_remat_change_nothing(fields):
    config = model("decoder_only")
    assert_same(gradient(config.replace(**fields)), alone(config))


def test_experts_of_a_capacity_are_the_same_on_a_mesh():
    """Rows that find no room stay away from the exchange, whose buffers the capacity bounds."""
    moe = MoE(4, 2, 16, capacity_factor=0.75, bias=True, correction_bias=True, router="sigmoid", **LOSSES)
    config = model("decoder_only", moe, decoder_layers=1)
    want = alone(config)
    (_, metrics), _ = want
    assert 0 < metrics["moe_dropped"][0] < metrics["moe_dropped"][1]
    assert_same(gradient(config, MeshConfig(data=2, expert=2, tensor=2)), want)


def test_ragged_exchange(monkeypatch):
    """What a TPU does, by an operation that does what jax.lax.ragged_all_to_all says it does."""

    def moved(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
        me = jax.lax.axis_index(axis_name)
        sent = (operand, input_offsets, send_sizes, output_offsets)
        for rows, first, size, to in zip(*(jax.lax.all_gather(x, axis_name) for x in sent), strict=True):
            place = jnp.arange(len(output)) - to[me]
            taken = jnp.take(rows, first[me] + place, axis=0, mode="clip")
            output = jnp.where(((place >= 0) & (place < size[me]))[:, None], taken, output)
        return output

    monkeypatch.setattr(platform, "ragged_exchange", lambda: True)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", moved)
    config = model("decoder_only", decoder_layers=1)
    assert_same(gradient(config, MeshConfig(data=1, expert=4, devices=4)), alone(config))


def test_losses_of_routers_are_added_and_padding_does_not_count():
    config = model("decoder_only")
    batch = batch_at(0, 0, 1, "decoder_only")
    loss = jit(lambda params, batch: LanguageModelLoss(config)(params, batch, None))
    total, weight, metrics = loss(start(config), batch)
    plain = {name: pair[0] / pair[1] for name, pair in metrics.items()}
    added = 0.02 * plain["moe_balance_loss"] + 0.003 * plain["moe_router_z_loss"]
    np.testing.assert_allclose(total / weight, plain["loss"] + added, rtol=1e-5)
    # An even load costs per_token, and what is uneven more.
    assert 2.0 <= plain["moe_balance_loss"] < 4
    assert plain["moe_least_loaded"] < 1 / 8 < plain["moe_most_loaded"] < 0.5
    assert 0.5 < plain["moe_load_entropy"] <= 1
    assert plain["moe_dropped"] == 0
    # Other tokens where padding is change nothing.
    padding = batch["decoder_segment_ids"] == 0
    other = batch | {"decoder_input_tokens": np.where(padding, 7, batch["decoder_input_tokens"])}
    np.testing.assert_allclose(loss(start(config), other)[0], total, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_only_the_load_moves_the_corrections(optimizer):
    """Of all microbatches together; not the optimiser, whose weight decay is large here."""
    moe = MoE(4, 2, 16, router="sigmoid", correction_bias=True, bias_update_rate=0.01)
    config = model("decoder_only", moe, decoder_layers=1)
    optimizer = Optimizer(optimizer, Schedule("constant", peak=0.1), weight_decay=0.5)
    transform = optimizer.build(model_params.logical_axes(config), 1)
    step = make_train_step(
        LanguageModelLoss(config), transform, optimizer.learning_rate.build(1), accumulation=2
    )
    params, batch = start(config), batch_at(0, 0, 1, "decoder_only")
    state = TrainState(jnp.int32(0), params, transform.init(params))
    after, metrics = jit(step)(state, batch, jax.random.key(0))
    old, new = (p["decoder"]["moe_layers"]["mlp"]["router_bias"] for p in (params, after.params))
    _, routers = jit(
        lambda params, batch: Transformer(config).apply(
            {"params": params},
            batch["decoder_input_tokens"],
            decoder_positions=batch["decoder_positions"],
            decoder_segment_ids=batch["decoder_segment_ids"],
            method="hidden_and_routers",
        )
    )(params, batch)
    load = np.asarray(routers["decoder"].load)
    assert load.sum() == 2 * (batch["decoder_segment_ids"] > 0).sum()
    np.testing.assert_allclose(new - old, 0.01 * np.sign(load.mean() - load), atol=1e-7)
    assert not any("load/" in name for name in metrics)
    assert all(np.shape(value) == () for pair in metrics.values() for value in pair)


def test_experts_that_do_not_divide_are_refused():
    config = model("decoder_only", MoE(6, 2, 16))
    with pytest.raises(ValueError, match=r"axis 'expert' of size 6 does not divide by expert=4\. Choose"):
        param_shardings(
            model_params.logical_axes(config),
            model_params.abstract_params(config),
            MeshConfig(expert=4).build(),
        )


@pytest.mark.tpu_aot
def test_what_a_tpu_slice_exchanges(monkeypatch):
    """In a layer: tokens by ragged all-to-all, weights gathered, gradients of experts' weights scattered."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    config = model("decoder_only", dtype="bfloat16", remat="full", d_model=128)
    mesh = MeshConfig(data=1, fsdp=2, expert=2).build(devices)
    text = compiled_step(config, mesh).as_text()
    assert "tgmm" in text
    experts = [line for line in text.splitlines() if "/while/body/" in line and "mlp/experts" in line]
    kinds = {
        kind
        for line in experts
        for kind in re.findall(rf" ({KINDS})(?:-start)?\(", line.split(", metadata")[0])
    }
    # The plain all-to-all is of a few numbers: where the ragged one puts its rows.
    assert kinds == {"all-gather", "reduce-scatter", "ragged-all-to-all", "all-to-all"}
