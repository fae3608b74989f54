"""Switch Transformer: T5 1.0 with experts in some layers, one for each token.

An expert's capacity counts real tokens here; transformers counts padding too, so that the two differ where an
expert is full and padding stands before the text. Training adds no noise to the router's inputs.
"""

from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import (
    ACTIVATIONS,
    THEIR_ACTIVATIONS,
    Family,
    Fields,
    Row,
    linear,
    matrix,
)
from t5style.models.families import t5
from t5style.nn.settings import MoE
from t5style.run_dir import UserError


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    rows = [Row("embedding", "shared.weight"), *linear("head", "lm_head")]
    for side, number in (("encoder", "1"), ("decoder", "2")):
        mlp = f"{side}.block.{{layer}}.layer.{number}.mlp"
        dense, sparse = f"{side}/layers/mlp", f"{side}/moe_layers/mlp"
        expert = f"{mlp}.experts.expert_{{expert}}"
        rows += [
            *t5.stack_rows(side),
            *t5.layer_rows(side, "layers", number),
            *linear(f"{dense}/inputs_0", f"{mlp}.wi"),
            *linear(f"{dense}/output", f"{mlp}.wo"),
            *t5.layer_rows(side, "moe_layers", number),
            *linear(f"{sparse}/router", f"{mlp}.router.classifier"),
            Row(f"{sparse}/experts/inputs_0/kernel", f"{expert}.wi.weight", matrix()),
            Row(f"{sparse}/experts/output/kernel", f"{expert}.wo.weight", matrix()),
        ]
    return tuple(rows)


def _sparse(layers: int, sparse: int) -> tuple[int, ...]:
    """The numbers of the layers with experts, as SwitchTransformersStack chooses them."""
    step = layers // sparse if sparse else layers
    return tuple(i for i in range(layers) if step == 1 or (step and i % step == 1))


def _config(fields: Fields) -> TransformerConfig:
    theirs = fields.activation("dense_act_fn", "relu")
    fields.must_be("feed_forward_proj", *(name for name in ACTIVATIONS if ACTIVATIONS[name] == theirs))
    fields.must_be("is_gated_act", False)
    fields.must_be("router_bias", False)
    fields.must_be("router_dtype", "float32")
    # What training adds to the loss and to the router's inputs; steps that follow from the other fields;
    # outputs and an option that no class reads.
    fields.ignore("router_z_loss_coef", "router_aux_loss_coef", "router_jitter_noise")
    fields.ignore("encoder_sparse_step", "decoder_sparse_step")
    fields.ignore("add_router_probs", "router_ignore_padding_tokens", "router_type")
    fields.must_be("add_cross_attention", False)  # of decoder-only models; ours has it anyway
    fields.must_be("batch_prioritized_routing", False)
    shared = t5.shared_fields(fields)
    tied = fields.get("tie_word_embeddings", True)
    return fields.config(
        **shared,
        activations=(theirs,),
        moe=MoE(
            experts=fields.need("num_experts"),
            per_token=1,
            d_ff=shared["d_ff"],
            capacity=fields.get("expert_capacity", 64),
        ),
        moe_encoder_layers=_sparse(shared["encoder_layers"], fields.get("num_sparse_encoder_layers", 3)),
        moe_layers=_sparse(shared["decoder_layers"], fields.get("num_sparse_decoder_layers", 3)),
        tie_embeddings=tied,
        scale_logits=tied,
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    activation = THEIR_ACTIVATIONS.get(config.activations[0])
    moe = config.moe
    if moe is None or activation is None or config.gated:
        raise UserError(
            f"a Hugging Face Switch Transformer cannot have moe = {moe}, activations = {config.activations}"
        )
    if moe.capacity is None:
        raise UserError(
            "a Hugging Face Switch Transformer cannot have moe.capacity = None: its experts have a limit"
        )

    def count(side: str) -> int:
        return sum(kind.experts for kind in config.layers_of(side))

    return t5.shared_entries(config) | {
        "dense_act_fn": activation,
        "num_experts": moe.experts,
        "expert_capacity": moe.capacity,
        "num_sparse_encoder_layers": count("encoder"),
        "num_sparse_decoder_layers": count("decoder"),
        "router_bias": False,
    }


FAMILIES = {
    "switch_transformers": Family(
        architecture="SwitchTransformersForConditionalGeneration",
        kind="encoder_decoder",
        rows=_rows,
        embedding="shared.weight",
        head="lm_head.weight",
        config=_config,
        save_config=_save,
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        tokens=t5.TOKENS,
    ),
}
