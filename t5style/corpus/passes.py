"""Passes over the documents, in one process or several, resumable: files to chunks, chunks to chunks.

Pass 0 reads the files, about 16 MB of them in each chunk; each later pass reads the chunks of the one before,
as the operators between the two have decided. Of chunk k, pass p leaves in ``p/``, each complete or absent:

    k.parquet      documents that passed, in order
    k.facts.npy    where each is from and how long it is (FACTS)
    k.keys-j.npy   keys of its documents for deduplicator j, uint64 [width, documents], and
    k.prefer-j.npy how much each is preferred
    k.units.npy    keys for the remover, one document after the other, and
    k.numbers.npy  how many of them are each document's
    k.quarantine   JSON lines: what could not be read
    k.dropped      JSON lines: examples of what the stages dropped
    k.json         counts; written last, so a chunk that has it is done

and what grouping.py decides afterwards: k.keep.npy, k.cut.npy and k.cuts.npy.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus.document import Document, DocumentWriter, atomic_open, read_rows, save_array
from t5style.corpus.engines import Engine
from t5style.corpus.operators import Segment
from t5style.corpus.sources import Part, Quarantined
from t5style.corpus.stages import Drop
from t5style.corpus.tally import Measured, Row, apply
from t5style.run_dir import UserError, atomic_write

FACTS = np.dtype(
    [
        ("part", "<i4"),  # which file
        ("position", "<i8"),  # which item of that file
        ("characters", "<i8"),
        ("bytes", "<i8"),
        ("group", "<i4"),  # index into the chunk's list of [source, language]
    ]
)
EXAMPLES = 20  # dropped documents shown of each reason
_EXCERPT = 300  # characters of each


def chunk_file(work: epath.PathLike, number: int, index: int, kind: str) -> epath.Path:
    """The file of that kind that a pass leaves of a chunk."""
    return epath.Path(work) / str(number) / f"{index:06d}.{kind}"


@dataclasses.dataclass(frozen=True)
class Task:
    """What a process needs to take one chunk through one pass.

    Attributes:
      work: the working folder.
      number: of the pass.
      index: of the chunk.
      segment: what is done.
      before: what the pass before ended in; None in pass 0.
      parts: files of the chunk with their numbers, in pass 0.
      refuse: bad input ends the run.
      erased: 128-bit hashes, salted, of texts and ids that were erased on request.
    """

    work: str
    number: int
    index: int
    segment: Segment
    before: Segment | None = None
    parts: Sequence[tuple[int, Part]] = ()
    refuse: bool = False
    erased: Any = None

    def file(self, kind: str) -> epath.Path:
        return chunk_file(self.work, self.number, self.index, kind)


def run(tasks: Sequence[Task], sizes: Sequence[int], engine: Engine, label: str) -> None:
    """Does those tasks that are not done already, with a progress bar.

    Args:
      sizes: of each task's input, bytes.

    Raises:
      RuntimeError: a worker process died.
      UserError: bad input was met, and is to be refused.
    """
    waiting = [i for i, task in enumerate(tasks) if not task.file("json").exists()]
    waiting.sort(key=lambda i: -sizes[i])  # so that no process is left alone with a large one at the end
    if len(waiting) < len(tasks):
        console.say(
            f"going on: {len(tasks) - len(waiting)} of {len(tasks)} chunks of files are done already "
            f"({label})"
        )
    if waiting:
        tasks[0].file("json").parent.mkdir(parents=True, exist_ok=True)
    start = sum(sizes) - sum(sizes[i] for i in waiting)
    documents, began = 0, time.monotonic()
    with console.progress(label, sum(sizes), unit="bytes", start=start) as progress:
        for i, counted in engine.each(_do, [tasks[i] for i in waiting]):
            documents += counted
            rate = documents / max(time.monotonic() - began, 1e-9)
            progress.advance(sizes[waiting[i]], docs=f"{documents:,} ({rate:,.0f}/s)")


def survivors(
    work: epath.PathLike, number: int, index: int, segment: Segment, skipped: int = 0
) -> Iterator[tuple[Any, Document]]:
    """The documents of a finished chunk that its operators keep, without what they cut out; the first
    `skipped` of them are passed over.

    Yields:
      The document's facts, as they were before the cutting, and the document.
    """

    def load(kind: str) -> np.ndarray:
        return np.load(chunk_file(work, number, index, f"{kind}.npy"))

    facts = load("facts")
    keep = load("keep") if segment.operators else np.ones(len(facts), bool)
    remover = segment.remover
    cut, ends = (load("cut"), np.cumsum(load("cuts"))) if remover else (None, None)
    rows = np.flatnonzero(keep)
    if skipped >= len(rows):
        return
    first = int(rows[skipped])
    documents = read_rows(chunk_file(work, number, index, "parquet"), first)
    for row, document in enumerate(documents, start=first):
        if not keep[row]:
            continue
        if remover is not None and cut is not None and ends is not None:
            parts = cut[ends[row - 1] if row else 0 : ends[row]]
            if len(parts):
                document = dataclasses.replace(document, text=remover.remove(document.text, parts))
        yield facts[row], document


class _Columns:
    """What is noted about the documents that pass: the arrays of a chunk, without an object for each."""

    def __init__(self, segment: Segment):
        self._segment = segment
        self._facts = array.array("q")
        self._keys = [bytearray() for _ in segment.deduplicators]
        self._prefer = [array.array("d") for _ in segment.deduplicators]
        self._units, self._numbers = bytearray(), array.array("q")
        self.groups: dict[tuple[str, str], int] = {}

    def add(self, part: int, position: int, document: Document) -> None:
        group = self.groups.setdefault((document.source, document.language), len(self.groups))
        text = document.text
        self._facts.extend((part, position, len(text), len(text.encode()), group))
        for number, operator in enumerate(self._segment.deduplicators):
            self._keys[number] += operator.keys(text).tobytes()
            self._prefer[number].append(operator.preference(document))
        if self._segment.remover is not None:
            units = self._segment.remover.keys(text)
            self._units += units.tobytes()
            self._numbers.append(len(units))

    def save(self, task: Task) -> None:
        def put(kind: str, values: np.ndarray) -> None:
            save_array(task.file(f"{kind}.npy"), values)

        columns = np.array(self._facts, np.int64).reshape(-1, len(FACTS.descr))
        facts = np.empty(len(columns), FACTS)
        for index, name in enumerate(FACTS.names or ()):
            facts[name] = columns[:, index]
        put("facts", facts)
        for number, operator in enumerate(self._segment.deduplicators):
            keys = np.frombuffer(self._keys[number], np.uint64).reshape(-1, operator.width)
            put(f"keys-{number}", np.ascontiguousarray(keys.T))
            put(f"prefer-{number}", np.array(self._prefer[number], np.float64))
        if self._segment.remover is not None:
            put("units", np.frombuffer(self._units, np.uint64))
            put("numbers", np.array(self._numbers, np.int64))


def _items(task: Task) -> Iterator[tuple[int, int, Document | Quarantined]]:
    """What the pass reads, each with its file's number and its position there."""
    if task.before is None:
        for number, part in task.parts:
            for position, item in enumerate(part.read()):
                yield number, position, item
    else:
        for facts, document in survivors(task.work, task.number - 1, task.index, task.before):
            yield int(facts["part"]), int(facts["position"]), document


