"""Rows of answers to compare: two to each example, [pairs, 2, length]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from t5style.data.objectives import DECODER_ONLY, Examples, Preferences, Unpaired
from t5style.data.random import seed_of
from t5style.data.rows import TaskRows
from t5style.run_dir import UserError

WIDTH = 2  # answers to an example


def margin_tokens(margin: float) -> np.ndarray:
    """A margin as a store holds it, whatever its vocabulary: the bits of its float32, int32 [32]."""
    return np.unpackbits(np.frombuffer(np.float32(margin).tobytes(), np.uint8)).astype(np.int32)


def margins(tokens: np.ndarray) -> np.ndarray:
    """float32 [examples] of tokens [32 · examples], as `margin_tokens` made them."""
    return np.packbits(tokens.astype(np.uint8)).view(np.float32)


class PairRows(TaskRows):
    """As TaskRows; `read` gives each row's two answers, numbered 2 · row and 2 · row + 1."""

    def _prepare_examples(self, objective: Any, lengths: Mapping[str, int], pack: bool) -> None:
        self._encoder, self._decoder = lengths.get("encoder", 0), lengths["decoder"]
        if isinstance(objective, Preferences):
            self._answers = (objective.chosen, objective.rejected)
            parts: tuple[str, ...] = (objective.prompt, *self._answers)
            if objective.margin in self.store.features:
                self._check_numbers(objective.margin, 32)
        else:
            self._answers = (objective.completion, objective.completion)
            parts = (objective.prompt, objective.completion)
            self._check_numbers(objective.desirable, 1)
        source = self._sizes(*parts)
        self._all, fitted = source, self._cut(source)
        cut = np.asarray((fitted < source).any(axis=1))
        dropped = self._left_out(objective.on_overlong, source, cut, lengths, dict(enumerate(parts)))
        dropped |= (source[:, 1:] == 0).any(axis=1)  # an answer without a token has no likelihood
        # Nothing is packed: for the plan a pair fills its row.
        whole = np.tile([self._encoder, self._decoder], (len(source), 1))
        self._plan_rows(whole, whole, cut, dropped, lengths, (self._encoder, self._decoder), False)
        self.statistics.pop("packing_efficiency_encoder")
        self.statistics.pop("packing_efficiency_decoder")
        # Whose answer stands in for another's (KTO): members in a fixed random circle.
        members = self._plan.members
        order = np.random.default_rng(seed_of(self.seed, "other answers")).permutation(members)
        self._others = np.full(len(source), -1)
        self._others[order] = np.roll(order, 1)

    def _check_numbers(self, feature: str, size: int) -> None:
        """Raises UserError where an example has not `size` tokens of a feature, a single one not 0 or 1."""
        sizes = self.store.lengths(self.split, feature)
        wrong = sizes != size
        if size == 1 and not wrong.any():
            values = self.store.read(self.split, feature, np.zeros(1, np.int64), sizes.sum(keepdims=True))
            wrong = (values != 0) & (values != 1)
        if wrong.any():
            raise UserError(
                f"Task {self.task.name!r}: feature {feature!r} of example {int(np.flatnonzero(wrong)[0])} of "
                f"split {self.split!r} is no {'single 0 or 1' if size == 1 else f'{size} bits'}; make the "
                "store with tune.examples.Examples."
            )

    def _cut(self, source: np.ndarray) -> np.ndarray:
        """Lengths int64 [examples, 1 + answers] of prompts and answers that fit."""
        prompt, answers = source[:, :1], source[:, 1:]
        if self.architecture != DECODER_ONLY:
            return np.minimum(source, [self._encoder] + [self._decoder] * answers.shape[1])
        limit = self._decoder
        # The first token of a row is read only and takes no place: the prompt's, or one put before an answer.
        read = np.maximum(prompt - 1, 0)
        answers = np.minimum(answers, np.maximum(limit - read, limit - limit // 2))
        room = limit + 1 - answers.max(axis=1, keepdims=True)
        return np.concatenate([np.minimum(prompt, room), answers], axis=1)

    def _read_examples(self, rows: np.ndarray) -> Iterator[tuple[Examples, np.ndarray]]:
        objective = self.objective
        assert isinstance(objective, Preferences | Unpaired)
        members, owner = self._members(rows)
        second = members if isinstance(objective, Preferences) else self._others[members]
        lengths = self._lengths(members, second)  # of prompt and answer: [pairs, 2, 2]
        sources = [self._prompts(objective.prompt, members, lengths[:, side, 0]) for side in range(WIDTH)]
        answers = [
            self.store.read(
                self.split,
                feature,
                self.store.offsets(self.split, feature)[(members, second)[side]],
                lengths[:, side, 1],
            )
            for side, feature in enumerate(self._answers)
        ]
        for side in range(WIDTH):
            yield self._laid(sources[side], lengths[:, side], answers[side]), WIDTH * owner + side

    def _lengths(self, members: np.ndarray, second: np.ndarray) -> np.ndarray:
        if isinstance(self.objective, Preferences):  # one prompt for both
            cut = self._cut(self._all[members])
            return np.stack([cut[:, [0, 1]], cut[:, [0, 2]]], axis=1)
        answers = [self._all[others, 1] for others in (members, second)]
        return np.stack(
            [self._cut(np.stack([self._all[members, 0], sizes], axis=1)) for sizes in answers], axis=1
        )

    def _prompts(self, feature: str, members: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Prompts cut to their lengths: of a decoder-only model their ends, else their beginnings, closed by
        the end-of-sequence token where they had one.
        """
        starts = self.store.offsets(self.split, feature)[members]
        sizes = self.store.lengths(self.split, feature)[members]
        if self.architecture == DECODER_ONLY:
            return self.store.read(self.split, feature, starts + sizes - lengths, lengths)
        flat = self.store.read(self.split, feature, starts, lengths)
        cut = (lengths < sizes) & (lengths > 0)
        if cut.any():
            ends = self.store.read(self.split, feature, (starts + sizes - 1)[cut], np.ones(cut.sum(), int))
            eos, last = self.store.vocabulary.eos_id, (np.cumsum(lengths) - 1)[cut]
            flat[last] = np.where(ends == eos, eos, flat[last])
        return flat

    def _laid(self, prompts: np.ndarray, lengths: np.ndarray, answers: np.ndarray) -> Examples:
        examples = Examples(prompts, lengths[:, 0], answers, lengths[:, 1], np.ones(len(answers), np.int32))
        if self.architecture != DECODER_ONLY:
            return examples
        joined = examples.joined()
        # A prompt's first token is read and not foretold.
        has_prompt = lengths[:, 0] > 0
        starts = (np.cumsum(joined.target_lengths) - joined.target_lengths)[has_prompt]
        first = np.full(len(lengths), self.store.vocabulary.bos_id, np.int32)
        first[has_prompt] = joined.targets[starts]
        nothing = np.zeros(0, np.int32)
        return Examples(
            nothing,
            joined.input_lengths,
            np.delete(joined.targets, starts),
            joined.target_lengths - has_prompt,
            np.delete(joined.weights, starts),
            first,
        )

    def also(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """`example` int32 [rows], the example's number in the split; of unpaired ones `desirable` too, of
        pairs `margin` float32 where the store has it.
        """
        members, _ = self._members(rows)
        found = {"example": members.astype(np.int32)}
        if isinstance(self.objective, Preferences) and self.objective.margin in self.store.features:
            feature = self.objective.margin
            starts = self.store.offsets(self.split, feature)[members]
            both = self.store.read(self.split, feature, starts, np.full(len(members), 32))
            found["margin"] = margins(both)
        if isinstance(self.objective, Unpaired):
            feature = self.objective.desirable
            starts = self.store.offsets(self.split, feature)[members]
            found["desirable"] = self.store.read(self.split, feature, starts, np.ones(len(members), int))
        return found
