"""GPT-2."""

import re
from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import (
    THEIR_ACTIVATIONS,
    Family,
    Fields,
    Row,
    fused,
    matrix,
    norm,
    vector,
)
from t5style.run_dir import UserError


def _conv1d(ours: str, theirs: str, inner: int = 1) -> tuple[Row, ...]:
    """Rows of transformers' Conv1D, which has its weight as `[input, output]`."""
    return (
        Row(f"{ours}/kernel", f"{theirs}.weight", matrix(inner, transposed=False)),
        Row(f"{ours}/bias", f"{theirs}.bias", vector()),
    )


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    ours, theirs = "decoder/layers", "transformer.h.{layer}"
    parts = [f"{ours}/attention/{part}" for part in ("query", "key", "value")]
    return (
        Row("embedding", "transformer.wte.weight"),
        Row("position_embedding", "transformer.wpe.weight"),
        Row("head/kernel", "lm_head.weight", matrix()),
        *norm("decoder/final_norm", "transformer.ln_f"),
        *norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        Row(
            tuple(f"{part}/kernel" for part in parts),
            f"{theirs}.attn.c_attn.weight",
            fused(matrix(transposed=False), axis=1),
        ),
        Row(tuple(f"{part}/bias" for part in parts), f"{theirs}.attn.c_attn.bias", fused(vector())),
        *_conv1d(f"{ours}/attention/output", f"{theirs}.attn.c_proj", 2),
        *norm(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
        *_conv1d(f"{ours}/mlp/inputs_0", f"{theirs}.mlp.c_fc"),
        *_conv1d(f"{ours}/mlp/output", f"{theirs}.mlp.c_proj"),
    )


def _config(fields: Fields) -> TransformerConfig:
    fields.must_be("scale_attn_by_inverse_layer_idx", False)
    fields.must_be("add_cross_attention", False)
    # n_ctx repeats n_positions; summaries are a head of GPT2DoubleHeadsModel; the order of two factors.
    fields.ignore("n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj")
    fields.ignore("summary_activation", "summary_proj_to_labels", "summary_first_dropout")
    width = fields.need("n_embd")
    return fields.config(
        vocab_size=fields.need("vocab_size"),
        d_model=width,
        d_ff=fields.get("n_inner") or 4 * width,
        num_heads=fields.need("n_head"),
        decoder_layers=fields.need("n_layer"),
        activations=(fields.activation("activation_function", "gelu_new"),),
        positions="learned",
        context_length=fields.need("n_positions"),
        norm="layer",
        norm_bias=True,
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tie_embeddings=fields.get("tie_word_embeddings", True),
        scale_attention=fields.get("scale_attn_weights", True),
        dropout=fields.dropout("resid_pdrop", "embd_pdrop", "attn_pdrop", default=0.1),
        init="normal",
        init_scale=fields.get("initializer_range", 0.02),
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    activation = THEIR_ACTIVATIONS.get(config.activations[0])
    if activation is None or config.gated:
        raise UserError(f"a Hugging Face GPT-2 cannot have activations = {config.activations}")
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.d_model,
        "n_inner": config.d_ff,
        "n_head": config.num_heads,
        "n_layer": config.decoder_layers,
        "activation_function": activation,
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.query_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "initializer_range": config.init_scale if config.init == "normal" else 0.02,
    }


FAMILIES = {
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        kind="decoder_only",
        rows=_rows,
        embedding="transformer.wte.weight",
        head="lm_head.weight",
        config=_config,
        save_config=_save,
        copies=("lm_head.weight",),
        unused=(re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),),  # the causal mask
        # The first releases are GPT2Model's, which leaves the prefix out.
        rename=lambda name: name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}",
    ),
}
