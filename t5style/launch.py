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
import platform
import shlex
import subprocess
import sys
import sysconfig
import tokenize
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console

import gin
from gin import config_parser
from t5style import run_dir, workflow
from t5style.console import console, make_table, say
from t5style.run_dir import RunDir, UserError
from t5style.settings import (
    COMMAND_LINE,
    REQUIRED,
    Binding,
    ConfigError,
    Macro,
    Place,
    Reference,
    Settings,
    Target,
    describe,
    find_file,
    nearest,
    type_problems,
)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "config.gin"
OPERATIVE = "operative_config.gin"
ERROR = "error.txt"

# Signs in the environment that this process is one of several (what they mean: parallel/distributed.py).
_CLUSTER_SIGNS = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "TPU_WORKER_ID", "MEGASCALE_COORDINATOR_ADDRESS")


def run(job: Any, run_dir: str, then: Callable[[Any, str], Any] | None = None) -> Any:
    """The root of every configuration: bind `launch.run.job` and `launch.run.run_dir` in a gin file.

    Python code may call it too: `launch.run(Pretrain(...), "runs/mine")` runs the job in that folder and
    returns its figures.

    Args:
      job: a job (see workflow.py).
      run_dir: the run's folder; made if it is not there.
      then: what to do with the two; None runs the job.
    """
    return (then or execute)(job, run_dir)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A configuration that was read, checked and built."""

    settings: Settings
    job: Any
    run_dir: str
    config: str  # flat gin text, as given
    operative: str  # gin's operative config: every parameter of everything built


# ------------------------------------------------------------------------------------------------ reading gin


def search_folders(extra: Sequence[str] = ()) -> list[str]:
    """Where gin files are looked for: here, `--gin_search_paths`, the repository, the installed package's
    data.
    """
    installed = os.path.join(sysconfig.get_path("data"), "share", "t5style")
    return [
        "",
        *extra,
        *(str(place) for place in (ROOT, installed) if os.path.isdir(os.path.join(place, "gin"))),
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
                f"{place}: {name!r} means nothing here: no import gives {root!r}{hint} "
                f"(add a line like `from t5style.train import {root}`)"
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
        flag = f"--gin.{text}"
        if not equals or not name:
            raise ConfigError(f"{flag}: write --gin.NAME=value or --gin.Class.field=value")
        if not config_parser.MODULE_RE.match(name.rsplit("/", 1)[-1]):
            raise ConfigError(f"{flag}: {name!r} is not a macro's name nor Class.field")
        place = Place(COMMAND_LINE)
        value = self._value(_parse_value(given, flag), self._anywhere)
        scope, _, path = name.rpartition("/")
        selector, _, field = path.rpartition(".")
        if selector:
            self.settings.add(Binding(scope, self._anywhere(selector), field, value, place))
        else:
            self.settings.add(Binding("", None, name, value, place))

    def _anywhere(self, name: str) -> Target:
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
            raise ConfigError(
                f"{COMMAND_LINE}: {name!r} may mean {' or '.join(sorted(candidates.values()))}; "
                "write the longer name"
            )
        if not candidates:
            hint = nearest(name, known) or nearest(name, {path.rsplit(".", 1)[-1] for path in known})
            raise ConfigError(
                f"{COMMAND_LINE}: no class or function {name!r} in what the gin files import{hint}"
            )
        path = next(iter(candidates.values()))
        return self.settings.target(known[path], path)


def _parse_value(given: str, flag: str) -> Any:
    """A gin value, or else a word or path taken as a string, so that `--gin.RUN_DIR=runs/mine` needs no inner
    quotes.
    """
    try:
        parser = config_parser.ConfigParser(given, _Delegate())
        value = parser.parse_value()
        if parser.current_token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            return value
    except (SyntaxError, tokenize.TokenError, IndexError):
        pass
    if given[:1].isalpha() or given[:1] in ("/", ".", "~", "_"):
        return given
    raise ConfigError(
        f"{flag}: {given!r} is not a value; strings may need quotes, as in --gin.NAME='\"text\"'"
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
    return f"; did you mean {same[0]!r}?" if same else ""


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
    problems = settings.problems(root_of(settings))
    if problems:
        raise ConfigError("\n".join(problems))
    config = settings.flat(f"As given to: {command_text(gin_files, bindings, search_paths)}")
    job, folder = _build(settings, config)
    return Loaded(settings, job, folder, config, gin.operative_config_str())


def root_of(settings: Settings) -> Target:
    """`launch.run`. Raises ConfigError if no file binds its job."""
    root = settings.targets.get(id(run))
    if root is None or not any(key[1:] == (id(run), "job") for key in settings.bindings):
        raise ConfigError(
            "no gin file binds launch.run.job: give an experiment, "
            "such as --gin_file=experiments/quickstart.gin, or add `from t5style import launch` and `launch.run.job = @module.Job()`"
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
    problems = list(dict.fromkeys(type_problems(settings, job)))
    if not isinstance(folder, str):
        problems.append(
            f"launch.run.run_dir must be a path, not {folder!r} "
            f"({settings.where(root_of(settings), 'run_dir')})"
        )
    if problems:
        raise ConfigError("\n".join(problems))
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
    """Replaces gin's wrappers of functions and classes passed as they are by the originals, which can be
    pickled.
    """
    if isinstance(value, types.FunctionType | type):
        originals = {
            id(gin.get_configurable(t.thing)): t.thing
            for t in settings.targets.values()
            if t.thing is not value
        }
        return originals.get(id(value), value)
    if isinstance(value, Mapping):
        return {key: _without_wrappers(item, settings) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_wrappers(item, settings) for item in value)
    if dataclasses.is_dataclass(value):
        held = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        plain = {name: _without_wrappers(item, settings) for name, item in held.items()}
        changed = {
            name: item for name, item in plain.items() if item is not held[name] and item != held[name]
        }
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
    """What `python -m t5style.main` does after its flags are parsed. Returns the exit status; prints errors
    itself.
    """
    command = command_text(gin_files, bindings, search_paths)
    folder: str | None = None
    try:
        if explain and not _explain(read(gin_files, bindings, search_paths)):
            return 1
        loaded = load(gin_files, bindings, search_paths)
        if dry_run:
            _dry_run(loaded)
        if explain_sharding:
            _explain_sharding(loaded)
        if dry_run or explain or explain_sharding:
            return 0
        folder = loaded.run_dir
        execute(loaded.job, folder, loaded)
    except KeyboardInterrupt:
        say(f"\nInterrupted. To go on where it was, run the same command again:\n    {command}")
        return 130
    except (UserError, ValueError, OSError) as error:
        _report(error, folder, user=isinstance(error, UserError))
        return 1
    except Exception as error:
        _report(error, folder, user=False)
        console.print(traceback.format_exc(), markup=False)
        return 1
    return 0


def execute(job: Any, folder: str, loaded: Loaded | None = None) -> dict[str, Any]:
    """Starts the processes if there are several, takes the run folder, writes what this run is, and runs the
    job.
    """
    workflow.check_job(job)
    distributed = bool(getattr(job, "distributed", False))
    if distributed or any(sign in os.environ for sign in _CLUSTER_SIGNS):
        from t5style.parallel import distributed as processes  # imports jax

        if processes.initialize():
            import jax

            run_dir.set_process(jax.process_index(), processes.barrier)
            processes.check_same("configuration", run_dir.fingerprint(job))
    run = RunDir(folder)
    with run.lock():
        if isinstance(job, workflow.Workflow):
            _write_description(run, loaded)
            figures = job(run)
        else:
            inputs = workflow.all_inputs(job, {}, run)
            if (
                workflow.state(job, run, inputs)[0] != "changed"
            ):  # else `perform` refuses; leave the folder as it is
                _write_description(run, loaded)
            figures = workflow.perform(job, run, {}, root=run, replace=False)
        if run_dir.is_main_process() and (run.path / ERROR).exists():
            (run.path / ERROR).unlink()
    say(f"Done. Everything is in {run.path}")
    return figures


def _write_description(run: RunDir, loaded: Loaded | None) -> None:
    """config.gin, operative_config.gin and lineage.json. A config.gin that says the same is left alone, with
    its places.
    """
    if not run_dir.is_main_process():
        return
    run.create()
    if loaded is not None:
        config = run.path / CONFIG
        before = config.read_text() if config.exists() else None
        if before is None or _bare(before) != _bare(loaded.config):
            if before is not None:
                number = 1
                while (kept := run.path / f"config.replaced-{number}.gin").exists():
                    number += 1
                run_dir.atomic_write(kept, before)
            run_dir.atomic_write(config, loaded.config)
        run_dir.atomic_write(run.path / OPERATIVE, loaded.operative)
    run.write_lineage(_lineage())


def _bare(config: str) -> list[str]:
    """The bindings of a config text without comments, in any order."""
    return sorted(
        line.split("  # ", 1)[0] for line in config.splitlines() if line and not line.startswith("#")
    )


def _lineage() -> dict[str, Any]:
    versions = {
        d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    return {
        "code": _git(),
        "command": shlex.join(sys.orig_argv),
        "started": run_dir.now(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": dict(sorted(versions.items(), key=lambda item: item[0].lower())),
    }


def _git() -> dict[str, Any]:
    """Commit of the code that runs, and whether files differ from it; the version alone if it is not in a
    repository.
    """
    code: dict[str, Any] = {"version": importlib.metadata.version("t5style")}
    if (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            git = ["git", "-C", str(ROOT)]
            ask = {
                "check": True,
                "capture_output": True,
                "text": True,
                "timeout": 20,
                "stdin": subprocess.DEVNULL,
            }
            code["commit"] = subprocess.run([*git, "rev-parse", "HEAD"], **ask).stdout.strip()  # type: ignore[call-overload]
            changed = subprocess.run([*git, "status", "--porcelain"], **ask).stdout.splitlines()  # type: ignore[call-overload]
            code["changed_files"] = [line[3:] for line in changed]
    return code


def _report(error: BaseException, folder: str | None, user: bool) -> None:
    """The error in words; the traceback goes to error.txt in the run folder if it is more than the user's own
    words.
    """
    text = str(error) or type(error).__name__
    console.print("error: ", style="bold red", end="")
    console.print(text, markup=False, style=None)
    if folder is None or (user and isinstance(error, ConfigError)) or not run_dir.is_main_process():
        return
    with contextlib.suppress(OSError):  # the disk may be what is wrong
        if os.path.isdir(folder) and not _in_use(folder):
            run_dir.atomic_write(os.path.join(folder, ERROR), traceback.format_exc())
            say(f"(where it happened: {os.path.join(folder, ERROR)})")


def _in_use(folder: str) -> bool:
    try:
        with RunDir(folder).lock():
            return False
    except UserError:
        return True


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


def _dry_run(loaded: Loaded) -> None:
    """Prints the job and what each stage would do; calls the `dry_run` hooks of jobs that have one."""
    job, run = loaded.job, RunDir(loaded.run_dir)
    say(f"Run folder: {run.path}")
    if isinstance(job, workflow.Workflow):
        for number, (name, stage, how) in enumerate(workflow.plan(job, run), start=1):
            say(f"[{number}/{len(job.stages)}] {name}: {how}. {workflow.purpose(stage)}")
            _say_job(stage, run.child(name), run, "    ")
    else:
        say(f"{workflow.forecast(job, run, workflow.all_inputs(job, {}, run))}. {workflow.purpose(job)}")
        _say_job(job, run, run, "")


def _say_job(job: Any, run: RunDir, root: RunDir, indent: str) -> None:
    for line in describe(job, indent=indent):
        say(line)
    if hasattr(job, "dry_run"):
        workflow.resolve(job, root).dry_run(run)


def _explain_sharding(loaded: Loaded) -> None:
    """Asks every job that has parameters to show how they lie on its mesh."""
    run = RunDir(loaded.run_dir)
    stages = loaded.job.stages if isinstance(loaded.job, workflow.Workflow) else {"": loaded.job}
    able = {name: job for name, job in stages.items() if hasattr(job, "explain_sharding")}
    if not able:
        raise UserError("--explain_sharding: no job of this configuration has a mesh")
    for name, job in able.items():
        if name:
            say(f"{name}: {type(job).__name__}")
        workflow.resolve(job, run).explain_sharding()


__all__ = ["REQUIRED", "Loaded", "execute", "load", "main", "read", "run", "search_folders"]
