"""The last pass: what is left of the documents is dealt out to the splits' shards, in any process.

A shard is a run of documents of some `shard_bytes` of text, in their order; what of it belongs to a split is
one file of that split. Of shard k the folder holds `<split>/documents-k.parquet`, and when it is done
`k.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus.document import (
    Document,
    DocumentWriter,
    atomic_open,
    count_documents,
    numbers,
    save_array,
)
from t5style.corpus.engines import Engine
from t5style.corpus.operators import Segment
from t5style.corpus.passes import EXAMPLES, example, survivors
from t5style.corpus.sampling import Curriculum, Sampling, count_words
from t5style.corpus.split import Split
from t5style.corpus.stages import Drop
from t5style.corpus.tally import Measured, Row
from t5style.run_dir import atomic_write

TABLES = ("splits", "sources", "licenses", "languages")


@dataclasses.dataclass(frozen=True)
class Shard:
    """What a process needs to write one shard.

    Attributes:
      work: the working folder.
      number: the last pass.
      segment: what it ended in.
      index: of the shard.
      chunks: (chunk, documents of it before the shard's first, documents of it in the shard), counting those
        that are kept.
      start: characters of all kept documents before the shard.
      total: characters of all kept documents.
      split: fitted to the corpus.
      weights: of the training documents by (source, language); None writes each once.
      frequencies: file of the share of each bucket of words, for the curriculum that needs it.
    """

    work: str
    number: int
    segment: Segment
    index: int
    chunks: Sequence[tuple[int, int, int]]
    start: int
    total: int
    split: Split
    sampling: Sampling | None = None
    weights: Mapping[tuple[str, str], float] | None = None
    curriculum: Curriculum | None = None
    frequencies: str = ""

    @property
    def out(self) -> epath.Path:
        return epath.Path(self.work) / "out"

    @property
    def record(self) -> epath.Path:
        return self.out / f"{self.index:05d}.json"

    def documents(self) -> Iterator[Document]:
        for chunk, skipped, count in self.chunks:
            rest = survivors(self.work, self.number, chunk, self.segment, skipped)
            yield from (document for _, document in itertools.islice(rest, count))


def cut(
    sizes: np.ndarray, keep: np.ndarray, borders: np.ndarray, shard_bytes: int
) -> list[tuple[list[tuple[int, int, int]], int]]:
    """Cuts the kept documents into shards.

    Args:
      sizes: bytes of each document.
      keep: which are kept.
      borders: where each chunk's documents begin, and the last one's end.
      shard_bytes: a shard ends with the document that reaches this many bytes.

    Returns:
      For each shard its pieces (see `Shard.chunks`), and how many kept documents come before it.
    """
    kept = np.flatnonzero(keep)
    ends = np.cumsum(sizes[kept])
    per_chunk = np.searchsorted(kept, borders)  # how many kept documents come before each chunk
    shards: list[tuple[list[tuple[int, int, int]], int]] = []
    first = 0
    while first < len(kept):
        before = int(ends[first - 1]) if first else 0
        last = min(int(np.searchsorted(ends, before + shard_bytes)) + 1, len(kept))
        pieces = []
        chunk = int(np.searchsorted(per_chunk, first, side="right")) - 1
        position = first
        while position < last:
            stop = min(last, int(per_chunk[chunk + 1]))
            if stop > position:
                pieces.append((chunk, position - int(per_chunk[chunk]), stop - position))
            position, chunk = stop, chunk + 1
        shards.append((pieces, first))
        first = last
    return shards


def write(shards: Sequence[Shard], engine: Engine, documents: int) -> list[dict[str, Any]]:
    """Writes those shards that are not written yet; what each counted."""
    waiting = [shard for shard in shards if not shard.record.exists()]
    left = sum(count for shard in waiting for _, _, count in shard.chunks)
    with console.progress("writing", documents, start=documents - left) as progress:
        for index, _ in engine.each(_write, waiting):
            progress.advance(sum(count for _, _, count in waiting[index].chunks))
    return [json.loads(shard.record.read_text()) for shard in shards]


def word_frequencies(shards: Sequence[Shard], engine: Engine) -> np.ndarray:
    """The share of each bucket of words in the corpus, with one added to each count (float64)."""
    counts: Any = 1
    with console.progress("counting words", len(shards)) as progress:
        for _, more in engine.each(_count, shards):
            counts = counts + more
            progress.advance()
    return counts / counts.sum()


def _count(shard: Shard) -> np.ndarray:
    return count_words(document.text for document in shard.documents())


def _write(shard: Shard) -> None:
    tables: dict[str, dict[str, dict[str, int]]] = {name: {} for name in TABLES}
    pii: dict[str, dict[str, int]] = {}
    row, measured = Row("Sampling"), Measured(ngrams=True)
    difficulties: list[float] = []
    frequencies = np.load(epath.Path(shard.frequencies)) if shard.frequencies else None
    start, cut_in_two, copied = shard.start, 0, 0
    with contextlib.ExitStack() as stack:
        writers: dict[str, DocumentWriter] = {}
        dropped = stack.enter_context(atomic_open(shard.out / f"{shard.index:05d}.dropped"))
        for document in shard.documents():
            pieces = shard.split.route(document, start, shard.total)
            start += len(document.text)
            cut_in_two += len(pieces) - 1
            measured.add(document)
            for name, piece in pieces:
                copies = 1
                if name == "train" and shard.sampling is not None and shard.weights is not None:
                    copies = shard.sampling.copies(piece, shard.weights[(piece.source, piece.language)])
                    if not copies:
                        if row.drop("left out by sampling") <= EXAMPLES:
                            dropped.write(example(row.name, piece, Drop("left out by sampling")))
                        continue
                    copied += copies - 1
                if name not in writers:
                    path = shard.out / name / f"documents-{shard.index:05d}.parquet"
                    writers[name] = stack.enter_context(DocumentWriter(path))
                for copy in range(copies):
                    written = (
                        piece if copy == 0 else dataclasses.replace(piece, id=f"{piece.id}#copy{copy + 1}")
                    )
                    writers[name].write(written)
                    count_in(tables, pii, name, written)
                    if shard.curriculum is not None and name == "train":
                        difficulties.append(shard.curriculum.difficulty(written, frequencies))
    if shard.curriculum is not None:
        save_array(shard.out / f"{shard.index:05d}.npy", np.array(difficulties, np.float64))
    record = {
        "tables": tables,
        "pii": pii,
        "row": dataclasses.asdict(row),
        "measured": measured.to_json(),
        "cut_in_two": cut_in_two,
        "copies": copied,
    }
    atomic_write(shard.record, json.dumps(record))


def count_in(tables: Any, pii: Any, split: str, document: Document) -> None:
    """Counts a document into the tables of the data card, and its personal data by kind."""
    size = len(document.text.encode())
    keys = (split, document.source, document.license, document.language)
    for table, key in zip(tables.values(), keys, strict=True):
        row = table.setdefault(key or "unknown", {"documents": 0, "characters": 0, "bytes": 0})
        row["documents"] += 1
        row["characters"] += len(document.text)
        row["bytes"] += size
    for kind, n in numbers(document, "pii").items():
        found = pii.setdefault(kind, {"found": 0, "documents": 0})
        found["found"] += int(n)
        found["documents"] += 1


def add_up(total: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Adds nested counts to nested counts."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            add_up(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value
    return total


def finish(out: epath.Path, splits: Sequence[str]) -> dict[str, int]:
    """Gives the shards their last names.

    Returns:
      How many documents there are in each split, counted again from the files.
    """
    for name in splits:
        for left in (out / name).glob(".*"):  # by a killed process
            left.unlink()
        files = sorted((out / name).glob("documents-*.parquet"))
        for index, path in enumerate(files):
            target = path.parent / f"documents-{index:05d}-of-{len(files):05d}.parquet"
            if path != target:
                path.rename(target)
    return {name: count_documents(out / name) for name in splits}


def move(out: epath.Path, target: epath.Path, splits: Sequence[str]) -> None:
    """Replaces the splits of an earlier corpus by the new ones. What has been moved already is left alone."""
    for folder in target.iterdir():
        if folder.name not in splits and any(folder.glob("documents-*-of-*.parquet")):
            folder.rmtree()
    for name in splits:
        if (out / name).exists():
            if (target / name).exists():
                (target / name).rmtree()
            (out / name).rename(target / name)


def save_order(shards: Sequence[Shard], folder: epath.Path) -> None:
    """Writes the curriculum of the training documents beside their shards."""
    curriculum = shards[0].curriculum
    assert curriculum is not None
    parts = [np.load(shard.out / f"{shard.index:05d}.npy") for shard in shards]
    difficulty = np.concatenate(parts)
    order = np.argsort(-difficulty if curriculum.hardest_first else difficulty, kind="stable").astype(
        np.int64
    )
    save_array(folder / "difficulty.npy", difficulty)
    save_array(folder / "order.npy", order)
