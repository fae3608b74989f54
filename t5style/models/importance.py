"""How much each head, hidden unit, channel and layer of a model counts, for models/prune.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from t5style.models.config import TransformerConfig
from t5style.models.layers import Layer
from t5style.models.params import logical_axes
from t5style.models.transformer import Transformer
from t5style.nn.norm import Norm
from t5style.nn.projection import Projection
from t5style.parallel.rules import path_name
from t5style.run_dir import UserError

Batch = Mapping[str, Any]

SIDES = ("encoder", "decoder")
GROUPS = ("layers", "moe_layers")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """How much each unit counts; float64, rows of layers in their order.

    Attributes:
      hidden: by side `[layers, d_ff]`; rows of layers with experts are 0.
      heads: by side and block ('attention', 'cross_attention') `[layers, num_heads]`.
      channels: `[d_model]`.
      influence: by side `[layers]`; empty without batches.
    """

    hidden: Mapping[str, np.ndarray]
    heads: Mapping[tuple[str, str], np.ndarray]
    channels: np.ndarray
    influence: Mapping[str, np.ndarray]


def blocks(config: TransformerConfig) -> Iterator[tuple[str, str]]:
    """(side, block) of everything that has heads."""
    for side in SIDES:
        if config.layers_of(side):
            yield side, "attention"
    if config.encoder_layers and config.decoder_layers:
        yield "decoder", "cross_attention"


def numbers_of(config: TransformerConfig, side: str, group: str) -> list[int]:
    """The number in its stack of each layer of a group of parameters."""
    return [i for i, kind in enumerate(config.layers_of(side)) if kind.experts == (group == "moe_layers")]


def leaves_of(config: TransformerConfig, params: Any) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Path, array and logical axes of each parameter."""
    axes = logical_axes(config)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = axes
        for key in keys:
            names = names[key.key]
        yield path_name(keys), leaf, names


def of_weights(config: TransformerConfig, params: Any) -> Statistics:
    """Importance by magnitude: the root of the sum of squares of all weights that would go with a unit. Keys
    and values that several heads share count for each of them in equal parts.
    """
    hidden = {side: np.zeros((len(config.layers_of(side)), config.d_ff)) for side in SIDES}
    heads = {
        (side, block): np.zeros((len(config.layers_of(side)), config.num_heads))
        for side, block in blocks(config)
    }
    channels = np.zeros(config.d_model)
    shared = config.num_heads // config.kv_heads
    for path, leaf, names in leaves_of(config, params):
        squares = np.square(np.asarray(leaf, np.float64))

        def over(*stay: str, squares: np.ndarray = squares, names: tuple[str, ...] = names) -> np.ndarray:
            return squares.sum(axis=tuple(i for i, name in enumerate(names) if name not in stay))

        if "embed" in names and squares.shape[names.index("embed")] == config.d_model:
            channels += over("embed")
        side, group, block, *_ = [*path.split("/"), "", ""]
        if group not in GROUPS:
            continue
        rows = numbers_of(config, side, group)
        if block == "mlp" and group == "layers" and "mlp" in names:
            hidden[side][rows] += over("layers", "mlp")
        if (side, block) in heads:
            if "heads" in names and squares.shape[names.index("heads")] == config.num_heads:
                heads[side, block][rows] += over("layers", "heads")
            if "kv_heads" in names and squares.shape[names.index("kv_heads")] == config.kv_heads:
                heads[side, block][rows] += np.repeat(over("layers", "kv_heads") / shared, shared, axis=1)
    return Statistics(
        {side: np.sqrt(values) for side, values in hidden.items()},
        {where: np.sqrt(values) for where, values in heads.items()},
        np.sqrt(channels),
        {},
    )


