"""Gin files -> checked configuration -> the job bound to `launch.run.job`, run in its folder.

The only module that imports gin. It reads the files with gin's own parser, so that it knows where every
binding stands (`settings.py` holds the rules), writes them out as one flat gin text, and gives that text to
gin, which builds the job. The same text is saved in the run folder as config.gin: what was run can be run
again as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import shlex
import sys
import sysconfig
import tokenize
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gin
import rich.console
from gin import config_parser

from t5style import lineage, run_dir, runner, workflow
from t5style.console import console, make_table, say
from t5style.run_dir import UserError
from t5style.settings import (
    COMMAND_LINE,
    Binding,
    ConfigError,
    Macro,
    Place,
    Reference,
    Settings,
    Target,
    find_file,
    nearest,
)


def run(job: Any, run_dir: str, then: Callable[[Any, str], Any] | None = None) -> Any:
    """The root of every configuration: bind `launch.run.job` and `launch.run.run_dir` in a gin file.

    Python code may call it too: `launch.run(Pretrain(...), "runs/mine")` runs the job in that folder and
    returns its figures.

    Args:
      job: a job (see workflow.py).
      run_dir: the run's folder; made if it is not there.
      then: what to do with the two; None runs the job.
    """
    return (then or runner.execute)(job, run_dir)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A configuration that was read, checked and built."""

    settings: Settings
    job: Any
    run_dir: str
    text: runner.ConfigText


# ------------------------------------------------------------------------------------------------ reading gin


def search_folders(extra: Sequence[str] = ()) -> list[str]:
    """Where gin files are looked for: here, `--gin_search_paths`, the repository, the installed package's
    data.
    """
    installed = os.path.join(sysconfig.get_path("data"), "share", "t5style")
    return [
        "",
        *extra,
        *(str(place) for place in (lineage.ROOT, installed) if os.path.isdir(os.path.join(place, "gin"))),
    ]


