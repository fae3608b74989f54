"""Adapters: small sets of parameters that are trained in place of a model's own.

An adapter's parameters lie inside the model's tree beside what they change, stacked over layers as that is:
`decoder/layers/attention/query/lora_a`. Merged into the base's tree by `apply`, they are used wherever a
model is: nn/projection.Projection looks for them as it does for int8's scales. So training, decoding with a
cache, scanned and unrolled layers and every mesh work with them unchanged.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from t5style.models import params as model_params
from t5style.models.config import TransformerConfig
from t5style.parallel.rules import is_axes, no_mesh, path_name

Tree = Any
FILE = "adapter.json"  # in a run folder
PROJECTIONS = ("attention/", "mlp/")  # of self- and cross-attention, and of the MLPs


class Adapter(Protocol):
    """What is trained in place of a model's parameters."""

    def axes(self, config: TransformerConfig) -> Tree:
        """Logical axis names of the adapter's own parameters, as models.params.logical_axes."""
        ...

    def init(self, config: TransformerConfig, key: jax.Array, base: Tree) -> Tree:
        """Initial values of them: with these the model computes what its base does."""
        ...

    def apply(self, config: TransformerConfig, base: Tree, own: Tree) -> Tree:
        """All parameters, for Transformer.apply: the base's and the adapter's."""
        ...


class Kernel(NamedTuple):
    """A projection's kernel: where it lies, its axes' names and sizes, and how many of them it sums over.

    The first axis of a kernel of stacked layers is theirs, and belongs to neither side.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    sums: int

    @property
    def stacked(self) -> int:
        """1 if the first axis is that of layers, else 0."""
        return int(self.names[0] == "layers")

    def split(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
        """Values of the axes as (layers), those summed over, and those made."""
        cut, end = self.stacked, self.stacked + self.sums
        return tuple(values[:cut]), tuple(values[cut:end]), tuple(values[end:])


@functools.lru_cache(maxsize=16)
def kernels(config: TransformerConfig) -> tuple[Kernel, ...]:
    """The projections in a model's layers that can be adapted: not routers, experts, or the projections of
    latent attention that a cache's queries pass through.
    """
    with no_mesh():
        axes, abstract = model_params.logical_axes(config), model_params.abstract_params(config)
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    found = []
    for path, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes):
        name = path_name(path)
        parts = tuple(name.split("/"))
        if parts[0] not in ("encoder", "decoder") or parts[-1] != "kernel":
            continue
        if {"router", "experts", "shared_gate", "key_up", "value_up"} & set(parts):
            continue
        # The output of attention sums over heads and their widths.
        sums = 2 if parts[-2] == "output" and parts[-3].endswith("attention") else 1
        found.append(Kernel(parts[:-1], names, shapes[name], sums))
    return tuple(found)


def chosen(config: TransformerConfig, targets: Sequence[str]) -> list[Kernel]:
    """The kernels whose path (`decoder/layers/attention/query`) a pattern is found in.

    Raises:
      ValueError: a pattern is found in none.
    """
    every = kernels(config)
    names = ["/".join(kernel.path) for kernel in every]
    for pattern in targets:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, 1, cutoff=0.0)
            raise ValueError(
                f"the target {pattern!r} is found in no projection of this model: did you mean {near[0]!r}? "
                f"There are {', '.join(names)}."
            )
    return [k for k, name in zip(every, names, strict=True) if any(re.search(p, name) for p in targets)]


def nested(leaves: Mapping[tuple[str, ...], Any]) -> Tree:
    """A nested dict of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = leaf
    return tree


def merged(base: Tree, own: Tree) -> Tree:
    """The base's nested dict with the leaves of another in it, which take the place of equal ones."""
    if not isinstance(own, Mapping):
        return own
    return {**base, **{name: merged(base.get(name, {}), part) for name, part in own.items()}}


def at(tree: Tree, path: Sequence[str]) -> Any:
    """The part of a nested dict at a path."""
    return functools.reduce(lambda inner, name: inner[name], path, tree)


def _map(function: Callable[[str, Any], Any], tree: Tree, name: str = "") -> Tree:
    """The tree with function(name, leaf) for every leaf, name being its last key."""
    if isinstance(tree, Mapping):
        return {key: _map(function, part, key) for key, part in tree.items()}
    return function(name, tree)


# --- on disk ---


def describe(adapter: Adapter, base: Tree, path: str) -> dict[str, Any]:
    """An adapter and what it was trained on, as JSON values.

    Args:
      adapter: its settings.
      base: the parameters that it belongs to.
      path: where these come from.
    """
    settings = dataclasses.asdict(adapter)  # type: ignore[call-overload]
    return {"type": type(adapter).__name__, "settings": settings, "base": path, "probes": _probes(base)}


