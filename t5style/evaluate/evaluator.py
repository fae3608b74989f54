"""The job Evaluate: how good a model is on held-out data, next to baselines and to the model it came from.

For every task, over the whole split and each example once: loss, perplexity, bits per byte and token
accuracy; for supervised tasks with metrics also generated answers, scored. Every number comes with its
standard error and the number of examples, every comparison with the standard error of the paired difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus.vocabulary import Vocabulary
from t5style.data.objectives import Supervised
from t5style.data.pipeline import BatchSource
from t5style.data.task import Task
from t5style.evaluate import metrics as metrics_lib
from t5style.evaluate import results
from t5style.evaluate.baselines import LikelihoodBaseline, MajorityTarget, Pair, TextBaseline, UnigramTokens
from t5style.evaluate.metrics import Estimate
from t5style.infer import model as model_lib
from t5style.infer.batch import bucket
from t5style.infer.model import Model
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError, atomic_write

Baseline = TextBaseline | LikelihoodBaseline
PARTS = "parts"
_SENTINEL = re.compile(r"<extra_id_\d+>")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Evaluates `model` on held-out examples of tasks.

    Writes results.json (described in `results`), results.md, and samples.jsonl with one line for each
    example. Until then, what a model has finished of a task is kept under parts/, and a job that was stopped
    goes on behind it.

    Attributes:
      model: run folder, checkpoint folder inside it, or Hugging Face directory.
      tasks: the tasks; those with metrics and the Supervised objective are also answered by generation.
      lengths: places in a row, as in training: {"encoder": 512, "decoder": 114}; only "decoder" for a
        decoder-only model. Longer examples are treated as the objective says; how many were cut is reported.
      split: the task's split.
      max_examples: so many examples of each task, drawn by `seed`; None: all.
      batch_size: examples at a time.
      max_new_tokens: of an answer; None: as many as the decoder's length. A decoder-only model's answer ends
        with the positions it was made for.
      baselines: what the model is compared with, computed from the task's training split.
      train_split: its name.
      train_examples: so many training examples for the baselines, drawn likewise; None: all, in memory.
      reference_model: a second model, such as the one before tuning, on the same examples.
      dtype: compute and parameter type of the models; None: as trained.
      mesh: how to spread a model over this machine's devices; None: one device.
      seed: of the examples drawn, and of the bootstrap that corpus-level metrics (BLEU) need.
    """

    model: str
    tasks: Sequence[Task]
    lengths: dict[str, int]
    split: str = "validation"
    max_examples: int | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    baselines: Sequence[Baseline] = (MajorityTarget(), UnigramTokens())
    train_split: str = "train"
    train_examples: int | None = 20_000
    reference_model: str | None = None
    dtype: str | None = None
    mesh: MeshConfig | None = None
    seed: int = 0

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if not names:
            raise ValueError("tasks is empty: give at least one task to evaluate on")
        if len(set(names)) < len(names):
            raise ValueError(f"tasks holds two of one name: {', '.join(sorted(names))}")
        for name in ("max_examples", "batch_size", "max_new_tokens", "train_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give at least 1")
        baselines = [baseline.name for baseline in self.baselines]
        if len({*baselines, "reference"}) < len(baselines) + 1:
            raise ValueError(
                f"baselines must have different names, none of them 'reference': {', '.join(baselines)}"
            )

    def inputs(self) -> Sequence[str]:
        """The models and the tasks' stores."""
        models = [self.model] + ([self.reference_model] if self.reference_model else [])
        return [*models, *dict.fromkeys(task.store for task in self.tasks)]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Runs the job in `run.path`; returns what `results.figures` makes of it."""
        systems = {"model": self._load(self.model)}
        if self.reference_model:
            systems["reference"] = self._load(self.reference_model)
        reports: dict[str, Any] = {}
        samples: list[str] = []
        for task in self.tasks:
            parts = run.path / PARTS / urllib.parse.quote(task.name, safe="")
            reports[task.name], rows = self._evaluate(task, systems, parts)
            samples += [json.dumps({"task": task.name, **row}, ensure_ascii=False) + "\n" for row in rows]
        document = {
            "format": results.FORMAT,
            "model": self.model,
            "reference_model": self.reference_model,
            "split": self.split,
            "note": results.NOTE,
            "tasks": reports,
        }
        atomic_write(run.path / "samples.jsonl", "".join(samples))
        atomic_write(run.path / "results.md", results.markdown(document))
        atomic_write(run.path / "results.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        (run.path / PARTS).rmtree()
        results.show(document)
        console.say(f"Results: {run.path / 'results.json'} (table: results.md; answers: samples.jsonl)")
        return results.figures(document)

    def _load(self, path: str) -> Model:
        console.say(f"Loading the model {path}")
        return model_lib.load(path, dtype=self.dtype, mesh=self.mesh)

    # ----------------------------------------------------------------------------------------------- one task

    def _evaluate(
        self, task: Task, systems: dict[str, Model], parts: epath.Path
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The task's report, and its samples."""
        model = systems["model"]
        source = self._source(task, self.split, model, shuffle=self.max_examples is not None)
        for name, system in systems.items():
            check_model(system, model, source.vocabulary, f"{name} {system.path}", task)
        examples = list(read_examples(source, self.max_examples))
        scored = bool(task.metrics) and isinstance(task.objective, Supervised)
        for name, system in systems.items() if scored else ():
            self._check_room(system, examples, name, task)
        likelihoods: dict[str, Likelihood] = {}
        texts: dict[str, list[str]] = {}
        for name, system in systems.items():
            said = f"{task.name}: likelihood of {name}"
            kept = _kept(
                parts / f"likelihood-{name}.json", likelihood, system, examples, said, self.batch_size
            )
            likelihoods[name] = Likelihood(**{key: np.asarray(values) for key, values in kept.items()})
            if scored:
                said = f"{task.name}: answers of {name}"
                texts[name] = _kept(parts / f"answers-{name}.json", self._answers, system, examples, said)
        wanted = [b for b in self.baselines if scored or isinstance(b, LikelihoodBaseline)]
        if wanted:
            train_source = self._source(
                task, self.train_split, model, shuffle=self.train_examples is not None
            )
            targets, pairs = [], []
            for example in read_examples(train_source, self.train_examples):
                targets.append(example.targets)
                if scored:  # a stream's text is not needed, and would take longer than all else to decode
                    pairs.append(example.pair)
            for baseline in wanted:
                if isinstance(baseline, LikelihoodBaseline):
                    table = baseline.log_probabilities(targets, source.vocabulary.vocab_size)
                    likelihoods[baseline.name] = table_likelihood(table, examples)
                else:
                    texts[baseline.name] = baseline.predict(
                        pairs, [example.pair.inputs for example in examples]
                    )
        statistics = source.statistics[task.name]
        report: dict[str, Any] = {
            "examples": len(examples),
            "cut": int(statistics.get("cut", 0)),
            "dropped": int(statistics.get("dropped", 0)),
            "tokens": int(sum(len(example.targets) for example in examples)),
            "bytes": int(sum(example.num_bytes for example in examples)),
            "systems": {name: {} for name in dict.fromkeys([*likelihoods, *texts])},
            "margins": {},
        }
        report["margins"] = {name: {} for name in report["systems"] if name != "model"}
        self._compare_likelihoods(likelihoods, examples, report)
        if scored:
            self._compare_texts(task, texts, examples, report)
        return report, [
            {
                "inputs": e.pair.inputs,
                "target": e.pair.target,
                "nats": round(float(likelihoods["model"].nats[i]), 4),
            }
            | {name: answers[i] for name, answers in texts.items()}
            for i, e in enumerate(examples)
        ]

    def _source(self, task: Task, split: str, model: Model, shuffle: bool) -> BatchSource:
        """One example in a row, in the store's order or shuffled."""
        return BatchSource(
            task,
            split,
            self.batch_size,
            self.lengths,
            model.config.architecture,
            seed=self.seed,
            pack=False,
            shuffle=shuffle,
        )

    def _room(self, model: Model, example: Example) -> int:
        """The most tokens of an answer: a decoder-only model's end with its context."""
        new = self.max_new_tokens or int(self.lengths["decoder"])
        limit = None if model.encoder_decoder else model.config.context_length
        return new if limit is None else min(new, limit - len(example.prompt))

    def _check_room(self, model: Model, examples: Sequence[Example], name: str, task: Task) -> None:
        for i, example in enumerate(examples):
            if self._room(model, example) < 1:
                raise UserError(
                    f"task {task.name!r}: the prompt of example {i} has {len(example.prompt)} tokens, the "
                    f"context of {name} {model.config.context_length}: no room is left for an answer. Lower "
                    f"lengths['decoder'], which is {self.lengths['decoder']}, and let the objective drop "
                    "what is longer (on_overlong = 'drop')"
                )

    def _answers(self, model: Model, examples: Sequence[Example], description: str) -> list[str]:
        assert model.vocabulary is not None
        texts: list[str] = []
        # In chunks, for the progress bar; within each, prompts of similar length go together.
        chunk = self.batch_size * 8
        with console.progress(description, len(examples), "examples") as bar:
            for start in range(0, len(examples), chunk):
                part = examples[start : start + chunk]
                rooms = [self._room(model, example) for example in part]
                answers: list[list[int]] = [[] for _ in part]
                for room in set(rooms):
                    chosen = [i for i in range(len(part)) if rooms[i] == room]
                    prompts = [part[i].prompt for i in chosen]
                    said = model.complete_tokens(prompts, room, batch_size=self.batch_size)
                    for i, answer in zip(chosen, said, strict=True):
                        answers[i] = answer
                texts += [model.vocabulary.decode(answer) for answer in answers]
                bar.advance(len(part))
        return texts

    def _compare_likelihoods(
        self, likelihoods: dict[str, Likelihood], examples: Sequence[Example], report: dict[str, Any]
    ) -> None:
        tokens = np.asarray([len(example.targets) for example in examples], np.float64)
        num_bytes = np.asarray([example.num_bytes for example in examples], np.float64)
        mine = likelihoods["model"]
        for name, its in likelihoods.items():
            report["systems"][name] |= {k: v.to_json() for k, v in its.estimates(tokens, num_bytes).items()}
            if name != "model":
                margins = mine.minus(its).differences(tokens, num_bytes)
                report["margins"][name] |= {k: v.to_json() for k, v in margins.items()}

    def _compare_texts(
        self, task: Task, texts: dict[str, list[str]], examples: Sequence[Example], report: dict[str, Any]
    ) -> None:
        post = task.postprocess or (lambda text: text)
        targets = [post(example.pair.target) for example in examples]
        answers = {name: [post(text) for text in rows] for name, rows in texts.items()}
        for metric in task.metrics:
            for name, rows in answers.items():
                scores = metrics_lib.estimate(metric, targets, rows, self.seed)
                report["systems"][name] |= {k: v.to_json() for k, v in scores.items()}
                if name != "model":
                    margins = metrics_lib.estimate_difference(
                        metric, targets, answers["model"], rows, self.seed
                    )
                    report["margins"][name] |= {k: v.to_json() for k, v in margins.items()}


