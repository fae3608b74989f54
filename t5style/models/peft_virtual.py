"""PEFT's files of prompt tuning and prefix tuning: one tensor of all virtual tokens (see models/peft.py)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from t5style.models import adapters
from t5style.models.adapters import Adapter, Tree
from t5style.models.adapters_virtual import PrefixTuning, PromptTuning
from t5style.models.config import TransformerConfig
from t5style.models.safetensors_files import Planned, Tensor
from t5style.run_dir import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "prompt_embeddings"


def read(
    folder: Path, theirs: Mapping[str, Any], config: TransformerConfig, tensors: Mapping[str, Tensor]
) -> tuple[Adapter, Tree]:
    """The adapter, and its own parameters in float32.

    A prompt stands before the tokens of the encoder, if there is one: of a file for both sides PEFT uses only
    the encoder's half. A prefix is the decoder's.
    """
    count, sides = theirs.get("num_virtual_tokens"), theirs.get("num_transformer_submodules")
    if type(count) is not int or count < 1:
        raise UserError(f"{folder / CONFIG}: num_virtual_tokens = {count!r} is not a whole number from 1")
    prompt = theirs["peft_type"] == "PROMPT_TUNING"
    layers, heads, width = config.decoder_layers, config.kv_heads, config.heads_width
    rows = 2 * count if prompt and sides == 2 else count
    shape = (rows, config.d_model if prompt else 2 * layers * heads * width)
    if set(tensors) != {_NAME} or tensors[_NAME].shape != shape:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in list(tensors.items())[:4])
        raise UserError(
            f"{folder / WEIGHTS} holds {found or 'nothing'}, and {CONFIG} and this model call for {_NAME} "
            f"{list(shape)}: is it for another model?"
        )
    value = tensors[_NAME].read()[:count].astype(np.float32)
    if prompt:
        return PromptTuning(count), {"prompt_embedding": jnp.asarray(value)}
    # By layer, first keys and then values.
    pairs = value.reshape(count, layers, 2, heads, width).transpose(2, 1, 0, 3, 4)
    if sides == 2:
        pairs = pairs[:, _taken(layers)]
    leaves: dict[tuple[str, ...], Any] = {}
    for tree, numbers in _numbers(config).items():
        for name, of_layers in zip(("key", "value"), pairs, strict=True):
            leaves["decoder", tree, "attention", f"prefix_{name}"] = jnp.asarray(of_layers[numbers])
    return PrefixTuning(count), adapters.nested(leaves)


def _taken(layers: int) -> np.ndarray:
    """Which pair of keys and values PEFT 0.21 gives each layer of a decoder with cross-attention: it hands
    out all pairs twice in a row, two to a layer, of which the second, for cross-attention, is then dropped.
    """
    return 2 * np.arange(layers) % layers


def planned(
    adapter: PromptTuning | PrefixTuning, config: TransformerConfig, own: Tree, base: str | None
) -> tuple[dict[str, Any], list[Planned]]:
    """adapter_config.json, and the tensor."""
    theirs: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": "SEQ_2_SEQ_LM" if config.encoder_layers else "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": adapter.length,
        "num_transformer_submodules": 1,
        "num_layers": config.decoder_layers,
    }
    if isinstance(adapter, PromptTuning):
        value = whole(own["prompt_embedding"])
        theirs |= {"peft_type": "PROMPT_TUNING", "num_attention_heads": config.num_heads}
        theirs |= {"token_dim": config.d_model}
    else:
        if adapter.sides != ("decoder",):
            raise UserError(
                f"PEFT has prefixes of decoders only, and this adapter has sides = {adapter.sides}"
            )
        shape = (config.decoder_layers, adapter.length, config.kv_heads, config.heads_width)
        pairs = np.zeros((2, *shape), np.float32)
        for tree, numbers in _numbers(config).items():
            for pair, name in zip(pairs, ("key", "value"), strict=True):
                pair[numbers] = whole(own["decoder"][tree]["attention"][f"prefix_{name}"])
        if config.encoder_layers:
            taken, wanted, pairs = _taken(config.decoder_layers), pairs, np.zeros_like(pairs)
            pairs[:, taken] = wanted
            if not np.array_equal(pairs[:, taken], wanted):
                raise UserError(
                    "PEFT gives two layers each of an encoder-decoder with an even number of them the same "
                    "prefix, and here they differ: this prefix cannot be saved for it"
                )
        value = pairs.transpose(2, 1, 0, 3, 4).reshape(adapter.length, -1)
        theirs["num_transformer_submodules"] = 2 if config.encoder_layers else 1
        theirs |= {"peft_type": "PREFIX_TUNING", "num_attention_heads": config.kv_heads}
        theirs |= {"token_dim": config.kv_heads * config.heads_width}
    return theirs, [Planned(_NAME, value.shape, value.dtype, lambda: value)]


def _numbers(config: TransformerConfig) -> dict[str, list[int]]:
    """The numbers of the decoder's layers in each tree of them."""
    kinds = list(enumerate(config.layers_of("decoder")))
    trees = {"layers": False, "moe_layers": True}
    found = {tree: [number for number, kind in kinds if kind.experts == has] for tree, has in trees.items()}
    return {tree: numbers for tree, numbers in found.items() if numbers}


def whole(leaf: Any) -> np.ndarray:
    """A parameter on the host, whatever its placement; every process calls it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
