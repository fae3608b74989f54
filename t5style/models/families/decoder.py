"""What the tables of decoder-only families share: rows, and fields of config.json, both ways."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import THEIR_ACTIVATIONS, Family, Fields, Row, linear, matrix, norm
from t5style.nn.settings import RopeScaling
from t5style.run_dir import UserError

TREES = ("decoder/layers", "decoder/moe_layers")
LAYER = "model.layers.{layer}"


def family(
    architecture: str,
    rows: Callable[[TransformerConfig], Sequence[Row]],
    config: Callable[[Fields], TransformerConfig],
    save_config: Callable[[TransformerConfig], dict[str, Any]],
    **more: Any,
) -> Family:
    """A Family whose embedding and head are where `rows` below has them."""
    return Family(
        architecture=architecture,
        kind="decoder_only",
        rows=rows,
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        config=config,
        save_config=save_config,
        copies=("lm_head.weight",),
        **more,
    )


# --- rows ---


def rows(layer: Callable[[str], Sequence[Row]]) -> tuple[Row, ...]:
    """Rows of a model whose layers have layer(tree), for the tree of layers without experts and with."""
    return (
        Row("embedding", "model.embed_tokens.weight"),
        *linear("head", "lm_head"),
        *norm("decoder/final_norm", "model.norm"),
        *(row for tree in TREES for row in layer(tree)),
    )


def attention(ours: str) -> tuple[Row, ...]:
    """Query, key, value and output projections and the norms of queries and keys."""
    theirs = f"{LAYER}.self_attn"
    return (
        *linear(f"{ours}/attention/query", f"{theirs}.q_proj"),
        *linear(f"{ours}/attention/key", f"{theirs}.k_proj"),
        *linear(f"{ours}/attention/value", f"{theirs}.v_proj"),
        *linear(f"{ours}/attention/output", f"{theirs}.o_proj", 2),
        Row(f"{ours}/attention/query_norm/scale", f"{theirs}.q_norm.weight"),
        Row(f"{ours}/attention/key_norm/scale", f"{theirs}.k_norm.weight"),
    )


def norms(ours: str) -> tuple[Row, ...]:
    """The norms before attention and before the MLP."""
    return (
        *norm(f"{ours}/attention_norm", f"{LAYER}.input_layernorm"),
        *norm(f"{ours}/mlp_norm", f"{LAYER}.post_attention_layernorm"),
    )


def mlp(ours: str, theirs: str = f"{LAYER}.mlp") -> tuple[Row, ...]:
    """A gated MLP."""
    return (
        *linear(f"{ours}/inputs_0", f"{theirs}.gate_proj"),
        *linear(f"{ours}/inputs_1", f"{theirs}.up_proj"),
        *linear(f"{ours}/output", f"{theirs}.down_proj"),
    )


def experts(
    ours: str,
    theirs: str = f"{LAYER}.mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Row, ...]:
    """The router and gated experts that have a tensor each."""
    each = theirs + ".experts.{expert}."
    parts = ("inputs_0", "inputs_1", "output")
    return (
        Row(f"{ours}/router/kernel", f"{theirs}.gate.weight", matrix()),
        *(
            Row(f"{ours}/experts/{part}/kernel", f"{each}{name}.weight", matrix())
            for part, name in zip(parts, names, strict=True)
        ),
    )


# --- config.json -> ours ---


def common(
    fields: Fields,
    *,
    theta: float = 10_000.0,
    tied: bool = False,
    act: str = "hidden_act",
    fraction: bool = False,
    turned: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fields of ours that all these families have.

    Args:
      fields: their config.json.
      theta: the rotary base of a file that names none.
      tied: whether the head is the embedding in a file that does not say.
      act: the field that names the activation.
      fraction: the family honours partial_rotary_factor.
      turned: what `rope` gives, of a family that has its own spelling.
    """
    fields.must_be("attention_dropout", 0.0)
    return {
        "vocab_size": fields.need("vocab_size"),
        "d_model": fields.need("hidden_size"),
        "d_ff": fields.need("intermediate_size"),
        "num_heads": fields.need("num_attention_heads"),
        "num_kv_heads": fields.get("num_key_value_heads"),
        "head_dim": fields.get("head_dim"),
        "decoder_layers": fields.need("num_hidden_layers"),
        "activations": (fields.activation(act, "silu" if act == "hidden_act" else None), "linear"),
        "positions": "rope",
        "norm_eps": fields.need("rms_norm_eps"),
        "tie_embeddings": fields.get("tie_word_embeddings", tied),
        "scale_attention": True,
        "init": "normal",
        "init_scale": fields.get("initializer_range", 0.02),
        "context_length": fields.get("max_position_embeddings"),
        **(rope(fields, theta, fraction) if turned is None else turned),
    }


