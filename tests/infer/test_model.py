"""The public API: equal to transformers, and its methods to each other; what it refuses."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5style
from t5style.corpus.vocabulary import CharacterVocabulary, SentencePieceVocabulary
from t5style.infer.model import Model
from t5style.models.params import init_params
from t5style.run_dir import UserError
from tests.infer import make_golden
from tests.infer.conftest import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"
FAMILIES = ("t5", "t5_1_1", "llama")


def agrees(m: Model, expected) -> None:
    """Logits and greedy answers of a model against what transformers gave."""
    given = make_golden.inputs()
    for side in ("left", "right"):
        if m.encoder_decoder:
            logits = m.logits(given["decoder_tokens"], None, given["tokens"], given[side])
            real = np.ones(given["decoder_tokens"].shape, bool)
        else:
            logits, real = m.logits(given["tokens"], given[side]), given[side] != 0
        assert logits.dtype == jnp.float32
        assert logits.shape == expected[f"logits_{side}"].shape
        assert np.abs(np.asarray(logits) - expected[f"logits_{side}"])[real].max() < 1e-4
    new = m.generate_tokens(given["tokens"], given["left"], max_new_tokens=make_golden.NEW)
    assert new.tolist() == expected["greedy"].tolist()
    assert len({tuple(row) for row in new.tolist()}) > 2


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_stored_answers_of_transformers(family):
    m = t5style.load(GOLDEN / family)
    assert m.vocabulary is None
    with np.load(GOLDEN / family / "expected.npz") as expected:
        agrees(m, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers_and_saved_back(family, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = make_golden.make(family)
    theirs.save_pretrained(tmp_path / "in")
    m = t5style.load(str(tmp_path / "in"))
    agrees(m, make_golden.expected(theirs))
    m.save(tmp_path / "out")
    again = type(theirs).from_pretrained(tmp_path / "out").eval()
    for name, value in make_golden.expected(again).items():
        np.testing.assert_array_equal(value, make_golden.expected(theirs)[name])


def test_special_ids_come_from_the_directory(tmp_path):
    for file in (GOLDEN / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    m = t5style.load(tmp_path)
    assert (m.ids.pad, m.ids.eos, m.config.context_length) == (0, (2,), 128)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 2]}))
    m = t5style.load(tmp_path)
    assert m.ids.eos == (7, 2)
    with pytest.raises(
        ValueError, match=r"prompt 0 has 120 tokens, with max_new_tokens 9 that is 129, but .* 128"
    ):
        m.generate_tokens(np.full((1, 120), 5), max_new_tokens=9)


def test_score_is_the_sum_of_log_softmax(model):
    inputs, targets = ["abc", "a longer input", "x"], ["yes", "no", "a rather long target, over a bucket"]
    scores = model.score(inputs, targets, batch_size=2)
    assert scores.shape == (3,)
    for i, (source, target) in enumerate(zip(inputs, targets, strict=True)):
        source_ids, target_ids = model.vocabulary.encode(source), model.vocabulary.encode(target)
        if model.encoder_decoder:
            target_ids = [*target_ids, 1]
            logits = model.logits([[0, *target_ids[:-1]]], encoder_tokens=[[*source_ids, 1]])[0]
        else:
            logits = model.logits([[0, *source_ids, *target_ids[:-1]]])[0, len(source_ids) :]
        logs = np.asarray(jax.nn.log_softmax(logits), np.float64)
        assert scores[i] == pytest.approx(logs[np.arange(len(target_ids)), target_ids].sum(), abs=1e-3)
    other = model.score(inputs, targets, eos=not model.encoder_decoder)
    assert (other != scores).all()


def test_texts_are_tokenized_as_in_training(model):
    answer = model.complete(["hello", "a much longer prompt than the first"], max_new_tokens=8)
    for i, text in enumerate(["hello", "a much longer prompt than the first"]):
        ids = model.vocabulary.encode(text)
        ids = [*ids, 1] if model.encoder_decoder else [0, *ids]
        tokens = model.generate_tokens([ids], max_new_tokens=8)[0].tolist()
        assert answer[i].tokens == (tokens[: tokens.index(1)] if 1 in tokens else tokens)
        assert answer[i].text == model.vocabulary.decode(answer[i].tokens)
    assert model.generate(["hello"], 8) == [answer[0].text]
    if model.encoder_decoder:
        assert model.prompt_ids("<extra_id_0>", 0).tolist() == [model.vocabulary.sentinel_id(0), 1]


def test_batching_changes_no_answer(model):
    prompts = ["a", "b" * 20, "c" * 5, "d" * 40, "e" * 18]
    together = model.generate(prompts, 6, temperature=0.7, seed=3, batch_size=2)
    alone = [model.generate([p], 6, temperature=0.7, seed=3 + i)[0] for i, p in enumerate(prompts)]
    assert together == alone


def test_embed_is_the_mean_over_real_tokens():
    m = tiny("encoder_decoder")
    from t5style.models.transformer import Transformer

    text = m.embed(["hello", "a longer text than the other one"])
    assert text.shape == (2, 32)
    for row, words in zip(text, ["hello", "a longer text than the other one"], strict=True):
        ids = jnp.asarray([[*m.vocabulary.encode(words), 1]])
        encoded = Transformer(m.config).apply({"params": m.params}, ids, method="encode")
        np.testing.assert_allclose(row, encoded[0].mean(axis=0), atol=1e-5)
    ids = np.asarray([[9, 9, 5, 6, 7]])
    np.testing.assert_allclose(m.embed(ids, [[0, 0, 1, 1, 1]]), m.embed(ids[:, 2:]), atol=1e-5)
    with pytest.raises(ValueError, match="decoder-only and has no encoder"):
        tiny("decoder_only").embed(["text"])


def test_save_and_load_keep_model_and_vocabulary(model, tmp_path):
    model.save(tmp_path / "saved")
    again = t5style.load(tmp_path / "saved")
    assert again.vocabulary == model.vocabulary
    assert (again.ids.pad, again.ids.eos, again.ids.start) == (model.ids.pad, model.ids.eos, model.ids.start)
    assert model.encoder_decoder or again.ids.prefix == model.ids.prefix
    assert again.generate(["hello"], 8) == model.generate(["hello"], 8)
    with pytest.raises(ValueError, match="format is 'gguf'"):
        model.save(tmp_path / "other", format="gguf")


def _sentencepiece(folder: pathlib.Path, text: list[str]) -> SentencePieceVocabulary:
    """A vocabulary of our own making."""
    from t5style.corpus.document import Document, write_documents
    from t5style.corpus.train_tokenizer import TrainTokenizer
    from t5style.corpus.vocabulary import load
    from t5style.run_dir import RunDir

    write_documents(
        folder / "corpus" / "train" / "a.jsonl", [Document(t, str(i)) for i, t in enumerate(text)]
    )
    job = TrainTokenizer(str(folder / "corpus"), vocab_size=300, extra_ids=10, threads=1)
    job(RunDir(folder / "vocabulary").create())
    return load(folder / "vocabulary")


def test_saved_sentencepiece_tokenizer_is_read_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"] * 40
    vocabulary = _sentencepiece(tmp_path, text)
    m = tiny("encoder_decoder")
    config = m.config.replace(vocab_size=vocabulary.vocab_size)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    Model(config, params, vocabulary).save(tmp_path / "saved")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    for words in ("the lazy dog", " two  spaces", "tab\tand\nline", "unseen: Ü 42"):
        assert tokenizer(words).input_ids == [*vocabulary.encode(words), 1]
        assert tokenizer.decode(vocabulary.encode(words)) == words
    assert tokenizer.convert_tokens_to_ids("<extra_id_3>") == vocabulary.sentinel_id(3)
    assert t5style.load(tmp_path / "saved").vocabulary == vocabulary


def test_dtype_and_mesh(model, tmp_path):
    from t5style.parallel.mesh import MeshConfig

    model.save(tmp_path / "saved")
    half = t5style.load(tmp_path / "saved", dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    assert (
        half.logits([[5, 6]], **({"encoder_tokens": [[7]]} if half.encoder_decoder else {})).dtype
        == jnp.float32
    )
    spread = t5style.load(tmp_path / "saved", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    assert spread.params["embedding"].sharding.shard_shape((264, 32)) == (132, 16)
    assert spread.generate(["hello"], 6) == model.generate(["hello"], 6)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        t5style.load(tmp_path / "saved", dtype="int8")


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(UserError, match="there is no model at"):
        t5style.load(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes.txt is a file"):
        t5style.load(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"holds notes.txt; looked for model.json"):
        t5style.load(tmp_path)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "model.json").write_text("{}")
    with pytest.raises(UserError, match="It holds the run folders tuned: name one of them"):
        t5style.load(tmp_path)
    with pytest.raises(UserError, match=r"model.json: the model config lacks"):
        t5style.load(tmp_path / "tuned")
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        t5style.load(tmp_path)


def test_a_vocabulary_larger_than_the_model_is_refused(tmp_path):
    m = tiny("encoder_decoder")
    with pytest.raises(UserError, match=r"the vocabulary has 264 ids but the model .* only 200 embeddings"):
        Model(m.config.replace(vocab_size=200), m.params, m.vocabulary)
    for file in (GOLDEN / "t5").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    CharacterVocabulary("".join(map(chr, range(100, 400)))).save(tmp_path)
    with pytest.raises(UserError, match=r"the vocabulary has 303 ids but the model .* only 64"):
        t5style.load(tmp_path)


def test_bad_texts_are_named(model):
    with pytest.raises(ValueError, match="prompts is empty"):
        model.generate([])
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        model.generate(["a", ""])
    with pytest.raises(ValueError, match="prompts is a single string"):
        model.generate("a")
    with pytest.raises(ValueError, match=r"prompts\[0\] is int"):
        model.generate([1])
    with pytest.raises(ValueError, match="batch_size is 0"):
        model.generate(["a"], batch_size=0)
    with pytest.raises(ValueError, match="batch_size is -1"):
        model.score(["a"], ["b"], batch_size=-1)
    if model.encoder_decoder:
        with pytest.raises(ValueError, match="batch_size is -1"):
            model.embed(["a"], batch_size=-1)
    with pytest.raises(ValueError, match="2 inputs but 1 targets"):
        model.score(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="has no tokenizer"):
        Model(model.config, model.params).generate(["a"])
    if model.encoder_decoder:
        with pytest.raises(ValueError, match="this model is an encoder-decoder: give encoder_tokens"):
            model.logits([[1]])
        with pytest.raises(ValueError, match="encoder_tokens has 2 rows but tokens 1"):
            model.logits([[1]], encoder_tokens=[[1], [2]])
    else:
        with pytest.raises(ValueError, match="takes no encoder_tokens"):
            model.logits([[1]], encoder_tokens=[[1]])


def test_generation_imports_neither_tensorflow_nor_torch():
    program = (
        "import sys, t5style; m = t5style.load(sys.argv[1]); m.generate_tokens([[5, 6]], max_new_tokens=2); "
        "print([name for name in ('tensorflow', 'seqio', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(GOLDEN / "t5")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.strip() == "[]"
