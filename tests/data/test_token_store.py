"""Token stores: what is written comes back, and what was damaged is refused with its name."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus.vocabulary import ByteVocabulary, CharacterVocabulary
from t5style.data import token_store
from t5style.data.store_manifest import document_keys
from t5style.data.token_store import TokenStore, TokenStoreWriter
from t5style.run_dir import UserError


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 64 tokens in chunks of 16, so that small tests cross their borders."""
    monkeypatch.setattr(token_store, "SHARD_TOKENS", 64)
    monkeypatch.setattr(token_store, "CHUNK_TOKENS", 16)


@pytest.mark.parametrize("resident_bytes", [0, 1 << 28], ids=["chunks", "resident"])
def test_every_range_comes_back(
    tmp_path: pathlib.Path, small_shards: None, monkeypatch: pytest.MonkeyPatch, resident_bytes: int
) -> None:
    monkeypatch.setattr(token_store, "RESIDENT_BYTES", resident_bytes)
    random = np.random.default_rng(1)
    examples = [random.integers(0, 384, random.integers(0, 90)) for _ in range(40)]
    with TokenStoreWriter(tmp_path / "s", ["text"], ByteVocabulary()) as writer:
        for example in examples:
            writer.add("train", {"text": example})
    store = TokenStore.open(tmp_path / "s", verify=True)
    flat = np.concatenate(examples)
    assert store.num_examples("train") == 40
    assert store.num_tokens("train", "text") == len(flat) > 10 * 64  # several shards
    assert store.lengths("train", "text").tolist() == [len(example) for example in examples]
    for got, expected in zip(
        store.examples("train", "text", [7, 0, 39]), [examples[i] for i in (7, 0, 39)], strict=True
    ):
        assert got.dtype == np.int32
        assert got.tolist() == expected.tolist()
    starts = random.integers(0, len(flat), 50)
    lengths = np.minimum(random.integers(0, 200, 50), len(flat) - starts)
    expected = np.concatenate([flat[a : a + n] for a, n in zip(starts, lengths, strict=True)])
    assert store.read("train", "text", starts, lengths).tolist() == expected.tolist()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(st.integers(0, 383), max_size=40), min_size=1, max_size=12))
