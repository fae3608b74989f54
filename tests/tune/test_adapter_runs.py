"""Tuning with an adapter: what is trained and kept, and loading it again with its base."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

import t5style
from t5style.models.adapters import Lora
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError
from t5style.train import checkpoint
from t5style.train.optimizer import Optimizer
from t5style.train.pretrain import Pretrain
from t5style.train.schedules import Schedule
from t5style.tune.supervised import Finetune
from tests.evaluate import tiny_task

MESH = MeshConfig(data=1, fsdp=2, tensor=2, devices=4)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A store and a run of a few steps."""
    folder = tmp_path_factory.mktemp("parent")
    store = tiny_task.make_store(str(folder / "store"))
    settings = tiny_task.settings(5) | {"mesh": MeshConfig(devices=1)}
    Pretrain(model=tiny_task.model(), task=tiny_task.task(store), **settings)(RunDir(folder / "run").create())
    return store, str(folder / "run")


def job(parent: tuple[str, str], steps: int, mesh: MeshConfig = MESH, rank: int = 2) -> Finetune:
    optimizer = Optimizer(learning_rate=Schedule("constant", 1e-2))
    settings = tiny_task.settings(steps) | {"mesh": mesh, "optimizer": optimizer}
    return Finetune(task=tiny_task.task(parent[0]), init_from=parent[1], adapter=Lora(rank=rank), **settings)


def test_an_adapter_is_trained_kept_resumed_and_loaded(
    parent: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    run = RunDir(tmp_path / "run").create()
    job(parent, 20)(run)
    base, tuned = t5style.load(parent[1]), t5style.load(run.path)
    np.testing.assert_array_equal(tuned.params["embedding"], base.params["embedding"])
    pairs = tiny_task.examples("validation", 21)
    inputs, targets = [source for source, _ in pairs], [target for _, target in pairs]
    assert tuned.score(inputs, targets).sum() > base.score(inputs, targets).sum() + 100
    assert len(tuned.generate(inputs[:3], 8)) == 3
    # The checkpoint has the adapter and its optimiser alone.
    state = checkpoint.restore_params(run.path)
    names = {
        jax.tree_util.keystr(path[-1:], simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(state)
    }
    assert names == {"lora_a", "lora_b"}
    # On another mesh: the same adapter; stopped half-way and resumed: bit for bit.
    one = RunDir(tmp_path / "one").create()
    job(parent, 10, MeshConfig(devices=1))(one)
    job(parent, 20, MeshConfig(devices=1))(one)
    for a, b in zip(
        jax.tree.leaves(checkpoint.restore_params(one.path)), jax.tree.leaves(state), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_an_adapter_needs_its_own_base(parent: tuple[str, str], tmp_path: pathlib.Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(parent[1], base)
    run = RunDir(tmp_path / "run").create()
    job((parent[0], str(base)), 1)(run)
    other = Pretrain(
        model=tiny_task.model(), task=tiny_task.task(parent[0]), seed=1, mesh=MESH, **tiny_task.settings(2)
    )
    shutil.rmtree(base)
    with pytest.raises(UserError, match="which is not there any more"):
        t5style.load(run.path)
    other(RunDir(base).create())
    with pytest.raises(UserError, match=r"but another one is there\s+now"):
        t5style.load(run.path)
    description = json.loads((run.path / "adapter.json").read_text())
    (run.path / "adapter.json").write_text(json.dumps({**description, "type": "Lorra"}))
    with pytest.raises((UserError, ValueError), match="no adapter of type 'Lorra', only Lora"):
        t5style.load(run.path)
