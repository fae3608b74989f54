"""Datasets of Hugging Face and TensorFlow Datasets, where their packages are installed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5style.corpus import records
from t5style.corpus.document import Document
from t5style.corpus.parts import Part, Quarantined
from t5style.run_dir import UserError

# Rows of a part, and what the part is taken to weigh where nobody knows how many bytes there are.
_ROWS = 100_000
_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class HuggingFace:
    """A dataset of the Hugging Face Hub, or one in a local folder; needs ``t5style[hf-datasets]``.

    Each row is a document (see `records.document`), named by its row where it has no id:
    ``c4/train:row7``, and ``c4/train/shard3:row7`` where it is streamed.

    Attributes:
      name: of the dataset, or a folder that ``save_to_disk`` has written.
      config: of the dataset, where it has several.
      split: such as "train" or "train[:1%]" (not when streaming).
      revision: commit, branch or tag; name a commit for documents that never change.
      text_field: column of the text.
      id_field: column of the id.
      source: name of the collection; empty for the dataset's.
      license: licence, for rows that do not name theirs.
      language: language, for rows that do not name theirs.
      streaming: read over the network as needed; else it is downloaded first.
    """

    name: str
    config: str = ""
    split: str = "train"
    revision: str = ""
    text_field: str = "text"
    id_field: str = "id"
    source: str = ""
    license: str = ""
    language: str = ""
    streaming: bool = False

    def __post_init__(self) -> None:
        _check(self, "HuggingFace")
        if self.streaming and "[" in self.split:
            raise UserError(f"HuggingFace.split {self.split!r}: slices cannot be streamed; streaming = False")

    def inputs(self) -> Sequence[str]:
        return [self.name] if os.path.isdir(self.name) else []

    def parts(self) -> list[Part]:
        if importlib.util.find_spec("datasets") is None:
            raise UserError(
                f"HuggingFace({self.name!r}) needs the package datasets: pip install 't5style[hf-datasets]'"
            )
        dataset = _hugging_face(self)
        path = f"hf-datasets:{'/'.join(filter(None, (self.name, self.config, self.split)))}"
        id = f"{self.source or self.name.rstrip('/').rpartition('/')[2]}/{self.split}"
        if self.streaming:
            count = dataset.num_shards
            return [Part(path, id, _BYTES, 0.0, self, shard, shard + 1) for shard in range(count)]
        return _by_rows(path, id, len(dataset), self, dataset.dataset_size or 0)

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        for part in self.parts():
            yield from part.read()

    def read_piece(self, path: str, id: str, start: int, end: int) -> Iterator[Document | Quarantined]:
        """Rows ``start`` to ``end`` - 1, or the shard of number ``start`` where it is streamed."""
        dataset = _hugging_face(self)
        features = dataset.features or {}
        # Pictures and sounds would be decoded only to be thrown away.
        media = [
            name
            for name, feature in features.items()
            if type(feature).__name__ in ("Image", "Audio", "Video")
        ]
        dataset = dataset.remove_columns(media) if media else dataset
        if self.streaming:
            if dataset.num_shards > 1:
                dataset = dataset.shard(dataset.num_shards, start)
            id, rows = f"{id}/shard{start}", enumerate(dataset)
        else:
            rows = enumerate(dataset.select(range(start, end)), start)
        fields = dataclasses.replace(self, source=id.partition("/")[0])
        for row, record in rows:
            yield _document(record, fields, path, id, row)


@functools.lru_cache(maxsize=4)
def _hugging_face(source: HuggingFace) -> Any:
    import datasets

    try:
        if os.path.isdir(source.name) and any(
            os.path.exists(os.path.join(source.name, file)) for file in ("state.json", "dataset_dict.json")
        ):
            dataset = datasets.load_from_disk(source.name)
            if isinstance(dataset, Mapping):
                if source.split not in dataset:
                    raise UserError(
                        f"{source.name} has no split {source.split!r}; it has {', '.join(dataset)}"
                    )
                dataset = dataset[source.split]
            return dataset.to_iterable_dataset() if source.streaming else dataset
        return datasets.load_dataset(
            source.name,
            source.config or None,
            split=source.split,
            revision=source.revision or None,
            streaming=source.streaming,
        )
    except (ValueError, OSError) as error:  # no such dataset, config or split; no network
        raise UserError(f"the dataset {source.name!r} cannot be loaded: {_first(error)}") from error


@dataclasses.dataclass(frozen=True)
class TensorFlowDatasets:
    """A dataset of TensorFlow Datasets that lies prepared on disk, read without TensorFlow where it is in
    ArrayRecord files; needs ``t5style[tfds]``.

    Each row is a document (see `records.document`), named by its row where it has no id:
    ``wiki40b/train:row7``.

    Attributes:
      name: such as "wiki40b/en:1.3.0".
      split: such as "train" or "train[:1%]".
      data_dir: where datasets lie; empty for TFDS's own place.
      text_field: feature of the text.
      id_field: feature of the id.
      source: name of the collection; empty for the dataset's.
      license: licence, for rows that do not name theirs.
      language: language, for rows that do not name theirs.
    """

    name: str
    split: str = "train"
    data_dir: str = ""
    text_field: str = "text"
    id_field: str = "id"
    source: str = ""
    license: str = ""
    language: str = ""

    def __post_init__(self) -> None:
        _check(self, "TensorFlowDatasets")

    def inputs(self) -> Sequence[str]:
        return []

    def parts(self) -> list[Part]:
        if importlib.util.find_spec("tensorflow_datasets") is None:
            raise UserError(
                f"TensorFlowDatasets({self.name!r}) needs tensorflow-datasets: pip install 't5style[tfds]'"
            )
        rows = _tfds(self)
        id = f"{self.source or self.name.partition('/')[0].partition(':')[0]}/{self.split}"
        return _by_rows(f"tfds:{self.name}/{self.split}", id, len(rows), self, 0)

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        yield from self.read_piece(path, id, 0, len(_tfds(self)))

    def read_piece(self, path: str, id: str, start: int, end: int) -> Iterator[Document | Quarantined]:
        """Rows ``start`` to ``end`` - 1."""
        rows = _tfds(self)
        fields = dataclasses.replace(self, source=id.partition("/")[0])
        for row in range(start, end):
            yield _document(rows[row], fields, path, id, row)


@functools.lru_cache(maxsize=4)
def _tfds(source: TensorFlowDatasets) -> Any:
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(source.name, **({"data_dir": source.data_dir} if source.data_dir else {}))
        return builder.as_data_source(split=source.split)
    except NotImplementedError as error:
        raise UserError(
            f"{source.name} lies in files that only TensorFlow reads: prepare it again with "
            "--file_format=array_record (tfds build), or convert it (tfds convert_format)"
        ) from error
    except Exception as error:  # TFDS has many kinds of its own for datasets, versions and splits it lacks
        raise UserError(f"the dataset {source.name!r} cannot be loaded: {_first(error)}") from error


def _check(source: Any, kind: str) -> None:
    for field in ("name", "split", "text_field"):
        if not getattr(source, field):
            raise UserError(f"{kind}.{field} is empty")


def _first(error: Exception) -> str:
    """The first line of an error's message: lists of all datasets there are may follow."""
    return str(error).partition("\n")[0]


def _by_rows(path: str, id: str, rows: int, reader: Any, size: int) -> list[Part]:
    if not rows:
        raise UserError(f"{path} has no rows")
    weight = size / rows if size else _BYTES / _ROWS
    return [
        Part(path, id, max(int((end - start) * weight), 1), 0.0, reader, start, end)
        for start in range(0, rows, _ROWS)
        for end in (min(start + _ROWS, rows),)
    ]


def _document(record: Mapping[str, Any], fields: Any, path: str, id: str, row: int) -> Document | Quarantined:
    place = f"row {row}"
    if fields.text_field not in record:
        detail = f"{fields.text_field!r} is none of {', '.join(record)}"
        return Quarantined(path, place, "no text", detail)
    values = {}
    for name, value in record.items():
        if isinstance(value, bytes):  # TFDS has all text as bytes
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                if name == fields.text_field:
                    return Quarantined(path, place, "not utf-8", f"byte {error.start}: {error.reason}")
        value = records.plain(value)
        if value is not None:
            values[name] = value
    return records.document(values, fields, path, f"{id}:row{row}", place)
