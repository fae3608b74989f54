"""What a stage's run folder holds, read from its files alone: nothing here knows the job that wrote them."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from t5style.run_dir import RunDir, UserError


@dataclasses.dataclass(frozen=True)
class Stage:
    """One finished stage of a run.

    Attributes:
      name: how the report calls it.
      folder: where it lies.
      manifest: `manifest.json`.
    """

    name: str
    folder: epath.Path
    manifest: dict[str, Any]

    @property
    def job(self) -> str:
        """Name of the job's class."""
        return str(self.manifest.get("job", "")).rsplit(".", 1)[-1]

    @property
    def figures(self) -> dict[str, Any]:
        """What the job returned."""
        return dict(self.manifest.get("figures") or {})

    @property
    def config(self) -> dict[str, Any]:
        """The job's configuration as a tree of plain values."""
        return dict(self.manifest.get("config") or {})

    @property
    def seconds(self) -> float | None:
        """Wall time of the job's last call; None if the manifest does not say."""
        try:
            started, finished = (
                datetime.datetime.strptime(self.manifest[key], "%Y-%m-%dT%H:%M:%S%z")
                for key in ("started", "finished")
            )
        except (KeyError, TypeError, ValueError):
            return None
        return (finished - started).total_seconds()

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return RunDir(self.folder).read_metrics()

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric."""
        rows = [(int(row["step"]), float(row[name])) for row in self.metrics if name in row]
        return [step for step, _ in rows], [value for _, value in rows]

    @property
    def metric_names(self) -> list[str]:
        """Every metric that occurs, in the order of first occurrence."""
        names = dict.fromkeys(name for row in self.metrics for name in row)
        return [name for name in names if name not in ("step", "time")]

    def json(self, name: str) -> Any:
        """A JSON file of the folder, None where there is none.

        Raises:
          UserError: it is there and is not JSON.
        """
        file = self.folder / name
        if not file.exists():
            return None
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f"{file} is not JSON ({error}): run the stage {self.name!r} again") from None

    def text(self, name: str) -> str:
        """A text file of the folder, empty where there is none."""
        file = self.folder / name
        return file.read_text() if file.exists() else ""

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of a JSON-lines file, none where there is no file."""
        file = self.folder / name
        if file.exists():
            with file.open() as stream:
                for line in stream:
                    if line.strip():
                        yield json.loads(line)


def read_stage(name: str, folder: str) -> Stage:
    """The stage in a folder.

    Raises:
      UserError: the folder is not there, or its job is not done.
    """
    run = RunDir(folder)
    if not run.path.is_dir():
        raise UserError(f"stage {name!r}: there is no run folder {folder!r}; check Report.stages")
    manifest = run.read_manifest()
    if manifest is None:
        raise UserError(
            f"stage {name!r}: {folder} has no manifest.json, so its job is not done; run it to its end first"
        )
    return Stage(name, run.path, manifest)
