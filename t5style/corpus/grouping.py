"""Brings together what belongs together: from the keys of all chunks to what each chunk has to drop.

Memory: about 150 bytes for each document, whatever the operators (14 million documents in 2 GB). The keys
of lines and passages, of which there are many more, are sorted in pieces on disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus import dedup
from t5style.corpus.document import Document, read_documents, save_array
from t5style.corpus.engines import ENTRY, Engine
from t5style.corpus.operators import Deduplicator, ExactDuplicates, Remover, RepeatedSubstrings, Segment
from t5style.corpus.passes import chunk_file
from t5style.corpus.tally import Row

_PLACE_FIELDS = ["document", "unit"]
_PLACE = np.dtype([(name, "<i8") for name in _PLACE_FIELDS])
CLUSTERS = 50  # shown
_COPIES = 8  # shown of each
_SHOWN = 2000  # characters of each


@dataclasses.dataclass
class Decision:
    """What the operators at the end of a pass decided.

    Attributes:
      facts: of all documents of the pass (passes.FACTS), chunk after chunk.
      borders: where each chunk's documents begin, and the last one's end.
      keep: for each document whether it stays.
      rows: what each operator did.
      sizes: how many clusters of each size the deduplicators found.
      clusters: for some of them the deduplicator, the size, and the numbers of the kept document and of some
        that were dropped.
    """

    facts: np.ndarray
    borders: np.ndarray
    keep: np.ndarray
    rows: list[Row] = dataclasses.field(default_factory=list)
    sizes: dict[int, int] = dataclasses.field(default_factory=dict)
    clusters: list[tuple[Deduplicator, int, list[int]]] = dataclasses.field(default_factory=list)


def _facts(work: epath.PathLike, number: int, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Facts of all documents of a pass, and where each chunk's begin (and the last one's end)."""
    facts = [np.load(chunk_file(work, number, index, "facts.npy")) for index in range(chunks)]
    return np.concatenate(facts), np.cumsum([0, *(len(item) for item in facts)])


