"""T5 1.0, 1.1, FLAN-T5, UL2, ByT5 (all `t5`), mT5 and UMT5."""

import dataclasses
import functools
import re
from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import (
    ACTIVATIONS,
    THEIR_ACTIVATIONS,
    Family,
    Fields,
    Row,
    linear,
    norm,
)
from t5style.run_dir import UserError


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        *linear(f"{ours}/query", f"{theirs}.q"),
        *linear(f"{ours}/key", f"{theirs}.k"),
        *linear(f"{ours}/value", f"{theirs}.v"),
        *linear(f"{ours}/output", f"{theirs}.o", 2),
    )


def layer_rows(side: str, tree: str, mlp: str) -> tuple[Row, ...]:
    """Rows of a stack's layers but for the MLP's own.

    Args:
      side: 'encoder' or 'decoder'.
      tree: 'layers' or 'moe_layers'.
      mlp: the number of the MLP's sub-layer.
    """
    block, layers = f"{side}.block.{{layer}}.layer", f"{side}/{tree}"
    return (
        *norm(f"{layers}/attention_norm", f"{block}.0.layer_norm"),
        *_attention(f"{layers}/attention", f"{block}.0.SelfAttention"),
        *norm(f"{layers}/mlp_norm", f"{block}.{mlp}.layer_norm"),
        *norm(f"{layers}/cross_attention_norm", f"{block}.1.layer_norm"),
        *_attention(f"{layers}/cross_attention", f"{block}.1.EncDecAttention"),
    )


def stack_rows(side: str) -> tuple[Row, ...]:
    """Rows of what a stack has besides its layers; a bias table of each layer (UMT5) is here too."""
    table = "layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        Row(f"{side}/relative_bias/table", f"{side}.block.0.{table}"),
        Row(f"{side}/layers/relative_bias/table", f"{side}.block.{{layer}}.{table}"),
        *norm(f"{side}/final_norm", f"{side}.final_layer_norm"),
    )


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    rows = [Row("embedding", "shared.weight"), *linear("head", "lm_head")]
    first = "wi_0" if config.gated else "wi"
    for side, number in (("encoder", "1"), ("decoder", "2")):
        ours, theirs = f"{side}/layers/mlp", f"{side}.block.{{layer}}.layer.{number}.DenseReluDense"
        rows += [
            *stack_rows(side),
            *layer_rows(side, "layers", number),
            *linear(f"{ours}/inputs_0", f"{theirs}.{first}"),
            *linear(f"{ours}/inputs_1", f"{theirs}.wi_1"),
            *linear(f"{ours}/output", f"{theirs}.wo"),
        ]
    return tuple(rows)


def shared_fields(fields: Fields) -> dict[str, Any]:
    """Our fields for those that Switch Transformer has, too."""
    # Files of T5 1.0 were written before some of these fields existed, hence the defaults (those of
    # T5Config).
    layers = fields.need("num_layers")
    return {
        "vocab_size": fields.need("vocab_size"),
        "d_model": fields.need("d_model"),
        "d_ff": fields.need("d_ff"),
        "num_heads": fields.need("num_heads"),
        "head_dim": fields.need("d_kv"),
        "encoder_layers": layers,
        "decoder_layers": fields.get("num_decoder_layers") or layers,
        "relative_buckets": fields.need("relative_attention_num_buckets"),
        "relative_max_distance": fields.get("relative_attention_max_distance", 128),
        "norm_eps": fields.get("layer_norm_epsilon", 1e-6),
        "dropout": fields.get("dropout_rate", 0.1),
        "init_scale": fields.get("initializer_factor", 1.0),
    }


def shared_entries(config: TransformerConfig) -> dict[str, Any]:
    """The same the other way."""
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "d_kv": config.heads_width,
        "num_heads": config.num_heads,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "dropout_rate": config.dropout,
        "initializer_factor": config.init_scale if config.init == "t5" else 1.0,
        "is_encoder_decoder": True,
    }


def _config(kind: str, fields: Fields) -> TransformerConfig:
    written = fields.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
    gate, _, theirs = str(written).rpartition("-")
    if written == "gated-gelu":
        theirs = "gelu_new"  # T5Config's own exception: T5 1.1 was trained with the tanh approximation
    if gate not in ("", "gated") or theirs not in ACTIVATIONS:
        raise fields.error(f"feed_forward_proj = {written!r} is not supported")
    fields.must_be("dense_act_fn", theirs)
    fields.must_be("is_gated_act", gate == "gated")
    tied = fields.get("tie_word_embeddings", True)
    # transformers 4 scales exactly when it ties; transformers 5 does with UMT5, too, writes the scaling as a
    # field of its own for T5, and scales no mT5.
    scaled = tied
    if kind == "t5":
        scaled = fields.get("scale_decoder_outputs", tied)
    elif kind == "mt5":
        scaled = tied and str(fields.get("transformers_version", "")).startswith("4.")
    else:
        fields.ignore("scalable_attention")  # no class reads it
    return fields.config(
        **shared_fields(fields),
        activations=(ACTIVATIONS[theirs], "linear") if gate else (ACTIVATIONS[theirs],),
        relative_bias_per_layer=kind == "umt5",
        tie_embeddings=tied,
        scale_logits=scaled,
    )


def _save(kind: str, config: TransformerConfig) -> dict[str, Any]:
    activation = THEIR_ACTIVATIONS.get(config.activations[0])
    if config.gated:
        activation = {"gelu_new": "gelu", "gelu": None}.get(str(activation), activation)
    if activation is None or config.activations[1:] not in ((), ("linear",)):
        raise UserError(f"a Hugging Face {_NAMES[kind]} cannot have activations = {config.activations}")
    if not config.tie_embeddings and config.scale_logits:
        raise UserError(
            f"a Hugging Face {_NAMES[kind]} with an untied head cannot have scale_logits = True (it has "
            "False), so this model cannot be saved as one"
        )
    theirs = shared_entries(config)
    theirs["feed_forward_proj"] = f"gated-{activation}" if config.gated else activation
    if kind == "t5":
        theirs["scale_decoder_outputs"] = config.scale_logits
    return theirs


_NAMES = {"t5": "T5", "mt5": "mT5", "umt5": "UMT5"}

TOKENS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
_T5 = Family(
    architecture="T5ForConditionalGeneration",
    kind="encoder_decoder",
    rows=_rows,
    embedding="shared.weight",
    head="lm_head.weight",
    config=functools.partial(_config, "t5"),
    save_config=functools.partial(_save, "t5"),
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
    # The first releases of T5 1.0 kept a bias table for cross-attention, which uses none.
    unused=(re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),),
    tokens=TOKENS,
)


def _relative(kind: str, architecture: str) -> Family:
    return dataclasses.replace(
        _T5,
        architecture=architecture,
        config=functools.partial(_config, kind),
        save_config=functools.partial(_save, kind),
    )


FAMILIES = {
    "t5": _T5,
    "mt5": _relative("mt5", "MT5ForConditionalGeneration"),
    "umt5": _relative("umt5", "UMT5ForConditionalGeneration"),
}
