"""Adapters that are small networks behind sub-layers: bottlenecks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t5style.models.adapters import Tree, merged, nested
from t5style.models.config import TransformerConfig

SUBLAYERS = ("attention", "cross_attention", "mlp")


def groups(config: TransformerConfig) -> dict[tuple[str, str], int]:
    """How many layers there are in each stack's trees of them: ('decoder', 'layers'), ..."""
    found: dict[tuple[str, str], int] = {}
    for side in ("encoder", "decoder"):
        for kind in config.layers_of(side):
            name = (side, "moe_layers" if kind.experts else "layers")
            found[name] = found.get(name, 0) + 1
    return found


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """Adapters of Houlsby et al. (2019, section 2.1): y + gelu(y D + d) U + u of a sub-layer's output y,
    before it is added to the residual stream (and normalised, where the model does that). U and u begin as 0.

    Attributes:
      size: columns of D.
      after: the sub-layers: 'attention', 'cross_attention', 'mlp'.
    """

    size: int = 64
    after: Sequence[str] = ("attention", "mlp")

    def __post_init__(self) -> None:
        object.__setattr__(self, "after", tuple(self.after))
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"Bottleneck.size is {self.size!r}; it must be a whole number from 1.")
        if unknown := sorted(set(self.after) - set(SUBLAYERS)):
            raise ValueError(f"Bottleneck.after has {unknown[0]!r}; it may have {', '.join(SUBLAYERS)}.")
        if not self.after:
            raise ValueError("Bottleneck.after is empty; name at least one sub-layer.")

    def axes(self, config: TransformerConfig) -> Tree:
        """See Adapter."""
        names = {"down": ("embed", None), "down_bias": (None,), "up": (None, "embed"), "up_bias": ("embed",)}
        return nested(
            {
                (*path, name): ("layers", *axes)
                for path in self._places(config)
                for name, axes in names.items()
            }
        )

    def init(self, config: TransformerConfig, key: jax.Array, base: Tree) -> Tree:
        """See Adapter; D `[layers, embed, size]` is uniform in ± 1/sqrt(embed)."""
        leaves: dict[tuple[str, ...], Any] = {}
        width, most = config.d_model, 1 / math.sqrt(config.d_model)
        for number, (path, layers) in enumerate(self._places(config).items()):
            drawn = jax.random.fold_in(key, number)
            shape = (layers, width, self.size)
            leaves[(*path, "down")] = jax.random.uniform(drawn, shape, minval=-most, maxval=most)
            leaves[(*path, "down_bias")] = jnp.zeros((layers, self.size))
            leaves[(*path, "up")] = jnp.zeros((layers, self.size, width))
            leaves[(*path, "up_bias")] = jnp.zeros((layers, width))
        return nested(leaves)

    def apply(self, config: TransformerConfig, base: Tree, own: Tree) -> Tree:
        """See Adapter."""
        return merged(base, own)

    def _places(self, config: TransformerConfig) -> dict[tuple[str, ...], int]:
        """Paths of the bottlenecks in the model's tree, and the numbers of layers there."""
        if config.parallel_layers:
            raise ValueError(
                "Bottleneck is for models whose sub-layers follow each other, and this one's are parallel "
                "(parallel_layers = True); take Lora."
            )
        return {
            (side, tree, f"{name}_bottleneck"): layers
            for (side, tree), layers in groups(config).items()
            for name in self.after
            if name != "cross_attention" or (side == "decoder" and config.encoder_layers)
        }