def rope(fields: Fields, theta: float, fraction: bool = False) -> dict[str, Any]:
    """rope_theta, rope_scaling and, if the family honours it, rope_fraction.

    transformers 4 writes rope_theta and rope_scaling, transformers 5 both in rope_parameters; of a file with
    both, either is read if they agree.
    """
    found = {name: fields.get(name) for name in ("rope_scaling", "rope_parameters")}
    made = [_rope(fields, name, value, theta, fraction) for name, value in found.items() if value]
    if len(made) == 2 and made[0] != made[1]:
        raise fields.error(
            f"rope_scaling = {found['rope_scaling']!r} and rope_parameters = {found['rope_parameters']!r} "
            "contradict each other"
        )
    return made[0] if made else _rope(fields, "rope_parameters", {}, theta, fraction)


def _rope(fields: Fields, name: str, value: Any, theta: float, fraction: bool) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise fields.error(f"{name} = {value!r} is not an object")
    value = dict(value)
    result: dict[str, Any] = {"rope_theta": float(value.pop("rope_theta", fields.get("rope_theta", theta)))}
    if fraction:
        part = fields.get("partial_rotary_factor", 1.0)
        result["rope_fraction"] = float(value.pop("partial_rotary_factor", part))
    return result | {"rope_scaling": scaling(fields, name, value)}


# Names of RopeScaling's fields in theirs, for each kind.
_LENGTH = {"original_length": "original_max_position_embeddings"}
_SETTINGS = {
    "linear": {"factor": "factor"},
    "llama3": {
        **{"factor": "factor", **_LENGTH},
        **{name: name for name in ("low_freq_factor", "high_freq_factor")},
    },
    "yarn": {
        **{"factor": "factor", **_LENGTH},
        **{name: name for name in ("beta_fast", "beta_slow", "truncate")},
        **{name: name for name in ("mscale", "mscale_all_dim", "attention_factor")},
    },
    "longrope": {
        **{"factor": "factor", **_LENGTH, "attention_factor": "attention_factor"},
        **{"short_factors": "short_factor", "long_factors": "long_factor"},
    },
}


def scaling(fields: Fields, name: str, theirs: Mapping[str, Any]) -> RopeScaling | None:
    """Their object of this name, without rope_theta, as ours; None if it scales nothing."""
    values = {key: value for key, value in theirs.items() if value is not None}
    kind = values.pop("rope_type", values.get("type", "default"))
    values.pop("type", None)
    kind = "longrope" if kind == "su" else kind  # Phi-3's first name of it
    if kind not in ("default", *_SETTINGS):
        raise fields.error(
            f"{name} with rope_type = {kind!r} is not supported; default, {', '.join(_SETTINGS)} are"
        )
    known = _SETTINGS.get(kind, {})
    if unknown := sorted(set(values) - set(known.values())):
        raise fields.error(f"{name}.{unknown[0]} = {values[unknown[0]]!r} is not one we honour")
    if kind == "default":
        return None
    ours = {own: values[key] for own, key in known.items() if key in values}
    length = fields.get("max_position_embeddings")
    if "original_length" in known:
        # Phi-3 has it beside the others, and there it counts.
        ours["original_length"] = fields.get(
            "original_max_position_embeddings", ours.get("original_length", length)
        )
    if kind == "longrope" and "factor" not in ours and length and ours["original_length"]:
        ours["factor"] = length / ours["original_length"]
    for setting in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow"):
        if ours.get(setting) == 0:  # the same to transformers as none
            del ours[setting]
    if "factor" not in ours:
        raise fields.error(f"{name} with rope_type = {kind!r} lacks factor")
    try:
        return RopeScaling(kind, **ours)
    except (ValueError, TypeError) as error:
        raise fields.error(f"{name}: {error}") from error


