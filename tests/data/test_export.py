"""ArrayRecord files: grain reads back what was in the corpus and in the store, TensorFlow could, too."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5style.corpus.document import Document, write_documents
from t5style.data import export
from t5style.data.export import CARD, ExportArrayRecord, parse_example, serialize_example
from t5style.data.token_store import TokenStore
from t5style.run_dir import RunDir, UserError

# What TensorFlow 2.21's tf.train.Example(...).SerializeToString(deterministic=True) gives for FIELDS.
FIELDS = {"text": "žluť 日本", "id": "", "ids": np.array([0, 1, -5, 2**40]), "none": np.array([], np.int64)}
GOLDEN = (
    "0a520a1d0a0369647312161a140a120001fbffffffffffffffff018080808080200a0a0a02696412040a020a000a0a0a04"
    "6e6f6e6512021a000a190a047465787412110a0f0a0dc5be6c75c5a520e697a5e69cac"
)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_records_are_tensorflows() -> None:
    assert serialize_example(FIELDS).hex() == GOLDEN
    assert same(parse_example(bytes.fromhex(GOLDEN)), FIELDS)


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.one_of(
            st.text(st.characters(codec="utf-8")),
            st.lists(st.integers(-(2**63), 2**63 - 1)).map(lambda ids: np.array(ids, np.int64)),
        ),
    )
)
def test_any_record_comes_back(fields: dict[str, Any]) -> None:
    record = serialize_example(fields)
    assert same(parse_example(record), fields)
    assert serialize_example(dict(reversed(fields.items()))) == record


def documents(start: int, count: int) -> list[Document]:
    return [
        Document(f"Text {n}: žluťoučký " + "x" * n, f"d{n}", "here", language="cs", meta={"n": n, "č": None})
        for n in range(start, start + count)
    ]


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> str:
    write_documents(tmp_path / "corpus/train/documents-00000-of-00002.parquet", documents(0, 30))
    write_documents(tmp_path / "corpus/train/documents-00001-of-00002.parquet", documents(30, 20))
    write_documents(tmp_path / "corpus/validation/documents-00000-of-00001.parquet", documents(50, 3))
    return str(tmp_path / "corpus")


def run(folder: pathlib.Path, **settings: Any) -> dict[str, Any]:
    return ExportArrayRecord(**settings)(RunDir(folder).create())


def dataset(folder: pathlib.Path) -> grain.MapDataset:
    files = sorted(map(str, folder.glob("*.array_record")))
    return grain.MapDataset.source(grain.sources.ArrayRecordDataSource(files)).map(parse_example)


def test_documents_for_grain(corpus: str, tmp_path: pathlib.Path) -> None:
    figures = run(tmp_path / "out", corpus=corpus, shard_bytes=1000)
    read = dataset(tmp_path / "out/train")
    assert len(read) == figures["splits"]["train"]["records"] == 50
    for n in (49, 0, 17):  # in any order
        expected = documents(n, 1)[0]
        meta = read[n].pop("meta")
        assert json.loads(meta) == expected.meta
        rest = {
            name: getattr(expected, name)
            for name in ("text", "id", "source", "url", "license", "language", "time")
        }
        assert read[n] == rest | {"meta": meta}
    assert sorted(example["id"] for example in read.shuffle(seed=1)) == sorted(f"d{n}" for n in range(50))
    assert [example["id"] for example in dataset(tmp_path / "out/validation")] == ["d50", "d51", "d52"]
    # The card names every file, and nothing else lies there.
    card = json.loads((tmp_path / "out" / CARD).read_text())
    files = card["splits"]["train"]["files"]
    assert len(files) == figures["splits"]["train"]["files"] > 3
    assert sorted(files) == sorted(path.name for path in (tmp_path / "out/train").iterdir())
    assert sorted(files)[0] == f"documents-00000-of-{len(files):05d}.array_record"
    assert sum(facts["records"] for facts in files.values()) == 50
    for name, facts in files.items():
        content = (tmp_path / "out/train" / name).read_bytes()
        assert facts["bytes"] == len(content)
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert card["fingerprint"] == figures["fingerprint"]


def test_records_can_be_read_alone(corpus: str, tmp_path: pathlib.Path) -> None:
    from array_record.python import array_record_module

    run(tmp_path / "out", corpus=corpus)
    (path,) = (tmp_path / "out/validation").iterdir()
    assert (
        array_record_module.ArrayRecordReader(str(path)).writer_options_string().startswith("group_size:1,")
    )


def test_tokens_for_grain(pair_store: str, tmp_path: pathlib.Path) -> None:
    figures = run(tmp_path / "out", store=pair_store)
    assert {split: numbers["records"] for split, numbers in figures["splits"].items()} == {
        "train": 200,
        "validation": 23,
    }
    store = TokenStore.open(pair_store)
    read = dataset(tmp_path / "out/train")
    for n in (199, 3):
        expected = {name: store.examples("train", name, [n])[0] for name in store.features}
        assert same(read[n], expected)
        assert read[n]["inputs"].dtype == np.int64
    run(tmp_path / "some", store=pair_store, features=["targets"], splits=["validation"])
    assert [path.name for path in (tmp_path / "some").iterdir() if path.is_dir()] == ["validation"]
    assert list(dataset(tmp_path / "some/validation")[0]) == ["targets"]


def test_the_fingerprint_is_of_the_records(corpus: str, tmp_path: pathlib.Path) -> None:
    prints = [
        run(tmp_path / str(number), corpus=corpus, **settings)["fingerprint"]
        for number, settings in enumerate(
            ({}, {"shard_bytes": 500}, {"features": ["text"]}, {"splits": ["train"]})
        )
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_one_file_and_an_empty_split(make_store: Any, tmp_path: pathlib.Path) -> None:
    write_documents(tmp_path / "x.jsonl", documents(0, 4))
    run(tmp_path / "out", corpus=str(tmp_path / "x.jsonl"), features=["text"])
    assert [example["text"] for example in dataset(tmp_path / "out/train")] == [
        d.text for d in documents(0, 4)
    ]
    store = make_store({"train": {"text": ["a"]}, "test": {"text": []}})
    run(tmp_path / "tokens", store=store)
    assert len(dataset(tmp_path / "tokens/test")) == 0


def test_what_a_killed_run_left_is_replaced(corpus: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "out/.exporting/train").mkdir(parents=True)
    (tmp_path / "out/.exporting/train/documents-00000").write_bytes(b"half")
    (tmp_path / "out/train").mkdir()
    (tmp_path / "out/train/documents-00000-of-00009.array_record").write_bytes(b"old")
    run(tmp_path / "out", corpus=corpus)
    assert len(dataset(tmp_path / "out/train")) == 50
    assert not (tmp_path / "out/.exporting").exists()


def test_records_that_are_missing_are_noticed(
    corpus: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export._Shards, "write", lambda self, record: None)
    with pytest.raises(RuntimeError, match="split 'train' has 50 documents, but 0 were read"):
        run(tmp_path / "out", corpus=corpus)
    monkeypatch.undo()
    real = export._Shards._close

    def lose(self: Any) -> None:
        real(self)
        self.counts[-1:] = [count + 1 for count in self.counts[-1:]]  # as if one had not reached the disk

    monkeypatch.setattr(export._Shards, "_close", lose)
    monkeypatch.setattr(export, "_count", lambda folder: {"train": 51, "validation": 4}[folder.name])
    with pytest.raises(RuntimeError, match="holds 50 records, but 51 were written to it"):
        run(tmp_path / "out", corpus=corpus)
    assert not (tmp_path / "out" / CARD).exists()


def test_bad_settings_are_refused(corpus: str, pair_store: str, tmp_path: pathlib.Path) -> None:
    for settings in ({}, {"corpus": "a", "store": "b"}):
        with pytest.raises(UserError, match="Name either a corpus or a store"):
            ExportArrayRecord(**settings)
    with pytest.raises(UserError, match="no feature 'body' to export, only text, id, source"):
        ExportArrayRecord(corpus="c", features=["body"])
    with pytest.raises(UserError, match="no feature 'text' to export, only inputs, targets"):
        run(tmp_path / "out", store=pair_store, features=["text"])
    with pytest.raises(UserError, match="must be lists of names"):
        ExportArrayRecord(corpus="c", features="text")
    with pytest.raises(UserError, match="features is empty"):
        ExportArrayRecord(corpus="c", features=[])
    with pytest.raises(UserError, match="shard_bytes is 0"):
        ExportArrayRecord(corpus="c", shard_bytes=0)
    with pytest.raises(UserError, match="has no split 'test', only train, validation"):
        run(tmp_path / "out", corpus=corpus, splits=["test"])
    with pytest.raises(UserError, match="has no split 'test', only 'train', 'validation'"):
        run(tmp_path / "out", store=pair_store, splits=["test"])
    with pytest.raises(UserError, match="There is no corpus at nowhere"):
        run(tmp_path / "out", corpus="nowhere")
