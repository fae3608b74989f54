"""What gin files say, checked before anything is built: names, places, overrides, use, what is missing.

launch.py reads the files (it alone knows gin) and fills `Settings`; here is plain Python. The rules:

1. A file may override what the files that it includes have set (that is composition), below its includes.
2. The command line overrides every file.
3. Two files that do not include one another must not set the same thing to different values, unless a file
   that includes both, or the command line, sets it too. Nor may a file set one thing twice.
4. Unused macros and fields, names that do not exist and missing required values are errors.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import itertools
import os
import pprint
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from t5style import run_dir

COMMAND_LINE = "the command line"


class ConfigError(run_dir.UserError):
    """Something is wrong in the gin files or on the command line."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a binding stands: a file as the user would name it and its line, or the command line."""

    file: str
    line: int = 0
    flag: str = ""  # as given on the command line

    def __str__(self) -> str:
        return f"--gin.{one_line(self.flag)}" if self.file == COMMAND_LINE else f"{self.file}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Target:
    """A class or function that gin files configure; `name` is its name in the flat config, e.g.
    `pretrain.Pretrain`.
    """

    thing: Callable[..., Any]
    name: str

    @property
    def short(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.thing).parameters

    def required(self) -> list[str]:
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return [n for n, p in self.parameters().items() if p.default is p.empty and p.kind not in kinds]


@dataclasses.dataclass(frozen=True, repr=False)
class Reference:
    """`@scope/target()`, or `@scope/target` if it is not called."""

    scope: str
    target: Target
    called: bool

    def __repr__(self) -> str:
        return f"@{self.scope + '/' if self.scope else ''}{self.target.name}{'()' if self.called else ''}"


@dataclasses.dataclass(frozen=True, repr=False)
class Macro:
    """`%NAME`."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


REQUIRED = Macro("gin.REQUIRED")


@dataclasses.dataclass
class Binding:
    """One `name = value`. For a macro `target` is None and `scope` and `field` are its name."""

    scope: str
    target: Target | None
    field: str
    value: Any
    place: Place
    before: Binding | None = None  # what it overrides

    @property
    def name(self) -> str:
        path = f"{self.target.name}.{self.field}" if self.target else self.field
        return f"{self.scope}/{path}" if self.scope else path

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.scope, id(self.target.thing) if self.target else 0, self.field)

    def history(self) -> Iterator[Binding]:
        """This binding and all that it overrides, newest first."""
        binding: Binding | None = self
        while binding is not None:
            yield binding
            binding = binding.before


def one_line(text: str) -> str:
    r"""The text with `\n` for its line breaks, as comments and messages need it."""
    return r"\n".join(text.splitlines())


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the most similar of the known names, or nothing."""
    known = list(known)
    lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name, known, 1) or [
        lower[match] for match in difflib.get_close_matches(name.lower(), lower, 1)
    ]
    return f" (did you mean {found[0]!r}?)" if found else ""


