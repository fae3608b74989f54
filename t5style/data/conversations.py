"""Files of examples to tune on: chats, instructions, preferences, prompts with answers; their shapes are
recognised record by record.

    chat      messages [{role, content}]; conversations [{from, value}] (ShareGPT); instruction, input, output
              (Alpaca); instruction, context, response (Dolly); instruction, instances (self-instruct);
              prompt, inputs or question with completion, response, output, targets or answer; rows of a tree
              (OASST: message_id, parent_id, role, text), or whole trees (prompt with text, role, replies), of
              which each answer is one conversation
    pairs     prompt, chosen, rejected, as texts or messages; chosen and rejected transcripts with
              "\\n\\nHuman: " and "\\n\\nAssistant: " (Anthropic's HH), whose common turns are the prompt;
              also margin, or score_chosen and score_rejected
    unpaired  prompt, completion, label (true or false)
    prompts   a prompt, inputs, question or messages, with whatever else a reward looks at
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5style.corpus import locations
from t5style.corpus.document import valid
from t5style.run_dir import UserError

Message = dict[str, Any]
Record = Mapping[str, Any]

KINDS = ("chat", "pairs", "unpaired", "prompts")
PROMPTS = ("prompt", "inputs", "question", "instruction")
COMPLETIONS = ("completion", "response", "output", "targets", "answer")
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_TURN = re.compile(r"\n\n(Human|Assistant): ?")


@dataclasses.dataclass(frozen=True)
class Example:
    """What a record says.

    Attributes:
      id: of the record.
      messages: the conversation; of pairs, unpaired and prompts up to the answer.
      answers: of pairs the chosen and the rejected answer, of unpaired the answer; else empty.
      desirable: of unpaired whether the answer is.
      margin: of pairs how much better the chosen answer is; None where the record does not say.
      record: of prompts what rewards look at.
      group: what shares its text, and so goes into one split: a record's or a tree's id; '' for `id` alone.
    """

    id: str
    messages: tuple[Message, ...]
    answers: tuple[str, ...] = ()
    desirable: bool = True
    margin: float | None = None
    record: Record = dataclasses.field(default_factory=dict)
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A record that is not learnt from: where it stands and why."""

    file: str
    line: int
    reason: str


# --- files ---


def records(paths: Sequence[str]) -> Iterator[tuple[str, int, Record | str]]:
    """(file, line or row counted from 1, the record or why there is none) of JSON lines, lists in .json files
    and Parquet files.

    Raises:
      UserError: there is no file, or one of another kind.
    """
    for entry in locations.find(paths):
        name = entry.path.lower()
        if name.endswith(".parquet"):
            yield from _parquet(entry.path)
        elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json", ".json.gz")):
            yield from _json_lines(entry.path)
        else:
            raise UserError(
                f"{entry.path} is no file of examples: give JSON lines (.jsonl, also .gz and .zst) or "
                "Parquet."
            )


def _json_lines(path: str) -> Iterator[tuple[str, int, Record | str]]:
    with locations.open_binary(path) as raw:
        file: Any = raw
        if path.lower().endswith(".gz"):
            file = gzip.GzipFile(fileobj=raw)
        elif path.lower().endswith(".zst"):
            import zstandard

            file = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
        try:
            if path.lower().endswith((".json", ".json.gz")):
                whole = file.read()
                if whole.lstrip()[:1] == b"[":
                    yield from _json_list(path, whole)
                    return
                file = whole.splitlines()
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    yield path, number, f"not JSON: {error}"
                    continue
                yield path, number, record if isinstance(record, dict) else "not a JSON object"
        except (OSError, EOFError) as error:
            raise UserError(f"{path} cannot be read to its end: {error}") from error


def _json_list(path: str, content: bytes) -> Iterator[tuple[str, int, Record | str]]:
    try:
        records = json.loads(content)
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    for number, record in enumerate(records, start=1):
        yield path, number, record if isinstance(record, dict) else "not a JSON object"


def _parquet(path: str) -> Iterator[tuple[str, int, Record | str]]:
    import pyarrow.parquet

    number = 0
    with locations.open_binary(path) as raw:
        for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(1024):
            for record in batch.to_pylist():
                number += 1
                yield path, number, record


# --- shapes ---