def _kept(file: epath.Path, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make(*arguments)` returned, arrays as lists; from the file if it was made before. The workflow
    sees to it that the folder holds work of the same settings and inputs only.
    """
    if not file.exists():
        value = make(*arguments)
        if isinstance(value, Likelihood):
            value = {"nats": value.nats.tolist(), "correct": value.correct.tolist()}
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(value, ensure_ascii=False))
    return json.loads(file.read_text())


# --------------------------------------------------------------------------------------------------- examples


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of the split.

    Attributes:
      row: its arrays, int32 [length], under the pipeline's names.
      prompt: what an answer is generated from, int32 [length].
      targets: the scored target tokens, int32 [n].
      vocabulary: theirs.
    """

    row: dict[str, np.ndarray]
    prompt: np.ndarray
    targets: np.ndarray
    vocabulary: Vocabulary

    @functools.cached_property
    def pair(self) -> Pair:
        """Prompt and targets as text."""
        return Pair(self.vocabulary.decode(self.prompt), self.vocabulary.decode(self.targets))

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the target text; sentinels have none."""
        return count_bytes(self.pair.target)


def read_examples(source: BatchSource, limit: int | None = None) -> Iterator[Example]:
    """The examples of an unpacked source, each once, in its order of evaluation; rows that only fill a batch
    are left out.

    Args:
      source: with one example in a row.
      limit: only the first so many.

    Raises:
      UserError: no example has a scored token.
    """
    batches = source.evaluation_batches
    if limit is not None:
        batches = min(batches, -(-limit // source.batch_size))
    found = 0
    with contextlib.closing(source.evaluation_iter(max_batches=batches)) as iterator:
        for batch in iterator:
            for i in np.flatnonzero(batch["decoder_loss_weights"].any(axis=1)):
                if found == limit:
                    return
                found += 1
                yield _example({name: array[i] for name, array in batch.items()}, source.vocabulary)
    if not found:
        raise UserError(f"task {source.task.name!r} has no scored token in split {source.split!r}")


def _example(row: dict[str, np.ndarray], vocabulary: Vocabulary) -> Example:
    # Copies: a view would keep its whole batch in memory.
    used = int(np.flatnonzero(row["decoder_segment_ids"])[-1]) + 1
    sizes = {"decoder": used}
    if "encoder_segment_ids" in row:
        real = np.flatnonzero(row["encoder_segment_ids"])
        sizes["encoder"] = int(real[-1]) + 1 if len(real) else 1
    row = {name: array[: sizes[name.split("_")[0]]].copy() for name, array in row.items()}
    weights = row["decoder_loss_weights"] > 0
    targets = row["decoder_target_tokens"][weights]
    if "encoder" in sizes:
        prompt = row["encoder_input_tokens"]
    else:
        prompt = row["decoder_input_tokens"][: int(weights.argmax()) + 1]
    return Example(row, prompt, targets, vocabulary)


def count_bytes(text: str) -> int:
    """UTF-8 bytes of decoded target text, sentinels not counted.

    A replacement character stands for an unknown one or a part of one; it counts one byte, the least it can
    be, so that bits per byte never come out too low.
    """
    return len(_SENTINEL.sub("", text).replace("\ufffd", "?").encode("utf-8"))


# ------------------------------------------------------------------------------------------------- likelihood


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Per example, float64 [n]: negative log-likelihood of the target tokens in nats, and how many were
    foretold.
    """

    nats: np.ndarray
    correct: np.ndarray

    def minus(self, other: Likelihood) -> Likelihood:
        """The difference, example by example."""
        return Likelihood(self.nats - other.nats, self.correct - other.correct)

    def estimates(self, tokens: np.ndarray, num_bytes: np.ndarray) -> dict[str, Estimate]:
        """loss (nats per target token), perplexity (exp of it), bits_per_byte, token_accuracy (0 to 1).

        Bits per byte take all target tokens' nats, those of end-of-sequence and sentinels included, since
        without them the text is not told, and the bytes of the text alone.
        """
        values = self.differences(tokens, num_bytes)
        loss = values["loss"]
        # Delta method: the error of exp(x) is exp(x) times that of x.
        perplexity = math.exp(min(loss.value, 700.0))
        error = None if loss.standard_error is None else perplexity * loss.standard_error
        return {"loss": loss, "perplexity": Estimate(perplexity, error, loss.n), **values}

    def differences(self, tokens: np.ndarray, num_bytes: np.ndarray) -> dict[str, Estimate]:
        """The estimates that are sums over sums, so that differences of them have an error: all but
        perplexity.
        """
        values = {"loss": metrics_lib.ratio_estimate(self.nats, tokens)}
        if num_bytes.sum() > 0:
            values["bits_per_byte"] = metrics_lib.ratio_estimate(self.nats / math.log(2), num_bytes)
        return values | {"token_accuracy": metrics_lib.ratio_estimate(self.correct, tokens)}


def likelihood(model: Model, examples: Sequence[Example], description: str, batch_size: int) -> Likelihood:
    """Scores every example's target tokens, examples of similar length together."""
    nats, correct = np.zeros(len(examples)), np.zeros(len(examples))
    order = sorted(range(len(examples)), key=lambda i: [len(array) for array in examples[i].row.values()])
    with console.progress(description, len(examples), "examples") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [examples[i].row for i in chosen]
            batch = {}
            for name in rows[0]:
                length = bucket(max(len(row[name]) for row in rows))
                # As many rows in the last batch as in the others: one program for all.
                batch[name] = np.zeros((min(batch_size, len(order)), length), np.int32)
                for i, row in enumerate(rows):
                    batch[name][i, : len(row[name])] = row[name]
            scores, hits = model.token_scores(batch)
            weights = batch["decoder_loss_weights"] > 0
            count = len(chosen)
            nats[chosen] = -np.where(weights, scores.astype(np.float64), 0).sum(axis=1)[:count]
            correct[chosen] = (weights & hits).sum(axis=1)[:count]
            bar.advance(count)
    return Likelihood(nats, correct)


def table_likelihood(table: np.ndarray, examples: Sequence[Example]) -> Likelihood:
    """The same for a table of log-probabilities float64 [vocab], whatever stands before the token."""
    best = int(table.argmax())
    return Likelihood(
        np.asarray([-table[example.targets].sum() for example in examples]),
        np.asarray([(example.targets == best).sum() for example in examples], np.float64),
    )


def check_model(model: Model, first: Model, vocabulary: Vocabulary, name: str, task: Task) -> None:
    """Raises UserError unless the model can be evaluated on tokens of this vocabulary, side by side with
    `first`.
    """
    if model.config.architecture != first.config.architecture:
        raise UserError(
            f"{name} is {model.config.architecture}, the model {first.config.architecture}: "
            "they read different batches"
        )
    if model.vocabulary is None:
        raise UserError(f"{name} has no vocabulary: it cannot be checked against task {task.name!r}")
    if model.vocabulary.fingerprint != vocabulary.fingerprint:
        raise UserError(
            f"{name} has the vocabulary {model.vocabulary.fingerprint}, but task {task.name!r} was tokenized "
            f"with {vocabulary.fingerprint}: tokenize it again with the model's vocabulary"
        )
