"""The pretraining job in this process: what it writes, what it refuses, and what a loss that is not finite
does.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import signal
from typing import Any

import jax
import numpy as np
import pytest

from t5style import console, run_dir, workflow
from t5style.corpus.vocabulary import CharacterVocabulary
from t5style.data.objectives import CausalLM, PrefixLM, Supervised
from t5style.data.pipeline import BatchSource
from t5style.data.task import Mixture, Task
from t5style.data.token_store import TokenStoreWriter
from t5style.models.config import TransformerConfig
from t5style.nn.settings import AttentionBlocks, MoE, Pipeline
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import Rules
from t5style.train import checkpoint, initialize, program
from t5style.train.optimizer import Optimizer
from t5style.train.pretrain import Pretrain
from t5style.train.schedules import Schedule
from tests.train import tiny_run

ONE = MeshConfig(devices=1)


def run(job: Pretrain, folder: pathlib.Path) -> dict[str, Any]:
    return job(run_dir.RunDir(folder).create())


def perform(job: Pretrain, folder: pathlib.Path) -> dict[str, Any]:
    """As the command does it: with the folder's records, which decide what may go on."""
    run = run_dir.RunDir(folder)
    return workflow.perform(job, run, workflow.all_inputs(job, {}, run), root=run, replace=False)


def job(store: str, **fields: Any) -> Pretrain:
    return tiny_run.job(store, **({"mesh": ONE, "eval_split": None} | fields))


