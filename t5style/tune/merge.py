"""The job that merges models of one architecture into one (merging.py), a parameter at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from t5style import console
from t5style.infer import storage
from t5style.infer.chat import located
from t5style.models import convert, convert_stream, gguf_tables
from t5style.models.config import DTYPES
from t5style.models.params import abstract_params, count_params
from t5style.parallel.rules import path_name
from t5style.run_dir import RunDir, UserError
from t5style.train import checkpoint, initialize
from t5style.tune import merging, write_model
from t5style.tune import parent as parent_lib

METHODS = ("linear", "slerp", "task_arithmetic", "ties")
OF_DELTAS = ("task_arithmetic", "ties")


class Source:
    """A model of which one parameter is read at a time.

    Of a checkpoint of all parameters, a Hugging Face directory and a .gguf file nothing else is in memory. Of
    what has to be computed first, an adapter on its base, the whole model is.
    """

    def __init__(self, path: str) -> None:
        self.path = located(path)
        self.config = parent_lib.config(self.path)
        place = epath.Path(self.path)
        self._rows: list[convert_stream.Placed] = []
        self._held: tuple[int, Any] = (-1, None)
        if self.path.endswith(".gguf"):
            self.config, self._rows, self._tensor = gguf_tables.gguf_rows(self.path)
        elif (place / "config.json").exists():
            self.config, self._rows, self._tensor = convert.rows(self.path)
        else:
            self._arrays = checkpoint.ArrayReader(checkpoint.find(place))
        self.read = self._read_row if self._rows else self._reader()

    def _reader(self) -> Callable[[str], np.ndarray]:
        names = {
            path_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(abstract_params(self.config))
        }
        if names <= self._arrays.names:
            return lambda name: self._arrays.read(name).astype(np.float32)
        tree = write_model.read(self.path).params
        whole = {path_name(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        return lambda name: np.asarray(whole[name], np.float32)

    def _read_row(self, name: str) -> np.ndarray:
        number = next(i for i, row in enumerate(self._rows) if name in row.paths)
        if self._held[0] != number:
            self._held = (-1, None)
            self._held = (number, convert_stream.load([self._rows[number]], self._tensor, "float32"))
        return np.asarray(functools.reduce(lambda tree, key: tree[key], name.split("/"), self._held[1]))


@dataclasses.dataclass(frozen=True)
class Merge:
    """Merges models of one architecture and vocabulary into one.

    Attributes:
      models: run folders, checkpoints, Hugging Face directories, .gguf files, 'package:NAME/PATTERN';
        adapters on one base count with what they add to it. A name that ends in '/checkpoints/*' stands for
        all checkpoints there.
      method: 'linear', 'slerp', 'task_arithmetic' or 'ties', see merging.py.
      weights: of the models; None for equal ones. For slerp those of the two: (0.7, 0.3) is t = 0.3.
      base: what the models were tuned from, of which task_arithmetic and ties take the differences.
      scale: what the merged differences are multiplied by (λ).
      density: share of a model's differences that ties keeps, the largest of the whole model.
      drop: probability with which each difference is dropped first (DARE), 0 for none; its seed: `seed`.
      dtype: of the parameters; None for the first model's.
      format: 'run' or 'huggingface', see write_model.write.
    """

    models: Sequence[str]
    method: str = "linear"
    weights: Sequence[float] | None = None
    base: str | None = None
    scale: float = 1.0
    density: float = 0.2
    drop: float = 0.0
    seed: int = 0
    dtype: str | None = None
    format: str = "run"

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        write_model.check_format(self.format)
        if isinstance(self.models, str) or not self.models:
            raise ValueError(f"models is {self.models!r}; give a list of models.")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}.")
        if (self.method in OF_DELTAS) != (self.base is not None):
            raise ValueError(
                f"method {self.method!r} merges differences to a base: give one"
                if self.base is None
                else f"method {self.method!r} takes no base: leave it out"
            )
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}; it must be above 0 and at most 1.")
        if not 0 <= self.drop < 1 or (self.drop and self.method not in OF_DELTAS):
            raise ValueError(
                f"drop is {self.drop}; it must be at least 0 and below 1, and goes with "
                f"{', '.join(OF_DELTAS)}."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        if not any("*" in model for model in self.models):
            self._weights(len(self.models))

    def _weights(self, count: int) -> list[float]:
        if self.method == "slerp" and count != 2:
            raise ValueError(f"slerp goes from one model to another: there are {count}, give two")
        if self.weights is None:
            return [1.0] * count
        if len(self.weights) != count:
            raise ValueError(f"there are {len(self.weights)} weights for {count} models: give one for each")
        if self.method != "task_arithmetic" and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError(
                f"weights are {list(self.weights)}; {self.method} needs them at least 0, not all 0."
            )
        return [float(weight) for weight in self.weights]

    def inputs(self) -> Sequence[str]:
        """The models and the base."""
        return [
            *(located(model.removesuffix("/*")) for model in self.models),
            *([located(self.base)] if self.base else []),
        ]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes the merged model; returns how many there were and its parameters."""
        paths = [each for model in self.models for each in _expanded(model)]
        weights = self._weights(len(paths))
        first = storage.describe(located(paths[0]))
        sources = [Source(path) for path in paths]
        base = None if self.base is None else Source(self.base)
        self._check(first, [*sources, *([base] if base else [])])
        config = first.config
        dtype = self.dtype or config.param_dtype
        leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
        names = [path_name(keys) for keys, _ in leaves]
        limits = [0.0] * len(sources)
        if self.method == "ties":
            assert base is not None
            with console.progress("thresholds", len(sources), "models") as bar:
                for number, source in enumerate(sources):
                    deltas = functools.partial(self._deltas, source, base, names)
                    limits[number] = merging.threshold(deltas, self.density)
                    bar.advance()
        params: dict[str, Any] = {}
        with console.progress("merging", len(names), "parameters") as bar:
            for name in names:
                *folders, last = name.split("/")
                node = functools.reduce(lambda tree, key: tree.setdefault(key, {}), folders, params)
                node[last] = jnp.asarray(self._merged(name, sources, base, weights, limits), dtype)
                bar.advance()
        lineage = {
            "parents": [source.path for source in sources],
            "made_by": "merging",
            "merge": dataclasses.asdict(self) | {"weights": weights},
        }
        merged = config.replace(param_dtype=dtype)
        where = write_model.write(run, merged, params, first, self.format, lineage)
        console.say(f"{len(sources)} models, merged by {self.method}: {where}")
        return {"models": len(sources), "parameters": count_params(params)}

    def _check(self, first: storage.Stored, sources: Sequence[Source]) -> None:
        for source in sources:
            try:
                initialize.same_model(source.config, first.config, source.path)
            except UserError as error:
                raise UserError(str(error).replace("init_from", "the model", 1)) from None
            theirs = storage.describe(source.path).vocabulary
            if theirs is not None and first.vocabulary is not None and theirs != first.vocabulary:
                raise UserError(
                    f"{source.path} has the vocabulary {theirs.fingerprint}, {first.path} "
                    f"{first.vocabulary.fingerprint}: the same ids would mean other words. Merge models of "
                    "one"
                )

    def _deltas(self, source: Source, base: Source, names: Sequence[str]) -> Iterator[np.ndarray]:
        for name in names:
            yield self._delta(source, base.read(name), name)

    def _delta(self, source: Source, base: np.ndarray, name: str) -> np.ndarray:
        delta = source.read(name) - base
        if not self.drop:
            return delta
        return merging.dare(delta, self.drop, merging.generator(self.seed, source.path, name))

    def _merged(
        self,
        name: str,
        sources: Sequence[Source],
        base: Source | None,
        weights: Sequence[float],
        limits: Sequence[float],
    ) -> np.ndarray:
        if base is None:
            models = [source.read(name) for source in sources]
            if self.method == "linear":
                return merging.linear(models, weights)
            t = weights[1] / math.fsum(weights)
            if name.split("/")[1:2] in (["layers"], ["moe_layers"]):  # each layer by itself
                return np.stack([merging.slerp(a, b, t) for a, b in zip(*models, strict=True)])
            return merging.slerp(models[0], models[1], t)
        origin = base.read(name)
        deltas = [self._delta(source, origin, name) for source in sources]
        if self.method == "ties":
            return merging.ties(origin, deltas, weights, limits, self.scale)
        return merging.task_arithmetic(origin, deltas, weights, self.scale)


def _expanded(model: str) -> list[str]:
    if not model.endswith("/checkpoints/*"):
        return [model]
    folder = model.removesuffix("/*")
    if steps := sorted(checkpoint.all_steps(folder)):
        return [f"{folder}/{step}" for step in steps]
    raise UserError(f"there is no checkpoint in {folder}")
