"""The job Generate: prompts in, texts out, both as JSON lines; it can be stopped and started again."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from t5style import console
from t5style.infer import model as model_lib
from t5style.infer.answers import Completion
from t5style.infer.batch import check_batch_size
from t5style.infer.settings import Settings
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError, atomic_write

OUTPUT = "generations.jsonl"
PARTIAL = "generations.partial.jsonl"
PROMPT_FIELDS = ("prompt", "inputs")
SETTINGS = tuple(
    field.name for field in dataclasses.fields(Settings) if field.name not in ("constraint", "tempered")
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A line of the prompts file: the text, its own settings, and what else stands in it."""

    text: str
    settings: Settings
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answers prompts with a model and writes `generations.jsonl`, one line for each prompt, in their order.

    A line of the prompts file may have settings of its own under the names below ("temperature",
    "max_new_tokens", "stop", "seed", "n" and so on), which then go before the job's.

    A line of the answers holds "index", "prompt", "seed", "settings" (those that are not Settings' defaults),
    and under "fields" what else stood in the prompt's line; then "output", "finish_reason" ("stop" or
    "length") and "new_tokens", and where logprobs is given "score", "tokens", "logprobs" and "top_logprobs"
    (infer.answers.Completion says what they are). With n > 1 these stand in each entry of the list "answers".
    Finished batches are appended to `generations.partial.jsonl`; a job that was stopped goes on behind them,
    and the file gets its final name when all are done.

    Attributes:
      model: a run folder, a checkpoint folder inside it, or a Hugging Face directory.
      prompts_file: JSON lines with the text in "prompt" or "inputs".
      prompts: the prompts themselves; instead of prompts_file.
      max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
      frequency_penalty, n, logprobs, stop, stop_tokens, logit_bias, banned: see infer.settings.Settings.
      seed: prompt number i samples with the seed `seed + i`, so an answer does not depend on the batch.
      batch_size: answers made at a time.
      dtype: compute and parameter type ("bfloat16", "float32"); None: as the model was trained.
      cache_dtype: of the keys and values that decoding keeps; None: as the model computes.
      mesh: how to spread the model over this machine's devices; None: one device.
    """

    model: str
    prompts_file: str | None = None
    prompts: Sequence[str] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    banned: Sequence[str | int | Sequence[int]] = ()
    batch_size: int = 16
    dtype: str | None = None
    cache_dtype: str | None = None
    mesh: MeshConfig | None = None

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise ValueError(f"prompts is the single string {self.prompts!r}: give a list of strings")
        if (self.prompts_file is None) == (not self.prompts):
            raise ValueError("give either prompts_file (JSON lines) or prompts (a list of strings), not both")
        check_batch_size(self.batch_size)
        self.settings()

    def settings(self, number: int = 0, own: Mapping[str, Any] | None = None) -> Settings:
        """How prompt number `number` is answered; own: settings of its line."""
        given = {name: getattr(self, name) for name in SETTINGS}
        given |= {"seed": self.seed + number, "logit_bias": self.logit_bias or {}}
        given |= {
            name: value for name, value in (own or {}).items() if name in SETTINGS and value is not None
        }
        return Settings(**given)

    def inputs(self) -> Sequence[str]:
        """The model and the prompts file."""
        return [self.model] + ([self.prompts_file] if self.prompts_file else [])

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Runs the job in `run.path`; returns {"prompts", "new_tokens"}."""
        if self.prompts_file:
            prompts = self._read(self.prompts_file)
        else:
            prompts = [Prompt(text, self.settings(i)) for i, text in enumerate(self.prompts)]
        partial, output = run.path / PARTIAL, run.path / OUTPUT
        lines = _finished_lines(output if output.exists() else partial)
        for i, (line, prompt) in enumerate(zip(lines, prompts, strict=False)):
            if {name: line.get(name) for name in _question(i, prompt)} != _question(i, prompt):
                raise UserError(
                    f"{run.path} holds answers to other prompts or settings (number {i} differs): "
                    "choose another run folder, or delete its generations*.jsonl"
                )
        if len(lines) > len(prompts):
            raise UserError(
                f"{run.path} holds {len(lines)} answers, but there are only {len(prompts)} prompts: "
                "choose another run folder, or delete its generations*.jsonl"
            )
        if len(lines) < len(prompts):
            console.say(
                f"Generating for {len(prompts):,} prompts with {self.model}"
                + (f", {len(lines):,} of them done before" if lines else "")
            )
            self._answer(prompts, lines, partial)
        if not output.exists():
            partial.replace(output)
        console.say(f"Answers: {output}")
        return {"prompts": len(prompts), "new_tokens": sum(map(_new_tokens, lines))}

    def _read(self, path: str) -> list[Prompt]:
        """The prompts of a file, each with its settings; UserError names the line of a bad one."""
        prompts = []
        for index, (number, record) in enumerate(read_prompts(path)):
            try:
                settings = self.settings(index, record)
            except (TypeError, ValueError) as error:
                raise UserError(f"{path}:{number}: {error}") from None
            rest = {k: v for k, v in record.items() if k not in PROMPT_FIELDS and k not in SETTINGS}
            prompts.append(Prompt(record["prompt"], settings, rest))
        return prompts

    def _answer(self, prompts: Sequence[Prompt], lines: list[dict[str, Any]], partial: epath.Path) -> None:
        """Answers prompts from number len(lines) on, appends them to the partial file and to `lines`."""
        model = model_lib.load(self.model, dtype=self.dtype, mesh=self.mesh, cache_dtype=self.cache_dtype)
        with console.progress("generate", len(prompts), "prompts", start=len(lines)) as bar:
            began, tokens = time.monotonic(), 0
            while len(lines) < len(prompts):
                start = len(lines)
                batch = prompts[start : start + self.batch_size]
                answers = model.complete(
                    [prompt.text for prompt in batch],
                    settings=[prompt.settings for prompt in batch],
                    batch_size=self.batch_size,
                )
                fresh = []
                for i, prompt in enumerate(batch):
                    own = [_told(answer) for answer in answers if answer.request == i]
                    answer = own[0] if prompt.settings.n == 1 else {"answers": own}
                    fresh.append({**_question(start + i, prompt), **answer, "fields": dict(prompt.fields)})
                _append(partial, fresh)
                lines += fresh
                tokens += sum(map(_new_tokens, fresh))
                rate = {"tokens/s": tokens / max(time.monotonic() - began, 1e-9)}
                bar.advance(len(fresh), new_tokens=tokens, **rate)


