"""Tokens on disk, readable at random from a local folder or from a bucket.

A store is a folder:

    store.json                    counts, checksums, fingerprints; written last: without it there is no store
    vocabulary/                   the vocabulary that made the tokens
    <split>/<feature>/tokens/     every example's tokens, one after the other: zarr3, sharded, uint16 or int32
    <split>/<feature>/offsets/    int64 [examples + 1]: example i is tokens[offsets[i]:offsets[i + 1]]
    <split>/document-keys/        uint64 [examples]: a hash of the id of the document that each comes from
    <split>/curriculum-order/     int64 [examples]: the examples from easy to hard

The last two are there where the maker of the store knew them. When examples are erased (erasure.py) a split
moves to the folder `<split>@1/`, `<split>@2/`, ...; the manifest says which one holds.

Shards hold 2²² tokens in inner chunks of 2¹³ tokens, each with its own CRC-32C that is checked whenever the
chunk is read. Arrays of up to `RESIDENT_BYTES` are read once and kept in memory (a copy from memory is more
than ten times faster than a chunk read); larger ones are read in batches of asynchronous reads.
"""

from __future__ import annotations

import array
import functools
import hashlib
import json
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import tensorstore as ts

from t5style.corpus import vocabulary as vocabulary_lib
from t5style.data.store_manifest import (
    CURRICULUM,
    DOCUMENT_KEYS,
    MANIFEST,
    delete_folder,
    file_facts,
    identity,
    write_manifest,
)
from t5style.run_dir import UserError

FORMAT = 1
SHARD_TOKENS = 1 << 22
CHUNK_TOKENS = 1 << 13
RESIDENT_BYTES = 1 << 28
_CACHE_BYTES = 1 << 26
_FIX = "restore the file from a copy, or run the tokenize job again"
_T = TypeVar("_T")


def kvstore(folder: str) -> dict[str, Any]:
    """TensorStore's key-value specification of a folder: `gs://bucket/path`, or a local path."""
    if folder.startswith("gs://"):
        bucket, _, path = folder.removeprefix("gs://").partition("/")
        return {"driver": "gcs", "bucket": bucket, "path": path.rstrip("/") + "/"}
    return {"driver": "file", "path": os.path.abspath(folder).rstrip("/") + "/"}


def _array_spec(folder: str, name: str, dtype: str, size: int) -> dict[str, Any]:
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "name": "sharding_indexed",
        "configuration": {"chunk_shape": [CHUNK_TOKENS], "codecs": inner, "index_codecs": inner},
    }
    return {
        "driver": "zarr3",
        "kvstore": array_kvstore(folder, name),
        "metadata": {
            "shape": [size],
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_TOKENS]}},
            "codecs": [sharding],
        },
    }


def array_kvstore(folder: str, name: str) -> dict[str, Any]:
    spec = kvstore(folder)
    return {**spec, "path": f"{spec['path']}{name}/"}


_opened: weakref.WeakValueDictionary[tuple[str, str], TokenStore] = weakref.WeakValueDictionary()
_opened_lock = threading.Lock()


@functools.cache
def _context() -> ts.Context:
    return ts.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})