def _do(task: Task) -> int:
    stages, columns, measured = task.segment.stages, _Columns(task.segment), Measured()
    rows = [Row(type(stage).__name__) for stage in stages]
    end = Row(", ".join(type(item).__name__ for item in task.segment.operators))  # the taking of keys
    opening = Row("Reading" if task.before is None else _name(task.before.remover))
    bad: collections.Counter[str] = collections.Counter()
    size = 0
    clock = time.perf_counter
    with (
        DocumentWriter(task.file("parquet")) as writer,
        atomic_open(task.file("quarantine")) as quarantine,
        atomic_open(task.file("dropped")) as dropped,
    ):
        began = clock()
        for part, position, item in _items(task):
            opening.seconds += clock() - began
            if isinstance(item, Quarantined):
                if task.refuse:
                    raise UserError(
                        f"{item.file} {item.position}: {item.reason} ({item.detail}); mend it, or let "
                        "Prepare.on_bad_input = 'quarantine' set such things aside"
                    )
                bad[item.reason] += 1
                quarantine.write(json_line(dataclasses.asdict(item)))
                began = clock()
                continue
            opening.documents += 1
            size += len(item.text.encode())
            document, drop, at = _first_checks(task, item)
            if drop is None:
                document, drop, at = apply(stages, rows, document)
            if drop is None and task.erased is not None and task.erased.holds(document):
                # Its text as the stages leave it, which is how it was known when it was erased.
                document, drop = Document("", ""), Drop("erased on request")
                for row in rows:
                    row.documents, row.kept = row.documents - 1, row.kept - 1
            elif task.before is None:
                measured.add(document)
            if drop is not None:
                row = rows[at] if at >= 0 else opening
                if task.refuse and " failed: " in drop.reason:
                    raise UserError(
                        f"{drop.reason} on document {item.id} ({item.url}): {drop.detail}; mend the "
                        "stage, or let Prepare.on_bad_input = 'quarantine' drop such documents"
                    )
                if row.drop(drop.reason) <= EXAMPLES:
                    dropped.write(example(row.name, document, drop))
                began = clock()
                continue
            began = clock()
            writer.write(document)
            took = clock()
            opening.seconds += took - began
            columns.add(part, position, document)
            began = clock()
            end.seconds += began - took
    opening.kept = opening.documents - sum(opening.dropped.values())
    columns.save(task)
    record = {
        "bytes": size,
        "quarantine_reasons": bad,
        "rows": [dataclasses.asdict(row) for row in (opening, *rows, end)],
        "groups": list(columns.groups),
        "measured": measured.to_json(),
    }
    atomic_write(task.file("json"), json.dumps(record))
    return opening.documents


def _name(remover: Any) -> str:
    return type(remover).__name__ if remover is not None else "Reading again"


def _first_checks(task: Task, document: Document) -> tuple[Document, Drop | None, int]:
    """What the pass itself drops: what was erased on request, and what a remover left nothing of."""
    if task.before is not None and task.before.remover is not None and not document.text.strip():
        return document, Drop(task.before.remover.reason), -1
    if task.erased is not None and task.erased.holds(document):
        return Document("", ""), Drop("erased on request"), -1  # says nothing of which it was
    return document, None, -1


def example(stage: str, document: Document, drop: Drop) -> bytes:
    """A line for dropped.jsonl: which stage, why, where the document is from and how it begins."""
    record = {"stage": stage} | dataclasses.asdict(drop) | {"id": document.id, "url": document.url}
    return json_line(record | {"characters": len(document.text), "text": document.text[:_EXCERPT]})


def json_line(record: dict[str, Any]) -> bytes:
    """The record as one line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