class Settings:
    """All bindings of one configuration, in the order in which they were made."""

    def __init__(self) -> None:
        self.imports: dict[str, tuple[str, types.ModuleType]] = {}  # import statement -> (bound name, module)
        self.bindings: dict[tuple[str, int, str], Binding] = {}
        self.targets: dict[int, Target] = {}  # by id of the class or function
        self.includes: dict[str, set[str]] = {}  # file -> all files that it includes, directly or not
        self._rivals: dict[tuple[str, int, str], list[Binding]] = {}  # set by no file that includes another

    # ------------------------------------------------------------------------------------------------- adding

    def add_import(self, statement: str, bound: str, module: types.ModuleType, place: Place) -> None:
        """Raises ConfigError if another file means another module by the same name."""
        for other, (name, known) in self.imports.items():
            if name == bound and known is not module:
                raise ConfigError(
                    f"{place}: {statement!r}, and {other!r} in another file, give two modules the name "
                    f"{bound!r}; add `as another_name` to one of them"
                )
        self.imports.setdefault(statement, (bound, module))

    def target(self, thing: Callable[..., Any], name: str) -> Target:
        """The one Target of a class or function; the name it was first given stays."""
        return self.targets.setdefault(id(thing), Target(thing, name))

    def add(self, binding: Binding) -> None:
        """Adds a binding, by the rules above. Raises ConfigError where it is plainly wrong."""
        if binding.target is not None:
            parameters = binding.target.parameters()
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            if binding.field not in parameters and not takes_any:
                raise ConfigError(
                    f"{binding.place}: {binding.target.name} has no field {binding.field!r}"
                    f"{nearest(binding.field, parameters) or '; it has ' + (', '.join(parameters) or 'none')}"
                )
        old = self.bindings.get(binding.key)
        if old is None:
            self.bindings[binding.key] = binding
            return
        new_file, old_file = binding.place.file, old.place.file
        if new_file == old_file and new_file != COMMAND_LINE:
            raise ConfigError(
                f"{binding.place}: {binding.name} is set for the second time in this file "
                f"(first at {old.place}); remove one of the two lines"
            )
        if new_file in self.includes.get(old_file, ()):
            raise ConfigError(
                f"{binding.place}: this included file would override {binding.name}, set at {old.place}; "
                f"move the include of {new_file} above that line"
            )
        binding.before = old
        self.bindings[binding.key] = binding
        below = self.includes.get(new_file, ())
        rivals = [b for b in self._rivals.get(binding.key, [old]) if b.place.file not in below]
        self._rivals[binding.key] = [binding] if new_file == COMMAND_LINE else [*rivals, binding]

    # ----------------------------------------------------------------------------------------------- checking

    def macro(self, name: str) -> Binding | None:
        return self.bindings.get(("", 0, name))

    def effective(self, target: Target, scope: str) -> dict[str, list[Binding]]:
        """field -> bindings that apply to `target` in `scope`, the one that counts last (gin: inner scopes
        win).
        """
        parts = scope.split("/") if scope else []
        found: dict[str, list[Binding]] = {}
        for length in range(len(parts) + 1):
            prefix = "/".join(parts[:length])
            for field in target.parameters():
                binding = self.bindings.get((prefix, id(target.thing), field))
                if binding is not None:
                    found.setdefault(field, []).append(binding)
        return found

    def problems(self, root: Target) -> list[str]:
        """Everything that is wrong with the whole configuration, a sentence each; empty if all is well."""
        found = [
            f"{new.place}: {new.name} = {new.value!r} silently overrides {old.value!r} set at {old.place}; "
            f"set it in the file that includes both, or with --gin.{_flag(new)}=..."
            for rivals in self._rivals.values()
            for old, new in itertools.pairwise(rivals)
            if old.value != new.value
        ]
        now = _Walk(self, with_history=False)
        now.visit(root, "")
        ever = _Walk(self, with_history=True)
        ever.visit(root, "")
        found += now.problems
        used_macros = sorted(
            {b.field for b in self.bindings.values() if b.target is None and b.key in ever.used}
        )
        for key, binding in self.bindings.items():
            if key in now.used or (binding.place.file != COMMAND_LINE and key in ever.used):
                continue
            if binding.target is None:
                hint = nearest(binding.field, [name for name in used_macros if name != binding.field])
                found.append(
                    f"{binding.place}: macro {binding.field} = {binding.value!r} is used nowhere{hint}"
                )
            elif winners := now.winners(binding):
                first = winners[0]
                hint = (
                    f"; you may mean --gin.{_flag(first)}=..." if binding.place.file == COMMAND_LINE else ""
                )
                others = ", ".join(f"{b.name} ({b.place})" for b in winners[:3])
                found.append(f"{binding.place}: {binding.name} has no effect: {others} wins over it{hint}")
            elif (id(binding.target.thing)) in {i for i, _ in now.visited}:
                unused = f"nothing uses {binding.target.short} in the scope {binding.scope!r}"
                found.append(f"{binding.place}: {binding.name} has no effect: {unused}")
            else:
                hint = nearest(binding.target.name, sorted({self.targets[i].name for i, _ in now.visited}))
                said = f"is set, but this job uses no {binding.target.name}{hint}"
                found.append(f"{binding.place}: {binding.name} {said}")
        return list(dict.fromkeys(found))

    def where(self, target: Target, field: str) -> str:
        """Where a field's value comes from, macros followed: `experiments/x.gin:3 (%STEPS), the command
        line`.
        """
        parts = []
        for binding in self.bindings.values():
            if binding.target is target and binding.field == field:
                parts.append(str(binding.place))
                value = binding.value
                while isinstance(value, Macro) and (macro := self.macro(value.name)) is not None:
                    parts[-1] += f" (%{macro.field}, {macro.place})"
                    value = macro.value
        return ", ".join(parts)

    # ------------------------------------------------------------------------------------------------ writing

    def flat(self, root: Target, command: str) -> str:
        """What has an effect, as one gin text that can be run again; each line says where it came from."""
        now = _Walk(self, with_history=False)
        now.visit(root, "")
        counting = [b for b in self.bindings.values() if b.key in now.used]
        lines = [f"# {one_line(command)}", "", "from __gin__ import dynamic_registration"]
        lines += sorted(self.imports)
        ordered = sorted(counting, key=lambda b: b.target is not None)  # macros first; stable
        previous = None
        for binding in ordered:
            group = binding.target and (binding.scope, binding.target.name)
            if group != previous or binding is ordered[0]:
                lines.append("")
                previous = group
            origin = f"  # {binding.place}"
            if binding.before is not None:
                origin += f" (instead of {binding.before.value!r}, {binding.before.place})".replace("\n", " ")
            lines.append(f"{binding.name} = {render(binding.value)}{origin}")
        return "\n".join(lines) + "\n"

    def rows(self, root: Target) -> list[tuple[str, str, str, str]]:
        """For --explain: (name, value, from, note) of every macro, every bound field and every field left
        alone.
        """
        result = []
        for binding in self.bindings.values():
            if binding.target is None:
                result.append((binding.name, render(binding.value), str(binding.place), _note(binding)))
        walk = _Walk(self, with_history=False)
        walk.visit(root, "")
        for i, scope in walk.visited:
            target = self.targets[i]
            effective = self.effective(target, scope)
            prefix = f"{scope}/" if scope else ""
            for field, parameter in target.parameters().items():
                if target is root and field == "then":  # not for gin files
                    continue
                if field in effective:
                    last = effective[field][-1]
                    note = "; ".join(
                        n for n in [_note(last), *(f"wins over {b.name}" for b in effective[field][:-1])] if n
                    )
                    name = last.name if last.scope else f"{prefix}{last.name}"
                    result.append((name, render(last.value), str(last.place), note))
                elif parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    required = parameter.default is parameter.empty
                    value = "REQUIRED, not set" if required else _default(target.thing, field, parameter)
                    result.append(
                        (f"{prefix}{target.name}.{field}", value, "" if required else "default", "")
                    )
        return result


