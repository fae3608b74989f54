import io
import json
import pickle

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from t5style.corpus import vocabulary as vocabulary_lib
from t5style.corpus.document import read_documents
from t5style.corpus.sources import Samples
from t5style.corpus.train_tokenizer import TrainTokenizer, passages
from t5style.corpus.vocabulary import (
    ByteVocabulary,
    CharacterVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    load,
)
from t5style.run_dir import UserError


@pytest.fixture(scope="module")
def text():
    path = Samples(["apache-doc"]).inputs()[0]
    documents = [item for item, _ in zip(read_documents(path), range(60), strict=False)]
    return "\n".join(item.text for item in documents)[:300_000]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request, text):
    job = TrainTokenizer(kind=request.param, vocab_size=2000, extra_ids=20, character_coverage=0.999)
    return SentencePieceVocabulary(job._train_sentencepiece(list(passages(text))), 20)


@pytest.fixture(scope="module")
def all_kinds(text):
    job = TrainTokenizer(kind="bpe", vocab_size=1000, extra_ids=10)
    model = job._train_sentencepiece(
        ["the quick brown fox and the lazy dog"] * 20 + list(passages(text[:50_000]))
    )
    return [
        SentencePieceVocabulary(model, 10),
        CharacterVocabulary(text, 10),
        ByteVocabulary(10),
    ]


def test_ids_follow_t5(all_kinds):
    for vocabulary in all_kinds:
        assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id) == (0, 1, 2, 0)
        assert vocabulary.vocab_size == vocabulary.base_size + 10
        assert [vocabulary.sentinel_id(k) for k in range(10)] == list(
            range(vocabulary.vocab_size - 1, vocabulary.vocab_size - 11, -1)
        )
        with pytest.raises(ValueError, match=r"no sentinel 10.*has 10"):
            vocabulary.sentinel_id(10)
        ids = vocabulary.encode("the lazy dog")
        assert min(ids) >= 3
        assert max(ids) < vocabulary.base_size


def test_byte_ids_are_those_of_byt5():
    # Xue et al. 2022: bytes follow the three special tokens. Hugging Face's ByT5Tokenizer agrees on "hi".
    assert ByteVocabulary().encode("hi") == [107, 108]
    assert ByteVocabulary(125).vocab_size == 384


def test_character_ids_are_sorted_and_unknown_is_2():
    vocabulary = CharacterVocabulary("banana\n")
    assert vocabulary.characters == "\nabn"
    assert vocabulary.encode("ban!") == [5, 4, 6, 2]
    assert vocabulary.decode([5, 4, 6, 2]) == "ban\ufffd"


