"""GPT-NeoX and Pythia."""

import re
from collections.abc import Mapping
from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import (
    THEIR_ACTIVATIONS,
    Family,
    Fields,
    Row,
    fused,
    linear,
    matrix,
    norm,
    vector,
)
from t5style.run_dir import UserError


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    ours, theirs = "decoder/layers", "gpt_neox.layers.{layer}"
    parts = [f"{ours}/attention/{part}" for part in ("query", "key", "value")]
    fuse = f"{theirs}.attention.query_key_value"  # of each head: its query, key and value
    return (
        Row("embedding", "gpt_neox.embed_in.weight"),
        *linear("head", "embed_out"),
        *norm("decoder/final_norm", "gpt_neox.final_layer_norm"),
        *norm(f"{ours}/attention_norm", f"{theirs}.input_layernorm"),
        Row(
            tuple(f"{part}/kernel" for part in parts),
            f"{fuse}.weight",
            fused(matrix(), width=config.heads_width),
        ),
        Row(
            tuple(f"{part}/bias" for part in parts), f"{fuse}.bias", fused(vector(), width=config.heads_width)
        ),
        *linear(f"{ours}/attention/output", f"{theirs}.attention.dense", 2),
        *norm(f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm"),
        *linear(f"{ours}/mlp/inputs_0", f"{theirs}.mlp.dense_h_to_4h"),
        *linear(f"{ours}/mlp/output", f"{theirs}.mlp.dense_4h_to_h"),
    )


def _rope(fields: Fields) -> tuple[float, float]:
    """The rotary base and the part of a head that is rotated, as transformers 4 or 5 writes them."""
    theta = fields.get("rotary_emb_base", fields.get("rope_theta", 10_000.0))
    part = fields.get("rotary_pct", fields.get("partial_rotary_factor", 0.25))
    for name in ("rope_scaling", "rope_parameters"):
        settings = fields.get(name)
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise fields.error(f"{name} = {settings!r} is not an object")
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise fields.error(f"{name} with rope_type = {kind!r} is not supported; only 'default' is")
        if unknown := sorted(set(settings) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
            raise fields.error(f"{name}.{unknown[0]} = {settings[unknown[0]]!r} is not one we honour")
        theta = settings.get("rope_theta", theta)
        part = settings.get("partial_rotary_factor", part)
    return float(theta), float(part)


def _config(fields: Fields) -> TransformerConfig:
    theta, part = _rope(fields)
    bias = fields.get("attention_bias", True)
    fields.ignore("attention_probs_dropout_prob", "hidden_dropout_prob")  # the 20B's; no class reads them
    return fields.config(
        vocab_size=fields.need("vocab_size"),
        d_model=fields.need("hidden_size"),
        d_ff=fields.need("intermediate_size"),
        num_heads=fields.need("num_attention_heads"),
        decoder_layers=fields.need("num_hidden_layers"),
        activations=(fields.activation("hidden_act", "gelu"),),
        positions="rope",
        rope_theta=theta,
        rope_fraction=part,
        context_length=fields.get("max_position_embeddings"),
        norm="layer",
        norm_bias=True,
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        parallel_layers=fields.get("use_parallel_residual", True),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=True,
        tie_embeddings=fields.get("tie_word_embeddings", False),
        scale_attention=True,
        dropout=fields.dropout("hidden_dropout", "attention_dropout", default=0.0),
        init="normal",
        init_scale=fields.get("initializer_range", 0.02),
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    activation = THEIR_ACTIVATIONS.get(config.activations[0])
    if activation is None or config.gated:
        raise UserError(f"a Hugging Face GPT-NeoX cannot have activations = {config.activations}")
    theirs = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.decoder_layers,
        "hidden_act": activation,
        # Both spellings: transformers 4 reads the first two, transformers 5 the last.
        "rotary_emb_base": config.rope_theta,
        "rotary_pct": config.rope_fraction,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.rope_fraction,
        },
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_layers,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_dropout": config.dropout,
        "attention_dropout": config.dropout,
        "initializer_range": config.init_scale if config.init == "normal" else 0.02,
    }
    if config.context_length is not None:
        theirs["max_position_embeddings"] = config.context_length
    return theirs


FAMILIES = {
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        kind="decoder_only",
        rows=_rows,
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        config=_config,
        save_config=_save,
        copies=("embed_out.weight",),
        # The causal mask, and what follows from the rotary base.
        unused=(re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"),),
        # transformers 5 calls the head so in memory.
        rename=lambda name: "embed_out.weight" if name == "lm_head.weight" else name,
    ),
}
