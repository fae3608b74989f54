"""The batch at step n, a pure function of (fingerprint, seed, n).

    rows     each task has a number of rows in an epoch: its windows, or its packed examples
    order    grain: a seeded permutation of every epoch's rows, or the task's own order; tasks interleaved by
             their rates
    content  NumPy: the rows of a batch are read, corrupted, and laid out together
    hosts    last: host i of N makes the rows i * B/N … (i + 1) * B/N - 1 of the batch, and no others

Nothing depends on what was asked before, so resuming needs the step alone, and the number of hosts may
change.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

import grain
import numpy as np
from grain.experimental import index_shuffle

from t5style import run_dir
from t5style.corpus.vocabulary import Vocabulary
from t5style.data.objectives import DECODER_ONLY, ENCODER_DECODER, Examples, Preferences, Unpaired, spread
from t5style.data.pair_rows import WIDTH, PairRows
from t5style.data.random import seed_of
from t5style.data.rows import TaskRows
from t5style.data.task import Mixture, Task
from t5style.data.token_store import TokenStore

Batch = dict[str, np.ndarray]

# Changes whenever the same settings would give other batches than before.
_VERSION = 2


class BatchSource:
    """Batches of a task or mixture.

    Args:
      task_or_mixture: what to learn.
      split: the task's split.
      batch_size: rows of the global batch.
      lengths: places in a row: {"encoder": 512, "decoder": 114}; only "decoder" for a decoder-only model.
      architecture: "encoder_decoder" or "decoder_only".
      seed: of order, windows' offsets and corruption.
      pack: several supervised examples share a row; their segment ids keep them apart.
      shuffle: a new order of rows for every epoch, but where a task has an `order`; and a fixed random one
        for evaluation, so that its first batches are a fair sample of the split. False keeps the store's
        order, or the task's.

    Raises: UserError for a missing or unfinished store, an empty split, or stores of different vocabularies;
      ValueError for lengths that do not fit the objective.
    """

    def __init__(
        self,
        task_or_mixture: Task | Mixture,
        split: str,
        batch_size: int,
        lengths: Mapping[str, int],
        architecture: str = ENCODER_DECODER,
        seed: int = 0,
        pack: bool = True,
        shuffle: bool = True,
    ) -> None:
        if architecture not in (ENCODER_DECODER, DECODER_ONLY):
            raise ValueError(
                f"architecture is {architecture!r}; it must be {ENCODER_DECODER!r} or {DECODER_ONLY!r}."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.task = task_or_mixture
        self.tasks = (
            tuple(task_or_mixture.tasks) if isinstance(task_or_mixture, Mixture) else (task_or_mixture,)
        )
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.architecture, self.pack, self.shuffle = architecture, pack, shuffle
        sides = ("decoder",) if architecture == DECODER_ONLY else ("encoder", "decoder")
        self.lengths = {side: int(lengths.get(side, 0)) for side in sides}
        for side, length in self.lengths.items():
            if length < 1:
                raise ValueError(f"lengths[{side!r}] is {length}; a {architecture} model needs at least 1.")
        stores: dict[str, TokenStore] = {}
        for task in self.tasks:
            if task.store not in stores:
                stores[task.store] = TokenStore.open(task.store)
        first = self.tasks[0]
        self.vocabulary: Vocabulary = stores[first.store].vocabulary
        for task in self.tasks[1:]:
            ours, theirs = (
                stores[first.store].vocabulary_fingerprint,
                stores[task.store].vocabulary_fingerprint,
            )
            if ours != theirs:
                raise run_dir.UserError(
                    f"Task {task.name!r} has a store of vocabulary {theirs}, task {first.name!r} of "
                    f"{ours}; tokenize "
                    "both with one vocabulary."
                )
        kinds = {type(task.objective) if _compares(task) else None for task in self.tasks}
        if len(kinds) > 1:
            raise ValueError(
                "A mixture of tasks that compare answers and of others has no batches: their arrays differ. "
                "Learn them one after the other."
            )
        self._rows = [
            (PairRows if _compares(task) else TaskRows)(
                task,
                stores[task.store],
                split,
                self.lengths,
                architecture,
                seed_of(seed, task.name),
                pack,
                shuffle,
            )
            for task in self.tasks
        ]
        self.rates = (
            task_or_mixture.proportions([rows.num_examples for rows in self._rows])
            if isinstance(task_or_mixture, Mixture)
            else [1.0]
        )
        self._order = self._make_order()

    def _make_order(self) -> grain.MapDataset:
        """Element n says where row n of training comes from: (task, epoch * rows of the task + row)."""
        orders = []
        for number, (task, rows) in enumerate(zip(self.tasks, self._rows, strict=True)):
            order = grain.MapDataset.range(rows.train_rows).map_with_index(_Place(number))
            if rows.ordered_epochs < math.inf:
                # grain adds the epoch to the seed: unrelated seeds must not be neighbours.
                order = order.shuffle(seed=seed_of(self.seed, task.name, "order") & 0xFFFFFFFF)
            order = order.repeat(None)
            if rows.ordered_epochs == 1:
                order = order.map_with_index(_FirstInOrder(number, rows.train_rows))
            orders.append(order)
        return grain.MapDataset.mix(orders, weights=self.rates) if len(orders) > 1 else orders[0]

    # ------------------------------------------------------------------------------------------- what it is

    @property
    def fingerprint(self) -> str:
        """16 hex digits for everything but the seed that decides the batches: tokens, objectives, rates,
        lengths, batch size, and the shuffle's algorithm (so that another version of grain cannot change the
        order unseen).
        """
        config = {
            "version": _VERSION,
            "tasks": [
                [
                    *(task.name, rows.store.fingerprint, rows.split),
                    *(run_dir.canonical(task.objective), *rows.order_identity),
                ]
                for task, rows in zip(self.tasks, self._rows, strict=True)
            ],
            "rates": self.rates,
            "lengths": self.lengths,
            "architecture": self.architecture,
            "batch_size": self.batch_size,
            "pack": self.pack,
            "shuffle": self.shuffle,
            "order": [index_shuffle(i, max_index=99_999, seed=7, rounds=4) for i in range(8)],
        }
        return run_dir.fingerprint(config)

    @property
    def examples_per_epoch(self) -> int:
        """Windows, or supervised examples, seen when every task's rows are seen once."""
        return sum(rows.examples_per_epoch for rows in self._rows)

    @property
    def batches_per_epoch(self) -> float:
        """Steps in which every row of all tasks could be seen once. In a mixture, single tasks are seen more
        or less often than that, by their rates.
        """
        return sum(rows.train_rows for rows in self._rows) / self.batch_size

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        """For each task: examples, rows, rate, packing efficiency, and examples cut or dropped for their
        length.
        """
        return {
            task.name: {"rate": rate, **rows.statistics}
            for task, rate, rows in zip(self.tasks, self.rates, self._rows, strict=True)
        }

    # --------------------------------------------------------------------------------------------- training

    def batch_at(self, n: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """Batch n, or host `shard`'s rows of it.

        Returns: int32 [batch_size / num_shards, length] for each of `decoder_input_tokens`,
          `decoder_target_tokens`, `decoder_loss_weights`, `decoder_segment_ids`, `decoder_positions`, and
          for an encoder-decoder `encoder_input_tokens`, `encoder_segment_ids`, `encoder_positions`. Segment
          ids are 0 for padding and count a row's examples from 1; positions restart with each segment.
          Of answers to compare (objectives.Preferences, Unpaired) [batch_size / num_shards, 2, length] of
          each, `example` int32 [batch_size / num_shards], and of Unpaired `desirable`, likewise.
        """
        share = self._share(shard, num_shards)
        if n < 0:
            raise ValueError(f"Batch {n} was asked for; batches are numbered from 0.")
        start = n * self.batch_size + shard * share
        return self._content([self._order[row] for row in range(start, start + share)], share, finite=False)

    def iter(
        self, start: int = 0, shard: int = 0, num_shards: int = 1, prefetch: int = 4, threads: int = 1
    ) -> ReadAhead:
        """Batches start, start + 1, … without end, made ahead of time in background threads."""
        self._share(shard, num_shards)
        return ReadAhead(lambda n: self.batch_at(n, shard, num_shards), start, None, prefetch, threads)

    # ------------------------------------------------------------------------------------------- evaluation

    @property
    def evaluation_batches(self) -> int:
        """Batches that hold every row of the split once."""
        return -(-sum(rows.finite_rows for rows in self._rows) // self.batch_size)

    def evaluation_batch_at(self, n: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """Batch n of the split read once, tasks one after the other. The last batch is filled up with empty
        rows, whose loss weights and segment ids are 0.
        """
        share = self._share(shard, num_shards)
        if not 0 <= n < self.evaluation_batches:
            raise ValueError(f"Evaluation batch {n} was asked for; there are {self.evaluation_batches}.")
        start = n * self.batch_size + shard * share
        ends = np.cumsum([rows.finite_rows for rows in self._rows]).tolist()
        places = []
        for row in range(start, min(start + share, ends[-1])):
            task = int(np.searchsorted(ends, row, side="right"))
            places.append((task, self._evaluation_row(task, row - (ends[task - 1] if task else 0))))
        return self._content(places, share, finite=True)

    def _evaluation_row(self, task: int, place: int) -> int:
        """Which of the task's rows stands at a place of its evaluation order."""
        if not self.shuffle:
            return place
        seed = seed_of(self.seed, self.tasks[task].name, "evaluation order") & 0xFFFFFFFF
        return int(index_shuffle(place, max_index=self._rows[task].finite_rows - 1, seed=seed, rounds=4))

    def evaluation_iter(
        self, shard: int = 0, num_shards: int = 1, prefetch: int = 2, max_batches: int | None = None
    ) -> ReadAhead:
        """Every row of the split once (the first `max_batches` batches of it), made ahead of time."""
        self._share(shard, num_shards)
        stop = self.evaluation_batches if max_batches is None else min(max_batches, self.evaluation_batches)
        return ReadAhead(lambda n: self.evaluation_batch_at(n, shard, num_shards), 0, stop, prefetch, 1)

    # ---------------------------------------------------------------------------------------------- content

    def _share(self, shard: int, num_shards: int) -> int:
        if num_shards < 1 or self.batch_size % num_shards:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be divided among {num_shards} hosts; "
                f"choose a multiple of {num_shards}."
            )
        if not 0 <= shard < num_shards:
            raise ValueError(f"shard is {shard}; it must be from 0 to {num_shards - 1}.")
        return self.batch_size // num_shards

    def _content(self, places: list[tuple[int, int]], num_rows: int, finite: bool) -> Batch:
        tasks = np.array([task for task, _ in places], np.int64)
        rows = np.array([row for _, row in places], np.int64)
        width = WIDTH if _compares(self.tasks[0]) else 1
        batch = empty_batch(num_rows * width, self.lengths)
        also: Batch = {}
        for task in np.unique(tasks):
            where = np.flatnonzero(tasks == task)
            lines = (where[:, None] * width + np.arange(width)).reshape(-1)  # [rows, width] -> flat
            for examples, owner in self._rows[task].read(rows[where], finite):
                lay_out(batch, examples, lines[owner], self.vocabulary.bos_id)
            for name, values in self._rows[task].also(rows[where]).items():
                also.setdefault(name, np.zeros(num_rows, values.dtype))[where] = values
        if width > 1:  # [rows · 2, length] -> [rows, 2, length]
            batch = {name: array.reshape(num_rows, width, -1) for name, array in batch.items()}
        return batch | also


def _compares(task: Task) -> bool:
    return isinstance(task.objective, Preferences | Unpaired)


@dataclasses.dataclass(frozen=True)
class _Place:
    """grain passes the index of all epochs; the element itself, the index within the epoch, is not needed."""

    task: int

    def __call__(self, index: int, element: int) -> tuple[int, int]:
        return self.task, index


@dataclasses.dataclass(frozen=True)
class _FirstInOrder:
    """The rows of the first epoch one after the other, those of later epochs as they are."""

    task: int
    rows: int

    def __call__(self, index: int, element: tuple[int, int]) -> tuple[int, int]:
        return (self.task, index) if index < self.rows else element


def empty_batch(rows: int, lengths: Mapping[str, int]) -> Batch:
    """A batch of padding: zeros, int32 [rows, length]."""
    names = ["input_tokens", "segment_ids", "positions"]
    batch: Batch = {}
    for side, length in lengths.items():
        extra = ["target_tokens", "loss_weights"] if side == "decoder" else []
        batch |= {f"{side}_{name}": np.zeros((rows, length), np.int32) for name in [*names, *extra]}
    return batch


def flat(batch: Mapping[str, np.ndarray]) -> Batch:
    """The arrays of tokens as rows, int32 [rows, length]: of answers to compare [pairs, 2, length] one behind
    the other; other arrays are left out.
    """
    return {name: values.reshape(-1, values.shape[-1]) for name, values in batch.items() if values.ndim > 1}


def lay_out(batch: Batch, examples: Examples, rows: np.ndarray, bos_id: int) -> None:
    """Writes examples into their rows of the batch, one behind the other.

    Args:
      batch: arrays int32 [rows, length], zeros where nothing is yet.
      examples: flat tokens.
      rows: int64 [examples], ascending: the row of each example.
      bos_id: what stands before an example's first target, unless the example says otherwise.
    """
    if not len(rows):
        return
    new_row = np.r_[True, rows[1:] != rows[:-1]]
    first_of_row = np.maximum.accumulate(np.where(new_row, np.arange(len(rows)), 0))
    segments = (np.arange(len(rows)) - first_of_row + 1).astype(np.int32)

    def places(lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where each token goes in the flat [rows * width] array, its segment and its position."""
        before = np.cumsum(lengths) - lengths
        column = before - before[first_of_row]
        if (column + lengths > width).any():
            raise ValueError(
                f"Examples of {int((column + lengths).max())} tokens do not fit a row of {width}."
            )
        position = spread(np.zeros_like(lengths), lengths)
        return spread(rows * width + column, lengths), np.repeat(segments, lengths), position

    def put(name: str, where: np.ndarray, values: np.ndarray) -> None:
        batch[name].reshape(-1)[where] = values  # [rows, length] seen as [rows * length]

    if "encoder_input_tokens" in batch:
        where, segment, position = places(examples.input_lengths, batch["encoder_input_tokens"].shape[1])
        put("encoder_input_tokens", where, examples.inputs)
        put("encoder_segment_ids", where, segment)
        put("encoder_positions", where, position)
    where, segment, position = places(examples.target_lengths, batch["decoder_input_tokens"].shape[1])
    shifted = np.empty_like(examples.targets)
    shifted[1:] = examples.targets[:-1]
    starts = position == 0
    if examples.first is None:
        shifted[starts] = bos_id
    else:
        shifted[starts] = examples.first[examples.target_lengths > 0]
    put("decoder_input_tokens", where, shifted)
    put("decoder_target_tokens", where, examples.targets)
    put("decoder_loss_weights", where, examples.weights)
    put("decoder_segment_ids", where, segment)
    put("decoder_positions", where, position)


class ReadAhead(Iterator[Batch]):
    """Batches made ahead of time by threads, handed out in order. Use as a context manager, or call `close`.

    Args:
      make: number → batch.
      start, stop: first number, and the one after the last (None: without end).
      prefetch: batches kept ready.
      threads: NumPy lets go of the interpreter lock in its larger operations, so more than one helps a
        little.
    """

    def __init__(
        self, make: Callable[[int], Batch], start: int, stop: int | None, prefetch: int, threads: int
    ) -> None:
        if prefetch < 1 or threads < 1:
            raise ValueError(f"prefetch is {prefetch} and threads {threads}; both must be at least 1.")
        self._make, self._next, self._stop = make, start, stop
        self._pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="t5style-batches")
        self._pending: collections.deque[tuple[int, concurrent.futures.Future[Batch]]] = collections.deque()
        self._closed = False
        for _ in range(prefetch):
            self._submit()

    def _submit(self) -> None:
        if self._stop is None or self._next < self._stop:
            self._pending.append((self._next, self._pool.submit(self._make, self._next)))
            self._next += 1

    def __next__(self) -> Batch:
        """Raises RuntimeError, naming the batch, where making it failed (UserErrors stay what they are)."""
        if self._closed:
            raise ValueError("This batch iterator is closed.")
        if not self._pending:
            self.close()
            raise StopIteration
        number, future = self._pending.popleft()
        try:
            batch = future.result()
        except run_dir.UserError as error:
            self.close()
            raise run_dir.UserError(f"Batch {number}: {error}") from error
        except Exception as error:
            self.close()
            raise RuntimeError(f"Batch {number} could not be made: {error}") from error
        self._submit()
        return batch

    def __iter__(self) -> ReadAhead:
        return self

    def close(self) -> None:
        """Stops the threads and waits for them. Safe to call again."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
