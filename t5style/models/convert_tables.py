"""One table per Hugging Face family: tensors (Row) and config fields, both ways.

A new family is a new Family here: its rows, its two functions between their config.json and a
TransformerConfig.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5style.models.config import TransformerConfig
from t5style.run_dir import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor, or one per layer.

    Attributes:
      ours: path in our parameters.
      theirs: their name, with {} for the layer's number.
      inner: how many of our first dimensions are a matrix's input. Their matrices are `[output, input]`, ours
        `[*inner, *outer]`; 0 means that the tensor is the same in both.
    """

    ours: str
    theirs: str
    inner: int = 0

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Their tensor's shape for ours (of one layer)."""
        if not self.inner:
            return tuple(shape)
        return (math.prod(shape[self.inner :]), math.prod(shape[: self.inner]))

    def to_ours(self, value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Their tensor as ours (of one layer)."""
        return (value.T if self.inner else value).reshape(shape)

    def to_theirs(self, value: np.ndarray) -> np.ndarray:
        """Our tensor (of one layer) as theirs."""
        if not self.inner:
            return value
        return value.reshape(math.prod(value.shape[: self.inner]), -1).T


@dataclasses.dataclass(frozen=True)
class Family:
    """A model_type of Hugging Face's.

    Attributes:
      architecture: the class in transformers.
      kind: TransformerConfig.architecture of its models.
      rows: the tensors of a model with this config; rows for parameters it lacks may be among them.
      embedding, head: names of these two tensors.
      copies: names under which a checkpoint may repeat the embedding.
      unused: patterns of tensors that old checkpoints hold and that no model reads.
      tokens: entries of config.json about special tokens, where the family fixes them.
      config: (their config, where it stands) -> ours.
      save_config: ours -> theirs.
    """

    architecture: str
    kind: str
    rows: Callable[[TransformerConfig], tuple[Row, ...]]
    embedding: str
    head: str
    copies: tuple[str, ...]
    unused: tuple[re.Pattern[str], ...]
    tokens: Mapping[str, int]
    config: Callable[[Mapping[str, Any], str], TransformerConfig]
    save_config: Callable[[TransformerConfig], dict[str, Any]]


class Fields:
    """Their config.json, read field by field; what nobody read and no list names is an error."""

    # Fields that change nothing about the model's function: names, versions, token ids (the vocabulary's and
    # the decoder's concern), defaults of their generate(), output options, memory options.
    _INERT = """
        _name_or_path architectures model_type transformers_version torch_dtype dtype auto_map use_cache
        output_past bos_token_id eos_token_id pad_token_id decoder_start_token_id sep_token_id cls_token_id
        unk_token_id forced_bos_token_id forced_eos_token_id bad_words_ids suppress_tokens
        begin_suppress_tokens is_encoder_decoder is_decoder task_specific_params tokenizer_class prefix
        finetuning_task id2label label2id num_labels problem_type classifier_dropout
        return_dict return_dict_in_generate output_hidden_states output_attentions output_scores torchscript
        max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
        top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size num_return_sequences chunk_size_feed_forward remove_invalid_values
        exponential_decay_length_penalty use_bfloat16 tf_legacy_loss gradient_checkpointing n_positions
        pretraining_tp
        """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._read: set[str] = set(self._INERT.split())
        self._where = where

    def get(self, name: str, default: Any = None) -> Any:
        """The field's value, or the default that transformers documents for a file without it."""
        self._read.add(name)
        return self._values.get(name, default)

    def need(self, name: str) -> Any:
        """The value of a field that must be there."""
        if name not in self._values:
            raise self.error(f"lacks the field {name}")
        return self.get(name)

    def must_be(self, name: str, *allowed: Any) -> None:
        """Refuses values of a feature that we do not compute; absent is allowed."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise self.error(
                f"{name} = {value!r} is not supported; only {' or '.join(map(repr, allowed))} is"
            )

    def error(self, text: str) -> UserError:
        """An error that says where the config stands."""
        return UserError(f"{self._where}: {text}")

    def config(self, **fields: Any) -> TransformerConfig:
        """The TransformerConfig, once every field of theirs is accounted for."""
        unknown = sorted(name for name in set(self._values) - self._read if self._values[name] is not None)
        if unknown:
            raise self.error(
                f"the field {unknown[0]} = {self._values[unknown[0]]!r} is not one we honour"
                + (f" (nor {', '.join(unknown[1:])})" if unknown[1:] else "")
                + "; remove it from config.json if it changes nothing about the model"
            )
        try:
            return TransformerConfig(**fields)
        except (ValueError, TypeError) as error:
            raise self.error(str(error)) from error


# Names of activations: theirs -> ours, and back.
_ACTIVATIONS = {
    "relu": "relu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "silu": "silu",
    "swish": "silu",
}
_THEIR_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "gelu_exact": "gelu", "silu": "silu"}


def _refuse(config: TransformerConfig, model: str, **required: Any) -> None:
    """Says which field of ours keeps a config from being a model of theirs."""
    for name, value in required.items():
        if getattr(config, name) != value:
            raise UserError(
                f"a Hugging Face {model} cannot have {name} = {getattr(config, name)!r} (it has {value!r}), "
                "so this model cannot be saved as one"
            )


# --- T5 1.0 and 1.1 ---


def _t5_attention(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        Row(f"{ours}/query/kernel", f"{theirs}.q.weight", 1),
        Row(f"{ours}/key/kernel", f"{theirs}.k.weight", 1),
        Row(f"{ours}/value/kernel", f"{theirs}.v.weight", 1),
        Row(f"{ours}/output/kernel", f"{theirs}.o.weight", 2),
    )


def _t5_stack(side: str, gated: bool) -> tuple[Row, ...]:
    block, layers = f"{side}.block.{{}}.layer", f"{side}/layers"
    mlp = 1 if side == "encoder" else 2
    first = "wi_0" if gated else "wi"
    rows = (
        Row(
            f"{side}/relative_bias/table",
            f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
        Row(f"{side}/final_norm/scale", f"{side}.final_layer_norm.weight"),
        Row(f"{layers}/attention_norm/scale", f"{block}.0.layer_norm.weight"),
        *_t5_attention(f"{layers}/attention", f"{block}.0.SelfAttention"),
        Row(f"{layers}/mlp_norm/scale", f"{block}.{mlp}.layer_norm.weight"),
        Row(f"{layers}/mlp/inputs_0/kernel", f"{block}.{mlp}.DenseReluDense.{first}.weight", 1),
        Row(f"{layers}/mlp/inputs_1/kernel", f"{block}.{mlp}.DenseReluDense.wi_1.weight", 1),
        Row(f"{layers}/mlp/output/kernel", f"{block}.{mlp}.DenseReluDense.wo.weight", 1),
    )
    if side == "encoder":
        return rows
    return (
        *rows,
        Row(f"{layers}/cross_attention_norm/scale", f"{block}.1.layer_norm.weight"),
        *_t5_attention(f"{layers}/cross_attention", f"{block}.1.EncDecAttention"),
    )


def _t5_rows(config: TransformerConfig) -> tuple[Row, ...]:
    return (
        Row("embedding", "shared.weight"),
        Row("head/kernel", "lm_head.weight", 1),
        *_t5_stack("encoder", config.gated),
        *_t5_stack("decoder", config.gated),
    )


def _t5_config(values: Mapping[str, Any], where: str) -> TransformerConfig:
    fields = Fields(values, where)
    # Files of T5 1.0 were written before some of these fields existed, hence the defaults (those of
    # T5Config).
    written = fields.get("feed_forward_proj", "relu")
    gate, _, theirs = str(written).rpartition("-")
    if written == "gated-gelu":
        theirs = "gelu_new"  # T5Config's own exception: T5 1.1 was trained with the tanh approximation
    if gate not in ("", "gated") or theirs not in _ACTIVATIONS:
        raise fields.error(f"feed_forward_proj = {written!r} is not supported")
    fields.must_be("dense_act_fn", theirs)
    fields.must_be("is_gated_act", gate == "gated")
    tied = fields.get("tie_word_embeddings", True)
    layers = fields.need("num_layers")
    return fields.config(
        vocab_size=fields.need("vocab_size"),
        d_model=fields.need("d_model"),
        d_ff=fields.need("d_ff"),
        num_heads=fields.need("num_heads"),
        head_dim=fields.need("d_kv"),
        encoder_layers=layers,
        decoder_layers=fields.get("num_decoder_layers") or layers,
        activations=(_ACTIVATIONS[theirs], "linear") if gate else (_ACTIVATIONS[theirs],),
        relative_buckets=fields.need("relative_attention_num_buckets"),
        relative_max_distance=fields.get("relative_attention_max_distance", 128),
        norm_eps=fields.get("layer_norm_epsilon", 1e-6),
        tie_embeddings=tied,
        # transformers 4 scales exactly when it ties; transformers 5 writes the scaling as a field of its own.
        scale_logits=fields.get("scale_decoder_outputs", tied),
        dropout=fields.get("dropout_rate", 0.1),
        init_scale=fields.get("initializer_factor", 1.0),
    )


def _t5_save(config: TransformerConfig) -> dict[str, Any]:
    _refuse(config, "T5", positions="relative_bias", scale_attention=False, kv_heads=config.num_heads)
    if not config.tie_embeddings:
        _refuse(config, "T5 with an untied head", scale_logits=False)
    activation = _THEIR_ACTIVATIONS.get(config.activations[0])
    if config.gated:
        activation = {"gelu_new": "gelu", "gelu": None}.get(str(activation), activation)
    if activation is None or config.activations[1:] not in ((), ("linear",)):
        raise UserError(f"a Hugging Face T5 cannot have activations = {config.activations}")
    return {
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_ff": config.d_ff,
        "d_kv": config.heads_width,
        "num_heads": config.num_heads,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_logits,
        "dropout_rate": config.dropout,
        "initializer_factor": config.init_scale if config.init == "t5" else 1.0,
        "is_encoder_decoder": True,
    }


# --- LLaMA ---


def _llama_rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    theirs, ours = "model.layers.{}", "decoder/layers"
    return (
        Row("embedding", "model.embed_tokens.weight"),
        Row("head/kernel", "lm_head.weight", 1),
        Row("decoder/final_norm/scale", "model.norm.weight"),
        Row(f"{ours}/attention_norm/scale", f"{theirs}.input_layernorm.weight"),
        Row(f"{ours}/attention/query/kernel", f"{theirs}.self_attn.q_proj.weight", 1),
        Row(f"{ours}/attention/key/kernel", f"{theirs}.self_attn.k_proj.weight", 1),
        Row(f"{ours}/attention/value/kernel", f"{theirs}.self_attn.v_proj.weight", 1),
        Row(f"{ours}/attention/output/kernel", f"{theirs}.self_attn.o_proj.weight", 2),
        Row(f"{ours}/mlp_norm/scale", f"{theirs}.post_attention_layernorm.weight"),
        Row(f"{ours}/mlp/inputs_0/kernel", f"{theirs}.mlp.gate_proj.weight", 1),
        Row(f"{ours}/mlp/inputs_1/kernel", f"{theirs}.mlp.up_proj.weight", 1),
        Row(f"{ours}/mlp/output/kernel", f"{theirs}.mlp.down_proj.weight", 1),
    )


def _rope_theta(fields: Fields) -> float:
    """The rotary base, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it."""
    theta = fields.get("rope_theta", 10_000.0)
    for name in ("rope_scaling", "rope_parameters"):
        settings = fields.get(name)
        if settings is None:
            continue
        if not isinstance(settings, Mapping):
            raise fields.error(f"{name} = {settings!r} is not an object")
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise fields.error(f"{name} with rope_type = {kind!r} is not supported; only 'default' is")
        if unknown := sorted(set(settings) - {"rope_type", "type", "rope_theta"}):
            raise fields.error(f"{name}.{unknown[0]} = {settings[unknown[0]]!r} is not one we honour")
        theta = settings.get("rope_theta", theta)
    return float(theta)


def _llama_config(values: Mapping[str, Any], where: str) -> TransformerConfig:
    fields = Fields(values, where)
    fields.must_be("attention_bias", False)
    fields.must_be("mlp_bias", False)
    fields.must_be("attention_dropout", 0.0)
    activation = fields.get("hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise fields.error(f"hidden_act = {activation!r} is not supported; {', '.join(_ACTIVATIONS)} are")
    return fields.config(
        vocab_size=fields.need("vocab_size"),
        d_model=fields.need("hidden_size"),
        d_ff=fields.need("intermediate_size"),
        num_heads=fields.need("num_attention_heads"),
        num_kv_heads=fields.get("num_key_value_heads"),
        head_dim=fields.get("head_dim"),
        decoder_layers=fields.need("num_hidden_layers"),
        activations=(_ACTIVATIONS[activation], "linear"),
        positions="rope",
        rope_theta=_rope_theta(fields),
        norm_eps=fields.need("rms_norm_eps"),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        scale_attention=True,
        init="normal",
        init_scale=fields.get("initializer_range", 0.02),
        context_length=fields.get("max_position_embeddings"),
    )


def _llama_save(config: TransformerConfig) -> dict[str, Any]:
    _refuse(config, "LLaMA", positions="rope", scale_attention=True, scale_logits=False)
    activation = _THEIR_ACTIVATIONS.get(config.activations[0])
    if activation is None or config.activations[1:] != ("linear",):
        raise UserError(f"a Hugging Face LLaMA cannot have activations = {config.activations}: it is gated")
    if config.d_model % config.num_heads:
        raise UserError(
            f"a Hugging Face LLaMA cannot have d_model = {config.d_model} with num_heads = "
            f"{config.num_heads}: transformers wants a multiple"
        )
    theirs = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.heads_width,
        "num_hidden_layers": config.decoder_layers,
        "hidden_act": activation,
        # Both spellings: transformers 4 reads the first, transformers 5 the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": config.init_scale if config.init == "normal" else 0.02,
    }
    if config.context_length is not None:
        theirs["max_position_embeddings"] = config.context_length
    return theirs


FAMILIES = {
    "t5": Family(
        architecture="T5ForConditionalGeneration",
        kind="encoder_decoder",
        rows=_t5_rows,
        embedding="shared.weight",
        head="lm_head.weight",
        copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        # The first releases of T5 1.0 kept a bias table for cross-attention, which uses none.
        unused=(
            re.compile(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"),
        ),
        tokens={"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
        config=_t5_config,
        save_config=_t5_save,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        kind="decoder_only",
        rows=_llama_rows,
        embedding="model.embed_tokens.weight",
        head="lm_head.weight",
        copies=("lm_head.weight",),
        # Computed from rope_theta; transformers before 4.31 saved it.
        unused=(re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),),
        tokens={},
        config=_llama_config,
        save_config=_llama_save,
    ),
}
