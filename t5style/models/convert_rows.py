"""What a family's conversion table is made of: Row (tensors), Fields (config.json), Family (all of it).

A Row says which tensors of theirs are which parameters of ours; for more than another name it has a
Transform, a pair of pure functions on NumPy arrays. Families that differ little share rows and functions;
what differs is said in small functions of the config.

    linear("decoder/layers/attention/query", "model.layers.{layer}.self_attn.q_proj")

Rows for parameters that a model lacks are left out, so a table may name a bias that only some models have.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t5style.models.config import TransformerConfig
from t5style.run_dir import UserError

Shape = tuple[int, ...]
Arrays = Sequence[np.ndarray]


# --- transforms ---


@dataclasses.dataclass(frozen=True)
class Transform:
    """The tensors of one row, of one layer (and of one expert), both ways.

    The functions are pure, and give views where NumPy can: tensors lie in mapped files, and only what is
    sliced out of a view is read. They must do with any dtype, and to_theirs with arrays of any strides (with
    them the shapes of tensors are found, without data).

    Attributes:
      to_ours: (their tensors, the shapes of ours) -> ours.
      to_theirs: ours -> their tensors.
    """

    to_ours: Callable[[Arrays, Sequence[Shape]], Arrays]
    to_theirs: Callable[[Arrays], Arrays]

    def their_shapes(self, ours: Sequence[Shape]) -> tuple[Shape, ...]:
        """Shapes of their tensors for shapes of ours; a transform that makes views allocates nothing here."""
        blanks = [np.broadcast_to(np.zeros((), np.bool_), shape) for shape in ours]
        return tuple(value.shape for value in self.to_theirs(blanks))


SAME = Transform(lambda theirs, shapes: theirs, lambda ours: ours)


def matrix(inner: int = 1, *, transposed: bool = True, leading: int = 0) -> Transform:
    """A matrix of theirs and a kernel of ours `[*leading, *inner, *outer]`.

    Args:
      inner: how many dimensions of our kernel are its input: 1 for a query `[embed, heads, head_dim]`, 2 for
        attention's output `[heads, head_dim, embed]`.
      transposed: theirs is `[output, input]`, as torch.nn.Linear has it; False: `[input, output]` (GPT-2's
        Conv1D, experts of GPT-OSS).
      leading: how many dimensions come first in both (1: experts that theirs has stacked, too).
    """

    def to_ours(theirs: Arrays, shapes: Sequence[Shape]) -> Arrays:
        (value,), (shape,) = theirs, shapes
        return [(value.swapaxes(-1, -2) if transposed else value).reshape(shape)]

    def to_theirs(ours: Arrays) -> Arrays:
        (value,) = ours
        lead, split = value.shape[:leading], leading + inner
        sizes = math.prod(value.shape[leading:split]), math.prod(value.shape[split:])
        value = value.reshape(*lead, *sizes)
        return [value.swapaxes(-1, -2) if transposed else value]

    return Transform(to_ours, to_theirs)


def vector(*, leading: int = 0) -> Transform:
    """A bias of theirs `[*leading, output]` and ours `[*leading, *outer]`, as `[heads, head_dim]`."""
    return Transform(
        lambda theirs, shapes: [theirs[0].reshape(shapes[0])],
        lambda ours: [ours[0].reshape(*ours[0].shape[:leading], -1)],
    )


def fused(each: Transform, *, axis: int = 0, width: int | None = None) -> Transform:
    """One tensor of theirs that holds several parameters of ours, in the row's order, along its `axis`.

    Args:
      each: the transform of each parameter by itself.
      axis: of their tensor; 0 is the output of a torch.nn.Linear.
      width: None: one after the other (Phi-3's q, k, v and gate, up; GPT-2's c_attn on axis 1). A number: in
        turns of this many (GPT-NeoX: head_dim, for its rows are `[heads, 3, head_dim]`; GPT-OSS: 1 on axis
        -1, its columns are gate, up, gate, up, ...).
    """

    def to_ours(theirs: Arrays, shapes: Sequence[Shape]) -> Arrays:
        (value,) = theirs
        parts = [each.their_shapes([shape])[0] for shape in shapes]
        at = axis % value.ndim
        if width is None:
            values = np.split(value, np.cumsum([part[at] for part in parts])[:-1], at)
        else:
            size = value.shape
            turns = value.reshape(*size[:at], -1, len(parts), width, *size[at + 1 :])
            values = [np.take(turns, i, at + 1).reshape(part) for i, part in enumerate(parts)]
        pairs = zip(values, shapes, strict=True)
        return [each.to_ours([value], [shape])[0] for value, shape in pairs]

    def to_theirs(ours: Arrays) -> Arrays:
        values = [each.to_theirs([value])[0] for value in ours]
        at = axis % values[0].ndim
        if width is None:
            return [np.concatenate(values, at)]
        size = values[0].shape
        turns = [value.reshape(*size[:at], -1, width, *size[at + 1 :]) for value in values]
        return [np.stack(turns, at + 1).reshape(*size[:at], -1, *size[at + 1 :])]

    return Transform(to_ours, to_theirs)


def rotary(each: Transform, width: int, *, start: int = 0) -> Transform:
    """`each`, whose parameters' last dimension has in theirs the pairs (0, 1), (2, 3), ... turned together,
    in ours (0, width/2), (1, width/2 + 1), ...: GPT-J's order and rotate-half.

    Args:
      each: the transform of the row without this.
      width: how many dimensions are turned.
      start: where they begin in our last dimension (DeepSeek: behind those that are not turned).
    """
    halves = np.arange(width).reshape(-1, 2).T.reshape(-1)  # 0, 2, 4, ..., 1, 3, 5, ...

    def permute(values: Arrays, order: np.ndarray) -> Arrays:
        result = []
        for value in values:
            whole = np.arange(value.shape[-1])
            whole[start : start + width] = start + order
            result.append(np.take(value, whole, -1))
        return result

    return Transform(
        lambda theirs, shapes: permute(each.to_ours(theirs, shapes), halves),
        lambda ours: each.to_theirs(permute(ours, np.argsort(halves))),
    )


# --- rows ---


@dataclasses.dataclass(frozen=True)
class Row:
    """One or several parameters of ours, and the one or several tensors of theirs that hold them.

    Attributes:
      ours: paths of our parameters, `decoder/layers/mlp/output/kernel`.
      theirs: names of their tensors. `{layer}`: one for each layer, and the transform gets one layer of ours;
        it becomes the number of the layer in its stack, for parameters of `layers` and `moe_layers` alike.
        `{expert}`: one for each expert too, and the transform gets one expert of ours. Without `{expert}` it
        gets all of them, `[experts, ...]`, and without `{layer}` the whole parameter.
      transform: theirs <-> ours; SAME is for one tensor of the same shape.
      dtype: of parameters that have their own, whatever the model's is.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    transform: Transform = SAME
    dtype: str | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """`ours` as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def names(self) -> tuple[str, ...]:
        """`theirs` as a tuple."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    @property
    def per_layer(self) -> bool:
        """Whether theirs has one tensor for each layer."""
        return "{layer}" in self.names[0]

    @property
    def per_expert(self) -> bool:
        """Whether theirs has one tensor for each expert."""
        return "{expert}" in self.names[0]


