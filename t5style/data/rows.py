"""One task's rows: which tokens of the store make row k of epoch e, and what the objective makes of them."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from t5style.data import packing
from t5style.data.curriculum import read_order
from t5style.data.objectives import DECODER_ONLY, CausalLM, Chat, Examples, Supervised, Windowed, spread
from t5style.data.random import RowRandom, seed_of
from t5style.data.task import Task
from t5style.data.token_store import TokenStore
from t5style.run_dir import UserError

# grain's shuffle counts rows of an epoch with 32 bits.
_MAX_ROWS = 2**32 - 1


class TaskRows:
    """Rows of one task's split. Row numbers of training count on through the epochs: row r is row r %
    train_rows of epoch r // train_rows. Evaluation ("finite") has its own rows: in the store's order, with
    nothing left out.

    Attributes:
      has_order: the task wants its examples in an order.
      ordered_epochs: the epochs in which training's rows come in order rather than shuffled.
      train_rows, finite_rows: rows of one epoch, and rows that hold everything once.
      num_examples: the store's examples in the split (what a mixture's rates count).
      examples_per_epoch: windows, or supervised examples.
    """

    def __init__(
        self,
        task: Task,
        store: TokenStore,
        split: str,
        lengths: Mapping[str, int],
        architecture: str,
        seed: int,
        pack: bool,
        shuffle: bool,
    ) -> None:
        self.task, self.store, self.architecture = task, store, architecture
        self.split = task.store_split(split)
        self.seed, self.shuffle = seed, shuffle
        self.objective = task.objective
        self.num_examples = store.num_examples(self.split)
        if not self.num_examples:
            raise UserError(
                f"Task {task.name!r}: split {self.split!r} of token store {store.folder} is empty; "
                "give it documents or use another split."
            )
        order = task.split_order(split)
        self.has_order = bool(order)
        self.ordered_epochs = math.inf if not shuffle or order == "stored" else 1 if order else 0
        self.order = self._read_order(order)
        self.statistics: dict[str, float] = {"examples": self.num_examples}
        if isinstance(self.objective, Windowed):
            self._prepare_windows(self.objective, lengths)
        else:
            self._prepare_examples(self.objective, lengths, pack)
        if self.train_rows > _MAX_ROWS:
            raise ValueError(
                f"Task {task.name!r} has {self.train_rows} rows in an epoch, more than {_MAX_ROWS}: split "
                f"its store."
            )

    def _read_order(self, order: str) -> np.ndarray | None:
        """The examples in the order in which training is to see them: int64 [examples]; None for the
        store's.
        """
        if order in ("", "stored"):
            return None
        if order == "length":
            sizes = [self.store.lengths(self.split, feature) for feature in self.store.features]
            return np.argsort(np.sum(sizes, axis=0), kind="stable")
        if order != "curriculum":
            return read_order(order, self.num_examples)
        found = self.store.curriculum(self.split)
        if found is None:
            raise UserError(
                f"Task {self.task.name!r} has order 'curriculum', but split {self.split!r} of token store "
                f"{self.store.folder} has none: give the corpus an order and tokenize again, or name a .npy "
                "file."
            )
        return found

    @property
    def order_identity(self) -> list[str]:
        """What the fingerprint of the batches has to know of the order; empty where they are shuffled."""
        if self.order is not None:
            return ["first epoch in order", hashlib.sha256(self.order.astype("<i8").tobytes()).hexdigest()]
        return ["stored"] if self.has_order else []

    # ---------------------------------------------------------------------------------------------- windows

    def _prepare_windows(self, objective: Windowed, lengths: Mapping[str, int]) -> None:
        self._tokens = self.store.num_tokens(self.split, objective.feature)
        if not self._tokens:
            raise UserError(
                f"Task {self.task.name!r}: split {self.split!r} of token store {self.store.folder} has no "
                f"tokens "
                f"in feature {objective.feature!r}."
            )
        if self.order is not None:
            lengths_in_order = self.store.lengths(self.split, objective.feature)[self.order]
            self._starts = self.store.offsets(self.split, objective.feature)[self.order]
            self._places = np.concatenate([[0], np.cumsum(lengths_in_order)])
        # A split shorter than one window is one window.
        self._window = min(objective.window(lengths, self.architecture, self.store.vocabulary), self._tokens)
        self.train_rows = self.examples_per_epoch = self._tokens // self._window
        self.finite_rows = -(-self._tokens // self._window)
        self.statistics |= {"tokens": self._tokens, "rows": self.train_rows, "window": self._window}

    def _read_windows(self, rows: np.ndarray, finite: bool) -> Iterator[tuple[Examples, np.ndarray]]:
        objective = self.objective
        assert isinstance(objective, Windowed)
        if finite:
            starts = rows * self._window
            lengths = np.minimum(self._window, self._tokens - starts)
        else:
            epochs, places = np.divmod(rows, self.train_rows)
            starts = (self._offsets(epochs) + places * self._window) % self._tokens
            lengths = np.full(len(rows), self._window)
        carry_over = isinstance(objective, CausalLM) and objective.carry_over
        previous = self._around(starts - 1, np.ones_like(starts), finite) if carry_over else None
        # The finite rows end with a shorter window; all others are equally long and handled at once.
        for length in np.unique(lengths):
            of_length = np.flatnonzero(lengths == length)
            flat = self._around(starts[of_length], lengths[of_length], finite)
            tokens = flat.reshape(len(of_length), length)  # [windows * length] -> [windows, length]
            # Evaluation has the same corruption whenever it is run, and another than training.
            random = RowRandom(seed_of(self.seed, "finite") if finite else self.seed, rows[of_length])
            examples = objective.apply(tokens, random, self.architecture, self.store.vocabulary)
            if previous is not None:
                first = np.where(starts == 0, self.store.vocabulary.bos_id, previous)[of_length]
                examples = dataclasses.replace(examples, first=first.astype(np.int32))
            yield examples, of_length

    def _offsets(self, epochs: np.ndarray) -> np.ndarray:
        """Where each epoch's first window begins: anywhere, so that no two epochs cut the text at the same
        places.
        """
        offsets = RowRandom(seed_of(self.seed, "offset"), epochs).integers(0, self._tokens)
        return np.where(epochs < self.ordered_epochs, 0, offsets)

    def _around(self, starts: np.ndarray, lengths: np.ndarray, finite: bool) -> np.ndarray:
        """Tokens of ranges that may run over the split's end, where they go on at its beginning."""
        starts = starts % self._tokens
        ends = starts + lengths
        over = np.maximum(ends - self._tokens, 0)
        if not over.any():
            return self._read_ranges(starts, lengths, finite)
        # Two pieces for each range, the second mostly empty.
        both_starts = np.stack([starts, np.zeros_like(starts)], axis=1).reshape(-1)
        both_lengths = np.stack([lengths - over, over], axis=1).reshape(-1)
        return self._read_ranges(both_starts, both_lengths, finite)

    def _read_ranges(self, starts: np.ndarray, lengths: np.ndarray, finite: bool) -> np.ndarray:
        """Tokens of ranges of the split, training's with its examples put in order."""
        feature = self.objective.feature  # type: ignore[union-attr]
        if finite or self.order is None:
            return self.store.read(self.split, feature, starts, lengths)
        # A range becomes one piece of each example that it touches.
        first = np.searchsorted(self._places, starts, "right") - 1
        counts = np.maximum(np.searchsorted(self._places, starts + lengths, "left") - first, 0)
        example = spread(first, counts)
        begins = np.maximum(self._places[example], np.repeat(starts, counts))
        ends = np.minimum(self._places[example + 1], np.repeat(starts + lengths, counts))
        in_store = self._starts[example] + begins - self._places[example]
        return self.store.read(self.split, feature, in_store, ends - begins)

    # ------------------------------------------------------------------------------------------- supervised

    def _prepare_examples(self, objective: Any, lengths: Mapping[str, int], pack: bool) -> None:
        limits = (lengths.get("encoder", 0), lengths["decoder"])
        if isinstance(objective, Chat):
            source, fitted, lost = self._conversations(objective, limits)
            parts = {1: ""}
        else:
            source = self._sizes(objective.inputs, objective.targets)
            parts = {0: "input", 1: "target"}
            fitted = self._fit(source, limits)
            lost = np.zeros(len(source), bool)
        cut = np.asarray((fitted < source).any(axis=1))
        dropped = self._left_out(objective.on_overlong, source, cut, lengths, parts) | lost
        self._plan_rows(source, fitted, cut, dropped, lengths, limits, pack)

    def _sizes(self, *features: str) -> np.ndarray:
        """Tokens of each example: int64 [examples, features]."""
        return np.stack([self.store.lengths(self.split, feature) for feature in features], axis=1)

    def _left_out(
        self,
        on_overlong: str,
        source: np.ndarray,
        cut: np.ndarray,
        lengths: Mapping[str, int],
        parts: Mapping[int, str],
    ) -> np.ndarray:
        """Which examples are left out for their length: bool [examples]. parts: columns of `source` that an
        error tells of, and their names.
        """
        if cut.any() and on_overlong == "error":
            example = int(np.flatnonzero(cut)[0])
            sizes = " and ".join(
                f"{source[example, column]} {name}".strip() for column, name in parts.items()
            )
            raise UserError(
                f"Task {self.task.name!r}: example {example} of split {self.split!r} has "
                f"{sizes} tokens, more than the lengths {dict(lengths)} "
                "take; raise the lengths, or set on_overlong to 'truncate' or 'drop'."
            )
        return np.asarray(cut & (on_overlong == "drop"))

    def _plan_rows(
        self,
        source: np.ndarray,
        fitted: np.ndarray,
        cut: np.ndarray,
        dropped: np.ndarray,
        lengths: Mapping[str, int],
        limits: tuple[int, int],
        pack: bool,
    ) -> None:
        """Which examples share a row, and what is told of it."""
        members = np.arange(len(source)) if self.order is None else self.order
        members = members[np.flatnonzero(~dropped[members])]
        if not len(members) and not (cut & dropped).any():
            raise UserError(
                f"Task {self.task.name!r}: none of the {len(source)} examples of split {self.split!r} has "
                "anything to learn: their masks are 0 everywhere, or answers are empty."
            )
        if not len(members):
            raise UserError(
                f"Task {self.task.name!r}: all {len(source)} examples of split {self.split!r} are longer "
                f"than "
                f"the lengths {dict(lengths)}; raise them, or set on_overlong to 'truncate'."
            )
        self._source, self._fitted = source, fitted
        if self.architecture == DECODER_ONLY:
            sizes, limits = (
                np.stack([np.zeros(len(fitted), np.int64), fitted.sum(axis=1)], axis=1),
                (0, limits[1]),
            )
        else:
            sizes = fitted
        # Packs stay together for the whole run; which ones make a batch changes with every epoch.
        if not pack:
            self._plan = packing.one_per_row(members)
        elif self.has_order:
            self._plan = packing.pack_in_order(sizes, members, limits)
        else:
            self._plan = packing.pack(sizes, members, limits, self.seed)
        self.train_rows = self.finite_rows = self._plan.rows
        self.examples_per_epoch = len(members)
        encoder, decoder = packing.efficiency(sizes, limits, self._plan)
        self.statistics |= {
            "rows": self.train_rows,
            "cut": int((cut & ~dropped).sum()),
            "dropped": int(dropped.sum()),
            "packing_efficiency_encoder": encoder,
            "packing_efficiency_decoder": decoder,
        }

    def _fit(self, source: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
        """Lengths int64 [examples, 2] of inputs and targets cut to the limits. For a decoder-only model they
        share
        one limit: targets keep at least half of it, inputs what is left.
        """
        inputs, targets = source[:, 0], source[:, 1]
        if self.architecture != DECODER_ONLY:
            return np.minimum(source, np.array(limits))
        limit = limits[1]
        targets = np.minimum(targets, np.maximum(limit - inputs, limit - limit // 2))
        return np.stack([np.minimum(inputs, limit - targets), targets], axis=1)

    def _members(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples in rows of the plan, and for each its row's place in `rows`."""
        rows = rows % self.train_rows
        counts = self._plan.offsets[rows + 1] - self._plan.offsets[rows]
        return self._plan.members[spread(self._plan.offsets[rows], counts)], np.repeat(
            np.arange(len(rows)), counts
        )

    def _read_examples(self, rows: np.ndarray) -> Iterator[tuple[Examples, np.ndarray]]:
        objective = self.objective
        members, owner = self._members(rows)
        if isinstance(objective, Chat):
            yield self._read_conversations(objective, members), owner
            return
        assert isinstance(objective, Supervised)
        decoder_only = self.architecture == DECODER_ONLY
        inputs, input_lengths = self._feature(objective.inputs, 0, members, keep_eos=not decoder_only)
        targets, target_lengths = self._feature(objective.targets, 1, members, keep_eos=True)
        examples = Examples(inputs, input_lengths, targets, target_lengths, np.ones(len(targets), np.int32))
        yield (examples.joined() if decoder_only else examples), owner

    def _feature(
        self, feature: str, column: int, members: np.ndarray, keep_eos: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """A feature of the examples, cut to its length. The end-of-sequence token that was there before the
        cut is put at the cut's end (seqio `append_eos_after_trim`), or taken away.
        """
        eos = self.store.vocabulary.eos_id
        starts = self.store.offsets(self.split, feature)[members]
        source, lengths = self._source[members, column], self._fitted[members, column]
        flat = self.store.read(self.split, feature, starts, lengths)
        cut = (lengths < source) & (lengths > 0)
        if cut.any():
            last_of_source = self.store.read(
                self.split, feature, (starts + source - 1)[cut], np.ones(cut.sum(), int)
            )
            last = np.cumsum(lengths)[cut] - 1
            flat[last] = np.where(last_of_source == eos, eos, flat[last])
        if keep_eos or not len(flat):
            return flat, lengths
        last = np.cumsum(lengths) - 1
        ends = (lengths > 0) & (flat[last] == eos)
        keep = np.ones(len(flat), bool)
        keep[last[ends]] = False
        return flat[keep], lengths - ends

    # ------------------------------------------------------------------------------------------------- chats

    def _conversations(
        self, objective: Chat, limits: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sizes int64 [examples, 2] (nothing for the encoder; the first token, which is read only, not
        counted) before and after cutting, and which have no learnt token left.
        """
        if self.architecture != DECODER_ONLY:
            raise UserError(
                f"Task {self.task.name!r} has the objective Chat, whose conversations are one sequence, "
                "for a decoder-only model; of an encoder-decoder the store needs the features inputs and "
                "targets."
            )
        tokens, masks = self._sizes(objective.tokens, objective.mask).T
        if (tokens != masks).any() or (tokens < 2).any():
            example = int(np.flatnonzero((tokens != masks) | (tokens < 2))[0])
            raise UserError(
                f"Task {self.task.name!r}: example {example} of split {self.split!r} has {tokens[example]} "
                f"tokens and a mask of {masks[example]}; both must be as long, and 2 or more."
            )
        source = np.stack([np.zeros_like(tokens), tokens - 1], axis=1)
        fitted = np.minimum(source, np.array([0, limits[1]]))
        lost = np.zeros(len(source), bool)
        starts = self.store.offsets(self.split, objective.mask)
        for members in np.array_split(np.arange(len(source)), len(source) // 4096 + 1):
            lengths = fitted[members, 1]
            mask = self.store.read(self.split, objective.mask, starts[members] + 1, lengths)
            if ((mask != 0) & (mask != 1)).any():
                raise UserError(
                    f"Task {self.task.name!r}: the mask {objective.mask!r} of split {self.split!r} holds "
                    f"{int(mask[(mask != 0) & (mask != 1)][0])}; it must be 1 for what is learnt, else 0."
                )
            lost[members] = np.add.reduceat(mask, np.cumsum(lengths) - lengths) == 0
        return source, fitted, lost

    def _read_conversations(self, objective: Chat, members: np.ndarray) -> Examples:
        lengths = self._fitted[members, 1]
        starts = self.store.offsets(self.split, objective.tokens)[members]
        tokens = self.store.read(self.split, objective.tokens, starts, lengths + 1)
        starts = self.store.offsets(self.split, objective.mask)[members]
        weights = self.store.read(self.split, objective.mask, starts + 1, lengths)
        first = np.cumsum(lengths + 1) - (lengths + 1)
        nothing = np.zeros(0, np.int32)
        targets = np.delete(tokens, first)
        return Examples(nothing, np.zeros_like(lengths), targets, lengths, weights, tokens[first])

    # ------------------------------------------------------------------------------------------------- both

    def also(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Further arrays of a batch, [rows, ...], for rows int64 [rows]; of rows of tokens none."""
        return {}

    def read(self, rows: np.ndarray, finite: bool) -> Iterator[tuple[Examples, np.ndarray]]:
        """The examples of rows int64 [n], in groups: examples, and for each its row's place in `rows`."""
        return (
            self._read_windows(rows, finite)
            if isinstance(self.objective, Windowed)
            else self._read_examples(rows)
        )
