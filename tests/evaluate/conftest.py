"""One store, one trained model and one that has hardly begun, for the tests of this room and of tune."""

from __future__ import annotations

import dataclasses

import pytest

from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir
from t5style.train.pretrain import Pretrain
from tests.evaluate import tiny_task


@dataclasses.dataclass(frozen=True)
class Fixture:
    """Folders: a token store, a run before tuning and one after."""

    store: str
    before: str
    after: str


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """Trains for a few seconds."""
    folder = tmp_path_factory.mktemp("tiny")
    store = tiny_task.make_store(str(folder / "store"))
    one = MeshConfig(devices=1)
    for name, steps in (("before", 2), ("after", 400)):
        job = Pretrain(
            model=tiny_task.model(),
            task=tiny_task.task(store),
            mesh=one,
            pack=False,
            **tiny_task.settings(steps),
        )
        job(RunDir(folder / name).create())
    return Fixture(store, str(folder / "before"), str(folder / "after"))
