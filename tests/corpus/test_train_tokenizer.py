import collections
import subprocess
import sys
import tracemalloc

import pytest

from t5style.corpus.document import Document, read_documents, write_documents
from t5style.corpus.sources import Samples
from t5style.corpus.train_tokenizer import TrainTokenizer, passages, sample_passages
from t5style.corpus.vocabulary import SentencePieceVocabulary, load
from t5style.run_dir import RunDir, UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small prepared corpus of real text in several languages."""
    folder = tmp_path_factory.mktemp("corpus")
    documents = []
    for name in ("bible-kjv", "apache-doc"):
        documents += list(read_documents(Samples([name]).inputs()[0]))[::8]
    held_out = [item for index, item in enumerate(documents) if index % 10 == 0]
    train = [item for index, item in enumerate(documents) if index % 10]
    write_documents(folder / "train/documents-00000-of-00001.parquet", train)
    write_documents(folder / "validation/documents-00000-of-00001.parquet", held_out)
    return str(folder)


def run(job, folder):
    return job(RunDir(folder).create())


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_has_the_size_asked_for_and_is_lossless(corpus, tmp_path, kind):
    figures = run(TrainTokenizer(corpus, kind=kind, vocab_size=2048, sample_characters=300_000), tmp_path)
    vocabulary = load(tmp_path)
    assert isinstance(vocabulary, SentencePieceVocabulary)
    assert figures["vocab_size"] == vocabulary.vocab_size == 2048
    assert figures["fingerprint"] == vocabulary.fingerprint
    assert vocabulary.sentinel_id(0) == 2047
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id) == (0, 1, 2, 0)
    held_out = list(read_documents(f"{corpus}/validation"))
    tokens = 0
    for item in held_out:
        ids = vocabulary.encode(item.text)
        assert vocabulary.decode(ids) == item.text
        tokens += len(ids)
    assert figures["measured_on"] == "validation"
    assert figures["held_out_tokens"] == tokens
    size = sum(len(item.text.encode()) for item in held_out)
    assert figures["bytes_per_token"] == pytest.approx(size / tokens)
    assert 2 < figures["bytes_per_token"] < 5
    assert 1.2 < figures["fertility"] < 3
    # Digits stand alone; a line feed is a piece, not a byte.
    assert len(vocabulary.encode("2024")) == 4
    assert vocabulary.piece(vocabulary.encode("\n")[0]) == "\n"


def test_the_same_seed_gives_the_same_vocabulary(corpus, tmp_path):
    jobs = [
        TrainTokenizer(corpus, vocab_size=1500, sample_characters=100_000, seed=seed) for seed in (0, 0, 1)
    ]
    prints = [run(job, tmp_path / str(index))["fingerprint"] for index, job in enumerate(jobs)]
    assert prints[0] == prints[1] != prints[2]


def test_characters_and_bytes(corpus, tmp_path):
    figures = run(TrainTokenizer(corpus, kind="character", extra_ids=3), tmp_path / "character")
    vocabulary = load(tmp_path / "character")
    characters = {character for item in read_documents(f"{corpus}/train") for character in item.text}
    assert vocabulary.vocab_size == 3 + len(characters) + 3
    assert figures["characters_per_token"] == 1.0
    assert 0 <= figures["unknown_share"] < 0.01
    figures = run(TrainTokenizer(corpus, kind="byte", extra_ids=0), tmp_path / "byte")
    assert load(tmp_path / "byte").vocab_size == figures["vocab_size"] == 259
    assert figures["bytes_per_token"] == 1.0


def test_sizes_that_cannot_be_are_refused_with_the_limit(corpus, tmp_path):
    small = tmp_path / "small"
    write_documents(small / "train/x.jsonl", [Document("a few words are not enough for many pieces", "x")])
    with pytest.raises(
        UserError, match=r"vocab_size=8192 is more than this corpus can fill: at most (\d+)"
    ) as info:
        run(TrainTokenizer(str(small)), tmp_path / "v")
    most = int(str(info.value).split("at most ")[1].split(";")[0])
    run(TrainTokenizer(str(small), vocab_size=most), tmp_path / "v")
    assert load(tmp_path / "v").vocab_size == most
    with pytest.raises(UserError, match=r"vocab_size=400 is too small .* at least (\d+)") as info:
        run(TrainTokenizer(corpus, vocab_size=400, character_coverage=1.0), tmp_path / "w")
    least = int(str(info.value).split("at least ")[1].split(";")[0])
    with pytest.raises(UserError, match="is too small"):
        run(TrainTokenizer(corpus, vocab_size=least - 1, character_coverage=1.0), tmp_path / "w")
    run(TrainTokenizer(corpus, vocab_size=least + 1, character_coverage=1.0), tmp_path / "w")
    with pytest.raises(UserError, match="vocab_size must be at least 362"):
        TrainTokenizer(vocab_size=361)


def test_wrong_settings_and_missing_corpora_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="kind must be one of unigram, bpe, character, byte, not 'wordpiece'"):
        TrainTokenizer(kind="wordpiece")
    with pytest.raises(UserError, match=r"character_coverage must lie in \(0, 1\], not 0"):
        TrainTokenizer(character_coverage=0)
    with pytest.raises(UserError, match="extra_ids must be 0 or more, not -1"):
        TrainTokenizer(extra_ids=-1)
    with pytest.raises(UserError, match="must be 1 or more"):
        TrainTokenizer(sample_characters=0)
    with pytest.raises(UserError, match=r"no documents at .*nowhere/train"):
        run(TrainTokenizer(f"{tmp_path}/nowhere"), tmp_path / "v")
    write_documents(tmp_path / "blank/train/x.jsonl", [Document("\n\n", "x")])
    with pytest.raises(UserError, match="there is no text in"):
        run(TrainTokenizer(f"{tmp_path}/blank"), tmp_path / "v")
    assert not (tmp_path / "v/vocabulary.json").exists()


def test_passages_are_the_lines_and_never_too_long():
    text = "short\n\n" + "word " * 1000 + "\n" + "日本語" * 1000 + "\nlast"
    pieces = list(passages(text))
    assert "".join(pieces) == text.replace("\n", "")
    assert max(map(len, pieces)) <= 1000
    assert pieces[0] == "short"
    assert pieces[-1] == "last"
    assert all(piece.startswith(" word") for piece in pieces[2:6])


def test_the_sample_is_bounded_and_fair():
    documents = [
        Document("\n".join(f"{index:04d}" for index in range(start, start + 100)), str(start))
        for start in range(0, 2000, 100)
    ]  # 2,000 passages of 4 characters
    drawn = collections.Counter()
    for seed in range(200):
        sample = sample_passages(iter(documents), characters=400, seed=seed)
        assert 396 < sum(map(len, sample)) <= 404
        assert sample == sorted(sample)
        drawn.update(int(piece) // 500 for piece in sample)
    # 200 samples of 100 passages: each quarter 5,000 on average, with a standard deviation of about 60.
    assert all(abs(drawn[quarter] - 5000) < 5 * 60 for quarter in range(4))
    everything = sample_passages(iter(documents), characters=10**9, seed=0)
    assert len(everything) == 2000
    assert sample_passages(iter([Document("a\x00b\nc", "x")]), 100, 0) == ["c"]


def test_a_vocabulary_that_loses_text_is_found(monkeypatch, corpus, tmp_path):
    monkeypatch.setattr(SentencePieceVocabulary, "decode", lambda self, ids: "something else")
    first = next(iter(read_documents(f"{corpus}/validation"))).id
    with pytest.raises(RuntimeError, match=f"does not give document {first!r} back"):
        run(TrainTokenizer(corpus, vocab_size=1000, sample_characters=50_000), tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_user_defined_symbols_are_one_token_wherever_they_stand(corpus, tmp_path, kind):
    symbols = ["<|user|>", "日本", "[7]", "http://"]
    job = TrainTokenizer(
        corpus, kind=kind, vocab_size=1500, sample_characters=100_000, user_defined_symbols=symbols
    )
    run(job, tmp_path)
    vocabulary = load(tmp_path)
    assert vocabulary.vocab_size == 1500
    for symbol in symbols:
        (token,) = vocabulary.encode(symbol)
        assert vocabulary.piece(token) == symbol
        text = f"a {symbol}{symbol}x 2{symbol} "
        ids = vocabulary.encode(text)
        assert ids.count(token) == 3
        assert vocabulary.decode(ids) == text


@pytest.mark.parametrize(
    "symbol", ["", "two words", "a\n", "\u2581x", "\0", "</s>", "<unk>", "<pad>", "<extra_id_7>", "<0x0A>"]
)
def test_symbols_that_cannot_be_are_refused(symbol):
    with pytest.raises(UserError, match=r"user_defined_symbols has .* must not be empty, hold white space"):
        TrainTokenizer(user_defined_symbols=["<|user|>", symbol])


def test_wrong_lists_of_symbols_are_refused():
    with pytest.raises(UserError, match="must be a list of strings, not the string '<a>'"):
        TrainTokenizer(user_defined_symbols="<a>")
    with pytest.raises(UserError, match="names one twice"):
        TrainTokenizer(user_defined_symbols=["<a>", "<a>"])
    with pytest.raises(UserError, match="kind='byte' has no user_defined_symbols"):
        TrainTokenizer(kind="byte", user_defined_symbols=["<a>"])
    with pytest.raises(UserError, match=r"must be at least 363 .* 1 user_defined_symbols"):
        TrainTokenizer(vocab_size=362, user_defined_symbols=["<a>"])


def test_sampling_holds_no_more_than_the_sample():
    def peak(documents):
        line = "some words of a line that is neither short nor long, eighty characters in all..."
        source = (Document("\n".join([line] * 1000), str(n)) for n in range(documents))
        tracemalloc.start()
        sample_passages(source, 200_000, 0)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(64) < 1.5 * peak(16) < 4_000_000


def test_the_room_starts_light():
    modules = "document vocabulary sources stages normalize split prepare train_tokenizer measure_vocabulary"
    code = (
        f"import sys\nfor m in '{modules}'.split(): __import__('t5style.corpus.' + m)\n"
        "heavy = ('jax', 'tensorflow', 'torch', 'pyarrow', 'sentencepiece', 'tokenizers')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"
