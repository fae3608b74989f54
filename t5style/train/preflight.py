"""Before the first step: what the run is about to learn, what it costs, and a refusal of what is silently
wrong.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5style import console, run_dir
from t5style.corpus.vocabulary import Vocabulary
from t5style.data.objectives import DECODER_ONLY, CausalLM
from t5style.data.pipeline import BatchSource, flat
from t5style.data.replay import UNLEARNED, Segment, describe
from t5style.data.task import Task
from t5style.data.token_store import TokenStore
from t5style.models.config import TransformerConfig
from t5style.parallel.explain import format_bytes

# Stores up to this size are read whole and their checksums compared; larger ones are checked for their files'
# sizes (and every chunk's CRC is checked when it is read in any case).
VERIFY_BYTES = 1 << 30
EXAMPLES = 2  # shown for each task
SHOWN_CHARACTERS = 400  # of each text
PROBED_ROWS = 16  # rows looked at for each task


@dataclasses.dataclass(frozen=True)
class Costs:
    """What the run costs, from shapes alone.

    Attributes:
      parameters: number of parameters; trained: of those that are trained.
      state_bytes: trained parameters and optimiser state on one device.
      frozen_bytes: parameters that are not trained on one device.
      gradient_bytes: gradients on one device.
      flops_per_token: training FLOPs per position, padding included.
      mesh: the mesh in words.
    """

    parameters: int
    trained: int
    state_bytes: int
    frozen_bytes: int
    gradient_bytes: int
    flops_per_token: float
    mesh: str


def check_vocabulary(config: TransformerConfig, vocabulary: Vocabulary, store: str) -> None:
    """Raises UserError where the vocabulary has more ids than the embedding has rows."""
    if vocabulary.vocab_size > config.vocab_size:
        padded = -(-vocabulary.vocab_size // 128) * 128
        raise run_dir.UserError(
            f"the vocabulary of {store} has {vocabulary.vocab_size} ids but the model's embedding only "
            f"{config.vocab_size} rows: set the model's vocab_size to {vocabulary.vocab_size} or more "
            f"({padded} is the next multiple of 128)."
        )


def verify_stores(tasks: Sequence[Task]) -> list[str]:
    """Compares the stores' checksums; returns a line for each. Raises UserError for a damaged store."""
    lines = []
    for folder in dict.fromkeys(task.store for task in tasks):
        store = TokenStore.open(folder)
        size = sum(entry["bytes"] for entry in store.manifest["files"].values())
        if size <= VERIFY_BYTES:
            TokenStore.open(folder, verify=True)
            lines.append(
                f"{folder}: {format_bytes(size)}, every checksum right (fingerprint {store.fingerprint})"
            )
        else:
            lines.append(
                f"{folder}: {format_bytes(size)}, file sizes right, chunks are checked as they are read "
                f"(fingerprint {store.fingerprint})"
            )
    return lines


def probe(
    task: Task, split: str, lengths: Mapping[str, int], config: TransformerConfig, pack: bool, seed: int
) -> dict[str, Any]:
    """Looks at a task's first rows: figures, decoded examples, and a refusal of what cannot be meant.

    Raises:
      UserError: ids outside the embedding; no supervised token; every token supervised where the inputs
        should not be.
    """
    source = BatchSource(task, split, PROBED_ROWS, lengths, config.architecture, seed, pack)
    whole = source.batch_at(0)
    batch = flat(whole)
    for name, values in batch.items():
        if name.endswith("_tokens") and (int(values.max()) >= config.vocab_size or int(values.min()) < 0):
            bad = int(values.max()) if int(values.max()) >= config.vocab_size else int(values.min())
            raise run_dir.UserError(
                f"task {task.name!r}: {name} holds the id {bad}, outside the model's embedding of "
                f"{config.vocab_size} rows: the store was made with another vocabulary, or vocab_size is "
                "too small."
            )
    real = int((batch["decoder_segment_ids"] > 0).sum())
    supervised = int((batch["decoder_loss_weights"] > 0).sum())
    share = supervised / real if real else 0.0
    if supervised == 0:
        raise run_dir.UserError(
            f"task {task.name!r}: none of the {real} decoder tokens in its first {PROBED_ROWS} rows is "
            "supervised, so "
            "nothing would be learned: make lengths['decoder'] longer than the inputs, or check the targets."
        )
    everything = supervised == real and config.architecture == DECODER_ONLY
    if everything and not isinstance(task.objective, CausalLM):
        raise run_dir.UserError(
            f"task {task.name!r}: all {real} decoder tokens in its first {PROBED_ROWS} rows are supervised, "
            "though "
            f"{type(task.objective).__name__} should not learn its inputs: check that the inputs feature is "
            "not empty."
        )
    filled = {
        side: float((batch[f"{side}_segment_ids"] > 0).mean())
        for side in ("encoder", "decoder")
        if f"{side}_segment_ids" in batch
    }
    return {
        "task": task.name,
        "objective": type(task.objective).__name__,
        "supervised": share,
        "filled": filled,
        "positions_per_row": {side: source.lengths[side] for side in filled},
        "examples_per_epoch": source.examples_per_epoch,
        "statistics": source.statistics[task.name],
        "examples": [
            dataclasses.asdict(segment) for segment in describe(whole, source.vocabulary, range(EXAMPLES))
        ],
    }


