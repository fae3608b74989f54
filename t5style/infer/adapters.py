"""Several adapters on one base: what a Model does with them, and the engine sharing the base's parameters.

Rows of one batch that ask for different adapters are grouped: each adapter answers its own.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import jax
from jax.sharding import Mesh

from t5style.infer import storage
from t5style.infer.batch import on_mesh
from t5style.infer.engine import Engine
from t5style.infer.storage import Held
from t5style.models.adapters_merge import merge_adapters
from t5style.models.config import TransformerConfig
from t5style.models.params import unstack_layers
from t5style.run_dir import PathLike

BASE = "base"  # the name of no adapter
LOADED = "default"  # the name of the one that a model was loaded with


def overlay(base: Any, whole: Any) -> Any:
    """What of a tree with adapters in it is not the base's: the leaves that are other arrays."""
    made = {}
    for name, part in whole.items():
        if isinstance(part, Mapping):
            if inner := overlay(base.get(name, {}), part):
                made[name] = inner
        elif part is not base.get(name):
            made[name] = part
    return made


def combined(base: Any, over: Any) -> Any:
    """The base's tree with an overlay's leaves in it, both with layers apart (params.unstack_layers)."""
    if isinstance(base, tuple):
        return tuple(combined(one, other) for one, other in zip(base, over, strict=True))
    if not isinstance(over, Mapping):
        return over
    return {**base, **{name: combined(base.get(name, {}), part) for name, part in over.items()}}


@dataclasses.dataclass(frozen=True, eq=False)
class AdaptedEngine(Engine):
    """An engine whose parameters are a base's and an adapter's; those of the base are the base engine's own,
    so that many adapters need no more memory than they have themselves.
    """

    base: Engine | None = None

    @functools.cached_property
    def variables(self) -> Any:
        """See Engine."""
        assert self.base is not None
        with on_mesh(self.mesh, self.rules):
            over = jax.jit(unstack_layers)(overlay(self.base.params, self.params))
        return {"params": combined(self.base.variables["params"], over)}


def rows_by_adapter(
    adapter: str | Sequence[str] | None, rows: int, known: Iterable[str]
) -> dict[str | None, list[int]]:
    """The rows that each adapter answers, by its name; None: the model as it is.

    Raises:
      ValueError: a name is not known, or there are not as many names as rows.
    """
    if adapter is None:
        return {None: list(range(rows))}
    names = [adapter] * rows if isinstance(adapter, str) else list(adapter)
    if len(names) != rows:
        raise ValueError(f"adapter has {len(names)} names for {rows} prompts: give one, or one for each")
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(names):
        check_name(name, known)
        groups.setdefault(name, []).append(row)
    return groups


def check_name(name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless there is an adapter of this name, or it is that of the base."""
    every = [BASE, *known]
    if name not in every:
        near = difflib.get_close_matches(str(name), every, 1, cutoff=0.0)[0]
        raise ValueError(f"there is no adapter {name!r}, only {', '.join(every)}: did you mean {near!r}?")


class Adapted:
    """What a Model does with adapters.

    Attributes:
      params: the base's, and those of the adapter that is in use.
      base: the parameters without an adapter.
      adapters: what `add_adapter` has added, by name; "default" is what the model was loaded with.
    """

    config: TransformerConfig
    params: Any
    base: Any
    mesh: Mesh | None
    family: str | None
    path: str
    adapters: dict[str, Held]
    _views: dict[str, Any]
    _engine: Engine | None

    def add_adapter(self, name: str, path: PathLike) -> Self:
        """Adds an adapter to the base, to be asked for by name, and returns the model `with_adapter` of it.

        Args:
          name: another than "base"; an adapter of the same name is replaced.
          path: a run folder or checkpoint in which an adapter was trained, or a directory of PEFT's.

        Raises:
          UserError: there is no adapter, it is damaged, or it belongs to another base.
        """
        if name == BASE or not name:
            raise ValueError(f"an adapter cannot have the name {name!r}: that is the model without one")
        self.adapters[name] = storage.load_adapter(path, self, self.base, self.path)
        self._views.pop(name, None)
        return self.with_adapter(name)

    def with_adapter(self, name: str) -> Self:
        """This model with the adapter of this name ("base": with none). All share the base's parameters."""
        check_name(name, self.adapters)
        if name not in self._views:
            view, held = copy.copy(self), self.adapters.get(name)
            view.params = self.base if held is None else held.adapter.apply(self.config, self.base, held.own)
            view._engine = None
            self._views[name] = view
        found: Self = self._views[name]
        return found

    def merge(self) -> Self:
        """This model with its adapter in its weights: a dense one, which can be saved.

        Raises:
          UserError: the weights are quantised, or the adapter is one that weights cannot hold (virtual
            tokens, bottlenecks).
        """
        merged = copy.copy(self)
        merged.params = merged.base = merge_adapters(self.config, self.params)
        merged.adapters, merged._views, merged._engine = {}, {}, None
        return merged