def metrics(folder: pathlib.Path, name: str = "train/loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def params(folder: pathlib.Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(checkpoint.restore_params(folder))]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    return lines


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """poison([7]) makes the loss weights of batch 7 NaN."""
    monkeypatch.setattr(BatchSource, "batch_at", BatchSource.batch_at)  # restored afterwards
    monkeypatch.setattr(program, "empty_batch", program.empty_batch)
    return tiny_run.poison


@pytest.fixture(scope="module")
def finished(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, Any]]:
    """An encoder-decoder run, with evaluation."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    figures = run(tiny_run.job(store, decoder_only=False, mesh=ONE, steps=12, eval_every=6), folder)
    return folder, figures


def test_what_a_run_leaves_behind(store: str, finished: tuple[pathlib.Path, dict[str, Any]]) -> None:
    folder, figures = finished
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "model.json", "vocabulary", "checkpoints", "metrics.jsonl", "tensorboard", "preflight.txt",
        "preflight.json", "goodput.json", "lineage.json",
    }  # fmt: skip
    assert figures["steps"] == 12
    assert figures["eval/words/loss"] < 3.5
    assert figures["tokens"] > 0
    assert 0 <= figures["data_wait"] < 1
    assert TransformerConfig.from_json((folder / "model.json").read_text()).encoder_layers == 1
    metadata = checkpoint.read_metadata(folder / "checkpoints" / "12")
    assert metadata["step"] == 12
    assert metadata["data_fingerprint"] == figures["dataset_fingerprint"]
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["dataset_fingerprint"] == figures["dataset_fingerprint"]
    assert lineage["parent"] is None
    assert set(metrics(folder)) == {3, 6, 9, 12}
    assert set(metrics(folder, "eval/words/loss")) == {6, 12}
    # The evaluation reads every target token of the split once.
    source = BatchSource(
        tiny_run.job(store, decoder_only=False).task,
        "validation",
        8,
        {"encoder": 32, "decoder": 16},
        shuffle=False,
    )
    targets = sum(
        int(source.evaluation_batch_at(n)["decoder_loss_weights"].sum())
        for n in range(source.evaluation_batches)
    )
    assert figures["eval/words/tokens"] == targets


def test_preflight_says_what_will_be_learned(finished: tuple[pathlib.Path, dict[str, Any]]) -> None:
    folder, figures = finished
    told = json.loads((folder / "preflight.json").read_text())
    assert told["parameters"] == figures["parameters"]
    assert told["vocabulary"] == {"ids": 38, "embedding_rows": 40}
    # AdamW: parameters and two moments, f32, and two counters.
    assert told["state_bytes_per_device"] == pytest.approx(3 * 4 * told["parameters"], abs=64)
    assert told["tokens_planned"] == pytest.approx(figures["tokens"], rel=0.05)
    text = (folder / "preflight.txt").read_text()
    for words in (
        "<extra_id_0>",
        "every checksum right",
        "of the decoder's tokens are supervised",
        "FLOPs per token",
    ):
        assert words in text


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(
    store: str, tmp_path: pathlib.Path, said: list[str]
) -> None:
    short = job(store, steps=8)
    first = run(short, tmp_path)
    again = run(short, tmp_path)
    assert again["train_loss"] == first["train_loss"]
    longer = run(dataclasses.replace(short, steps=12), tmp_path)
    assert longer["steps"] == 12
    assert any("resumes this run at step 8 of 12" in text for text in said)
    straight = run(dataclasses.replace(short, steps=12), tmp_path / "straight")
    assert straight["train_loss"] == longer["train_loss"]
    with pytest.raises(run_dir.UserError, match=r"steps is 8, but .* has been trained to step 12: set steps"):
        run(short, tmp_path)
    for a, b in zip(params(tmp_path), params(tmp_path / "straight"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_resumes_on_another_mesh(store: str, tmp_path: pathlib.Path, said: list[str]) -> None:
    short = job(store, steps=4, model={"dropout": 0.0})
    run(dataclasses.replace(short, steps=8), tmp_path / "straight")
    perform(short, tmp_path / "moved")
    mesh, moved_rules = MeshConfig(data=2, fsdp=2, tensor=2), Rules(parameters={"vocab": None})
    perform(dataclasses.replace(short, steps=8, mesh=mesh, rules=moved_rules), tmp_path / "moved")
    assert any("resumes this run at step 4 of 8" in text for text in said)
    straight, moved = metrics(tmp_path / "straight"), metrics(tmp_path / "moved")
    assert moved[3] == straight[3]
    assert moved[8] == pytest.approx(straight[8], rel=1e-5)
    assert moved[8] != moved[3]


def test_nan_stops_and_names_the_batch(store: str, tmp_path: pathlib.Path, poison: Any) -> None:
    poison([9])
    with pytest.raises(
        run_dir.UserError, match=r"not finite at step 10, batch 9 .* last good checkpoint is step 8"
    ):
        run(job(store), tmp_path)
    assert sorted(checkpoint.all_steps(tmp_path / "checkpoints")) == [4, 8]
    assert all(np.isfinite(x).all() for x in params(tmp_path))


def test_nan_is_skipped(store: str, tmp_path: pathlib.Path, poison: Any, said: list[str]) -> None:
    poison([9])
    figures = run(job(store, on_nan="skip"), tmp_path)
    assert figures["steps"] == 20
    assert figures["skipped_updates"] == 1
    assert any("not finite at step 10, batch 9; the update is skipped" in text for text in said)
    assert all(np.isfinite(list(metrics(tmp_path).values())))
    assert all(np.isfinite(x).all() for x in params(tmp_path))


def test_too_many_skips_stop(store: str, tmp_path: pathlib.Path, poison: Any) -> None:
    poison(list(range(2, 20)))
    with pytest.raises(
        run_dir.UserError, match="10 updates in a row were not finite, the last at step 12, batch 11"
    ):
        run(job(store, on_nan="skip"), tmp_path)


def test_nan_rolls_back_and_jumps_over_the_batch(
    store: str, tmp_path: pathlib.Path, poison: Any, said: list[str]
) -> None:
    poison([1, 9])
    figures = run(job(store, on_nan="rollback"), tmp_path)
    assert figures["steps"] == 20
    assert any("step 2, batch 1; rolled back to step 0, going on with batch 2" in text for text in said)
    # Batches are two ahead of steps by then: batch 9 comes at step 8, after the checkpoint of step 4.
    assert any("step 8, batch 9; rolled back to step 4, going on with batch 10" in text for text in said)
    metadata = checkpoint.read_metadata(tmp_path / "checkpoints" / "20")
    assert metadata["progress"]["offset"] == 6
    assert all(np.isfinite(list(metrics(tmp_path).values())))
    assert list(metrics(tmp_path)) == [3, 6, 9, 12, 15, 18, 20], "no line is written twice"


def test_a_learning_rate_too_high_ends_in_words(store: str, tmp_path: pathlib.Path) -> None:
    sick = job(store, optimizer=Optimizer(learning_rate=Schedule("constant", 1e30), clip_norm=None))
    with pytest.raises(run_dir.UserError, match="not finite at step"):
        run(sick, tmp_path)


def test_starts_from_another_run(
    store: str, tmp_path: pathlib.Path, finished: tuple[pathlib.Path, dict[str, Any]], said: list[str]
) -> None:
    folder, figures = finished
    frozen = Optimizer(learning_rate=Schedule("constant", 1e-30), weight_decay=0.0)
    child = tiny_run.job(
        store, decoder_only=False, mesh=ONE, steps=1, optimizer=frozen, init_from=str(folder)
    )
    # How it is computed is no architecture.
    computed = {"sequence_attention": "ulysses", "attention_blocks": AttentionBlocks(block_q=256)}
    child = dataclasses.replace(child, model=child.model.replace(**computed, pipeline=Pipeline(repeats=2)))
    result = run(child, tmp_path / "child")
    assert result["eval/words/loss"] == pytest.approx(figures["eval/words/loss"], rel=1e-6)
    assert any("(step 12)" in text for text in said)
    lineage = json.loads((tmp_path / "child" / "lineage.json").read_text())
    assert lineage["parent"] == str(folder / "checkpoints" / "12")
    assert lineage["parent_step"] == 12

    other = dataclasses.replace(child, model=child.model.replace(d_model=24, head_dim=8))
    with pytest.raises(
        run_dir.UserError, match="another architecture: its d_model is 16, this model's is 24"
    ):
        run(other, tmp_path / "other")
    with pytest.raises(run_dir.UserError, match="there is nothing there"):
        run(dataclasses.replace(child, init_from=str(tmp_path / "nowhere")), tmp_path / "nowhere-run")
    words = tiny_run.make_store(str(tmp_path / "another"), examples=8, extra_ids=10)
    with pytest.raises(run_dir.UserError, match="was trained with the vocabulary"):
        run(
            dataclasses.replace(child, task=Task("words", words, child.task.objective)),
            tmp_path / "vocabulary-run",
        )
    # The run's own folder holds other checkpoints: another model is refused, and they stay.
    with pytest.raises(run_dir.UserError, match=r"another architecture: at params/\S+ it has shape"):
        run(dataclasses.replace(other, init_from=None), folder)
    assert 12 in checkpoint.all_steps(folder / "checkpoints")
    assert json.loads((folder / "model.json").read_text())["d_model"] == 16


def test_experts_may_be_balanced_otherwise_than_before() -> None:
    config = job("tokens").model.replace(moe=MoE(4, 2, 16, balance_loss=0.01))
    initialize.same_model(config, config.replace(moe=MoE(4, 2, 16, capacity_factor=1.5)), "there")
    with pytest.raises(run_dir.UserError, match=r"another architecture: its moe is \{'experts': 4"):
        initialize.same_model(config, config.replace(moe=MoE(8, 2, 16)), "there")


def test_another_seed_or_dataset_is_no_resume(store: str, tmp_path: pathlib.Path) -> None:
    first = job(store, steps=4)
    run(first, tmp_path)
    with pytest.raises(run_dir.UserError, match="trained with seed 0, this configuration has seed 1"):
        run(dataclasses.replace(first, steps=8, seed=1), tmp_path)
    with pytest.raises(run_dir.UserError, match=r"trained with data .* would repeat or skip examples"):
        run(dataclasses.replace(first, steps=8, batch_size=16), tmp_path)


def test_a_mixture_is_evaluated_task_by_task(store: str, tmp_path: pathlib.Path) -> None:
    base = job(store, steps=3, eval_split="validation", eval_batches=1)
    assert isinstance(base.task, Task)
    both = Mixture("both", [base.task, Task("prefix", store, PrefixLM())], rates=[3.0, 1.0])
    figures = run(dataclasses.replace(base, task=both), tmp_path)
    assert {"eval/words/loss", "eval/prefix/loss"} <= figures.keys()


def evaluated(store: str, **fields: Any) -> Pretrain:
    return job(store, steps=4, **({"eval_split": "validation", "eval_batches": 1, "eval_every": 2} | fields))


@pytest.fixture(scope="module")
def four_steps(store: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What `evaluated` leaves behind when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    perform(evaluated(store), folder)
    return folder


def untimed(folder: pathlib.Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("time", "train/tokens_per_second")} for x in lines]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("what", [ZeroDivisionError, signal.SIGTERM, signal.SIGINT], ids=str)
def test_what_happens_in_an_evaluation_loses_no_step(
    store: str,
    four_steps: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    what: Any,
    number: int,
) -> None:
    """The first of two evaluations is in the middle, the other at the end: an error, or a signal, in it."""
    honest, calls = BatchSource.evaluation_iter, iter(range(1, 9))

    def disturbed(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            if what is ZeroDivisionError:
                raise ZeroDivisionError
            signal.raise_signal(what)
        return honest(*arguments, **options)

    monkeypatch.setattr(BatchSource, "evaluation_iter", disturbed)
    error = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}.get(what, what)
    with pytest.raises(error):
        perform(evaluated(store), tmp_path)
    assert checkpoint.all_steps(tmp_path / "checkpoints") == [2 * number]
    assert not (tmp_path / "manifest.json").exists(), "a workflow would begin its next stage"
    figures = perform(evaluated(store), tmp_path)
    assert "eval/words/loss" in figures
    assert untimed(tmp_path) == untimed(four_steps)


def test_a_signal_in_the_last_save_stops(
    store: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = checkpoint.Checkpointer.close

    def close(self: checkpoint.Checkpointer) -> None:
        signal.raise_signal(signal.SIGINT)
        honest(self)

    monkeypatch.setattr(checkpoint.Checkpointer, "close", close)
    with pytest.raises(KeyboardInterrupt):
        run(job(store, steps=4), tmp_path)
    assert checkpoint.all_steps(tmp_path / "checkpoints") == [4]


def test_other_evaluation_settings_are_honoured_without_training(
    store: str, four_steps: pathlib.Path, tmp_path: pathlib.Path, said: list[str]
) -> None:
    folder = shutil.copytree(four_steps, tmp_path / "run")
    before = json.loads((folder / "manifest.json").read_text())["figures"]
    another = tiny_run.make_store(str(tmp_path / "another"), examples=8)
    tasks = [Task("new", another, PrefixLM())]
    figures = perform(evaluated(store, eval_tasks=tasks), folder)
    assert any("resumes this run at step 4 of 4" in text for text in said)
    assert "eval/words/loss" not in figures
    assert metrics(folder, "eval/new/loss") == {4: figures["eval/new/loss"]}
    whole = perform(evaluated(store, eval_batches=None), folder)
    assert whole["eval/words/tokens"] > before["eval/words/tokens"]
    assert "eval/words/loss" not in perform(evaluated(store, eval_split=None), folder)
    assert perform(evaluated(store), folder)["eval/words/loss"] == before["eval/words/loss"]


def test_keep_best_keeps_what_was_measured(
    store: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(
        Pretrain, "_evaluator", lambda *given: lambda *given: {"eval/words/loss": next(losses)}
    )
    best = evaluated(store, keep_best="eval/words/loss", keep=1, checkpoint_every=1)
    run(best, tmp_path / "run")
    assert sorted(checkpoint.all_steps(tmp_path / "run" / "checkpoints")) == [2, 4]
    with pytest.raises(run_dir.UserError, match=r"did you mean 'eval/words/loss'.* step 2 is saved"):
        run(dataclasses.replace(best, keep_best="eval/word/loss", keep=2), tmp_path / "misspelt")
    assert sorted(checkpoint.all_steps(tmp_path / "misspelt" / "checkpoints")) == [1, 2]


def test_patience_ends_a_run_that_gets_no_better(
    store: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    accuracies = iter([0.1, 0.3, 0.2, 0.25, 0.4, 0.1, 0.1, 0.1])
    monkeypatch.setattr(
        Pretrain, "_evaluator", lambda *given: lambda *given: {"eval/words/accuracy": next(accuracies)}
    )
    patient = evaluated(store, keep_best="-eval/words/accuracy", patience=2, keep=1, checkpoint_every=2)
    patient = dataclasses.replace(patient, steps=30)
    figures = perform(patient, tmp_path / "run")
    # Evaluated every two steps: 0.3 at step 4 was the best, and steps 6 and 8 were no better.
    assert (figures["steps"], figures["best_step"]) == (8, 4)
    assert sorted(checkpoint.all_steps(tmp_path / "run" / "checkpoints")) == [4, 8]
    assert any("stopped early at step 8" in line and "0.3 at step 4" in line for line in said)
    more = perform(dataclasses.replace(patient, patience=3), tmp_path / "run")
    assert (more["steps"], more["best_step"]) == (16, 10)  # 0.4 came at step 10


def test_evaluation_stores_are_checked_before_the_first_step(store: str, tmp_path: pathlib.Path) -> None:
    words = tiny_run.make_store(str(tmp_path / "words"), examples=8, extra_ids=7)
    damaged = tiny_run.make_store(str(tmp_path / "damaged"), examples=8)
    damage(damaged, "train")
    for folder, message in ((words, "eval task 'new' has a store of vocabulary"), (damaged, "checksum")):
        with pytest.raises(run_dir.UserError, match=message):
            run(evaluated(store, eval_tasks=[Task("new", folder, CausalLM())]), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": {"vocab_size": 30}}, r"has 38 ids but the model's embedding only 30 rows: .* \(128 is"),
        ({"batch_size": 6, "mesh": MeshConfig(data=8)}, "6"),
        ({"batch_size": 8, "accumulation": 4, "mesh": MeshConfig(data=4, fsdp=2)}, "accumulation 4"),
        ({"split": "trian"}, "no split 'trian', only 'train', 'validation'"),
        ({"lengths": {"encoder": 4}}, "also needs 'decoder'"),
    ],
)
def test_refused_before_anything_is_written(
    store: str, tmp_path: pathlib.Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises((run_dir.UserError, ValueError), match=words):
        run(job(store, **fields), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def supervised_store(folder: pathlib.Path, inputs: str, targets: str) -> str:
    vocabulary = CharacterVocabulary(tiny_run.LETTERS)
    with TokenStoreWriter(str(folder), ("inputs", "targets"), vocabulary) as writer:
        for split in ("train", "validation"):
            for _ in range(32):
                writer.add(
                    split, {"inputs": vocabulary.encode(inputs), "targets": vocabulary.encode(targets)}
                )
    return str(folder)


def test_supervised_share_that_cannot_be_meant(tmp_path: pathlib.Path) -> None:
    everything = supervised_store(tmp_path / "everything", "", "a cat")
    with pytest.raises(
        run_dir.UserError, match=r"all .* decoder tokens .* are supervised, though Supervised"
    ):
        run(
            dataclasses.replace(job(everything), task=Task("answers", everything, Supervised()), pack=False),
            tmp_path / "run",
        )


def damage(store: str, split: str) -> None:
    file = max(
        (f for f in pathlib.Path(store, split).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_damaged_store_is_refused(tmp_path: pathlib.Path) -> None:
    store = tiny_run.make_store(str(tmp_path / "store"), examples=8)
    damage(store, "train")
    with pytest.raises(run_dir.UserError, match="checksum"):
        run(job(store), tmp_path / "run")


def test_activations_sent_without_reason_are_told_of(
    store: str, tmp_path: pathlib.Path, said: list[str]
) -> None:
    fields = {"mesh": MeshConfig(data=4, tensor=2), "rules": Rules(activations={"heads": None}), "steps": 1}
    wrong = job(store, model={"scan_layers": True, "decoder_layers": 2}, **fields)
    run(wrong, tmp_path)
    assert any(text.startswith("Warning: activations are resharded inside the loop") for text in said)
    said.clear()
    wrong.explain_sharding()
    assert any(text.startswith("Warning: activations are resharded inside the loop") for text in said)


def test_dry_run_and_sharding_need_no_store(tmp_path: pathlib.Path, said: list[str]) -> None:
    ghost = job("run:tokens", mesh=MeshConfig(data=4, fsdp=2))
    ghost.dry_run(run_dir.RunDir(tmp_path / "none"))
    assert any("parameters;" in text and "20 steps of 8 rows" in text for text in said)
    ghost.explain_sharding()
    assert said[-1] == "no activation is resharded inside the loop over layers"
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="8"):
        dataclasses.replace(ghost, batch_size=4).dry_run(run_dir.RunDir(tmp_path / "none"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"on_nan": "ignore"}, "on_nan is 'ignore'; it must be one of stop, skip, rollback"),
        ({"steps": 0}, "steps is 0"),
        ({"accumulation": 3}, "batch_size is 8 and accumulation 3"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"keep": 0}, "keep is 0"),
        ({"eval_batches": 0}, "eval_batches is 0"),
        ({"keep_best": "eval/words/loss", "eval_split": None}, "with eval_split None nothing is evaluated"),
        ({"patience": 2}, "name the metric that shall get better"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_run.job("store", **fields)
