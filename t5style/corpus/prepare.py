"""The job that turns raw files into a corpus: shards of documents per split, and an account of every
document left out.

What lies in the run folder afterwards:

    train/documents-00000-of-00002.parquet ...    validation/...    test/...
    train/order.npy, difficulty.npy               with a curriculum
    data_card.json       sources, licences, languages, counts, stages, distributions
    data_report.html     all of it as a page; README.md and croissant.json: the cards
    dropped.jsonl        examples of dropped documents, a few of each reason
    clusters.jsonl       examples of documents that were found to be copies of each other
    quarantine.jsonl     every file or line that could not be read, with position and reason
    timings.json         seconds of each stage
    index/               what `extends` and erasure need: the documents before deduplication, with their keys

Chunks of files go through the stages (passes.py); where operators stand among them, what they take from each
document is brought together (grouping.py) before the next pass; at last the documents are dealt out to the
splits (deal.py). Every chunk of every pass stays on disk until all is done, so that a killed run goes on
from there. Memory holds one row group of a chunk per process, some 150 bytes per document, and the largest
single document; disk holds the corpus twice for good (once without the index), and meanwhile once more, and
once more for each remover.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus import account, deal, grouping, plan, tally
from t5style.corpus.document import read_ids, save_array
from t5style.corpus.engines import Engine, Local
from t5style.corpus.normalize import Normalize
from t5style.corpus.operators import Deduplicator, ExactDuplicates, Remover, segments
from t5style.corpus.passes import EXAMPLES, FACTS, Task, chunk_file, example, json_line
from t5style.corpus.passes import run as run_pass
from t5style.corpus.sampling import Curriculum, Sampling
from t5style.corpus.sources import Files, Source
from t5style.corpus.split import HashSplit, Split
from t5style.corpus.stages import Drop, MinLength, Stage, check_stage
from t5style.run_dir import RunDir, UserError, atomic_write, canonical, fingerprint, path_fingerprint

_STAGES = (Normalize(), MinLength(1), ExactDuplicates())
_SPLIT = HashSplit()
_NGRAMS = 100  # of each order in the data card
_FINISHED = "finished.json"  # all is written, and has to be put into its place


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Reads documents, puts them through stages, and splits them.

    Attributes:
      sources: sources (see sources.py); a string stands for the files, folder or pattern of that name.
      stages: in order; operators (operators.py) among them look at all documents at once.
      split: HashSplit or TailSplit.
      sampling: copies of the training documents; None writes each once.
      curriculum: records an order of the training documents; None records none.
      extends: run folder of an earlier corpus, made with the same stages: its files are not read again, and
        the result is the same as that of preparing all files at once, the old ones first.
      keep_index: keeps what a later corpus needs to extend this one, as large as the corpus itself.
      on_bad_input: "quarantine" sets aside what cannot be read or makes a stage fail, and goes on; "refuse"
        ends the run there.
      shard_bytes: bytes of text after which a new file is begun.
      engine: who does the work: None for processes of this machine, or beam.Beam. The result is the same.
      workers: processes; 0 means one per core. The result does not depend on it.
    """

    sources: Sequence[Source | str]
    stages: Sequence[Stage | Deduplicator | Remover] = _STAGES
    split: Split = _SPLIT
    sampling: Sampling | None = None
    curriculum: Curriculum | None = None
    extends: str = ""
    keep_index: bool = True
    on_bad_input: str = "quarantine"
    shard_bytes: int = 64 << 20
    engine: Engine | None = dataclasses.field(default=None, metadata={"affects_result": False})
    workers: int = dataclasses.field(default=0, metadata={"affects_result": False})

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            raise UserError(
                f"sources must be a list, not the string {self.sources!r}: write [{self.sources!r}]"
            )
        if not self.sources:
            raise UserError("sources is empty: name at least one file, folder or pattern")
        if self.on_bad_input not in ("quarantine", "refuse"):
            raise UserError(f"on_bad_input must be 'quarantine' or 'refuse', not {self.on_bad_input!r}")
        if self.shard_bytes < 1:
            raise UserError(f"shard_bytes must be 1 or more, not {self.shard_bytes}")
        Local(self.workers)  # checks the number
        for stage in self.stages:
            if not isinstance(stage, Deduplicator | Remover):
                check_stage(stage, "Prepare.stages")

    def inputs(self) -> Sequence[str]:
        paths = [path for source in self._sources() for path in source.inputs()]
        paths += stage_inputs(self.stages)
        return [*paths, os.path.join(self.extends, plan.INDEX)] if self.extends else paths

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
        work = run.path / ".work"
        try:
            with contextlib.closing(self.engine or Local(self.workers)) as engine:
                figures, timings = _Preparation(self, run, work, engine).perform()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(
                f"the disk of {run.path} is full; preparing takes about three times the space of the input's "
                "text: free space and run again to go on, or choose another RUN_DIR"
            ) from error
        seconds = time.monotonic() - began
        figures |= {
            "seconds": round(seconds, 3),
            "mb_per_second": round(figures["bytes_in"] / 1e6 / seconds, 3),
        }
        atomic_write(run.path / "timings.json", json.dumps(timings | {"seconds": seconds}, indent=1))
        account.tell(run, figures)
        from t5style.report import data_report

        console.say(f"the data report is {data_report.write(run.path)}")
        return figures


