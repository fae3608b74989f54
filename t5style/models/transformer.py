"""The Transformer: encoder-decoder and decoder-only models of every family."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.models.attention_layers import Angles, init_of, norm
from t5style.models.config import LayerKind, TransformerConfig
from t5style.models.encoder_heads import EncoderHeads
from t5style.models.layers import Layer, relative_bias
from t5style.nn import platform
from t5style.nn.cache import LayerCache, slots_of
from t5style.nn.parameter import Named, is_named, named, unbox
from t5style.nn.positions import rotary_angles
from t5style.nn.projection import Projection, project, project_int8
from t5style.nn.stack import run_layers, unstack
from t5style.parallel.rules import constrain

Cache = dict[str, Any]


class Stack(nn.Module):
    """The layers of an encoder or a decoder, their shared relative bias, and the norm after them.

    The parameters of layers that have the same are one tree of arrays `[layers, ...]`, whether they are
    scanned or unrolled: `layers`, and `moe_layers` for those with experts. For decoding they may be given as
    tuples of one tree per layer (models/params.unstack_layers), which saves slicing them at every step.
    """

    config: TransformerConfig
    side: str  # 'encoder' or 'decoder'

    def setup(self) -> None:
        c = self.config
        self.causal = self.side == "decoder"
        self.cross = self.causal and c.encoder_layers > 0
        kinds = c.layers_of(self.side)
        self.order = tuple(("moe_layers" if kind.experts else "layers", kind) for kind in kinds)
        if c.positions == "relative_bias" and not c.relative_bias_per_layer:
            self.relative_bias = relative_bias(c, self.causal)
        groups = dict.fromkeys(name for name, _ in self.order)
        # Given ones may be stacked or tuples, so not through param's check of the shape.
        self.groups = {
            name: self.get_variable("params", name)
            if self.has_variable("params", name)
            else unbox(self.param(name, functools.partial(self._init_layers, name)))
            for name in groups
        }
        if c.final_norm:
            self.final_norm = norm(c)
        self.dropout = nn.Dropout(c.dropout)

    def _layer(self, kind: LayerKind) -> Layer:
        return Layer(self.config, kind, causal=self.causal, cross=self.cross, parent=None)

    def _init_layers(self, name: str, key: jax.Array) -> Any:
        kinds = [kind for group, kind in self.order if group == name]
        x = jnp.zeros((1, 1, self.config.d_model), jnp.float32)
        encoded = x if self.cross else None
        angles = self._angles(jnp.zeros((1, 1), jnp.int32))

        def init(key: jax.Array) -> Any:
            return self._layer(kinds[0]).init(key, x, angles=angles, encoded=encoded)["params"]

        stacked = jax.vmap(init)(jax.random.split(key, len(kinds)))
        return jax.tree.map(lambda box: Named(box.value, ("layers", *box.names)), stacked, is_leaf=is_named)

    def _angles(self, positions: jax.Array) -> dict[str, Angles] | None:
        """Rotary angles by kind of attention, each made once."""
        c = self.config
        if c.positions != "rope":
            return None
        # Latent attention rotates a part of its own, which is handed to it without the rest.
        width, fraction = (c.heads_width, c.rope_fraction) if c.latent is None else (c.latent.rope_dim, 1.0)
        made = {}
        kinds = {kind.attention for _, kind in self.order}
        if kinds & ({"full"} if c.rope_local_theta else {"full", "window"}):
            made["full"] = rotary_angles(positions, width, c.rope_theta, c.rope_scaling, fraction)
        if "window" in kinds:
            made["window"] = (
                rotary_angles(positions, width, c.rope_local_theta, None, fraction)
                if c.rope_local_theta
                else made["full"]
            )
        return made

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
        bias = None
        if c.positions == "relative_bias" and not c.relative_bias_per_layer:
            bias = self.relative_bias.between(length, length)
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

        def layer(
            params: Any, state: tuple[jax.Array, Any], key: jax.Array | None, kind: LayerKind
        ) -> tuple[jax.Array, Any]:
            x, shared = state
            rngs = None if key is None else {"dropout": key}
            return self._layer(kind).apply(
                {"params": params}, x, **shared, deterministic=deterministic, rngs=rngs
            ), shared

        keys = None
        if c.dropout and not deterministic:
            x = self.dropout(x, deterministic=False)
            keys = jax.random.split(self.make_rng("dropout"), len(self.order))
        x, _ = run_layers(
            layer,
            dict(self.groups),
            (x, shared),
            order=self.order,
            keys=keys,
            policy=c.remat,
            scan=platform.scan_layers(remat=c.remat != "none") if c.scan_layers is None else c.scan_layers,
        )
        return self.dropout(self._normalised(x), deterministic=deterministic)

    def _normalised(self, x: jax.Array) -> jax.Array:
        return self.final_norm(x) if self.config.final_norm else x

    def _each(self) -> Iterator[tuple[Layer, Any]]:
        """Each layer and its parameters."""
        groups = {
            name: iter(group if isinstance(group, tuple) else unstack(group))
            for name, group in self.groups.items()
        }
        for name, kind in self.order:
            yield self._layer(kind), {"params": next(groups[name])}

    def cross_cache(self, encoded: jax.Array, dtype: str) -> tuple[LayerCache, ...]:
        """Per layer, keys and values of the encoder's output."""
        return tuple(
            layer.apply(params, encoded=encoded, dtype=dtype, method="cross_keys_values")
            for layer, params in self._each()
        )

    def step(
        self,
        x: jax.Array,
        layers: tuple[LayerCache, ...],
        *,
        slot: jax.Array,
        positions: jax.Array,
        slot_positions: jax.Array,
        slots_valid: jax.Array,
        valid: jax.Array,
        encoder_visible: jax.Array | None,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """All layers on new tokens `[batch, tokens, embed]`, unrolled: caches are updated in place.

        Args:
          layers: each layer's cache.
          slot: of the first new token.
          positions: int32 `[batch, tokens]`.
          slot_positions, slots_valid: `[batch, slots]`, of all tokens with the new ones.
          valid: bool `[batch, tokens]`.
          encoder_visible: bool `[batch, 1, encoder length]`.
        """
        c = self.config
        bias, distances = None, None
        if c.positions == "relative_bias":
            distances = (positions, slot_positions)
            if not c.relative_bias_per_layer:
                bias = self.relative_bias.at(*distances)  # [batch, heads, tokens, slots]
        slots = slots_valid.shape[1]

        @functools.cache
        def visible(window: bool, size: int) -> jax.Array:
            """Bool `[batch, tokens, size]`: a token sees real ones up to its own, or those of its window."""
            held = slots_of(size, slot + x.shape[1] - 1)  # which slot each entry holds
            place = jnp.maximum(held, 0)
            seen = (slots_valid[:, place] & (held >= 0))[:, None, :]
            seen = seen & (held <= slot + jnp.arange(x.shape[1])[:, None])  # [batch, tokens, size]
            if window and c.window is not None:
                seen = seen & (positions[:, :, None] - slot_positions[:, None, place] < c.window)
            return seen

        angles = self._angles(positions)
        updated = []
        for (layer, params), cache, (_, kind) in zip(self._each(), layers, self.order, strict=True):
            own = next(entry for name, entry in cache.items() if not name.startswith("cross_"))
            size = own.shape[2]
            x, cache = layer.apply(
                params,
                x,
                cache,
                slot=slot,
                ring=size < slots,
                angles=angles,
                bias=bias,
                distances=distances,
                visible=visible(kind.attention == "window", size),
                encoder_visible=encoder_visible,
                real=valid,
                method="step",
            )
            updated.append(cache)
        return self._normalised(x), tuple(updated)


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
        if c.positions == "learned":
            self.position_embedding = self._table("length", c.context_length)
        if c.token_types:
            self.token_type_embedding = self._table("token_types", c.token_types)
        if c.embedding_norm:
            self.embedding_norm = norm(c)
        if c.encoder_layers:
            self.encoder = Stack(c, "encoder")
        if c.pooler or c.classes or c.masked_head:
            self.heads = EncoderHeads(c)
        if c.decoder_layers:
            self.decoder = Stack(c, "decoder")
            if not c.tie_embeddings:
                self.head = Projection(
                    (c.d_model,),
                    (c.vocab_size,),
                    ("embed", "vocab"),
                    init_of(c, "head"),
                    param_dtype=c.param_dtype,
                    precision=c.precision,
                    out_dtype="float32",
                    bias=c.head_bias,
                )

    @property
    def _embedding_scale(self) -> jax.Array:
        """Of an int8 embedding, f32 `[vocab]`."""
        return self.get_variable("params", "embedding_scale")

    def _table(self, name: str, rows: int | None) -> jax.Array:
        c = self.config
        which = {"length": "position_embedding", "token_types": "token_type_embedding"}[name]
        return self.param(
            which,
            named(init_of(c, "embedding"), (name, "embed")),
            (rows, c.d_model),
            jnp.dtype(c.param_dtype),
        )

    def _embed(
        self, tokens: jax.Array, positions: jax.Array | None, token_types: jax.Array | None = None
    ) -> jax.Array:
        """int32 `[batch, length]` of each -> `[batch, length, embed]`."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = jnp.take(self.embedding, tokens, axis=0, mode="clip").astype(dtype)
        if self.embedding.dtype == jnp.int8:
            scale = jnp.take(self._embedding_scale, tokens, axis=0, mode="clip")
            x = x * scale[..., None].astype(dtype)
        if c.scale_embeddings:
            x = x * jnp.asarray(c.d_model**0.5, dtype)
        if c.token_types:
            types = jnp.zeros_like(tokens) if token_types is None else token_types
            x = x + jnp.take(self.token_type_embedding, types, axis=0, mode="clip").astype(dtype)
        elif token_types is not None:
            raise ValueError("this model has no token types (token_types = 0)")
        if c.positions == "learned":
            places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None] if positions is None else positions
            x = x + jnp.take(self.position_embedding, places, axis=0, mode="clip").astype(dtype)
        if c.embedding_norm:
            x = self.embedding_norm(x)
        return constrain(x, ("batch", "length", "embed"))

    def encode(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        token_types: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """The encoder's output, `[batch, length, embed]`; token_types: int32 `[batch, length]`, None: 0."""
        if not self.config.encoder_layers:
            raise ValueError("this model is decoder-only (encoder_layers = 0): it has no encoder to run")
        x = self._embed(tokens, positions, token_types)
        return self.encoder(x, positions=positions, segments=segment_ids, deterministic=deterministic)

    def encoder_outputs(self, tokens: jax.Array, **kwargs: Any) -> dict[str, jax.Array]:
        """'encoded', what encode gives for these arguments, and what the heads of an encoder-only model make
        of it (models/encoder_heads.py).
        """
        encoded = self.encode(tokens, **kwargs)
        c = self.config
        heads = self.heads(encoded, self.embedding) if c.pooler or c.classes or c.masked_head else {}
        return {"encoded": encoded} | heads

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
        if not self.config.decoder_layers:
            raise ValueError("this model is encoder-only (decoder_layers = 0): use encode")
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
            self._embed(decoder_input_tokens, decoder_positions),
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
        if c.tie_embeddings and self.embedding.dtype == jnp.int8:
            logits = project_int8(
                hidden, self.embedding, self._embedding_scale, out_dtype=jnp.float32, transposed=True
            )
        elif c.tie_embeddings:
            logits = project(hidden, self.embedding.T, precision=c.precision, out_dtype=jnp.float32)
        else:
            logits = self.head(hidden)
        if c.logits_softcap is not None:
            logits = c.logits_softcap * jnp.tanh(logits / c.logits_softcap)
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

    def cross_cache(self, encoded: jax.Array, dtype: str) -> tuple[LayerCache, ...]:
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
        encoder_valid = cache.get("encoder_valid")
        hidden, layers = self.decoder.step(
            self._embed(tokens, positions),
            cache["layers"],
            slot=slot,
            positions=positions,
            slot_positions=slot_positions,
            slots_valid=slots_valid,
            valid=valid,
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
