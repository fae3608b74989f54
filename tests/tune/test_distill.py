"""Distillation: as the papers and TRL have it, with a live teacher, with its logits on disk, by its
answers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5style
from t5style.data.token_store import TokenStore
from t5style.models.config import TransformerConfig
from t5style.models.prune import Student
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError
from t5style.train.optimizer import Optimizer
from t5style.train.pretrain import Pretrain
from t5style.train.schedules import Schedule
from t5style.tune import distill
from t5style.tune.distill import Distill, DistillationLoss
from t5style.tune.divergences import divergence, with_rest
from t5style.tune.imitate import Imitate
from t5style.tune.on_policy import OnPolicy
from t5style.tune.rollouts import Sampling
from t5style.tune.students import MakeStudent
from t5style.tune.supervised import Finetune
from tests.evaluate import tiny_task
from tests.tune.make_golden_distillation import GOLDEN, SETTINGS, inputs

ONE = MeshConfig(devices=1)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def paper(student, teacher, beta):
    """GKD, equation 1, of logits in float64, by token."""
    q, p = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    kl = lambda a, b: (a * np.log(a / b)).sum(axis=-1)  # noqa: E731
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    mixed = beta * p + (1 - beta) * q
    return beta * kl(p, mixed) + (1 - beta) * kl(q, mixed)


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_divergences_are_the_papers_and_trls(number):
    (beta, temperature), given, golden = SETTINGS[number], inputs(), dict(np.load(GOLDEN))
    wanted = given["labels"] != -100

    def loss(logits, teacher):
        own, its = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher))
        return jnp.where(wanted, divergence(own, its, beta), 0).sum() / wanted.sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(given["student"], given["teacher"])
    expected = paper(given["student"] / temperature, given["teacher"] / temperature, beta)[wanted].mean()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(value, golden[f"loss_{number}"], rtol=1e-5)
    np.testing.assert_allclose(gradient, golden[f"gradient_{number}"], atol=1e-6)


def test_the_most_probable_tokens_bound_the_divergence_from_below():
    given = inputs()
    student, teacher = (jnp.asarray(given[name].reshape(15, 23)) for name in ("student", "teacher"))
    whole = paper(student, teacher, 0.0)
    before = np.zeros(15)
    for k in (5, 22):
        ids = np.argsort(-teacher, axis=-1)[:, :k]

        def bound(logits, ids=ids):
            its = with_rest(teacher, ids)
            return divergence(with_rest(logits, ids), its, 0.0).sum(), (
                divergence(with_rest(logits, ids), its, 0.0),
                its,
            )

        (_, (found, its)), slope = jax.jit(jax.value_and_grad(bound, has_aux=True))(student)
        np.testing.assert_allclose(np.exp(its).sum(axis=-1), 1, rtol=1e-5)
        assert (found <= whole + 1e-5).all()
        assert (found >= before - 1e-5).all()
        assert np.isfinite(slope).all()
        before = found
    np.testing.assert_allclose(before, whole, rtol=1e-5)  # 22 of 23: all others together are the last one


def test_the_loss_mixes_the_teacher_with_the_data_at_a_temperature():
    config, random = tiny_task.model(decoder_only=True), np.random.default_rng(0)
    from t5style.models.params import abstract_params

    draw = lambda c: jax.tree.map(  # noqa: E731
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape) * 0.3, jnp.float32), abstract_params(c)
    )
    bigger = config.replace(decoder_layers=2, d_model=48)
    student, teacher = draw(config), draw(bigger)
    batch = {
        "decoder_input_tokens": random.integers(2, 40, (2, 6)).astype(np.int32),
        "decoder_target_tokens": random.integers(2, 40, (2, 6)).astype(np.int32),
        "decoder_positions": np.tile(np.arange(6, dtype=np.int32), (2, 1)),
        "decoder_segment_ids": np.ones((2, 6), np.int32),
        "decoder_loss_weights": np.array([[0, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]], np.int32),
    }
    loss = DistillationLoss(config, bigger, beta=0.5, temperature=2.0, hard=0.25)
    objective, weight, metrics = jax.jit(lambda *given: loss(given[0], batch, None, given[1]))(
        student, teacher
    )
    logits = [
        np.asarray(t5style.infer.model.Model(c, params).logits(batch["decoder_input_tokens"]))
        for c, params in ((config, student), (bigger, teacher))
    ]
    wanted = batch["decoder_loss_weights"] > 0
    soft = paper(logits[0] / 2, logits[1] / 2, 0.5)[wanted].sum()
    nll = [
        -np.take_along_axis(log_softmax(x), batch["decoder_target_tokens"][..., None], -1)[..., 0][
            wanted
        ].sum()
        for x in logits
    ]
    assert weight == 7
    np.testing.assert_allclose(objective, 0.75 * 4 * soft + 0.25 * nll[0], rtol=1e-5)
    for name, value in (("distillation", soft), ("loss", nll[0]), ("teacher_loss", nll[1])):
        np.testing.assert_allclose(metrics[name][0], value, rtol=1e-5)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A store, a teacher of a few steps, and a student cut out of it: folders."""
    folder = tmp_path_factory.mktemp("family")
    store = tiny_task.make_store(str(folder / "store"))
    model = tiny_task.model(decoder_only=True).replace(decoder_layers=2)
    job = Pretrain(model=model, task=tiny_task.task(store), mesh=ONE, **tiny_task.settings(60))
    job(RunDir(folder / "teacher").create())
    cut = MakeStudent(
        str(folder / "teacher"),
        Student(decoder_layers=1, d_ff=0.5, importance="activations"),
        task=tiny_task.task(store),
        lengths=tiny_task.LENGTHS,
    )
    assert (
        cut(RunDir(folder / "student").create())["parameters"]
        < cut(RunDir(folder / "again").create())["teacher_parameters"]
    )
    return store, str(folder / "teacher"), str(folder / "student")


