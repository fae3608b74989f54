"""Checkpoints: saved asynchronously with Orbax, checked when read, restored onto any mesh.

A checkpoint is the folder `<checkpoints>/<step>`: `state` (Orbax: step, params, opt_state), `metadata` (JSON:
what the run must know to go on) and `seal-*.json` (see seals.py). Orbax writes under a temporary name and
renames, so a killed save leaves no half checkpoint under a step's name.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from t5style import console, run_dir
from t5style.parallel.rules import path_name
from t5style.train.seals import check, is_sealed, seal

STATE, METADATA = "state", "metadata"


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Args:
      folder: where the step folders go; made when first saved to.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints at multiples of this step stay for good; None for none.
      best_metric: name of a metric whose best checkpoint stays too: the one with the lowest value, with a
        minus sign before the name the highest; None for none.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        keep: int = 3,
        keep_every: int | None = None,
        best_metric: str | None = None,
    ) -> None:
        self.folder = _absolute(folder)
        self.best_sign = 1
        policies: list[Any] = [managers.LatestN(keep)]
        if keep_every is not None:
            policies.append(managers.EveryNSteps(keep_every))
        if best_metric is not None:
            self.best_sign = -1 if best_metric.startswith("-") else 1
            best_metric = best_metric.removeprefix("-")
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: -self.best_sign * metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=None if best_metric is None else (lambda metrics: -self.best_sign * metrics[best_metric]),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self.best_metric = best_metric
        self._manager: ocp.CheckpointManager | None = None
        self._unsealed: list[int] = []
        self._pool = ThreadPoolExecutor(1, "seal")
        self._sealing: Future[None] | None = None

    # --- saving ---

    def save(
        self, step: int, state: Any, metadata: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Copies `state` to the host and writes it in the background; returns as soon as the copy is made.

        Raises:
          UserError: this save could not start, or the one before it failed (a full disk, for example).
        """
        if step in all_steps(self.folder):
            return
        with self._told(step):
            self._finish()
            if self._manager is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._manager = ocp.CheckpointManager(
                    self.folder, options=self._options, item_names=(STATE, METADATA)
                )
            best = self.best_metric
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.StandardSave(state), METADATA: ocp.args.JsonSave(dict(metadata))}
                ),
                metrics=dict(metrics) if best and metrics and best in metrics else None,
                force=True,
            )
            self._unsealed.append(step)

    def poll(self) -> None:
        """Seals what has been committed since; cheap, never waits. Call it now and then.

        Raises:
          UserError: the save under way, or the sealing of the one before it, has failed.
        """
        if not self._unsealed or self._manager is None or self._manager.is_saving_in_progress():
            return
        if self._sealing is not None and not self._sealing.done():
            return
        with self._told(self._unsealed[-1]):
            self._manager.check_for_errors()
            self._sealed()
            steps, self._unsealed = self._unsealed, []
            # Reading the files back takes a while on a big model: not in the loop's thread.
            self._sealing = self._pool.submit(self._seal_all, steps)

    def wait(self) -> None:
        """Waits until everything saved is committed and sealed.

        Raises:
          UserError: a save or its sealing failed.
        """
        with self._told(self._unsealed[-1] if self._unsealed else 0):
            self._finish()

    def close(self) -> None:
        """Waits as `wait` does and lets go of the folder."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                manager, self._manager = self._manager, None
                _quietly(manager.close)

    def _finish(self) -> None:
        if self._manager is None:
            return
        self._manager.wait_until_finished()
        self._sealed()
        steps, self._unsealed = self._unsealed, []
        self._seal_all(steps)

    def _sealed(self) -> None:
        """Waits for the sealing thread; raises what went wrong in it, once."""
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            sealing.result()

    def _seal_all(self, steps: list[int]) -> None:
        for step in steps:
            folder = self.folder / str(step)
            with self._told(step):
                if folder.exists():  # the keep policy may have removed it meanwhile
                    seal(folder)

    def _told(self, step: int) -> _Told:
        return _Told(self, step)

    # --- restoring ---

    def restore_latest(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (state, metadata); None if there is none.

        A checkpoint that is damaged or was never finished is renamed to `<step>.corrupt` and the one before
        it is tried; the console says so. Nothing is deleted.

        Args:
          abstract_state: ShapeDtypeStructs with shardings: the mesh restored to, which need not be the one
            saved from.

        Raises:
          UserError: the checkpoint is of another architecture or optimiser; it cannot be read though its
            files are whole (no memory, no permission); or all of them are damaged.
        """
        steps = sorted(all_steps(self.folder), reverse=True)
        for leftover in sorted(unfinished(self.folder)):
            if leftover.isdigit():  # left in place it would forbid to save that step again
                _set_aside(self.folder / leftover, "is unfinished: a copy or a save was cut off")
            else:
                console.say(f"checkpoint {leftover}: its save was never finished; it is ignored")
        for step in steps:
            path = self.folder / str(step)
            problem = _agree(path, functools.partial(check, path, jax.process_index(), jax.process_count()))
            if problem is None:
                restored: list[tuple[Any, dict[str, Any]]] = []
                problem = _agree(path, functools.partial(_try, path, abstract_state, restored))
                if problem is None:
                    return restored[0]
            older = [s for s in steps if s < step]
            back = f"going back to step {older[0]}" if older else "there is no older one"
            _set_aside(path, f"is damaged ({problem}); {back}")
        if steps:
            raise run_dir.UserError(
                f"all {len(steps)} checkpoints in {self.folder} are damaged; they are kept as *.corrupt. "
                "Restore the folder from a copy, or run the same command again to start from step 0."
            )
        return None


