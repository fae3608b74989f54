"""Prompts to answer: from a token store with the feature `prompt` and a record beside each example."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from grain.experimental import index_shuffle

from t5style import run_dir
from t5style.corpus.vocabulary import Vocabulary
from t5style.data.random import seed_of
from t5style.data.task import Task
from t5style.data.token_store import TokenStore, TokenStoreWriter
from t5style.infer import chat_tokens
from t5style.run_dir import UserError

FEATURE = "prompt"
RECORDS = "records.jsonl"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
      example: its number in the split.
      tokens: int32 [length] as they enter the model: of a decoder-only model with what its rows begin with.
      text: readable.
      record: what rewards look at.
    """

    example: int
    tokens: np.ndarray
    text: str
    record: Mapping[str, Any]


class PromptSource:
    """The prompts of a split, in an order that is a function of the seed; in place of a BatchSource.

    Args:
      task: its store; the objective is not looked at.
      split: the task's split.
      batch_size: rows of an update; lengths: places in a row; both as the program has them.
      architecture: "encoder_decoder" or "decoder_only".
      room: tokens that a prompt may have; longer ones are left out.
      seed: of the order.

    Raises:
      UserError: no store, no feature `prompt`, no records, an empty split, or only prompts that are too long.
    """

    def __init__(
        self,
        task: Task,
        split: str,
        batch_size: int,
        lengths: Mapping[str, int],
        architecture: str,
        room: int,
        seed: int = 0,
    ) -> None:
        self.task, self.tasks, self.split = task, (task,), split
        self.batch_size, self.lengths, self.seed, self.room = batch_size, dict(lengths), seed, room
        self.store = TokenStore.open(task.store)
        self.vocabulary: Vocabulary = self.store.vocabulary
        self._split = task.store_split(split)
        # Prompts that tune.examples.Examples wrote are whole: they have what the model's texts begin with.
        whole = self.store.manifest.get("description", {}).get("whole", False)
        self._adds_start = architecture == "decoder_only" and not whole
        sizes = self.store.lengths(self._split, FEATURE) + self._adds_start
        if not len(sizes):
            raise UserError(f"the split {split!r} of the prompts in {task.store} is empty.")
        self.members = np.flatnonzero(sizes <= room)
        self.left_out = len(sizes) - len(self.members)
        if not len(self.members):
            raise UserError(
                f"all {len(sizes)} prompts of split {split!r} in {task.store} have more than {room} tokens, "
                f"the shortest {sizes.min()}: raise lengths, or lower max_new_tokens."
            )
        self.longest = int(sizes[self.members].max())

    @functools.cached_property
    def records(self) -> list[dict[str, Any]]:
        """The record of each example of the split."""
        file = epath.Path(self.task.store) / self.store.place(self._split) / RECORDS
        if not file.exists():
            raise UserError(
                f"the token store {self.task.store} has no {self.store.place(self._split)}/{RECORDS}, so "
                "that no reward knows what is asked: make it with tune.examples.Examples from prompts."
            )
        records = [json.loads(line) for line in file.read_text().splitlines() if line]
        if len(records) != self.store.num_examples(self._split):
            raise UserError(
                f"{file} has {len(records)} records for {self.store.num_examples(self._split)} prompts: make "
                "the store again."
            )
        return records

    @property
    def fingerprint(self) -> str:
        """16 hex digits for what decides the prompts, but the seed."""
        return run_dir.fingerprint(["prompts", self.store.fingerprint, self._split, self.room])

    @property
    def batches_per_epoch(self) -> float:
        """Updates in which every prompt would be seen once, were each a row."""
        return len(self.members) / self.batch_size

    def prompt(self, example: int) -> Prompt:
        """The prompt of an example of the split."""
        (tokens,) = self.store.examples(self._split, FEATURE, [example])
        text = self.vocabulary.decode(tokens)
        if self._adds_start:  # as rows of training begin (data.pipeline.lay_out)
            tokens = np.concatenate([[self.vocabulary.bos_id], tokens]).astype(np.int32)
        return Prompt(example, tokens, text, self.records[example])

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        return {token: name for name, token in chat_tokens.special_tokens(self.vocabulary).items()}

    def _spelled(self, tokens: np.ndarray) -> str:
        """The text with special tokens spelled out, as a chat template writes them."""
        special = np.isin(tokens, list(self._special)) if self._special else np.zeros(len(tokens), bool)
        parts, start = [], 0
        for place in [*np.flatnonzero(special).tolist(), len(tokens)]:
            parts.append(self.vocabulary.decode(tokens[start:place].tolist()) if place > start else "")
            parts.append(self._special[int(tokens[place])] if place < len(tokens) else "")
            start = place + 1
        return "".join(parts)

    def drawn(self, start: int, count: int, stream: Sequence[int | str] = ()) -> list[Prompt]:
        """Prompts number start, start + 1, … of an endless order: a new permutation for every epoch.

        stream: another order for each.
        """
        size, prompts = len(self.members), []
        for place in range(start, start + count):
            epoch, index = divmod(place, size)
            seed = seed_of(self.seed, "prompts", *stream, epoch) & 0xFFFFFFFF
            index = int(index_shuffle(index, max_index=size - 1, seed=seed, rounds=4)) if size > 1 else 0
            prompts.append(self.prompt(int(self.members[index])))
        return prompts

    def first(self, count: int | None = None) -> list[Prompt]:
        """The first prompts of the split in its own order; None: all."""
        return [self.prompt(int(example)) for example in self.members[:count]]


def write_lines(file: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    run_dir.atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_prompts(
    folder: epath.Path,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    vocabulary: Vocabulary,
    closed: bool = False,
) -> str:
    """Writes a token store of prompts with their records; returns its fingerprint.

    Args:
      folder: where there is no store yet.
      rows: by split; a text "prompt" each, and whatever rewards look at.
      vocabulary: the model's.
      closed: prompts end with the end of sequence, as an encoder's do.
    """
    end = [vocabulary.eos_id] if closed else []
    with TokenStoreWriter(folder, (FEATURE,), vocabulary) as writer:
        for split, records in rows.items():
            for row in records:
                writer.add(split, {FEATURE: [*vocabulary.encode(row["prompt"]), *end]})
            rest = [{name: value for name, value in row.items() if name != "prompt"} for row in records]
            write_lines(epath.Path(folder) / split / RECORDS, rest)
    return str(writer.manifest["fingerprint"])