class _Walk:
    """Follows references and macros from the root, as gin will when it builds the job."""

    def __init__(self, settings: Settings, with_history: bool) -> None:
        self.settings = settings
        self.with_history = with_history
        self.used: set[tuple[str, int, str]] = set()
        self.visited: dict[tuple[int, str], None] = {}  # (target, scope) of every call
        self.mentioned: set[int] = set()  # targets passed as they are
        self.problems: list[str] = []
        self._stack: list[str] = []

    def visit(self, target: Target, scope: str) -> None:
        place = (id(target.thing), scope)
        if place in self.visited:
            return
        self.visited[place] = None
        effective = self.settings.effective(target, scope)
        for field in target.required():
            if field not in effective:
                self._missing(target, field, scope)
        self._stack.append(target.name)
        hints = _hints(target.thing)
        for field, bindings in effective.items():
            if bindings[-1].value == REQUIRED:
                self._missing(target, field, scope)
            self._check_type(bindings[-1], hints.get(field, Any))
            for binding in bindings if self.with_history else bindings[-1:]:
                self.used.add(binding.key)
                for one in binding.history() if self.with_history else [binding]:
                    self._follow(one.value, scope, one)
        self._stack.pop()

    def winners(self, binding: Binding) -> list[Binding]:
        """The bindings of inner scopes that hide `binding` wherever its target is used."""
        hiding: dict[int, Binding] = {}
        for i, scope in self.visited:
            if binding.target is not None and i == id(binding.target.thing):
                for other in self.settings.effective(binding.target, scope).get(binding.field, []):
                    if other.scope != binding.scope and (scope + "/").startswith(binding.scope):
                        hiding[id(other)] = other
        return list(hiding.values())

    def _missing(self, target: Target, field: str, scope: str) -> None:
        flag = f"{scope}/{target.short}.{field}" if scope else f"{target.short}.{field}"
        user = f" (needed by {self._stack[-1]})" if self._stack else ""
        self.problems.append(
            f"{target.name}.{field} is required and not set{user}; "
            f"set it in a gin file or with --gin.{flag}=..."
        )

    def _check_type(self, binding: Binding, hint: Any) -> None:
        """Notes a plain field (int, float, bool, str) that is given something else, through macros too."""
        value, chain = binding.value, ""
        while isinstance(value, Macro):
            macro = self.settings.macro(value.name)
            if macro is None or len(chain) > 1000:  # missing, or of itself: said elsewhere
                return
            value, chain = macro.value, f"{chain} (%{macro.field} is set at {macro.place})"
        if not isinstance(value, Reference) and not _fits(value, hint):
            name = getattr(hint, "__name__", None) or str(hint)
            if dataclasses.is_dataclass(hint):
                name += f" (written @{name}())"
            given = f"{type(value).__name__} {value!r}{chain}"
            self.problems.append(f"{binding.place}: {binding.name} must be {name}, not {given}")

    def _follow(self, value: Any, scope: str, binding: Binding) -> None:
        if isinstance(value, Reference):
            inner = value.scope or scope
            if not value.called:
                if any(self.settings.effective(value.target, inner)):
                    self.problems.append(
                        f"{binding.place}: {value!r} passes {value.target.name} itself, "
                        f"so its settings would be lost; write {value!r}() or remove the settings"
                    )
                self.mentioned.add(id(value.target.thing))
            elif value.target.name in self._stack and (id(value.target.thing), inner) in self.visited:
                self.problems.append(f"{binding.place}: {value!r} contains itself")
            else:
                self.visit(value.target, inner)
        elif isinstance(value, Macro) and value != REQUIRED:
            macro = self.settings.macro(value.name)
            if macro is None or macro.value == REQUIRED:
                known = [b.field for b in self.settings.bindings.values() if b.target is None]
                said = f" ({macro.place} asks for it)" if macro else nearest(value.name, known)
                if macro is not None:
                    self.used.add(macro.key)
                self.problems.append(
                    f"{binding.place}: {binding.name} needs macro {value.name}, "
                    f"which is set nowhere{said or ''}; set it in a gin file or with --gin.{value.name}=..."
                )
                return
            if value.name in self._stack:
                self.problems.append(f"{macro.place}: macro {value.name} contains itself")
                return
            self.used.add(macro.key)
            self._stack.append(value.name)
            for one in macro.history() if self.with_history else [macro]:
                self._follow(
                    one.value, value.name, one
                )  # gin evaluates a macro's value in the scope of its name
            self._stack.pop()
        elif isinstance(value, Mapping):
            for item in [*value.keys(), *value.values()]:
                self._follow(item, scope, binding)
        elif isinstance(value, list | tuple):
            for item in value:
                self._follow(item, scope, binding)