def windows(
    fields: Fields, window: int | None, default: Sequence[str] | None = None, name: str = "sliding_window"
) -> dict[str, Any]:
    """layer_pattern and window of layer_types, or of this list where the file has none.

    Args:
      fields: their config.json.
      window: of the 'sliding_attention' layers; None or 0: there is none.
      default: what the layers are without layer_types.
      name: what gives the window, for an error.
    """
    layers = fields.need("num_hidden_layers")
    types = fields.get("layer_types") or default or ["full_attention"] * layers
    kinds = {"full_attention": "full", "sliding_attention": "window"}
    for each in types:
        if each not in kinds:
            raise fields.error(f"layer_types holds {each!r}; {' and '.join(kinds)} are supported")
    if len(types) != layers:
        raise fields.error(f"layer_types has {len(types)} entries for num_hidden_layers = {layers}")
    if "sliding_attention" in types and not window:
        raise fields.error(f"layer_types holds 'sliding_attention', but {name} gives no window")
    pattern = shortest([kinds[each] for each in types])
    return {"layer_pattern": pattern, "window": window if "window" in pattern else None}


def shortest(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that, repeated, gives these."""
    for size in range(1, len(kinds) + 1):
        if all(kind == kinds[index % size] for index, kind in enumerate(kinds)):
            return tuple(kinds[:size])
    return ("full",)


def sparse_layers(fields: Fields) -> tuple[int, ...] | None:
    """moe_layers by mlp_only_layers and decoder_sparse_step (Qwen)."""
    layers, step = fields.need("num_hidden_layers"), fields.get("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers") or ()
    sparse = tuple(n for n in range(layers) if n not in dense and (n + 1) % step == 0)
    if not sparse:
        raise fields.error(
            f"decoder_sparse_step = {step} and mlp_only_layers = {dense} leave no layer with experts"
        )
    return None if len(sparse) == layers else sparse


def training_of_routers(fields: Fields) -> None:
    """Accounts for settings of routers that concern their training only."""
    fields.ignore("output_router_logits", "router_aux_loss_coef")


# --- ours -> config.json ---


def save_common(config: TransformerConfig, model: str, act: str = "hidden_act") -> dict[str, Any]:
    """What `common` reads. model: the family's name, for an error."""
    theirs = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.heads_width,
        "num_hidden_layers": config.decoder_layers,
        act: save_activation(config, model),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": config.init_scale if config.init == "normal" else 0.02,
        **save_rope(config),
    }
    if config.context_length is not None:
        theirs["max_position_embeddings"] = config.context_length
    return theirs


def save_activation(config: TransformerConfig, model: str) -> str:
    """The name of a gated MLP's activation."""
    activation = THEIR_ACTIVATIONS.get(config.activations[0])
    if activation is None or config.activations[1:] != ("linear",):
        raise UserError(f"a Hugging Face {model} cannot have activations = {config.activations}: it is gated")
    return activation


def save_rope(config: TransformerConfig) -> dict[str, Any]:
    """Both spellings: transformers 4 reads rope_theta and rope_scaling, transformers 5 rope_parameters."""
    settings = save_scaling(config.rope_scaling)
    theirs: dict[str, Any] = {
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, **settings},
    }
    if config.rope_scaling is not None:
        theirs["rope_scaling"] = settings
    return theirs


def save_scaling(ours: RopeScaling | None) -> dict[str, Any]:
    """rope_type and its settings."""
    if ours is None:
        return {"rope_type": "default"}
    theirs = {name: getattr(ours, field) for field, name in _SETTINGS[ours.kind].items()}
    theirs = {name: list(x) if isinstance(x, tuple) else x for name, x in theirs.items() if x is not None}
    return {"rope_type": ours.kind, **theirs}


def save_types(config: TransformerConfig, model: str) -> dict[str, Any]:
    """layer_types and sliding_window."""
    kinds = {"full": "full_attention", "window": "sliding_attention"}
    try:
        types = [kinds[kind.attention] for kind in config.layers_of("decoder")]
    except KeyError as error:
        raise UserError(f"a Hugging Face {model} cannot have layers of kind {error}") from error
    return {"layer_types": types, "sliding_window": config.window}


def one_window(config: TransformerConfig, model: str) -> int | None:
    """sliding_window of a model all of whose layers have it, or none."""
    kinds = sorted({kind.attention for kind in config.layers_of("decoder")})
    if len(kinds) > 1 or kinds == ["full_nope"]:
        raise UserError(
            f"a Hugging Face {model} cannot have layer_pattern = {config.layer_pattern}: its layers are alike"
        )
    return config.window


def need_experts(config: TransformerConfig, model: str) -> None:
    """Refuses a model without experts, which a family is made of."""
    if config.moe is None:
        raise UserError(f"a Hugging Face {model} cannot have moe = None: it has experts")


def numbers_of(config: TransformerConfig, *, experts: bool) -> list[int]:
    """The numbers of layers with experts, or without."""
    return [n for n, kind in enumerate(config.layers_of("decoder")) if kind.experts == experts]
