"""SmolLM 3: layers without rotary embedding among others."""

from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import Fields
from t5style.models.families import decoder, llama
from t5style.run_dir import UserError


def _config(fields: Fields) -> TransformerConfig:
    fields.need("num_key_value_heads")
    fields.must_be("use_sliding_window", False)
    fields.ignore("sliding_window", "max_window_layers")  # without effect, then
    layers, interval = fields.need("num_hidden_layers"), fields.get("no_rope_layer_interval", 4)
    turned = fields.get("no_rope_layers")  # 1 for layers with rotary embedding
    if turned is None:
        turned = [int((n + 1) % interval != 0) for n in range(layers)]
    if len(turned) < layers:
        raise fields.error(f"no_rope_layers has {len(turned)} entries for num_hidden_layers = {layers}")
    bias = fields.get("attention_bias", False)
    windows = decoder.windows(fields, None, name="use_sliding_window")  # all layers are full
    pattern = decoder.shortest(["full" if each else "full_nope" for each in turned[:layers]])
    return fields.config(
        **decoder.common(fields, theta=2e6, tied=True),
        **windows | {"layer_pattern": pattern},
        attention_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.get("mlp_bias", False),
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    kinds = [kind.attention for kind in config.layers_of("decoder")]
    if "window" in kinds:
        raise UserError("a Hugging Face SmolLM 3 cannot have layers of kind 'window'")
    return {
        **decoder.save_common(config, "SmolLM 3"),
        "no_rope_layers": [int(kind == "full") for kind in kinds],
        "layer_types": ["full_attention"] * len(kinds),
        "use_sliding_window": False,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


FAMILIES = {"smollm3": decoder.family("SmolLM3ForCausalLM", llama.rows, _config, _save)}
