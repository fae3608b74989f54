"""Penalties hold what mattered, by their formulas and in training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5style
from t5style.data.pipeline import BatchSource
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError
from t5style.train import checkpoint, likelihood
from t5style.train.pretrain import Pretrain
from t5style.tune import continual
from t5style.tune.continual import Continue, Fisher, Penalized
from tests.evaluate import tiny_task

LENGTHS = {"decoder": 16}
ONE = MeshConfig(devices=1)


def test_distances_are_the_papers():
    random = np.random.default_rng(0)
    params, anchor, fisher = (
        {
            "a": random.normal(size=(3, 4)).astype(np.float32),
            "b": {"c": random.normal(size=5).astype(np.float32)},
        }
        for _ in range(3)
    )
    flat = [
        np.concatenate([tree["a"].ravel(), tree["b"]["c"]]).astype(np.float64)
        for tree in (params, anchor, fisher)
    ]
    l2, ewc = ((flat[0] - flat[1]) ** 2).sum() / 2, (flat[2] * (flat[0] - flat[1]) ** 2).sum() / 2
    np.testing.assert_allclose(continual.l2_distance(params, anchor), l2, rtol=1e-5)
    np.testing.assert_allclose(continual.ewc_distance(params, anchor, fisher), ewc, rtol=1e-5)
    inner = lambda params, batch, key: (jnp.float32(6.0), jnp.float32(3.0), {})  # noqa: E731
    objective, weight, metrics = Penalized(inner, 0.5, 2.0)(params, {}, None, (anchor, fisher))
    np.testing.assert_allclose(objective / weight, 2 + 0.5 * l2 + 2 * ewc, rtol=1e-5)
    np.testing.assert_allclose(
        [metrics[name][0] / metrics[name][1] for name in ("l2_sp", "ewc")], [l2, ewc], rtol=1e-5
    )


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A store and a run of a few steps."""
    folder = tmp_path_factory.mktemp("parent")
    store = tiny_task.make_store(str(folder / "store"))
    job = Pretrain(
        model=tiny_task.model(decoder_only=True),
        task=tiny_task.task(store),
        mesh=ONE,
        **tiny_task.settings(30),
    )
    job(RunDir(folder / "run").create())
    return store, str(folder / "run")


@pytest.fixture(scope="module")
def fisher(parent, tmp_path_factory):
    """The Fisher information of the parent: the run folder, and the job."""
    store, run = parent
    job = Fisher(
        run, tiny_task.task(store), lengths=tiny_task.LENGTHS, examples=24, batch_size=8, labels="data"
    )
    folder = tmp_path_factory.mktemp("fisher")
    assert job(RunDir(folder).create())["examples"] == 24
    return str(folder), job


def test_fisher_is_the_mean_of_squared_gradients_of_examples(parent, fisher):
    store, run = parent
    model = t5style.load(run)
    source = BatchSource(tiny_task.task(store), "train", 8, LENGTHS, "decoder_only", pack=False)
    rows = [
        {name: value[row : row + 1] for name, value in source.evaluation_batch_at(number).items()}
        for number in range(3)
        for row in range(8)
    ]
    gradient = jax.jit(
        jax.grad(lambda params, row: likelihood.log_likelihoods(model.config, params, row).sum())
    )
    squares = [
        jax.tree.map(lambda g: np.square(np.asarray(g, np.float64)), gradient(model.params, row))
        for row in rows
    ]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *squares)
    found = checkpoint.restore_params(fisher[0] + "/fisher")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, expected)
    # Of targets that the model draws itself: another sample, the same for the same seed.
    measure = jax.jit(functools.partial(continual.fisher_sum, model.config))
    drawn = [
        measure(model.params, source.evaluation_batch_at(0), jax.random.key(seed))[0]["embedding"]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0


def test_penalties_hold_the_parameters(parent, fisher, tmp_path):
    store, run = parent
    settings = tiny_task.settings(12) | {"init_from": run, "log_every": 1, "mesh": ONE, "accumulation": 2}
    tight = Continue(
        model=tiny_task.model(decoder_only=True),
        task=tiny_task.task(store),
        l2_sp=3.0,
        ewc=100.0,
        fisher=fisher[0],
        **settings,
    )
    moved = {}
    for name, job in (("tight", tight), ("loose", dataclasses.replace(tight, l2_sp=1e-9, ewc=1e-9))):
        job(RunDir(tmp_path / name).create())
        line = RunDir(tmp_path / name).read_metrics()[-1]
        moved[name] = line["train/l2_sp"], line["train/ewc"]
    assert 0 < moved["tight"][0] < 0.5 * moved["loose"][0]
    assert 0 < moved["tight"][1] < 0.5 * moved["loose"][1]
    with pytest.raises(UserError, match="was measured on another model"):
        dataclasses.replace(tight, init_from=str(tmp_path / "tight"))(RunDir(tmp_path / "x").create())


def test_what_holds_nothing_is_refused(parent):
    settings = tiny_task.settings(2) | {"init_from": parent[1], "store": parent[0]}
    with pytest.raises(ValueError, match="nothing holds the parameters; use Finetune"):
        Continue(**settings)
    with pytest.raises(ValueError, match=r"elastic weight consolidation needs both"):
        Continue(**settings, ewc=1.0)
    with pytest.raises(ValueError, match="give a task or a store"):
        Fisher(parent[1])
