"""The job that turns raw files into a corpus: shards of documents per split, and an account of every
document left out.

What lies in the run folder afterwards:

    train/documents-00000-of-00002.parquet ...    validation/...    test/...
    data_card.json       sources, licences, languages, counts, stages
    dropped.jsonl        examples of dropped documents, a few of each reason
    quarantine.jsonl     every file or line that could not be read, with position and reason

It goes in two passes. Chunks of files are read and put through the stages (chunks.py); each finished chunk
stays on disk, so that a killed run goes on from there. Then duplicates are found over all chunks, by 24
bytes per document, and the documents are dealt out to the splits. Memory holds one row group of a chunk per
process, those 24 bytes, and the largest single document; disk holds the corpus twice until the end.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus.chunks import EXAMPLES, KEY, Counts, chunk_file, example, read
from t5style.corpus.document import (
    Document,
    ShardWriter,
    atomic_open,
    count_documents,
    read_documents,
    read_ids,
)
from t5style.corpus.normalize import Normalize
from t5style.corpus.sources import Files, Part, Source
from t5style.corpus.split import HashSplit, Split
from t5style.corpus.stages import Drop, MinLength, Stage
from t5style.run_dir import RunDir, UserError, atomic_write, canonical

_STAGES = (Normalize(), MinLength(1))
_SPLIT = HashSplit()
_DUPLICATE = "duplicate"


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Reads documents, puts them through stages, removes exact duplicates, and splits them.

    Attributes:
      sources: sources (see sources.py); a string stands for the files, folder or pattern of that name.
      stages: applied to each document in order.
      deduplicate: "exact" keeps the first of documents with the same text after all stages; "none" keeps all.
      split: HashSplit or TailSplit.
      shard_bytes: bytes of text after which a new file is begun.
      workers: processes; 0 means one per core. The result does not depend on it.
    """

    sources: Sequence[Source | str]
    stages: Sequence[Stage] = _STAGES
    deduplicate: str = "exact"
    split: Split = _SPLIT
    shard_bytes: int = 128 << 20
    workers: int = dataclasses.field(default=0, metadata={"affects_result": False})

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            raise UserError(
                f"sources must be a list, not the string {self.sources!r}: write [{self.sources!r}]"
            )
        if not self.sources:
            raise UserError("sources is empty: name at least one file, folder or pattern")
        if self.deduplicate not in ("exact", "none"):
            raise UserError(f"deduplicate must be 'exact' or 'none', not {self.deduplicate!r}")
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes must be 1 or more, not {self.shard_bytes}")
        if self.workers < 0:
            raise UserError(f"workers must be 0 or more, not {self.workers}")

    def inputs(self) -> Sequence[str]:
        return [path for source in self._sources() for path in source.inputs()]

    def _sources(self) -> list[Source]:
        return [Files([source]) if isinstance(source, str) else source for source in self.sources]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Prepares the corpus inside ``run.path``.

        Returns:
          Figures: documents, characters and bytes per split, drops by reason, quarantined, MB/s.

        Raises:
          UserError: an input is missing, no document is left, a split is empty, or the disk is full.
          RuntimeError: the counts do not add up, or a worker process died.
        """
        began = time.monotonic()
        parts = [part for source in self._sources() for part in source.parts()]
        _check_names(parts)
        work = run.path / ".work"
        try:
            chunks, counts = read(parts, self.stages, work, self.workers)
            figures = self._deal(run, work, chunks, counts)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"the disk of {run.path} is full; preparing {sum(part.size for part in parts):,} bytes of "
                "input takes about twice that: free space and run again to go on, or choose another RUN_DIR"
            ) from error
        work.rmtree()
        seconds = time.monotonic() - began
        figures |= {"seconds": round(seconds, 3), "mb_per_second": round(counts["bytes"] / 1e6 / seconds, 3)}
        _tell(run, figures)
        return figures

    def _deal(self, run: RunDir, work: epath.Path, chunks: int, counts: Counts) -> dict[str, Any]:
        """The second pass: removes duplicates, writes the splits, checks the counts; returns the figures."""
        table = np.concatenate(
            [np.load(chunk_file(work, index, "npy")) for index in range(chunks)], dtype=KEY
        )
        original = np.arange(len(table))  # for each document the first with the same text
        if self.deduplicate == "exact":
            _, first, inverse = np.unique(table["digest"], return_index=True, return_inverse=True)
            original = first[inverse]
        keep = original == np.arange(len(table))
        drops = {key.removeprefix("drop "): n for key, n in counts.items() if key.startswith("drop ")}
        if duplicates := int((~keep).sum()):
            drops[_DUPLICATE] = duplicates
        if not keep.any():
            raise UserError(_nothing_left(run, work, chunks, counts, drops))

        out = work / "out"
        if out.exists():
            out.rmtree()
        shown = set(np.flatnonzero(~keep)[:EXAMPLES].tolist())
        repeated = {int(original[position]): "" for position in shown}  # becomes: their ids
        total = int(table["characters"][keep].sum())
        split = self.split.fitted(_ids(work, chunks, keep), int(keep.sum()))
        card = _Card()
        writers: dict[str, ShardWriter] = {}
        position = start = cut = 0
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(console.progress("writing", len(table)))
            dropped = stack.enter_context(atomic_open(run.path / "dropped.jsonl"))
            _gather(run, work, chunks, dropped)
            for index in range(chunks):
                for document in read_documents(chunk_file(work, index, "parquet")):
                    if position in repeated:
                        repeated[position] = document.id
                    if position in shown:
                        of = repeated[int(original[position])]
                        dropped.write(example(document, Drop(_DUPLICATE, f"of {of}")))
                    if keep[position]:
                        pieces = split.route(document, start, total)
                        start += len(document.text)
                        cut += len(pieces) - 1
                        for name, piece in pieces:
                            if name not in writers:
                                writers[name] = stack.enter_context(ShardWriter(out / name, self.shard_bytes))
                            writers[name].write(piece)
                            card.add(name, piece)
                    position += 1
                    progress.advance()
        if empty := [name for name in split.names if name not in writers]:
            raise UserError(f"{total} characters are too few for {self.split}: {empty[0]!r} would be empty")

        # What lies on disk is counted again, from the files.
        written = {name: count_documents(out / name) for name in sorted(writers)}
        if counts["read"] + cut != sum(drops.values()) + sum(written.values()) or position != len(table):
            raise RuntimeError(
                f"the counts do not add up: {counts['read']} documents read and {cut} cut in two, "
                f"but {drops} dropped and {written} written; please report this"
            )
        for name in written:
            if (run.path / name).exists():
                (run.path / name).rmtree()
            (out / name).rename(run.path / name)
        figures = {
            "documents_in": counts["read"],
            "documents": sum(written.values()),
            "cut_in_two": cut,
            "dropped": dict(sorted(drops.items())),
            "quarantined": counts["quarantined"],
            "bytes_in": counts["bytes"],
            "splits": {name: card.tables["splits"][name] for name in written},
        }
        settings = {"stages": self.stages, "deduplicate": self.deduplicate, "split": self.split}
        description = card.tables | figures | {name: canonical(value) for name, value in settings.items()}
        text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
        atomic_write(run.path / "data_card.json", text)
        return figures


def _ids(work: epath.Path, chunks: int, keep: np.ndarray) -> Iterator[str]:
    position = 0
    for index in range(chunks):
        for id in read_ids(chunk_file(work, index, "parquet")):
            if keep[position]:
                yield id
            position += 1


def _check_names(parts: Sequence[Part]) -> None:
    paths = collections.Counter(part.path for part in parts)
    if twice := [path for path, n in paths.items() if n > 1]:
        raise UserError(f"{twice[0]} is named by two sources: name each file once")
    names: dict[str, str] = {}
    for part in parts:
        if (other := names.setdefault(part.id, part.path)) != part.path:
            raise UserError(
                f"{other} and {part.path} would both be called {part.id!r}: name them in one "
                "source, or give the two sources different values of `source`"
            )


def _gather(run: RunDir, work: epath.Path, chunks: int, dropped: Any) -> None:
    """Collects what the chunks set aside: all of the quarantine, a few examples of each reason for
    dropping.
    """
    shown: collections.Counter[str] = collections.Counter()
    with atomic_open(run.path / "quarantine.jsonl") as quarantine:
        for index in range(chunks):
            with chunk_file(work, index, "quarantine").open("rb") as file:
                shutil.copyfileobj(file, quarantine)
            for line in chunk_file(work, index, "dropped").read_bytes().splitlines(keepends=True):
                reason = json.loads(line)["reason"]
                shown[reason] += 1
                if shown[reason] <= EXAMPLES:
                    dropped.write(line)


class _Card:
    """Counts documents, characters and bytes by split, source, licence and language."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, dict[str, int]]] = {
            name: {} for name in ("splits", "sources", "licenses", "languages")
        }

    def add(self, split: str, document: Document) -> None:
        size = len(document.text.encode())
        keys = (split, document.source, document.license, document.language)
        for table, key in zip(self.tables.values(), keys, strict=True):
            row = table.setdefault(key or "unknown", {"documents": 0, "characters": 0, "bytes": 0})
            row["documents"] += 1
            row["characters"] += len(document.text)
            row["bytes"] += size


