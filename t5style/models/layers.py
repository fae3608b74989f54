"""One layer: self-attention, cross-attention where there is an encoder, MLP; each normalised first and added.

All families share these modules; what differs is a field of TransformerConfig.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from t5style.models.config import TransformerConfig
from t5style.nn.attention import Dropout, attention, cached_attention
from t5style.nn.initializers import initializer
from t5style.nn.norm import RMSNorm
from t5style.nn.parameter import Init
from t5style.nn.positions import rotate
from t5style.nn.projection import Projection
from t5style.parallel.rules import constrain

Angles = tuple[jax.Array, jax.Array]
LayerCache = dict[str, jax.Array]

_FUNCTIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "linear": lambda x: x,
}


def init_of(config: TransformerConfig, part: str) -> Init:
    """The initializer of a part of the model (nn/initializers.py names the parts)."""
    return initializer(
        config.init,
        config.init_scale,
        part,
        d_model=config.d_model,
        d_ff=config.d_ff,
        heads=config.num_heads,
        head_dim=config.heads_width,
    )


def _projection(
    config: TransformerConfig,
    part: str,
    inner: tuple[int, ...],
    outer: tuple[int, ...],
    names: tuple[str, ...],
) -> Projection:
    return Projection(
        inner, outer, names, init_of(config, part), param_dtype=config.param_dtype, precision=config.precision
    )


class Attention(nn.Module):
    """Multi-head attention; kernels `[embed, heads, head_dim]`, the output's `[heads, head_dim, embed]`."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        query, keys, width = (c.num_heads, c.heads_width), (c.kv_heads, c.heads_width), (c.d_model,)
        self.query = _projection(c, "query", width, query, ("embed", "heads", "head_dim"))
        self.key = _projection(c, "key", width, keys, ("embed", "kv_heads", "head_dim"))
        self.value = _projection(c, "value", width, keys, ("embed", "kv_heads", "head_dim"))
        self.output = _projection(c, "attention_output", query, width, ("heads", "head_dim", "embed"))

    @property
    def _scale(self) -> float:
        return self.config.heads_width**-0.5 if self.config.scale_attention else 1.0

    def queries(self, x: jax.Array, angles: Angles | None) -> jax.Array:
        """`[batch, length, embed] -> [batch, length, heads, head_dim]`."""
        query = self.query(x)
        query = rotate(query, angles) if angles is not None else query
        return checkpoint_name(constrain(query, ("batch", "length", "heads", "head_dim")), "query")

    def keys_values(self, source: jax.Array, angles: Angles | None) -> tuple[jax.Array, jax.Array]:
        """`[batch, keys, embed] ->` two of `[batch, keys, kv_heads, head_dim]`."""
        key, value = self.key(source), self.value(source)
        key = rotate(key, angles) if angles is not None else key
        names = ("batch", "length", "kv_heads", "head_dim")
        return checkpoint_name(constrain(key, names), "key"), checkpoint_name(
            constrain(value, names), "value"
        )

    def __call__(
        self,
        x: jax.Array,
        source: jax.Array,
        *,
        angles: Angles | None,
        bias: jax.Array | None,
        segments: jax.Array | None,
        source_segments: jax.Array | None,
        causal: bool,
        deterministic: bool,
    ) -> jax.Array:
        """x `[batch, queries, embed]` attends to source `[batch, keys, embed]`; `[batch, queries, embed]`."""
        c = self.config
        query = self.queries(x, angles)
        key, value = self.keys_values(source, angles)
        dropout = None if deterministic or not c.dropout else Dropout(c.dropout, self.make_rng("dropout"))
        context = attention(
            query,
            key,
            value,
            bias=bias,
            query_segments=segments,
            key_segments=source_segments,
            causal=causal,
            scale=self._scale,
            dropout=dropout,
            implementation=c.attention,
            precision=c.precision,
        )
        return self.output(checkpoint_name(context, "attention_context"))

    def cached(
        self, query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        """Attention to the cache `[batch, kv_heads, slots, head_dim]`; `[batch, queries, embed]`."""
        context = cached_attention(
            query, key, value, visible, bias=bias, scale=self._scale, precision=self.config.precision
        )
        return self.output(context)


class Mlp(nn.Module):
    """f(x · inputs_0) · output, or (f(x · inputs_0) ∘ g(x · inputs_1)) · output (Shazeer 2020)."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.inputs = [
            _projection(c, "mlp_input", (c.d_model,), (c.d_ff,), ("embed", "mlp")) for _ in c.activations
        ]
        self.output = _projection(c, "mlp_output", (c.d_ff,), (c.d_model,), ("mlp", "embed"))
        self.dropout = nn.Dropout(c.dropout)

    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """`[batch, length, embed] -> [batch, length, embed]`."""
        factors = [
            _FUNCTIONS[name](checkpoint_name(projection(x), "mlp_hidden"))
            for projection, name in zip(self.inputs, self.config.activations, strict=True)
        ]
        hidden = factors[0] * factors[1] if self.config.gated else factors[0]
        hidden = constrain(hidden, ("batch", "length", "mlp"))
        return self.output(self.dropout(hidden, deterministic=deterministic))


class Layer(nn.Module):
    """A layer of an encoder (causal False), of a decoder-only model (causal), or of a decoder (and cross)."""

    config: TransformerConfig
    causal: bool
    cross: bool

    def setup(self) -> None:
        c = self.config
        self.attention_norm = RMSNorm(c.norm_eps, c.param_dtype)
        self.attention = Attention(c)
        if self.cross:
            self.cross_attention_norm = RMSNorm(c.norm_eps, c.param_dtype)
            self.cross_attention = Attention(c)
        self.mlp_norm = RMSNorm(c.norm_eps, c.param_dtype)
        self.mlp = Mlp(c)
        self.dropout = nn.Dropout(c.dropout)

    def __call__(
        self,
        x: jax.Array,
        *,
        angles: Angles | None = None,
        bias: jax.Array | None = None,
        segments: jax.Array | None = None,
        encoded: jax.Array | None = None,
        encoded_segments: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """`[batch, length, embed] -> [batch, length, embed]`."""
        y = self.attention_norm(x)
        y = self.attention(
            y,
            y,
            angles=angles,
            bias=bias,
            segments=segments,
            source_segments=segments,
            causal=self.causal,
            deterministic=deterministic,
        )
        x = self._add(x, y, deterministic)
        if self.cross:
            if encoded is None:
                raise ValueError("a decoder layer with cross-attention needs the encoder's output")
            y = self.cross_attention(
                self.cross_attention_norm(x),
                encoded,
                angles=None,
                bias=None,
                segments=segments,
                source_segments=encoded_segments,
                causal=False,
                deterministic=deterministic,
            )
            x = self._add(x, y, deterministic)
        return self._add(x, self.mlp(self.mlp_norm(x), deterministic), deterministic)

    def _add(self, x: jax.Array, y: jax.Array, deterministic: bool) -> jax.Array:
        return constrain(x + self.dropout(y, deterministic=deterministic), ("batch", "length", "embed"))

    def cross_keys_values(self, encoded: jax.Array, dtype: Any) -> LayerCache:
        """Keys and values of the encoder's output, `[batch, kv_heads, keys, head_dim]`: computed once."""
        key, value = self.cross_attention.keys_values(encoded, None)
        return {
            "cross_key": key.swapaxes(1, 2).astype(dtype),
            "cross_value": value.swapaxes(1, 2).astype(dtype),
        }

    def step(
        self,
        x: jax.Array,
        cache: LayerCache,
        *,
        slot: jax.Array,
        angles: Angles | None,
        bias: jax.Array | None,
        visible: jax.Array,
        encoder_visible: jax.Array | None,
    ) -> tuple[jax.Array, LayerCache]:
        """The layer on new tokens x `[batch, tokens, embed]`; their keys go to the cache from `slot` on."""
        y = self.attention_norm(x)
        query = self.attention.queries(y, angles)
        key, value = self.attention.keys_values(y, angles)  # [batch, tokens, kv_heads, head_dim]
        cache = dict(cache)
        for name, new in (("key", key), ("value", value)):
            new = new.swapaxes(1, 2).astype(cache[name].dtype)  # [batch, kv_heads, tokens, head_dim]
            cache[name] = jax.lax.dynamic_update_slice_in_dim(cache[name], new, slot, axis=2)
        x = x + self.attention.cached(query, cache["key"], cache["value"], visible, bias)
        if self.cross:
            query = self.cross_attention.queries(self.cross_attention_norm(x), None)
            x = x + self.cross_attention.cached(
                query, cache["cross_key"], cache["cross_value"], jnp.asarray(encoder_visible), None
            )
        return x + self.mlp(self.mlp_norm(x), True), cache
