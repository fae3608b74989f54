"""Reinforcement learning: sampler and trainer agree, a killed run goes on exactly, and it learns."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from t5style.infer.engine import Engine
from t5style.infer.ids import token_ids
from t5style.models import params
from t5style.run_dir import UserError
from t5style.train import likelihood
from t5style.tune import policy, rollouts
from t5style.tune.policy import Method
from t5style.tune.policy_losses import AdaptiveKL
from t5style.tune.prompts import Prompt
from t5style.tune.rollouts import Sampling
from tests.tune import tiny_prompts
from tests.tune.tiny_prompts import VOCABULARY, job, run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of prompts and a parent."""
    folder = tmp_path_factory.mktemp("made")
    return (
        tiny_prompts.make_store(str(folder / "store")),
        tiny_prompts.make_parent(str(folder / "parent")),
    )


@pytest.mark.parametrize("decoder_only", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_agree(decoder_only, temperature, monkeypatch):
    config = tiny_prompts.model(decoder_only)
    whole = params.init_params(config, jax.random.key(2))
    ids = token_ids(VOCABULARY)
    prompts = []
    for number, text in enumerate(["a=", "bca=", "abcab="]):
        tokens = [
            *([ids.start] if decoder_only else []),
            *VOCABULARY.encode(text),
            *([] if decoder_only else [1]),
        ]
        prompts.append(Prompt(number, np.array(tokens, np.int32), text, {}))
    how = Sampling(max_new_tokens=6, temperature=temperature)
    groups = rollouts.draw(Engine(config, whole, ids), prompts, VOCABULARY, how, 4, seed=5)
    samples = [sample for group in groups for sample in group]
    assert len({tuple(sample.tokens) for sample in samples}) > 6
    lengths = {"decoder": 12} if decoder_only else {"encoder": 8, "decoder": 6}
    batch = rollouts.lay_out(samples, lengths, ids.start)
    found = policy.log_likelihoods(config, whole, batch, temperature)["log_likelihoods"]
    monkeypatch.setattr(likelihood, "PIECE", 16)
    by_pieces = policy.outputs(config, whole, batch, temperature)
    told = rollouts.of_tokens(samples, "sampler_log_likelihoods", lengths)
    np.testing.assert_allclose(by_pieces.log_likelihoods, found, atol=1e-6)
    assert (np.asarray(by_pieces.entropy) > 0).sum() == (told != 0).sum()
    assert (told != 0).sum() == sum(len(sample.tokens) for sample in samples)
    np.testing.assert_allclose(found, told, atol=1e-5)
    again = rollouts.draw(Engine(config, whole, ids), prompts, VOCABULARY, how, 4, seed=5)
    assert again == groups


def test_a_rollout_comes_back_from_its_file_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=3).astype(np.float32)
    sample = rollouts.Sample(1, 0, "é<b>", "x", [0, 3], [4, 5, 1], "stop", values.tolist(), 0.1)
    rollouts.write(tmp_path / "r.jsonl", [sample])
    (back,) = rollouts.read(tmp_path / "r.jsonl")
    assert back == sample
    assert (np.array(back.sampler_log_likelihoods, np.float32) == values).all()
    rollouts.write_page(tmp_path / "page.html", [sample], "a run")
    assert "é&lt;b&gt;" in (tmp_path / "page.html").read_text()
    (tmp_path / "r.jsonl").write_text("{")
    assert rollouts.read(tmp_path / "r.jsonl") is None


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    """A run of PPO with three updates per rollout, an adaptive KL and a reward that fails at times."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    settings = {
        "method": Method("ppo", adaptive_kl=AdaptiveKL(target=0.01, horizon=100)),
        "rewards": {"doubtful": tiny_prompts.doubtful},
        "reward_failure": None,
        "prompts": 3,
        "minibatches": 3,
        "steps": 7,
        "checkpoint_every": 2,
        "keep": 9,
    }
    return folder, run(folder, job(*made, **settings)), settings


def test_a_stopped_run_goes_on_exactly(whole, made, tmp_path):
    folder, figures, settings = whole
    files = sorted(file.name for file in (folder / "rollouts").glob("*.jsonl"))
    assert files == ["step_00000000.jsonl", "step_00000003.jsonl", "step_00000006.jsonl"]
    # Killed after step 5: the checkpoint of step 4, in the middle of the second rollout, is the newest.
    shutil.copytree(folder, tmp_path / "run")
    for name in ("6", "7"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    (tmp_path / "run" / "rollouts" / files[2]).unlink()
    again = run(tmp_path / "run", job(*made, **settings))
    for name, value in figures.items():
        if name.startswith("eval/") or name == "train_loss":
            assert again[name] == value or math.isnan(value), name
    for file in files:
        one, other = (place / "rollouts" / file for place in (folder, tmp_path / "run"))
        assert one.read_text() == other.read_text(), file
    # Without the unfinished rollout there is nothing to go on with.
    for name in ("5", "6", "7"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name, ignore_errors=True)
    (tmp_path / "run" / "rollouts" / files[1]).unlink()
    with pytest.raises(UserError, match=r"step_00000003.jsonl is missing or damaged"):
        run(tmp_path / "run", job(*made, **settings))


def test_what_a_rollout_says(whole):
    folder, _, _ = whole
    rows = [
        json.loads(line) for line in (folder / "rollouts" / "step_00000003.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 12
    for row in rows:
        tokens = len(row["tokens"])
        assert all(
            len(row[name]) == tokens
            for name in ("sampler_log_likelihoods", "log_likelihoods", "reference_log_likelihoods", "values")
        )
        failed = row["completion"].startswith("d")
        assert (row["failed"] is not None) == failed
        assert row["learned"] == (not failed)
        assert np.abs(np.subtract(row["sampler_log_likelihoods"], row["log_likelihoods"])).max() < 1e-4
    assert "latest.html" in {file.name for file in (folder / "rollouts").iterdir()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    assert len({line["train/kl_coefficient"] for line in trained}) == 3  # it moves with every rollout
    assert all(line["train/mismatch_max"] < 1e-4 for line in trained)
    assert 0 < sum(line["train/reward_failed"] for line in trained) < len(trained)
    assert {"train/reward", "train/kl", "train/entropy", "train/value_loss", "train/clipped"} <= trained[
        0
    ].keys()


def test_it_learns(made, tmp_path):
    method = Method("dapo", kl=0.01, entropy=1e-3)
    figures = run(tmp_path / "run", job(*made, method=method, prompts=8, group=8, steps=20, log_every=100))
    late, early = (
        np.mean([json.loads(row)["rewards"]["doubled"] for row in (tmp_path / "run" / name).open()])
        for name in ("rollouts/step_00000019.jsonl", "rollouts/step_00000000.jsonl")
    )
    assert early < 0.3
    assert late > early + 0.25
    assert figures["eval/prompts/reward"] > figures["before/eval/prompts/reward"]


@pytest.mark.parametrize("name", ["grpo", "gspo", "rloo", "reinforce_pp"])
def test_advantages_of_methods(name):
    """Better answers have higher advantages; what does not count, or is no answer, has none."""
    rewards, keep = np.array([[1.0, 0.0, 5.0], [0.0, 1.0, 0.5]]), np.ones((2, 3), bool)
    keep[0, 2] = False
    mask = np.zeros((6, 5))
    mask[:, 1:4] = 1
    mask[2] = 0  # is not learnt from
    far = np.zeros(mask.shape)
    found, _ = Method(name, gamma=1.0).advantages(rewards, keep, mask, far, far, 0.1)
    assert (found[mask == 0] == 0).all()
    assert (found[0, 1:4] > found[1, 1:4]).all()
    assert (found[4, 1:4] > found[5, 1:4]).all()
    if Method(name).kl_in == "reward":  # what went far from the reference is worth less
        far[4] = 50.0
        assert (Method(name).advantages(rewards, keep, mask, far, far, 0.1)[0][4, 1:4] < found[5, 1:4]).all()


def test_answers_that_were_cut(made):
    made_job = job(*made, overlong="mask")
    assert made_job.overlong == "mask"
    assert [rollouts.soft_overlong(tokens, 10, 4) for tokens in (3, 6, 8, 10, 12)] == [0, 0, -0.5, -1, -1]


def test_refusals(made, tmp_path):
    for fields, match in (
        ({"group": 1}, "group is 1, but 'dr_grpo' compares the answers"),
        ({"prompts": 3, "minibatches": 5}, "12 answers, which cannot be cut into 5 equal minibatches"),
        ({"batch_size": 7}, "batch_size is 7, but 4 prompts"),
        ({"rewards": {}}, "rewards is empty"),
        ({"reward_weights": {"x": 1.0}}, "reward_weights names 'x'"),
        ({"overlong": "cut"}, "overlong is 'cut'"),
    ):
        with pytest.raises(ValueError, match=match):
            job(*made, **fields)
    with pytest.raises(ValueError, match="method is 'trpo'"):
        Method("trpo")
    with pytest.raises(ValueError, match="adaptive_kl moves kl, which is 0"):
        Method("dr_grpo", adaptive_kl=AdaptiveKL())
    with pytest.raises(UserError, match=r"all 20 prompts .* have more than 1 tokens, the shortest 3"):
        run(tmp_path / "long", job(*made, lengths={"decoder": 3}))
