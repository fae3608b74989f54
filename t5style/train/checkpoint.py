"""Checkpoints: saved asynchronously with Orbax, checked when read, restored onto any mesh.

A checkpoint is the folder `<checkpoints>/<step>`: `state` (Orbax: step, params, opt_state), `metadata` (JSON:
what the run must know to go on) and `seal-*.json` (size and CRC-32 of every file). Orbax writes under a
temporary name and renames, so a killed save leaves no half checkpoint under a step's name. The seals are
ours: Orbax verifies its index but not its data (a flipped bit in an array of floats restores without
complaint), so each file is summed once it is committed and compared before it is believed.
"""

from __future__ import annotations

import functools
import json
import os
import threading
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from t5style import console, run_dir
from t5style.parallel.rules import path_name

SEAL = "seal-{index}-of-{count}.json"
STATE, METADATA = "state", "metadata"


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Args:
      folder: where the step folders go; made when first saved to.
      keep: how many of the newest checkpoints stay.
      keep_every: checkpoints at multiples of this step stay for good; None for none.
      best_metric: name of a metric (lower is better) whose best checkpoint stays too; None for none.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        keep: int = 3,
        keep_every: int | None = None,
        best_metric: str | None = None,
    ) -> None:
        self.folder = _absolute(folder)
        policies: list[Any] = [managers.LatestN(keep)]
        if keep_every is not None:
            policies.append(managers.EveryNSteps(keep_every))
        if best_metric is not None:
            policies.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: -metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            best_fn=None if best_metric is None else (lambda metrics: -metrics[best_metric]),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._best_metric = best_metric
        self._manager: ocp.CheckpointManager | None = None
        self._unsealed: list[int] = []
        self._sealer: threading.Thread | None = None

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
            best = self._best_metric
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
          UserError: the save under way has failed.
        """
        if not self._unsealed or self._manager is None or self._manager.is_saving_in_progress():
            return
        if self._sealer is not None and self._sealer.is_alive():
            return
        with self._told(self._unsealed[-1]):
            self._manager.check_for_errors()
            steps, self._unsealed = self._unsealed, []
            # Reading the files back takes a while on a big model: not in the loop's thread.
            self._sealer = threading.Thread(target=self._seal_all, args=(steps,), daemon=True)
            self._sealer.start()

    def wait(self) -> None:
        """Waits until everything saved is committed and sealed.

        Raises:
          UserError: a save failed.
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
        if self._sealer is not None:
            self._sealer.join()
            self._sealer = None
        steps, self._unsealed = self._unsealed, []
        self._seal_all(steps)

    def _seal_all(self, steps: list[int]) -> None:
        for step in steps:
            folder = self.folder / str(step)
            if folder.exists():  # the keep policy may have removed it meanwhile
                seal(folder)

    def _told(self, step: int) -> _Told:
        return _Told(self, step)

    # --- restoring ---

    def restore_latest(self, abstract_state: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, as (state, metadata); None if there is none.

        A checkpoint that is damaged is renamed to `<step>.corrupt` and the one before it is tried; the
        console says so. Nothing is deleted.

        Args:
          abstract_state: ShapeDtypeStructs with shardings: the mesh restored to, which need not be the one
            saved from.

        Raises:
          UserError: the checkpoint is of another architecture or optimiser; or all of them are damaged.
        """
        steps = sorted(all_steps(self.folder), reverse=True)
        for leftover in sorted(unfinished(self.folder)):
            console.say(f"checkpoint {leftover}: its save was never finished; it is ignored")
        for step in steps:
            path = self.folder / str(step)
            problem = _agree(functools.partial(check, path))
            if problem is None:
                try:
                    return restore(path, abstract_state)
                except run_dir.UserError:
                    raise
                except Exception as error:
                    problem = _first_line(error)
            aside = _aside(path)
            older = [s for s in steps if s < step]
            console.say(
                f"WARNING: checkpoint {path} is damaged ({problem}). It is kept as {aside.name}; "
                + (f"going back to step {older[0]}." if older else "there is no older one.")
            )
            if jax.process_index() == 0:
                path.rename(aside)
            _barrier(f"t5style_corrupt_{step}")
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


def seal(folder: epath.Path) -> None:
    """Writes this process's seal: size and CRC-32 of its share of the files of a committed checkpoint."""
    index, count = jax.process_index(), jax.process_count()
    share = _files(folder)[index::count]
    with ThreadPoolExecutor(4) as pool:
        sums = dict(zip(share, pool.map(lambda name: _sum(folder / name), share), strict=True))
    run_dir.atomic_write(folder / SEAL.format(index=index, count=count), json.dumps(sums, indent=1))


def check(folder: epath.Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: this process's share of them against the seals."""
    expected: dict[str, list[int]] = {}
    try:
        for entry in folder.iterdir():
            if entry.name.startswith("seal-"):
                expected |= json.loads(entry.read_text())
    except ValueError as error:
        return f"a seal cannot be read: {error}"
    share = sorted(expected)[jax.process_index() :: jax.process_count()]
    missing = [name for name in share if not (folder / name).exists()]
    if missing:
        return f"{missing[0]} is missing"
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(share, pool.map(lambda name: _sum(folder / name), share), strict=True):
            if found[0] != expected[name][0]:
                return f"{name} has {found[0]:,} bytes, not {expected[name][0]:,}"
            if found[1] != expected[name][1]:
                return f"the contents of {name} have changed since they were written"
    return None


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    names: list[str] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            names += _files(entry, f"{prefix}{entry.name}/")
        elif not entry.name.startswith(("seal-", ".")):
            names.append(prefix + entry.name)
    return sorted(names)


def _sum(path: epath.Path) -> list[int]:
    """[bytes, CRC-32] of a file. CRC-32 runs at 3 GB/s a core here; it guards against accidents, not
    malice.
    """
    size, crc = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]


def _aside(path: epath.Path) -> epath.Path:
    for k in range(1000):
        aside = path.parent / (f"{path.name}.corrupt" + (f"-{k}" if k else ""))
        if not aside.exists():
            return aside
    raise run_dir.UserError(f"{path.parent} holds 1,000 damaged checkpoints of step {path.name}: clear it.")


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
    with ocp.PyTreeCheckpointer() as reader:
        arguments = ocp.args.PyTreeRestore(
            item=target,
            restore_args=ocp.checkpoint_utils.construct_restore_args(target),
            partial_restore=True,
        )
        return reader.restore(folder / STATE, args=arguments)["params"]


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


def _agree(problem: Callable[[], str | None]) -> str | None:
    """Runs a check in every process; all get the same answer: the first problem found, or None."""
    mine = problem()
    if jax.process_count() == 1:
        return mine
    bad = np.asarray(multihost_utils.process_allgather(np.int32(mine is not None)))
    if not bad.any():
        return None
    return mine or f"process {int(np.argmax(bad))} found damage in its share of the files"


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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
