"""Adapters that are vectors beside projections: (IA)^3 and BitFit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5style.models.adapters import PROJECTIONS, Kernel, Tree, at, chosen, merged, nested
from t5style.models.config import TransformerConfig
from t5style.models.params import logical_axes
from t5style.parallel.rules import is_axes, no_mesh, path_name


@dataclasses.dataclass(frozen=True)
class Ia3:
    """(IA)^3 (Liu et al. 2022, arXiv 2205.05638, section 3.3): keys, values and the MLP's hidden units are
    multiplied by learned vectors, which are ones at first.

    Attributes:
      outputs: regular expressions, found in the paths of the projections whose outputs are multiplied.
      inputs: of those whose inputs are.
    """

    outputs: Sequence[str] = ("attention/key$", "attention/value$")
    inputs: Sequence[str] = ("mlp/output$",)

    def __post_init__(self) -> None:
        for name in ("outputs", "inputs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not (*self.outputs, *self.inputs):
            raise ValueError(
                "Ia3.outputs and Ia3.inputs are empty; name at least one pattern of projections."
            )

    def axes(self, config: TransformerConfig) -> Tree:
        """See Adapter."""
        leaves: dict[tuple[str, ...], Any] = {}
        for kernel, name, side in self._vectors(config):
            parts = kernel.split(kernel.names)
            leaves[(*kernel.path, name)] = (*parts[0], *parts[side])
        return nested(leaves)

    def init(self, config: TransformerConfig, key: jax.Array, base: Tree) -> Tree:
        """See Adapter; `[layers, *inner]` and `[layers, *outer]`."""
        leaves: dict[tuple[str, ...], Any] = {}
        for kernel, name, side in self._vectors(config):
            parts = kernel.split(kernel.shape)
            leaves[(*kernel.path, name)] = jnp.ones((*parts[0], *parts[side]))
        return nested(leaves)

    def apply(self, config: TransformerConfig, base: Tree, own: Tree) -> Tree:
        """See Adapter."""
        return merged(base, own)

    def _vectors(self, config: TransformerConfig) -> list[tuple[Kernel, str, int]]:
        """(projection, name of its vector, which part of its dimensions the vector has)."""
        return [
            *((kernel, "ia3_output", 2) for kernel in chosen(config, self.outputs)),
            *((kernel, "ia3_input", 1) for kernel in chosen(config, self.inputs)),
        ]


@dataclasses.dataclass(frozen=True)
class BitFit:
    """Only biases are trained (Ben Zaken et al. 2022): those of projections, and of norms that have one.

    A projection without a bias gets one of zeros; what is trained is the bias itself, not what it changes by.

    Attributes:
      targets: regular expressions, found in the paths of the projections whose biases are trained.
      norms: whether the biases of norms are trained too, where there are any.
    """

    targets: Sequence[str] = PROJECTIONS
    norms: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets:
            raise ValueError("BitFit.targets is empty; name at least one pattern of projections.")

    def axes(self, config: TransformerConfig) -> Tree:
        """See Adapter."""
        leaves: dict[tuple[str, ...], Any] = {}
        for kernel in chosen(config, self.targets):
            layers, _, outer = kernel.split(kernel.names)
            leaves[(*kernel.path, "bias")] = (*layers, *outer)
        return nested(leaves | self._norms(config))

    def init(self, config: TransformerConfig, key: jax.Array, base: Tree) -> Tree:
        """See Adapter: the base's biases, and zeros, `[layers, *outer]`."""
        leaves: dict[tuple[str, ...], Any] = {}
        for kernel in chosen(config, self.targets):
            layers, _, outer = kernel.split(kernel.shape)
            found = at(base, kernel.path).get("bias")
            bias = jnp.zeros((*layers, *outer)) if found is None else found.astype(jnp.float32)
            leaves[(*kernel.path, "bias")] = bias
        norms = {path: at(base, path).astype(jnp.float32) for path in self._norms(config)}
        return nested(leaves | norms)

    def apply(self, config: TransformerConfig, base: Tree, own: Tree) -> Tree:
        """See Adapter; the biases take the place of the base's."""
        return merged(base, own)

    def _norms(self, config: TransformerConfig) -> dict[tuple[str, ...], tuple[str | None, ...]]:
        """The axes of the biases of norms in layers, by path."""
        if not (self.norms and config.norm_bias):
            return {}
        with no_mesh():
            axes = logical_axes(config)
        found = {}
        for keys, names in jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes):
            path = tuple(path_name(keys).split("/"))
            if path[0] in ("encoder", "decoder") and path[-1] == "bias" and path[-2].endswith("norm"):
                found[path] = names
        return found
