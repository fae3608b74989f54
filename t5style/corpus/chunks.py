"""The first pass of ``Prepare``: files in chunks through the stages, in one process or several, resumable.

Of chunk k the working folder holds, each complete or absent:

    k.parquet      documents that passed, in order
    k.npy          hash and length of each, for finding duplicates
    k.quarantine   JSON lines: what could not be read
    k.dropped      JSON lines: examples of what the stages dropped
    k.json         counts; written last, so a chunk that has it is done
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus.document import Document, DocumentWriter, atomic_open
from t5style.corpus.sources import Part, Quarantined
from t5style.corpus.stages import Drop, Stage
from t5style.run_dir import atomic_write, canonical, fingerprint

KEY = np.dtype([("digest", "S16"), ("characters", "<i8")])
EXAMPLES = 20  # dropped documents shown of each reason
_EXCERPT = 300  # characters of each
_CHUNK_BYTES = 16 << 20

Counts = collections.Counter[str]


def chunk_file(work: epath.PathLike, index: int, kind: str) -> epath.Path:
    """The file of that kind that belongs to a chunk."""
    return epath.Path(work) / f"{index:06d}.{kind}"


def read(
    parts: Sequence[Part], stages: Sequence[Stage], work: epath.Path, workers: int
) -> tuple[int, Counts]:
    """Reads all files through the stages into ``work``, but for chunks that are done there already.

    Args:
      parts: the files.
      stages: applied in order to each document.
      work: folder for the chunks; emptied first if it holds those of other files or other stages.
      workers: processes; 0 for one per core.

    Returns:
      The number of chunks, and what they counted together: "read", "bytes" (of UTF-8 text read),
      "quarantined", and "drop <reason>" for each reason.

    Raises:
      RuntimeError: a worker process died.
    """
    chunks = _group(parts)
    state = [[part.path, part.size, part.modified, part.id, canonical(part.reader)] for part in parts]
    plan = fingerprint([canonical(list(stages)), state])
    plan_file = work / "plan"
    if not (plan_file.exists() and plan_file.read_text() == plan):
        if work.exists():
            work.rmtree()
        work.mkdir(parents=True)
        atomic_write(plan_file, plan)
    waiting = [index for index in range(len(chunks)) if not chunk_file(work, index, "json").exists()]
    sizes = [sum(part.size for part in chunk) for chunk in chunks]
    if len(waiting) < len(chunks):
        console.say(
            f"going on: {len(chunks) - len(waiting)} of {len(chunks)} chunks of files are done already"
        )
    tasks = [(chunks[index], tuple(stages), os.fspath(work), index) for index in waiting]
    workers = min(workers or os.cpu_count() or 1, len(waiting))
    start = sum(sizes) - sum(sizes[index] for index in waiting)
    documents = 0
    with console.progress("reading", sum(sizes), unit="bytes", start=start) as progress:
        for index, counted in _run(tasks, workers):
            documents += counted["read"]
            progress.advance(sizes[index], docs=documents)
    counts: Counts = collections.Counter()
    for index in range(len(chunks)):
        counts.update(json.loads(chunk_file(work, index, "json").read_text()))
    return len(chunks), counts


def _group(parts: Sequence[Part]) -> list[list[Part]]:
    """Consecutive files together up to some 16 MB, a larger file alone."""
    chunks: list[list[Part]] = []
    room = 0
    for part in parts:
        if not chunks or part.size > room:
            chunks.append([])
            room = _CHUNK_BYTES
        chunks[-1].append(part)
        room -= part.size
    return chunks


_Task = tuple[Sequence[Part], Sequence[Stage], str, int]


def _run(tasks: Sequence[_Task], workers: int) -> Iterator[tuple[int, Counts]]:
    """Does the tasks, here or in processes; yields each one's index and counts as it is done."""
    if workers <= 1:
        for task in tasks:
            yield task[-1], _read_chunk(task)
        return
    # Spawned, not forked: the fork of a process with running threads, such as JAX's, can hang.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_read_chunk, task): task[-1] for task in tasks}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise RuntimeError(
                f"one of {workers} worker processes died, perhaps for want of memory: run again with fewer "
                "workers; it goes on from the finished chunks"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read_chunk(task: _Task) -> Counts:
    parts, stages, work, index = task
    counts: Counts = collections.Counter()
    keys: list[tuple[bytes, int]] = []
    with (
        DocumentWriter(chunk_file(work, index, "parquet")) as writer,
        atomic_open(chunk_file(work, index, "quarantine")) as quarantine,
        atomic_open(chunk_file(work, index, "dropped")) as dropped,
    ):
        for part in parts:
            for item in part.read():
                if isinstance(item, Quarantined):
                    counts["quarantined"] += 1
                    quarantine.write(json_line(dataclasses.asdict(item)))
                    continue
                counts["read"] += 1
                counts["bytes"] += len(item.text.encode())
                result = apply(stages, item)
                if isinstance(result, Drop):
                    counts[f"drop {result.reason}"] += 1
                    if counts[f"drop {result.reason}"] <= EXAMPLES:
                        dropped.write(example(item, result))
                    continue
                writer.write(result)
                keys.append(
                    (hashlib.blake2b(result.text.encode(), digest_size=16).digest(), len(result.text))
                )
    with atomic_open(chunk_file(work, index, "npy")) as file:
        np.save(file, np.array(keys, KEY))
    atomic_write(chunk_file(work, index, "json"), json.dumps(counts))
    return counts


def apply(stages: Sequence[Stage], document: Document) -> Document | Drop:
    """The document after all stages. One that makes a stage fail is dropped for that reason; the others go
    on.
    """
    for stage in stages:
        try:
            result = stage(document)
        except Exception as error:
            return Drop(f"{type(stage).__name__} failed: {type(error).__name__}", str(error))
        if isinstance(result, Drop):
            return result
        document = result
    return document


def example(document: Document, drop: Drop) -> bytes:
    """A line for dropped.jsonl: why, where the document is from and how it begins."""
    record = dataclasses.asdict(drop) | {"id": document.id, "url": document.url}
    return json_line(record | {"characters": len(document.text), "text": document.text[:_EXCERPT]})


def json_line(record: dict[str, Any]) -> bytes:
    """The record as one line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
