"""Sequence-level distillation: the teacher's answers become the examples that a student is tuned on.

Kim and Rush 2016, Sequence-level knowledge distillation, section 3.2: the student is trained on the most
probable answer of the teacher, which beam search finds for them and greedy decoding for us; with a
temperature it is trained on samples, whose loss is the teacher's cross-entropy on average.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from t5style import console
from t5style.data.pipeline import BatchSource
from t5style.data.random import seed_of
from t5style.data.task import Task
from t5style.data.token_store import TokenStore, TokenStoreWriter
from t5style.evaluate import evaluator
from t5style.infer import model as model_lib
from t5style.infer.answers import answer_all
from t5style.infer.chat import located
from t5style.infer.settings import Settings
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError, atomic_write
from t5style.tune import supervised

ANSWERS = "answers.jsonl"
EXAMPLES = "examples.jsonl"
FEATURES = ("inputs", "targets")


@dataclasses.dataclass(frozen=True)
class Imitate:
    """Lets a teacher answer the prompts of examples, and makes examples of its answers.

    The run folder becomes a token store of the teacher's vocabulary with the features inputs and targets
    (Finetune.store), and gets examples.jsonl, {"prompt", "completion"} in text, for a student with another
    vocabulary (tune.examples.Examples). Splits that are not answered keep the targets they had. A job that
    was stopped goes on behind the answers that are there.

    Attributes:
      teacher: run folder, checkpoint, Hugging Face directory, .gguf file or 'package:NAME/PATTERN'.
      task: the examples whose prompts are answered; or store: a token store of examples.
      lengths: places in a row; prompts are cut to them as in training.
      splits: which are answered; kept: which are taken as they are, where the store has them.
      max_new_tokens, temperature, top_p: see infer.settings.Settings. n: answers to each prompt.
      unfinished: take answers that were cut at max_new_tokens too.
      max_examples: prompts of each split; None: all.
      batch_size: answers at a time.
      dtype, mesh: of the teacher, see infer.model.load.
      seed: of samples.
    """

    teacher: str
    task: Task | None = None
    store: str | None = None
    lengths: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"encoder": 512, "decoder": 512})
    splits: Sequence[str] = ("train",)
    kept: Sequence[str] = ("validation",)
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    unfinished: bool = False
    max_examples: int | None = None
    batch_size: int = 16
    dtype: str | None = None
    mesh: MeshConfig | None = None
    seed: int = 0

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.task is None) == (self.store is None):
            raise ValueError(
                "give a task or a store of examples whose prompts are to be answered, one of both"
            )
        if not self.splits or set(self.splits) & set(self.kept):
            raise ValueError(
                f"splits is {list(self.splits)} and kept {list(self.kept)}: a split is one of both"
            )
        if self.n > 1 and not self.temperature:
            raise ValueError(
                f"n is {self.n}, but at temperature 0 all answers are the same: set a temperature"
            )
        self._settings(0)

    def _settings(self, number: int) -> Settings:
        return Settings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            n=self.n,
            seed=seed_of(self.seed, number) % 2**32,
        )

    def inputs(self) -> Sequence[str]:
        """The teacher and the examples."""
        return [located(self.teacher), str(self.store if self.task is None else self.task.store)]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes the store; returns prompts, examples, and answers left out because they were cut, or
        empty."""
        task = self.task
        if task is None:
            assert self.store is not None
            task = Task("examples", self.store, supervised.objective_of(TokenStore.open(self.store)))
        teacher = model_lib.load(located(self.teacher), dtype=self.dtype, mesh=self.mesh)
        vocabulary = teacher.text_vocabulary()
        file = run.path / ANSWERS
        counts = {"prompts": 0, "examples": 0, "unfinished": 0, "empty": 0}
        lines: list[dict[str, str]] = []
        records = list(self._answered(task, teacher, file))
        there = TokenStore.open(task.store).splits
        kept = [split for split in self.kept if task.splits is not None or split in there]
        with TokenStoreWriter(os.fspath(run.path), FEATURES, vocabulary) as writer:
            for split in [*self.splits, *kept]:
                writer.add_split(split)
            for split in kept:
                for prompt, targets in self._examples(task, split, teacher):
                    writer.add(split, {"inputs": prompt, "targets": targets})
            for record in records:
                prompt, answers = np.asarray(record["prompt"], np.int32), record["answers"]
                counts["prompts"] += 1
                for tokens, finished in answers:
                    if not tokens or (not finished and not self.unfinished):
                        counts["unfinished" if tokens else "empty"] += 1
                        continue
                    counts["examples"] += 1
                    writer.add(record["split"], {"inputs": _inputs(prompt, teacher), "targets": tokens})
                    body = tokens[:-1] if finished else tokens
                    lines.append({"prompt": vocabulary.decode(prompt), "completion": vocabulary.decode(body)})
            if not counts["examples"]:
                raise UserError(
                    f"none of the teacher's {counts['unfinished'] + counts['empty']} answers has ended "
                    "within "
                    f"{self.max_new_tokens} tokens: raise max_new_tokens, or set unfinished to True"
                )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        atomic_write(run.path / EXAMPLES, text)
        console.say(
            f"{counts['examples']:,} examples of {counts['prompts']:,} prompts; left out: "
            f"{counts['unfinished']:,} "
            f"answers that had not ended, {counts['empty']:,} empty ones"
        )
        return counts

    def _source(self, task: Task, split: str, teacher: model_lib.Model) -> BatchSource:
        sides = ("encoder", "decoder") if teacher.encoder_decoder else ("decoder",)
        lengths = {side: self.lengths[side] for side in sides}
        shuffle = self.max_examples is not None
        return BatchSource(
            task,
            split,
            self.batch_size,
            lengths,
            teacher.config.architecture,
            self.seed,
            pack=False,
            shuffle=shuffle,
        )

    def _examples(
        self, task: Task, split: str, teacher: model_lib.Model
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Inputs and targets of a split as they are."""
        source = self._source(task, split, teacher)
        for example in evaluator.read_examples(source, self.max_examples):
            yield _inputs(example.prompt, teacher), example.targets

    def _answered(self, task: Task, teacher: model_lib.Model, file: Any) -> Iterator[dict[str, Any]]:
        """{"split", "number", "prompt": ids, "answers": [[ids, whether it has ended], ...]} of every
        prompt."""
        done = _read(file)
        yield from done
        with open(file, "ab") as opened:
            for split in self.splits:
                source = self._source(task, split, teacher)
                evaluator.check_model(
                    teacher, teacher, source.vocabulary, f"the teacher {self.teacher}", task
                )
                first = sum(record["split"] == split for record in done)
                total = self.max_examples or source.examples_per_epoch
                examples = evaluator.read_examples(source, self.max_examples)
                prompts = itertools.islice(enumerate(e.prompt for e in examples), first, None)
                said = f"{split}: the teacher's answers"
                with console.progress(said, total, "prompts", start=first) as bar:
                    # As many at a time as go into eight batches, in which prompts of similar length go
                    # together.
                    while part := list(itertools.islice(prompts, 8 * self.batch_size)):
                        records = self._answer(split, part, teacher)
                        opened.write("".join(json.dumps(record) + "\n" for record in records).encode())
                        opened.flush()
                        os.fsync(opened.fileno())
                        yield from records
                        bar.advance(len(part))

    def _answer(
        self, split: str, part: Sequence[tuple[int, np.ndarray]], teacher: model_lib.Model
    ) -> list[dict[str, Any]]:
        settings = [self._settings(number) for number, _ in part]
        answers: list[dict[int, Any]] = [{} for _ in part]
        prompts = [prompt for _, prompt in part]
        for batch in answer_all(teacher.engine, prompts, settings, teacher.vocabulary, self.batch_size):
            for answer, _ in batch:
                end = [] if answer.end is None else [answer.end]
                tokens = [int(token) for token in [*answer.tokens, *end]]
                answers[answer.request][answer.sample] = [tokens, bool(end)]
        return [
            {
                "split": split,
                "number": number,
                "prompt": prompt.tolist(),
                "answers": [found[i] for i in sorted(found)],
            }
            for (number, prompt), found in zip(part, answers, strict=True)
        ]


def _inputs(prompt: np.ndarray, teacher: model_lib.Model) -> np.ndarray:
    """A prompt without what a decoder-only model's rows begin with: batches put it there again."""
    return prompt if teacher.encoder_decoder else prompt[1:]


def _read(file: Any) -> list[dict[str, Any]]:
    """The whole lines of the answers' file; a last one that was cut short is taken away."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        atomic_write(file, whole)
    return [json.loads(line) for line in whole.splitlines()]
