"""LLaMA 1 to 3."""

import re
from collections.abc import Mapping
from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import THEIR_ACTIVATIONS, Family, Fields, Row, linear, norm
from t5style.run_dir import UserError


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    ours, theirs = "decoder/layers", "model.layers.{layer}"
    return (
        Row("embedding", "model.embed_tokens.weight"),
        *linear("head", "lm_head"),
        *norm("decoder/final_norm", "model.norm"),
        *norm(f"{ours}/attention_norm", f"{theirs}.input_layernorm"),
        *linear(f"{ours}/attention/query", f"{theirs}.self_attn.q_proj"),
        *linear(f"{ours}/attention/key", f"{theirs}.self_attn.k_proj"),
        *linear(f"{ours}/attention/value", f"{theirs}.self_attn.v_proj"),
        *linear(f"{ours}/attention/output", f"{theirs}.self_attn.o_proj", 2),
        *norm(f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm"),
        *linear(f"{ours}/mlp/inputs_0", f"{theirs}.mlp.gate_proj"),
        *linear(f"{ours}/mlp/inputs_1", f"{theirs}.mlp.up_proj"),
        *linear(f"{ours}/mlp/output", f"{theirs}.mlp.down_proj"),
    )


def _rope_theta(fields: Fields) -> float:
    """The rotary base, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it."""
    theta = fields.get("rope_theta", 10_000.0)
    for name in ("rope_scaling", "rope_parameters"):
        settings = fields.get(name)
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise fields.error(f"{name} = {settings!r} is not an object")
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise fields.error(f"{name} with rope_type = {kind!r} is not supported; only 'default' is")
        if unknown := sorted(set(settings) - {"rope_type", "type", "rope_theta"}):
            raise fields.error(f"{name}.{unknown[0]} = {settings[unknown[0]]!r} is not one we honour")
        theta = settings.get("rope_theta", theta)
    return float(theta)


def _config(fields: Fields) -> TransformerConfig:
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    fields.must_be("attention_dropout", 0.0)
    return fields.config(
        vocab_size=fields.need("vocab_size"),
        d_model=fields.need("hidden_size"),
        d_ff=fields.need("intermediate_size"),
        num_heads=fields.need("num_attention_heads"),
        num_kv_heads=fields.get("num_key_value_heads"),
        head_dim=fields.get("head_dim"),
        decoder_layers=fields.need("num_hidden_layers"),
        activations=(fields.activation("hidden_act", "silu"), "linear"),
        positions="rope",
        rope_theta=_rope_theta(fields),
        norm_eps=fields.need("rms_norm_eps"),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        scale_attention=True,
        init="normal",
        init_scale=fields.get("initializer_range", 0.02),
        context_length=fields.get("max_position_embeddings"),
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    activation = THEIR_ACTIVATIONS.get(config.activations[0])
    if activation is None or config.activations[1:] != ("linear",):
        raise UserError(f"a Hugging Face LLaMA cannot have activations = {config.activations}: it is gated")
    if config.d_model % config.num_heads:
        raise UserError(
            f"a Hugging Face LLaMA cannot have d_model = {config.d_model} with num_heads = "
            f"{config.num_heads}: transformers wants a multiple"
        )
    theirs = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.heads_width,
        "num_hidden_layers": config.decoder_layers,
        "hidden_act": activation,
        # Both spellings: transformers 4 reads the first, transformers 5 the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_scale if config.init == "normal" else 0.02,
    }
    if config.context_length is not None:
        theirs["max_position_embeddings"] = config.context_length
    return theirs


FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        kind="decoder_only",
        rows=_rows,
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        config=_config,
        save_config=_save,
        copies=("lm_head.weight",),
        # Computed from rope_theta; transformers before 4.31 saved it.
        unused=(re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),),
    ),
}
