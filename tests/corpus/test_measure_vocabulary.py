"""Figures of a vocabulary, by language: each against what can be counted by hand."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus import measure_vocabulary
from t5style.corpus.document import Document, read_documents, write_documents
from t5style.corpus.measure_vocabulary import REPORT, MeasureVocabulary, measure, words
from t5style.corpus.sources import Samples
from t5style.corpus.train_tokenizer import TrainTokenizer
from t5style.corpus.vocabulary import ByteVocabulary, CharacterVocabulary, SentencePieceVocabulary, load
from t5style.run_dir import RunDir, UserError


def document(text, language="", id="x"):
    return Document(text, id, language=language)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab, ba's 3.14", ["ab", ",", "ba", "'", "s", "3", ".", "14"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),  # vowel signs are part of the word
        ("e\u0301t\u00e9 naïve", ["e\u0301t\u00e9", "naïve"]),
        ("日本語です。", ["日", "本", "語", "で", "す", "。"]),
        ("ภาษาไทย", ["ภ", "า", "ษ", "า", "ไ", "ท", "ย"]),
        ("ที่นี่", ["ที่", "นี่"]),
        ("GPTは強い", ["GPT", "は", "強", "い"]),
        ("한국어 말", ["한국어", "말"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        (" \n\t", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@settings(deadline=None)
@given(st.text())
def test_words_leave_out_nothing_but_white_space(text):
    left = text
    for word in words(text):
        before, found, left = left.partition(word)
        assert found
        assert not before.strip()
    assert not left.strip()


def test_figures_counted_by_hand():
    vocabulary = CharacterVocabulary("ab, ")
    report = measure(vocabulary, [document("ab, ba", "en"), document("c a", "en"), document("bb", "fr")])
    assert report["held_out_tokens"] == 6 + 3 + 2
    english = report["languages"]["en"]
    # Words: ab , ba c a; of more than one token: ab, ba. Unknown: c.
    assert english == {
        "documents": 2,
        "characters": 9,
        "words": 5,
        "words_are": "words",
        "fertility": 9 / 5,
        "continued_share": 2 / 5,
        "characters_per_token": 1.0,
        "bytes_per_token": 1.0,
        "byte_token_share": 0.0,
        "unknown_share": 1 / 9,
        "changed": 1,
    }
    assert report["fertility"] == pytest.approx(11 / 6)
    assert report["continued_share"] == pytest.approx(3 / 6)
    assert report["changed"] == 1
    assert report["first_changed"] == "x"
    assert "fertility_ratio" not in report  # too few words
    assert list(report["languages"]) == ["en", "fr"]


def test_bytes_tell_scripts_apart():
    texts = {"en": "hello there " * 300, "ru": "привет тебе " * 300, "ja": "こんにちは世界 " * 300}
    report = measure(ByteVocabulary(), [document(text, language) for language, text in texts.items()])
    rows = report["languages"]
    assert rows["en"]["fertility"] == pytest.approx(6)  # five letters and a space
    assert rows["ru"]["fertility"] == pytest.approx(11)  # ten letters of two bytes, in two words, two spaces
    assert rows["en"]["characters_per_token"] == 1
    assert rows["ja"]["words_are"] == "characters"
    assert rows["ja"]["words"] == 7 * 300
    # Japanese has no words here to compare.
    assert (report["fertility_best"], report["fertility_worst"]) == ("en", "ru")
    assert report["fertility_ratio"] == pytest.approx(11 / 6)


def test_each_language_has_its_own_limit():
    documents = [document("ab " * 10, "en")] * 5 + [document("ab " * 10, "fr")] * 5
    report = measure(ByteVocabulary(), documents, characters=70)
    for row in report["languages"].values():
        assert (row["documents"], row["characters"]) == (3, 70)
    assert report["held_out_tokens"] == 140


def test_reading_has_an_end(monkeypatch):
    monkeypatch.setattr(measure_vocabulary, "_READ_CHARACTERS", 100)

    def endless():
        while True:
            yield document("x" * 30, "en")

    assert measure(ByteVocabulary(), endless(), characters=40)["held_out_tokens"] == 40


def test_a_trained_vocabulary_on_real_text_of_several_languages(tmp_path):
    documents = list(read_documents(Samples(["apache-doc"]).inputs()[0]))
    write_documents(tmp_path / "corpus/train/documents-0.parquet", documents[::4])
    write_documents(tmp_path / "corpus/validation/documents-0.parquet", documents[1::40])
    job = TrainTokenizer(str(tmp_path / "corpus"), kind="bpe", vocab_size=3000, sample_characters=300_000)
    figures = job(RunDir(tmp_path / "vocabulary").create())
    report = json.loads((tmp_path / "vocabulary" / REPORT).read_text())
    assert {name: report[name] for name in report if name != "languages"}.items() <= figures.items()
    assert report["measured_on"] == figures["measured_on"] == "validation"
    vocabulary = load(tmp_path / "vocabulary")
    assert isinstance(vocabulary, SentencePieceVocabulary)
    assert len(report["languages"]) > 3
    for name, row in report["languages"].items():
        texts = [item.text for item in documents[1::40] if item.language == name]
        ids = [token for text in texts for token in vocabulary.encode(text)]
        spelt = [token for token in ids if vocabulary.piece(token).startswith("<0x")]
        assert row["documents"] == len(texts)
        assert row["bytes_per_token"] == pytest.approx(sum(len(text.encode()) for text in texts) / len(ids))
        assert row["fertility"] == pytest.approx(len(ids) / sum(len(words(text)) for text in texts))
        assert row["byte_token_share"] == pytest.approx(len(spelt) / len(ids))
        assert row["changed"] == row["unknown_share"] == 0
        assert 0 < row["continued_share"] < 1
    by_fertility = {name: row["fertility"] for name, row in report["languages"].items()}
    assert report["fertility_ratio"] == pytest.approx(
        by_fertility[report["fertility_worst"]] / by_fertility[report["fertility_best"]]
    )
    assert report["fertility_ratio"] > 1
    # The job gives the same for the vocabulary by itself.
    again = MeasureVocabulary(str(tmp_path / "vocabulary"), str(tmp_path / "corpus"))
    measured = again(RunDir(tmp_path / "measured").create())
    assert json.loads((tmp_path / "measured" / REPORT).read_text()) == report
    assert measured["vocabulary_fingerprint"] == figures["fingerprint"] == vocabulary.fingerprint


def test_continued_words_are_those_of_the_text():
    """Of words encoded alone as many are continued as of words in their text, where spaces part pieces."""
    job = TrainTokenizer(kind="bpe", vocab_size=460)
    lines = ["the quick brown fox and the lazy dog"] * 30 + ["lower newer wider lowest newest widest"] * 30
    vocabulary = SentencePieceVocabulary(job._train_sentencepiece(lines), 100)
    text = "the lowest fox unquick lazy\nthe dog  newest x"
    row = measure(vocabulary, [document(text, "en")])["languages"]["en"]
    # Pieces of the text that begin no word: each belongs to a continued word.
    parts = []
    for token in vocabulary.encode(text):
        piece = vocabulary.piece(token)
        if piece[0] in "\u2581\n" or not parts or parts[-1] == ["\n"]:
            parts.append([])
        if piece != "\u2581":
            parts[-1].append(piece)
    parts = [part for part in parts if part and part != ["\n"]]
    assert len(parts) == row["words"] == 9
    assert row["continued_share"] == pytest.approx(sum(len(part) > 1 for part in parts) / 9)
    assert row["continued_share"] > 0


def test_tokenizer_json_is_measured_as_it_is(tmp_path):
    """A model that changes text is no error here, but a figure; and its bytes are counted."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = {"</s>": 0, "<unk>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    pieces |= {character: 258 + n for n, character in enumerate("abc ")}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    write_documents(tmp_path / "documents.jsonl", [document("Ab é", "fr"), document("abc", "en")])
    job = MeasureVocabulary(str(tmp_path / "tokenizer.json"), str(tmp_path / "documents.jsonl"))
    job(RunDir(tmp_path / "out").create())
    rows = json.loads((tmp_path / "out" / REPORT).read_text())["languages"]
    assert rows["fr"]["changed"] == 1
    assert rows["fr"]["byte_token_share"] == 2 / 5
    assert rows["en"]["changed"] == rows["en"]["byte_token_share"] == 0


def test_what_cannot_be_measured(tmp_path):
    ByteVocabulary().save(tmp_path / "v")
    with pytest.raises(UserError, match="characters must be 1 or more, not 0"):
        MeasureVocabulary(characters=0)
    with pytest.raises(UserError, match=r"no documents at .*nowhere"):
        MeasureVocabulary(str(tmp_path / "v"), str(tmp_path / "nowhere"))(RunDir(tmp_path / "o").create())
    with pytest.raises(UserError, match="no vocabulary at"):
        MeasureVocabulary(str(tmp_path / "w"), str(tmp_path))(RunDir(tmp_path / "o").create())
    write_documents(tmp_path / "c/train/x.jsonl", [document("")])
    with pytest.raises(UserError, match=r"there is no text in .*train to measure"):
        MeasureVocabulary(str(tmp_path / "v"), str(tmp_path / "c"))(RunDir(tmp_path / "o").create())