def test_any_examples_come_back(tmp_path_factory: pytest.TempPathFactory, examples: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("any") / "s"
    with TokenStoreWriter(folder, ["a", "b"], ByteVocabulary()) as writer:
        for example in examples:
            writer.add("train", {"a": example, "b": example[::-1]})
    store = TokenStore.open(folder)
    indices = np.arange(len(examples))
    assert [x.tolist() for x in store.examples("train", "a", indices)] == examples
    assert [x.tolist() for x in store.examples("train", "b", indices)] == [x[::-1] for x in examples]


def test_data_type_follows_the_vocabulary(tmp_path: pathlib.Path) -> None:
    large = CharacterVocabulary("".join(map(chr, range(0x4E00, 0x4E20))), extra_ids=70_000)
    for name, vocabulary, expected in (("small", ByteVocabulary(), "uint16"), ("large", large, "int32")):
        with TokenStoreWriter(tmp_path / name, ["text"], vocabulary) as writer:
            writer.add("train", {"text": [vocabulary.vocab_size - 1]})
        store = TokenStore.open(tmp_path / name)
        assert store.manifest["dtype"] == expected
        assert store.examples("train", "text", [0])[0].tolist() == [vocabulary.vocab_size - 1]


def test_fingerprint_is_of_content_not_place(tmp_path: pathlib.Path) -> None:
    def fingerprint(name: str, tokens: list[int]) -> str:
        with TokenStoreWriter(tmp_path / name, ["text"], ByteVocabulary()) as writer:
            writer.add("train", {"text": tokens})
        return TokenStore.open(tmp_path / name).fingerprint

    assert fingerprint("a", [5, 6, 7]) == fingerprint("b", [5, 6, 7])
    assert fingerprint("c", [5, 6, 8]) != fingerprint("a2", [5, 6, 7])


def test_a_store_is_held_in_memory_once(text_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore.open(text_store)
    monkeypatch.chdir(pathlib.Path(text_store).parent)
    assert TokenStore.open(pathlib.Path(text_store).name) is store
    (pathlib.Path(text_store) / "store.json").unlink()
    with pytest.raises(UserError, match="holds no token store"):
        TokenStore.open(text_store)  # looked at again all the same


def test_interrupted_write_leaves_no_store(tmp_path: pathlib.Path) -> None:
    writer = TokenStoreWriter(tmp_path / "s", ["text"], ByteVocabulary())
    with contextlib.suppress(KeyboardInterrupt), writer:
        writer.add("train", {"text": [5, 6]})
        raise KeyboardInterrupt
    assert not list((tmp_path / "s").rglob("zarr.json"))
    with pytest.raises(UserError, match=r"holds no token store: store\.json is missing"):
        TokenStore.open(tmp_path / "s")
    # A process that was killed removes nothing: its leavings are no store either, and the next writer
    # clears them.
    killed = TokenStoreWriter(tmp_path / "s", ["text"], ByteVocabulary())
    killed.add("train", {"text": [1] * 9})
    killed._writers["train"]["text"].finish()
    with pytest.raises(UserError, match="holds no token store"):
        TokenStore.open(tmp_path / "s")
    with TokenStoreWriter(tmp_path / "s", ["text"], ByteVocabulary()) as writer:
        writer.add("train", {"text": [7]})
    assert TokenStore.open(tmp_path / "s", verify=True).num_tokens("train", "text") == 1


def test_finished_store_is_not_overwritten(text_store: str) -> None:
    with pytest.raises(FileExistsError, match="already holds a token store"):
        TokenStoreWriter(text_store, ["text"], ByteVocabulary())


def _some_shard(folder: str) -> pathlib.Path:
    return pathlib.Path(folder) / "train" / "text" / "tokens" / "c" / "0"


def test_changed_byte_is_found(text_store: str) -> None:
    shard = _some_shard(text_store)
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(bytes(content))
    expected = json.loads((pathlib.Path(text_store) / "store.json").read_text())["files"][
        "train/text/tokens/c/0"
    ]
    with pytest.raises(UserError) as caught:
        TokenStore.open(text_store, verify=True)
    assert "train/text/tokens/c/0 has checksum" in str(caught.value)
    assert expected["sha256"] in str(caught.value)
    assert "run the tokenize job again" in str(caught.value)
    # Without the full check the chunk's own checksum still stops the bad tokens from being used.
    store = TokenStore.open(text_store)
    with pytest.raises(UserError, match="train/text/tokens cannot be read"):
        store.examples("train", "text", [0])


def test_shortened_and_missing_files_are_found_at_once(text_store: str) -> None:
    shard = _some_shard(text_store)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"c/0 has {len(content) - 1} bytes, expected {len(content)}"):
        TokenStore.open(text_store)
    shard.unlink()
    for verify in (False, True):
        with pytest.raises(UserError, match="c/0 is missing"):
            TokenStore.open(text_store, verify=verify)


@pytest.mark.parametrize("content", ['{"format": 1, "feat', "[]"])
def test_damaged_manifest_is_named(text_store: str, content: str) -> None:
    (pathlib.Path(text_store) / "store.json").write_text(content)
    with pytest.raises(UserError, match=r"store: store\.json is damaged .*run the tokenize job again"):
        TokenStore.open(text_store)


@pytest.mark.parametrize("file", ["offsets/c/0", "offsets/zarr.json", "tokens/zarr.json"])
def test_damaged_arrays_are_named(text_store: str, file: str) -> None:
    path = pathlib.Path(text_store) / "train" / "text" / file
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    name = f"train/text/{file.partition('/')[0]}"
    with pytest.raises(UserError, match=f"{name} cannot be read .*run the tokenize job again"):
        TokenStore.open(text_store).examples("train", "text", [0])


def test_exchanged_vocabulary_is_refused(text_store: str) -> None:
    shutil.rmtree(pathlib.Path(text_store) / "vocabulary")
    CharacterVocabulary("abc").save(pathlib.Path(text_store) / "vocabulary")
    store = TokenStore.open(text_store)
    with pytest.raises(UserError, match=r"was made with vocabulary .* but its folder vocabulary/ now holds"):
        _ = store.vocabulary


def test_unknown_names_are_answered_with_the_known(text_store: str, tmp_path: pathlib.Path) -> None:
    store = TokenStore.open(text_store)
    with pytest.raises(UserError, match="no split 'test', only 'train', 'validation'"):
        store.num_examples("test")
    with pytest.raises(UserError, match="no feature 'inputs', only 'text'"):
        store.lengths("train", "inputs")
    with pytest.raises(UserError, match="holds no token store"):
        TokenStore.open(tmp_path / "nothing")


@pytest.mark.parametrize("token", [384, -1])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: pathlib.Path, token: int) -> None:
    writer = TokenStoreWriter(tmp_path / "s", ["text"], ByteVocabulary())
    with pytest.raises(
        ValueError, match=rf"Example 0 of split 'train'.* token id {token}; the vocabulary has 384"
    ):
        writer.add("train", {"text": [5, token]})