def preflight(
    run: run_dir.RunDir,
    *,
    config: TransformerConfig,
    source: BatchSource,
    eval_tasks: Sequence[Task],
    split: str,
    seed: int,
    steps: int,
    costs: Costs,
    start: str,
) -> dict[str, Any]:
    """Checks data against model, prints and writes `preflight.txt` and `preflight.json`, and returns the
    figures.

    Args:
      run: the run folder.
      config: the model.
      source: the training batches.
      eval_tasks: what is evaluated on.
      split, seed, steps: of the run.
      costs: see `Costs`.
      start: in words, what the run starts from.

    Raises:
      UserError: what `check_vocabulary`, `verify_stores` and `probe` refuse.
    """
    check_vocabulary(config, source.vocabulary, source.tasks[0].store)
    stores = verify_stores([*source.tasks, *eval_tasks])
    tasks = [probe(task, split, source.lengths, config, source.pack, seed) for task in source.tasks]
    rates = [source.statistics[task["task"]]["rate"] for task in tasks]
    positions = sum(source.lengths.values())
    filled = [
        sum(task["filled"][side] * source.lengths[side] for side in task["filled"]) / positions
        for task in tasks
    ]
    mean_filled = float(np.dot(rates, filled))
    rows_per_epoch = source.batches_per_epoch * source.batch_size
    figures = {
        "start": start,
        "parameters": costs.parameters,
        "trained_parameters": costs.trained,
        "mesh": costs.mesh,
        "state_bytes_per_device": costs.state_bytes,
        "frozen_bytes_per_device": costs.frozen_bytes,
        "gradient_bytes_per_device": costs.gradient_bytes,
        "training_flops_per_token": costs.flops_per_token,
        "vocabulary": {"ids": source.vocabulary.vocab_size, "embedding_rows": config.vocab_size},
        "rows_per_epoch": rows_per_epoch,
        "steps_per_epoch": source.batches_per_epoch,
        "tokens_per_epoch": rows_per_epoch * positions * mean_filled,
        "steps": steps,
        "epochs": steps / source.batches_per_epoch if source.batches_per_epoch else math.inf,
        "tokens_planned": steps * source.batch_size * positions * mean_filled,
        "flops_planned": steps * source.batch_size * positions * costs.flops_per_token,
        "dataset_fingerprint": source.fingerprint,
        "stores": stores,
        "tasks": tasks,
    }
    text = _text(figures, source)
    console.say(text)
    if run_dir.is_main_process():
        run_dir.atomic_write(run.path / "preflight.txt", text + "\n")
        run_dir.atomic_write(
            run.path / "preflight.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n"
        )
    return figures


def parameters(all_of_them: int, trained: int) -> str:
    """`1,000 parameters`, or with those of them that are trained if not all are."""
    if trained == all_of_them:
        return f"{all_of_them:,} parameters"
    return f"{all_of_them:,} parameters, {trained:,} trained ({trained / all_of_them:.2%})"


def _frozen(count: int) -> str:
    return f", {format_bytes(count)} of others" if count else ""


def _text(figures: Mapping[str, Any], source: BatchSource) -> str:
    lines = [
        "Preflight",
        f"  start      {figures['start']}",
        f"  model      {parameters(figures['parameters'], figures['trained_parameters'])}; "
        f"{figures['vocabulary']['ids']:,} ids in the "
        "vocabulary, "
        f"{figures['vocabulary']['embedding_rows']:,} rows in the embedding",
        f"  memory     {format_bytes(figures['state_bytes_per_device'])} of trained parameters and optimiser "
        "state"
        f"{_frozen(figures['frozen_bytes_per_device'])} and "
        f"{format_bytes(figures['gradient_bytes_per_device'])} of gradients on each device, and activations; "
        f"{figures['mesh']}",
        f"  compute    {figures['training_flops_per_token']:.3g} FLOPs per token, "
        f"{figures['flops_planned']:.3g} for the run",
        f"  data       {figures['tokens_per_epoch']:,.0f} tokens per epoch in "
        f"{figures['steps_per_epoch']:,.1f} steps "
        f"of {source.batch_size} rows; {figures['steps']:,} steps = {figures['epochs']:.3g} epochs = "
        f"{figures['tokens_planned']:,.0f} tokens",
        f"  lengths    {', '.join(f'{side} {length}' for side, length in source.lengths.items())}",
    ]
    lines += [f"  store      {line}" for line in figures["stores"]]
    for task in figures["tasks"]:
        filled = ", ".join(f"{side} {share:.0%}" for side, share in task["filled"].items())
        lines.append(
            f"  task       {task['task']} ({task['objective']}): {task['supervised']:.1%} of the decoder's "
            "tokens are "
            f"supervised; rows filled: {filled}"
        )
        for example in task["examples"][:EXAMPLES]:
            lines += ["             " + line for line in _shown(Segment(**example))]
    lines.append(
        f"  (in the examples, what the loss does not look at stands between {UNLEARNED[0]} and "
        f"{UNLEARNED[1]})"
    )
    return "\n".join(lines)


def _shown(segment: Segment) -> list[str]:
    """One example in a few lines; what is not learned stands between the marks of `data.replay`."""
    lines = []
    if segment.inputs is not None:
        lines.append(f"reads {segment.input_tokens} tokens: {_cut(segment.inputs)!r}")
    which = f"{segment.answer}: " if segment.answer else ""
    lines.append(
        f"{which}says {segment.target_tokens} tokens, {segment.learned_tokens} of them learned: "
        f"{_cut(segment.targets)!r}"
    )
    return lines


def _cut(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
