"""Gemma 1, 2 and 3: text models, and the text part of those that see images."""

import re
from collections.abc import Mapping
from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import ACTIVATIONS, Fields, Row, norm
from t5style.models.families import decoder, llama
from t5style.run_dir import UserError

_TANH = "gelu_pytorch_tanh"


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    """Gemma 2 and 3: a norm before and after each sub-layer."""
    del config
    return decoder.rows(
        lambda ours: (
            *norm(f"{ours}/attention_norm", f"{decoder.LAYER}.input_layernorm"),
            *norm(f"{ours}/attention_output_norm", f"{decoder.LAYER}.post_attention_layernorm"),
            *norm(f"{ours}/mlp_norm", f"{decoder.LAYER}.pre_feedforward_layernorm"),
            *norm(f"{ours}/mlp_output_norm", f"{decoder.LAYER}.post_feedforward_layernorm"),
            *decoder.attention(ours),
            *decoder.mlp(f"{ours}/mlp"),
        )
    )


def _common(fields: Fields, act: str = "hidden_activation", turned: Any = None) -> dict[str, Any]:
    fields.need("num_key_value_heads")
    fields.must_be("use_bidirectional_attention", None, False)
    fields.ignore("cache_implementation")  # of their generate()
    bias = fields.get("attention_bias", False)
    return decoder.common(fields, tied=True, act=act, turned=turned) | {
        "head_dim": fields.get("head_dim", 256),
        "attention_bias": bias,
        "attention_output_bias": bias,
        "scale_embeddings": True,
        "norm_plus_one": True,
    }


def _save_common(config: TransformerConfig, model: str) -> dict[str, Any]:
    theirs = decoder.save_common(config, model, "hidden_activation")
    if config.activations[0] == "gelu":
        theirs["hidden_activation"] = _TANH
    return theirs | {"attention_bias": config.attention_bias}


def _config1(fields: Fields) -> TransformerConfig:
    # Its first files say 'gelu' and mean the tanh approximation; hidden_activation came to say so.
    fields.must_be("hidden_activation", _TANH, None)
    own = _common(fields, "hidden_act")
    if fields.get("hidden_activation") or fields.get("hidden_act") == "gelu":
        own["activations"] = (ACTIVATIONS[_TANH], "linear")
    return fields.config(**own)


def _save1(config: TransformerConfig) -> dict[str, Any]:
    theirs = _save_common(config, "Gemma")
    theirs["hidden_act"] = theirs.pop("hidden_activation")
    if config.activations[0] == "gelu_exact":
        raise UserError("a Hugging Face Gemma cannot have activations = ('gelu_exact', 'linear')")
    return theirs


