"""A teacher's most probable tokens on disk: written once for the rows of a run, found by what is in a row.

For each target of a row, ids of the k most probable tokens at a temperature, their log-probabilities, and
that of all others together (distill.DistillationLoss says what is made of it). A row is found by a digest of
its arrays, so
that any batch that holds it finds it: another epoch's, another batch size's, another student's. A run that
has rows which are not there yet writes them first, and goes on where it was stopped:

    manifest.json       whose logits these are (Identity), and which runs' rows are all there
    00000.ids.npy       int32 [targets, k]
    00000.log_probs.npy f32 [targets, k + 1]
    00000.rows.npz      the part's rows: digests uint8 [rows, 16], targets of each int64 [rows]; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from t5style import console, run_dir
from t5style.data.pipeline import Batch, BatchSource
from t5style.models.config import TransformerConfig
from t5style.run_dir import UserError
from t5style.train import likelihood
from t5style.tune.divergences import with_rest

FORMAT = 1
MANIFEST = "manifest.json"
PART_TARGETS = 1 << 15  # targets of a part: 17 MB at 64 tokens
Find = Callable[[Mapping[str, np.ndarray]], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Identity:
    """Whose logits they are. teacher: fingerprint of its files; the rest: see distill.Distill."""

    teacher: str
    vocab_size: int
    top_k: int
    temperature: float

    @classmethod
    def of(cls, teacher: str, vocab_size: int, top_k: int, temperature: float) -> Identity:
        """That of the teacher in a file or folder."""
        if top_k >= vocab_size:
            raise UserError(
                f"top_k is {top_k}, but the teacher has {vocab_size} tokens: keep fewer, or leave the cache "
                "out"
            )
        return cls(run_dir.path_fingerprint(teacher), vocab_size, top_k, float(temperature))


def finder(config: TransformerConfig, top_k: int, temperature: float) -> Callable[..., Any]:
    """The jitted find(params, batch) -> (ids int32 `[rows, length, k]`, log-probabilities f32 `[rows, length,
    k + 1]`, those of all other tokens together last).
    """

    def find(params: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, _ = likelihood.hidden_states(config, params, batch, None)
        logits = likelihood.logits(config, params, hidden) / temperature  # [rows · length, vocab]
        _, ids = jax.lax.top_k(logits, top_k)
        shape = batch["decoder_target_tokens"].shape
        return ids.reshape(*shape, -1), with_rest(logits, ids).reshape(*shape, -1)

    return jax.jit(find)


def with_places(batch: Batch, top_k: int) -> Batch:
    """The batch with room for a teacher: `teacher_ids` and `teacher_log_probs`, zeros."""
    shape = batch["decoder_target_tokens"].shape
    return batch | {
        "teacher_ids": np.zeros((*shape, top_k), np.int32),
        "teacher_log_probs": np.zeros((*shape, top_k + 1), np.float32),
    }


def digests(batch: Mapping[str, np.ndarray]) -> list[bytes]:
    """16 bytes for each row, of all its arrays."""
    names = sorted(batch)
    return [
        hashlib.blake2b(b"".join(batch[name][row].tobytes() for name in names), digest_size=16).digest()
        for row in range(len(batch[names[0]]))
    ]


class Kept:
    """The folder; made by `open`."""

    def __init__(self, folder: epath.Path, identity: Identity, complete: dict[str, int]) -> None:
        self.folder, self.identity, self.complete = folder, identity, complete
        self._places: dict[bytes, tuple[int, int, int]] = {}  # digest -> (part, first target, targets)
        self._opened: dict[tuple[int, str], np.ndarray] = {}
        self._parts = 0
        while (index := folder / f"{self._parts:05d}.rows.npz").exists():
            with np.load(io.BytesIO(index.read_bytes())) as held:
                self._take(held["digests"], held["targets"])

    @classmethod
    def open(cls, folder: str, identity: Identity) -> Kept:
        """The logits in a folder, or a new folder for them.

        Raises:
          UserError: they are of another teacher, or made with other settings.
        """
        place = epath.Path(folder)
        file = place / MANIFEST
        if not file.exists():
            return cls(place, identity, {})
        held = json.loads(file.read_text())
        theirs = held.get("identity", {})
        for name, ours in dataclasses.asdict(identity).items():
            if theirs.get(name) != ours or held.get("format") != FORMAT:
                raise UserError(
                    f"the teacher's logits in {folder} were made with {name} {theirs.get(name)}, this run "
                    "has "
                    f"{ours}: choose another folder as cache, or delete this one"
                )
        return cls(place, identity, dict(held["complete"]))

    def _take(self, rows: np.ndarray, targets: np.ndarray) -> None:
        ends = np.cumsum(targets)
        for row, end, count in zip(rows, ends.tolist(), targets.tolist(), strict=True):
            self._places.setdefault(row.tobytes(), (self._parts, end - count, count))
        self._parts += 1

    def __len__(self) -> int:
        return len(self._places)

    # --- writing ---

    def covers(self, fingerprint: str, seed: int, steps: int) -> bool:
        """Whether all rows of the first `steps` batches of a source are there."""
        return self.complete.get(f"{fingerprint}-{seed}", 0) >= steps

    def fill(self, source: BatchSource, seed: int, steps: int, find: Find) -> None:
        """Writes the rows of the first batches of a source that are not there yet.

        Args:
          source: whose batches; seed: its seed.
          steps: how many.
          find: batch -> what `finder` finds, on any devices.

        Raises:
          UserError: several processes would have to do it.
        """
        if run_dir.has_company():
            raise UserError(
                f"the teacher's logits in {self.folder} are not complete, and a run of several processes "
                "does not "
                "write them: fill the cache with one process, or leave it out"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_manifest()
        ids: list[np.ndarray] = []
        log_probs: list[np.ndarray] = []
        rows: list[bytes] = []

        def write() -> None:
            if not rows:
                return
            name = f"{self._parts:05d}"
            targets = np.array([len(each) for each in ids], np.int64)
            _save(self.folder / f"{name}.ids.npy", np.concatenate(ids))
            _save(self.folder / f"{name}.log_probs.npy", np.concatenate(log_probs))
            file = io.BytesIO()
            found = np.frombuffer(b"".join(rows), np.uint8).reshape(-1, 16)
            np.savez(file, digests=found, targets=targets)
            run_dir.atomic_write(self.folder / f"{name}.rows.npz", file.getvalue())
            self._take(found, targets)
            for held in (ids, log_probs, rows):
                held.clear()

        done = min(self.complete.get(f"{source.fingerprint}-{seed}", 0), steps)
        with (
            console.progress("teacher's logits", steps, "batches", start=done) as bar,
            source.iter(done) as batches,
        ):
            for _ in range(done, steps):
                batch = next(batches)
                keys = digests(batch)
                waiting = set(rows)
                new = [i for i, key in enumerate(keys) if key not in self._places and key not in waiting]
                if new:
                    found, values = jax.device_get(find(batch))
                    for row in new:
                        if keys[row] in rows:  # twice in this batch
                            continue
                        wanted = batch["decoder_loss_weights"][row] > 0
                        ids.append(np.asarray(found)[row][wanted])
                        log_probs.append(np.asarray(values, np.float32)[row][wanted])
                        rows.append(keys[row])
                if sum(map(len, ids)) >= PART_TARGETS:
                    write()
                bar.advance(rows=len(self) + len(rows))
        write()
        self.complete[f"{source.fingerprint}-{seed}"] = steps
        self._write_manifest()

    def _write_manifest(self) -> None:
        held = {"format": FORMAT, "identity": dataclasses.asdict(self.identity), "complete": self.complete}
        run_dir.atomic_write(self.folder / MANIFEST, json.dumps(held, indent=1) + "\n")

    # --- reading ---

    def add(self, batch: Batch) -> Batch:
        """The batch with the teacher's tokens in it.

        Raises:
          UserError: a row is not there.
        """
        full = with_places(batch, self.identity.top_k)
        for row, key in enumerate(digests(batch)):
            wanted = batch["decoder_loss_weights"][row] > 0
            if not wanted.any():
                continue
            place = self._places.get(key)
            if place is None:
                raise UserError(
                    f"the teacher's logits in {self.folder} lack a row of this run's batches: the folder was "
                    "changed, or the data; delete it, and it is made anew"
                )
            part, first, count = place
            for name, what in (("teacher_ids", "ids"), ("teacher_log_probs", "log_probs")):
                full[name][row][wanted] = self._part(part, what)[first : first + count]
        return full

    def _part(self, part: int, what: str) -> np.ndarray:
        if (part, what) not in self._opened:
            place = self.folder / f"{part:05d}.{what}.npy"
            local = run_dir.is_local(place)
            self._opened[part, what] = (
                np.load(place, mmap_mode="r") if local else np.load(io.BytesIO(place.read_bytes()))
            )
        return self._opened[part, what]


def _save(place: epath.Path, array: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, array)
    run_dir.atomic_write(place, file.getvalue())


class WithTeacher(BatchSource):
    """Batches with a teacher's most probable tokens in them.

    Args:
      kept: the folder that has them.
      *arguments: BatchSource's.
    """

    def __init__(self, kept: Kept, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._kept = kept

    @property
    def fingerprint(self) -> str:
        """See BatchSource.fingerprint."""
        return run_dir.fingerprint([super().fingerprint, dataclasses.asdict(self._kept.identity)])

    def batch_at(self, n: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """See BatchSource.batch_at."""
        return self._kept.add(super().batch_at(n, shard, num_shards))