@dataclasses.dataclass(frozen=True)
class _Name:
    """A reference as the parser saw it, before its name is looked up."""

    text: str
    called: bool


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> _Name:
        return _Name(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def read(
    gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()
) -> Settings:
    """Reads gin files in order, then `NAME=value` bindings as from the command line. Imports what the files
    import.

    Raises ConfigError for anything that is wrong by itself; `Settings.problems` tells what is wrong with the
    whole.
    """
    settings = Settings()
    reader = _Reader(settings, search_folders(search_paths))
    for file in gin_files:
        reader.file(file, None)
    for text in bindings:
        reader.command_line(text)
    return settings


class _Reader:
    def __init__(self, settings: Settings, folders: Sequence[str]) -> None:
        self.settings = settings
        self.folders = folders
        self._paths: dict[str, str] = {}  # real path -> name used in messages, of every file read
        self._open: list[str] = []  # files being read, outermost first

    def file(self, name: str, included_at: Place | None) -> None:
        """Reads one file, once: a second include of the same file only counts as an include."""
        try:
            path = find_file(name, self.folders)
        except ConfigError as error:
            raise ConfigError(f"{included_at}: {error}" if included_at else str(error)) from None
        real = os.path.realpath(path)
        shown = self._paths.get(real) or os.path.relpath(path) if not path.startswith("..") else path
        if len(shown) > len(path):
            shown = path
        if shown in self._open:
            raise ConfigError(f"{included_at}: {name} includes itself ({' -> '.join([*self._open, shown])})")
        for outer in self._open:
            below = {shown} | self.settings.includes.get(shown, set())
            self.settings.includes.setdefault(outer, set()).update(below)
        if real in self._paths:
            return
        self._paths[real] = shown
        self._open.append(shown)
        try:
            with open(path, encoding="utf-8") as stream:
                self._statements(shown, stream.read())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{shown}: not a text file in UTF-8 (byte {error.start})") from None
        finally:
            self._open.pop()

    def _statements(self, file: str, text: str) -> None:
        symbols: dict[str, tuple[str, types.ModuleType]] = {}
        with _syntax_errors(file):
            for statement in config_parser.ConfigParser(text, _Delegate()):
                place = Place(file, statement.location.line_num)
                if isinstance(statement, config_parser.IncludeStatement):
                    self.file(statement.filename, place)
                elif isinstance(statement, config_parser.ImportStatement):
                    self._import(statement, symbols, place)
                elif isinstance(statement, config_parser.BindingStatement):
                    scope, selector, field, value, _ = statement
                    look_up = lambda name, at=place: self._in_file(name, symbols, at)  # noqa: E731
                    target = look_up(selector) if field else None
                    scope, field = (
                        (scope, field) if field else ("", f"{scope}/{selector}" if scope else selector)
                    )
                    self.settings.add(Binding(scope, target, field, self._value(value, look_up), place))

    def _import(self, statement: Any, symbols: dict[str, tuple[str, types.ModuleType]], place: Place) -> None:
        if statement.module == "__gin__.dynamic_registration":
            return
        text, bound = statement.format(), statement.bound_name()
        try:
            module = importlib.import_module(statement.module)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if statement.module != missing and not statement.module.startswith(missing + "."):
                raise ConfigError(
                    f"{place}: {text!r} needs the Python package {missing!r}, which is not installed"
                ) from error
            raise ConfigError(f"{place}: {text!r}: {_no_module(statement.module)}") from None
        if not statement.is_from and not statement.alias:
            module = sys.modules[bound]  # as in Python: `import a.b` binds `a`
        symbols[bound] = (text, module)
        self.settings.add_import(text, bound, module, place)

    def _in_file(
        self, name: str, symbols: Mapping[str, tuple[str, types.ModuleType]], place: Place
    ) -> Target:
        """The class or function that a dotted name means in a file."""
        root, *attributes = name.split(".")
        if root not in symbols:
            if root == "gin":
                raise ConfigError(f"{place}: {name!r}: of gin's own names only %gin.REQUIRED may be used")
            everything = [f"{b}.{a}" for b, (_, m) in symbols.items() for a in _public(m)]
            hint = (
                nearest(root, symbols)
                if attributes
                else nearest(name, everything) or _by_last(name, everything)
            )
            raise ConfigError(
                f"{place}: {name!r} means nothing here: no import gives {root!r}{hint}; "
                f"add a line like `from t5style.train import {root}`"
            )
        found: Any = symbols[root][1]
        for attribute in attributes:
            if not hasattr(found, attribute):
                near = nearest(attribute, _public(found))
                raise ConfigError(f"{place}: {getattr(found, '__name__', found)} has no {attribute!r}{near}")
            found = getattr(found, attribute)
        if not (inspect.isclass(found) or inspect.isfunction(found)):
            raise ConfigError(f"{place}: {name!r} is a {type(found).__name__}, not a class or function")
        return self.settings.target(found, name)

    def _value(self, value: Any, look_up: Callable[[str], Target]) -> Any:
        """The parsed value with its references looked up."""
        if isinstance(value, _Name):
            scope, _, name = value.text.rpartition("/")
            return Reference(scope, look_up(name), value.called)
        if isinstance(value, Mapping):
            return {self._value(k, look_up): self._value(v, look_up) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._value(item, look_up) for item in value)
        return value

    # --------------------------------------------------------------------------------------- the command line

    def command_line(self, text: str) -> None:
        """One `NAME=value` or `scope/Class.field=value`; classes may be named without their module."""
        name, equals, given = text.partition("=")
        place = Place(COMMAND_LINE, flag=text)
        if not equals or not name:
            raise ConfigError(f"{place}: write --gin.NAME=value or --gin.Class.field=value")
        if not config_parser.MODULE_RE.match(name.rsplit("/", 1)[-1]):
            raise ConfigError(f"{place}: {name!r} is neither a macro's name nor Class.field")
        look_up = lambda path: self._anywhere(path, place)  # noqa: E731
        value = self._value(_parse_value(given, place), look_up)
        scope, _, path = name.rpartition("/")
        selector, _, field = path.rpartition(".")
        if selector:
            self.settings.add(Binding(scope, look_up(selector), field, value, place))
        else:
            self.settings.add(Binding("", None, name, value, place))

    def _anywhere(self, name: str, place: Place) -> Target:
        """The one class or function of that name, with or without its module, in all that the gin files
        import.
        """
        known: dict[str, Any] = {t.name: t.thing for t in self.settings.targets.values()}
        for bound, module in self.settings.imports.values():
            for attribute in _public(module):
                known.setdefault(f"{bound}.{attribute}", getattr(module, attribute))
        found = {
            id(thing): path for path, thing in known.items() if path == name or path.endswith("." + name)
        }
        used = {i: path for i, path in found.items() if i in self.settings.targets}
        candidates = used if len(used) == 1 else found
        if len(candidates) > 1:
            choice = " or ".join(sorted(candidates.values()))
            raise ConfigError(f"{place}: {name!r} may mean {choice}; write the longer name")
        if not candidates:
            hint = nearest(name, known) or nearest(name, {path.rsplit(".", 1)[-1] for path in known})
            raise ConfigError(f"{place}: no class or function {name!r} in what the gin files import{hint}")
        path = next(iter(candidates.values()))
        return self.settings.target(known[path], path)


def _parse_value(given: str, place: Place) -> Any:
    """A gin value, or else a word or path taken as a string, so that `--gin.RUN_DIR=runs/mine` needs no inner
    quotes.
    """
    try:
        parser = config_parser.ConfigParser(given, _Delegate())
        value = parser.parse_value()
        token = parser.current_token
        ended = token.type in (tokenize.NEWLINE, tokenize.ENDMARKER)
        if ended and token.start[0] >= len(given.splitlines()):  # nothing follows on another line
            return value
    except (SyntaxError, tokenize.TokenError, IndexError):
        pass
    if given[:1].isalpha() or given[:1] in ("/", ".", "~", "_"):
        return given
    raise ConfigError(
        f"{place}: {given!r} is not a value; strings may need quotes, as in --gin.NAME='\"text\"'"
    )


def _public(module: Any) -> list[str]:
    """Names of the classes and functions of a module (or class) that gin files may use."""
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing))
    ]