def _question(index: int, prompt: Prompt) -> dict[str, Any]:
    """What a line of the answers says of its prompt; a finished one must say the same to be kept."""
    settings = {
        name: value
        for name in SETTINGS
        if name != "seed" and (value := getattr(prompt.settings, name)) != getattr(Settings(), name)
    }
    said = {"index": index, "prompt": prompt.text, "seed": prompt.settings.seed, "settings": settings}
    return dict(json.loads(json.dumps(said)))  # lists and texts as keys, as they are read back


def _told(answer: Completion) -> dict[str, Any]:
    told: dict[str, Any] = {
        "output": answer.text,
        "finish_reason": answer.finish_reason,
        "new_tokens": len(answer.tokens),
    }
    if answer.logprobs is not None:
        told |= {"score": answer.score, "tokens": answer.tokens, "logprobs": answer.logprobs}
    if answer.top_logprobs is not None:
        told["top_logprobs"] = answer.top_logprobs
    return told


def _new_tokens(line: Mapping[str, Any]) -> int:
    return sum(answer["new_tokens"] for answer in line.get("answers", [line]))


def read_prompts(path: str) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers and records of a JSON-lines file, the text of each under "prompt".

    Raises UserError naming file and line for what is no JSON object with a non-empty text in "prompt" or
    "inputs".
    """
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"there is no prompts file {path!r}: give a file of JSON lines")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8: save the prompts as UTF-8") from None
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}): write one object on each line") from None
        if not isinstance(record, dict):
            raise UserError(f'{path}:{number}: {line[:60]!r} is not a JSON object with a "prompt"')
        name = next((field for field in PROMPT_FIELDS if field in record), None)
        if name is None:
            raise UserError(f'{path}:{number}: neither "prompt" nor "inputs" among {sorted(record)}')
        prompt = record[name]
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"{path}:{number}: {name!r} is {prompt!r}: give a text that is not empty")
        records.append((number, {**record, "prompt": prompt}))
    if not records:
        raise UserError(f"the prompts file {path!r} is empty: write one JSON object on each line")
    return records


def _finished_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The whole lines of an output file; a last line that a crash cut short is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if [line["index"] for line in lines] != list(range(len(lines))):
            raise ValueError("the lines are not numbered 0, 1, 2, …")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} was changed by another program ({error}): delete it to start anew") from None
    if len(whole) < len(content):
        atomic_write(path, whole)
    return lines


def _append(path: epath.Path, lines: Sequence[dict[str, Any]]) -> None:
    """Appends lines and waits until they are on disk (object stores: rewrites the object)."""
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8")
    if "://" in os.fspath(path):
        atomic_write(path, (path.read_bytes() if path.exists() else b"") + data)
        return
    try:
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; what is finished is kept, start again later"
        ) from None
