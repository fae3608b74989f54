"""Batches of pairs as the losses of preferences take them, and what an evaluation on pairs adds up to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5style import console, run_dir
from t5style.data.pipeline import Batch, BatchSource, empty_batch

LOOKED_AT = 2048  # pairs, by check

# Arrays beside the model's own that a loss may ask for: a row of each.
EXTRAS: dict[str, np.ndarray] = {
    "desirable": np.zeros(1, np.int32),
    "margin": np.zeros(1, np.float32),
    "reference_log_likelihoods": np.zeros((1, 2), np.float32),
}


def example(lengths: Mapping[str, int], extras: Sequence[str] = ()) -> Batch:
    """One pair of padding, for a program's shapes and dtypes; extras: names from EXTRAS."""
    rows = {name: value[:, None].repeat(2, axis=1) for name, value in empty_batch(1, lengths).items()}
    return {**rows, **{name: EXTRAS[name] for name in extras}}  # [1, length] -> [1, 2, length]


@dataclasses.dataclass
class PairSource:
    """A BatchSource of pairs whose batches hold exactly what a program was compiled for.

    Attributes:
      source: whose arrays of tokens are [pairs, 2, length], with `example` int32 [pairs].
      extras: what a batch also has, names from EXTRAS; a margin that the store does not have is 0.
      reference: log-likelihoods of the reference model by example, f32 [examples, 2]; set once known.
      use_margins: False: a margin is 0 although the store has one.
      room: empty places behind every row of the decoder.
    """

    source: BatchSource
    extras: tuple[str, ...] = ()
    reference: np.ndarray | None = None
    use_margins: bool = True
    room: int = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "source":  # while it is being copied there is no source yet
            raise AttributeError(name)
        return getattr(self.source, name)

    def batch_at(self, n: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """See BatchSource.batch_at."""
        return self._finished(self.source.batch_at(n, shard, num_shards))

    def evaluation_batch_at(self, n: int, shard: int = 0, num_shards: int = 1) -> Batch:
        """See BatchSource.evaluation_batch_at."""
        return self._finished(self.source.evaluation_batch_at(n, shard, num_shards))

    # These read `self.batch_at` and `self.evaluation_batch_at`.
    iter = BatchSource.iter
    evaluation_iter = BatchSource.evaluation_iter

    def _finished(self, batch: Batch) -> Batch:
        examples = batch["example"]
        behind = ((0, 0), (0, 0), (0, self.room))
        made = {name: value for name, value in batch.items() if name.startswith("encoder_")}
        made |= {name: np.pad(value, behind) for name, value in batch.items() if name.startswith("decoder_")}
        for name in self.extras:
            if name == "reference_log_likelihoods":
                assert self.reference is not None
                made[name] = self.reference[examples]
            else:
                empty = np.repeat(EXTRAS[name], len(examples), axis=0)
                known = name != "margin" or self.use_margins
                made[name] = batch.get(name, empty).astype(empty.dtype) if known else empty
        return made


def check(source: PairSource) -> None:
    """Looks whether a source's first `LOOKED_AT` pairs, cut to their lengths, can be told apart.

    Raises:
      UserError: none of them can.
    """
    same = found = 0
    for n in range(min(source.evaluation_batches, -(-LOOKED_AT // source.batch_size))):
        batch = source.source.evaluation_batch_at(n)
        tokens = (batch["decoder_loss_weights"] > 0).sum(axis=2)  # [pairs, 2]
        real = np.all(tokens > 0, axis=1)
        targets = batch["decoder_target_tokens"]
        same += int((real & np.all(targets[:, 0] == targets[:, 1], axis=1)).sum())
        found += int(real.sum())
    name = ", ".join(task.name for task in source.tasks)
    if same == found:
        raise run_dir.UserError(
            f"task {name!r}: in none of the {found} pairs that were looked at does the rejected answer "
            f"differ from the chosen one, cut to the lengths {source.lengths}: raise the lengths, or look at "
            "the data."
        )
    if same:
        console.say(
            f"WARNING: in {same} of {found} pairs of task {name!r} that were looked at both answers are the "
            "same, as they are or cut to their lengths: nothing is learnt from these"
        )


Evaluate = Callable[[Any, Callable[[], bool]], dict[str, float] | None]


def counting_pairs(evaluate: Evaluate, names: Sequence[str], accuracies: Sequence[str]) -> Evaluate:
    """An evaluation whose weight of losses is called 'pairs', with standard errors of its accuracies.

    Args:
      evaluate: see train.loop.Loop.
      names: tasks.
      accuracies: metrics that are shares of pairs; each gets one named '<accuracy>_error' beside it.
    """

    def counted(params: Any, stopping: Callable[[], bool]) -> dict[str, float] | None:
        figures = evaluate(params, stopping)
        if figures is None:
            return None
        for name in names:
            pairs = figures[f"eval/{name}/pairs"] = figures.pop(f"eval/{name}/tokens")
            for accuracy in accuracies:
                share = figures.get(f"eval/{name}/{accuracy}")
                if share is not None:
                    error = math.sqrt(max(share * (1.0 - share), 0.0) / pairs) if pairs else math.nan
                    figures[f"eval/{name}/{accuracy}_error"] = error
        return figures

    return counted
