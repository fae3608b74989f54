"""Evaluate: its numbers against straightforward computations, its comparisons, and what it refuses."""

import io
import json
import math
import pathlib
import sys

import jax
import numpy as np
import pytest

import t5style
from t5style.corpus.vocabulary import ByteVocabulary
from t5style.data.token_store import TokenStoreWriter
from t5style.evaluate import metrics
from t5style.evaluate.baselines import CopyInput, MajorityTarget, NearestTarget, Pair, UnigramTokens
from t5style.evaluate.evaluator import Evaluate, count_bytes, read_examples
from t5style.infer.model import Model
from t5style.models.params import init_params
from t5style.parallel import local
from t5style.run_dir import RunDir, UserError
from tests.evaluate import tiny_task
from tests.helpers import gin_file

BASELINES = (MajorityTarget(), CopyInput(), UnigramTokens())


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    """(results, samples, figures) of the tuned model with reference and baselines."""
    folder = tmp_path_factory.mktemp("evaluation")
    job = Evaluate(
        tiny.after,
        [tiny_task.task(tiny.store)],
        tiny_task.LENGTHS,
        batch_size=4,  # 21 examples: the last batch is not full
        reference_model=tiny.before,
        baselines=BASELINES,
    )
    figures = job(RunDir(folder))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return json.loads((folder / "results.json").read_text())["tasks"]["opposites"], samples, figures, folder


def test_every_example_counts_exactly_once(evaluated):
    report, samples, _, _ = evaluated
    pairs = tiny_task.examples("validation", 21)
    assert [(row["inputs"], row["target"]) for row in samples] == pairs
    assert report["examples"] == 21
    assert report["tokens"] == sum(len(target) + 1 for _, target in pairs)
    assert report["bytes"] == sum(len(target.encode()) for _, target in pairs)  # é has two