class TokenStore:
    """A finished store, opened for reading. Thread-safe; keep one per process and folder."""

    def __init__(self, folder: str, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._arrays: dict[str, ts.TensorStore] = {}
        self._resident: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = False) -> TokenStore:
        """Opens the store in `folder` and checks that every file is there with the size that was written;
        with `verify`, also that every file's content has the SHA-256 that was written (reads all of it).

        Raises UserError where there is no finished store, or a file is missing, cut short or changed.
        """
        folder = os.fspath(folder)
        try:
            files = ts.KvStore.open(kvstore(folder)).result()
            found = files.read(MANIFEST).result()
        except (ValueError, OSError) as error:
            raise UserError(f"Token store {folder} cannot be read: {error}") from error
        if found.state != "value":
            raise UserError(
                f"{folder} holds no token store: {MANIFEST} is missing (a store that was not finished has "
                f"none); "
                "run the tokenize job into it."
            )
        try:
            manifest = json.loads(found.value)
            version = manifest.get("format")
        except (ValueError, AttributeError) as error:
            raise UserError(f"Token store {folder}: {MANIFEST} is damaged ({error}); {_FIX}.") from error
        if version != FORMAT:
            raise UserError(
                f"Token store {folder} has format {version}, this version reads {FORMAT}: tokenize again."
            )
        store = cls(folder, manifest)
        store._check_files(contents=verify)
        # A run opens the same store for training, evaluation and its preflight: one copy in memory serves
        # them all.
        with _opened_lock:
            key = (os.path.abspath(folder), hashlib.sha256(found.value).hexdigest())
            return _opened.setdefault(key, store)

    def _check_files(self, contents: bool) -> None:
        files = ts.KvStore.open(kvstore(self.folder)).result()
        if self.folder.startswith("gs://") and not contents:
            return  # one request per file would cost more than the check is worth: reads have their own CRC
        for name, expected in self.manifest["files"].items():
            where = f"Token store {self.folder}: {name}"
            if not contents:
                path = os.path.join(self.folder, name)
                size = os.path.getsize(path) if os.path.exists(path) else None
            else:
                found = files.read(name).result()
                size = len(found.value) if found.state == "value" else None
            if size is None:
                raise UserError(f"{where} is missing; {_FIX}.")
            if size != expected["bytes"]:
                raise UserError(f"{where} has {size} bytes, expected {expected['bytes']}; {_FIX}.")
            if contents and (digest := hashlib.sha256(found.value).hexdigest()) != expected["sha256"]:
                raise UserError(f"{where} has checksum {digest}, expected {expected['sha256']}; {_FIX}.")

    @property
    def fingerprint(self) -> str:
        """16 hex digits that depend on every token, the splits, the features and the vocabulary."""
        return str(self.manifest["fingerprint"])

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["splits"])

    @property
    def features(self) -> tuple[str, ...]:
        return tuple(self.manifest["features"])

    @property
    def vocabulary_fingerprint(self) -> str:
        return str(self.manifest["vocabulary"]["fingerprint"])

    @functools.cached_property
    def vocabulary(self) -> vocabulary_lib.Vocabulary:
        """The vocabulary that made the tokens. Raises UserError when its files were exchanged since."""
        loaded = vocabulary_lib.load(os.path.join(self.folder, "vocabulary"))
        if loaded.fingerprint != self.vocabulary_fingerprint:
            raise UserError(
                f"Token store {self.folder} was made with vocabulary {self.vocabulary_fingerprint}, but "
                f"its folder "
                f"vocabulary/ now holds {loaded.fingerprint}; tokenize again."
            )
        return loaded

    def _counts(self, split: str, feature: str | None = None) -> Mapping[str, Any]:
        if split not in self.manifest["splits"]:
            raise UserError(
                f"Token store {self.folder} has no split {split!r}, only "
                f"{', '.join(map(repr, self.splits)) or 'none'}."
            )
        counts = self.manifest["splits"][split]
        if feature is None:
            return counts
        if feature not in counts["features"]:
            raise UserError(
                f"Token store {self.folder} has no feature {feature!r}, only "
                f"{', '.join(map(repr, self.features))}: "
                "choose the objective that fits, or tokenize with that feature."
            )
        return counts["features"][feature]

    def place(self, split: str) -> str:
        """The split's folder inside the store."""
        return str(self._counts(split).get("folder", split))

    def num_examples(self, split: str) -> int:
        return int(self._counts(split)["examples"])

    def num_tokens(self, split: str, feature: str) -> int:
        return int(self._counts(split, feature)["tokens"])

    def _array(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            spec: dict[str, Any] = {"driver": "zarr3", "kvstore": array_kvstore(self.folder, name)}
            # The files never change once the store is finished: what this process cached since the store was
            # opened needs no second look, only what it may have of an earlier store in this place.
            spec |= {"recheck_cached_data": "open", "recheck_cached_metadata": "open"}
            self._arrays[name] = ts.open(spec, open=True, read=True, context=_context()).result()
        return self._arrays[name]

    def _whole(self, name: str) -> np.ndarray:
        with self._lock:
            if name not in self._resident:
                self._resident[name] = np.asarray(self._array(name).read().result())
            return self._resident[name]

    def offsets(self, split: str, feature: str) -> np.ndarray:
        """int64 [examples + 1], in tokens."""
        self._counts(split, feature)
        name = f"{self.place(split)}/{feature}/offsets"
        return self._read(lambda: self._whole(name), name)

    def document_keys(self, split: str) -> np.ndarray | None:
        """The `document_keys` of the documents that the examples come from: uint64 [examples]; None where
        the store does not know them.
        """
        return self._extra(split, DOCUMENT_KEYS)

    def curriculum(self, split: str) -> np.ndarray | None:
        """The examples' indices from easy to hard: int64 [examples]; None where the corpus had no order."""
        return self._extra(split, CURRICULUM)

    def _extra(self, split: str, kind: str) -> np.ndarray | None:
        if kind not in self._counts(split).get("extras", ()):
            return None
        name = f"{self.place(split)}/{kind}"
        return self._read(lambda: self._whole(name), name)

    def lengths(self, split: str, feature: str) -> np.ndarray:
        """Tokens of each example: int64 [examples]."""
        return np.diff(self.offsets(split, feature))

    def read(self, split: str, feature: str, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens of many ranges, one after the other.

        Args:
          starts: int [n], in tokens from the split's beginning.
          lengths: int [n].

        Returns: int32 [sum(lengths)].
        Raises: UserError where a chunk's checksum fails.
        """
        name = f"{self.place(split)}/{feature}/tokens"
        total = self.num_tokens(split, feature)
        if not len(starts):
            return np.zeros(0, np.int32)
        stored = self._read(lambda: self._array(name), name)
        if total * stored.dtype.numpy_dtype.itemsize <= RESIDENT_BYTES:
            whole = self._read(lambda: self._whole(name), name)
            pieces = [whole[a : a + n] for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)]
        else:

            def read_all() -> list[np.ndarray]:
                with ts.Batch() as batch:
                    pending = [
                        stored[a : a + n].read(batch=batch)
                        for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)
                    ]
                return [future.result() for future in pending]

            pieces = self._read(read_all, name)
        return np.concatenate(pieces).astype(np.int32)

    def _read(self, read: Callable[[], _T], name: str) -> _T:
        try:
            return read()
        except ValueError as error:
            raise UserError(f"Token store {self.folder}: {name} cannot be read ({error}); {_FIX}.") from error

    def examples(self, split: str, feature: str, indices: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """The tokens of whole examples: a list of int32 arrays."""
        indices = np.asarray(indices, np.int64)
        offsets = self.offsets(split, feature)
        lengths = offsets[indices + 1] - offsets[indices]
        flat = self.read(split, feature, offsets[indices], lengths)
        return np.split(flat, np.cumsum(lengths)[:-1])[: len(indices)]


def write_array(folder: str, name: str, values: np.ndarray) -> None:
    """Writes a whole array into the store in `folder`."""
    spec = _array_spec(folder, name, str(values.dtype), len(values))
    ts.open(spec, create=True, delete_existing=True).result().write(values).result()


class FeatureWriter:
    """Appends one feature of one split, a shard at a time."""

    def __init__(self, folder: str, name: str, dtype: str) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.tokens: ts.TensorStore | None = None
        self.written = self.buffered = 0
        self.pieces: list[np.ndarray] = []
        self.ends = array.array("q")  # 8 bytes for each example, where a list of ints takes 36

    def add(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self.pieces.append(tokens.astype(self.dtype))
        self.ends.frombytes((self.written + self.buffered + np.cumsum(lengths, dtype=np.int64)).tobytes())
        self.buffered += len(tokens)
        if self.buffered >= SHARD_TOKENS:
            self._flush(whole_shards=True)

    def _flush(self, whole_shards: bool) -> None:
        flat = np.concatenate(self.pieces) if self.pieces else np.zeros(0, self.dtype)
        # Only whole shards are written before the end: a shard that is written twice is read and copied
        # again.
        count = len(flat) // SHARD_TOKENS * SHARD_TOKENS if whole_shards else len(flat)
        if self.tokens is None:
            spec = _array_spec(self.folder, f"{self.name}/tokens", self.dtype, count)
            self.tokens = ts.open(spec, create=True, delete_existing=True).result()
        else:
            self.tokens = self.tokens.resize(exclusive_max=[self.written + count]).result()
        if count:
            self.tokens[self.written : self.written + count].write(flat[:count]).result()
        self.written += count
        self.buffered = len(flat) - count
        self.pieces = [flat[count:]]

    def finish(self) -> dict[str, int]:
        self._flush(whole_shards=False)
        offsets = np.concatenate([np.zeros(1, np.int64), np.frombuffer(self.ends, np.int64)])
        write_array(self.folder, f"{self.name}/offsets", offsets)
        return {"tokens": self.written}


class TokenStoreWriter:
    """Writes a store; use it as a context manager. `store.json` is written last, when everything else is on
    disk: a writer that is interrupted leaves no store, and one that fails removes what it wrote.

    Raises FileExistsError where the folder already holds a store.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        features: Sequence[str],
        vocabulary: vocabulary_lib.Vocabulary,
        description: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = os.fspath(folder)
        self.features = tuple(features)
        self.vocabulary = vocabulary
        self.description = dict(description or {})
        # Ids of extra sentinels count: the largest id is vocab_size - 1.
        self._dtype = "uint16" if vocabulary.vocab_size <= 1 << 16 else "int32"
        self._writers: dict[str, dict[str, FeatureWriter]] = {}
        self._examples: dict[str, int] = {}
        self._keys: dict[str, array.array[int]] = {}
        self._curricula: dict[str, np.ndarray] = {}
        self.manifest: dict[str, Any] = {}
        self._files = ts.KvStore.open(kvstore(self.folder)).result()
        if self._files.read(MANIFEST).result().state == "value":
            raise FileExistsError(
                f"{self.folder} already holds a token store; delete it or choose another folder."
            )
        # What an earlier store kept here after an erasure.
        names = {key.decode().split("/")[0] for key in self._files.list().result()}
        for name in sorted(names):
            if "@" in name:
                delete_folder(self._files, self.folder, name)

    def add_split(self, split: str) -> None:
        """Declares a split, so that it exists even when nothing is added to it."""
        if not split or "/" in split or "@" in split or split in ("vocabulary", MANIFEST):
            raise ValueError(f"A split cannot be named {split!r}; rename it.")
        if split not in self._writers:
            delete_folder(self._files, self.folder, split)
            self._writers[split] = {
                feature: FeatureWriter(self.folder, f"{split}/{feature}", self._dtype)
                for feature in self.features
            }
            self._examples[split] = 0
            self._keys[split] = array.array("Q")

    def add(self, split: str, tokens: Mapping[str, np.ndarray | Sequence[int]]) -> None:
        """Adds one example: for each feature its token ids [length]."""
        ids = {feature: np.asarray(tokens[feature], np.int64) for feature in self.features}
        self.add_many(split, ids, {f: np.array([len(values)]) for f, values in ids.items()})

    def add_many(
        self,
        split: str,
        tokens: Mapping[str, np.ndarray],
        lengths: Mapping[str, np.ndarray],
        keys: np.ndarray | None = None,
    ) -> None:
        """Adds examples: for each feature all their token ids, one example after the other, and the examples'
        lengths (int [examples]); and, in all calls or none, the `document_keys` of the documents that they
        come from (uint64 [examples]).

        Raises ValueError for ids that the vocabulary does not have.
        """
        self.add_split(split)
        count = len(lengths[self.features[0]])
        for feature in self.features:
            ids = tokens[feature]
            if len(ids) and (ids.min() < 0 or ids.max() >= self.vocabulary.vocab_size):
                place = int(np.flatnonzero((ids < 0) | (ids >= self.vocabulary.vocab_size))[0])
                example = self._examples[split] + int(
                    np.searchsorted(np.cumsum(lengths[feature]), place, "right")
                )
                raise ValueError(
                    f"Example {example} of split {split!r}, feature {feature!r} has token id "
                    f"{int(ids[place])}; "
                    f"the vocabulary has {self.vocabulary.vocab_size}."
                )
            if len(lengths[feature]) != count or lengths[feature].sum() != len(ids):
                raise ValueError(
                    f"Split {split!r}, feature {feature!r}: {len(lengths[feature])} lengths of "
                    f"{lengths[feature].sum()} tokens in all were given with {len(ids)} tokens of {count} "
                    f"examples."
                )
            self._writers[split][feature].add(ids, lengths[feature])
        self._examples[split] += count
        if keys is not None:
            self._keys[split].frombytes(keys.astype(np.uint64).tobytes())

    def set_curriculum(self, split: str, order: np.ndarray) -> None:
        """Records the split's examples from easy to hard: int64 [examples], each once."""
        self._curricula[split] = np.asarray(order, np.int64)

    def _write_extras(self, split: str) -> list[str]:
        examples = self._examples[split]
        extras = {}
        if self._keys[split]:
            extras[DOCUMENT_KEYS] = np.frombuffer(self._keys[split], np.uint64)
        if split in self._curricula:
            extras[CURRICULUM] = self._curricula[split]
        for kind, values in extras.items():
            if len(values) != examples:
                raise ValueError(f"Split {split!r} has {examples} examples, but {len(values)} {kind}.")
            write_array(self.folder, f"{split}/{kind}", values)
        return sorted(extras)

    def close(self) -> None:
        """Finishes the store; `manifest` is what `store.json` then holds."""
        splits: dict[str, Any] = {}
        for split, writers in self._writers.items():
            features = {feature: writer.finish() for feature, writer in writers.items()}
            splits[split] = {"examples": self._examples[split], "features": features}
            if extras := self._write_extras(split):
                splits[split]["extras"] = extras
        self.vocabulary.save(os.path.join(self.folder, "vocabulary"))
        manifest = {
            "format": FORMAT,
            "features": list(self.features),
            "dtype": self._dtype,
            "vocabulary": {
                "fingerprint": self.vocabulary.fingerprint,
                "vocab_size": self.vocabulary.vocab_size,
            },
            "splits": splits,
            "files": file_facts(self._files, self._writers),
        }
        manifest["fingerprint"] = identity(manifest)
        manifest["description"] = self.description
        write_manifest(self._files, manifest)
        self.manifest = manifest

    def abort(self) -> None:
        """Removes what was written so far."""
        for split in self._writers:
            delete_folder(self._files, self.folder, split)

    def __enter__(self) -> TokenStoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()