def linear(ours: str, theirs: str, inner: int = 1) -> tuple[Row, ...]:
    """Rows of a torch.nn.Linear: `weight` and, in models that have it, `bias`."""
    return (
        Row(f"{ours}/kernel", f"{theirs}.weight", matrix(inner)),
        Row(f"{ours}/bias", f"{theirs}.bias", vector()),
    )


def norm(ours: str, theirs: str) -> tuple[Row, ...]:
    """Rows of an RMSNorm or LayerNorm: `weight` and, in models that have it, `bias`."""
    return Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")


# --- config.json ---


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
        self.where = where

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

    def ignore(self, *names: str) -> None:
        """Says of fields that they change nothing about what a model of this family computes."""
        self._read.update(names)

    def error(self, text: str) -> UserError:
        """An error that says where the config stands."""
        return UserError(f"{self.where}: {text}")

    def activation(self, name: str, default: str | None = None) -> str:
        """The name of our activation for the field of theirs."""
        theirs = self.need(name) if default is None else self.get(name, default)
        if theirs not in ACTIVATIONS:
            raise self.error(f"{name} = {theirs!r} is not supported; {', '.join(ACTIVATIONS)} are")
        return ACTIVATIONS[theirs]

    def dropout(self, *names: str, default: float) -> float:
        """The rate of several dropouts, which with us is one."""
        rates = {name: self.get(name, default) for name in names}
        if len(set(rates.values())) > 1:
            raise self.error(
                "; ".join(f"{name} = {rate!r}" for name, rate in rates.items())
                + ": we have one rate for all, so make them equal (they matter to training only)"
            )
        return float(rates[names[0]])

    def check(self) -> None:
        """Refuses fields that nobody read."""
        unknown = sorted(name for name in set(self._values) - self._read if self._values[name] is not None)
        if unknown:
            raise self.error(
                f"the field {unknown[0]} = {self._values[unknown[0]]!r} is not one we honour"
                + (f" (nor {', '.join(unknown[1:])})" if unknown[1:] else "")
                + "; remove it from config.json if it changes nothing about the model"
            )

    def config(self, **fields: Any) -> TransformerConfig:
        """The TransformerConfig, once every field of theirs is accounted for."""
        self.check()
        try:
            return TransformerConfig(**fields)
        except (ValueError, TypeError) as error:
            raise self.error(str(error)) from error


