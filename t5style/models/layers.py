"""One layer: self-attention, cross-attention where there is an encoder, and an MLP or experts.

All families share these modules; what differs is a field of TransformerConfig.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from t5style.models.attention_layers import (
    Angles,
    Attention,
    attention_layer,
    init_of,
    norm,
    projection,
)
from t5style.models.config import LayerKind, TransformerConfig
from t5style.nn import activations, attention_sequence
from t5style.nn.attention import choose
from t5style.nn.attention_tiles import BiasByDistance
from t5style.nn.cache import LayerCache
from t5style.nn.moe import MoeMlp, RouterStats
from t5style.nn.positions import RelativeBias
from t5style.nn.projection import project
from t5style.parallel.rules import constrain


class Mlp(nn.Module):
    """f(x · inputs_0) · output, or (f(x · inputs_0) ∘ g(x · inputs_1)) · output (Shazeer 2020)."""

    config: TransformerConfig
    d_ff: int

    def setup(self) -> None:
        c, d_ff = self.config, self.d_ff
        self.inputs = [
            projection(c, "mlp_input", (c.d_model,), (d_ff,), ("embed", "mlp"), c.mlp_bias)
            for _ in c.activations
        ]
        self.output = projection(c, "mlp_output", (d_ff,), (c.d_model,), ("mlp", "embed"), c.mlp_bias)
        self.dropout = nn.Dropout(c.dropout)

    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """`[batch, length, embed] -> [batch, length, embed]`."""
        c = self.config
        inputs = [checkpoint_name(each(x), f"mlp_input_{i}") for i, each in enumerate(self.inputs)]
        hidden = activations.hidden(inputs, c.activations, c.mlp_clamp)
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        return self.output(self.dropout(hidden, deterministic=deterministic))


class Layer(nn.Module):
    """A layer of an encoder (causal False), of a decoder-only model (causal), or of a decoder (and cross)."""

    config: TransformerConfig
    kind: LayerKind
    causal: bool
    cross: bool

    def setup(self) -> None:
        c = self.config
        windowed = self.kind.attention in ("window", "chunk")
        self.attention = attention_layer(
            c, c.window if windowed else None, c.global_tokens if self.kind.attention == "window" else 0
        )
        sublayers = ["attention", "mlp"]
        if self.cross:
            self.cross_attention = Attention(c)
            sublayers.append("cross_attention")
        for name in sublayers:
            if c.norm_placement in ("pre", "both"):
                setattr(self, f"{name}_norm", norm(c))
            if c.norm_placement != "pre":
                setattr(self, f"{name}_output_norm", norm(c))
        self.mlp: MoeMlp | Mlp = self._experts() if self.kind.experts else Mlp(c, c.d_ff)
        self.dropout = nn.Dropout(c.dropout)
        if c.relative_bias_per_layer and c.positions == "relative_bias":
            self.relative_bias = relative_bias(c, self.causal)

    def _experts(self) -> MoeMlp:
        c = self.config
        assert c.moe is not None
        return MoeMlp(
            c.moe,
            c.d_model,
            c.activations,
            router_init=init_of(c, "router"),
            input_init=init_of(c, "mlp_input"),
            output_init=init_of(c, "mlp_output"),
            clamp=c.mlp_clamp,
            dropout=c.dropout,
            param_dtype=c.param_dtype,
            precision=c.precision,
            shared=Mlp(c, c.moe.shared_d_ff, parent=None) if c.moe.shared_d_ff else None,
        )

    def _angles(self, angles: Mapping[str, Angles] | None) -> Angles | None:
        return None if angles is None else angles.get(self.kind.attention)

    def _sublayer(
        self, name: str, x: jax.Array, function: Callable[[jax.Array], jax.Array], deterministic: bool = True
    ) -> jax.Array:
        """x with what the sub-layer makes of it added, normalised where the model does."""
        placement = self.config.norm_placement
        y = getattr(self, f"{name}_norm")(x) if placement in ("pre", "both") else x
        y = function(y)
        if self.has_variable("params", f"{name}_bottleneck"):
            y = y + self._bottleneck(name, y)
        if placement in ("both", "output"):
            y = getattr(self, f"{name}_output_norm")(y)
        x = self._add(x, y, deterministic)
        return getattr(self, f"{name}_output_norm")(x) if placement == "post" else x

    def _bottleneck(self, name: str, y: jax.Array) -> jax.Array:
        """What an adapter (models/adapters_bottleneck.py) makes of a sub-layer's output."""
        given = self.get_variable("params", f"{name}_bottleneck")
        given = {part: value.astype(y.dtype) for part, value in given.items()}
        hidden = project(y, given["down"], precision=self.config.precision) + given["down_bias"]
        hidden = jax.nn.gelu(hidden)  # [batch, length, size]
        return project(hidden, given["up"], precision=self.config.precision) + given["up_bias"]

    def _add(self, x: jax.Array, y: jax.Array, deterministic: bool) -> jax.Array:
        return constrain(x + self.dropout(y, deterministic=deterministic), ("batch", "length", "embed"))

    def _mlp(
        self, x: jax.Array, deterministic: bool, real: jax.Array | None, stats: bool = False
    ) -> tuple[jax.Array, RouterStats | None]:
        if isinstance(self.mlp, MoeMlp):
            return self.mlp(x, real=real, deterministic=deterministic, stats=stats)
        return self.mlp(x, deterministic), None

    def __call__(
        self,
        x: jax.Array,
        *,
        angles: Mapping[str, Angles] | None = None,
        bias: jax.Array | BiasByDistance | None = None,
        segments: jax.Array | None = None,
        chunks: jax.Array | None = None,
        encoded: jax.Array | None = None,
        encoded_segments: jax.Array | None = None,
        virtual: jax.Array | None = None,
        deterministic: bool = True,
        stats: bool = False,
    ) -> tuple[jax.Array, RouterStats | None]:
        """`[batch, length, embed] -> [batch, length, embed]`; angles: by kind of attention; virtual: see
        Attention.keys_values.

        Also the router's statistics, if stats asks for them and the layer has experts.
        """
        if self.config.relative_bias_per_layer and self.config.positions == "relative_bias":
            bias = self_attention_bias(self.config, self.relative_bias, x)
        real = None if segments is None else segments != 0
        own = chunks if self.kind.attention == "chunk" else segments
        x = checkpoint_name(x, "layer_input")

        def attend(y: jax.Array) -> jax.Array:
            y = self.attention(
                y,
                y,
                angles=self._angles(angles),
                bias=bias,
                segments=own,
                source_segments=own,
                causal=self.causal,
                deterministic=deterministic,
                virtual=virtual,
            )
            return checkpoint_name(y, "attention_output")

        def attend_across(y: jax.Array) -> jax.Array:
            if encoded is None:
                raise ValueError("a decoder layer with cross-attention needs the encoder's output")
            y = self.cross_attention(
                y,
                encoded,
                angles=None,
                bias=None,
                segments=segments,
                source_segments=encoded_segments,
                causal=False,
                deterministic=deterministic,
            )
            return checkpoint_name(y, "attention_output")

        router = None

        def transform(y: jax.Array) -> jax.Array:
            nonlocal router
            y, router = self._mlp(y, deterministic, real, stats)
            return checkpoint_name(y, "mlp_output")

        if self.config.parallel_layers:
            both = attend(self.attention_norm(x)) + transform(self.mlp_norm(x))
            return self._add(x, both, deterministic), router
        x = self._sublayer("attention", x, attend, deterministic)
        if self.cross:
            x = self._sublayer("cross_attention", x, attend_across, deterministic)
        return self._sublayer("mlp", x, transform, deterministic), router

    # --- decoding ---

    def new_cache(self, batch: int, slots: int, dtype: str) -> LayerCache:
        """An empty cache of self-attention."""
        return self.attention.new_cache(batch, slots, dtype)

    def cross_keys_values(self, encoded: jax.Array, dtype: Any) -> LayerCache:
        """Keys and values of the encoder's output, `[batch, kv_heads, keys, head_dim]`: computed once."""
        cache = self.cross_attention.new_cache(encoded.shape[0], encoded.shape[1], dtype)
        filled = self.cross_attention.remember(cache, encoded, None, jnp.int32(0), False)
        return {f"cross_{name}": entry for name, entry in filled.items()}

    def step(
        self,
        x: jax.Array,
        cache: LayerCache,
        *,
        slot: jax.Array,
        ring: bool,
        angles: Mapping[str, Angles] | None,
        bias: jax.Array | None,
        distances: tuple[jax.Array, jax.Array] | None,
        visible: jax.Array,
        encoder_visible: jax.Array | None,
        real: jax.Array | None,
        virtual: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache]:
        """The layer on new tokens x `[batch, tokens, embed]`; their keys go to the cache from `slot` on.

        Args:
          ring: the cache is one (nn/cache.py).
          distances: positions of the new tokens and of the slots, where the layer has a bias of its own.
          visible: bool `[batch, tokens, slots]`.
          real: bool `[batch, tokens]`, which tokens are no padding.
          virtual: int32 `[batch, tokens]`, see Attention.keys_values.
        """
        if self.config.relative_bias_per_layer and distances is not None:
            bias = self.relative_bias.at(*distances)
        own = {name: entry for name, entry in cache.items() if not name.startswith("cross_")}
        across = {name.removeprefix("cross_"): cache[name] for name in cache if name not in own}
        turned = self._angles(angles)

        def attend(y: jax.Array) -> jax.Array:
            nonlocal own
            own = self.attention.remember(own, y, turned, slot, ring, virtual)
            return self.attention.recall(y, own, turned, visible, bias)

        def attend_across(y: jax.Array) -> jax.Array:
            return self.cross_attention.recall(y, across, None, jnp.asarray(encoder_visible), None)

        def transform(y: jax.Array) -> jax.Array:
            return self._mlp(y, True, real)[0]

        if self.config.parallel_layers:
            x = x + attend(self.attention_norm(x)) + transform(self.mlp_norm(x))
        else:
            x = self._sublayer("attention", x, attend)
            if self.cross:
                x = self._sublayer("cross_attention", x, attend_across)
            x = self._sublayer("mlp", x, transform)
        return x, cache | own


