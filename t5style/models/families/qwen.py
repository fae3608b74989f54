"""Qwen 2, 2.5 and 3, with experts and without."""

from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import Fields, Row, linear
from t5style.models.families import decoder, llama
from t5style.nn.settings import MoE
from t5style.run_dir import UserError


def _window(fields: Fields) -> int | None:
    window = fields.get("sliding_window", 4096)
    return window if fields.get("use_sliding_window", False) else None


def _windows(fields: Fields) -> dict[str, Any]:
    """Layers from max_window_layers on have the window, if use_sliding_window and no layer_types."""
    fields.must_be("use_mrope", False)  # of models that see images
    layers, first = fields.need("num_hidden_layers"), fields.get("max_window_layers", 28)
    window = _window(fields)
    if window is None:
        return decoder.windows(fields, None, name="use_sliding_window")
    default = ["full_attention" if n < first else "sliding_attention" for n in range(layers)]
    return decoder.windows(fields, window, default)


def _save_windows(config: TransformerConfig, model: str) -> dict[str, Any]:
    return decoder.save_types(config, model) | {"use_sliding_window": config.window is not None}


def _biases(fields: Fields) -> dict[str, Any]:
    bias = fields.get("attention_bias", False)
    return {"attention_bias": bias, "attention_output_bias": bias}


# --- without experts ---


def _config2(fields: Fields) -> TransformerConfig:
    fields.need("num_key_value_heads")
    return fields.config(**decoder.common(fields), **_windows(fields), attention_bias=True)


def _save2(config: TransformerConfig) -> dict[str, Any]:
    theirs = decoder.save_common(config, "Qwen 2") | _save_windows(config, "Qwen 2")
    if config.heads_width * config.num_heads == config.d_model:
        del theirs["head_dim"]  # Qwen 2 has no such field
    return theirs


def _config3(fields: Fields) -> TransformerConfig:
    fields.need("num_key_value_heads")
    own = decoder.common(fields) | {"head_dim": fields.get("head_dim", 128)}
    return fields.config(**own, **_windows(fields), **_biases(fields), query_key_norm="head")


def _save3(config: TransformerConfig) -> dict[str, Any]:
    return {
        **decoder.save_common(config, "Qwen 3"),
        **_save_windows(config, "Qwen 3"),
        "attention_bias": config.attention_bias,
    }


# --- with experts ---


def _moe_rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    theirs = f"{decoder.LAYER}.mlp"
    return decoder.rows(
        lambda ours: (
            *decoder.norms(ours),
            *decoder.attention(ours),
            *decoder.mlp(f"{ours}/mlp"),
            *decoder.experts(f"{ours}/mlp"),
            *decoder.mlp(f"{ours}/mlp/shared", f"{theirs}.shared_expert"),
            *linear(f"{ours}/mlp/shared_gate", f"{theirs}.shared_expert_gate"),
        )
    )


def _moe(fields: Fields, **own: Any) -> dict[str, Any]:
    decoder.training_of_routers(fields)
    count = fields.get("num_experts", fields.get("num_local_experts"))  # transformers 4's and 5's name
    if count is None:
        raise fields.error("lacks the field num_experts")
    try:
        moe = MoE(
            experts=count,
            per_token=fields.need("num_experts_per_tok"),
            d_ff=fields.need("moe_intermediate_size"),
            normalize=fields.get("norm_topk_prob", False),
            **own,
        )
    except ValueError as error:
        raise fields.error(str(error)) from error
    return {"moe": moe, "moe_layers": decoder.sparse_layers(fields)}


def _save_moe(config: TransformerConfig, model: str) -> dict[str, Any]:
    decoder.need_experts(config, model)
    moe = config.moe
    assert moe is not None
    return {
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.d_ff,
        "norm_topk_prob": moe.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": decoder.numbers_of(config, experts=False),
    }


def _moe_config2(fields: Fields) -> TransformerConfig:
    fields.need("num_key_value_heads")
    window = _window(fields)
    fields.ignore("max_window_layers")
    if window and not fields.get("layer_types"):
        raise fields.error(
            "use_sliding_window = True needs layer_types: versions of transformers differ in which layers "
            "they give the window without it"
        )
    shared = fields.need("shared_expert_intermediate_size")
    return fields.config(
        **decoder.common(fields),
        **decoder.windows(fields, window, name="use_sliding_window"),
        **_moe(fields, shared_d_ff=shared, shared_gate=True),
        attention_bias=fields.get("qkv_bias", True),
    )


def _moe_save2(config: TransformerConfig) -> dict[str, Any]:
    theirs = decoder.save_common(config, "Qwen 2 MoE") | _save_moe(config, "Qwen 2 MoE")
    assert config.moe is not None
    if config.heads_width * config.num_heads != config.d_model:
        raise UserError(f"a Hugging Face Qwen 2 MoE cannot have head_dim = {config.head_dim}")
    del theirs["head_dim"]
    return {
        **theirs,
        **_save_windows(config, "Qwen 2 MoE"),
        "num_experts": config.moe.experts,
        "shared_expert_intermediate_size": config.moe.shared_d_ff,
        "qkv_bias": config.attention_bias,
    }


def _moe_config3(fields: Fields) -> TransformerConfig:
    fields.need("num_key_value_heads")
    own = decoder.common(fields)
    window = _window(fields)
    fields.ignore("max_window_layers")  # with a window, all layers have it
    return fields.config(
        **own,
        **_moe(fields),
        **_biases(fields),
        window=window,
        layer_pattern=("full" if window is None else "window",),
        query_key_norm="head",
    )


def _moe_save3(config: TransformerConfig) -> dict[str, Any]:
    theirs = decoder.save_common(config, "Qwen 3 MoE") | _save_moe(config, "Qwen 3 MoE")
    assert config.moe is not None
    return {
        **theirs,
        "sliding_window": decoder.one_window(config, "Qwen 3 MoE"),
        "use_sliding_window": config.window is not None,
        "num_experts": config.moe.experts,
        "attention_bias": config.attention_bias,
    }


FAMILIES = {
    "qwen2": decoder.family("Qwen2ForCausalLM", llama.rows, _config2, _save2),
    "qwen3": decoder.family("Qwen3ForCausalLM", llama.rows, _config3, _save3),
    "qwen2_moe": decoder.family("Qwen2MoeForCausalLM", _moe_rows, _moe_config2, _moe_save2),
    "qwen3_moe": decoder.family("Qwen3MoeForCausalLM", _moe_rows, _moe_config3, _moe_save3),
}
