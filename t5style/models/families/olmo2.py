"""OLMo 2: norms of what sub-layers give, and of queries and keys over all heads together."""

from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import Fields, Row, norm
from t5style.models.families import decoder
from t5style.run_dir import UserError


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    return decoder.rows(
        lambda ours: (
            *norm(f"{ours}/attention_output_norm", f"{decoder.LAYER}.post_attention_layernorm"),
            *norm(f"{ours}/mlp_output_norm", f"{decoder.LAYER}.post_feedforward_layernorm"),
            *decoder.attention(ours),
            *decoder.mlp(f"{ours}/mlp"),
        )
    )


def _config(fields: Fields) -> TransformerConfig:
    bias = fields.get("attention_bias", False)
    return fields.config(
        **decoder.common(fields),
        attention_bias=bias,
        attention_output_bias=bias,
        norm_placement="output",
        query_key_norm="width",
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    theirs = decoder.save_common(config, "OLMo 2") | {"attention_bias": config.attention_bias}
    if config.heads_width * config.num_heads != config.d_model:
        raise UserError(f"a Hugging Face OLMo 2 cannot have head_dim = {config.head_dim}")
    del theirs["head_dim"]
    return theirs


FAMILIES = {"olmo2": decoder.family("Olmo2ForCausalLM", _rows, _config, _save)}
