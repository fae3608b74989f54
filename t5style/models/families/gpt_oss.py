"""GPT-OSS: sinks, alternating windows, biased experts in stacked tensors."""

from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import Fields, Row, fused, linear, matrix, vector
from t5style.models.families import decoder
from t5style.nn.settings import MoE
from t5style.run_dir import UserError

_ACTIVATIONS = ("silu_1702", "linear_plus_one")


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    theirs = f"{decoder.LAYER}.mlp"

    def layer(ours: str) -> tuple[Row, ...]:
        into = [f"{ours}/mlp/experts/{part}" for part in ("inputs_0", "inputs_1")]
        stacked = matrix(transposed=False, leading=1)
        return (
            *decoder.norms(ours),
            *decoder.attention(ours),
            Row(f"{ours}/attention/sinks", f"{decoder.LAYER}.self_attn.sinks"),
            *linear(f"{ours}/mlp/router", f"{theirs}.router"),
            # Columns of gate and up in turns.
            Row(
                tuple(f"{part}/kernel" for part in into),
                f"{theirs}.experts.gate_up_proj",
                fused(stacked, axis=-1, width=1),
            ),
            Row(
                tuple(f"{part}/bias" for part in into),
                f"{theirs}.experts.gate_up_proj_bias",
                fused(vector(leading=1), axis=-1, width=1),
            ),
            Row(f"{ours}/mlp/experts/output/kernel", f"{theirs}.experts.down_proj", stacked),
            Row(f"{ours}/mlp/experts/output/bias", f"{theirs}.experts.down_proj_bias"),
        )

    return decoder.rows(layer)


def _config(fields: Fields) -> TransformerConfig:
    fields.need("num_key_value_heads")
    fields.must_be("hidden_act", "silu")
    fields.must_be("swiglu_alpha", 1.702)
    decoder.training_of_routers(fields)
    fields.ignore("initial_context_length")  # repeats rope_scaling's
    used = fields.need("num_experts_per_tok")
    fields.must_be("experts_per_token", used)
    if not fields.get("rope_scaling") and not fields.get("rope_parameters"):
        raise fields.error("lacks the field rope_scaling")
    layers = fields.need("num_hidden_layers")
    default = ["full_attention" if n % 2 else "sliding_attention" for n in range(layers)]
    bias = fields.get("attention_bias", True)
    own = decoder.common(fields, theta=150_000.0) | {
        "head_dim": fields.get("head_dim", 64),
        "activations": _ACTIVATIONS,
    }
    return fields.config(
        **own,
        **decoder.windows(fields, fields.get("sliding_window", 128), default),
        attention_bias=bias,
        attention_output_bias=bias,
        attention_sinks=True,
        mlp_clamp=fields.get("swiglu_limit", 7.0),
        moe=MoE(
            experts=fields.need("num_local_experts"),
            per_token=used,
            d_ff=fields.need("intermediate_size"),
            choose_first=True,
            bias=True,
        ),
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    decoder.need_experts(config, "GPT-OSS")
    assert config.moe is not None
    if config.activations != _ACTIVATIONS:
        raise UserError(f"a Hugging Face GPT-OSS cannot have activations = {config.activations}")
    return {
        **decoder.save_common(config.replace(activations=("silu", "linear")), "GPT-OSS"),
        **decoder.save_types(config, "GPT-OSS"),
        "attention_bias": config.attention_bias,
        "swiglu_alpha": 1.702,
        "swiglu_limit": config.mlp_clamp,
        "num_local_experts": config.moe.experts,
        "num_experts_per_tok": config.moe.per_token,
        "intermediate_size": config.moe.d_ff,
    }


FAMILIES = {"gpt_oss": decoder.family("GptOssForCausalLM", _rows, _config, _save)}
