"""Attention with its projections: of heads with keys and values of their own, and latent attention.

Both have the same four methods: the whole sequence at once (`__call__`), an empty cache (`new_cache`),
writing new tokens to it (`remember`), and attention to it (`recall`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from t5style.models.config import TransformerConfig
from t5style.nn import cache as cache_lib
from t5style.nn import platform
from t5style.nn.attention import Dropout, attention, cached_attention
from t5style.nn.attention_tiles import BiasByDistance
from t5style.nn.cache import LayerCache
from t5style.nn.initializers import initializer
from t5style.nn.norm import Norm
from t5style.nn.parameter import Init, named, zeros
from t5style.nn.positions import rotate
from t5style.nn.projection import Projection
from t5style.parallel.rules import constrain

Angles = tuple[jax.Array, jax.Array]


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


def projection(
    config: TransformerConfig,
    part: str,
    inner: tuple[int, ...],
    outer: tuple[int, ...],
    names: tuple[str, ...],
    bias: bool = False,
) -> Projection:
    """A projection of the model, initialised as that part of it."""
    return Projection(
        inner,
        outer,
        names,
        init_of(config, part),
        param_dtype=config.param_dtype,
        precision=config.precision,
        bias=bias,
        quantized=config.quantized_training,
    )


def norm(config: TransformerConfig, names: tuple[str, ...] = ("embed",)) -> Norm:
    """A norm of the model's kind."""
    c = config
    return Norm(c.norm, c.norm_eps, c.norm_bias, c.norm_plus_one, param_dtype=c.param_dtype, names=names)


