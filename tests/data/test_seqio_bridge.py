"""Real seqio tasks become token stores, and our tasks are seqio tasks that seqio's own Evaluator runs."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from t5style.corpus.vocabulary import ByteVocabulary, SentencePieceVocabulary
from t5style.data import seqio_bridge
from t5style.data.objectives import CausalLM, SpanCorruption, Supervised
from t5style.data.pipeline import BatchSource
from t5style.data.task import Mixture, Task
from t5style.data.token_store import TokenStore
from t5style.run_dir import RunDir, UserError

MakeStore = Callable[..., str]
seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

LINES = [
    f"the {word} number {n} is {n * n}" for n, word in enumerate(["cat", "dog", "bird", "fish", "tree"] * 12)
]


@pytest.fixture(autouse=True)
def _clean_registries() -> Iterator[None]:
    yield
    seqio.TaskRegistry.reset()
    seqio.MixtureRegistry.reset()


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    (folder / "text.txt").write_text("\n".join(LINES))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spm"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(folder / "spm.model")


def line_to_pair(line: Any) -> dict[str, Any]:
    parts = tf.strings.split(line, " is ")
    return {"inputs": tf.strings.join(["tree ", parts[0]]), "targets": parts[1]}


def pairs(dataset: Any) -> Any:
    return dataset.map(line_to_pair)


def add_text_task(name: str, folder: pathlib.Path, vocabulary: Any, lines: Sequence[str] = LINES) -> None:
    """A task as seqio's users write them: text lines, preprocessed, tokenised, end of sequence appended."""
    for split, part in (("train", lines[:-10]), ("validation", lines[-10:])):
        (folder / f"{name}-{split}.txt").write_text("\n".join(part) + "\n")
    seqio.TaskRegistry.add(
        name,
        source=seqio.TextLineDataSource(
            {split: str(folder / f"{name}-{split}.txt") for split in ("train", "validation")},
            num_input_examples={"train": len(lines) - 10, "validation": 10},
        ),
        preprocessors=[pairs, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={
            "inputs": seqio.Feature(vocabulary, add_eos=True),
            "targets": seqio.Feature(vocabulary, add_eos=True),
        },
        metric_fns=[],
    )


def test_a_real_seqio_task_becomes_a_store(tmp_path: pathlib.Path, sentencepiece_model: str) -> None:
    theirs = seqio.SentencePieceVocabulary(sentencepiece_model, extra_ids=20)
    add_text_task("lines", tmp_path, theirs)
    figures = seqio_bridge.Materialize("lines")(RunDir(str(tmp_path / "run")).create())
    store = TokenStore.open(tmp_path / "run", verify=True)
    assert figures["lines"]["train"]["examples"] == store.num_examples("train") == 50
    assert store.num_examples("validation") == 10
    assert isinstance(store.vocabulary, SentencePieceVocabulary)
    assert store.vocabulary.vocab_size == theirs.vocab_size
    assert [store.vocabulary.sentinel_id(k) for k in (0, 19)] == [
        theirs.vocab_size - 1,
        theirs.vocab_size - 20,
    ]
    dataset = seqio.get_mixture_or_task("lines").get_dataset(None, "validation", shuffle=False)
    for number, example in enumerate(dataset.as_numpy_iterator()):
        for feature in ("inputs", "targets"):
            ids = store.examples("validation", feature, [number])[0]
            assert ids.tolist() == example[feature].tolist()
            assert store.vocabulary.decode(ids) == example[f"{feature}_pretokenized"].decode()
    source = BatchSource(Task("t", store.folder, Supervised()), "train", 4, {"encoder": 64, "decoder": 32})
    assert source.batch_at(0)["decoder_loss_weights"].sum() > 0


def test_the_vocabulary_given_is_an_input() -> None:
    assert seqio_bridge.Materialize("lines").inputs() == []
    assert seqio_bridge.Materialize("lines", vocabulary="run:vocabulary").inputs() == ["run:vocabulary"]


def test_a_seqio_mixture_keeps_its_rates(tmp_path: pathlib.Path) -> None:
    vocabulary = seqio.ByteVocabulary(extra_ids=30)
    add_text_task("few", tmp_path, vocabulary, LINES[:20])
    add_text_task("many", tmp_path, vocabulary, LINES)
    seqio.MixtureRegistry.add(
        "both", [("few", 2.0), ("many", functools.partial(seqio.mixing_rate_num_examples, maximum=40))]
    )
    seqio_bridge.Materialize("both", splits=["train"])(RunDir(str(tmp_path / "run")).create())
    mixture = seqio_bridge.load_mixture(str(tmp_path / "run"))
    assert [task.name for task in mixture.tasks] == ["few", "many"]
    assert mixture.rates == [2.0, 40.0]
    source = BatchSource(mixture, "train", 4, {"encoder": 64, "decoder": 32})
    assert source.rates == pytest.approx([2 / 42, 40 / 42])
    assert isinstance(source.vocabulary, ByteVocabulary)
    assert source.vocabulary.vocab_size == vocabulary.vocab_size
    text = "Zoë & 木"
    assert source.vocabulary.encode(text) == list(vocabulary.encode(text))


def exact_match(expected: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    return {"exact_match": 100.0 * float(np.mean([a == b for a, b in zip(expected, predicted, strict=True)]))}


def test_seqio_evaluator_runs_our_task(pair_store: str) -> None:
    vocabulary = ByteVocabulary()
    task = Task("pairs", pair_store, Supervised(), postprocess=str.upper, metrics=[exact_match])
    assert seqio_bridge.export(task) == "pairs"
    evaluator = seqio.Evaluator(
        "pairs",
        seqio.EncDecFeatureConverter(pack=False),
        eval_split="validation",
        async_compute_metrics=False,
    )
    shapes = evaluator.model_feature_shapes
    store = TokenStore.open(pair_store)
    assert shapes["encoder_input_tokens"][0] == store.lengths("validation", "inputs").max()

    def predict(dataset: Any) -> list[tuple[int, np.ndarray]]:
        """Right on all but every third example."""
        answers = []
        for index, example in dataset.as_numpy_iterator():
            right = example["decoder_target_tokens"].tolist()
            answers.append((int(index), [*vocabulary.encode("wrong"), 1] if index % 3 == 0 else right))
        return seqio_bridge.predictions(answers[::-1])

    metrics, outputs = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
    # 23 examples, of which 0, 3, …, 21 are answered wrongly; postprocess made both sides upper case.
    assert metrics.result()["pairs"]["exact_match"] == pytest.approx(100 * 15 / 23)
    assert len(next(iter(outputs["pairs"].values()))) == 23


def test_exported_examples_are_the_stores(pair_store: str, text_store: str) -> None:
    seqio_bridge.export(
        Mixture("mix", [Task("p", pair_store, Supervised()), Task("s", text_store, SpanCorruption())])
    )
    store = TokenStore.open(pair_store)
    examples = list(
        seqio.get_mixture_or_task("p").get_dataset(None, "validation", shuffle=False).as_numpy_iterator()
    )
    assert len(examples) == 23
    for number, example in enumerate(examples):
        assert example["inputs"].tolist() == store.examples("validation", "inputs", [number])[0].tolist()
        assert example["targets_pretokenized"].decode() == store.vocabulary.decode(example["targets"])
    mixture = seqio.get_mixture_or_task("mix")
    assert [mixture.get_rate(task) for task in mixture.tasks] == pytest.approx([200 / 260, 60 / 260])
    lengths = {"inputs": 96, "targets": 48}
    source = BatchSource(
        Task("s", text_store, SpanCorruption()),
        "validation",
        1,
        {"encoder": 96, "decoder": 48},
        shuffle=False,
    )
    corrupted = list(
        seqio.get_mixture_or_task("s").get_dataset(lengths, "validation", shuffle=False).as_numpy_iterator()
    )
    assert len(corrupted) == source.evaluation_batches
    for number, example in enumerate(corrupted):
        batch = source.evaluation_batch_at(number)
        real = batch["encoder_segment_ids"][0] > 0
        assert example["inputs"].tolist() == batch["encoder_input_tokens"][0][real].tolist()
    # A mixture is drawn from, converted and packed by seqio's own means.
    converted = seqio.get_dataset(
        "mix",
        lengths,
        dataset_split="train",
        shuffle=False,
        feature_converter=seqio.EncDecFeatureConverter(pack=True),
    )
    first = next(converted.as_numpy_iterator())
    assert first["encoder_input_tokens"].shape == (96,)
    assert first["decoder_segment_ids"].max() >= 1


def test_there_and_back_again(text_store: str, tmp_path: pathlib.Path) -> None:
    seqio_bridge.export(Task("lm", text_store, CausalLM()))
    figures = seqio_bridge.materialize("lm", str(tmp_path / "back"), ["train"], {"targets": 50})
    before, after = TokenStore.open(text_store), TokenStore.open(tmp_path / "back")
    assert after.features == ("targets",)
    assert after.vocabulary == before.vocabulary
    total = before.num_tokens("train", "text")
    assert figures["lm"]["train"]["targets"] == total
    everything = np.array([0]), np.array([total])
    assert (
        after.read("train", "targets", *everything).tolist()
        == before.read("train", "text", *everything).tolist()
    )


def test_the_adapter_does_what_the_vocabulary_does() -> None:
    ours = ByteVocabulary(extra_ids=10)
    theirs = seqio_bridge.to_seqio_vocabulary(ours)
    text = "Zoë says: 1 + 1 = 2"
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.encode_tf(tf.constant(text)).numpy().tolist() == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    ids = tf.constant([[*ours.encode("ab"), 1, 7], [*ours.encode("cd"), 1, 0]])
    assert [t.decode() for t in theirs.decode_tf(ids).numpy()] == ["ab", "cd"]
    assert theirs == seqio_bridge.to_seqio_vocabulary(ByteVocabulary(extra_ids=10))
    assert theirs.vocab_size == ours.vocab_size


def test_what_cannot_be_bridged_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="seqio knows no task or mixture 'nothing'"):
        seqio_bridge.materialize("nothing", str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"Module 'no_such_module' of seqio task 'x'.*install it"):
        seqio_bridge.Materialize("x", module="no_such_module")(RunDir(str(tmp_path / "b")).create())
    with pytest.raises(UserError, match="PassThroughVocabulary has no counterpart here; give `vocabulary`"):
        seqio_bridge.from_seqio_vocabulary(seqio.PassThroughVocabulary(100))
    add_text_task("lines", tmp_path, seqio.ByteVocabulary())
    with pytest.raises(UserError, match="no split 'test', only train, validation"):
        seqio_bridge.materialize("lines", str(tmp_path / "c"), ["test"])
    with pytest.raises(UserError, match=r"mixture\.json is missing"):
        seqio_bridge.load_mixture(str(tmp_path))


def test_the_benchmark_compares_like_with_like(tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks" / "input_pipeline.py"
    spec = importlib.util.spec_from_file_location("input_pipeline", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.write_documents(tmp_path, 60_000)
    batches, _ = benchmark.theirs(tmp_path, 4)
    contestants = {
        "memory": benchmark.ours(tmp_path, 4, True),
        "chunks": benchmark.ours(tmp_path, 4, False),
        "seqio": batches,
    }
    for contestant in contestants.values():
        assert next(contestant) == 4 * 568
    # The peer's rows are as full as ours: 512 inputs and 114 targets, each with its end of sequence.
    task = seqio.get_mixture_or_task("spans")
    example = next(task.get_dataset(benchmark.LENGTHS, "train", shuffle=False).as_numpy_iterator())
    assert (len(example["inputs"]), len(example["targets"])) == (512, 114)
    assert [t for t in example["inputs"] if t >= 259] == list(range(383, 383 - 28, -1))
    assert [t for t in example["targets"] if t >= 259] == list(range(383, 383 - 28, -1))
    rates = benchmark.compare(contestants, 1, 0.0, lambda batches, seconds: (float(next(batches)), 1.0))
    assert rates == {name: [4 * 568.0] for name in contestants}


def test_the_room_loads_no_tensorflow() -> None:
    code = (
        "import sys, t5style.data.pipeline, t5style.data.tokenize, t5style.data.seqio_bridge\n"
        "print([name for name in ('tensorflow', 'seqio', 'torch') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
