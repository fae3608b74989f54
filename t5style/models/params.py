"""Parameters as plain nested dicts of arrays: their shapes, names, initial values and counts."""

from typing import Any

import jax
import jax.numpy as jnp

from t5style.models.config import TransformerConfig
from t5style.models.transformer import Transformer
from t5style.nn.parameter import is_named, unbox
from t5style.nn.stack import unstack


def _boxed(config: TransformerConfig, key: jax.Array) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)
    encoder_tokens = tokens if config.encoder_layers else None
    # Scanned, whatever the config says: unrolling 32 layers here traces for seconds, and the parameters are
    # the same.
    return Transformer(config.replace(scan_layers=True)).init(key, tokens, encoder_tokens)["params"]


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


def unstack_layers(config: TransformerConfig, params: Any) -> Any:
    """The parameters with each stack's layers as a tuple of one tree per layer, for decoding loops.

    A loop that reads one layer of a stacked array may copy that layer at every step; of separate arrays it
    does not.
    """
    stacks = {"encoder": config.encoder_layers, "decoder": config.decoder_layers}
    return params | {
        name: params[name] | {"layers": unstack(params[name]["layers"], layers)}
        for name, layers in stacks.items()
        if layers and not isinstance(params[name]["layers"], tuple)
    }


def flops_per_example(
    config: TransformerConfig, decoder_length: int, encoder_length: int = 0, *, training: bool = True
) -> float:
    """Floating-point operations of the matrix products for one row of a batch.

    Convention (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B): two per multiply-add; forward only, or
    three times that for training (recomputation not counted); the head counts, the embedding's lookup does
    not; norms, softmax and activations do not; causal attention counts half of its scores. Padding counts as
    tokens do.
    """
    heads, width, d, ff = config.num_heads, config.heads_width, config.d_model, config.d_ff
    query_output = 2 * d * heads * width  # weights of the two projections on the side of the queries
    key_value = 2 * d * config.kv_heads * width
    mlp = (len(config.activations) + 1) * d * ff

    def scores(queries: int, keys: int) -> int:
        return 2 * queries * keys * heads * width  # multiply-adds of scores and of weighted values

    encoder = encoder_length * (query_output + key_value + mlp) + scores(encoder_length, encoder_length)
    decoder = decoder_length * (query_output + key_value + mlp) + scores(decoder_length, decoder_length) / 2
    if config.encoder_layers:
        decoder += (
            decoder_length * query_output
            + encoder_length * key_value
            + scores(decoder_length, encoder_length)
        )
    head = decoder_length * d * config.vocab_size
    multiply_adds = config.encoder_layers * encoder + config.decoder_layers * decoder + head
    return float(2 * multiply_adds * (3 if training else 1))


def flops_per_token(
    config: TransformerConfig, decoder_length: int, encoder_length: int = 0, *, training: bool = True
) -> float:
    """flops_per_example divided by the row's tokens, both sides together (6 N + attention in training)."""
    if config.encoder_layers and not encoder_length:
        raise ValueError("the FLOPs of an encoder-decoder depend on encoder_length: give it")
    tokens = decoder_length + (encoder_length if config.encoder_layers else 0)
    return flops_per_example(config, decoder_length, encoder_length, training=training) / tokens
