"""A reference model's log-likelihoods of all pairs, computed once and kept beside the run."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from t5style import console, run_dir
from t5style.data.pipeline import Batch, ReadAhead
from t5style.parallel import rules
from t5style.tune.pairs import PairSource

SAVE_SECONDS = 20.0  # what a kill costs at most; the file of a million pairs has 8 MB

# batch on the mesh -> (example [pairs], log-likelihoods f32 [pairs, 2], tokens f32 [pairs, 2])
Compute = Callable[[Any], tuple[jax.Array, jax.Array, jax.Array]]


def table(
    path: epath.Path, fingerprint: str, source: PairSource, mesh: Mesh, compute: Callable[[], Compute]
) -> np.ndarray:
    """Log-likelihoods of chosen and rejected answers by example, f32 [examples, 2], NaN for those that the
    source leaves out.

    What the file at `path` has is not computed again, if it was made of the same.

    Args:
      path: of the file, .npz.
      fingerprint: of the model and of all that decides its answers' log-likelihoods but the batches.
      source: the pairs of one task and split.
      mesh: of the devices.
      compute: makes the function of a batch; called only if something is missing.
    """
    batches, [name] = source.evaluation_batches, [task.name for task in source.tasks]
    fingerprint = run_dir.fingerprint([fingerprint, source.fingerprint, batches])
    values = np.full((int(source.statistics[name]["examples"]), 2), np.nan, np.float32)
    first = 0
    if path.exists():
        first, known = _read(path, fingerprint)
        values = values if known is None else known
    if first == batches:
        console.say(f"reference log-likelihoods of {len(values)} pairs: {path}, as computed before")
        return values
    run_dir.barrier("reference log-likelihoods are read")  # before the first process writes them anew
    function = compute()
    shard, shards = rules.host_shard(mesh)
    saved = time.monotonic()

    def make(n: int) -> Batch:
        return source.source.evaluation_batch_at(n, shard, shards)

    with (
        ReadAhead(make, first, batches, 2, 1) as read,
        console.progress("reference", total=batches, unit="batches", start=first) as bar,
    ):
        for n, batch in enumerate(read, first):
            examples, found, tokens = jax.device_get(function(rules.put_batch(batch, mesh)))
            real = (tokens > 0).all(axis=1)
            if not np.isfinite(found[real]).all():
                raise run_dir.UserError(
                    f"the reference model gives a pair of batch {n} of task {name!r} no finite "
                    "log-likelihood: the model, or its conversion, is broken."
                )
            values[examples[real]] = found[real]
            bar.advance(1)
            if n + 1 == batches or time.monotonic() - saved > SAVE_SECONDS:
                _write(path, fingerprint, n + 1, values)
                saved = time.monotonic()
    run_dir.barrier("reference log-likelihoods are written")
    return values


def _read(path: epath.Path, fingerprint: str) -> tuple[int, np.ndarray | None]:
    """Batches done and values; 0 and None where the file is of something else, or damaged."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            same = str(stored["fingerprint"]) == fingerprint
            if same:
                return int(stored["batches"]), stored["values"]
        console.say(f"{path} was made of another model or other pairs: computed anew")
    except (ValueError, OSError, KeyError, EOFError) as error:
        console.say(f"WARNING: {path} cannot be read ({error}): computed anew")
    except Exception as error:  # zipfile has an error of its own, not a ValueError
        console.say(f"WARNING: {path} is damaged ({error}): computed anew")
    return 0, None


def _write(path: epath.Path, fingerprint: str, batches: int, values: np.ndarray) -> None:
    if run_dir.is_main_process():
        data = io.BytesIO()
        np.savez(data, fingerprint=fingerprint, batches=batches, values=values)
        run_dir.atomic_write(path, data.getvalue())
