"""The stack of layers of an encoder or a decoder."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.models.attention_layers import Angles, norm
from t5style.models.config import LayerKind, TransformerConfig
from t5style.models.layers import Layer, relative_bias, self_attention_bias
from t5style.nn import platform
from t5style.nn.attention_sparse import chunk_segments
from t5style.nn.cache import LayerCache, slots_of
from t5style.nn.moe import RouterStats
from t5style.nn.parameter import Named, is_named, unbox
from t5style.nn.pipeline import run_stack
from t5style.nn.positions import rotary_angles
from t5style.nn.stack import unstack
from t5style.parallel.rules import path_name


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
        if kinds & ({"full", "chunk"} if c.rope_local_theta else {"full", "chunk", "window"}):
            made["full"] = rotary_angles(positions, width, c.rope_theta, c.rope_scaling, fraction)
            made["chunk"] = made["full"]
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
        virtual: jax.Array | None = None,
        deterministic: bool = True,
        stats: bool = False,
    ) -> tuple[jax.Array, RouterStats | None]:
        """`[batch, length, embed] -> [batch, length, embed]`, normalised.

        virtual: int32 `[batch, length]`, the numbers of virtual tokens, negative where there are none.

        Also the routers' statistics `[layers with experts, ...]`, if stats asks for them and there are any.
        """
        c = self.config
        length = x.shape[1]
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        bias = None
        if c.positions == "relative_bias" and not c.relative_bias_per_layer:
            bias = self_attention_bias(c, self.relative_bias, x)
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
            "chunks": None,
            "encoded": encoded,
            "encoded_segments": encoded_segments,
            "virtual": virtual if self._holds("prefix_key") else None,
        }
        if c.window is not None and "chunk" in {kind.attention for _, kind in self.order}:
            chunks = chunk_segments(segments, positions, c.window)
            shared["chunks"] = jnp.broadcast_to(chunks, x.shape[:2])

        def layer(
            params: Any, x: jax.Array, shared: dict[str, Any], key: jax.Array | None, kind: LayerKind
        ) -> tuple[jax.Array, RouterStats | None]:
            rngs = None if key is None else {"dropout": key}
            return self._layer(kind).apply(
                {"params": params}, x, **shared, deterministic=deterministic, stats=stats, rngs=rngs
            )

        keys = None
        if c.dropout and not deterministic:
            x = self.dropout(x, deterministic=False)
        if (c.dropout and not deterministic) or (self.has_rng("dropout") and self._holds("lora_dropout")):
            keys = jax.random.split(self.make_rng("dropout"), len(self.order))
        x, routers = run_stack(
            layer,
            dict(self.groups),
            x,
            shared,
            order=self.order,
            keys=keys,
            policy=c.remat,
            scan=platform.scan_layers(remat=c.remat != "none") if c.scan_layers is None else c.scan_layers,
            pipeline=c.pipeline,
        )
        x = self.dropout(self._normalised(x), deterministic=deterministic)
        router = routers.get("moe_layers")  # sums by row: [layers, batch, ...]
        return x, jax.tree.map(lambda leaf: leaf.sum(axis=1), router)

    def _holds(self, name: str) -> bool:
        """Whether an adapter has put parameters of this name into a layer."""
        paths = jax.tree_util.tree_leaves_with_path(self.groups)
        return any(path_name(path).endswith(f"/{name}") for path, _ in paths)

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
        virtual: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """All layers on new tokens `[batch, tokens, embed]`, unrolled: caches are updated in place.

        Args:
          layers: each layer's cache.
          slot: of the first new token.
          positions: int32 `[batch, tokens]`.
          slot_positions, slots_valid: `[batch, slots]`, of all tokens with the new ones.
          valid: bool `[batch, tokens]`.
          encoder_visible: bool `[batch, 1, encoder length]`.
          virtual: as for the call, of the new tokens.
        """
        c = self.config
        bias, distances = None, None
        if c.positions == "relative_bias":
            distances = (positions, slot_positions)
            if not c.relative_bias_per_layer:
                bias = self.relative_bias.at(*distances)  # [batch, heads, tokens, slots]
        slots = slots_valid.shape[1]

        @functools.cache
        def visible(kind: str, size: int) -> jax.Array:
            """Bool `[batch, tokens, size]`: a token sees real ones up to its own, or those of its window or
            chunk.
            """
            held = slots_of(size, slot + x.shape[1] - 1)  # which slot each entry holds
            place = jnp.maximum(held, 0)
            seen = (slots_valid[:, place] & (held >= 0))[:, None, :]
            seen = seen & (held <= slot + jnp.arange(x.shape[1])[:, None])  # [batch, tokens, size]
            own, other = positions[:, :, None], slot_positions[:, None, place]
            if kind == "window" and c.window is not None:
                seen = seen & ((own - other < c.window) | (other < c.global_tokens))
            if kind == "chunk" and c.window is not None:
                seen = seen & (own // c.window == other // c.window)
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
                visible=visible(kind.attention, size),
                encoder_visible=encoder_visible,
                real=valid,
                virtual=virtual,
                method="step",
            )
            updated.append(cache)
        return self._normalised(x), tuple(updated)
