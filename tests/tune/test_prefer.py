"""Prefer: what it learns, with the reference live, beforehand, or under an adapter; and going on."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

import t5style
from t5style.data.objectives import Unpaired
from t5style.data.pipeline import BatchSource
from t5style.data.token_store import TokenStoreWriter
from t5style.models.adapters import Lora
from t5style.run_dir import RunDir, UserError
from t5style.train.optimizer import Optimizer
from t5style.train.pretrain import Pretrain
from t5style.train.schedules import Schedule
from t5style.tune import pairs, reference
from t5style.tune.pairs import PairSource
from t5style.tune.prefer import Prefer
from tests.evaluate import tiny_task
from tests.tune import tiny_pairs

MODEL = tiny_task.model(decoder_only=True)
CONSTANT = Optimizer(learning_rate=Schedule("constant", 3e-3))


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A store of pairs, and a model that has seen a little text."""
    folder = tmp_path_factory.mktemp("parent")
    text = tiny_task.make_store(str(folder / "text"))
    settings = tiny_task.settings(20, 3e-3) | {"mesh": tiny_pairs.ONE}
    Pretrain(model=MODEL, task=tiny_task.task(text), **settings)(RunDir(folder / "run").create())
    return tiny_pairs.make_store(str(folder / "pairs")), str(folder / "run")


def prefer(parent, steps: int = 12, **fields) -> Prefer:
    store, run = parent
    settings = tiny_pairs.settings(steps) | {"eval_every": 6, "log_every": 1, "optimizer": CONSTANT}
    return Prefer(init_from=run, task=tiny_pairs.task(store), **(settings | fields))