def _by_last(name: str, everything: Sequence[str]) -> str:
    same = [path for path in everything if path.rsplit(".", 1)[-1] == name]
    return f" (did you mean {same[0]!r}?)" if same else ""


def _no_module(name: str) -> str:
    """Why a module cannot be imported, with the nearest one that can."""
    parent, _, last = name.rpartition(".")
    while parent:
        try:
            package = importlib.import_module(parent)
        except ModuleNotFoundError:
            parent, _, last = parent.rpartition(".")
            continue
        if not hasattr(package, "__path__"):
            short = parent.rsplit(".", 1)[-1]
            return f"only modules are imported: import {parent}, and write {short}.{last} where you use it"
        inside = [info.name for info in pkgutil.iter_modules(package.__path__)]
        hint = nearest(last, inside) or "; it has " + ", ".join(inside)
        return f"there is no module {last!r} in {parent}{hint}"
    return f"there is no module {last!r}"


@contextlib.contextmanager
def _syntax_errors(file: str) -> Iterator[None]:
    """Turns the parser's errors into ConfigError with file and line."""
    try:
        yield
    except SyntaxError as error:
        location = error.args[1] if len(error.args) > 1 else None
        line = location[1] if location else 0
        code = str(location[3]).strip() if location else ""
        raise ConfigError(f"{file}:{line}: {error.args[0]} in the line {code!r}") from None
    except tokenize.TokenError as error:
        raise ConfigError(
            f"{file}:{error.args[1][0]}: {error.args[0]}: a bracket or string is not closed"
        ) from None


# --------------------------------------------------------------------------------------------------- building


def load(gin_files: Sequence[str], bindings: Sequence[str] = (), search_paths: Sequence[str] = ()) -> Loaded:
    """Reads, checks and builds a configuration without running anything. Raises ConfigError naming all that
    is wrong.
    """
    settings = read(gin_files, bindings, search_paths)
    root = root_of(settings)
    problems = settings.problems(root)
    if problems:
        raise ConfigError(_list(problems))
    config = settings.flat(root, f"As given to: {command_text(gin_files, bindings, search_paths)}")
    job, folder = _build(settings, config)
    return Loaded(settings, job, folder, runner.ConfigText(config, gin.operative_config_str()))


def _list(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} things are wrong with this configuration:" + "".join(
        f"\n  - {p}" for p in problems
    )


def root_of(settings: Settings) -> Target:
    """`launch.run`. Raises ConfigError if no file binds its job."""
    root = settings.targets.get(id(run))
    if root is None or not any(key[1:] == (id(run), "job") for key in settings.bindings):
        raise ConfigError(
            "no gin file binds launch.run.job: give an experiment, "
            "such as --gin_file=experiments/quickstart.gin, "
            "or add `from t5style import launch` and `launch.run.job = @module.Job()`"
        )
    return root