def _flag(binding: Binding) -> str:
    if binding.target is None:
        return binding.field
    return f"{binding.scope + '/' if binding.scope else ''}{binding.target.short}.{binding.field}"


def _note(binding: Binding) -> str:
    return "; ".join(f"instead of {render(b.value)} from {b.place}" for b in list(binding.history())[1:])


def _default(thing: Callable[..., Any], field: str, parameter: inspect.Parameter) -> str:
    if dataclasses.is_dataclass(thing):  # a signature shows factories as <factory>
        declared = {f.name: f for f in dataclasses.fields(thing)}.get(field)
        if declared is not None and declared.default_factory is not dataclasses.MISSING:
            return repr(declared.default_factory())
    return repr(parameter.default)


def render(value: Any) -> str:
    """A value as gin text."""
    return pprint.pformat(value, width=100, sort_dicts=False)


# ------------------------------------------------------------------------------------------------------ types


def _hints(thing: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of what can be set; empty where they name things that exist for type checkers only."""
    try:
        own = inspect.isclass(thing) and not dataclasses.is_dataclass(thing)
        return typing.get_type_hints(thing.__init__ if own else thing)
    except NameError:
        return {}


_PLAIN = {int: (int,), float: (int, float), bool: (bool,), str: (str,), type(None): (type(None),)}


def _fits(value: Any, hint: Any) -> bool:
    """False only where the annotation is plain types or dataclasses and the value is of none of them."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    if not all(isinstance(one, type) and (one in _PLAIN or dataclasses.is_dataclass(one)) for one in options):
        return True
    if isinstance(value, bool):
        return bool in options
    return any(isinstance(value, _PLAIN.get(option, option)) for option in options)


def find_file(name: str, folders: Sequence[str]) -> str:
    """The path of a gin file searched in `folders` in order. Raises ConfigError naming the nearest file."""
    for folder in [""] if os.path.isabs(name) else folders:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    there: set[str] = set()
    for folder in folders:
        beside = os.path.join(folder, os.path.dirname(name))
        if os.path.isdir(beside):
            there |= {os.path.join(os.path.dirname(name), file) for file in os.listdir(beside)}
        for part in ("gin", "experiments"):
            for place, _, files in os.walk(os.path.join(folder, part)):
                there |= {os.path.relpath(os.path.join(place, file), folder) for file in files}
    there = {file for file in there if file.endswith(".gin")}
    searched = ", ".join(dict.fromkeys(os.path.abspath(folder) for folder in folders))
    raise ConfigError(f"there is no gin file {name!r}{nearest(name, sorted(there))} (searched in {searched})")