def test_batches_of_examples_are_checked(tmp_path: pathlib.Path) -> None:
    writer = TokenStoreWriter(tmp_path / "s", ["text"], ByteVocabulary())
    writer.add("train", {"text": [4]})
    with pytest.raises(ValueError, match="Example 3 of split 'train', feature 'text' has token id 900"):
        writer.add_many("train", {"text": np.array([5, 6, 7, 900, 8])}, {"text": np.array([2, 0, 3])})
    with pytest.raises(
        ValueError, match=r"2 lengths of 4 tokens in all were given with 5 tokens of 2 examples"
    ):
        writer.add_many("train", {"text": np.array([5, 6, 7, 9, 8])}, {"text": np.array([2, 2])})


def test_document_keys_and_curriculum_are_for_every_example(tmp_path: pathlib.Path) -> None:
    tokens = {"text": np.array([5, 6])}, {"text": np.array([1, 1])}
    with TokenStoreWriter(tmp_path / "s", ["text"], ByteVocabulary()) as writer:
        writer.add_many("train", *tokens, document_keys(["a", "b"]))
        writer.add_many("train", *tokens, document_keys(["a", "\udc00"]))
        writer.set_curriculum("train", np.array([3, 1, 0, 2]))
    store = TokenStore.open(tmp_path / "s", verify=True)
    keys, curriculum = store.document_keys("train"), store.curriculum("train")
    assert keys is not None
    assert keys[0] == keys[2] != keys[1] != keys[3]
    assert curriculum is not None
    assert curriculum.tolist() == [3, 1, 0, 2]
    # Of what a batch is made of, the documents' names are no part; their order is.
    prints = {}
    for name, ids, order in (("plain", None, None), ("keys", "ab", None), ("order", "ab", [1, 0])):
        with TokenStoreWriter(tmp_path / name, ["text"], ByteVocabulary()) as writer:
            writer.add_many("train", *tokens, None if ids is None else document_keys(ids))
            if order:
                writer.set_curriculum("train", np.array(order))
        prints[name] = TokenStore.open(tmp_path / name).fingerprint
    assert prints["plain"] == prints["keys"] != prints["order"]
    assert TokenStore.open(tmp_path / "plain").document_keys("train") is None
    for change in ("keys", "order"):
        writer = TokenStoreWriter(tmp_path / f"bad {change}", ["text"], ByteVocabulary())
        writer.add_many("train", *tokens, document_keys("ab") if change == "keys" else None)
        writer.add_many("train", *tokens)
        if change == "order":
            writer.set_curriculum("train", np.arange(2))
        with pytest.raises(ValueError, match=r"has 4 examples, but 2 (document-keys|curriculum-order)\."):
            writer.close()


def test_a_store_made_anew_in_the_same_place_is_read_anew(tmp_path: pathlib.Path) -> None:
    def make(name: str) -> TokenStore:
        (tmp_path / "s" / "store.json").unlink(missing_ok=True)
        with TokenStoreWriter(tmp_path / "s", ["text"], ByteVocabulary()) as writer:
            writer.add_many("train", {"text": np.array([5])}, {"text": np.array([1])}, document_keys([name]))
        return TokenStore.open(tmp_path / "s")

    first = make("a")
    assert first.document_keys("train") is not None
    second = make("b")
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.document_keys("train"), document_keys(["b"]))