def test_goes_on_where_it_was_stopped(tiny, evaluated, tmp_path, monkeypatch):
    job = Evaluate(
        tiny.after,
        [tiny_task.task(tiny.store)],
        tiny_task.LENGTHS,
        batch_size=4,
        reference_model=tiny.before,
        baselines=BASELINES,
    )
    scored, asked, stop = [], [], [True]
    scores, complete = Model.token_scores, Model.complete_tokens

    def answer(model, *args, **kwargs):
        if stop and model.path == tiny.before:
            raise KeyboardInterrupt
        asked.append(model.path)
        return complete(model, *args, **kwargs)

    monkeypatch.setattr(Model, "token_scores", lambda *args: scored.append(1) or scores(*args))
    monkeypatch.setattr(Model, "complete_tokens", answer)
    with pytest.raises(KeyboardInterrupt):
        job(RunDir(tmp_path))
    assert (len(scored), set(asked)) == (12, {tiny.after})  # 6 batches of each model
    scored.clear(), asked.clear(), stop.clear()
    job(RunDir(tmp_path))
    assert (scored, set(asked)) == ([], {tiny.before})
    for name in ("results.json", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == (evaluated[3] / name).read_bytes()
    assert not (tmp_path / "parts").exists()


def test_likelihood_equals_a_straightforward_computation(tiny, evaluated):
    report, samples, _, _ = evaluated
    m = t5style.load(tiny.after)
    nats, correct = [], []
    for source, target in tiny_task.examples("validation", 21):
        ids = [*m.vocabulary.encode(target), 1]
        logits = m.logits([[0, *ids[:-1]]], encoder_tokens=[[*m.vocabulary.encode(source), 1]])[0]
        logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        nats.append(-logs[np.arange(len(ids)), ids].sum())
        correct.append((logs.argmax(axis=-1) == ids).sum())
    values = {name: entry["value"] for name, entry in report["systems"]["model"].items()}
    loss = sum(nats) / report["tokens"]
    assert values["loss"] == pytest.approx(loss, rel=1e-4)
    assert values["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / report["bytes"], rel=1e-4)
    assert values["token_accuracy"] == pytest.approx(sum(correct) / report["tokens"])
    assert [row["nats"] for row in samples] == pytest.approx(nats, abs=2e-4)


def test_generated_answers_are_scored_and_compared(tiny, evaluated):
    report, samples, figures, folder = evaluated
    m = t5style.load(tiny.after)
    assert [row["model"] for row in samples] == m.generate([row["inputs"] for row in samples], 16)
    systems = report["systems"]
    hits = [100.0 * (row["model"] == row["target"]) for row in samples]
    assert systems["model"]["exact_match"]["value"] == pytest.approx(np.mean(hits))
    assert systems["model"]["exact_match"]["standard_error"] == pytest.approx(np.std(hits, ddof=1) / 21**0.5)
    assert systems["model"]["exact_match"]["value"] > 50  # it has learned the task
    assert {row["copy_input"] for row in samples} == {row["inputs"] for row in samples}
    train = [target for _, target in tiny_task.examples("train", 200)]
    majority = {row["majority_target"] for row in samples}
    assert len(majority) == 1
    assert train.count(majority.pop()) == max(train.count(target) for target in train)
    for other in ("reference", "majority_target", "copy_input"):
        rows = np.asarray(hits) - [100.0 * (row[other] == row["target"]) for row in samples]
        margin = report["margins"][other]["exact_match"]
        assert margin["value"] == pytest.approx(rows.mean())
        assert margin["standard_error"] == pytest.approx(rows.std(ddof=1) / 21**0.5)
    loss = report["margins"]["reference"]["loss"]
    assert loss["value"] == pytest.approx(
        systems["model"]["loss"]["value"] - systems["reference"]["loss"]["value"]
    )
    assert loss["value"] + 3 * loss["standard_error"] < 0
    assert (
        figures["opposites/exact_match/minus_reference"]
        == report["margins"]["reference"]["exact_match"]["value"]
    )
    table = (folder / "results.md").read_text()
    assert "| opposites | exact_match | copy_input | 0 | 0 | 21 |" in table
    assert "sentinels and end-of-sequence included" in table
    assert (
        "sentinels and end-of-sequence included" in json.loads((folder / "results.json").read_text())["note"]
    )


def test_unigram_baseline(evaluated):
    report, _, _, _ = evaluated
    vocabulary = tiny_task.VOCABULARY
    counts = np.ones(vocabulary.vocab_size)
    for _, target in tiny_task.examples("train", 200):
        np.add.at(counts, [*vocabulary.encode(target), 1], 1)
    logs = np.log(counts / counts.sum())
    held_out = [
        t for _, target in tiny_task.examples("validation", 21) for t in [*vocabulary.encode(target), 1]
    ]
    assert report["systems"]["unigram_tokens"]["loss"]["value"] == pytest.approx(-logs[held_out].mean())


def test_nearest_target_remembers():
    train = [Pair("the cat", "one"), Pair("the dog barks", "two")]
    assert NearestTarget().predict(train, ["The dog", "the cat sat", "zzz"]) == ["two", "one", "one"]


def test_decoder_only_and_streams(tiny, tmp_path):
    """A decoder-only model: the same task by prompting, and a plain stream, with likelihood only."""
    config = tiny_task.model(decoder_only=True)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    m = Model(config, params, tiny_task.VOCABULARY)
    m.save(tmp_path / "model")
    tasks = [
        tiny_task.task(tiny.store, metrics=(metrics.exact_match,)),
        tiny_task.language_modelling(tiny.store),
    ]
    job = Evaluate(str(tmp_path / "model"), tasks, {"decoder": 32}, baselines=BASELINES, max_new_tokens=5)
    job(RunDir(tmp_path / "run").create())
    reports = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]
    source, target = tiny_task.examples("validation", 21)[0]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples[0]["inputs"] == source
    assert samples[0]["nats"] == pytest.approx(-m.score([source], [target], eos=True)[0], abs=1e-3)
    assert samples[0]["model"] == m.generate([source], 5)[0]
    stream = reports["stream"]
    assert set(stream["systems"]) == {"model", "unigram_tokens"}
    assert set(stream["systems"]["model"]) == {"loss", "perplexity", "bits_per_byte", "token_accuracy"}
    # Every token of the split once, end-of-sequence included.
    assert stream["tokens"] == sum(len(f"{s} {t}") + 1 for s, t in tiny_task.examples("validation", 21))


def test_answers_end_with_the_context_of_a_decoder_only_model(tiny, tmp_path):
    """Prompt and answer share the places that the model was made for."""
    config = tiny_task.model(decoder_only=True).replace(context_length=16)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    m = Model(config, params, tiny_task.VOCABULARY)
    m.save(tmp_path / "model")
    task = tiny_task.task(tiny.store, metrics=(metrics.exact_match,))
    job = Evaluate(str(tmp_path / "model"), [task], {"decoder": 16}, baselines=(), max_examples=8)
    job(RunDir(tmp_path / "run").create())
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for row in samples:
        assert row["model"] == m.generate([row["inputs"]], 16 - 1 - len(row["inputs"]))[0]
    Model(config.replace(context_length=5), params, tiny_task.VOCABULARY).save(tmp_path / "model")
    with pytest.raises(UserError, match=r"has \d+ tokens, the context of model 5: no room is left"):
        job(RunDir(tmp_path / "no").create())


def test_process_0_works_alone_while_the_others_wait(tiny, tmp_path):
    """Two processes of two devices each; with a mesh over those of process 0."""
    bindings = f"""
from t5style.evaluate import evaluator
from t5style.infer import generate
from t5style.parallel import mesh
from tests.evaluate import tiny_task

launch.run.run_dir = {str(tmp_path / "run")!r}
launch.run.job = @workflow.Workflow()
workflow.Workflow.stages = {{
    'mesh': @evaluator.Evaluate(),
    'generate': @generate.Generate(),
}}
mesh.MeshConfig.tensor = 2
evaluator.Evaluate.model = {tiny.after!r}
evaluator.Evaluate.mesh = @mesh.MeshConfig()
evaluator.Evaluate.tasks = [@tiny_task.task()]
evaluator.Evaluate.lengths = {tiny_task.LENGTHS}
evaluator.Evaluate.max_examples = 4
tiny_task.task.store = {tiny.store!r}
generate.Generate.model = {tiny.after!r}
generate.Generate.prompts = ['hot up']
"""
    command = [sys.executable, "-m", "t5style.main", f"--gin_file={gin_file(tmp_path, bindings)}"]
    said = io.BytesIO()
    assert local.run(command, processes=2, devices=2, out=said) == 0, said.getvalue().decode()
    report = json.loads((tmp_path / "run" / "mesh" / "results.json").read_text())["tasks"]["opposites"]
    assert report["examples"] == 4
    answer = json.loads((tmp_path / "run" / "generate" / "generations.jsonl").read_text())
    assert answer["output"] == t5style.load(tiny.after).generate(["hot up"])[0]


def test_bytes_of_target_text():
    assert count_bytes("abc") == 3
    assert count_bytes("<extra_id_0> é<extra_id_1>") == 3
    assert count_bytes("\ufffd") == 1


def test_limits_and_refusals(tiny, tmp_path, monkeypatch):
    task = tiny_task.task(tiny.store)
    job = Evaluate(tiny.after, [task], tiny_task.LENGTHS, max_examples=5, batch_size=4, baselines=())
    sizes, scores = [], Model.token_scores
    monkeypatch.setattr(
        Model,
        "token_scores",
        lambda m, batch: sizes.append(len(batch["decoder_input_tokens"])) or scores(m, batch),
    )
    figures = job(RunDir(tmp_path / "few").create())
    assert figures["opposites/examples"] == 5
    assert sizes == [4, 4]
    for fields, message in (
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": [task, task]}, "two of one name"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"baselines": (CopyInput(), CopyInput())}, "different names"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluate(**({"model": tiny.after, "tasks": [task], "lengths": tiny_task.LENGTHS} | fields))
    other = tmp_path / "other"
    with TokenStoreWriter(str(other), ("inputs", "targets"), ByteVocabulary(0)) as writer:
        for split in ("train", "validation"):
            writer.add(split, {"inputs": [5, 1], "targets": [6, 1]})
    with pytest.raises(UserError, match="but task 'opposites' was tokenized with"):
        Evaluate(tiny.after, [tiny_task.task(str(other))], tiny_task.LENGTHS)(
            RunDir(tmp_path / "no").create()
        )
    assert not (tmp_path / "no" / "results.json").exists()


def test_examples_are_read_without_padding_rows(tiny):
    from t5style.data.pipeline import BatchSource

    source = BatchSource(
        tiny_task.task(tiny.store), "validation", 8, tiny_task.LENGTHS, pack=False, shuffle=False
    )
    examples = list(read_examples(source))
    assert len(examples) == 21
    assert all(example.targets[-1] == 1 and example.prompt[-1] == 1 for example in examples)
    assert pathlib.Path(tiny.store).is_dir()


def test_baselines_read_a_bounded_sample_of_the_training_split(tiny, tmp_path, monkeypatch):
    """And decode none of a stream's text: both would take for ever on a large store."""
    decoded, decode = [], type(tiny_task.VOCABULARY).decode
    monkeypatch.setattr(
        type(tiny_task.VOCABULARY), "decode", lambda self, ids: decoded.append(1) or decode(self, ids)
    )
    assert Evaluate.train_examples == 20_000
    config = tiny_task.model(decoder_only=True)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    Model(config, params, tiny_task.VOCABULARY).save(tmp_path / "model")
    job = Evaluate(
        str(tmp_path / "model"), [tiny_task.language_modelling(tiny.store)], {"decoder": 32}, max_examples=2
    )
    job(RunDir(tmp_path / "run").create())
    assert len(decoded) == 4
