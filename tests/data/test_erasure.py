"""Erasure: what is named is gone, what is left is as if it had never been there, whatever interrupts it."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus.document import Document, write_documents
from t5style.corpus.vocabulary import ByteVocabulary
from t5style.data import erasure, token_store
from t5style.data.erasure import erase_examples, examples_of
from t5style.data.token_store import TokenStore, TokenStoreWriter
from t5style.data.tokenize import Tokenize
from t5style.run_dir import RunDir, UserError, path_fingerprint

SECRET = "the telephone number of Jane Roe"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 256 tokens, read in blocks of 100, so that small tests cross their borders."""
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 256)
    monkeypatch.setattr(token_store, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(erasure, "_BLOCK_TOKENS", 100)


def documents(count: int = 40) -> list[Document]:
    return [
        Document(f"{SECRET if n in (3, 17) else 'text'} {n} " + "x" * (n * 7 % 31), f"d{n}", meta={"n": n})
        for n in range(count)
    ]


def tokenize(folder: pathlib.Path, without: set[int] = frozenset()) -> str:  # type: ignore[assignment]
    """A store of the documents but for these, with an order, as a job leaves it."""
    left = [(n, item) for n, item in enumerate(documents()) if n not in without]
    write_documents(folder / "corpus/train/documents-0.parquet", [item for _, item in left])
    write_documents(
        folder / "corpus/validation/documents-0.parquet", [Document("held out", "v", meta={"n": 99})]
    )
    hard = np.random.default_rng(5).permutation(40)
    place = {n: k for k, (n, _) in enumerate(left)}
    np.save(folder / "corpus/train/order.npy", np.array([place[n] for n in hard if n in place]))
    ByteVocabulary().save(folder / "vocabulary")
    features = {"inputs": "{meta[n]}:", "targets": "{text}"}
    job = Tokenize(str(folder / "corpus"), str(folder / "vocabulary"), features)
    run = RunDir(folder / "tokens").create()
    run.write_manifest(job, figures=job(run))
    return str(folder / "tokens")


def contents(store: TokenStore) -> list[tuple[str, ...]]:
    every = range(store.num_examples("train"))
    columns = [store.examples("train", feature, every) for feature in store.features]
    return [tuple(map(store.vocabulary.decode, row)) for row in zip(*columns, strict=True)]


def all_bytes(folder: str) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file())


def as_tokens(text: str) -> bytes:
    return np.array(ByteVocabulary().encode(text), "<u2").tobytes()


def test_the_store_is_as_if_the_documents_had_never_been(tmp_path: pathlib.Path) -> None:
    folder = tokenize(tmp_path / "a")
    before = TokenStore.open(folder)
    assert as_tokens(SECRET) in all_bytes(folder)
    found = examples_of(before, "train", ["d3", "d17", "no such document"])
    assert found.tolist() == [3, 17]
    assert examples_of(before, "validation", ["d3"]).tolist() == []
    figures = erase_examples(folder, {"train": found, "validation": []})
    store = TokenStore.open(folder, verify=True)
    expected = TokenStore.open(tokenize(tmp_path / "b", {3, 17}))
    assert figures == {"erased": {"train": 2}, "fingerprint": store.fingerprint}
    assert store.fingerprint == expected.fingerprint != before.fingerprint
    assert contents(store) == contents(expected)
    assert not any(SECRET in text for row in contents(store) for text in row)
    for read in (TokenStore.curriculum, TokenStore.document_keys):
        np.testing.assert_array_equal(read(store, "train"), read(expected, "train"))
    # Nothing of it is left on the disk, and the manifest says that something was erased, not what.
    assert as_tokens(SECRET) not in all_bytes(folder)
    assert [entry.keys() for entry in store.manifest["erased"]] == [{"time", "examples"}]
    assert store.manifest["erased"][0]["examples"] == 2
    assert store.num_examples("validation") == 1
    run = RunDir(folder).read_manifest()
    assert run is not None
    assert (
        run["fingerprint"] == run["figures"]["fingerprint"] == path_fingerprint(folder) == store.fingerprint
    )
    counts = run["figures"]["splits"]["train"]
    assert counts["examples"] == 38
    assert counts["targets_tokens"] == store.num_tokens("train", "targets")