class _Told:
    """Turns what goes wrong while saving into one sentence that says where the run stands."""

    def __init__(self, checkpointer: Checkpointer, step: int) -> None:
        self.checkpointer, self.step = checkpointer, step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, run_dir.UserError) or not isinstance(error, Exception):
            return
        folder = self.checkpointer.folder
        good = sorted(s for s in all_steps(folder) if s != self.step)
        free = run_dir.free_bytes(folder)
        space = "" if free is None else f" ({free / 1e6:,.1f} MB are free there)"
        kept = f"the last good checkpoint is step {good[-1]}" if good else "there is no earlier checkpoint"
        raise run_dir.UserError(
            f"the checkpoint of step {self.step} could not be written to {folder}{space}: "
            f"{_first_line(error)}. "
            f"Nothing else was touched: {kept}. Make room (or fix the cause) and run the same command to go "
            "on."
        ) from error


# --- the files of a checkpoint ---


def _absolute(path: epath.PathLike) -> epath.Path:
    """Orbax refuses relative paths."""
    return epath.Path(os.path.abspath(path)) if run_dir.is_local(path) else epath.Path(path)


def all_steps(folder: epath.PathLike) -> list[int]:
    """Steps of the committed checkpoints in a folder, in no order; empty if there is no folder."""
    path = epath.Path(folder)
    if not path.is_dir():
        return []
    return [int(entry.name) for entry in path.iterdir() if entry.name.isdigit() and _committed(entry)]


def unfinished(folder: epath.PathLike) -> list[str]:
    """Names of folders that a save left when it was killed."""
    path = epath.Path(folder)
    if not path.is_dir():
        return []
    names = [e.name for e in path.iterdir() if "orbax-checkpoint-tmp" in e.name]
    return names + [e.name for e in path.iterdir() if e.name.isdigit() and not _committed(e)]


def _committed(step_folder: epath.Path) -> bool:
    # A rename is the commit; the file is one more sign, written by object-store protocols and by recent
    # versions.
    return (step_folder / "_CHECKPOINT_METADATA").exists()


