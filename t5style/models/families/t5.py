"""T5: 1.0, 1.1, FLAN-T5 and all others that transformers calls `t5`."""

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
    refuse,
)
from t5style.run_dir import UserError


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        *linear(f"{ours}/query", f"{theirs}.q"),
        *linear(f"{ours}/key", f"{theirs}.k"),
        *linear(f"{ours}/value", f"{theirs}.v"),
        *linear(f"{ours}/output", f"{theirs}.o", 2),
    )


def _stack(side: str, gated: bool) -> tuple[Row, ...]:
    block, layers = f"{side}.block.{{layer}}.layer", f"{side}/layers"
    mlp = f"{block}.{1 if side == 'encoder' else 2}"
    first = "wi_0" if gated else "wi"
    return (
        Row(
            f"{side}/relative_bias/table",
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        *norm(f"{side}/final_norm", f"{side}.final_layer_norm"),
        *norm(f"{layers}/attention_norm", f"{block}.0.layer_norm"),
        *_attention(f"{layers}/attention", f"{block}.0.SelfAttention"),
        *norm(f"{layers}/mlp_norm", f"{mlp}.layer_norm"),
        *linear(f"{layers}/mlp/inputs_0", f"{mlp}.DenseReluDense.{first}"),
        *linear(f"{layers}/mlp/inputs_1", f"{mlp}.DenseReluDense.wi_1"),
        *linear(f"{layers}/mlp/output", f"{mlp}.DenseReluDense.wo"),
        *norm(f"{layers}/cross_attention_norm", f"{block}.1.layer_norm"),
        *_attention(f"{layers}/cross_attention", f"{block}.1.EncDecAttention"),
    )


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    return (
        Row("embedding", "shared.weight"),
        *linear("head", "lm_head"),
        *_stack("encoder", config.gated),
        *_stack("decoder", config.gated),
    )


def _config(fields: Fields) -> TransformerConfig:
    # Files of T5 1.0 were written before some of these fields existed, hence the defaults (those of
    # T5Config).
    written = fields.get("feed_forward_proj", "relu")
    gate, _, theirs = str(written).rpartition("-")
    if written == "gated-gelu":
        theirs = "gelu_new"  # T5Config's own exception: T5 1.1 was trained with the tanh approximation
    if gate not in ("", "gated") or theirs not in ACTIVATIONS:
        raise fields.error(f"feed_forward_proj = {written!r} is not supported")
    fields.must_be("dense_act_fn", theirs)
    fields.must_be("is_gated_act", gate == "gated")
    tied = fields.get("tie_word_embeddings", True)
    layers = fields.need("num_layers")
    return fields.config(
        vocab_size=fields.need("vocab_size"),
        d_model=fields.need("d_model"),
        d_ff=fields.need("d_ff"),
        num_heads=fields.need("num_heads"),
        head_dim=fields.need("d_kv"),
        encoder_layers=layers,
        decoder_layers=fields.get("num_decoder_layers") or layers,
        activations=(ACTIVATIONS[theirs], "linear") if gate else (ACTIVATIONS[theirs],),
        relative_buckets=fields.need("relative_attention_num_buckets"),
        relative_max_distance=fields.get("relative_attention_max_distance", 128),
        norm_eps=fields.get("layer_norm_epsilon", 1e-6),
        tie_embeddings=tied,
        # transformers 4 scales exactly when it ties; transformers 5 writes the scaling as a field of its own.
        scale_logits=fields.get("scale_decoder_outputs", tied),
        dropout=fields.get("dropout_rate", 0.1),
        init_scale=fields.get("initializer_factor", 1.0),
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    if not config.tie_embeddings:
        refuse(config, "T5 with an untied head", scale_logits=False)
    activation = THEIR_ACTIVATIONS.get(config.activations[0])
    if config.gated:
        activation = {"gelu_new": "gelu", "gelu": None}.get(str(activation), activation)
    if activation is None or config.activations[1:] not in ((), ("linear",)):
        raise UserError(f"a Hugging Face T5 cannot have activations = {config.activations}")
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "d_kv": config.heads_width,
        "num_heads": config.num_heads,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_logits,
        "dropout_rate": config.dropout,
        "initializer_factor": config.init_scale if config.init == "t5" else 1.0,
        "is_encoder_decoder": True,
    }


FAMILIES = {
    "t5": Family(
        architecture="T5ForConditionalGeneration",
        kind="encoder_decoder",
        rows=_rows,
        embedding="shared.weight",
        head="lm_head.weight",
        config=_config,
        save_config=_save,
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        # The first releases of T5 1.0 kept a bias table for cross-attention, which uses none.
        unused=(
            re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
        ),
        tokens={"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
}