def decide(work: epath.PathLike, number: int, chunks: int, segment: Segment, engine: Engine) -> Decision:
    """Decides for the operators at the end of pass `number`, and writes it beside the chunks: `keep.npy`
    (bool per document) and, for a remover, `cut.npy` (the parts to cut out) and `cuts.npy` (how many of
    each document).
    """
    facts, borders = _facts(work, number, chunks)
    decision = Decision(facts, borders, np.ones(len(facts), bool))
    spill = epath.Path(work) / str(number) / "spill"
    if spill.exists():
        spill.rmtree()
    spill.mkdir(parents=True)
    pass_ = _Pass(os.fspath(work), number, chunks, tuple(borders.tolist()))
    for index, operator in enumerate(segment.deduplicators):
        began = time.perf_counter()
        pass_.save("keep", decision.keep)
        bands = (
            [(0, 1)] if isinstance(operator, ExactDuplicates) else [(row,) for row in range(operator.width)]
        )
        roots = np.arange(len(facts))
        for pairs in engine.pairs(_Keys(pass_, chunks, bands, f"keys-{index}")):
            linked = np.flatnonzero(roots != np.arange(len(roots)))
            known = np.stack([linked, roots[linked]], axis=1)
            roots = dedup.components(len(roots), np.concatenate([pairs, known]))
        alive = np.flatnonzero(decision.keep)
        prefer = np.concatenate([pass_.load(f"prefer-{index}", chunk) for chunk in range(chunks)])
        chosen = _first(roots, prefer)  # for each document the one that is kept in its place
        kept = chosen == np.arange(len(facts))
        _describe(decision, operator, chosen, kept)
        row = Row(type(operator).__name__, len(alive), int(kept[alive].sum()))
        row.characters = int(facts["characters"][alive].sum())
        if n := len(alive) - row.kept:
            row.dropped[operator.reason] = n
        decision.keep &= kept
        row.seconds = time.perf_counter() - began
        decision.rows.append(row)
    pass_.save("keep", decision.keep)
    if segment.remover is not None:
        _decide_cuts(pass_, segment.remover, decision, engine, spill)
    spill.rmtree()
    return decision


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The arrays that a pass left, by chunk.

    Attributes:
      borders: where each chunk's documents begin, and the last one's end.
    """

    work: str
    number: int
    chunks: int
    borders: tuple[int, ...]

    def file(self, kind: str, chunk: int) -> epath.Path:
        return chunk_file(self.work, self.number, chunk, f"{kind}.npy")

    def load(self, kind: str, chunk: int) -> np.ndarray:
        return np.load(self.file(kind, chunk))

    def save(self, kind: str, array: np.ndarray) -> None:
        """Writes an array with one element for each document."""
        for chunk in range(self.chunks):
            save_array(self.file(kind, chunk), array[self.borders[chunk] : self.borders[chunk + 1]])

    def numbers(self, chunk: int) -> np.ndarray:
        return np.arange(self.borders[chunk], self.borders[chunk + 1])


@dataclasses.dataclass(frozen=True)
class _Keys:
    """Keys of a deduplicator for the documents that are left."""

    pass_: _Pass
    chunks: int
    bands: Sequence[Sequence[int]]
    kind: str

    def chunk(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        keep = self.pass_.load("keep", index)
        keys = self.pass_.load(self.kind, index)
        return self.pass_.numbers(index)[keep], keys[:, keep]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """Keys of a remover for the documents that are left."""

    pass_: _Pass
    chunks: int
    keys: str
    counts: str
    places: str = ""

    def chunk(self, index: int) -> np.ndarray:
        keys, counts = self.pass_.load(self.keys, index), self.pass_.load(self.counts, index)
        owner = np.repeat(np.arange(len(counts)), counts)
        entries = np.empty(len(keys), ENTRY)
        entries["key"], entries["document"] = keys, self.pass_.numbers(index)[owner]
        if self.places:
            entries["unit"] = self.pass_.load(self.places, index)
        else:
            entries["unit"] = np.arange(len(keys)) - (np.cumsum(counts) - counts)[owner]
        return entries[self.pass_.load("keep", index)[owner] & (keys != 0)]


def _first(groups: np.ndarray, prefer: np.ndarray) -> np.ndarray:
    """For each document the most preferred one of its group, among equals the first."""
    order = np.lexsort((np.arange(len(groups)), -prefer, groups))
    new = np.ones(len(order), bool)
    new[1:] = groups[order][1:] != groups[order][:-1]
    chosen = np.empty(len(order), np.int64)
    chosen[order] = order[np.flatnonzero(new)[np.cumsum(new) - 1]] if len(order) else order
    return chosen


def _describe(decision: Decision, operator: Deduplicator, chosen: np.ndarray, kept: np.ndarray) -> None:
    """Counts clusters by size, and notes a few of the largest and a few from everywhere."""
    dropped = np.flatnonzero(~kept)
    heads, sizes = np.unique(chosen[dropped], return_counts=True)
    for size, n in zip(*np.unique(sizes + 1, return_counts=True), strict=True):
        decision.sizes[int(size)] = decision.sizes.get(int(size), 0) + int(n)
    largest = np.argsort(-sizes, kind="stable")[: CLUSTERS // 2]
    even = np.linspace(0, len(heads) - 1, min(len(heads), CLUSTERS // 2)).astype(int)
    for index in dict.fromkeys([*largest.tolist(), *even.tolist()]):
        copies = dropped[chosen[dropped] == heads[index]][:_COPIES]
        decision.clusters.append((operator, int(sizes[index]) + 1, [int(heads[index]), *copies.tolist()]))


def _decide_cuts(
    pass_: _Pass, remover: Remover, decision: Decision, engine: Engine, spill: epath.Path
) -> None:
    """For a remover: all parts whose key another part, before it, has too."""
    began = time.perf_counter()
    parts = _Parts(pass_, pass_.chunks, "units", "numbers")
    if isinstance(remover, RepeatedSubstrings):
        found = [np.unique(entries["key"]) for entries, _ in engine.repeats(parts, spill)]
        path = spill / "repeated.npy"
        save_array(path, np.sort(np.concatenate([np.empty(0, np.uint64), *found])))
        tasks = [(pass_, chunk, remover, os.fspath(path)) for chunk in range(pass_.chunks)]
        with console.progress("comparing passages", pass_.chunks) as progress:
            for _ in engine.each(_windows, tasks):
                progress.advance()
        parts = _Parts(pass_, pass_.chunks, "windows", "window-numbers", "window-places")
    changed = 0
    with _PlacesByChunk(spill / "cuts", pass_) as places:
        for entries, first in engine.repeats(parts, spill):
            places.add(entries[~first][_PLACE_FIELDS].astype(_PLACE))
    for chunk, cut in places.chunks():
        begin, end = pass_.borders[chunk : chunk + 2]
        cuts = np.bincount(cut["document"] - begin, minlength=end - begin)
        save_array(pass_.file("cut", chunk), cut["unit"])
        save_array(pass_.file("cuts", chunk), cuts)
        changed += int(np.count_nonzero(cuts))
    left = int(decision.keep.sum())
    row = Row(type(remover).__name__, left, left)
    row.changed = changed
    row.characters = int(decision.facts["characters"][decision.keep].sum())
    row.seconds = time.perf_counter() - began
    decision.rows.append(row)


class _PlacesByChunk:
    """Places in any order, which come back chunk after chunk: held in files, one for each few chunks."""

    _FILES = 200  # open at once

    def __init__(self, folder: epath.Path, pass_: _Pass):
        folder.mkdir()
        self._pass = pass_
        self._ranges = np.array_split(np.arange(pass_.chunks), min(pass_.chunks, self._FILES))
        self._paths = [folder / f"{index:03d}" for index in range(len(self._ranges))]

    def __enter__(self) -> _PlacesByChunk:
        with contextlib.ExitStack() as stack:
            self._files = [stack.enter_context(path.open("wb")) for path in self._paths]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, places: np.ndarray) -> None:
        places = places[np.argsort(places["document"], kind="stable")]
        for chunks, file in zip(self._ranges, self._files, strict=True):
            file.write(self._between(places, chunks[0], chunks[-1] + 1).tobytes())

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each chunk and its places, sorted, each once: Beam may do its work twice."""
        for chunks, path in zip(self._ranges, self._paths, strict=True):
            places = np.unique(np.frombuffer(path.read_bytes(), _PLACE))
            for chunk in chunks.tolist():
                yield chunk, self._between(places, chunk, chunk + 1)

    def _between(self, places: np.ndarray, first: int, end: int) -> np.ndarray:
        borders = self._pass.borders
        low, high = np.searchsorted(places["document"], [borders[first], borders[end]])
        return places[low:high]


