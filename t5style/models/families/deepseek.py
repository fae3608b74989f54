"""DeepSeek V2 and V3: latent attention, shared and routed experts."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from t5style.models.config import LatentAttention, TransformerConfig
from t5style.models.convert_rows import (
    Arrays,
    Fields,
    Row,
    Shape,
    Transform,
    linear,
    matrix,
    norm,
    rotary,
)
from t5style.models.families import decoder
from t5style.nn.settings import MoE
from t5style.run_dir import UserError


def _key_value() -> Transform:
    """Theirs `[heads · (nope_dim + value_dim), rank]`, ours two of `[rank, heads, width]`."""

    def to_ours(theirs: Arrays, shapes: Sequence[Shape]) -> Arrays:
        rank, heads, width = shapes[0]
        both = theirs[0].T.reshape(rank, heads, -1)
        return [both[..., :width], both[..., width:]]

    def to_theirs(ours: Arrays) -> Arrays:
        both = np.concatenate(list(ours), axis=-1)
        return [both.reshape(both.shape[0], -1).T]

    return Transform(to_ours, to_theirs)


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    latent = config.latent
    if latent is None:
        raise UserError("a Hugging Face DeepSeek cannot have latent = None: its attention is latent")
    theirs = f"{decoder.LAYER}.self_attn"
    query = rotary(matrix(), latent.rope_dim, start=latent.nope_dim)
    down = rotary(matrix(), latent.rope_dim, start=latent.key_value_rank)

    def layer(ours: str) -> tuple[Row, ...]:
        own, mlp = f"{ours}/attention", f"{decoder.LAYER}.mlp"
        return (
            *decoder.norms(ours),
            Row(f"{own}/query/kernel", f"{theirs}.q_proj.weight", query),
            *linear(f"{own}/query_down", f"{theirs}.q_a_proj"),
            *norm(f"{own}/query_norm", f"{theirs}.q_a_layernorm"),
            Row(f"{own}/query_up/kernel", f"{theirs}.q_b_proj.weight", query),
            Row(f"{own}/key_value_down/kernel", f"{theirs}.kv_a_proj_with_mqa.weight", down),
            *norm(f"{own}/key_value_norm", f"{theirs}.kv_a_layernorm"),
            Row(
                (f"{own}/key_up/kernel", f"{own}/value_up/kernel"),
                f"{theirs}.kv_b_proj.weight",
                _key_value(),
            ),
            *linear(f"{own}/output", f"{theirs}.o_proj", 2),
            *decoder.mlp(f"{ours}/mlp"),
            *decoder.experts(f"{ours}/mlp"),
            # Small numbers that decide between experts.
            Row(f"{ours}/mlp/router_bias", f"{mlp}.gate.e_score_correction_bias", dtype="float32"),
            *decoder.mlp(f"{ours}/mlp/shared", f"{mlp}.shared_experts"),
        )

    return decoder.rows(layer)


def _config(fields: Fields, **routing: Any) -> TransformerConfig:
    """routing: of MoE."""
    latent = LatentAttention(
        query_rank=fields.get("q_lora_rank", 1536),
        key_value_rank=fields.need("kv_lora_rank"),
        nope_dim=fields.need("qk_nope_head_dim"),
        rope_dim=fields.need("qk_rope_head_dim"),
        value_dim=fields.need("v_head_dim"),
    )
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    fields.must_be("moe_layer_freq", 1)
    # Norms within attention have an epsilon of their own, which is this.
    fields.must_be("rms_norm_eps", 1e-6)
    fields.must_be("head_dim", latent.rope_dim)
    fields.must_be("qk_head_dim", latent.nope_dim + latent.rope_dim)
    fields.must_be("num_key_value_heads", fields.need("num_attention_heads"), None)
    decoder.training_of_routers(fields)
    fields.ignore("aux_loss_alpha", "seq_aux", "ep_size")
    layers, dense = fields.need("num_hidden_layers"), fields.need("first_k_dense_replace")
    if dense >= layers:
        raise fields.error(f"first_k_dense_replace = {dense} leaves no layer with experts")
    try:
        moe = MoE(
            experts=fields.need("n_routed_experts"),
            per_token=fields.need("num_experts_per_tok"),
            d_ff=fields.need("moe_intermediate_size"),
            scale=fields.need("routed_scaling_factor"),
            shared_d_ff=fields.need("moe_intermediate_size") * fields.need("n_shared_experts"),
            **routing,
        )
    except ValueError as error:
        raise fields.error(str(error)) from error
    own = decoder.common(fields) | {"num_kv_heads": None, "head_dim": None}
    scaling = own["rope_scaling"]
    scale = None
    if scaling is not None and scaling.softmax_factor != 1:
        scale = (latent.nope_dim + latent.rope_dim) ** -0.5 * scaling.softmax_factor
    return fields.config(
        **own,
        latent=latent,
        moe=moe,
        moe_layers=tuple(range(dense, layers)) if dense else None,
        attention_scale=scale,
    )


def _config2(fields: Fields) -> TransformerConfig:
    fields.must_be("norm_topk_prob", False)
    fields.must_be("scoring_func", "softmax")
    groups, per_token = fields.get("n_group"), fields.get("topk_group")
    method = fields.get("topk_method", "greedy")
    if method == "greedy":
        return _config(fields)
    if method != "group_limited_greedy":
        raise fields.error(
            f"topk_method = {method!r} is not supported; 'greedy' and 'group_limited_greedy' are"
        )
    return _config(fields, groups=groups, groups_per_token=per_token)


def _config3(fields: Fields) -> TransformerConfig:
    fields.must_be("rope_interleave", True)
    fields.must_be("scoring_func", "sigmoid")
    fields.must_be("topk_method", "noaux_tc")
    # Layers that foretell the token after the next one; the next one's logits do without them.
    fields.ignore("num_nextn_predict_layers", "num_mtp_layers")
    return _config(
        fields,
        router="sigmoid",
        correction_bias=True,
        normalize=fields.get("norm_topk_prob", True),
        groups=fields.get("n_group", 8),
        groups_per_token=fields.get("topk_group", 4),
        group_score="top2",
    )


def _save(config: TransformerConfig, model: str) -> dict[str, Any]:
    latent, moe = config.latent, config.moe
    if latent is None:
        raise UserError(f"a Hugging Face {model} cannot have latent = None: its attention is latent")
    decoder.need_experts(config, model)
    assert moe is not None
    shared = moe.shared_d_ff // moe.d_ff
    if shared * moe.d_ff != moe.shared_d_ff or not shared:
        raise UserError(
            f"a Hugging Face {model} cannot have moe.shared_d_ff = {moe.shared_d_ff}: it is a multiple of "
            f"d_ff = {moe.d_ff}"
        )
    return {
        **decoder.save_common(config, model),
        "head_dim": latent.rope_dim,
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.key_value_rank,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "attention_bias": False,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.per_token,
        "moe_intermediate_size": moe.d_ff,
        "routed_scaling_factor": moe.scale,
        "n_shared_experts": shared,
        "first_k_dense_replace": decoder.numbers_of(config, experts=True)[0],
        "norm_topk_prob": moe.normalize,
    }


def _save2(config: TransformerConfig) -> dict[str, Any]:
    theirs = _save(config, "DeepSeek V2")
    assert config.moe is not None
    if config.moe.groups == 1:
        return theirs | {"topk_method": "greedy"}
    return theirs | {
        "topk_method": "group_limited_greedy",
        "n_group": config.moe.groups,
        "topk_group": config.moe.groups_per_token,
    }


def _save3(config: TransformerConfig) -> dict[str, Any]:
    theirs = _save(config, "DeepSeek V3")
    assert config.moe is not None
    return theirs | {
        "n_group": config.moe.groups,
        "topk_group": config.moe.groups_per_token,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
    }


FAMILIES = {
    "deepseek_v2": decoder.family("DeepseekV2ForCausalLM", _rows, _config2, _save2),
    "deepseek_v3": decoder.family(
        "DeepseekV3ForCausalLM",
        _rows,
        _config3,
        _save3,
        unused=(re.compile(r"model\.layers\.61\..*"),),  # of V3: the layer that foretells two tokens ahead
    ),
}