def _set_aside(path: epath.Path, why: str) -> None:
    """Renames a checkpoint that is not whole, and says so. Every process calls it."""
    names = (f"{path.name}.corrupt" + (f"-{k}" if k else "") for k in itertools.count())
    aside = next(path.parent / name for name in names if not (path.parent / name).exists())
    console.say(f"WARNING: checkpoint {path} {why}. It is kept as {aside.name}.")
    run_dir.barrier(f"seen {path}")
    if run_dir.is_main_process():
        path.rename(aside)
    run_dir.barrier(f"renamed {path}")


# --- reading ---


def read_metadata(path: epath.PathLike) -> dict[str, Any]:
    """The JSON metadata of one checkpoint folder `<checkpoints>/<step>`."""
    return dict(json.loads((epath.Path(path) / METADATA / METADATA).read_text()))


def restore(path: epath.PathLike, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    """(state, metadata) of one checkpoint folder, on the shardings of `abstract_state`.

    Raises:
      UserError: the checkpoint's parameters or optimiser state are not of these names and shapes.
    """
    path = _absolute(path)
    metadata = read_metadata(path)
    _compare(path, abstract_state, _saved_tree(path))
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(path / STATE, abstract_state), metadata


def find(path: epath.PathLike) -> epath.Path:
    """The checkpoint folder that `path` means: itself, the newest whole one in it, or that of a run folder.

    Raises:
      UserError: there is no checkpoint.
    """
    given = epath.Path(path)
    if (given / STATE).is_dir():
        problem = check(given)
        if problem:
            raise run_dir.UserError(
                f"checkpoint {given} is damaged: {problem}. Choose another step of that run."
            )
        return given
    for folder in (given / "checkpoints", given):
        for step in sorted(all_steps(folder), reverse=True):
            problem = check(folder / str(step))
            if problem is None:
                return folder / str(step)
            console.say(
                f"WARNING: checkpoint {folder / str(step)} is damaged ({problem}); trying an older one."
            )
    raise run_dir.UserError(
        f"there is no checkpoint in {given}: give a run folder, its checkpoints folder, or one "
        "checkpoints/<step>."
    )


def restore_params(
    path: epath.PathLike, shardings: Any = None, dtype: Any = None, abstract: Any = None
) -> Any:
    """Only the parameters of a checkpoint (see `find` for what `path` may be): a nested dict of arrays.

    Args:
      path: run folder, checkpoints folder, or one checkpoint.
      shardings: tree of Shardings like the parameters; None puts all on the first local device.
      dtype: dtype for floating-point parameters; None keeps the saved one.
      abstract: the parameters expected (ShapeDtypeStructs); compared by name and shape if given.

    Raises:
      UserError: no checkpoint there, a damaged one, or one of another architecture.
    """
    folder = _absolute(find(path))
    saved = _saved_tree(folder)["params"]
    if abstract is not None:
        _compare(folder, {"params": abstract}, {"params": saved})
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, saved)

    def wanted(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        kind = leaf.dtype
        if dtype is not None and np.issubdtype(np.dtype(kind), np.floating):
            kind = dtype
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)

    target = {"params": jax.tree.map(wanted, saved, shardings)}
    # Orbax ends with a barrier. Where only this process's devices get parameters, it is this process's load
    # alone (process 0 evaluates, the others wait for it elsewhere), and the others never come.
    me = jax.process_index()
    alone = all(
        device.process_index == me for leaf in jax.tree.leaves(shardings) for device in leaf.device_set
    )
    options = ocp.options.MultiprocessingOptions(
        primary_host=me if alone else 0, active_processes={me} if alone else None
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    with ocp.Checkpointer(handler, multiprocessing_options=options) as reader:
        arguments = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return reader.restore(folder / STATE, args=arguments)["params"]


class ArrayReader:
    """Parameters of one checkpoint folder `<checkpoints>/<step>`, one at a time, on the host.

    Attributes:
      names: of all of them, as 'decoder/layers/mlp/output/kernel'.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self._folder = _absolute(path)
        saved = jax.tree_util.tree_leaves_with_path(_saved_tree(self._folder)["params"])
        self._leaves = {path_name(keys): leaf for keys, leaf in saved}
        self._reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    @property
    def names(self) -> set[str]:
        return set(self._leaves)

    def read(self, name: str) -> np.ndarray:
        """The parameter of that name."""
        leaf, keys = self._leaves[name], ["params", *name.split("/")]
        item: Any = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        how: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(keys):
            item, how = {key: item}, {key: how}
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        restored = self._reader.restore(self._folder / STATE, args=arguments)
        return np.asarray(functools.reduce(lambda tree, key: tree[key], keys, restored))


def _saved_tree(path: epath.Path) -> Any:
    """Names, shapes and dtypes in a checkpoint: nested dicts and lists with metadata leaves."""
    # The handler itself: the checkpointer around it warns of a file that items do not have.
    handler = ocp.StandardCheckpointHandler()
    try:
        return handler.metadata(path / STATE).tree
    finally:
        handler.close()


def _compare(path: epath.Path, expected: Any, saved: Any) -> None:
    """Raises UserError naming the first array that is missing, left over or of another shape."""

    def named(tree: Any) -> dict[str, tuple[int, ...]]:
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {path_name(keys): tuple(getattr(leaf, "shape", ())) for keys, leaf in flat}

    want, have = named(expected), named(saved)
    for name in [*(n for n in want if n.startswith("params")), *(n for n in have if n.startswith("params"))]:
        if want.get(name) != have.get(name):
            theirs = f"shape {have[name]}" if name in have else "no such parameter"
            ours = f"shape {want[name]}" if name in want else "no such parameter"
            raise run_dir.UserError(
                f"checkpoint {path} is of another architecture: at {name} it has {theirs}, this model "
                f"{ours}. "
                "Use the model settings it was trained with (model.json in its run folder), or another run "
                "folder."
            )
    for name in [*want, *have]:
        if want.get(name) != have.get(name):
            raise run_dir.UserError(
                f"checkpoint {path} was trained with another optimiser: at {name} it has "
                f"{have.get(name, 'nothing')}, "
                f"this run {want.get(name, 'nothing')}. Keep the optimiser, or start a new run with "
                "init_from."
            )


# --- processes ---


def _agree(path: epath.Path, attempt: Callable[[], str | None]) -> str | None:
    """Checks or restores a checkpoint in every process; all get the same answer: its damage, or None.

    Raises:
      UserError: in every process, if one could not tell.
    """
    problem, failure = None, None
    try:
        problem = attempt()
    except Exception as error:
        failure = error
    outcome = np.int32(2 if failure is not None else 1 if problem is not None else 0)
    run_dir.barrier(f"read {path}")  # CPU devices wait for each other no longer than 30 s
    everyone = np.asarray(multihost_utils.process_allgather(outcome))
    process, worst = int(np.argmax(everyone)), int(np.max(everyone))
    if worst == 2:
        if isinstance(failure, run_dir.UserError):
            raise failure
        raise run_dir.UserError(
            f"checkpoint {path} could not be read, though no damage was found: "
            f"{_first_line(failure) if failure is not None else f'see process {process}'}. "
            "Nothing was renamed: remove the cause (memory, permissions, the disk) and run the same command "
            "again."
        ) from failure
    return None if worst == 0 else problem or f"process {process} found it"


def _try(path: epath.Path, abstract_state: Any, restored: list[tuple[Any, dict[str, Any]]]) -> str | None:
    """Appends the restored checkpoint; without seals to prove otherwise, what hinders that is damage."""
    try:
        restored.append(restore(path, abstract_state))
    except run_dir.UserError:
        raise
    except Exception as error:
        if is_sealed(path):
            raise
        return _first_line(error)
    return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if len(line) < 300 else line[:300] + " ..."


def _quietly(function: Callable[[], Any]) -> None:
    """Closing after a failed save raises the same failure again, which has been told already."""
    try:
        function()
    except Exception:
        return
