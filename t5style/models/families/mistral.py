"""Mistral, and with experts Mixtral."""

from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import Fields, Row
from t5style.models.families import decoder, llama
from t5style.nn.settings import MoE


def _windows(fields: Fields, default: int | None) -> dict[str, Any]:
    window = fields.get("sliding_window", default)
    return {"window": window, "layer_pattern": ("full" if window is None else "window",)}


def _config(fields: Fields) -> TransformerConfig:
    fields.need("num_key_value_heads")
    return fields.config(**decoder.common(fields), **_windows(fields, 4096))


def _save(config: TransformerConfig) -> dict[str, Any]:
    return {
        **decoder.save_common(config, "Mistral"),
        "sliding_window": decoder.one_window(config, "Mistral"),
    }


def _moe_rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    theirs = f"{decoder.LAYER}.block_sparse_moe"
    return decoder.rows(
        lambda ours: (
            *decoder.norms(ours),
            *decoder.attention(ours),
            *decoder.experts(f"{ours}/mlp", theirs, ("w1", "w3", "w2")),
        )
    )


def _moe_config(fields: Fields) -> TransformerConfig:
    fields.need("num_key_value_heads")
    fields.must_be("router_jitter_noise", 0.0)
    decoder.training_of_routers(fields)
    return fields.config(
        **decoder.common(fields, theta=1e6),
        **_windows(fields, None),
        moe=MoE(
            experts=fields.need("num_local_experts"),
            per_token=fields.need("num_experts_per_tok"),
            d_ff=fields.need("intermediate_size"),
            normalize=True,
        ),
    )


def _moe_save(config: TransformerConfig) -> dict[str, Any]:
    decoder.need_experts(config, "Mixtral")
    assert config.moe is not None
    return {
        **decoder.save_common(config, "Mixtral"),
        "sliding_window": decoder.one_window(config, "Mixtral"),
        "num_local_experts": config.moe.experts,
        "num_experts_per_tok": config.moe.per_token,
        "intermediate_size": config.moe.d_ff,
    }


FAMILIES = {
    "mistral": decoder.family("MistralForCausalLM", llama.rows, _config, _save),
    "mixtral": decoder.family("MixtralForCausalLM", _moe_rows, _moe_config, _moe_save),
}
