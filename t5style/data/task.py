"""Tasks and mixtures, in seqio's words: what is learned, from which store, and how it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5style.data.objectives import Objective

MetricFn = Callable[[Sequence[Any], Sequence[Any]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to learn.

    Attributes:
      name: shown in metrics (`eval/<name>/loss`), reports and errors.
      store: folder of the token store, or `run:<stage>` inside a workflow.
      objective: what is asked of the tokens.
      splits: the task's split names → the store's (`{"validation": "test"}`); None for the store's own names.
      postprocess: text → what the metrics compare, applied to targets and predictions (seqio:
        `postprocess_fn`).
      metrics: functions (targets, predictions) → {name: value}.
      order: in what order training sees the split `train` (or split → order, for others):
        "": shuffled by the seed, anew for every epoch.
        "stored": as the examples are in the store, in every epoch.
        "curriculum": from easy to hard in the first epoch, as the corpus ordered its documents
        (`order.npy`), afterwards shuffled: the first pass over the data is the curriculum, what follows
        learns from all of it (Bengio et al., "Curriculum learning", 2009, §2).
        "length": the same, from short examples to long ones.
        A path of a .npy file: the same, by the examples' indices in that file, int64 [examples].
        Order is exact: windows are cut from the examples in that order, and rows of packed examples are
        filled in that order, which takes about a third more rows. In a mixture it holds for each task by
        itself.
    """

    name: str
    store: str
    objective: Objective
    splits: Mapping[str, str] | None = None
    postprocess: Callable[[str], Any] | None = None
    metrics: Sequence[MetricFn] = ()
    order: str | Mapping[str, str] = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("A task needs a name that is not empty.")
        for order in [self.order] if isinstance(self.order, str) else self.order.values():
            if order not in ("", "stored", "curriculum", "length") and not order.endswith(".npy"):
                raise ValueError(
                    f"Task {self.name!r} has order {order!r}; it must be '', 'stored', 'curriculum', "
                    "'length', or the path of a .npy file."
                )

    def split_order(self, split: str) -> str:
        """The order in which training sees this split of the task."""
        orders = {"train": self.order} if isinstance(self.order, str) else self.order
        return orders.get(split, "")

    def store_split(self, split: str) -> str:
        """The store's name for the task's split."""
        if self.splits is None:
            return split
        if split not in self.splits:
            raise ValueError(
                f"Task {self.name!r} has no split {split!r}, only {', '.join(map(repr, self.splits))}."
            )
        return self.splits[split]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several tasks at once, each with its share of the rows.

    Attributes:
      tasks: at least one, with different names.
      rates: relative share of each task; None for shares by number of examples (seqio
        `mixing_rate_num_examples`): min(examples, maximum) ** (1 / temperature).
      temperature: 1 keeps the proportions, higher values even them out.
      maximum: no task counts for more examples than this.
    """

    name: str
    tasks: Sequence[Task]
    rates: Sequence[float] | None = None
    temperature: float = 1.0
    maximum: int | None = None

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError(f"Mixture {self.name!r} has no task.")
        if len(set(names)) < len(names):
            raise ValueError(f"Mixture {self.name!r} names a task twice: {', '.join(sorted(names))}.")
        if self.temperature <= 0:
            raise ValueError(f"Mixture {self.name!r} has temperature {self.temperature}; it must be above 0.")
        if self.maximum is not None and self.maximum < 1:
            raise ValueError(f"Mixture {self.name!r} has maximum {self.maximum}; it must be at least 1.")
        if self.rates is None:
            return
        if len(self.rates) != len(names) or min(self.rates) <= 0:
            raise ValueError(
                f"Mixture {self.name!r} has rates {list(self.rates)} for {len(names)} tasks; "
                "give one rate above 0 for each task."
            )
        if self.temperature != 1.0 or self.maximum is not None:
            raise ValueError(
                f"Mixture {self.name!r} has rates and also temperature or maximum; those only scale "
                "shares by number of examples: leave out one or the other."
            )

    def proportions(self, examples: Sequence[int]) -> list[float]:
        """The share of each task's rows, summing to 1, given the tasks' numbers of examples in the split."""
        if self.rates is not None:
            rates = [float(rate) for rate in self.rates]
        else:
            cap = float("inf") if self.maximum is None else float(self.maximum)
            rates = [min(float(count), cap) ** (1.0 / self.temperature) for count in examples]
        return [rate / sum(rates) for rate in rates]
