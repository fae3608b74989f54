"""Chat templates: messages to the text, and to the tokens, that a model was tuned on.

Templates are Jinja programs in the dialect of Hugging Face's `apply_chat_template`, and give the same text
and the same ids here. They run in a process of their own with limits on time, memory and output
(template_sandbox.py).
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from t5style.run_dir import PathLike, UserError, atomic_write

SECONDS = 10.0  # that a template may take for one conversation
DEFAULT, TOOL_USE = "default", "tool_use"

Message = Mapping[str, Any]
Span = tuple[int, int]  # first and last + 1 of characters

_KEPT_ANSWERS, _KEPT_CHARACTERS = 8, 1 << 18  # of the sandbox, and how long they may be
_SPECIAL = re.compile(r"(bos|eos|unk|sep|pad|cls|mask)_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template and what it is given besides the messages.

    Attributes:
      source: the Jinja text.
      variables: texts by name, such as `bos_token`; an argument of the same name goes before them.
      name: for errors: where it comes from.
    """

    source: str
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    name: str = "the chat template"


def render(
    template: ChatTemplate | str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    now: datetime.datetime | None = None,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
      template: what is read from a model's directory, or a Jinja text.
      messages: `{"role": ..., "content": ...}` each, and what else the template knows; all plain JSON values.
      tools, documents: JSON schemas of functions, and texts, for templates that show them.
      add_generation_prompt: end with what comes before an answer.
      now: what `strftime_now` tells; None: the clock's.
      **variables: for the template.

    Raises:
      UserError: the template is wrong, refuses the messages, or takes too long or too much; with its line.
    """
    given = collect(messages, tools, documents, add_generation_prompt, variables)
    return rendered(as_template(template), given, now=now)[0]


def as_template(template: ChatTemplate | str) -> ChatTemplate:
    return ChatTemplate(template) if isinstance(template, str) else template


def collect(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> dict[str, Any]:
    """What the template sees. As in transformers a field that is None is not there, and reasoning goes by all
    its names.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise UserError(
            f"messages are {messages!r}: give a list of at least one message with role and content"
        )
    seen = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f'message {number} is {message!r:.80}: give {{"role": ..., "content": ...}}')
        fields = {name: value for name, value in message.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        seen.append(fields)
    return {
        **variables,
        "messages": seen,
        "tools": tools,
        "documents": documents,
        "add_generation_prompt": add_generation_prompt,
    }


def rendered(
    template: ChatTemplate,
    given: Mapping[str, Any],
    *,
    now: datetime.datetime | None = None,
    spans: bool = False,
    marks: str = "",
) -> tuple[str, list[Span]]:
    """The text, and where in it `{% generation %}` blocks stand.

    marks: two characters that are in nothing that was given, where `spans` are wanted.
    """
    request = {
        "template": template.source,
        "variables": {**template.variables, **given},
        "marks": tuple(marks) if spans else ("", ""),
        "now": None if now is None or "strftime_now" not in template.source else now.isoformat(),
    }
    try:
        line = json.dumps(request)
    except (TypeError, ValueError) as error:
        raise UserError(f"messages and tools must be plain JSON values ({error})") from None
    answer = _SANDBOX.ask(line)
    if "error" in answer:
        where = "" if answer["line"] is None else f", line {answer['line']}"
        raise UserError(f"{template.name}{where}: {answer['error']}")
    text = answer["text"]
    return _without_marks(text, marks) if spans else (text, [])


def _without_marks(text: str, marks: str) -> tuple[str, list[Span]]:
    """The text without the marks, and the outermost spans between them."""
    found: list[Span] = []
    pieces, length, depth, start = [], 0, 0, 0
    for piece in re.split(f"([{marks}])", text):
        if piece == marks[0]:
            start = length if depth == 0 else start
            depth += 1
        elif piece == marks[1]:
            depth -= 1
            if depth == 0 and length > start:
                found.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), found


class _Sandbox:
    """The program that renders; started when it is first needed, and again after it had to be stopped.

    Its last answers are kept: to find the assistant's turns the same beginnings are asked for again.
    """

    def __init__(self) -> None:
        self._answers: collections.OrderedDict[str, dict[str, Any]] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, line: str) -> dict[str, Any]:
        with self._lock:
            if line in self._answers:
                return self._answers[line]
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            late = threading.Event()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(SECONDS, stop)
            timer.start()
            answer = ""
            try:
                process.stdin.write(line + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                timer.cancel()
                # Also after Ctrl-C: the next question must not read this one's answer.
                if late.is_set() or not answer.endswith("\n"):
                    self._process = None
                    with process:  # closes the pipes, and waits
                        process.kill()
        if not answer.endswith("\n"):
            return {"error": f"it takes more than {SECONDS:g} s or too much memory", "line": None}
        result = json.loads(answer)
        assert isinstance(result, dict)
        # The clock is part of the question, or the template does not ask for it.
        if "strftime_now" not in line and len(line) + len(answer) < _KEPT_CHARACTERS:
            with self._lock:
                self._answers[line] = result
                while len(self._answers) > _KEPT_ANSWERS:
                    self._answers.popitem(last=False)
        return result

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        program = Path(__file__).with_name("template_sandbox.py")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="ascii",
            env={},  # nothing of ours to be read there
            start_new_session=True,  # Ctrl-C in a terminal is not for it
        )
        self._owner = os.getpid()
        return self._process