def described(description: Mapping[str, Any]) -> Adapter:
    """The adapter of a description.

    Raises:
      ValueError: its type or a setting is not known.
    """
    kind = description["type"]
    if kind not in KINDS:
        raise ValueError(f"there is no adapter of type {kind!r}, only {', '.join(KINDS)}")
    try:
        return getattr(importlib.import_module(KINDS[kind]), kind)(**description["settings"])
    except TypeError as error:
        raise ValueError(f"the settings of the adapter {kind}: {error}") from None


def belongs(description: Mapping[str, Any], base: Tree) -> bool:
    """Whether the adapter was trained on these parameters (in whatever dtype; int8 says nothing)."""
    theirs, ours = description["probes"], _probes(base)
    without = {"embedding"} if base["embedding"].dtype == jnp.int8 else set()
    return theirs.keys() - without == ours.keys() and all(
        math.isclose(theirs[name], value, rel_tol=0.01, abs_tol=1e-6) for name, value in ours.items()
    )


def _probes(base: Tree) -> dict[str, float]:
    """A number out of the middle of each parameter that no quantisation changes: embeddings, norms."""
    leaves = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(base)
        if path_name(path[-1:]) in ("embedding", "scale", "table", "position_embedding")
        and leaf.dtype != jnp.int8
    }
    middle = jax.jit(lambda leaves: {name: leaf.reshape(-1)[leaf.size // 2] for name, leaf in leaves.items()})
    return {name: float(value) for name, value in jax.device_get(middle(leaves)).items()}


# --- the kinds ---


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adaptation (Hu et al. 2021): x W + s (x A) B, with A `[inner, rank]` and B `[rank, outer]`.

    Attributes:
      rank: of the product A B.
      alpha: s is alpha / rank (equation 3's scaling, section 4.1).
      rslora: s is alpha / sqrt(rank) instead (Kalajdzievski 2023).
      dora: columns of W + s A B are scaled to a learned magnitude (DoRA, Liu et al. 2024, equation 5; their
        norm is not differentiated, section 4.3).
      dropout: rate at which entries of x are dropped before A, in training.
      targets: regular expressions, found in the paths of the projections to adapt
        (`decoder/layers/attention/query`).
    """

    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    targets: Sequence[str] = PROJECTIONS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"Lora.rank is {self.rank!r}; it must be a whole number from 1.")
        if not self.alpha > 0:
            raise ValueError(f"Lora.alpha is {self.alpha}; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Lora.dropout is {self.dropout}; it must lie in [0, 1).")
        if not self.targets:
            raise ValueError("Lora.targets is empty; name at least one pattern of projections.")

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def axes(self, config: TransformerConfig) -> Tree:
        """See Adapter."""
        leaves: dict[tuple[str, ...], Any] = {}
        for kernel in chosen(config, self.targets):
            layers, inner, outer = kernel.split(kernel.names)
            leaves[(*kernel.path, "lora_a")] = (*layers, *inner, None)
            leaves[(*kernel.path, "lora_b")] = (*layers, None, *outer)
            if self.dora:
                leaves[(*kernel.path, "lora_magnitude")] = (*layers, *outer)
        return nested(leaves)

    def init(self, config: TransformerConfig, key: jax.Array, base: Tree) -> Tree:
        """See Adapter: A is uniform as a layer's weights (He et al. 2015 with a = sqrt(5)), B is 0."""
        leaves: dict[tuple[str, ...], Any] = {}
        for number, kernel in enumerate(chosen(config, self.targets)):
            layers, inner, outer = kernel.split(kernel.shape)
            most = 1 / math.sqrt(math.prod(inner))
            shape = (*layers, *inner, self.rank)
            drawn = jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-most, maxval=most)
            leaves[(*kernel.path, "lora_a")] = drawn
            leaves[(*kernel.path, "lora_b")] = jnp.zeros((*layers, self.rank, *outer))
            if self.dora:
                weight = at(base, kernel.path)["kernel"].astype(jnp.float32)
                sums = tuple(range(kernel.stacked, kernel.stacked + kernel.sums))
                leaves[(*kernel.path, "lora_magnitude")] = jnp.sqrt(jnp.square(weight).sum(axis=sums))
        return nested(leaves)

    def apply(self, config: TransformerConfig, base: Tree, own: Tree) -> Tree:
        """See Adapter; s is multiplied into B."""
        own = _map(lambda name, leaf: leaf * self.scale if name == "lora_b" else leaf, own)
        if self.dropout:
            rates = {
                (*kernel.path, "lora_dropout"): jnp.full(kernel.shape[: kernel.stacked], self.dropout)
                for kernel in chosen(config, self.targets)
            }
            own = merged(own, nested(rates))
        return merged(base, own)


# Modules that import this one are named, and imported when one of their kinds is met.
KINDS = {
    "Lora": __name__,
    "Ia3": "t5style.models.adapters_vectors",
    "BitFit": "t5style.models.adapters_vectors",
    "QLora": "t5style.models.adapters_quantized",
    "Bottleneck": "t5style.models.adapters_bottleneck",
    "PromptTuning": "t5style.models.adapters_virtual",
    "PrefixTuning": "t5style.models.adapters_virtual",
}
