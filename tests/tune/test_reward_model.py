"""RewardModel: it tells the answers apart, says how sure it is, and is used by others."""

from __future__ import annotations

import json

import numpy as np
import pytest

import t5style
from t5style.models.adapters import Lora
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError
from t5style.train.pretrain import Pretrain
from t5style.tune.reward_model import HEAD, RewardModel
from t5style.tune.reward_scorer import LearnedReward, RewardScorer
from tests.evaluate import tiny_task
from tests.tune import tiny_pairs


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A store of pairs, and a run of two steps."""
    folder = tmp_path_factory.mktemp("parent")
    text = tiny_task.make_store(str(folder / "text"))
    settings = tiny_task.settings(2) | {"mesh": tiny_pairs.ONE}
    model = tiny_task.model(decoder_only=True)
    Pretrain(model=model, task=tiny_task.task(text), **settings)(RunDir(folder / "run").create())
    return tiny_pairs.make_store(str(folder / "pairs"), train=128), str(folder / "run")


def reward_model(parent, **fields) -> RewardModel:
    store, run = parent
    settings = tiny_pairs.settings(1, 1e-2) | {"log_every": 1}
    return RewardModel(init_from=run, task=tiny_pairs.task(store), **(settings | fields))


def test_it_learns_and_scores_as_it_was_evaluated(parent, tmp_path):
    run = RunDir(tmp_path / "run").create()
    figures = reward_model(parent, adapter=Lora(rank=8), epochs=2, centering=0.01)(run)
    assert figures["steps"] == 16
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)  # the head begins at 0
    assert np.mean(losses[-4:]) < losses[0]
    assert (run.path / "eval" / "accuracy.txt").read_text().count("epoch") == 2
    table = json.loads((run.path / "eval" / "reliability.json").read_text())["pairs"]
    assert sum(row["pairs"] for row in table["bins"]) == figures["eval/pairs/pairs"] == 21
    assert table["calibration_error"] == figures["eval/pairs/calibration_error"]
    assert not any("bin" in name for name in figures)
    # The scorer's rewards are those of the evaluation.
    records = tiny_pairs.pairs("validation", 21)
    scorer = RewardScorer.load(run.path, batch_size=4)
    prompts = [record["prompt"] for record in records]
    encode = tiny_pairs.VOCABULARY.encode
    read = [encode(prompt) for prompt in prompts]
    chosen, rejected = (
        scorer.tokens(read, [[*encode(r[side]), 1] for r in records]) for side in ("chosen", "rejected")
    )
    assert chosen.mean() == pytest.approx(figures["eval/pairs/reward_chosen"], abs=1e-5)
    accuracy = (chosen > rejected).mean() + 0.5 * (chosen == rejected).mean()
    assert accuracy == pytest.approx(figures["eval/pairs/accuracy"])
    learned = LearnedReward(str(run.path), mean=1.0, scale=2.0)
    both = learned.score([{}] * 21, prompts, [[r["chosen"], r["rejected"]] for r in records])
    texts = scorer.texts(prompts, [record["chosen"] for record in records])
    np.testing.assert_allclose(both[0, 0], (texts[0] - 1) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        learned({"prompt": prompts[0]}, [records[0]["rejected"]]), both[0, 1:], rtol=1e-4, atol=1e-5
    )
    assert HEAD not in t5style.load(run.path).params  # it is a model of language still
    mesh = MeshConfig(data=2, fsdp=2, devices=4).build()
    spread = RewardScorer.load(run.path, mesh=mesh).texts(prompts, [r["chosen"] for r in records])
    np.testing.assert_allclose(spread, texts, rtol=1e-4, atol=1e-5)


def test_what_is_no_reward_model_is_refused(parent):
    with pytest.raises(UserError, match="is no reward model: it has no value_head"):
        RewardScorer.load(parent[1])
    scorer = RewardScorer(tiny_task.model(True), {}, tiny_pairs.VOCABULARY)
    with pytest.raises(ValueError, match="there are 1 prompts and 2 answers"):
        scorer.texts(["hot"], ["cold", "wet"])
    with pytest.raises(ValueError, match="answer 1 has no token"):
        scorer.tokens([[5], [5]], [[6], []])
    for fields, said in [
        ({"centering": -1.0}, "centering is -1.0"),
        ({"epochs": 0.0}, "epochs is 0.0; it must be above 0"),
        ({"label_smoothing": 0.1}, "label_smoothing is 0.1"),
    ]:
        with pytest.raises(ValueError, match=said):
            reward_model(parent, **fields)