def _alternating(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common: norms on both sides, soft caps, a scale."""
    scalar = fields.get("query_pre_attn_scalar", 256)
    return {"norm_placement": "both", "attention_scale": float(scalar) ** -0.5}


def _save_alternating(config: TransformerConfig, model: str) -> dict[str, Any]:
    scalar = config.query_scale**-2
    whole = round(scalar)  # transformers takes whole numbers only
    if abs(whole - scalar) > 1e-6 * scalar:
        raise UserError(
            f"a Hugging Face {model} cannot have attention_scale = {config.query_scale}: it is the inverse "
            "root of a whole number"
        )
    return {
        **_save_common(config, model),
        **decoder.save_types(config, model),
        "query_pre_attn_scalar": whole,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
    }


def _config2(fields: Fields) -> TransformerConfig:
    fields.ignore("hidden_act")  # hidden_activation is what counts
    layers = fields.need("num_hidden_layers")
    default = ["full_attention" if n % 2 else "sliding_attention" for n in range(layers)]
    return fields.config(
        **_common(fields),
        **_alternating(fields),
        **decoder.windows(fields, fields.get("sliding_window", 4096), default),
        attention_softcap=fields.get("attn_logit_softcapping", 50.0),
        logits_softcap=fields.get("final_logit_softcapping", 30.0),
    )


def _save2(config: TransformerConfig) -> dict[str, Any]:
    return _save_alternating(config, "Gemma 2")


_LAYERS3 = ("full_attention", "sliding_attention")


def _rope3(fields: Fields) -> dict[str, Any]:
    """Two rotary bases: transformers 4 has fields for them, transformers 5 an object of two."""
    local = float(fields.get("rope_local_base_freq", 10_000.0))
    both = fields.get("rope_parameters")
    if both is None:
        found = decoder.rope(fields, 1e6)
    else:
        if not isinstance(both, Mapping) or set(both) - set(_LAYERS3):
            raise fields.error(f"rope_parameters = {both!r} is not an object of {' and '.join(_LAYERS3)}")
        parts = {name: dict(both.get(name) or {}) for name in _LAYERS3}
        local = float(parts["sliding_attention"].pop("rope_theta", local))
        where = "rope_parameters.sliding_attention"
        if decoder.scaling(fields, where, parts["sliding_attention"]) is not None:
            raise fields.error(f"{where} with a rope_type other than 'default' is not supported")
        theta = fields.get("rope_theta", 1e6)
        found = {
            "rope_theta": float(parts["full_attention"].pop("rope_theta", theta)),
            "rope_scaling": decoder.scaling(
                fields, "rope_parameters.full_attention", parts["full_attention"]
            ),
        }
        beside = fields.get("rope_scaling")
        if beside and decoder.scaling(fields, "rope_scaling", beside) != found["rope_scaling"]:
            raise fields.error("rope_scaling and rope_parameters contradict each other")
    return found | {"rope_local_theta": local}


def _config3(fields: Fields) -> TransformerConfig:
    layers = fields.need("num_hidden_layers")
    every = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    default = ["sliding_attention" if (n + 1) % every else "full_attention" for n in range(layers)]
    return fields.config(
        **_common(fields, turned=_rope3(fields)),
        **_alternating(fields),
        **decoder.windows(fields, fields.get("sliding_window", 4096), default),
        attention_softcap=fields.get("attn_logit_softcapping"),
        logits_softcap=fields.get("final_logit_softcapping"),
        query_key_norm="head",
    )


def _save3(config: TransformerConfig) -> dict[str, Any]:
    # transformers 4 reads rope_theta, rope_scaling and rope_local_base_freq, transformers 5 the object.
    theirs = _save_alternating(config, "Gemma 3")
    full = theirs.pop("rope_parameters")
    local = config.rope_theta if config.rope_local_theta is None else config.rope_local_theta
    return theirs | {
        "rope_local_base_freq": local,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _text(fields: Fields) -> TransformerConfig:
    """The text model of Gemma3ForConditionalGeneration."""
    text = fields.need("text_config")
    if not isinstance(text, Mapping):
        raise fields.error(f"text_config = {text!r} is not an object")
    fields.ignore("vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id")
    fields.ignore("boi_token_index", "eoi_token_index", "boi_token_id", "eoi_token_id")
    fields.ignore("initializer_range")
    fields.must_be("tie_word_embeddings", True)
    fields.check()
    # Published files leave out what is transformers' default.
    defaults = {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "hidden_activation": _TANH,
        "max_position_embeddings": 131_072,
    }
    return _config3(Fields(defaults | dict(text), f"{fields.where}, text_config"))


def _no_images(config: TransformerConfig) -> dict[str, Any]:
    raise UserError(
        "a Gemma 3 that sees images is loaded without that part, so it cannot be saved as one: save it with "
        "family = 'gemma3_text'"
    )


def _plain(name: str) -> str:
    """`language_model.model.layers...` (transformers 4) or `model.language_model.layers...` -> `model.`"""
    for prefix in ("language_model.model.", "model.language_model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.") if name.startswith("language_model.lm_head") else name


FAMILIES = {
    "gemma": decoder.family("GemmaForCausalLM", llama.rows, _config1, _save1),
    "gemma2": decoder.family("Gemma2ForCausalLM", _rows, _config2, _save2),
    "gemma3_text": decoder.family("Gemma3ForCausalLM", _rows, _config3, _save3),
    "gemma3": decoder.family(
        "Gemma3ForConditionalGeneration",
        _rows,
        _text,
        _no_images,
        rename=_plain,
        unused=(re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*"),),
        saved_as="gemma3_text",
    ),
}
