"""Any batch as text: what the model read, what it was to say, and where the loss looked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus.vocabulary import Vocabulary
from t5style.data.objectives import ENCODER_DECODER
from t5style.data.pipeline import BatchSource, flat
from t5style.data.task import Mixture, Task
from t5style.run_dir import RunDir, UserError, atomic_write

# Around what the loss does not look at: characters that hardly any text has.
UNLEARNED = ("⟦", "⟧")


@dataclasses.dataclass(frozen=True)
class Segment:
    """One example of a batch, decoded.

    Attributes:
      row: in the batch.
      segment: from 1, in the row.
      inputs: what the encoder read; None for a decoder-only model.
      targets: what the decoder was to say; parts without loss stand between ⟦ and ⟧.
      input_tokens, target_tokens: how many.
      learned_tokens: target tokens with loss.
      answer: of answers to compare which one it is: 'chosen' or 'rejected'; of unpaired ones 'desirable',
        'undesirable', or 'other', that of another example.
    """

    row: int
    segment: int
    inputs: str | None
    targets: str
    input_tokens: int
    target_tokens: int
    learned_tokens: int
    answer: str = ""


def describe(
    batch: Mapping[str, np.ndarray], vocabulary: Vocabulary, rows: Sequence[int] | None = None
) -> list[Segment]:
    """Decodes a batch.

    Args:
      batch: int32 [rows, length] by T5X feature names, as a `BatchSource` makes it; of answers to compare
        [pairs, 2, length], two rows to a pair.
      vocabulary: the one that made the tokens.
      rows: which rows; None for all.

    Raises: ValueError for a row that the batch does not have.
    """
    answers = _answers(batch)
    batch = flat(batch)
    segments = []
    count = len(batch["decoder_target_tokens"])
    for row in range(count) if rows is None else rows:
        if not 0 <= row < count:
            raise ValueError(f"Row {row} was asked for; the batch has rows 0 to {count - 1}.")
        ids = batch["decoder_segment_ids"][row]
        for segment in range(1, int(ids.max(initial=0)) + 1):
            where = ids == segment
            targets = batch["decoder_target_tokens"][row][where]
            weights = batch["decoder_loss_weights"][row][where] != 0
            inputs = None
            if "encoder_input_tokens" in batch:
                inputs = batch["encoder_input_tokens"][row][batch["encoder_segment_ids"][row] == segment]
            segments.append(
                Segment(
                    row,
                    segment,
                    None if inputs is None else _text(inputs, vocabulary),
                    _marked(targets, weights, vocabulary),
                    0 if inputs is None else len(inputs),
                    len(targets),
                    int(weights.sum()),
                    answers[row] if answers else "",
                )
            )
    return segments


def _answers(batch: Mapping[str, np.ndarray]) -> list[str]:
    """What the rows of answers to compare are, two to a pair; nothing of other batches."""
    if batch["decoder_target_tokens"].ndim < 3:
        return []
    if "desirable" not in batch:
        return ["chosen", "rejected"] * len(batch["decoder_target_tokens"])
    return [name for one in batch["desirable"] for name in ("desirable" if one else "undesirable", "other")]


def _text(ids: np.ndarray, vocabulary: Vocabulary) -> str:
    """Text with the end of sequence shown: a document's end inside a window, and an example's end."""
    parts: list[str] = []
    start = 0
    for end in [*np.flatnonzero(ids == vocabulary.eos_id).tolist(), len(ids)]:
        parts.append(vocabulary.decode(ids[start:end].tolist()))
        start = end + 1
    return "</s>".join(parts)


def _marked(ids: np.ndarray, learned: np.ndarray, vocabulary: Vocabulary) -> str:
    borders = [0, *(np.flatnonzero(np.diff(learned.astype(np.int8))) + 1).tolist(), len(ids)]
    parts = []
    for start, end in itertools.pairwise(borders):
        text = _text(ids[start:end], vocabulary)
        parts.append(text if end > start and learned[start] else f"{UNLEARNED[0]}{text}{UNLEARNED[1]}")
    return "".join(parts)


def as_text(segments: Sequence[Segment]) -> str:
    """Segments for a person to read."""
    lines = []
    for s in segments:
        sizes = f"{s.target_tokens} target tokens, {s.learned_tokens} with loss"
        if s.inputs is not None:
            sizes = f"{s.input_tokens} input tokens, {sizes}"
        which = f", {s.answer}" if s.answer else ""
        lines.append(f"row {s.row}, example {s.segment}{which}: {sizes}")
        if s.inputs is not None:
            lines.append(f"  inputs:  {s.inputs}")
        lines += [f"  targets: {s.targets}", ""]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Replay:
    """Decodes the batches a run had at given steps, from the settings of that run alone; writes
    `batches.txt`.

    Attributes:
      task, batch_size, lengths, architecture, seed, pack, shuffle: as in the run.
      split: the split it trained on.
      steps: which batches.
      rows: which rows of them; None for all.
      fingerprint: of the run's data (its lineage has it); given, another one is refused.
    """

    task: Task | Mixture
    batch_size: int
    lengths: Mapping[str, int]
    steps: Sequence[int] = (0,)
    rows: Sequence[int] | None = None
    split: str = "train"
    architecture: str = ENCODER_DECODER
    seed: int = 0
    pack: bool = True
    shuffle: bool = True
    fingerprint: str | None = None

    distributed: ClassVar[bool] = False

    def inputs(self) -> Sequence[str]:
        tasks = self.task.tasks if isinstance(self.task, Mixture) else [self.task]
        return [task.store for task in tasks]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        source = BatchSource(
            self.task,
            self.split,
            self.batch_size,
            self.lengths,
            self.architecture,
            self.seed,
            self.pack,
            self.shuffle,
        )
        if self.fingerprint is not None and self.fingerprint != source.fingerprint:
            raise UserError(
                f"The data's fingerprint is {source.fingerprint}, but the run had {self.fingerprint}: the "
                f"store or "
                "a setting differs, and so would the batches; give the run's own settings."
            )
        pages = []
        learned = 0
        for step in self.steps:
            segments = describe(source.batch_at(step), source.vocabulary, self.rows)
            learned += sum(segment.learned_tokens for segment in segments)
            pages.append(f"batch {step}\n\n{as_text(segments)}")
        path = epath.Path(run.path) / "batches.txt"
        atomic_write(path, "\n".join(pages))
        console.say(f"{len(pages)} batches decoded to {path}")
        return {"batches": len(pages), "learned_tokens": learned, "data_fingerprint": source.fingerprint}
