"""Losses on held-out data between training steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5style.data.pipeline import BatchSource
from t5style.parallel import rules
from t5style.train.program import TrainingProgram

Evaluate = Callable[[Any, Callable[[], bool]], dict[str, float] | None]


def evaluator(
    program: TrainingProgram, sources: Sequence[BatchSource], mesh: Mesh, frozen: Any, max_batches: int | None
) -> Evaluate:
    """(trained parameters, stopping) -> {'eval/<task>/loss': ...}, or None once stopping() is true.

    Args:
      program: whose loss is measured.
      sources: what on, task by task.
      mesh: where.
      frozen: what the program is given beside the state (TrainingProgram.freeze); None for nothing.
      max_batches: of each task, from its beginning; None for all of them.
    """
    compiled = program.eval_step()
    extra = () if frozen is None else (frozen,)

    def step(params: Any, batch: Any) -> Any:
        return compiled(params, batch, *extra)

    shard, shards = rules.host_shard(mesh)

    def evaluate(params: Any, stopping: Callable[[], bool]) -> dict[str, float] | None:
        figures: dict[str, float] = {}
        for source in sources:
            name = source.task.name
            sums: dict[str, np.ndarray] = {}
            with contextlib.closing(
                source.evaluation_iter(shard, shards, max_batches=max_batches)
            ) as batches:
                for metrics in _late(step(params, rules.put_batch(batch, mesh)) for batch in batches):
                    if stopping():
                        return None
                    for metric, pair in metrics.items():
                        sums[metric] = sums.get(metric, np.zeros(2)) + np.asarray(pair, np.float64)
            for metric, (total, weight) in sums.items():
                figures[f"eval/{name}/{metric}"] = float(total / weight) if weight else math.nan
            figures[f"eval/{name}/tokens"] = float(sums["loss"][1])
        return figures

    return evaluate


def _late(results: Iterator[Any]) -> Iterator[Any]:
    """Device results as host arrays, each read after the next is dispatched: the device does not wait for the
    host.
    """
    before: Any = None
    for result in results:
        if before is not None:
            yield jax.device_get(before)
        before = result
    if before is not None:
        yield jax.device_get(before)