def test_again_and_again_until_nothing_is_left(tmp_path: pathlib.Path) -> None:
    folder = tokenize(tmp_path)
    erase_examples(folder, {"train": [0]})
    erase_examples(folder, {"train": [38, 0, 38], "validation": [0]})
    store = TokenStore.open(folder, verify=True)
    assert [row[0] for row in contents(store)] == [f"{n}:" for n in range(2, 39)]
    assert [entry["examples"] for entry in store.manifest["erased"]] == [1, 3]
    assert store.num_examples("validation") == 0
    erase_examples(folder, {"train": range(37)})
    assert TokenStore.open(folder, verify=True).num_examples("train") == 0
    assert sorted(p.name for p in pathlib.Path(folder).iterdir() if "@" in p.name) == [
        "train@3",
        "validation@1",
    ]
    # The tokenize job starts from nothing, also over an erased store.
    tokenize(tmp_path)
    assert TokenStore.open(folder, verify=True).num_examples("train") == 40
    assert not [p.name for p in pathlib.Path(folder).iterdir() if "@" in p.name]


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 383), max_size=60), min_size=1, max_size=25),
    st.sets(st.integers(0, 24)),
)
def test_any_examples(
    tmp_path_factory: pytest.TempPathFactory, examples: list[list[int]], chosen: set[int]
) -> None:
    gone = {n for n in chosen if n < len(examples)}
    folder = tmp_path_factory.mktemp("any")
    left = [tokens for n, tokens in enumerate(examples) if n not in gone]
    for name, items in (("all", examples), ("left", left)):
        with TokenStoreWriter(folder / name, ["text"], ByteVocabulary()) as writer:
            writer.add_split("train")
            for tokens in items:
                writer.add("train", {"text": tokens})
    erase_examples(folder / "all", {"train": sorted(gone)})
    store = TokenStore.open(folder / "all", verify=True)
    assert [x.tolist() for x in store.examples("train", "text", range(len(left)))] == left
    assert store.fingerprint == TokenStore.open(folder / "left").fingerprint


_KILLED = """
import os, signal, sys
from t5style.data import erasure
before, folder = sys.argv[1] == "before", sys.argv[2]
real = erasure.write_manifest
def die(*arguments):
    if not before:
        real(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
erasure.write_manifest = die
erasure.erase_examples(folder, {"train": [3, 17]})
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_killed_erasure_leaves_one_store_or_the_other(tmp_path: pathlib.Path, when: str) -> None:
    folder = tokenize(tmp_path)
    before = TokenStore.open(folder).fingerprint
    done = subprocess.run([sys.executable, "-c", _KILLED, when, folder], timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    store = TokenStore.open(folder, verify=True)
    assert store.num_examples("train") == (40 if when == "before" else 38)
    assert (store.fingerprint == before) == (when == "before")
    assert {"train", "train@1"} <= set(os.listdir(folder))  # both are still there: call it again
    found = examples_of(store, "train", ["d3", "d17"])
    assert len(found) == (2 if when == "before" else 0)
    erase_examples(folder, {"train": found})
    assert as_tokens(SECRET) not in all_bytes(folder)
    store = TokenStore.open(folder, verify=True)
    assert store.num_examples("train") == 38
    assert path_fingerprint(folder) == store.fingerprint


def test_what_cannot_be_erased(tmp_path: pathlib.Path) -> None:
    with TokenStoreWriter(tmp_path / "s", ["text"], ByteVocabulary()) as writer:
        writer.add("train", {"text": [4, 5]})
        writer.add_split("test")
    store = TokenStore.open(tmp_path / "s")
    with pytest.raises(
        UserError, match=r"does not know which documents .* 'train' come from .*tokenize again"
    ):
        examples_of(store, "train", ["x"])
    assert examples_of(store, "test", ["x"]).tolist() == []
    for index in (1, -1):
        with pytest.raises(IndexError, match=r"'train' of store .* has 1 examples"):
            erase_examples(tmp_path / "s", {"train": [index]})
    with pytest.raises(UserError, match="has no split 'valid'"):
        erase_examples(tmp_path / "s", {"valid": [0]})
    with pytest.raises(UserError, match="holds no token store"):
        erase_examples(tmp_path / "t", {})
    assert json.loads((tmp_path / "s/store.json").read_text()) == store.manifest
