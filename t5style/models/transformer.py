"""The Transformer: encoder-decoder and decoder-only models of every family."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.models.attention_layers import init_of, norm
from t5style.models.config import TransformerConfig
from t5style.models.encoder_heads import EncoderHeads
from t5style.models.layer_stack import Stack
from t5style.nn.cache import LayerCache
from t5style.nn.embedding import lookup
from t5style.nn.moe import RouterStats
from t5style.nn.parameter import named
from t5style.nn.projection import Projection, project, project_int8
from t5style.parallel.rules import constrain

Cache = dict[str, Any]


class Transformer(nn.Module):
    """The model: `Transformer(config).apply({'params': params}, ...)`; params: models/params.py.

    Tokens are int32 `[batch, length]`. Segment ids are int32 of the same shape: 0 is padding, equal positive
    ids belong together (packed examples), None means that every token is real. Positions matter to rotary
    embeddings only; the relative bias goes by the distance in the row, which within a segment is the same. An
    id outside the vocabulary is clipped to it, since a compiled program cannot raise; preflight checks the
    data. To prompt and prefix tuning, ids from vocab_size on are virtual tokens (models/adapters_virtual.py).
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

    def _virtual(self, tokens: jax.Array) -> jax.Array:
        """The numbers of virtual tokens, which are ids beyond the vocabulary; negative for others."""
        return tokens - self.config.vocab_size

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
        self,
        tokens: jax.Array,
        positions: jax.Array | None,
        token_types: jax.Array | None = None,
        segments: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """int32 `[batch, length]` of each -> `[batch, length, embed]`; with noise unless deterministic."""
        c = self.config
        dtype = jnp.dtype(c.dtype)
        x = lookup(self.embedding, tokens, dtype)
        if self.embedding.dtype == jnp.int8:
            scale = jnp.take(self._embedding_scale, tokens, axis=0, mode="clip")
            x = x * scale[..., None].astype(dtype)
        if self.has_variable("params", "prompt_embedding"):  # models/adapters_virtual.py
            virtual = self._virtual(tokens)
            learned = jnp.take(self.get_variable("params", "prompt_embedding"), virtual, axis=0, mode="clip")
            x = jnp.where((virtual >= 0)[..., None], learned.astype(dtype), x)
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
        if c.embedding_noise and not deterministic:
            x = x + self._noise(x, segments)
        return constrain(x, ("rows", "length", "embed"))

    def _noise(self, x: jax.Array, segments: jax.Array | None) -> jax.Array:
        """NEFTune's, like x `[batch, length, embed]` (Jain et al. 2023, algorithm 1)."""
        segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments
        examples = jnp.maximum(segments.max(axis=1), 1)  # [batch]
        length = (segments > 0).sum(axis=1) / examples
        most = self.config.embedding_noise / jnp.sqrt(jnp.maximum(length, 1) * x.shape[-1])
        noise = jax.random.uniform(self.make_rng("dropout"), x.shape, minval=-1.0, maxval=1.0)
        return (noise * most[:, None, None]).astype(x.dtype)

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
        return self._encode(tokens, segment_ids, positions, deterministic, token_types)[0]

    def _encode(
        self,
        tokens: jax.Array,
        segments: jax.Array | None,
        positions: jax.Array | None,
        deterministic: bool,
        token_types: jax.Array | None = None,
        stats: bool = False,
    ) -> tuple[jax.Array, RouterStats | None]:
        if not self.config.encoder_layers:
            raise ValueError("this model is decoder-only (encoder_layers = 0): it has no encoder to run")
        x = self._embed(tokens, positions, token_types, segments, deterministic)
        return self.encoder(
            x,
            positions=positions,
            segments=segments,
            virtual=self._virtual(tokens),
            deterministic=deterministic,
            stats=stats,
        )

    def encoder_outputs(self, tokens: jax.Array, **kwargs: Any) -> dict[str, jax.Array]:
        """'encoded', what encode gives for these arguments, and what the heads of an encoder-only model make
        of it (models/encoder_heads.py).
        """
        encoded = self.encode(tokens, **kwargs)
        c = self.config
        heads = self.heads(encoded, self.embedding) if c.pooler or c.classes or c.masked_head else {}
        return {"encoded": encoded} | heads

    def hidden(self, *tokens: jax.Array | None, **kwargs: Any) -> jax.Array:
        """The decoder's output before the head, `[batch, length, embed]`; arguments as for the call."""
        return self.hidden_and_routers(*tokens, **kwargs, stats=False)[0]  # type: ignore[arg-type]

    def hidden_and_routers(
        self,
        decoder_input_tokens: jax.Array,
        encoder_input_tokens: jax.Array | None = None,
        *,
        decoder_positions: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        encoder_positions: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
        deterministic: bool = True,
        stats: bool = True,
    ) -> tuple[jax.Array, dict[str, RouterStats]]:
        """As hidden, and by side the statistics of its routers, `[layers with experts, ...]`: of 'encoder'
        and 'decoder' those that have experts, none without stats.
        """
        routers, encoded = {}, None
        if not self.config.decoder_layers:
            raise ValueError("this model is encoder-only (decoder_layers = 0): use encode")
        if self.config.encoder_layers:
            if encoder_input_tokens is None:
                raise ValueError("an encoder-decoder model needs encoder_input_tokens")
            encoded, routers["encoder"] = self._encode(
                encoder_input_tokens, encoder_segment_ids, encoder_positions, deterministic, stats=stats
            )
        elif encoder_input_tokens is not None:
            raise ValueError(
                "this model is decoder-only (encoder_layers = 0): it takes no encoder_input_tokens"
            )
        hidden, routers["decoder"] = self.decoder(
            self._embed(
                decoder_input_tokens,
                decoder_positions,
                segments=decoder_segment_ids,
                deterministic=deterministic,
            ),
            positions=decoder_positions,
            segments=decoder_segment_ids,
            encoded=encoded,
            encoded_segments=encoder_segment_ids,
            virtual=self._virtual(decoder_input_tokens),
            deterministic=deterministic,
            stats=stats,
        )
        return hidden, {side: router for side, router in routers.items() if router is not None}

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
            return constrain(logits, ("rows", "vocab"))
        return constrain(logits, ("rows", "length", "vocab")) if logits.ndim == 3 else logits

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
            virtual=self._virtual(tokens),
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