def kind_of(record: Record) -> str | None:
    """What a record is for; None if its shape is not known."""
    if "chosen" in record and "rejected" in record:
        return "pairs"
    if isinstance(record.get("label"), bool) and _first(record, COMPLETIONS) is not None:
        return "unpaired"
    if {"messages", "conversations", "instances", "message_id"} & record.keys():
        return "chat"
    if _is_tree(record):
        return "chat"
    if _first(record, PROMPTS) is None:
        return None
    return "prompts" if _first(record, COMPLETIONS) is None else "chat"


def example(record: Record, kind: str, id: str) -> list[Example] | str:
    """What the record says, read as `kind`; or why it says nothing."""
    try:
        found = _READERS[kind](record, str(record.get("id") or record.get("message_id") or id))
    except (AttributeError, TypeError):
        return f"its fields have another form than in {kind}"
    except (KeyError, ValueError) as error:
        return f"no {error.args[0]}" if isinstance(error, KeyError) else str(error)
    return found or "nothing to learn"


def _chat(record: Record, id: str) -> list[Example]:
    if _is_tree(record):
        return [made for made in tree(_rows(record["prompt"], id)) if isinstance(made, Example)]
    if "instances" in record:  # self-instruct
        return [
            Example(
                f"{id}/{number}" if number else id,
                _turns(_asked(record["instruction"], each.get("input")), _text(each["output"], "output")),
                group=id,
            )
            for number, each in enumerate(record["instances"])
        ]
    if "messages" in record or "conversations" in record:
        messages = _messages(record.get("messages") or record["conversations"])
        if record.get("system"):
            messages = ({"role": "system", "content": _text(record["system"], "system")}, *messages)
        if not any(message["role"] == "assistant" for message in messages):
            raise ValueError("no answer of the assistant among the messages")
        return [Example(id, messages)]
    prompt = record[_first(record, PROMPTS) or "prompt"]
    answer = _text(record[_first(record, COMPLETIONS) or "completion"], "completion")
    if not isinstance(prompt, str):
        return [Example(id, (*_messages(prompt), {"role": "assistant", "content": answer}))]
    context = record.get("input") or record.get("context")
    system = record.get("system")
    turns = _turns(_asked(prompt, context), answer)
    if system:
        turns = ({"role": "system", "content": _text(system, "system")}, *turns)
    return [Example(id, turns)]


def _pairs(record: Record, id: str) -> list[Example]:
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and "prompt" not in record:
        chosen, rejected = transcript(chosen), transcript(rejected)
    if not isinstance(chosen, str):
        chosen, rejected = _messages(chosen), _messages(rejected)
        if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
            raise ValueError("an answer that is not the assistant's")
        prompt = record.get("prompt")
        before = () if prompt is None else _asking(prompt)
        if chosen[:-1] != rejected[:-1]:
            raise ValueError("the conversations differ before their last turn")
        messages = chosen[:-1] or before
        chosen, rejected = chosen[-1]["content"], rejected[-1]["content"]
    else:
        messages = _asking(record["prompt"])
    if not messages:
        raise ValueError("no prompt before the answers")
    if _text(chosen, "chosen").strip() == _text(rejected, "rejected").strip():
        raise ValueError("chosen and rejected are the same")
    return [Example(id, messages, (chosen, rejected), margin=_margin(record))]


def _unpaired(record: Record, id: str) -> list[Example]:
    label = record["label"]
    if not isinstance(label, bool):
        raise ValueError(f"label is {label!r}, not true or false")
    answer = record[_first(record, COMPLETIONS) or "completion"]
    answer = answer if isinstance(answer, str) else _messages(answer)[-1]["content"]
    messages = _asking(record[_first(record, PROMPTS) or "prompt"])
    return [Example(id, messages, (_text(answer, "completion"),), label)]


def _prompts(record: Record, id: str) -> list[Example]:
    name = "messages" if "messages" in record else _first(record, PROMPTS)
    if name is None:
        raise KeyError("prompt")
    prompt = record[name]
    context = record.get("input") if isinstance(prompt, str) else None
    messages = _asking(_asked(prompt, context) if isinstance(prompt, str) else prompt)
    rest = {key: value for key, value in record.items() if key != name}
    if messages[-1]["role"] == "assistant":  # of a chat what the last answer answers
        rest, messages = {"answer": messages[-1]["content"], **rest}, messages[:-1]
    if not messages:
        raise ValueError("no prompt before the answer")
    return [Example(id, messages, record=rest)]


_READERS = {"chat": _chat, "pairs": _pairs, "unpaired": _unpaired, "prompts": _prompts}


