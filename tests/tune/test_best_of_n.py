"""Best-of-n, and the arithmetic problems."""

import json

import numpy as np
import pytest

from t5style.data.token_store import TokenStore
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError
from t5style.tune import best_of_n
from t5style.tune.arithmetic import Arithmetic
from t5style.tune.best_of_n import BestOfN
from t5style.tune.prompts import PromptSource
from t5style.tune.rollouts import Sampling
from tests.tune import tiny_prompts


def test_the_best_answers_are_kept(tmp_path):
    store = tiny_prompts.make_store(str(tmp_path / "store"))
    model = tiny_prompts.make_parent(str(tmp_path / "model"))
    settings = {
        "model": model,
        "store": store,
        "rewards": {"doubled": tiny_prompts.doubled},
        "sampling": Sampling(max_new_tokens=6),
        "n": 8,
        "limit": 5,
        "mesh": MeshConfig(devices=1),
    }
    figures = BestOfN(**settings)(RunDir(tmp_path / "run").create())["train"]
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").open()]
    best = [json.loads(line) for line in (tmp_path / "run" / "best" / "train.jsonl").open()]
    assert len(answers) == 40
    assert figures["prompts"] == 5
    assert figures["examples"] == len(best) > 0
    for row in best:
        mine = [a for a in answers if a["prompt"] == row["prompt"] and a["finish"] == "stop"]
        assert row["reward"] >= max(a["reward"] for a in mine) - 1e-9
    assert figures["best_of_1"] == pytest.approx(np.mean([a["reward"] for a in answers]))
    assert figures["best_of_1"] <= figures["best_of_2"] <= figures["best_of_4"] <= figures["best_of_8"]


def test_best_of_k_is_pass_at_k():
    found = best_of_n._best_of([[0, 1, 0, 0], [1, 1, 0, 0]])  # one and two right of four
    assert found["best_of_1"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert found["best_of_2"] == pytest.approx((1 - 3 / 6 + 1 - 1 / 6) / 2)
    assert found["best_of_4"] == 1.0


def test_bad_settings():
    with pytest.raises(ValueError, match="keep is 'all' without a threshold"):
        BestOfN(model="m", store="s", rewards={"x": tiny_prompts.doubled}, keep="all")
    with pytest.raises(ValueError, match="n is 0"):
        BestOfN(model="m", store="s", rewards={"x": tiny_prompts.doubled}, n=0)


def test_arithmetic(tmp_path):
    job = Arithmetic(digits=1, validation=10, wrong=2)
    figures = job(RunDir(tmp_path / "run").create())
    assert figures["problems"] == {"train": 90, "validation": 10}
    assert job(RunDir(tmp_path / "again").create())["fingerprint"] == figures["fingerprint"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "problems" / "train.jsonl").open()]
    for row in rows:
        a, b = row["prompt"].rstrip("=").split("+")
        assert row["answer"] == str(int(a) + int(b))[::-1]
    store = TokenStore.open(tmp_path / "run" / "examples")
    assert store.num_examples("train") == 270
    said = [store.vocabulary.decode(ids) for ids in store.examples("train", "targets", [0, 1, 2])]
    answer = rows[0]["answer"]
    wrong = str((int(answer[0]) + 1) % 10) + answer[1:]
    assert said == [answer, wrong, wrong]


def test_prompts_come_in_an_order_of_the_seed(tmp_path):
    from t5style.data.objectives import Supervised
    from t5style.data.task import Task

    store = tiny_prompts.make_store(str(tmp_path / "store"))
    task = Task("prompts", store, Supervised())
    source = PromptSource(task, "train", 4, {"decoder": 9}, "decoder_only", 9, seed=1)
    first = [prompt.example for prompt in source.drawn(0, 20)]
    assert sorted(first) == list(range(20))
    assert [prompt.example for prompt in source.drawn(5, 3)] == first[5:8]
    assert [prompt.example for prompt in source.drawn(20, 20)] != first
    assert source.prompt(0).tokens[0] == tiny_prompts.VOCABULARY.bos_id
    assert source.prompt(0).text.startswith(source.prompt(0).record["answer"])
    (tmp_path / "store" / "train" / "records.jsonl").unlink()
    with pytest.raises(UserError, match=r"train/records.jsonl is missing"):
        PromptSource(task, "train", 4, {"decoder": 9}, "decoder_only", 9)
