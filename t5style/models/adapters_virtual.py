"""Adapters that are virtual tokens: prompt tuning and prefix tuning.

Virtual token i is the id vocab_size + i. Such ids stand before each example's tokens, in its segment, with
positions and without a loss; whoever makes the rows puts them there. So packing, caches and every
implementation of attention need to know nothing of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5style.models.adapters import Tree, merged, nested
from t5style.models.adapters_bottleneck import groups
from t5style.models.config import TransformerConfig


def virtual_ids(config: TransformerConfig, length: int) -> list[int]:
    """The ids that stand before an example's tokens."""
    return list(range(config.vocab_size, config.vocab_size + length))


class Counts(NamedTuple):
    """How many there are before the encoder's and the decoder's tokens."""

    encoder: int = 0
    decoder: int = 0


def counts(config: TransformerConfig, params: Mapping[str, Any]) -> Counts:
    """What an adapter has put into the parameters: prompt_embedding `[n, embed]` stands before the tokens of
    the encoder, where there is one, prefix_key `[layers, n, kv_heads, head_dim]` before those of its stack.
    """
    prompt = params["prompt_embedding"].shape[0] if "prompt_embedding" in params else 0
    prefix = {"encoder": 0, "decoder": 0}
    for side in prefix:
        for name in ("layers", "moe_layers"):
            layers = params.get(side, {}).get(name, {})
            attention = (layers[0] if isinstance(layers, tuple) else layers).get("attention", {})
            if "prefix_key" in attention:
                prefix[side] = attention["prefix_key"].shape[-3]
    prefix["encoder" if config.encoder_layers else "decoder"] += prompt
    return Counts(**prefix)


@dataclasses.dataclass(frozen=True)
class PromptTuning:
    """Learned embeddings of virtual tokens (Lester et al. 2021, section 2).

    Attributes:
      length: how many virtual tokens there are.
      sampled: they begin as embeddings of different tokens, drawn among this many first ids of the vocabulary
        (section 3.2: the 5,000 most common ones were best but for class labels).
    """

    length: int = 100
    sampled: int = 5000

    def __post_init__(self) -> None:
        for name in ("length", "sampled"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"PromptTuning.{name} is {value!r}; it must be a whole number from 1.")

    def axes(self, config: TransformerConfig) -> Tree:
        """See Adapter."""
        return {"prompt_embedding": (None, None)}

    def init(self, config: TransformerConfig, key: jax.Array, base: Tree) -> Tree:
        """See Adapter; `[length, embed]`. There is no start without an effect: what is learned is context."""
        most = min(self.sampled, config.vocab_size)
        ids = jax.random.choice(key, most, (self.length,), replace=self.length > most)
        drawn = jnp.take(base["embedding"], ids, axis=0).astype(jnp.float32)
        if base["embedding"].dtype == jnp.int8:
            drawn = drawn * jnp.take(base["embedding_scale"], ids)[:, None]
        return {"prompt_embedding": drawn}

    def apply(self, config: TransformerConfig, base: Tree, own: Tree) -> Tree:
        """See Adapter."""
        return merged(base, own)


@dataclasses.dataclass(frozen=True)
class PrefixTuning:
    """Learned keys and values of virtual tokens in every self-attention (Li and Liang 2021, section 4.2,
    without the reparametrisation; P-tuning v2).

    Keys are learned as they are attended to: neither normalised nor turned by rotary embeddings (as PEFT has
    it). What else a layer computes at virtual tokens reaches no other token, but that a decoder's
    cross-attention sees an encoder's output there.

    Attributes:
      length: how many virtual tokens there are.
      sides: the stacks: 'decoder', 'encoder'.
    """

    length: int = 30
    sides: Sequence[str] = ("decoder",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sides", tuple(self.sides))
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"PrefixTuning.length is {self.length!r}; it must be a whole number from 1.")
        if not self.sides or set(self.sides) - {"encoder", "decoder"}:
            raise ValueError(f"PrefixTuning.sides is {self.sides}; it may have 'decoder' and 'encoder'.")

    def axes(self, config: TransformerConfig) -> Tree:
        """See Adapter."""
        names = ("layers", None, "kv_heads", "head_dim")
        return nested(dict.fromkeys(self._places(config), names))

    def init(self, config: TransformerConfig, key: jax.Array, base: Tree) -> Tree:
        """See Adapter; `[layers, length, kv_heads, head_dim]`, normal with a deviation of 0.02.

        There is no start without an effect, as in prompt tuning.
        """
        leaves: dict[tuple[str, ...], Any] = {}
        for number, (path, layers) in enumerate(self._places(config).items()):
            shape = (layers, self.length, config.kv_heads, config.heads_width)
            drawn = 0.02 * jax.random.normal(jax.random.fold_in(key, number), shape)
            leaves[path] = drawn
        return nested(leaves)

    def apply(self, config: TransformerConfig, base: Tree, own: Tree) -> Tree:
        """See Adapter."""
        return merged(base, own)

    def _places(self, config: TransformerConfig) -> dict[tuple[str, ...], int]:
        """Paths of the keys and values in the model's tree, and the numbers of layers there."""
        if config.latent is not None:
            raise ValueError("PrefixTuning is for heads with keys of their own, and this model's are latent.")
        places: dict[tuple[str, ...], int] = {
            (*place, "attention", f"prefix_{name}"): layers
            for place, layers in groups(config).items()
            if place[0] in self.sides
            for name in ("key", "value")
        }
        if not places:
            raise ValueError(f"PrefixTuning.sides is {self.sides}, and this model has no such stack.")
        return places