def relative_bias(config: TransformerConfig, causal: bool) -> RelativeBias:
    """T5's table of biases, of a stack or of a layer."""
    return RelativeBias(
        config.num_heads,
        config.relative_buckets,
        config.relative_max_distance,
        bidirectional=not causal,
        initializer=init_of(config, "relative_bias"),
        param_dtype=config.param_dtype,
    )


def self_attention_bias(
    config: TransformerConfig, bias: RelativeBias, x: jax.Array
) -> jax.Array | BiasByDistance:
    """The relative bias for self-attention of x `[batch, length, embed]`: by distance where implementations
    spread it to scores themselves, and otherwise spread once for all layers that it is for.
    """
    (batch, length), c = x.shape[:2], config
    found = bias.by_distance(length, length)
    query, key = (
        jax.ShapeDtypeStruct((batch, length, heads, c.heads_width), jnp.dtype(c.dtype))
        for heads in (c.num_heads, c.kv_heads)
    )
    plain = c.window is None and c.attention_softcap is None and not c.attention_sinks
    settings: dict[str, Any] = {"dropout": c.dropout > 0, "precision": c.precision, "plain": plain}
    if (
        c.global_tokens > 0
        or attention_sequence.by_distance(c.sequence_attention, length)
        or choose(c.attention, query, key, key, bias=found, **settings) == "whole"
    ):
        return found
    return found.dense(length, length)
