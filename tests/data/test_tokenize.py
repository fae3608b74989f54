"""The tokenize job: documents in, token store out, everything counted."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from t5style.corpus import vocabulary as vocabulary_lib
from t5style.corpus.document import Document, write_documents
from t5style.corpus.vocabulary import ByteVocabulary
from t5style.data.token_store import TokenStore
from t5style.data.tokenize import Tokenize, template_fields
from t5style.run_dir import RunDir, UserError

Run = Callable[..., tuple[TokenStore, dict[str, Any]]]


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> str:
    """Splits train (30 documents, every fifth without a title, two sources) and validation (3)."""
    for split, start, count in (("train", 0, 30), ("validation", 100, 3)):
        documents = [
            Document(
                text=f"Text {n}: žluťoučký",
                id=str(n),
                source="odd" if n % 2 else "even",
                meta={} if n % 5 == 0 else {"title": f"t{n}"},
            )
            for n in range(start, start + count)
        ]
        write_documents(tmp_path / "corpus" / split / "documents-00000-of-00001.parquet", documents)
    return str(tmp_path / "corpus")


@pytest.fixture
def run(corpus: str, tmp_path: pathlib.Path) -> Run:
    ByteVocabulary().save(tmp_path / "vocabulary")
    count = 0

    def tokenize(**settings: Any) -> tuple[TokenStore, dict[str, Any]]:
        nonlocal count
        count += 1
        settings = {"corpus": corpus, "vocabulary": str(tmp_path / "vocabulary")} | settings
        figures = Tokenize(**settings)(RunDir(str(tmp_path / f"run{count}")).create())
        return TokenStore.open(tmp_path / f"run{count}", verify=True), figures

    return tokenize


def test_text_in_and_out(run: Run) -> None:
    store, figures = run()
    assert store.splits == ("train", "validation")
    ids = store.examples("train", "text", [7])[0]
    assert store.vocabulary.decode(ids) == "Text 7: žluťoučký"
    assert ids[-1] == 1
    assert 1 not in ids[:-1]
    num_bytes = sum(len(f"Text {n}: žluťoučký".encode()) for n in range(30))
    assert store.num_tokens("train", "text") == num_bytes + 30  # bytes are tokens here, and 30 ends
    assert figures["splits"]["train"] == {
        "documents": 30,
        "examples": 30,
        "skipped": {},
        "text_tokens": num_bytes + 30,
        "text_bytes": num_bytes,
    }
    assert figures["fingerprint"] == store.fingerprint
    assert store.manifest["description"]["sources"] == {"even": 17, "odd": 16}


def test_templates_and_what_they_skip(run: Run) -> None:
    store, figures = run(features={"inputs": "name {meta[title]}:", "targets": "{text}"}, splits=["train"])
    assert store.splits == ("train",)
    counts = figures["splits"]["train"]
    assert (counts["documents"], counts["examples"], sum(counts["skipped"].values())) == (30, 24, 6)
    assert list(counts["skipped"]) == ["no title for inputs"]
    first = [store.vocabulary.decode(store.examples("train", f, [0])[0]) for f in ("inputs", "targets")]
    assert first == ["name t1:", "Text 1: žluťoučký"]


def test_null_is_a_missing_field_and_a_wrong_format_a_skipped_document(
    run: Run, tmp_path: pathlib.Path
) -> None:
    metas = [{"h": None}, {"h": "x"}, {"h": 5}, {"h": [1]}, {}]
    path = tmp_path / "metas.jsonl"
    write_documents(path, [Document(f"text {n}", str(n), meta=meta) for n, meta in enumerate(metas)])
    store, figures = run(corpus=str(path), features={"text": "a kind of {meta[h]}"})
    assert figures["splits"]["train"]["skipped"] == {"no h for text": 2}
    assert "None" not in store.vocabulary.decode(store.examples("train", "text", [0])[0])
    _, figures = run(corpus=str(path), features={"text": "{meta[h]:03d}"})
    assert figures["splits"]["train"]["examples"] == 1
    assert figures["splits"]["train"]["skipped"] == {
        "no h for text": 2,
        "text: Unknown format code 'd' for object of type 'str'": 1,
        "text: unsupported format string passed to list.__format__": 1,
    }


def test_sources_lengths_and_ends(run: Run) -> None:
    store, figures = run(sources=["odd"], max_tokens={"text": 6})
    assert store.num_examples("train") == 15
    assert figures["splits"]["train"]["skipped"] == {"source not asked for": 15}
    assert set(store.lengths("train", "text")) == {6}
    ids = store.examples("train", "text", [0])[0]
    assert store.vocabulary.decode(ids) == "Text "
    assert ids[-1] == 1  # cut, and closed all the same
    assert figures["splits"]["train"]["text_bytes"] == 15 * len("Text ")  # of what is kept
    without_end, _ = run(append_eos=False, max_tokens={"text": 6})
    assert without_end.vocabulary.decode(without_end.examples("train", "text", [0])[0]) == "Text 0"


def test_many_processes_give_the_same_store(run: Run) -> None:
    one, _ = run(workers=1)
    two, _ = run(workers=2)
    assert one.fingerprint == two.fingerprint


def test_a_plain_file_is_the_split_train(run: Run, corpus: str) -> None:
    store, _ = run(corpus=f"{corpus}/validation/documents-00000-of-00001.parquet")
    assert store.splits == ("train",)
    assert store.num_examples("train") == 3


def test_a_run_that_was_cut_off_after_the_store_is_done_again(
    run: Run, corpus: str, tmp_path: pathlib.Path
) -> None:
    run()
    again = Tokenize(corpus, str(tmp_path / "vocabulary"), {"text": "changed {text}"})
    again(RunDir(str(tmp_path / "run1")))
    store = TokenStore.open(tmp_path / "run1", verify=True)
    assert store.vocabulary.decode(store.examples("train", "text", [0])[0]) == "changed Text 0: žluťoučký"


def test_bad_settings_are_refused(run: Run, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="There is no corpus at nowhere"):
        run(corpus="nowhere")
    with pytest.raises(UserError, match="has no split 'test', only train, validation"):
        run(splits=["test"])
    with pytest.raises(UserError, match=r"None of the documents in .* gave an example .*no nothing for text"):
        run(features={"text": "{meta[nothing]}"})
    with pytest.raises(UserError, match="None of the documents"):
        run(sources=["unheard of"])
    assert not list(tmp_path.glob("run*/store.json"))
    with pytest.raises(ValueError, match="names the field 'body'; a document has text, id, source"):
        Tokenize(features={"text": "{body}"})
    with pytest.raises(ValueError, match="write a literal brace twice"):
        Tokenize(features={"text": "{text"})
    with pytest.raises(ValueError, match="features is empty"):
        Tokenize(features={})
    with pytest.raises(ValueError, match="'a/b' must be made of letters"):
        Tokenize(features={"a/b": "{text}"})
    with pytest.raises(ValueError, match="max_tokens has 'inputs': 5"):
        Tokenize(max_tokens={"inputs": 5})
    with pytest.raises(ValueError, match="workers is 0"):
        Tokenize(workers=0)
    assert template_fields("{text} {meta[a]} {{literal}} {source!r:>5}") == ["text", "meta", "source"]


def test_the_corpus_order_becomes_one_of_the_examples(run: Run, corpus: str) -> None:
    order = np.random.default_rng(0).permutation(30)
    np.save(pathlib.Path(corpus) / "train" / "order.npy", order)
    store, _ = run()
    assert store.curriculum("validation") is None
    found = store.curriculum("train")
    assert found is not None
    assert found.tolist() == order.tolist()
    # Every fifth document has no title: its examples are not there, and the others count anew.
    titled, _ = run(features={"text": "{meta[title]}"}, workers=2)
    found = titled.curriculum("train")
    assert found is not None
    texts = [titled.vocabulary.decode(ids) for ids in titled.examples("train", "text", found)]
    assert texts == [f"t{n}" for n in order if n % 5]
    # Other order, other training data: the fingerprint knows.
    np.save(pathlib.Path(corpus) / "train" / "order.npy", order[::-1])
    assert run()[0].fingerprint != store.fingerprint
    (pathlib.Path(corpus) / "train" / "order.npy").unlink()
    assert run()[0].fingerprint != store.fingerprint


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (np.arange(29), "has 29 entries for 30"),
        (np.r_[np.arange(29), 0], "must name each of 0 … 29 once"),
        (np.arange(30) - 1, "must name each of 0 … 29 once"),
        (np.arange(30.0), r"is float64 \[30\]; it must be int64"),
        (np.arange(30)[None], r"is int64 \[1, 30\]; it must be"),
        (b"no array", "cannot be read"),
    ],
)
def test_an_order_that_is_none_is_refused(run: Run, corpus: str, order: Any, message: str) -> None:
    path = pathlib.Path(corpus) / "train" / "order.npy"
    path.write_bytes(order) if isinstance(order, bytes) else np.save(path, order)
    with pytest.raises(UserError, match=f"train/order.npy {message}"):
        run()


def test_a_tokenizer_json_goes_through_with_its_ids(corpus: str, tmp_path: pathlib.Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = {piece: n for n, piece in enumerate(["<pad>", "</s>", "<unk>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    for workers in (1, 2):
        job = Tokenize(corpus, str(tmp_path / "tokenizer.json"), workers=workers)
        job(RunDir(tmp_path / "out").create())
        store = TokenStore.open(tmp_path / "out")
        # The store has the vocabulary with it, and its hash: whoever reads the store has the same ids.
        assert store.vocabulary == vocabulary_lib.load(tmp_path / "tokenizer.json")
        ids = store.examples("train", "text", [7])[0].tolist()
        assert ids == [*tokenizer.encode("Text 7: žluťoučký").ids, 1]
        assert store.vocabulary.decode(ids) == "Text 7: žluťoučký"
    saved = tmp_path / "out/vocabulary/tokenizer.json"
    saved.write_text(saved.read_text().replace('"</s>"', '"<s2>"', 1))
    store.__dict__.pop("vocabulary")  # as another process sees it
    with pytest.raises(UserError, match="was changed after it was saved"):
        _ = TokenStore.open(tmp_path / "out").vocabulary