@settings(max_examples=300, deadline=None)
@given(st.text())
@example("  leading, trailing and   inner spaces  ")
@example("\n\n\ttabs\tand\r\nline ends\n")
@example("\u2581 the space mark \u2581\u2581 itself\u2581")
@example("</s> <pad> <unk> <0x41> <extra_id_0> <extra_id_3>")
@example("\x00 \x01 \x7f \ufeff \u200b \ufffd \U0010ffff")
@example("1234567890 3.14159")
@example("한국어 日本語 🙂👩‍👩‍👧 e\u0301 é ﬁ")
@example("")
def test_sentencepiece_gives_every_text_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(3 <= token < trained.base_size for token in ids)


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text())
def test_ids_of_two_texts_joined_decode_to_the_texts_joined(trained, first, second):
    assert trained.decode(trained.encode(first) + trained.encode(second)) == first + second


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_bytes_give_every_text_back(text):
    vocabulary = ByteVocabulary()
    assert vocabulary.decode(vocabulary.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_lone_surrogates_never_crash(all_kinds, text):
    for vocabulary in all_kinds:
        decoded = vocabulary.decode(vocabulary.encode(text))
        decoded.encode()
        np.testing.assert_array_equal(vocabulary.encode_batch([text])[0], vocabulary.encode(text))


def test_half_a_surrogate_pair_reads_as_the_replacement_character():
    vocabulary = ByteVocabulary()
    assert vocabulary.decode(vocabulary.encode("a\ud800b")) == "a\ufffdb"


def test_batches_equal_single_texts(all_kinds):
    texts = ["the lazy dog", "", "x\u2581y", "\n", "the"]
    for vocabulary in all_kinds:
        batch = vocabulary.encode_batch(texts)
        assert [array.dtype for array in batch] == [np.int32] * 5
        assert [array.tolist() for array in batch] == [vocabulary.encode(text) for text in texts]
        batch = vocabulary.encode_batch(["the lazy dog", "the"])
        assert [array.tolist() for array in batch] == [
            vocabulary.encode("the lazy dog"),
            vocabulary.encode("the"),
        ]


def test_special_tokens_are_plain_text_unless_asked_for(all_kinds):
    for vocabulary in all_kinds:
        if isinstance(vocabulary, CharacterVocabulary):
            continue
        assert vocabulary.sentinel_id(0) not in vocabulary.encode("a <extra_id_0> b")
        ids = vocabulary.encode("a <extra_id_1><extra_id_0> b <extra_id_77>", sentinels=True)
        assert [token for token in ids if token >= vocabulary.base_size] == [
            vocabulary.sentinel_id(1),
            vocabulary.sentinel_id(0),
        ]
        assert vocabulary.decode(ids) == "a <extra_id_1><extra_id_0> b <extra_id_77>"
        assert vocabulary.encode("", sentinels=True) == []


def test_decode_hides_pad_and_end_and_shows_sentinels(all_kinds):
    for vocabulary in all_kinds:
        ids = [0, *vocabulary.encode("the"), vocabulary.sentinel_id(2), *vocabulary.encode(" dog"), 1, 0]
        assert vocabulary.decode(ids) == "the<extra_id_2> dog"
        assert vocabulary.decode(np.array(ids, np.int32)) == "the<extra_id_2> dog"
        assert vocabulary.decode([vocabulary.vocab_size + 5]) == "\ufffd"
        with pytest.raises(ValueError, match="0 or more, not -1"):
            vocabulary.decode([-1])


def test_save_load_and_pickle_keep_everything(all_kinds, tmp_path):
    for vocabulary in all_kinds:
        folder = tmp_path / vocabulary.kind
        vocabulary.save(folder)
        vocabulary.save(folder)  # again, over itself
        for other in (load(folder), load(folder / "vocabulary.json"), pickle.loads(pickle.dumps(vocabulary))):
            assert other == vocabulary
            assert other.fingerprint == vocabulary.fingerprint
            assert other.encode("the lazy dog") == vocabulary.encode("the lazy dog")
        assert json.loads((folder / "vocabulary.json").read_text())["vocab_size"] == vocabulary.vocab_size


def test_fingerprints_tell_contents_and_sentinels_apart(all_kinds):
    others = [CharacterVocabulary("abc", 10), CharacterVocabulary("abd", 10), CharacterVocabulary("abc", 11)]
    prints = [item.fingerprint for item in [*all_kinds, *others, ByteVocabulary(11)]]
    assert len(set(prints)) == len(prints)
    assert CharacterVocabulary("cba", 10) == others[0]


def test_load_names_what_is_wrong(all_kinds, tmp_path):
    with pytest.raises(UserError, match=r"no vocabulary at .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no vocabulary in .*expected vocabulary\.json"):
        load(tmp_path)
    (tmp_path / "vocabulary.json").write_text("{")
    with pytest.raises(UserError, match="not a vocabulary written by t5style"):
        load(tmp_path)
    (tmp_path / "vocabulary.json").write_text('{"kind": "runes", "extra_ids": 0, "fingerprint": ""}')
    with pytest.raises(UserError, match="unknown kind 'runes'"):
        load(tmp_path)
    all_kinds[0].save(tmp_path)
    (tmp_path / "spm.model").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load(tmp_path)
    (tmp_path / "spm.model").unlink()
    with pytest.raises(UserError, match=r"incomplete: .*spm\.model is missing"):
        load(tmp_path)
    all_kinds[1].save(tmp_path)
    record = json.loads((tmp_path / "vocabulary.json").read_text())
    (tmp_path / "vocabulary.json").write_text(json.dumps(record | {"characters": "changed"}))
    with pytest.raises(UserError, match="was changed after it was saved"):
        load(tmp_path)
    (tmp_path / "x.txt").write_text("no")
    with pytest.raises(UserError, match=r"x\.txt is no vocabulary"):
        load(tmp_path / "x.txt")
    with pytest.raises(UserError, match="extra_ids must be 0 or more, not -1"):
        ByteVocabulary(-1)


def test_save_is_complete_or_not_there(all_kinds, tmp_path, monkeypatch):
    def full(path, data):
        if str(path).endswith("spm.model"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(vocabulary_lib, "atomic_write", full)
    with pytest.raises(OSError, match="No space left"):
        all_kinds[0].save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="no vocabulary"):
        load(tmp_path)


def train_other(texts, **options):
    """A SentencePiece model with conventions that are not ours."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, minloglevel=2, **options
    )
    return model.getvalue()


def test_models_made_elsewhere_keep_their_ids(text, tmp_path):
    lines = list(passages(text[:100_000]))
    # T5's own kind: dummy prefix, white space collapsed; with the folder that Hugging Face keeps it in.
    model = train_other(
        lines, vocab_size=800, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.99
    )
    (tmp_path / "spiece.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 100}')
    t5 = load(tmp_path)
    assert (t5.vocab_size, t5.sentinel_id(0), t5.pad_id, t5.eos_id) == (900, 899, 0, 1)
    ids = t5.encode("Apache <extra_id_0> server.", sentinels=True)
    assert t5.decode(ids) == "Apache<extra_id_0> server."
    # LLaMA's: unk 0, bos 1, eos 2, no pad.
    model = train_other(lines, vocab_size=800, model_type="bpe", byte_fallback=True, character_coverage=0.99)
    llama = SentencePieceVocabulary(model, 0)
    assert (llama.unk_id, llama.bos_id, llama.eos_id, llama.pad_id) == (0, 1, 2, 2)
    assert llama.decode([1, *llama.encode("the server"), 2]) == "the server"
    assert llama.decode([0]).strip()  # an unknown token is seen
    with pytest.raises(UserError, match="has no end of sequence: train it with an eos_id"):
        SentencePieceVocabulary(train_other(lines, vocab_size=800, eos_id=-1, character_coverage=0.99))


def test_tokenizer_json(text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    sentinels = [f"<extra_id_{k}>" for k in reversed(range(5))]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(passages(text[:50_000]), trainer)
    plain = TokenizerVocabulary(tokenizer.to_str().encode(), extra_ids=7)
    assert (plain.pad_id, plain.eos_id, plain.unk_id, plain.bos_id) == (0, 1, 2, 0)
    assert plain.vocab_size == plain.base_size + 7
    tokenizer.add_special_tokens(sentinels)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    own = load(tmp_path)
    assert own.extra_ids == 5
    assert own.sentinel_id(0) == tokenizer.token_to_id("<extra_id_0>") == own.vocab_size - 1
    for vocabulary in (plain, own):
        for sample in ("Hello world\n  twice", "日本 🙂", "</s> is <extra_id_0> text"):
            ids = vocabulary.encode(sample)
            assert vocabulary.decode(ids) == sample
            assert vocabulary.eos_id not in ids
            assert max(ids) < vocabulary.base_size
        assert vocabulary.encode("<extra_id_3>", sentinels=True) == [vocabulary.sentinel_id(3)]
        vocabulary.save(tmp_path / "saved")
        assert load(tmp_path / "saved") == vocabulary == pickle.loads(pickle.dumps(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"pad_token": "</s>", "eos_token": {"content": "<unk>"}}'
    )
    told = load(tmp_path)
    assert (told.pad_id, told.eos_id) == (1, 2)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"not a readable tokenizer\.json"):
        load(tmp_path)


def test_a_tokenizer_without_padding_loses_no_text(tmp_path):
    """LLaMA 3's: id 0 is text, and no token is for padding or the unknown."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({character: id for id, character in enumerate("!HeloWrd")}, [])
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    with pytest.raises(UserError, match="name its token as eos_token in a tokenizer_config"):
        load(tmp_path)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot|>"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    vocabulary = load(tmp_path)
    ids = vocabulary.encode("Hello!World!")
    assert ids.count(0) == 2
    assert vocabulary.decode([8, *ids, 9, vocabulary.pad_id]) == "Hello!World!"
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id, vocabulary.unk_id) == (8, 9, 9, 9)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|eot|>"}')
    assert (load(tmp_path).eos_id, load(tmp_path).pad_id) == (10, 10)
