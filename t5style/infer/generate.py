"""The job Generate: prompts in, texts out, both as JSON lines; it can be stopped and started again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, ClassVar

from etils import epath

from t5style import console
from t5style.infer import model as model_lib
from t5style.infer.batch import check_batch_size
from t5style.infer.settings import Settings
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError, atomic_write

OUTPUT = "generations.jsonl"
PARTIAL = "generations.partial.jsonl"
PROMPT_FIELDS = ("prompt", "inputs")


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answers prompts with a model and writes `generations.jsonl`, one line for each prompt, in their order.

    A line holds "index", "prompt", "output", "seed" and, under "fields", what else stood in the prompt's
    line. Finished batches are appended to `generations.partial.jsonl`; a job that was stopped goes on behind
    them, and the file gets its final name when all are done.

    Attributes:
      model: a run folder, a checkpoint folder inside it, or a Hugging Face directory.
      prompts_file: JSON lines with the text in "prompt" or "inputs".
      prompts: the prompts themselves; instead of prompts_file.
      max_new_tokens: at most so many tokens for each answer.
      temperature, top_k, top_p: see infer.sampling.Sampling; temperature 0 is greedy.
      seed: prompt number i samples with the seed `seed + i`, so an answer does not depend on the batch.
      batch_size: prompts answered at a time.
      dtype: compute and parameter type ("bfloat16", "float32"); None: as the model was trained.
      mesh: how to spread the model over this machine's devices; None: one device.
    """

    model: str
    prompts_file: str | None = None
    prompts: Sequence[str] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 16
    dtype: str | None = None
    mesh: MeshConfig | None = None

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise ValueError(f"prompts is the single string {self.prompts!r}: give a list of strings")
        if (self.prompts_file is None) == (not self.prompts):
            raise ValueError("give either prompts_file (JSON lines) or prompts (a list of strings), not both")
        check_batch_size(self.batch_size)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: give at least 1")
        Settings(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)

    def inputs(self) -> Sequence[str]:
        """The model and the prompts file."""
        return [self.model] + ([self.prompts_file] if self.prompts_file else [])

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Runs the job in `run.path`; returns {"prompts", "new_tokens"}."""
        records = (
            read_prompts(self.prompts_file) if self.prompts_file else [{"prompt": p} for p in self.prompts]
        )
        partial, output = run.path / PARTIAL, run.path / OUTPUT
        lines = _finished_lines(output if output.exists() else partial)
        for line, record in zip(lines, records, strict=False):
            if line["prompt"] != record["prompt"] or line["seed"] != self.seed + line["index"]:
                raise UserError(
                    f"{run.path} holds answers to other prompts (number {line['index']} differs): "
                    "choose another run folder, or delete its generations*.jsonl"
                )
        if len(lines) > len(records):
            raise UserError(
                f"{run.path} holds {len(lines)} answers, but there are only {len(records)} prompts: "
                "choose another run folder, or delete its generations*.jsonl"
            )
        if len(lines) < len(records):
            console.say(
                f"Generating for {len(records):,} prompts with {self.model}"
                + (f", {len(lines):,} of them done before" if lines else "")
            )
            self._answer(records, lines, partial)
        if not output.exists():
            partial.replace(output)
        console.say(f"Answers: {output}")
        return {"prompts": len(records), "new_tokens": sum(line["new_tokens"] for line in lines)}

    def _answer(
        self, records: Sequence[dict[str, Any]], lines: list[dict[str, Any]], partial: epath.Path
    ) -> None:
        """Answers records from number len(lines) on, appends them to the partial file and to `lines`."""
        model = model_lib.load(self.model, dtype=self.dtype, mesh=self.mesh)
        with console.progress("generate", len(records), "prompts", start=len(lines)) as bar:
            while len(lines) < len(records):
                start = len(lines)
                batch = records[start : start + self.batch_size]
                seeds = [self.seed + start + i for i in range(len(batch))]
                answers = model.complete(
                    [record["prompt"] for record in batch],
                    max_new_tokens=self.max_new_tokens,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                    seed=seeds,
                    batch_size=self.batch_size,
                )
                fresh = [
                    {
                        "index": start + i,
                        "prompt": record["prompt"],
                        "output": answer.text,
                        "new_tokens": len(answer.tokens),
                        "seed": seed,
                        "fields": {k: v for k, v in record.items() if k not in PROMPT_FIELDS},
                    }
                    for i, (record, answer, seed) in enumerate(zip(batch, answers, seeds, strict=True))
                ]
                _append(partial, fresh)
                lines += fresh
                bar.advance(len(fresh), new_tokens=sum(len(answer.tokens) for answer in answers))


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Records of a JSON-lines file, the text of each under "prompt".

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
        records.append({**record, "prompt": prompt})
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