def tree(rows: Sequence[Record]) -> Iterator[Example | Rejected]:
    """Conversations of rows that are messages of trees (OASST): one for each answer, with all before it; and
    the answers of which something before is missing, under their ids.
    """
    by_id = {row["message_id"]: row for row in rows}
    for row in rows:
        path: list[Record] = []
        at: Record | None = row
        while at is not None and len(path) <= len(rows):  # ids that run in a circle end too
            path.append(at)
            at = by_id.get(at.get("parent_id"))
        messages = tuple({"role": _role(each["role"]), "content": each["text"]} for each in reversed(path))
        if messages[-1]["role"] != "assistant":
            continue
        id = str(row["message_id"])
        if path[-1].get("parent_id") is not None:
            yield Rejected(id, 0, "a message before the answer is missing")
        elif messages[0]["role"] == "assistant":
            yield Rejected(id, 0, "an answer to nothing")
        else:
            yield Example(id, messages, group=str(path[-1]["message_id"]))


def row_of_tree(record: Record) -> str | None:
    """Why a record cannot be a message of a tree; None if it can."""
    try:
        _role(record.get("role"))
        _text(record.get("text"), "text")
    except ValueError as error:
        return str(error)
    return None


def _is_tree(record: Record) -> bool:
    prompt = record.get("prompt")
    return isinstance(prompt, Mapping) and "replies" in prompt


def _rows(root: Record, name: str) -> list[Record]:
    """The messages of a tree as rows; those without an id get one from the tree's name."""
    rows: list[Record] = []
    waiting: list[tuple[Record, Any]] = [(root, None)]
    while waiting:
        node, parent = waiting.pop()
        if problem := row_of_tree(node):
            raise ValueError(problem)
        id = node.get("message_id") or f"{name}/{len(rows)}"
        rows.append({"message_id": id, "parent_id": parent, "role": node["role"], "text": node["text"]})
        waiting += [(reply, id) for reply in reversed(node.get("replies") or [])]
    return rows


def transcript(text: str) -> tuple[Message, ...]:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ..." (Bai et al. 2022, Anthropic's HH)."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise ValueError("neither a prompt nor a transcript of Human and Assistant")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return tuple({"role": roles[who], "content": said.strip()} for who, said in turns)


# --- helpers ---


def _first(record: Record, names: Sequence[str]) -> str | None:
    return next((name for name in names if record.get(name) is not None), None)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is empty" if value in (None, "") else f"{name} is no text")
    return valid(value)


def _asked(instruction: Any, context: Any) -> str:
    text = _text(instruction, "prompt")
    return f"{text}\n\n{context}" if isinstance(context, str) and context.strip() else text


def _turns(prompt: str, answer: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer})


def _asking(prompt: Any) -> tuple[Message, ...]:
    if not isinstance(prompt, str):
        return _messages(prompt)
    if _TURN.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):  # a transcript up to the answer
        return transcript(prompt)[:-1]
    return ({"role": "user", "content": _text(prompt, "prompt")},)


def _margin(record: Record) -> float | None:
    """How much better the chosen answer is, by the record's margin or its scores."""
    better, worse = (
        record.get(f"score_{name}", record.get(f"{name}_score")) for name in ("chosen", "rejected")
    )
    margin = record.get("margin")
    if margin is None and better is not None and worse is not None:
        margin = float(better) - float(worse)
    if margin is None:
        return None
    if not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError("a margin that is no finite number")
    return float(margin)


def _messages(given: Any) -> tuple[Message, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise ValueError("the messages are no list, or an empty one")
    found = []
    for message in given:
        if not isinstance(message, Mapping):
            raise ValueError("a message without role and content")
        role = message.get("role") or message.get("from")
        content = message.get("content") if "content" in message else message.get("value")
        found.append({"role": _role(role), "content": _text(_joined(content), "a message")})
    return tuple(found)


def _joined(content: Any) -> Any:
    """Content that is a list of parts of text as one text."""
    if not isinstance(content, list) or not content:
        return content
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
        raise ValueError("a message with parts that are not text")
    return "".join(part["text"] for part in content)


def _role(role: Any) -> str:
    if not isinstance(role, str):
        raise ValueError("a message without a role")
    return _ROLES.get(role.lower(), role.lower())


def chance(id: str, seed: int) -> float:
    """A number in [0, 1) that the id and the seed decide."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id}".encode()).digest()[:8], "big") / 2**64