def _nothing_left(run: RunDir, work: epath.Path, chunks: int, counts: Counts, drops: dict[str, int]) -> str:
    if counts["read"]:
        reasons = ", ".join(f"{n} as {reason}" for reason, n in sorted(drops.items()))
        return f"no document is left of {counts['read']}: dropped {reasons}; loosen the stages"
    if not counts["quarantined"]:
        return "the files hold no documents at all: name others"
    with atomic_open(run.path / "dropped.jsonl") as dropped:
        _gather(run, work, chunks, dropped)
    with (run.path / "quarantine.jsonl").open() as lines:
        first = json.loads(next(iter(lines)))
    return (
        f"no document could be read: {first['file']} {first['position']}: {first['reason']} "
        f"({first['detail']}); all {counts['quarantined']} reasons are in {run.path / 'quarantine.jsonl'}"
    )


def _tell(run: RunDir, figures: dict[str, Any]) -> None:
    rows = [(name, *row.values()) for name, row in figures["splits"].items()]
    console.table(f"documents in {run.path}", ("split", "documents", "characters", "bytes"), rows)
    rows = list(figures["dropped"].items())
    if figures["quarantined"]:
        rows.append(("could not be read (quarantine.jsonl)", figures["quarantined"]))
    if rows:
        console.table("left out (examples in dropped.jsonl)", ("reason", "documents"), rows)
