"""Parameters as plain nested dicts of arrays: their shapes, names, initial values and counts."""

from typing import Any

import jax
import jax.numpy as jnp

from t5style.models.config import LayerKind, TransformerConfig
from t5style.models.transformer import Transformer
from t5style.nn.parameter import is_named, unbox
from t5style.nn.stack import unstack


def _boxed(config: TransformerConfig, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    # Scanned, whatever the config says: unrolling 32 layers here traces for seconds, and the parameters are
    # the same.
    model = Transformer(config.replace(scan_layers=True))
    if not config.decoder_layers:
        return model.init(key, tokens, method="encoder_outputs")["params"]
    return model.init(key, tokens, tokens if config.encoder_layers else None)["params"]


def init_params(config: TransformerConfig, key: jax.Array) -> Any:
    """Initial parameters from a random key; under jit with out_shardings each device makes its part only.

    The values do not depend on the sharding, nor on scan_layers.
    """
    return unbox(_boxed(config, key))


def abstract_params(config: TransformerConfig) -> Any:
    """Shapes and dtypes of the parameters (jax.ShapeDtypeStruct), without making any."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))


def logical_axes(config: TransformerConfig) -> Any:
    """A tree like the parameters' of logical names, as ('layers', 'embed', 'mlp') for a stacked kernel."""
    boxed = jax.eval_shape(lambda key: _boxed(config, key), jax.random.key(0))
    return jax.tree.map(lambda box: box.names, boxed, is_leaf=is_named)


def count_params(config_or_params: Any) -> int:
    """Number of parameters of a config, or of a tree of arrays."""
    tree = config_or_params
    if isinstance(tree, TransformerConfig):
        tree = abstract_params(tree)
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def unstack_layers(params: Any) -> Any:
    """The parameters with each stack's layers as a tuple of one tree per layer, for decoding loops.

    A loop that reads one layer of a stacked array may copy that layer at every step; of separate arrays it
    does not.
    """
    groups = ("layers", "moe_layers")
    return {
        name: {
            inner: unstack(tree) if inner in groups and not isinstance(tree, tuple) else tree
            for inner, tree in part.items()
        }
        if name in ("encoder", "decoder")
        else part
        for name, part in params.items()
    }


def flops_per_example(
    config: TransformerConfig, decoder_length: int, encoder_length: int = 0, *, training: bool = True
) -> float:
    """Floating-point operations of the matrix products for one row of a batch.

    Convention (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B): two per multiply-add; forward only, or
    three times that for training (recomputation not counted); the head counts, the embedding's lookup does
    not; norms, softmax and activations do not; causal attention counts half of its scores, and windows what
    they see; of experts those count that a token chooses. Padding counts as tokens do.
    """
    d = config.d_model

    def stack(side: str, length: int, causal: bool) -> float:
        """Multiply-adds of one stack, cross-attention left out."""
        total = 0.0
        for kind in config.layers_of(side):
            queries, keys, per_score = _attention_weights(config)
            seen: float = length  # keys of the average query
            if kind.attention == "window" and config.window is not None and config.window < length:
                # The first queries see fewer than the window.
                seen = config.window * (1 - (config.window - 1) / (2 * length)) if causal else config.window
                seen += min(config.global_tokens, length - config.window) * (1 if causal else 2)
            elif kind.attention == "chunk" and config.window is not None:
                seen = min(config.window, length) / (2 if causal else 1)
            elif causal:
                seen = length / 2
            total += length * (queries + keys + _mlp_weights(config, kind) + seen * per_score)
        return total

    multiply_adds = stack("encoder", encoder_length, False) + stack("decoder", decoder_length, True)
    if config.encoder_layers and config.decoder_layers:
        queries, keys, per_score = _attention_weights(config)
        multiply_adds += config.decoder_layers * (
            decoder_length * (queries + encoder_length * per_score) + encoder_length * keys
        )
    if config.decoder_layers:
        multiply_adds += decoder_length * d * config.vocab_size
    return float(2 * multiply_adds * (3 if training else 1))


def _attention_weights(config: TransformerConfig) -> tuple[int, int, int]:
    """Multiply-adds per query token, per key token, and per pair of them (its score and weighted value)."""
    d, heads, latent = config.d_model, config.num_heads, config.latent
    if latent is None:
        width = config.heads_width
        return 2 * d * heads * width, 2 * d * config.kv_heads * width, 2 * heads * width
    query = latent.nope_dim + latent.rope_dim
    rank = latent.query_rank
    queries = d * heads * query if rank is None else d * rank + rank * heads * query
    queries += heads * latent.value_dim * d
    keys = d * (latent.key_value_rank + latent.rope_dim)
    keys += latent.key_value_rank * heads * (latent.nope_dim + latent.value_dim)
    return queries, keys, heads * (query + latent.value_dim)


def _mlp_weights(config: TransformerConfig, kind: LayerKind) -> int:
    """Multiply-adds per token; of experts, those that compute it."""
    matrices = len(config.activations) + 1
    if not kind.experts or config.moe is None:
        return matrices * config.d_model * config.d_ff
    moe = config.moe
    gate = config.d_model if moe.shared_gate else 0
    width = moe.per_token * moe.d_ff + moe.shared_d_ff
    return matrices * config.d_model * width + config.d_model * moe.experts + gate


def flops_per_token(
    config: TransformerConfig, decoder_length: int, encoder_length: int = 0, *, training: bool = True
) -> float:
    """flops_per_example divided by the row's tokens, both sides together (6 N + attention in training)."""
    if config.encoder_layers and not encoder_length:
        raise ValueError("the FLOPs of an encoder-decoder depend on encoder_length: give it")
    tokens = decoder_length + (encoder_length if config.encoder_layers else 0)
    return flops_per_example(config, decoder_length, encoder_length, training=training) / tokens