class Attention(nn.Module):
    """Multi-head attention; kernels `[embed, heads, head_dim]`, the output's `[heads, head_dim, embed]`.

    Attributes:
      config: the model.
      window: how many tokens a token sees, itself included; None: all.
      global_tokens: see TransformerConfig.
    """

    config: TransformerConfig
    window: int | None = None
    global_tokens: int = 0

    def setup(self) -> None:
        c = self.config
        query, keys, width = (c.num_heads, c.heads_width), (c.kv_heads, c.heads_width), (c.d_model,)
        self.query = projection(c, "query", width, query, ("embed", "heads", "head_dim"), c.attention_bias)
        self.key = projection(c, "key", width, keys, ("embed", "kv_heads", "head_dim"), c.attention_bias)
        self.value = projection(c, "value", width, keys, ("embed", "kv_heads", "head_dim"), c.attention_bias)
        self.output = projection(
            c, "attention_output", query, width, ("heads", "head_dim", "embed"), c.attention_output_bias
        )
        if c.query_key_norm is not None:
            by_head = c.query_key_norm == "head"
            self.query_norm = norm(c, ("head_dim",) if by_head else ("heads",))
            self.key_norm = norm(c, ("head_dim",) if by_head else ("kv_heads",))
        if c.attention_sinks:
            self.sinks = self.param(
                "sinks", named(zeros, ("heads",)), (c.num_heads,), jnp.dtype(c.param_dtype)
            )

    @property
    def _settings(self) -> dict[str, Any]:
        c = self.config
        return {
            "scale": 1.0 if platform.scale_queries() else c.query_scale,
            "precision": c.precision,
            "softcap": c.attention_softcap,
            "sinks": self.sinks.astype(jnp.float32) if c.attention_sinks else None,
        }

    def _normalised(self, x: jax.Array, norm: Norm) -> jax.Array:
        """`[batch, length, heads, head_dim]`, normalised over each head or over all of them together."""
        if self.config.query_key_norm == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def queries(self, x: jax.Array, angles: Angles | None) -> jax.Array:
        """`[batch, length, embed] -> [batch, length, heads, head_dim]`."""
        query = self.query(x)
        if self.config.query_key_norm is not None:
            query = self._normalised(query, self.query_norm)
        scale = self.config.query_scale if platform.scale_queries() else 1.0
        if angles is not None:
            query = rotate(query, angles, scale)
        elif scale != 1.0:
            query = (query.astype(jnp.float32) * scale).astype(query.dtype)
        return checkpoint_name(constrain(query, ("batch", "length", "heads", "head_dim")), "query")

    def keys_values(
        self, source: jax.Array, angles: Angles | None, virtual: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """`[batch, keys, embed] ->` two of `[batch, keys, kv_heads, head_dim]`.

        Prefix tuning has put prefix_key and prefix_value `[n, kv_heads, head_dim]` beside the projections:
        where virtual, int32 `[batch, keys]`, is from 0, it says which of them stands there.
        """
        key, value = self.key(source), self.value(source)
        if self.config.query_key_norm is not None:
            key = self._normalised(key, self.key_norm)
        key = rotate(key, angles) if angles is not None else key
        if virtual is not None and self.has_variable("params", "prefix_key"):
            key, value = self._prefixed(key, "key", virtual), self._prefixed(value, "value", virtual)
        names = ("batch", "length", "kv_heads", "head_dim")
        return checkpoint_name(constrain(key, names), "key"), checkpoint_name(
            constrain(value, names), "value"
        )

    def _prefixed(self, x: jax.Array, name: str, virtual: jax.Array) -> jax.Array:
        learned = self.get_variable("params", f"prefix_{name}").astype(x.dtype)
        learned = jnp.take(learned, virtual, axis=0, mode="clip")  # [batch, keys, kv_heads, head_dim]
        return jnp.where((virtual >= 0)[:, :, None, None], learned, x)

    def __call__(
        self,
        x: jax.Array,
        source: jax.Array,
        *,
        angles: Angles | None,
        bias: jax.Array | BiasByDistance | None,
        segments: jax.Array | None,
        source_segments: jax.Array | None,
        causal: bool,
        deterministic: bool,
        virtual: jax.Array | None = None,
    ) -> jax.Array:
        """x `[batch, queries, embed]` attends to source `[batch, keys, embed]`; `[batch, queries, embed]`."""
        c = self.config
        query = self.queries(x, angles)
        key, value = self.keys_values(source, angles, virtual)
        dropout = None if deterministic or not c.dropout else Dropout(c.dropout, self.make_rng("dropout"))
        context = attention(
            query,
            key,
            value,
            bias=bias,
            query_segments=segments,
            key_segments=source_segments,
            causal=causal,
            dropout=dropout,
            implementation=c.attention,
            blocks=c.attention_blocks,
            window=self.window,
            global_tokens=self.global_tokens,
            sequence=c.sequence_attention,
            **self._settings,
        )
        return self.output(context)

    def new_cache(self, batch: int, slots: int, dtype: str) -> LayerCache:
        """Empty entries for keys and values."""
        c = self.config
        sizes = (batch, c.kv_heads, slots, c.heads_width, dtype)
        return cache_lib.new_entry("key", *sizes) | cache_lib.new_entry("value", *sizes)

    def remember(
        self,
        cache: LayerCache,
        x: jax.Array,
        angles: Angles | None,
        slot: jax.Array,
        ring: bool,
        virtual: jax.Array | None = None,
    ) -> LayerCache:
        """The cache with the keys and values of x `[batch, tokens, embed]` from `slot` on."""
        key, value = self.keys_values(x, angles, virtual)
        cache = cache_lib.write(cache, "key", key, slot, ring=ring)
        return cache_lib.write(cache, "value", value, slot, ring=ring)

    def recall(
        self,
        x: jax.Array,
        cache: LayerCache,
        angles: Angles | None,
        visible: jax.Array,
        bias: jax.Array | None,
    ) -> jax.Array:
        """x `[batch, queries, embed]` attends to the cache, where visible `[batch, queries or 1, slots]`."""
        query = self.queries(x, angles)
        key, value = (cache_lib.read(cache, name, query.dtype) for name in ("key", "value"))
        return self.output(cached_attention(query, key, value, visible, bias=bias, **self._settings))


class LatentAttentionLayer(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1).

    A head's query and key are a part without rotary embedding followed by one with it. To a cache, which
    holds each token's latent vector and rotary key, the queries go through the keys' projection instead of
    the keys themselves, and the values' projection comes after the sum (section 2.1.2, "absorbed").
    """

    config: TransformerConfig
    window: int | None = None
    global_tokens: int = 0

    def setup(self) -> None:
        c, latent = self.config, self.config.latent
        assert latent is not None
        heads, query_width = c.num_heads, latent.nope_dim + latent.rope_dim
        width, rank = (c.d_model,), latent.key_value_rank
        if latent.query_rank is None:
            self.query = projection(c, "query", width, (heads, query_width), ("embed", "heads", "head_dim"))
        else:
            self.query_down = projection(c, "key", width, (latent.query_rank,), ("embed", "latent"))
            self.query_norm = norm(c, ("latent",))
            self.query_up = projection(
                c, "query", (latent.query_rank,), (heads, query_width), ("latent", "heads", "head_dim")
            )
        self.key_value_down = projection(c, "key", width, (rank + latent.rope_dim,), ("embed", "latent"))
        self.key_value_norm = norm(c, ("latent",))
        up = ("latent", "heads", "head_dim")
        self.key_up = projection(c, "key", (rank,), (heads, latent.nope_dim), up)
        self.value_up = projection(c, "value", (rank,), (heads, latent.value_dim), up)
        self.output = projection(
            c, "attention_output", (heads, latent.value_dim), width, ("heads", "head_dim", "embed")
        )

    def queries(self, x: jax.Array, angles: Angles | None) -> tuple[jax.Array, jax.Array]:
        """Without and with rotary embedding, `[batch, length, heads, nope_dim]` and `[..., rope_dim]`."""
        latent = self.config.latent
        assert latent is not None
        query = (
            self.query(x) if latent.query_rank is None else self.query_up(self.query_norm(self.query_down(x)))
        )
        query = checkpoint_name(constrain(query, ("batch", "length", "heads", "head_dim")), "query")
        plain, turned = jnp.split(query, [latent.nope_dim], axis=-1)
        return plain, turned if angles is None else rotate(turned, angles)

    def latents(self, x: jax.Array, angles: Angles | None) -> tuple[jax.Array, jax.Array]:
        """Latent vectors `[batch, length, 1, rank]` and rotary keys `[batch, length, 1, rope_dim]`."""
        latent = self.config.latent
        assert latent is not None
        vector, key = jnp.split(self.key_value_down(x)[:, :, None], [latent.key_value_rank], axis=-1)
        return self.key_value_norm(vector), key if angles is None else rotate(key, angles)

    def __call__(
        self,
        x: jax.Array,
        source: jax.Array,
        *,
        angles: Angles | None,
        bias: jax.Array | BiasByDistance | None,
        segments: jax.Array | None,
        source_segments: jax.Array | None,
        causal: bool,
        deterministic: bool,
        virtual: jax.Array | None = None,
    ) -> jax.Array:
        """As Attention's; there is no prefix tuning of it."""
        c = self.config
        plain, turned = self.queries(x, angles)
        vector, shared = self.latents(source, angles)
        vector = vector[:, :, 0]  # [batch, length, rank]
        key = self.key_up(vector)  # [batch, length, heads, nope_dim]
        shared = jnp.broadcast_to(shared, (*key.shape[:3], shared.shape[-1]))
        names = ("batch", "length", "heads", "head_dim")
        key = checkpoint_name(constrain(jnp.concatenate([key, shared], axis=-1), names), "key")
        value = checkpoint_name(constrain(self.value_up(vector), names), "value")
        dropout = None if deterministic or not c.dropout else Dropout(c.dropout, self.make_rng("dropout"))
        context = attention(
            jnp.concatenate([plain, turned], axis=-1),
            key,
            value,
            bias=bias,
            query_segments=segments,
            key_segments=source_segments,
            causal=causal,
            scale=c.query_scale,
            dropout=dropout,
            implementation=c.attention,
            blocks=c.attention_blocks,
            precision=c.precision,
            window=self.window,
            global_tokens=self.global_tokens,
            sequence=c.sequence_attention,
        )
        return self.output(context)

    def new_cache(self, batch: int, slots: int, dtype: str) -> LayerCache:
        """Empty entries for latent vectors and rotary keys."""
        latent = self.config.latent
        assert latent is not None
        return cache_lib.new_entry(
            "latent", batch, 1, slots, latent.key_value_rank, dtype
        ) | cache_lib.new_entry("rope_key", batch, 1, slots, latent.rope_dim, dtype)

    def remember(
        self,
        cache: LayerCache,
        x: jax.Array,
        angles: Angles | None,
        slot: jax.Array,
        ring: bool,
        virtual: jax.Array | None = None,
    ) -> LayerCache:
        """As Attention's."""
        vector, key = self.latents(x, angles)
        cache = cache_lib.write(cache, "latent", vector, slot, ring=ring)
        return cache_lib.write(cache, "rope_key", key, slot, ring=ring)

    def recall(
        self,
        x: jax.Array,
        cache: LayerCache,
        angles: Angles | None,
        visible: jax.Array,
        bias: jax.Array | None,
    ) -> jax.Array:
        """As Attention's; all heads share the cache's vectors, as keys and as values."""
        c = self.config
        plain, turned = self.queries(x, angles)
        key_up = self.key_up.kernel.astype(plain.dtype)  # [rank, heads, nope_dim]
        absorbed = jnp.einsum("bqhd,rhd->bqhr", plain, key_up, precision=c.precision)
        vector, key = (cache_lib.read(cache, name, plain.dtype) for name in ("latent", "rope_key"))
        context = cached_attention(
            jnp.concatenate([absorbed, turned], axis=-1),
            jnp.concatenate([vector, key], axis=-1),
            vector,
            visible,
            bias=bias,
            scale=c.query_scale,
            precision=c.precision,
        )  # [batch, queries, heads, rank]
        value_up = self.value_up.kernel.astype(context.dtype)  # [rank, heads, value_dim]
        context = jnp.einsum("bqhr,rhv->bqhv", context, value_up, precision=c.precision)
        return self.output(context)


def attention_layer(
    config: TransformerConfig, window: int | None, global_tokens: int = 0
) -> Attention | LatentAttentionLayer:
    """A layer's self-attention."""
    return (Attention if config.latent is None else LatentAttentionLayer)(config, window, global_tokens)