_SANDBOX = _Sandbox()


# --------------------------------------------------------------------------------------------- where they lie


def read(folder: PathLike) -> dict[str, ChatTemplate]:
    """The chat templates of a Hugging Face directory by name; empty where it has none.

    From `chat_template.jinja` ("default") and `additional_chat_templates/*.jinja`; if there are none, from
    "chat_template" in tokenizer_config.json: a text, or a list of {"name", "template"}. Special tokens come
    from special_tokens_map.json and tokenizer_config.json.
    """
    path = epath.Path(folder)
    config = _json(path / "tokenizer_config.json")
    tokens = {**_json(path / "special_tokens_map.json"), **config}
    variables = {}
    for name, token in tokens.items():
        text = token.get("content") if isinstance(token, Mapping) else token
        if _SPECIAL.fullmatch(name) and isinstance(text, str):
            variables[name] = text
    sources: dict[str, tuple[str, str]] = {}
    if (main := path / "chat_template.jinja").exists():
        sources[DEFAULT] = _text(main), str(main)
    if (more := path / "additional_chat_templates").is_dir():
        for file in sorted(more.glob("*.jinja")):
            sources[file.stem] = _text(file), str(file)
    if not sources:
        place = f"the chat template in {path / 'tokenizer_config.json'}"
        named = config.get("chat_template") or []
        named = [{"name": DEFAULT, "template": named}] if isinstance(named, str) else named
        try:
            sources = {str(item["name"]): (str(item["template"]), place) for item in named}
        except (TypeError, KeyError):
            raise UserError(
                f"{place} is {named!r:.80}: it must be a text or a list of names and templates"
            ) from None
    return {name: ChatTemplate(source, variables, place) for name, (source, place) in sources.items()}


def from_gguf(metadata: Mapping[str, Any], place: str = "the GGUF file") -> dict[str, ChatTemplate]:
    """The chat templates in a GGUF file's metadata, as `read` gives them."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
    variables = {}
    for ours, theirs in names.items():
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None and 0 <= int(token) < len(tokens):
            variables[f"{ours}_token"] = str(tokens[int(token)])
    key = "tokenizer.chat_template"
    return {
        DEFAULT if name == key else name.removeprefix(key + "."): ChatTemplate(
            str(source), variables, f"the chat template of {place}"
        )
        for name, source in metadata.items()
        if name == key or name.startswith(key + ".")
    }


def of(path: PathLike) -> dict[str, ChatTemplate]:
    """The chat templates of a model by name: of a GGUF file, a Hugging Face directory, or a run folder (in it
    or in its vocabulary folder). Empty where it has none.
    """
    place = epath.Path(path)
    if place.is_file():
        from t5style.models.gguf import GgufFile

        return from_gguf(GgufFile(place).metadata, os.fspath(place))
    if place.name == "checkpoints" or place.parent.name == "checkpoints":
        place = place.parent if place.name == "checkpoints" else place.parent.parent
    for folder in (place, place / "vocabulary"):
        if folder.is_dir() and (found := read(folder)):
            return found
    return {}


def save(templates: Mapping[str, ChatTemplate], folder: PathLike) -> None:
    """Writes templates so that `read` finds them, with their texts of special tokens (of the default one)."""
    path = epath.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name, template in templates.items():
        file = path / "chat_template.jinja"
        if name != DEFAULT:
            file = path / "additional_chat_templates" / f"{name}.jinja"
            file.parent.mkdir(exist_ok=True)
        atomic_write(file, template.source)
    variables = dict(next(iter(templates.values())).variables) if templates else {}
    atomic_write(path / "special_tokens_map.json", json.dumps(variables, indent=1) + "\n")


def choose(templates: Mapping[str, ChatTemplate], tools: bool = False) -> ChatTemplate | None:
    """The template for a conversation, with or without tools; None if there is none."""
    if tools and TOOL_USE in templates:
        return templates[TOOL_USE]
    return templates.get(DEFAULT)


def _json(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _text(path: epath.Path) -> str:
    try:
        return str(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8") from None