def job_of(family, steps=12, **fields):
    store, teacher, student = family
    settings = tiny_task.settings(steps, 3e-3) | {"init_from": student, "teacher": teacher} | fields
    return Distill(task=tiny_task.task(store), mesh=ONE, **settings)


def test_a_student_learns_from_a_live_teacher_and_from_its_logits_on_disk(family, tmp_path, monkeypatch):
    assert t5style.load(family[2]).config == t5style.load(family[1]).config.replace(decoder_layers=1, d_ff=32)
    live = job_of(family, log_every=1, eval_split="validation")
    figures = live(RunDir(tmp_path / "live").create())
    lines = [line for line in RunDir(tmp_path / "live").read_metrics() if "train/distillation" in line]
    assert lines[-1]["train/distillation"] < lines[0]["train/distillation"]
    assert figures["eval/opposites/teacher_loss"] < figures["eval/opposites/loss"]
    lineage = json.loads((tmp_path / "live" / "lineage.json").read_text())
    assert lineage["teacher"] == family[1]
    assert lineage["parent"].startswith(family[2])
    # All but one of 40 tokens: nothing is lost, and it is the same training.
    cached = dataclasses.replace(live, cache=str(tmp_path / "logits"), top_k=39)
    same = cached(RunDir(tmp_path / "cached").create())
    np.testing.assert_allclose(same["train_loss"], figures["train_loss"], rtol=1e-4)
    assert "eval/opposites/teacher_loss" not in same
    # Another run on the same rows needs no teacher.
    monkeypatch.setattr(Distill, "_teacher", None)
    other = dataclasses.replace(cached, beta=1.0, eval_split=None)
    other(RunDir(tmp_path / "other").create())
    with pytest.raises(
        UserError, match=r"were made with temperature 1.0, this run has 2.0: choose another folder"
    ):
        dataclasses.replace(cached, temperature=2.0)(RunDir(tmp_path / "hot").create())
    for part in (tmp_path / "logits").glob("*.npz"):
        part.unlink()
    with pytest.raises(UserError, match="lack a row of this run's batches"):
        cached(RunDir(tmp_path / "broken").create())


