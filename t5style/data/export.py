"""The job that hands a corpus or a token store on to other input pipelines: as ArrayRecord files.

ArrayRecord is the file format of random access that grain, and with it MaxText, reads. A record is a
serialised ``tf.train.Example``, as TFDS and MaxText expect; it is made and read here without TensorFlow:

    files = sorted(glob.glob("exported/train/*.array_record"))
    source = grain.sources.ArrayRecordDataSource(files)
    dataset = grain.MapDataset.source(source).shuffle(seed=0).map(export.parse_example)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus.document import COLUMNS, count_documents, read_documents
from t5style.data.token_store import TokenStore
from t5style.data.tokenize import split_folders
from t5style.run_dir import RunDir, UserError, atomic_write, is_local

CARD = "array_record.json"
_WORK = ".exporting"
_BATCH = 256  # examples of a store read at once

Fields = Mapping[str, str | np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExportArrayRecord:
    """Writes ``<split>/<documents or examples>-00000-of-00002.array_record`` … and array_record.json.

    Attributes:
      corpus: a prepared corpus, or one folder or file of documents. A record has a document's fields as
        strings (``meta`` as JSON), empty ones too.
      store: or a token store. A record has the token ids of each feature as integers.
      features: which of the document's fields or the store's features; None for all.
      splits: which splits; None for all.
      shard_bytes: of records after which a new file is begun.
    """

    corpus: str = ""
    store: str = ""
    features: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    shard_bytes: int = 256 << 20

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if bool(self.corpus) == bool(self.store):
            raise UserError(
                f"Name either a corpus or a store to export, not corpus={self.corpus!r} and "
                f"store={self.store!r}."
            )
        if isinstance(self.features, str) or isinstance(self.splits, str):
            raise UserError("features and splits must be lists of names, or None for all.")
        if self.features is not None and not self.features:
            raise UserError("features is empty; name at least one, or None for all.")
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes is {self.shard_bytes}; it must be at least 1.")
        if self.corpus:
            self._check_features(COLUMNS)

    def _check_features(self, known: Sequence[str]) -> Sequence[str]:
        for feature in self.features or ():
            if feature not in known:
                raise UserError(f"There is no feature {feature!r} to export, only {', '.join(known)}.")
        return self.features or known

    def inputs(self) -> Sequence[str]:
        return [self.corpus or self.store]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Exports into ``run.path``.

        Returns: records, bytes and files of each split; the fingerprint of the records.

        Raises:
          UserError: there is no corpus or store, no such split or feature, or the run folder is not local.
          RuntimeError: not all records arrived on the disk.
        """
        if not is_local(run.path):
            raise UserError(f"ArrayRecord files can be written to local folders only, not to {run.path}.")
        work = epath.Path(run.path) / _WORK
        if work.exists():
            work.rmtree()
        splits: dict[str, Any] = {}
        kind, sources = self._sources()
        for split, count, records in sources:
            with (
                console.progress(f"export {split}", count, unit=kind) as bar,
                _Shards(work / split, kind, self.shard_bytes) as shards,
            ):
                for fields in records:
                    shards.write(serialize_example(fields))
                    bar.advance()
            if shards.records != count:
                raise RuntimeError(f"split {split!r} has {count} {kind}, but {shards.records} were read")
            splits[split] = {"records": count, "sha256": shards.digest.hexdigest(), "files": shards.finish()}
        for split in splits:
            target = epath.Path(run.path) / split
            if target.exists():
                target.rmtree()
            (work / split).rename(target)
        work.rmtree()
        contents = json.dumps({split: facts["sha256"] for split, facts in splits.items()}, sort_keys=True)
        fingerprint = hashlib.sha256(contents.encode()).hexdigest()[:16]
        card = {
            "record": "tf.train.Example",
            "kind": kind,
            "source": self.corpus or self.store,
            "splits": splits,
            "fingerprint": fingerprint,
        }
        atomic_write(epath.Path(run.path) / CARD, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
        figures = {
            split: {
                "records": facts["records"],
                "files": len(facts["files"]),
                "bytes": sum(file["bytes"] for file in facts["files"].values()),
            }
            for split, facts in splits.items()
        }
        rows = [(split, *numbers.values()) for split, numbers in figures.items()]
        console.table(f"ArrayRecord files in {run.path}", ("split", kind, "files", "bytes"), rows)
        return {"splits": figures, "fingerprint": fingerprint}

    def _sources(self) -> tuple[str, list[tuple[str, int, Iterator[Fields]]]]:
        """What is exported, and of each split its name, its size and its records."""
        if self.store:
            store = TokenStore.open(self.store)
            features = self._check_features(store.features)
            names = list(self.splits or store.splits)
            return "examples", [
                (split, store.num_examples(split), _examples(store, split, features)) for split in names
            ]
        folders = split_folders(self.corpus, self.splits)
        fields = self._check_features(COLUMNS)
        return "documents", [
            (split, _count(folder), _documents(folder, fields)) for split, folder in folders.items()
        ]


def _count(folder: epath.Path) -> int:
    try:
        return count_documents(folder)
    except (OSError, ValueError):  # JSON lines have no count in a footer
        return sum(1 for _ in read_documents(folder))


def _documents(folder: epath.Path, fields: Sequence[str]) -> Iterator[Fields]:
    for document in read_documents(folder):
        values = {name: getattr(document, name) for name in fields}
        if "meta" in values:
            values["meta"] = json.dumps(dict(document.meta), ensure_ascii=False)
        yield values


def _examples(store: TokenStore, split: str, features: Sequence[str]) -> Iterator[Fields]:
    count = store.num_examples(split)
    for start in range(0, count, _BATCH):
        chosen = np.arange(start, min(start + _BATCH, count))
        columns = [store.examples(split, feature, chosen) for feature in features]
        for row in zip(*columns, strict=True):
            yield dict(zip(features, row, strict=True))


class _Shards:
    """Writes records to files, a new one begun when one is full, and counts them."""

    def __init__(self, folder: epath.Path, kind: str, limit: int) -> None:
        folder.mkdir(parents=True)
        self.folder, self.kind, self.limit = folder, kind, limit
        self.digest = hashlib.sha256()
        self.counts: list[int] = []
        self.room = 0
        self.writer: Any = None

    @property
    def records(self) -> int:
        return sum(self.counts)

    def write(self, record: bytes) -> None:
        if self.writer is None or self.room <= 0:
            self._close()
            self._begin()
        self.writer.write(record)
        self.digest.update(len(record).to_bytes(8, "little") + record)
        self.counts[-1] += 1
        self.room -= len(record)

    def _begin(self) -> None:
        from array_record.python import array_record_module

        path = os.fspath(self.folder / f"{self.kind}-{len(self.counts):05d}")
        # One record in a group: each can be read without its neighbours.
        self.writer = array_record_module.ArrayRecordWriter(path, "group_size:1")
        self.counts.append(0)
        self.room = self.limit

    def _close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()

    def finish(self) -> dict[str, dict[str, Any]]:
        """Gives the files their last names; returns each one's records, bytes and SHA-256.

        Raises: RuntimeError where a file does not hold what was written to it.
        """
        from array_record.python import array_record_module

        files = {}
        for number, count in enumerate(self.counts):
            path = self.folder / f"{self.kind}-{number:05d}"
            reader = array_record_module.ArrayRecordReader(os.fspath(path))
            found = reader.num_records()
            reader.close()
            if found != count:
                raise RuntimeError(f"{path} holds {found} records, but {count} were written to it")
            name = f"{path.name}-of-{len(self.counts):05d}.array_record"
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"records": count, "bytes": path.stat().length, "sha256": sha256}
            path.rename(self.folder / name)
        return files

    def __enter__(self) -> _Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if not self.counts:
                self._begin()  # readers want a file, be it empty
            self._close()
        else:
            self.writer = None
            shutil.rmtree(self.folder, ignore_errors=True)