def lines(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def of(folder, name: str) -> list[float]:
    return [line[name] for line in lines(folder) if name in line]


def test_dpo_raises_the_margin_and_what_was_computed_beforehand_is_the_live_reference(parent, tmp_path):
    figures = prefer(parent)(RunDir(tmp_path / "live").create())
    losses = of(tmp_path / "live", "train/loss")
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # the policy is the reference
    margins = of(tmp_path / "live", "eval/pairs/reward_margin")
    assert 0.05 < margins[0] < margins[1]
    assert figures["eval/pairs/reward_accuracy"] > 0.7
    assert figures["eval/pairs/pairs"] == 21
    share = figures["eval/pairs/reward_accuracy"]
    assert figures["eval/pairs/reward_accuracy_error"] == pytest.approx((share * (1 - share) / 21) ** 0.5)
    shown = json.loads((tmp_path / "live" / "preflight.json").read_text())["tasks"][0]["examples"]
    assert len(shown) >= 2
    # Beforehand, and stopped on the way: the same run in two parts.
    beforehand = tmp_path / "beforehand"
    prefer(parent, 5, reference="precomputed", eval_split=None)(RunDir(beforehand).create())
    table = beforehand / "reference" / "pairs-train.npz"
    before = table.stat().st_mtime_ns
    prefer(parent, 12, reference="precomputed", eval_split=None)(RunDir(beforehand).create())
    assert table.stat().st_mtime_ns == before
    np.testing.assert_allclose(of(beforehand, "train/loss"), losses, rtol=1e-5, atol=1e-6)
    a, b = (t5style.load(tmp_path / name).params for name in ("live", "beforehand"))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def test_an_adapters_base_is_its_reference(parent, tmp_path):
    job = prefer(parent, 4, adapter=Lora(rank=4), method="ipo", beta=0.5, eval_split=None)
    job(RunDir(tmp_path / "run").create())
    losses = of(tmp_path / "run", "train/loss")
    assert losses[0] == pytest.approx(1.0, abs=1e-5)  # (0 - 1 / (2 · 0.5))²
    assert losses[3] < 0.999


def test_kto_learns_from_single_answers(parent, tmp_path):
    task = tiny_pairs.task(tiny_pairs.make_unpaired(str(tmp_path / "store")), Unpaired())
    job = prefer(parent, 6, method="kto", beta=0.3, reference="precomputed", eval_split=None)
    dataclasses.replace(job, task=task)(RunDir(tmp_path / "run").create())
    losses = of(tmp_path / "run", "train/loss")
    assert losses[0] == pytest.approx(0.5, abs=1e-6)  # 1 - σ(0)
    assert losses[5] < 0.499
    wanted, unwanted = (
        of(tmp_path / "run", f"train/reward_{name}")[5] for name in ("desirable", "undesirable")
    )
    assert wanted > unwanted


def test_pairs_that_are_the_same_twice_are_told_of(parent, tmp_path, capfd):
    def source(count: int, same: int, length: int = 24) -> PairSource:
        folder = str(tmp_path / f"{count}-{same}")
        with TokenStoreWriter(folder, ("prompt", "chosen", "rejected"), tiny_pairs.VOCABULARY) as writer:
            for i in range(count):
                rejected = [8, 9, 10, 11] if i < same else [8, 9, 10, 12, 13]
                writer.add("train", {"prompt": [5, 6], "chosen": [8, 9, 10, 11], "rejected": rejected})
        lengths = {"decoder": length}
        return PairSource(BatchSource(tiny_pairs.task(folder), "train", 2, lengths, "decoder_only"))

    pairs.check(source(5, 0))
    assert "WARNING" not in capfd.readouterr().err
    pairs.check(source(5, 2))
    assert "WARNING: in 2 of 5 pairs of task 'pairs'" in capfd.readouterr().err
    with pytest.raises(UserError, match="in none of the 3 pairs that were looked at"):
        pairs.check(source(3, 3))
    with pytest.raises(UserError, match=r"cut to the lengths \{'decoder': 4\}: raise the lengths"):
        pairs.check(source(4, 0, length=4))  # room for three tokens of each answer


class _Source:
    """Three batches of two pairs, each answer's log-likelihood its example's number; the second may fail."""

    evaluation_batches, fingerprint, batch_size = 3, "pairs", 2
    statistics = {"pairs": {"examples": 6}}  # noqa: RUF012

    def __init__(self, broken: bool = False, fingerprint: str = "pairs") -> None:
        self.tasks, self.broken, self.read = [tiny_pairs.task("nowhere")], broken, 0
        self.fingerprint = fingerprint

    def evaluation_batch_at(self, n, shard, shards):
        if self.broken and n == 1:
            raise UserError("the power is gone")
        self.read += 1
        return {"example": np.array([2 * n, 2 * n + 1], np.int32)}


def test_a_table_that_was_cut_short_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "SAVE_SECONDS", -1.0)

    def compute():
        def of_batch(batch):
            numbers = batch["example"][:, None].repeat(2, axis=1)
            return batch["example"], -numbers.astype(np.float32), (numbers != 5).astype(np.float32)

        return of_batch

    mesh, path = tiny_pairs.ONE.build(), tmp_path / "table.npz"

    def table(source, model="model"):
        return reference.table(path, model, PairSource(source), mesh, compute)

    with pytest.raises(UserError, match="the power is gone"):
        table(_Source(broken=True))
    rest = _Source()
    values = table(rest)
    assert rest.read == 2
    np.testing.assert_array_equal(values[:5], np.arange(0, -5, -1)[:, None].repeat(2, axis=1))
    assert np.isnan(values[5]).all()  # padding
    again, other = _Source(), _Source()
    np.testing.assert_array_equal(table(again), values)
    table(other, "another model")
    assert (again.read, other.read) == (0, 3)
    path.write_bytes(path.read_bytes()[:100])
    damaged = _Source()
    np.testing.assert_array_equal(table(damaged), values)
    assert damaged.read == 3


def test_what_cannot_be_meant_is_refused(parent):
    for fields, said in [
        ({"method": "dop"}, "method is 'dop'; it must be one of 'dpo'"),
        ({"reference": "frozen"}, "reference is 'frozen'; it must be 'live' or 'precomputed'"),
        ({"pack": True}, "do not share a row"),
        ({"z_loss": 1e-4}, "which losses of preferences do not have"),
        ({"label_smoothing": 0.6}, r"must lie in \[0, 0.5\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            prefer(parent, **fields)
