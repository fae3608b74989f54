"""The program in which chat templates run: `python -I template_sandbox.py`, JSON lines in and out.

A template is a program by whoever made the model. Jinja's sandbox keeps it from Python's internals, but not
from looping for ever or from filling the memory, so that it runs in a process of its own with limits on its
memory and, kept by chat_template.py, on its time. This file imports nothing of the package: it starts in the
time that Jinja takes.
"""

from __future__ import annotations

import datetime
import functools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY = 1 << 30  # bytes of address space
FREE_OUTPUT = 1 << 20  # characters that a template may always write,
OUTPUT_FACTOR = 16  # and so many times what it was given


class Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what stands inside is the assistant's (Hugging Face's tag).

    It is written between two marks, if the caller gave any, so that it is found wherever the text ends up.
    """

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it
    marks = ("", "")

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

    def _between(self, caller: Callable[[], str]) -> str:
        return f"{self.marks[0]}{caller()}{self.marks[1]}"


class Namespace(jinja2.utils.Namespace):
    """`namespace()`, without names that begin with an underscore: they lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold the name {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes what HTML would read as a tag."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def environment() -> jinja2.Environment:
    """Jinja as chat templates expect it: the settings of transformers' apply_chat_template."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["namespace"] = Namespace
    # A function: the class would hand out its attributes.
    made.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    del made.globals["lipsum"]
    return made


ENVIRONMENT = environment()


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    return ENVIRONMENT.from_string(source)


def answer(line: str) -> dict[str, Any]:
    """{"text"}, or {"error", "line"}: what is wrong with the template, and where.

    A request holds "template", "variables", "marks" (two texts around what is generated) and "now" (an ISO
    date and time, or null for the clock's).
    """
    try:
        request = json.loads(line)
        moment = request["now"]
        clock = datetime.datetime.now() if moment is None else datetime.datetime.fromisoformat(moment)
        ENVIRONMENT.globals["strftime_now"] = clock.strftime
        extension = ENVIRONMENT.extensions[Generation.identifier]
        assert isinstance(extension, Generation)
        extension.marks = tuple(request["marks"])
        limit = FREE_OUTPUT + OUTPUT_FACTOR * len(line)
        pieces, length = [], 0
        for piece in _compiled(request["template"]).generate(**request["variables"]):
            pieces.append(piece)
            length += len(piece)
            if length > limit:
                return {"error": f"it writes more than {limit:,} characters", "line": None}
        return {"text": "".join(pieces)}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20:,} MiB of memory", "line": None}
    except RecursionError:
        return {"error": "it calls itself without end", "line": None}
    except Exception as error:  # whatever a template does is the template's error
        at = getattr(error, "lineno", None)
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == "<template>":
                at = frame.lineno
        return {"error": str(error) or type(error).__name__, "line": at}


def main() -> None:
    """Answers the lines of standard input until it ends."""
    try:
        import resource  # Unix only; elsewhere time alone is limited

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass
    for line in sys.stdin:
        sys.stdout.write(json.dumps(answer(line)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