# ----------------------------------------------------------------------------------------- tf.train.Example


def serialize_example(fields: Fields) -> bytes:
    """A ``tf.train.Example`` of strings (as UTF-8) and integers [n]; the same fields give the same bytes."""
    example = _example_class()()
    for name, value in fields.items():
        feature = example.features.feature[name]
        if isinstance(value, str):
            feature.bytes_list.value.append(value.encode("utf-8", "replace"))
        else:
            # Set also where there are none: a feature without a list would be of no kind.
            feature.int64_list.SetInParent()
            feature.int64_list.value.extend(value.tolist())
    return bytes(example.SerializeToString(deterministic=True))


def parse_example(record: bytes) -> dict[str, str | np.ndarray]:
    """What `serialize_example` was given: strings, and int64 [n]."""
    example = _example_class().FromString(record)
    return {
        name: np.array(feature.int64_list.value, np.int64)
        if feature.HasField("int64_list")
        else b"".join(feature.bytes_list.value).decode()
        for name, feature in example.features.feature.items()
    }


@functools.cache
def _example_class() -> Any:
    """The message ``tensorflow.Example`` (tensorflow/core/example/example.proto and feature.proto)."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(parent: Any, name: str, *fields: tuple[str, int, int, str]) -> Any:
        made = parent.add(name=name)
        for number, (field, label, kind, type_name) in enumerate(fields, start=1):
            made.field.add(name=field, number=number, label=label, type=kind, type_name=type_name or None)
        return made

    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    top = file.message_type
    message(top, "BytesList", ("value", many, kinds.TYPE_BYTES, ""))
    message(top, "FloatList", ("value", many, kinds.TYPE_FLOAT, ""))
    message(top, "Int64List", ("value", many, kinds.TYPE_INT64, ""))
    lists = [("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")]
    parts = [(field, one, kinds.TYPE_MESSAGE, f".tensorflow.{kind}") for field, kind in lists]
    feature = message(top, "Feature", *parts)
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    entry_type = ".tensorflow.Features.FeatureEntry"
    features = message(top, "Features", ("feature", many, kinds.TYPE_MESSAGE, entry_type))
    entry = message(
        features.nested_type,
        "FeatureEntry",
        ("key", one, kinds.TYPE_STRING, ""),
        ("value", one, kinds.TYPE_MESSAGE, ".tensorflow.Feature"),
    )
    entry.options.map_entry = True
    message(top, "Example", ("features", one, kinds.TYPE_MESSAGE, ".tensorflow.Features"))
    # A pool of its own: TensorFlow, where it is loaded too, has the same names in the common one.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
