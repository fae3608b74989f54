"""Phi-3, Phi-3.5 and Phi-4: fused projections, rotary embedding of a part of each head."""

from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import Fields, Row, fused, linear, matrix
from t5style.models.families import decoder


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    return decoder.rows(
        lambda ours: (
            *decoder.norms(ours),
            Row(
                tuple(f"{ours}/attention/{part}/kernel" for part in ("query", "key", "value")),
                f"{decoder.LAYER}.self_attn.qkv_proj.weight",
                fused(matrix()),
            ),
            *linear(f"{ours}/attention/output", f"{decoder.LAYER}.self_attn.o_proj", 2),
            Row(
                tuple(f"{ours}/mlp/{part}/kernel" for part in ("inputs_0", "inputs_1")),
                f"{decoder.LAYER}.mlp.gate_up_proj.weight",
                fused(matrix()),
            ),
            *linear(f"{ours}/mlp/output", f"{decoder.LAYER}.mlp.down_proj"),
        )
    )


def _config(fields: Fields) -> TransformerConfig:
    window = fields.get("sliding_window")
    fields.must_be("attention_bias", False)
    fields.must_be("embd_pdrop", 0.0)
    fields.must_be("resid_pdrop", 0.0)
    fields.get("original_max_position_embeddings")  # of scaling, which `common` reads
    return fields.config(
        **decoder.common(fields, fraction=True),
        window=window,
        layer_pattern=("full" if window is None else "window",),
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    theirs = decoder.save_common(config, "Phi-3") | {
        "sliding_window": decoder.one_window(config, "Phi-3"),
        "partial_rotary_factor": config.rope_fraction,
    }
    theirs["rope_parameters"]["partial_rotary_factor"] = config.rope_fraction
    if config.heads_width * config.num_heads == config.d_model:
        del theirs["head_dim"]  # Phi-3 has no such field
    scaling = config.rope_scaling
    if scaling is not None and scaling.original_length is not None:
        theirs["original_max_position_embeddings"] = scaling.original_length
    return theirs


FAMILIES = {"phi3": decoder.family("Phi3ForCausalLM", _rows, _config, _save)}
