"""Runs jobs in folders: skips what is done, goes on with what is unfinished, moves aside what no longer
holds.

A job is a frozen dataclass with `__call__(self, run: RunDir) -> dict` that does its work inside `run.path`
and returns its figures. It may declare:

- `distributed: ClassVar[bool] = True`: every process runs it (otherwise process 0 alone, while the others
  wait);
- `may_change: ClassVar[tuple[str, ...]]`: fields that may change between two starts in one folder (`steps`
  of a training job), and with them the stages that they refer to;
- `inputs(self) -> Sequence[str]`: files or folders whose content decides the result;
- `dry_run(self, run) -> None`: says more about what it would do, for --dry_run.

Whether a job is done is read from its folder's manifest.json: same configuration and same inputs, wherever
they lie. `started.json` says the same of a job that was begun. The jobs that use its result see the
manifest's fingerprint: what the job calls `fingerprint` among its figures (of the result's content), or else
a new one each time that it ran.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import inspect
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from etils import epath

from t5style import lineage, run_dir
from t5style.console import duration, say
from t5style.run_dir import RunDir, UserError

STARTED = "started.json"
PREFIX = "run:"  # "run:corpus/train" is the folder "train" in that of the stage "corpus"

SKIPPED = "done, will be skipped"

State = Literal["new", "done", "unfinished", "continued", "changed"]
T = TypeVar("T")


class OtherSettings(UserError):
    """The run folder holds work of another configuration."""


@dataclasses.dataclass(frozen=True)
class Workflow:
    """Runs stages in order, each in a folder of its own, and skips those that are done.

    `stages` maps a name, which is also the folder's, to a job. A string `run:<name>` or `run:<name>/<path>`
    anywhere in a job's fields stands for the folder of an earlier stage, and makes that stage an input of the
    job.
    """

    stages: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(
                "a workflow needs at least one stage, as in stages = {'corpus': @prepare.Prepare()}"
            )
        earlier: list[str] = []
        for name, job in self.stages.items():
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(
                    f"stage name {name!r} cannot name a folder; use letters, digits, '_', '-' and '.'"
                )
            check_job(job, f"stage {name!r}")
            if isinstance(job, Workflow):
                raise ValueError(
                    f"stage {name!r} is a workflow; list its stages in the outer workflow instead"
                )
            for needed in stage_references(job):
                if needed not in earlier:
                    raise ValueError(
                        f"stage {name!r} refers to {PREFIX}{needed}{self._why_not(needed, earlier)}"
                    )
            earlier.append(name)

    def _why_not(self, needed: str, earlier: list[str]) -> str:
        if needed in self.stages:
            return f", which does not come before it; the order is {', '.join(self.stages)}"
        close = difflib.get_close_matches(needed, earlier, 1)
        hint = f" (did you mean {PREFIX}{close[0]}?)" if close else ""
        return f", but there is no such stage{hint}; before it come {', '.join(earlier) or 'none'}"

    @property
    def distributed(self) -> bool:
        """True if any stage is."""
        return any(getattr(job, "distributed", False) for job in self.stages.values())

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Runs the stages that are not done. Returns every stage's figures, by stage."""
        figures = {}
        for number, (name, job) in enumerate(self.stages.items(), start=1):
            child = run.child(name)
            say(f"[{number}/{len(self.stages)}] {name}: {purpose(job)}")
            with child.lock():
                inputs = all_inputs(job, self.stage_inputs(name, run), run)
                figures[name] = perform(job, child, inputs, root=run, replace=True)
        return figures

    def stage_inputs(self, name: str, run: RunDir) -> dict[str, str]:
        """Fingerprints of the stages that decide the result of the stage `name`, by `run:` reference."""
        job = self.stages[name]
        free = getattr(job, "may_change", ())
        fixed = [getattr(job, field.name) for field in dataclasses.fields(job) if field.name not in free]
        result = {}
        for needed in stage_references(fixed):
            manifest = run.child(needed).read_manifest()
            result[f"{PREFIX}{needed}"] = str(manifest["fingerprint"]) if manifest else "not made yet"
        return result


def check_job(job: Any, what: str = "launch.run.job") -> None:
    """Raises ValueError if `job` is not a job."""
    if isinstance(job, type) or inspect.isfunction(job):
        raise ValueError(
            f"{what} is {job.__name__} itself and not an instance of it; "
            f"write @{job.__name__}() with parentheses"
        )
    if not dataclasses.is_dataclass(job) or not callable(job):
        raise ValueError(
            f"{what} is a {type(job).__name__}, which is not a job (a frozen dataclass that can be called)"
        )