def _windows(task: tuple[_Pass, int, RepeatedSubstrings, str]) -> None:
    """The second look of RepeatedSubstrings at a chunk."""
    pass_, chunk, remover, path = task
    repeated = np.load(epath.Path(path))
    units, numbers = pass_.load("units", chunk), pass_.load("numbers", chunk)
    wanted = np.zeros(len(numbers), bool)
    wanted[np.repeat(np.arange(len(numbers)), numbers)[np.isin(units, repeated)]] = True
    wanted &= pass_.load("keep", chunk)
    hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    counts = np.zeros(len(numbers), np.int64)
    for row, document in enumerate(read_documents(chunk_file(pass_.work, pass_.number, chunk, "parquet"))):
        if wanted[row]:
            keys, positions = remover.windows(document.text, repeated)
            hashes.append(keys)
            places.append(positions)
            counts[row] = len(keys)
    save_array(pass_.file("windows", chunk), np.concatenate(hashes))
    save_array(pass_.file("window-places", chunk), np.concatenate(places))
    save_array(pass_.file("window-numbers", chunk), counts)


def documents_at(
    work: epath.PathLike, number: int, borders: np.ndarray, indices: Sequence[int]
) -> dict[int, Document]:
    """Those documents of a pass, read from their chunks."""
    found: dict[int, Document] = {}
    wanted = np.unique(np.array(indices, np.int64))
    chunk = np.searchsorted(borders, wanted, side="right") - 1
    for index in np.unique(chunk):
        rows = set((wanted[chunk == index] - borders[index]).tolist())
        for row, document in enumerate(read_documents(chunk_file(work, number, int(index), "parquet"))):
            if row in rows:
                found[int(borders[index]) + row] = document
                if len(rows) == sum(1 for n in found if borders[index] <= n < borders[index + 1]):
                    break
    return found


def cluster_record(documents: Sequence[Document], size: int) -> dict[str, Any]:
    """A line for clusters.jsonl: the kept document first."""
    shown = [{"id": d.id, "url": d.url, "text": d.text[:_SHOWN]} for d in documents]
    return {"size": size, "kept": shown[0], "dropped": shown[1:]}
