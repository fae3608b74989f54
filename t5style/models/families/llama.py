"""LLaMA 1 to 3, and all models of its form: SmolLM 1 and 2, TinyLlama, Yi, ..."""

import re
from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import Fields, Row
from t5style.models.families import decoder
from t5style.run_dir import UserError


def rows(config: TransformerConfig) -> tuple[Row, ...]:
    """Pre-normalised attention and MLP; biases and norms of queries and keys where a model has them."""
    del config
    return decoder.rows(
        lambda ours: (*decoder.norms(ours), *decoder.attention(ours), *decoder.mlp(f"{ours}/mlp"))
    )


def _config(fields: Fields) -> TransformerConfig:
    bias = fields.get("attention_bias", False)
    fields.ignore("rope_interleaved", "is_llama_config")  # of SmolLM 2's files; no class reads them
    return fields.config(
        **decoder.common(fields),
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.get("mlp_bias", False),
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    if config.d_model % config.num_heads:
        raise UserError(
            f"a Hugging Face LLaMA cannot have d_model = {config.d_model} with num_heads = "
            f"{config.num_heads}: transformers wants a multiple"
        )
    return {
        **decoder.save_common(config, "LLaMA"),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILIES = {
    "llama": decoder.family(
        "LlamaForCausalLM",
        rows,
        _config,
        _save,
        # Computed from rope_theta; transformers before 4.31 saved it.
        unused=(re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),),
    ),
}
