"""The Transformer: encoder-decoder and decoder-only models of every family."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.models.config import TransformerConfig
from t5style.models.layers import Layer, LayerCache, init_of
from t5style.nn import platform
from t5style.nn.norm import RMSNorm
from t5style.nn.parameter import Named, is_named, named, unbox
from t5style.nn.positions import RelativeBias, rotary_angles
from t5style.nn.projection import Projection, project
from t5style.nn.stack import run_layers, unstack
from t5style.parallel.rules import constrain

Cache = dict[str, Any]


class Stack(nn.Module):
    """The layers of an encoder or a decoder, their shared relative bias, and the norm after them.

    The layers' parameters are one tree of arrays `[layers, ...]`, whether they are scanned or unrolled. For
    decoding they may be given as a tuple of one tree per layer (models/params.unstack_layers), which saves
    slicing them at every step.
    """

    config: TransformerConfig
    layers_count: int
    causal: bool
    cross: bool

    def setup(self) -> None:
        c = self.config
        if c.positions == "relative_bias":
            self.relative_bias = RelativeBias(
                c.num_heads,
                c.relative_buckets,
                c.relative_max_distance,
                bidirectional=not self.causal,
                initializer=init_of(c, "relative_bias"),
                param_dtype=c.param_dtype,
            )
        if self.has_variable(
            "params", "layers"
        ):  # may be stacked or a tuple, so not through param's shape check
            self.layers = self.get_variable("params", "layers")
        else:
            self.layers = unbox(self.param("layers", self._init_layers))
        self.final_norm = RMSNorm(c.norm_eps, c.param_dtype)
        self.dropout = nn.Dropout(c.dropout)

    @property
    def _layer(self) -> Layer:
        return Layer(self.config, causal=self.causal, cross=self.cross, parent=None)

    def _init_layers(self, key: jax.Array) -> Any:
        x = jnp.zeros((1, 1, self.config.d_model), jnp.float32)
        encoded = x if self.cross else None

        def init(key: jax.Array) -> Any:
            return self._layer.init(
                key, x, angles=self._angles(jnp.zeros((1, 1), jnp.int32)), encoded=encoded
            )["params"]

        stacked = jax.vmap(init)(jax.random.split(key, self.layers_count))
        return jax.tree.map(lambda box: Named(box.value, ("layers", *box.names)), stacked, is_leaf=is_named)

    def _angles(self, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        if self.config.positions != "rope":
            return None
        return rotary_angles(positions, self.config.heads_width, self.config.rope_theta)

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None,
        segments: jax.Array | None,
        encoded: jax.Array | None = None,
        encoded_segments: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """`[batch, length, embed] -> [batch, length, embed]`, normalised."""
        c = self.config
        length = x.shape[1]
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        bias = self.relative_bias.between(length, length) if c.positions == "relative_bias" else None
        if encoded is not None and (segments is None) != (encoded_segments is None):
            # One side has no padding: it is all segment 1, which is what an unpacked batch calls its tokens.
            segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
            encoded_segments = (
                jnp.ones(encoded.shape[:2], jnp.int32) if encoded_segments is None else encoded_segments
            )
        shared = {
            "angles": self._angles(positions),
            "bias": bias,
            "segments": segments,
            "encoded": encoded,
            "encoded_segments": encoded_segments,
        }
        module = self._layer

        def layer(params: Any, state: tuple[jax.Array, Any], key: jax.Array | None) -> tuple[jax.Array, Any]:
            x, shared = state
            rngs = None if key is None else {"dropout": key}
            return module.apply(
                {"params": params}, x, **shared, deterministic=deterministic, rngs=rngs
            ), shared

        keys = None
        if c.dropout and not deterministic:
            x = self.dropout(x, deterministic=False)
            keys = jax.random.split(self.make_rng("dropout"), self.layers_count)
        x, _ = run_layers(
            layer,
            self.layers,
            (x, shared),
            layers=self.layers_count,
            keys=keys,
            policy=c.remat,
            scan=platform.scan_layers(remat=c.remat != "none") if c.scan_layers is None else c.scan_layers,
        )
        return self.dropout(self.final_norm(x), deterministic=deterministic)

    def _each(self) -> tuple[Any, ...]:
        return self.layers if isinstance(self.layers, tuple) else unstack(self.layers, self.layers_count)

    def cross_cache(self, encoded: jax.Array, dtype: Any) -> tuple[LayerCache, ...]:
        """Per layer, keys and values of the encoder's output."""
        method = functools.partial(
            self._layer.apply, encoded=encoded, dtype=dtype, method="cross_keys_values"
        )
        return tuple(method({"params": params}) for params in self._each())

    def step(
        self,
        x: jax.Array,
        layers: tuple[LayerCache, ...],
        *,
        slot: jax.Array,
        positions: jax.Array,
        slot_positions: jax.Array,
        visible: jax.Array,
        encoder_visible: jax.Array | None,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """All layers on new tokens `[batch, tokens, embed]`, unrolled: caches are updated in place."""
        bias = None
        if self.config.positions == "relative_bias":
            bias = self.relative_bias.at(positions, slot_positions)  # [batch, heads, tokens, slots]
        step = functools.partial(
            self._layer.apply,
            slot=slot,
            angles=self._angles(positions),
            bias=bias,
            visible=visible,
            encoder_visible=encoder_visible,
            method="step",
        )
        updated = []
        for params, cache in zip(self._each(), layers, strict=True):
            x, cache = step({"params": params}, x, cache)
            updated.append(cache)
        return self.final_norm(x), tuple(updated)


class Transformer(nn.Module):
    """The model: `Transformer(config).apply({'params': params}, ...)`; params: models/params.py.

    Tokens are int32 `[batch, length]`. Segment ids are int32 of the same shape: 0 is padding, equal positive
    ids belong together (packed examples), None means that every token is real. Positions matter to rotary
    embeddings only; the relative bias goes by the distance in the row, which within a segment is the same. An
    id outside the vocabulary is clipped to it, since a compiled program cannot raise; preflight checks the
    data.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.embedding = self.param(
            "embedding",
            named(init_of(c, "embedding"), ("vocab", "embed")),
            (c.vocab_size, c.d_model),
            jnp.dtype(c.param_dtype),
        )
        if c.encoder_layers:
            self.encoder = Stack(c, c.encoder_layers, causal=False, cross=False)
        self.decoder = Stack(c, c.decoder_layers, causal=True, cross=c.encoder_layers > 0)
        if not c.tie_embeddings:
            self.head = Projection(
                (c.d_model,),
                (c.vocab_size,),
                ("embed", "vocab"),
                init_of(c, "head"),
                param_dtype=c.param_dtype,
                precision=c.precision,
                out_dtype="float32",
            )

    def _embed(self, tokens: jax.Array) -> jax.Array:
        x = jnp.take(self.embedding, tokens, axis=0, mode="clip").astype(jnp.dtype(self.config.dtype))
        return constrain(x, ("batch", "length", "embed"))

    def encode(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The encoder's output, `[batch, length, embed]`."""
        if not self.config.encoder_layers:
            raise ValueError("this model is decoder-only (encoder_layers = 0): it has no encoder to run")
        return self.encoder(
            self._embed(tokens), positions=positions, segments=segment_ids, deterministic=deterministic
        )

    def hidden(
        self,
        decoder_input_tokens: jax.Array,
        encoder_input_tokens: jax.Array | None = None,
        *,
        decoder_positions: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The decoder's output before the head, `[batch, length, embed]`; arguments as for the call."""
        encoded = None
        if self.config.encoder_layers:
            if encoder_input_tokens is None:
                raise ValueError("an encoder-decoder model needs encoder_input_tokens")
            encoded = self.encode(
                encoder_input_tokens,
                segment_ids=encoder_segment_ids,
                positions=encoder_positions,
                deterministic=deterministic,
            )
        elif encoder_input_tokens is not None:
            raise ValueError(
                "this model is decoder-only (encoder_layers = 0): it takes no encoder_input_tokens"
            )
        return self.decoder(
            self._embed(decoder_input_tokens),
            positions=decoder_positions,
            segments=decoder_segment_ids,
            encoded=encoded,
            encoded_segments=encoder_segment_ids,
            deterministic=deterministic,
        )

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., embed] -> [..., vocab]`, float32."""
        c = self.config
        if c.scale_logits:
            hidden = hidden * jnp.asarray(c.d_model**-0.5, hidden.dtype)
        if c.tie_embeddings:
            logits = project(hidden, self.embedding.T, precision=c.precision, out_dtype=jnp.float32)
        else:
            logits = self.head(hidden)
        if (
            logits.ndim == 2
        ):  # [batch * length, vocab]: the loss flattens rows, which lie where the batch lies
            return constrain(logits, ("batch", "vocab"))
        return constrain(logits, ("batch", "length", "vocab")) if logits.ndim == 3 else logits

    def __call__(
        self,
        decoder_input_tokens: jax.Array,
        encoder_input_tokens: jax.Array | None = None,
        *,
        decoder_positions: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Logits, float32 `[batch, length, vocab]`.

        Args:
          decoder_input_tokens: int32 `[batch, length]`.
          encoder_input_tokens: int32 `[batch, encoder length]`, for an encoder-decoder model only.
          decoder_positions, encoder_positions: int32, of the rotary embeddings; None counts from 0 along the
            row.
          decoder_segment_ids, encoder_segment_ids: int32, 0 for padding; None: every token is real.
          deterministic: no dropout; otherwise `rngs={'dropout': key}` is needed if config.dropout > 0.
        """
        hidden = self.hidden(
            decoder_input_tokens,
            encoder_input_tokens,
            decoder_positions=decoder_positions,
            decoder_segment_ids=decoder_segment_ids,
            encoder_positions=encoder_positions,
            encoder_segment_ids=encoder_segment_ids,
            deterministic=deterministic,
        )
        return self.logits(hidden)

    # --- decoding with a cache (models/cache.py makes it and says what is in it) ---

    def cross_cache(self, encoded: jax.Array, dtype: Any) -> tuple[LayerCache, ...]:
        """Cross-attention's keys and values of every decoder layer, for models/cache.init_cache."""
        return self.decoder.cross_cache(encoded, dtype)

    def decode_hidden(
        self,
        tokens: jax.Array,
        cache: Cache,
        *,
        valid: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """As decode, but returns the hidden states `[batch, tokens, embed]` before the head."""
        batch, count = tokens.shape
        valid = jnp.ones((batch, count), bool) if valid is None else valid.astype(bool)
        if positions is None:
            positions = cache["length"][:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
            positions = jnp.maximum(positions, 0)
        slot, start = cache["slot"], (0, cache["slot"])
        slots_valid = jax.lax.dynamic_update_slice(cache["valid"], valid, start)
        slot_positions = jax.lax.dynamic_update_slice(cache["positions"], positions.astype(jnp.int32), start)
        # A token sees the slots up to its own that hold real tokens.
        earlier = jnp.arange(slots_valid.shape[1]) <= slot + jnp.arange(count)[:, None]  # [tokens, slots]
        visible = slots_valid[:, None, :] & earlier  # [batch, tokens, slots]
        encoder_valid = cache.get("encoder_valid")
        hidden, layers = self.decoder.step(
            self._embed(tokens),
            cache["layers"],
            slot=slot,
            positions=positions,
            slot_positions=slot_positions,
            visible=visible,
            encoder_visible=None if encoder_valid is None else encoder_valid[:, None, :],
        )
        updated = cache | {
            "layers": layers,
            "valid": slots_valid,
            "positions": slot_positions,
            "slot": slot + count,
            "length": cache["length"] + valid.sum(axis=1, dtype=jnp.int32),
        }
        return hidden, updated

    def decode(
        self,
        tokens: jax.Array,
        cache: Cache,
        *,
        valid: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Logits of new tokens given what the cache holds, and the cache with them added.

        One function for a prompt of many tokens and for single steps. The tokens take the cache's next
        `count` slots in every row, so the caller keeps the sum of all counts within the cache's max_length.

        Args:
          tokens: int32 `[batch, count]`.
          cache: from models/cache.init_cache or an earlier call.
          valid: `[batch, count]`, 0 for padding, which may stand anywhere (prompts of different lengths,
            padded on either side); such tokens are never seen and do not advance the row's positions. None:
            all real.
          positions: int32 `[batch, count]`; None continues each row's count of real tokens.

        Returns:
          float32 logits `[batch, count, vocab]` (unspecified for padding), and the new cache.
        """
        hidden, cache = self.decode_hidden(tokens, cache, valid=valid, positions=positions)
        return self.logits(hidden), cache