def test_refuses_teachers_that_speak_another_language(family, tmp_path):
    for changes, said in (
        ({"vocab_size": 41}, r"the student has 40 logits, the teacher .* 41: probabilities are compared"),
        ({"encoder_layers": 1}, "the student is decoder_only, the teacher encoder_decoder"),
    ):
        config: TransformerConfig = t5style.load(family[1]).config.replace(**changes)
        with pytest.raises(UserError, match=said):
            job_of(family, teacher_model=config).resolved()
    with pytest.raises(ValueError, match="teacher is not set"):
        job_of(family, teacher=None)
    with pytest.raises(ValueError, match="beta is 2; it must lie between 0 and 1"):
        job_of(family, beta=2)
    with pytest.raises(UserError, match="top_k is 40, but the teacher has 40 tokens"):
        distill.teacher_logits.Identity.of(family[1], 40, 40, 1.0)


def test_a_student_is_tuned_on_its_teachers_answers(family, tmp_path):
    store, teacher, student = family
    fields = {"lengths": tiny_task.LENGTHS, "max_new_tokens": 12, "batch_size": 4}
    job = Imitate(teacher, tiny_task.task(store), max_examples=10, **fields)
    counts = job(RunDir(tmp_path / "answers").create())
    assert counts["prompts"] == 10
    assert counts["examples"] + counts["unfinished"] + counts["empty"] == 10
    model, made = t5style.load(teacher), TokenStore.open(tmp_path / "answers")
    lines = [json.loads(line) for line in (tmp_path / "answers" / "examples.jsonl").read_text().splitlines()]
    assert len(lines) == counts["examples"] == made.num_examples("train")
    assert [line["completion"] for line in lines] == model.generate([line["prompt"] for line in lines], 12)
    targets = made.examples("train", "targets", range(len(lines)))
    assert all(tokens[-1] == 1 for tokens in targets)
    texts = [tiny_task.VOCABULARY.decode(row) for row in made.examples("train", "inputs", range(len(lines)))]
    assert texts == [line["prompt"] for line in lines]
    # Stopped after six answers and half a line: the rest is as it was.
    whole = (tmp_path / "answers" / "answers.jsonl").read_bytes()
    again = RunDir(tmp_path / "again").create()
    (again.path / "answers.jsonl").write_bytes(
        b"\n".join(whole.split(b"\n")[:6]) + b"\n" + whole.split(b"\n")[6][:9]
    )
    assert job(again) == counts
    assert (again.path / "answers.jsonl").read_bytes() == whole
    Finetune(**tiny_task.settings(2), init_from=student, store=str(tmp_path / "answers"), mesh=ONE)(
        RunDir(tmp_path / "tuned").create()
    )
    with pytest.raises(UserError, match="answers has ended within 1 tokens: raise max_new_tokens"):
        dataclasses.replace(job, max_new_tokens=1)(RunDir(tmp_path / "short").create())


def test_a_student_is_corrected_on_its_own_answers_and_goes_on_exactly(family, tmp_path):
    store, teacher, student = family
    settings = tiny_task.settings(4) | {"optimizer": Optimizer(learning_rate=Schedule("constant", 1e-2))}
    job = OnPolicy(
        task=tiny_task.task(store),
        mesh=ONE,
        init_from=student,
        teacher=teacher,
        sampling=Sampling(max_new_tokens=8),
        on_policy=0.75,
        **settings | {"batch_size": 4},
    )
    job(RunDir(tmp_path / "whole").create())
    for steps in (2, 4):
        dataclasses.replace(job, steps=steps)(RunDir(tmp_path / "parts").create())
    whole, parts = (t5style.load(tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    samples = [
        json.loads(line)
        for line in (tmp_path / "whole" / "samples" / "latest.jsonl").read_text().splitlines()
    ]
    assert len(samples) == 4
    assert all(0 < len(sample["tokens"]) <= 8 for sample in samples)
    with pytest.raises(ValueError, match=r"hard is 0.5: the student's own answers are no data"):
        dataclasses.replace(job, hard=0.5)
