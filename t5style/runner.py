"""Carrying out a built configuration: processes, run folder, the job, what is said when it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import traceback
import types
from collections.abc import Iterator, Mapping
from typing import Any

from t5style import run_dir, workflow
from t5style.console import console, say
from t5style.parallel.rendezvous import has_tpu
from t5style.run_dir import RunDir, UserError

CONFIG = "config.gin"
OPERATIVE = "operative_config.gin"
ERROR = "error.txt"

# Environment variable: a file that every process makes when all is done, and not when it was stopped (which
# ends with status 0 too). By it a script knows whether to start the same command again.
DONE_FILE = "T5STYLE_DONE_FILE"

# Signs in the environment that this process is one of several (what they mean: parallel/distributed.py).
_CLUSTER_SIGNS = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "TPU_WORKER_ID", "MEGASCALE_COORDINATOR_ADDRESS")


@dataclasses.dataclass(frozen=True)
class ConfigText:
    """What a configuration says, for the run folder."""

    given: str  # flat gin text with the place of every binding
    operative: str  # gin's operative config: every parameter of everything built


def execute(job: Any, folder: str, text: ConfigText | None = None) -> dict[str, Any]:
    """Starts the processes if there are several, takes the run folder, writes what this run is, and runs the
    job.
    """
    workflow.check_job(job)
    distributed = bool(getattr(job, "distributed", False))
    # A job of one process, started on every host of a slice: process 0 does it, the others wait.
    if distributed or any(sign in os.environ for sign in _CLUSTER_SIGNS) or has_tpu():
        from t5style.parallel import distributed as processes  # imports jax
        from t5style.parallel import identity

        if processes.initialize():
            run_dir.set_process(processes.index(), processes.barrier)
            # All of it: a process that saves at other steps, or elsewhere, would hang the others.
            given = _bare(text.given) if text is not None else []
            configuration = run_dir.fingerprint([job, given, folder])
            processes.check_same({"configuration": configuration, **identity.program()})
            import jax

            # Devices come up on all processes together or not at all: of a job that process 0 does alone, its
            # use of a device would wait for the others' in vain.
            jax.devices()
    run = RunDir(folder)
    with run.lock():
        try:
            if isinstance(job, workflow.Workflow):
                _write_description(run, text)
                figures = job(run)
            else:
                inputs = workflow.all_inputs(job, {}, run)
                if workflow.state(job, run, inputs)[0] != "changed":  # else `perform` refuses: touch nothing
                    _write_description(run, text)
                figures = workflow.perform(job, run, inputs, root=run, replace=False)
        except workflow.OtherSettings:
            raise
        except Exception as error:
            _keep_error(run, error)
            raise
        if run_dir.is_main_process() and (run.path / ERROR).exists():
            (run.path / ERROR).unlink()
    if done_file := os.environ.get(DONE_FILE):
        pathlib.Path(done_file).touch()
    say(f"Done. Everything is in {run.path}")
    return figures


def leave(status: int) -> int:
    """The exit status; but one of several processes ends here, see `parallel.distributed.leave`."""
    if run_dir.has_company():
        from t5style.parallel import distributed

        distributed.leave(status)
    return status


def _keep_error(run: RunDir, error: Exception) -> None:
    """Writes the traceback into the run folder, and says so."""
    if run_dir.is_main_process():
        with contextlib.suppress(OSError):  # the disk may be what is wrong
            run_dir.atomic_write(run.path / ERROR, "".join(traceback.format_exception(error)))
            error.add_note(f"(where it happened: {run.path / ERROR})")


def _write_description(run: RunDir, text: ConfigText | None) -> None:
    """config.gin and operative_config.gin. A config.gin that says the same is left alone, with its places."""
    if text is None or not run_dir.is_main_process():
        return
    run.create()
    config = run.path / CONFIG
    before = config.read_text() if config.exists() else None
    if before is None or _bare(before) != _bare(text.given):
        if before is not None:
            number = 1
            while (kept := run.path / f"config.replaced-{number}.gin").exists():
                number += 1
            run_dir.atomic_write(kept, before)
        run_dir.atomic_write(config, text.given)
    run_dir.atomic_write(run.path / OPERATIVE, text.operative)


def _bare(config: str) -> list[str]:
    """The bindings of a config text without comments, in any order."""
    return sorted(
        line.split("  # ", 1)[0] for line in config.splitlines() if line and not line.startswith("#")
    )


def report(error: BaseException) -> None:
    """Says an error in words, without its traceback and what jax notes about that."""
    notes = [note for note in getattr(error, "__notes__", ()) if "JAX_TRACEBACK_FILTERING" not in note]
    lines = [str(error) or type(error).__name__, *notes]
    console.print("error: ", style="bold red", end="")
    console.print("\n".join(lines), markup=False)


# ----------------------------------------------------------------------------------------------- only saying


def dry_run(job: Any, folder: str) -> None:
    """Prints the job and what each stage would do; calls the `dry_run` hooks of jobs that have one."""
    run = RunDir(folder)
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


def describe(value: Any, name: str = "", indent: str = "") -> Iterator[str]:
    """A built configuration as an indented tree, without the fields that hold their defaults."""
    head = f"{indent}{name + ': ' if name else ''}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"{head}{type(value).__name__}"
        for field in dataclasses.fields(value):
            held = getattr(value, field.name)
            default = (
                field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            )
            if held != default:
                yield from describe(held, field.name, indent + "  ")
    elif isinstance(value, Mapping) and any(_deep(item) for item in value.values()):
        yield f"{head}"
        for key, item in value.items():
            yield from describe(item, str(key), indent + "  ")
    elif isinstance(value, list | tuple) and any(_deep(item) for item in value):
        yield f"{head}"
        for item in value:
            yield from describe(item, "-", indent + "  ")
    elif isinstance(value, types.FunctionType | type):
        yield f"{head}{value.__module__}.{value.__qualname__}"
    else:
        yield f"{head}{value!r}"


def _deep(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, Mapping | list | tuple | types.FunctionType)


def explain_sharding(job: Any, folder: str) -> None:
    """Asks every job that has parameters to show how they lie on its mesh."""
    run = RunDir(folder)
    stages = job.stages if isinstance(job, workflow.Workflow) else {"": job}
    able = {name: stage for name, stage in stages.items() if hasattr(stage, "explain_sharding")}
    if not able:
        raise UserError("--explain_sharding: no job of this configuration has a mesh")
    for name, able_job in able.items():
        if name:
            say(f"{name}: {type(able_job).__name__}")
        workflow.resolve(able_job, run).explain_sharding()