# Names of activations: theirs -> ours, and back.
ACTIVATIONS = {
    "relu": "relu",
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "silu": "silu",
    "swish": "silu",
}
THEIR_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "gelu_exact": "gelu", "silu": "silu"}


# --- families ---


@dataclasses.dataclass(frozen=True)
class Family:
    """A model_type of Hugging Face's.

    A model can be saved as one of this family if `save_config` does not refuse it, and `config` makes of what
    that wrote a model that computes the same (`computation`). So a feature that the family lacks need not be
    refused: it is enough not to write it.

    Attributes:
      architecture: the class in transformers.
      kind: TransformerConfig.architecture of its models.
      rows: the tensors of a model with this config.
      embedding, head: names of these two tensors; a head None is for models that have none.
      config: their config -> ours.
      save_config: our config -> theirs, without model_type, architectures and dtype.
      copies: names under which a checkpoint may repeat the embedding.
      unused: patterns of tensors that checkpoints may hold and that no model reads.
      tokens: entries of config.json about special tokens, where the family fixes them.
      rename: the name in this table of a tensor in a file, for checkpoints that leave a prefix out, say.
      held: the config with what only the tensors tell, by their names and shapes: whether there is a head.
      saved_as: the family to save it as instead, for one of which only a part is loaded.
    """

    architecture: str
    kind: str
    rows: Callable[[TransformerConfig], Sequence[Row]]
    embedding: str
    head: str | None
    config: Callable[[Fields], TransformerConfig]
    save_config: Callable[[TransformerConfig], dict[str, Any]]
    copies: tuple[str, ...] = ()
    unused: tuple[re.Pattern[str], ...] = ()
    tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rename: Callable[[str], str] = lambda name: name
    held: Callable[[TransformerConfig, Mapping[str, Shape]], TransformerConfig] | None = None
    saved_as: str | None = None


# What may differ between two configs whose models compute the same with the same parameters (dropout: in
# inference).
_FREE = (
    *("dropout", "embedding_noise", "attention", "scan_layers", "remat", "dtype", "param_dtype", "precision"),
    *("quantized_training", "init", "init_scale", "context_length"),
)


def computation(config: TransformerConfig) -> dict[str, Any]:
    """What of a config decides what its model computes, every such thing in one spelling."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in (
        *_FREE,
        *("num_kv_heads", "head_dim", "scale_attention", "attention_scale"),
        *("layer_pattern", "moe_layers", "moe_encoder_layers"),
    ):
        del values[name]
    values |= {
        # Of a family that scales nothing, the first name is the one to be told.
        "scale_attention": config.query_scale != 1.0,
        "attention_scale": config.query_scale,
        "kv_heads": config.kv_heads,
        "heads_width": config.heads_width,
    }
    if config.rope_scaling is not None:  # which of its factors are in use is no part of a model
        values["rope_scaling"] = dataclasses.replace(config.rope_scaling, length_in_use=None)
    for side in ("encoder", "decoder"):
        for number, kind in enumerate(config.layers_of(side)):
            experts = " with experts" if kind.experts else ""
            values[f"layer {number} of the {side}"] = kind.attention + experts
    for positions, prefix in (("rope", "rope_"), ("relative_bias", "relative_")):
        if config.positions != positions:
            values = {name: value for name, value in values.items() if not name.startswith(prefix)}
    return values


def same(one: Any, other: Any) -> bool:
    """Equality, of floats up to rounding: some fields are stored as another number's root or inverse."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def refuse(config: TransformerConfig, model: str, **required: Any) -> None:
    """Says which field of ours keeps a config from being a model of theirs."""
    for name, value in required.items():
        if getattr(config, name) != value:
            raise UserError(
                f"a Hugging Face {model} cannot have {name} = {getattr(config, name)!r} (it has {value!r}), "
                "so this model cannot be saved as one"
            )