def purpose(job: Any) -> str:
    """The first line of the job's docstring."""
    return (inspect.getdoc(type(job)) or type(job).__name__).split("\n", 1)[0]


# -------------------------------------------------------------------------------------------- run: references


def references(value: Any) -> Iterator[str]:
    """Every string in the tree that starts with `run:`."""
    if isinstance(value, str):
        if value.startswith(PREFIX):
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from references(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from references(getattr(value, field.name))


def stage_references(value: Any) -> list[str]:
    """The stages that a job (or any tree) refers to, each once."""
    return list(dict.fromkeys(text[len(PREFIX) :].split("/", 1)[0] for text in references(value)))


def resolve(value: T, run: RunDir) -> T:
    """The same tree with every `run:` string replaced by the real path inside `run`."""
    return _resolve(value, run)


def _resolve(value: Any, run: RunDir) -> Any:
    if isinstance(value, str):
        return str(run.path / value[len(PREFIX) :]) if value.startswith(PREFIX) else value
    if next(references(value), None) is None:
        return value
    if isinstance(value, Mapping):
        return {key: _resolve(item, run) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_resolve(item, run) for item in value)
    return dataclasses.replace(
        value, **{f.name: _resolve(getattr(value, f.name), run) for f in dataclasses.fields(value)}
    )


# ------------------------------------------------------------------------------------------------ doing a job


def all_inputs(job: Any, stages: Mapping[str, str], root: RunDir) -> dict[str, str]:
    """Fingerprints of all that decides the job's result besides its configuration: `stages`, and its own
    `inputs()`.
    """
    paths = resolve(job, root).inputs() if hasattr(job, "inputs") else ()
    known = [root.path / name for name in stage_references(job)]  # `stages` says all about these
    external = [path for path in paths if not any(epath.Path(path).is_relative_to(stage) for stage in known)]
    return {**stages, **{str(path): run_dir.path_fingerprint(path) for path in external}}


def state(job: Any, run: RunDir, inputs: Mapping[str, str]) -> tuple[State, list[str]]:
    """How far the job is in its folder, and what has changed since then (empty if nothing)."""
    for record, same in ((run.read_manifest(), "done"), (_read_started(run), "unfinished")):
        if record is None or "config" not in record or "config_fingerprint" not in record:
            continue
        changed_inputs = _changed_inputs(record["inputs"], inputs)
        if record["config_fingerprint"] == run_dir.fingerprint(job) and not changed_inputs:
            return ("done" if same == "done" else "unfinished"), []
        config = run_dir.canonical(job)
        changes = list(differences(record["config"], config))
        free = set(getattr(job, "may_change", ()))
        kept = [{k: v for k, v in tree.items() if k not in free} for tree in (record["config"], config)]
        if kept[0] == kept[1] and not changed_inputs:
            return "continued", changes
        return "changed", changes + [f"input {name} changed" for name in changed_inputs]
    return "new", []


def _changed_inputs(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """The inputs whose content is not among the old ones, else those that are no more. Where they lie does
    not matter: the paths that were given are in the configuration.
    """
    before, after = collections.Counter(old.values()), collections.Counter(new.values())
    fresh, gone = after - before, before - after
    return [name for name, content in new.items() if content in fresh] or [
        name for name, content in old.items() if content in gone
    ]


def _read_started(run: RunDir) -> dict[str, Any] | None:
    try:
        record = json.loads((run.path / STARTED).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def perform(
    job: Any, run: RunDir, inputs: Mapping[str, str], *, root: RunDir, replace: bool
) -> dict[str, Any]:
    """Runs a job in its folder unless it is done there with these inputs (see `all_inputs`); returns its
    figures.

    Precedence: done with this configuration and inputs -> skip; begun with them (or with changes in
      `may_change` only) -> call the job, which goes on by itself; begun with others -> move the folder aside
      (`replace`) or refuse; nothing there -> call the job. The caller holds the folder's lock.

    Raises OtherSettings if the folder holds another configuration's work and `replace` is False.
    """
    started = time.monotonic()
    how, changes = state(job, run, inputs)
    # Every process must have read the folder before process 0 changes it.
    run_dir.barrier(f"decided {run.path}")
    if how == "done":
        say(f"    done already: {run.path}")
        return dict((run.read_manifest() or {}).get("figures", {}))
    if how == "changed" and not replace:
        raise OtherSettings(
            f"run folder {run.path} holds a run with other settings ({_few(changes)}); "
            f"choose another RUN_DIR, or move that folder away"
        )
    if run_dir.is_main_process():
        _prepare(job, run, inputs, how, changes)
    # And no process may work in the folder before process 0 has put it in order.
    run_dir.barrier(f"prepared {run.path}")
    begun = run_dir.now()
    figures: dict[str, Any] = {}
    if getattr(job, "distributed", False) or run_dir.is_main_process():
        figures = dict(resolve(job, root)(run) or {})
    if run_dir.is_main_process():
        run.write_manifest(job, inputs=inputs, figures=figures, started=begun)
    run_dir.barrier(f"finished {run.path}")
    say(f"    {run.path}, {duration(time.monotonic() - started)}{summary(figures)}")
    return figures


def _prepare(job: Any, run: RunDir, inputs: Mapping[str, str], how: State, changes: list[str]) -> None:
    """Makes the folder ready for the job, and writes down what is going to work in it."""
    if how == "changed":
        say(f"    settings changed ({_few(changes)}): the old results are now in {_move_aside(run)}")
    elif how == "continued":
        say(f"    settings changed ({_few(changes)}): going on from what is there")
    elif how == "unfinished":
        say(f"    unfinished: going on in {run.path}")
    run.create()
    if run.read_manifest() is not None:
        (run.path / run_dir.MANIFEST).unlink()  # what it says is not true any more
    record = {
        "config_fingerprint": run_dir.fingerprint(job),
        "inputs": dict(inputs),
        "config": run_dir.canonical(job),
        "started": run_dir.now(),
    }
    run_dir.atomic_write(run.path / STARTED, json.dumps(record, indent=1) + "\n")
    before = run.read_lineage().get("sessions", []) if how in ("unfinished", "continued") else []
    run.write_lineage({"inputs": dict(inputs), "sessions": [*before, lineage.session()]})


def _move_aside(run: RunDir) -> str:
    number = 1
    while (target := run.path.parent / f"{run.name}.replaced-{number}").exists():
        number += 1
    if not run_dir.is_local(run.path):  # no lock; and a folder is there only while something is in it
        run.path.rename(target)
        return str(target)
    # The folder itself stays, for this process holds the lock inside it: its entries move.
    target.mkdir()
    for entry in list(run.path.iterdir()):
        if entry.name != run_dir.LOCK:
            entry.rename(target / entry.name)
    return str(target)


def summary(figures: Mapping[str, Any]) -> str:
    """`: loss 1.234, steps 200` from the first six plain figures (all are in the manifest), or nothing."""
    words = []
    for name, value in figures.items():
        if isinstance(value, float):
            words.append(f"{name} {value:.4g}")
        elif isinstance(value, int):
            words.append(f"{name} {value:,}")
        elif isinstance(value, str) and len(value) < 60:
            words.append(f"{name} {value}")
    return ": " + ", ".join(words[:6]) if words else ""


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """`optimizer.peak: 0.1 -> 0.2` for every leaf in which two JSON trees differ."""
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("__class__") == new.get("__class__"):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    else:
        yield f"{name}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("__class__", "{...}")).rsplit(".", 1)[-1]
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _few(changes: list[str]) -> str:
    return "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")


# ---------------------------------------------------------------------------------------------------- dry run


def plan(workflow: Workflow, run: RunDir) -> Iterator[tuple[str, Any, str]]:
    """What each stage would do if the workflow ran now: (stage, job, sentence)."""
    to_run: set[str] = set()
    for name, job in workflow.stages.items():
        waits = [needed for needed in stage_references(job) if needed in to_run]
        if waits:
            how = f"will run after {', '.join(waits)}"
        else:
            how = forecast(job, run.child(name), all_inputs(job, workflow.stage_inputs(name, run), run))
        if how != SKIPPED:
            to_run.add(name)
        yield name, job, how


def forecast(job: Any, run: RunDir, inputs: Mapping[str, str]) -> str:
    """What starting this job in this folder would do, as a phrase."""
    how, changes = state(job, run, inputs)
    return {
        "new": "will run",
        "done": SKIPPED,
        "unfinished": "unfinished, will go on",
        "continued": f"will go on with changed settings ({_few(changes)})",
        "changed": f"done or begun with other settings ({_few(changes)})",
    }[how]