def _build(settings: Settings, config: str) -> tuple[Any, str]:
    gin.clear_config()
    gin.parse_config(config)
    try:
        built = gin.get_configurable(run)(then=lambda job, folder: (job, folder))
    except (ValueError, TypeError, UserError) as error:
        raise ConfigError(_explain_failure(settings, error)) from error
    job, folder = _without_wrappers(built, settings)
    try:
        workflow.check_job(job)
        if not isinstance(job, workflow.Workflow) and (names := workflow.stage_references(job)):
            raise ValueError(
                f"{type(job).__name__} refers to {workflow.PREFIX}{names[0]}, "
                "but only stages of a workflow can"
            )
        run_dir.fingerprint(job)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None
    return job, folder


def _explain_failure(settings: Settings, error: BaseException) -> str:
    """The message of a class that refused its values, without gin's additions, with the places of the fields
    it names.
    """
    message, *calls = str(error).split("\n  In call to configurable ")
    message = message.split("\n  No values supplied by Gin")[0]
    if not calls:
        return message
    short = calls[0].split("'")[1]
    places = []
    for target in settings.targets.values():
        if target.short == short:
            for field in target.parameters():
                if field in message and (where := settings.where(target, field)):
                    places.append(f"{field} is set at {where}")
    return f"{short}: {message}{' (' + '; '.join(places) + ')' if places else ''}"


def _without_wrappers(value: Any, settings: Settings) -> Any:
    """Replaces gin's wrappers of functions and classes passed as they are by the originals, which pickle."""
    if isinstance(value, types.FunctionType | type):
        targets = settings.targets.values()
        return {id(gin.get_configurable(t.thing)): t.thing for t in targets}.get(id(value), value)
    if isinstance(value, Mapping):
        return {key: _without_wrappers(item, settings) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_wrappers(item, settings) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        plain = {name: _without_wrappers(item, settings) for name, item in held.items()}
        changed = {name: item for name, item in plain.items() if item != held[name]}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def command_text(gin_files: Sequence[str], bindings: Sequence[str], search_paths: Sequence[str] = ()) -> str:
    """The command that gives this configuration."""
    words = ["python", "-m", "t5style.main", *(f"--gin_file={f}" for f in gin_files)]
    words += [f"--gin_search_paths={p}" for p in search_paths] + [f"--gin.{b}" for b in bindings]
    return shlex.join(words)


# ---------------------------------------------------------------------------------------------------- running


def main(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    *,
    dry_run: bool = False,
    explain: bool = False,
    explain_sharding: bool = False,
) -> int:
    """What the command does once its flags are parsed. Says errors itself; returns the exit status."""
    command = command_text(gin_files, bindings, search_paths)
    try:
        if explain and not _explain(read(gin_files, bindings, search_paths)):
            return 1
        loaded = load(gin_files, bindings, search_paths)
        if dry_run:
            runner.dry_run(loaded.job, loaded.run_dir)
        if explain_sharding:
            runner.explain_sharding(loaded.job, loaded.run_dir)
        if dry_run or explain or explain_sharding:
            return 0
        runner.execute(loaded.job, loaded.run_dir, loaded.text)
    except KeyboardInterrupt:
        say(f"\nInterrupted. To go on where it was, run the same command again:\n    {command}")
        return 130
    except SystemExit as stop:  # SIGTERM: training has saved its state
        return int(stop.code or 0)
    except BrokenPipeError:  # `--explain | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, ValueError, OSError) as error:
        runner.report(error)
        return 1
    except Exception as error:
        runner.report(error)
        console.print(traceback.format_exc(), markup=False)
        return 1
    return 0


# ------------------------------------------------------------------------------------------------ only saying


def _explain(settings: Settings) -> bool:
    """Prints every setting, where it comes from and what it overrides; False if something is wrong."""
    root = root_of(settings)
    # On standard output, so that it can be paged and searched; wide enough there for nothing to be folded.
    output = rich.console.Console(width=None if sys.stdout.isatty() else 200)
    output.print(make_table("Settings", ["name", "value", "from", "note"], settings.rows(root)))
    problems = settings.problems(root)
    for problem in problems:
        console.print("error: ", style="bold red", end="")
        console.print(problem, markup=False)
    return not problems