def of_activations(config: TransformerConfig, params: Any, batches: Iterable[Batch]) -> Statistics:
    """Importance by what flows through the model on batches (see Student), over all real tokens.

    Raises:
      UserError: there is no batch, or no real token in them.
    """
    measure = jax.jit(functools.partial(_measure, config))
    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        names = [
            name for name in batch if name.split("_", 1)[1] in ("input_tokens", "segment_ids", "positions")
        ]
        found = jax.device_get(measure(params, {name: jnp.asarray(batch[name]) for name in names}))
        for name, value in found.items():
            sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)
    if not sums or not sums["decoder_tokens"]:
        raise UserError("there is no token to measure importance on: give batches of the teacher's data")
    hidden, heads, influence = {}, {}, {}
    for side in SIDES:
        layers = len(config.layers_of(side))
        if not layers:
            continue
        tokens = sums[f"{side}_tokens"]
        hidden[side] = np.zeros((layers, config.d_ff))
        for number in numbers_of(config, side, "layers"):
            hidden[side][number] = np.sqrt(sums[f"{side}/{number}/mlp"] / tokens)
        influence[side] = np.stack([sums[f"{side}/{number}/influence"] / tokens for number in range(layers)])
    for side, block in blocks(config):
        rows = [sums[f"{side}/{number}/{block}"] for number in range(len(config.layers_of(side)))]
        heads[side, block] = np.sqrt(np.stack(rows) / sums[f"{side}_tokens"])
    channels = np.sqrt(sum(sums[f"{side}/channels"] / sums[f"{side}_tokens"] for side in hidden))
    return Statistics(hidden, heads, channels, influence)


def _measure(config: TransformerConfig, params: Any, batch: Batch) -> dict[str, jax.Array]:
    """Sums over a batch's real tokens of squares by head, hidden unit and channel, and of influence.

    The layers are unrolled, so that what they are given can be taken out of them.
    """
    plain = config.replace(scan_layers=False, remat="none", dropout=0.0, embedding_noise=0.0)
    sums: dict[str, jax.Array] = {}
    real = {
        side: (batch[f"{side}_segment_ids"] > 0).astype(jnp.float32)
        for side in SIDES
        if f"{side}_segment_ids" in batch
    }
    for side, weights in real.items():
        sums[f"{side}_tokens"] = weights.sum()
    side, number = "", -1

    def add(name: str, x: jax.Array) -> None:  # x: [batch, length, ...], summed over real tokens
        x = jnp.square(x.astype(jnp.float32))
        sums[name] = sums.get(name, 0.0) + jnp.einsum("bl,bl...->...", real[side], x)

    def watch(function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal side, number
        module = context.module
        if context.method_name != "__call__":
            return function(*args, **kwargs)
        if isinstance(module, Layer):
            number += 1
            side = "encoder" if number < config.encoder_layers else "decoder"
            x = args[0].astype(jnp.float32)
            result = function(*args, **kwargs)
            y = result[0].astype(jnp.float32)
            product = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
            cosine = jnp.sum(x * y, axis=-1) / jnp.maximum(product, 1e-12)
            where = f"{side}/{number - (config.encoder_layers if side == 'decoder' else 0)}"
            sums[f"{where}/influence"] = jnp.sum((1.0 - cosine) * real[side])
            return result
        if isinstance(module, Projection) and module.path[-1] == "output" and len(module.path) == 2:
            name = module.path[0]
            where = f"{side}/{number - (config.encoder_layers if side == 'decoder' else 0)}/{name}"
            x = args[0]
            # [batch, length, heads, head_dim] -> a norm for each head
            add(where, x if name == "mlp" else jnp.linalg.norm(x.astype(jnp.float32), axis=-1))
        result = function(*args, **kwargs)
        if (
            isinstance(module, Norm)
            and side
            and result.shape[-1] == config.d_model
            and module.names == ("embed",)
        ):
            add(f"{side}/channels", result)
        return result

    arguments: dict[str, Any] = {
        "decoder_positions": batch.get("decoder_positions"),
        "decoder_segment_ids": batch["decoder_segment_ids"],
    }
    encoder_tokens = None
    if config.architecture == "encoder_decoder":
        encoder_tokens = batch["encoder_input_tokens"]
        arguments["encoder_positions"] = batch.get("encoder_positions")
        arguments["encoder_segment_ids"] = batch["encoder_segment_ids"]
    with nn.intercept_methods(watch):
        Transformer(plain).apply(
            {"params": params}, batch["decoder_input_tokens"], encoder_tokens, **arguments, method="hidden"
        )
    return sums