def stage_inputs(stages: Sequence[Any]) -> list[str]:
    """Files that the stages read, such as word lists and models."""
    paths: list[str] = []
    for stage in stages:
        paths += stage.inputs() if hasattr(stage, "inputs") else []
        paths += stage_inputs(getattr(stage, "stages", ()))
    return paths


class _Preparation:
    """One run of Prepare, step by step."""

    def __init__(self, job: Prepare, run: RunDir, work: epath.Path, engine: Engine):
        self.job, self.run, self.work, self.engine = job, run, work, engine
        self.segments = segments(job.stages)
        self.rows: list[tally.Row] = []
        self.measured = tally.Measured()
        self.sizes: dict[str, int] = {}  # of clusters
        self.clusters: list[bytes] = []
        self.dropped: list[bytes] = []  # examples of the operators' drops

    def perform(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All of it; the figures, and each stage's seconds."""
        parts = [part for source in self.job._sources() for part in source.parts()]
        old = self._old_plan()
        new = plan.new_files(parts, old) if old else parts
        plan.check_names(new, old)
        fresh = plan.group(new)
        self._begin(old, fresh, parts)
        if (self.work / _FINISHED).exists():  # killed while everything was put into its place
            return self._publish()
        chunks = len(self.plan.chunks)
        first = chunks - len(fresh)
        for index in range(first):
            if not chunk_file(self.work, 0, index, "json").exists():
                raise UserError(
                    f"{self.job.extends}/{plan.INDEX} is damaged: chunk {index} is missing; prepare all "
                    "files anew"
                )
        numbered = iter(range(sum(map(len, self.plan.chunks[:first])), 1 << 31))
        tasks = [self._task(0, index) for index in range(first)]
        for index, files in enumerate(fresh, start=first):
            with_numbers = tuple((next(numbered), part) for part in files)
            tasks.append(dataclasses.replace(self._task(0, index), parts=with_numbers))
        sizes = [sum(file["size"] for file in chunk) for chunk in self.plan.chunks]
        for number, segment in enumerate(self.segments):
            if number:
                tasks = [self._task(number, index) for index in range(chunks)]
            run_pass(tasks, sizes, self.engine, "reading" if not number else f"pass {number + 1}")
            self._count(number, chunks)
            decision = grouping.decide(self.work, number, chunks, segment, self.engine)
            self._note(number, decision)
        figures, card = self._deal(len(self.segments) - 1, chunks, decision)
        timings = {"stages": {f"{i} {row.name}": round(row.seconds, 3) for i, row in enumerate(self.rows)}}
        atomic_write(self.work / _FINISHED, json.dumps([figures, card, timings]))
        return self._publish()

    def _old_plan(self) -> plan.Plan | None:
        if not self.job.extends:
            return None
        folder = epath.Path(self.job.extends) / plan.INDEX
        old = plan.Plan.load(folder)
        if old is None:
            raise UserError(
                f"extends={self.job.extends!r}: there is no {folder}; prepare that with keep_index=True"
            )
        if old.settings != self._settings():
            raise UserError(
                f"extends={self.job.extends!r} was prepared with other stages before its first operator: use "
                "the same ones, or prepare all files anew without `extends`"
            )
        return old

    def _settings(self) -> str:
        """What decides pass 0 apart from the files."""
        segment = self.segments[0]
        files = [path_fingerprint(path) for path in stage_inputs(segment.stages)]
        return fingerprint(
            [canonical(list(segment.stages)), canonical(list(segment.operators)), files, FACTS.descr]
        )

    def _begin(self, old: plan.Plan | None, fresh: Sequence[Sequence[Any]], parts: Sequence[Any]) -> None:
        """Makes the working folder, or goes on with that of a killed run of the same files and settings."""
        chunks = [*(old.chunks if old else []), *([plan.describe(part) for part in chunk] for chunk in fresh)]
        job = self.job
        readers = [canonical(reader) for reader in {id(part.reader): part.reader for part in parts}.values()]
        rest = [canonical(list(job.stages)), job.on_bad_input, self._settings()]
        same = fingerprint([chunks, readers, rest, [old.salt, old.erased] if old else None])
        dealing = [canonical(value) for value in (job.split, job.sampling, job.curriculum, job.shard_bytes)]
        self.plan = plan.Plan(self._settings(), chunks)
        if old:
            self.plan.salt, self.plan.erased = old.salt, old.erased
        mark = self.work / "same"
        if mark.exists() and mark.read_text() == same:
            if (known := plan.Plan.load(self.work)) is not None:
                self.plan = known
            if not (dealt := self.work / "dealing").exists() or dealt.read_text() != fingerprint(dealing):
                if (self.work / "out").exists():
                    (self.work / "out").rmtree()
                (self.work / _FINISHED).unlink(missing_ok=True)
                atomic_write(dealt, fingerprint(dealing))
            return
        if self.work.exists():
            self.work.rmtree()
        if old:
            plan.link(epath.Path(self.job.extends) / plan.INDEX / "0", self.work / "0")
        self.plan.save(self.work)
        atomic_write(self.work / "dealing", fingerprint(dealing))
        atomic_write(mark, same)

    def _task(self, number: int, index: int) -> Task:
        return Task(
            work=os.fspath(self.work),
            number=number,
            index=index,
            segment=self.segments[number],
            before=self.segments[number - 1] if number else None,
            refuse=self.job.on_bad_input == "refuse",
            erased=self.plan.tombstones() if number == 0 else None,
        )

    def _count(self, number: int, chunks: int) -> None:
        """Adds up what the chunks of a pass counted."""
        records = [
            json.loads(chunk_file(self.work, number, index, "json").read_text()) for index in range(chunks)
        ]
        rows = [tally.Row(**row) for row in records[0]["rows"]] if records else []
        for record in records[1:]:
            for row, more in zip(rows, record["rows"], strict=True):
                row.add(tally.Row(**more))
        if number == 0:
            self.bytes_in = sum(record["bytes"] for record in records)
            self.read = rows[0].documents
            self.bad: dict[str, int] = {}
            for record in records:
                deal.add_up(self.bad, record["quarantine_reasons"])
                self.measured.merge(record["measured"])
        self.groups = [[tuple(group) for group in record["groups"]] for record in records]
        self.keys_row = rows.pop()  # the taking of keys, which is part of the operators' work
        if number:
            opening = rows.pop(0)
            if self.segments[number - 1].remover is not None:  # whose work the pass did as it read
                remover = self.rows[-1]
                remover.dropped, remover.seconds = opening.dropped, remover.seconds + opening.seconds
                remover.kept = opening.kept
        self.rows += rows

    def _note(self, number: int, decision: grouping.Decision) -> None:
        """Keeps what the operators did, and examples of it."""
        if decision.rows:
            for row in decision.rows:
                row.seconds += self.keys_row.seconds / len(decision.rows)
        self.rows += decision.rows
        deal.add_up(self.sizes, {str(size): n for size, n in decision.sizes.items()})
        wanted = [index for _, _, members in decision.clusters for index in members]
        documents = grouping.documents_at(self.work, number, decision.borders, wanted)
        shown: dict[str, int] = {}
        for operator, size, members in decision.clusters:
            found = [documents[index] for index in members]
            self.clusters.append(json_line(grouping.cluster_record(found, size)))
            for copy in found[1:]:
                shown[operator.reason] = shown.get(operator.reason, 0) + 1
                if shown[operator.reason] <= EXAMPLES:
                    drop = Drop(operator.reason, f"of {found[0].id}")
                    self.dropped.append(example(type(operator).__name__, copy, drop))

    def _deal(
        self, number: int, chunks: int, decision: grouping.Decision
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Writes the splits, checks the counts, and describes it all; returns the figures and the card."""
        job, run, work = self.job, self.run, self.work
        facts, borders, keep = decision.facts, decision.borders, decision.keep
        account.gather(run, work, len(self.segments), chunks, self.dropped)
        atomic_write(run.path / "clusters.jsonl", b"".join(self.clusters).decode())
        if not keep.any():
            raise UserError(self._nothing_left())
        total = int(facts["characters"][keep].sum())
        split = job.split.fitted(self._ids(number, chunks, keep, borders), int(keep.sum()))
        common = deal.Shard(
            os.fspath(work),
            number,
            self.segments[number],
            0,
            (),
            0,
            total,
            split,
            job.sampling,
            None,
            job.curriculum,
        )
        if job.sampling is not None:
            weights = job.sampling.group_weights(self._characters(facts, borders, keep))
            common = dataclasses.replace(common, weights=weights)
        pieces = deal.cut(facts["bytes"], keep, borders, job.shard_bytes)
        before = np.concatenate([[0], np.cumsum(facts["characters"][keep])])
        shards = [
            dataclasses.replace(common, index=index, chunks=part, start=int(before[first]))
            for index, (part, first) in enumerate(pieces)
        ]
        if job.curriculum is not None and job.curriculum.by == "rarity":
            path = work / "frequencies.npy"
            save_array(path, deal.word_frequencies(shards, self.engine))
            shards = [dataclasses.replace(shard, frequencies=os.fspath(path)) for shard in shards]
        records = deal.write(shards, self.engine, int(keep.sum()))
        with (run.path / "dropped.jsonl").open("ab") as file:
            left = EXAMPLES
            for shard in shards:
                lines = (shard.out / f"{shard.index:05d}.dropped").read_bytes().splitlines(keepends=True)
                file.write(b"".join(lines[:left]))
                left = max(0, left - len(lines))
        figures, card = self._figures(records, split, total)
        for name in figures["splits"]:
            if job.curriculum is not None and name == "train":
                deal.save_order(shards, shards[0].out / name)
        return figures, card

    def _ids(self, number: int, chunks: int, keep: np.ndarray, borders: np.ndarray) -> Iterator[str]:
        for index in range(chunks):
            kept = keep[borders[index] : borders[index + 1]]
            ids = read_ids(chunk_file(self.work, number, index, "parquet"))
            yield from (id for id, wanted in zip(ids, kept, strict=True) if wanted)

    def _characters(
        self, facts: np.ndarray, borders: np.ndarray, keep: np.ndarray
    ) -> dict[tuple[str, str], int]:
        """Characters of the kept documents by source and language."""
        result: dict[tuple[str, str], int] = {}
        for index, groups in enumerate(self.groups):
            rows = slice(borders[index], borders[index + 1])
            sums = np.bincount(
                facts["group"][rows], weights=facts["characters"][rows] * keep[rows], minlength=len(groups)
            )
            for group, n in zip(groups, sums, strict=True):
                result[group] = result.get(group, 0) + int(n)
        return result

    def _figures(
        self, records: Sequence[dict[str, Any]], split: Split, total: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Adds up, compares with what lies on disk, and makes the figures and the data card."""
        tables: dict[str, Any] = {name: {} for name in deal.TABLES}
        pii: dict[str, Any] = {}
        sampled, kept = tally.Row("Sampling"), tally.Measured()
        for record in records:
            deal.add_up(tables, record["tables"])
            deal.add_up(pii, record["pii"])
            sampled.add(tally.Row(**record["row"]))
            kept.merge(record["measured"])
        cut, copies = (sum(record[name] for record in records) for name in ("cut_in_two", "copies"))
        if empty := [name for name in split.names if name not in tables["splits"]]:
            raise UserError(
                f"{total} characters are too few for {self.job.split}: {empty[0]!r} would be empty"
            )
        # What lies on disk is counted again, from the files.
        written = deal.finish(self.work / "out", list(tables["splits"]))
        if sampled.dropped:
            self.rows.append(sampled)
        drops: dict[str, int] = {}
        for row in self.rows:
            deal.add_up(drops, row.dropped)
        if self.read + cut + copies != sum(drops.values()) + sum(written.values()):
            raise RuntimeError(
                f"the counts do not add up: {self.read} documents read, {cut} cut in two and {copies} copies "
                f"made, but {drops} dropped and {written} written; please report this"
            )
        figures = {
            "documents_in": self.read,
            "documents": sum(written.values()),
            "cut_in_two": cut,
            "copies": copies,
            "dropped": dict(sorted(drops.items())),
            "quarantined": sum(self.bad.values()),
            "bytes_in": self.bytes_in,
            "splits": {name: tables["splits"][name] for name in sorted(written)},
        }
        histograms = {
            name: {
                "edges": tally.edges_of(name),
                "read": counts,
                "kept": kept.histograms.get(name, [0] * len(counts)),
            }
            for name, counts in sorted(self.measured.histograms.items())
        }
        settings = {"stages": self.job.stages, "split": self.job.split}
        settings |= {"sampling": self.job.sampling, "curriculum": self.job.curriculum}
        card = {
            **tables,
            **figures,
            **{name: canonical(value) for name, value in settings.items()},
            "stages_table": [account.card_row(row) for row in self.rows],
            "histograms": histograms,
            "ngrams": {order: counter.most_common(_NGRAMS) for order, counter in kept.ngrams.items()},
            "pii": dict(sorted(pii.items())),
            "quarantine_reasons": dict(sorted(self.bad.items())),
            "clusters": {"sizes": dict(sorted(self.sizes.items(), key=lambda item: int(item[0])))},
            "extends": self.job.extends,
        }
        return figures, card

    def _publish(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Puts everything into its place; what a killed process did of it already is left as it is."""
        figures, card, timings = json.loads((self.work / _FINISHED).read_text())
        deal.move(self.work / "out", self.run.path, list(figures["splits"]))
        atomic_write(self.run.path / "data_card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
        self._keep_index()
        return figures, timings

    def _keep_index(self) -> None:
        """Leaves pass 0 as the index, if wanted; clears away the rest."""
        index = self.run.path / plan.INDEX
        if index.exists() and (not self.job.keep_index or (self.work / "0").exists()):
            index.rmtree()
        if self.job.keep_index and (self.work / "0").exists():
            index.mkdir()
            # What was decided is decided anew when more is there; hidden files are those of a killed process.
            for path in (self.work / "0").iterdir():
                kind = path.name.partition(".")[2]
                if path.name.startswith(".") or kind.startswith(("keep.", "cut.", "cuts.", "window")):
                    path.unlink()
            self.plan.save(index)
            (self.work / "0").rename(index / "0")
        (self.work / "same").unlink(missing_ok=True)  # from here there is nothing to go on from
        self.work.rmtree()

    def _nothing_left(self) -> str:
        if self.read:
            drops: dict[str, int] = {}
            for row in self.rows:
                deal.add_up(drops, row.dropped)
            reasons = ", ".join(f"{n} as {reason}" for reason, n in sorted(drops.items()))
            return f"no document is left of {self.read}: dropped {reasons}; loosen the stages"
        if not self.bad:
            return "the files hold no documents at all: name others"
        path = self.run.path / "quarantine.jsonl"
        with path.open() as lines:
            first = json.loads(next(iter(lines)))
        return (
            f"no document could be read: {first['file']} {first['position']}: {first['reason']} "
            f"({first['detail']}); all {sum(self.bad.values())} reasons are in {path}"
        )
