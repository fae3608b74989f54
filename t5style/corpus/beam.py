"""Apache Beam as the engine of Prepare, for corpora that outgrow a machine (`pip install t5style[beam]`).

    prepare.Prepare.engine = @beam.Beam()
    beam.Beam.options = ['--runner=DataflowRunner', '--project=...', '--region=...', '--temp_location=gs://...']
    beam.Beam.folder = 'gs://bucket/tmp'

The passes, the keys and the shards are those of the local engine: each chunk is an element, and equal keys
meet in a GroupByKey. So the run folder, the sources and `folder` must be where all of Beam's workers can
reach them. The process that starts the pipelines holds about 150 bytes per document.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5style.corpus.engines import ENTRY, ENTRY_FIELDS, Entries, Keys
from t5style.run_dir import UserError

# Beam's own choice for a single machine, "DirectRunner", first tries to download another runner.
_IN_PROCESS = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_BATCH = 100_000  # pairs or entries in a file
_FIRST = np.dtype([*ENTRY.descr, ("first", "?")])


@dataclasses.dataclass(frozen=True)
class Beam:
    """Does the work in pipelines of Apache Beam.

    Attributes:
      options: of the pipelines, as on Beam's command line. Without --runner they run in this process.
      folder: for what passes between the pipelines and this process; a new one in the machine's own temporary
        folder if empty.
    """

    options: Sequence[str] = ()
    folder: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.options, str):
            raise UserError(f"Beam.options must be a list, not the string {self.options!r}")
        runner = next((o for o in self.options if o.startswith("--runner")), "")
        if runner and not self.folder and not any(name in runner for name in ("Direct", "FnApi", "Prism")):
            raise UserError(
                f"Beam.folder must name a folder that the workers of {runner} can reach (gs://...)"
            )

    def each(self, work: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Does the work for all tasks, each an element of one pipeline."""
        folder = self._new_folder()
        try:
            beam = _beam()
            with self._pipeline() as pipeline:
                elements = pipeline | beam.Create(list(enumerate(tasks))) | beam.Reshuffle()
                _ = elements | beam.Map(functools.partial(_do, work=work, folder=os.fspath(folder)))
            for index in range(len(tasks)):
                result = pickle.loads((folder / f"{index}.pickle").read_bytes())
                if isinstance(result, UserError):
                    raise result
                yield index, result
        finally:
            folder.rmtree()

    def close(self) -> None:
        """Holds nothing between its pipelines."""

    def pairs(self, keys: Keys) -> Iterator[np.ndarray]:
        """Pairs of documents that connect all those of the same keys."""
        yield from self._grouped(functools.partial(_keyed, keys=keys), _link, keys.chunks)

    def repeats(self, entries: Entries, folder: epath.Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All entries whose key occurs more than once, and which of them are the first of theirs."""
        for found in self._grouped(functools.partial(_parts, entries=entries), _rows, entries.chunks):
            yield found[ENTRY_FIELDS].astype(ENTRY), found["first"]

    def _grouped(self, emit: Any, reduce: Any, chunks: int) -> Iterator[np.ndarray]:
        """Groups what `emit` yields for each chunk by key; the arrays that `reduce` makes of groups."""
        folder = self._new_folder()
        try:
            beam = _beam()
            with self._pipeline() as pipeline:
                groups = (
                    pipeline
                    | beam.Create(range(chunks))
                    | beam.Reshuffle()
                    | beam.FlatMap(emit)
                    | beam.GroupByKey()
                )
                batches = (
                    groups
                    | beam.FlatMap(reduce)
                    | beam.BatchElements(min_batch_size=1000, max_batch_size=_BATCH)
                )
                _ = batches | beam.Map(functools.partial(_save, folder=os.fspath(folder)))
            for path in sorted(folder.iterdir()):
                with path.open("rb") as file:
                    yield np.load(file)
        finally:
            folder.rmtree()

    def _pipeline(self) -> Any:
        from apache_beam.options.pipeline_options import PipelineOptions

        options = list(self.options)
        if not any(option.startswith("--runner") for option in options):
            options.append(f"--runner={_IN_PROCESS}")
        return _beam().Pipeline(options=PipelineOptions(options))

    def _new_folder(self) -> epath.Path:
        if not self.folder:
            return epath.Path(tempfile.mkdtemp(prefix="t5style-beam-"))
        folder = epath.Path(self.folder) / uuid.uuid4().hex
        folder.mkdir(parents=True)
        return folder


def _beam() -> Any:
    try:
        import apache_beam
    except ImportError as error:
        raise UserError("the Beam engine needs Apache Beam: pip install 't5style[beam]'") from error
    return apache_beam


def _do(element: tuple[int, Any], work: Callable[[Any], Any], folder: str) -> None:
    index, task = element
    try:
        result = work(task)
    except UserError as error:  # Beam would try again, and then say it among its own errors
        result = error
    path = epath.Path(folder) / f"{index}.pickle"
    temporary = path.parent / f"{index}.{uuid.uuid4().hex}"  # Beam may do an element twice
    temporary.write_bytes(pickle.dumps(result))
    temporary.replace(path)


def _keyed(chunk: int, keys: Keys) -> Iterator[tuple[bytes, int]]:
    numbers, values = keys.chunk(chunk)
    for band, rows in enumerate(keys.bands):
        table = np.ascontiguousarray(values[list(rows)].T)
        for number, key in zip(numbers.tolist(), table, strict=True):
            yield b"%d " % band + key.tobytes(), number


def _link(group: tuple[bytes, Iterable[int]]) -> Iterator[tuple[int, int]]:
    first, *others = sorted(group[1])
    return ((first, other) for other in others)


def _parts(chunk: int, entries: Entries) -> Iterator[tuple[int, tuple[int, int]]]:
    for key, document, unit in entries.chunk(chunk).tolist():
        yield key, (document, unit)


def _rows(group: tuple[int, Iterable[tuple[int, int]]]) -> Iterator[tuple[int, int, int, bool]]:
    key, members = group
    places = sorted(members)
    if len(places) > 1:
        yield from ((key, *place, index == 0) for index, place in enumerate(places))


def _save(batch: Sequence[Any], folder: str) -> None:
    array = np.array(batch, _FIRST if len(batch[0]) == 4 else np.int64)
    with (epath.Path(folder) / f"{uuid.uuid4().hex}.npy").open("wb") as file:
        np.save(file, array)
