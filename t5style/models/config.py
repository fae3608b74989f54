"""TransformerConfig: all that defines a model. Families are presets of it (presets.py), not forks of code."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

ACTIVATIONS = ("relu", "gelu", "gelu_exact", "silu", "linear")
POSITIONS = ("relative_bias", "rope")
ATTENTIONS = ("auto", "reference", "cpu", "dot_product")
REMATS = ("none", "full", "dots", "qkv")
DTYPES = ("bfloat16", "float16", "float32")
PRECISIONS = ("default", "high", "highest")
INITS = ("t5", "normal")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A Transformer, encoder-decoder (encoder_layers > 0) or decoder-only (encoder_layers = 0).

    Attributes:
      vocab_size: rows of the embedding, extra ids and padding rows included (T5: 32128).
      d_model, d_ff: widths of the residual stream and of the MLP's hidden layer.
      num_heads, head_dim: attention heads and their width; head_dim None means d_model / num_heads.
      num_kv_heads: heads of keys and values; fewer than num_heads is grouped-query attention (Ainslie et al.
        2023), None means num_heads.
      encoder_layers, decoder_layers: numbers of layers.
      activations: one name for a plain MLP (('relu',): T5 1.0), two for a gated one, whose hidden layer is
        the product (('gelu', 'linear'): T5 1.1; ('silu', 'linear'): LLaMA; Shazeer 2020). 'gelu' is the tanh
        approximation, which T5 1.1 was trained with; 'gelu_exact' uses erf.
      positions: 'relative_bias' (T5: one bucketed bias table per stack, shared by its layers) or 'rope'
        (Su et al. 2021, rotate-half order of the LLaMA checkpoints).
      relative_buckets, relative_max_distance, rope_theta: their settings.
      norm_eps: epsilon of RMSNorm.
      tie_embeddings: the output head is the embedding's transpose.
      scale_logits: multiply the last hidden states by d_model**-0.5 before the head (T5 1.0, which ties).
      scale_attention: multiply attention scores by head_dim**-0.5 (T5 does not; its initialisation absorbs
        it).
      dropout: rate, applied where T5 applies it: embeddings, attention weights, MLP hidden layer, the output
        of every sub-layer and of every stack.
      attention: which implementation (nn/attention.py); 'auto' chooses by platform.
      scan_layers: True scans over the stacked layers (compile time does not grow with depth), False unrolls;
        None chooses by platform. The parameters have the same layout either way.
      remat: what the backward pass recomputes: 'none', 'full' (all of every layer), 'dots' (all but matrix
        products), 'qkv' (all but the query, key and value projections).
      dtype, param_dtype: of activations and of parameters. Norms, softmax and logits are float32 whatever
        dtype is.
      precision: of matrix products of float32 inputs, as jax.lax.Precision names it (TPU and GPU; no effect
        on CPU).
      init: 't5' (Mesh TensorFlow's scales, see nn/initializers.py) or 'normal' (N(0, init_scale), LLaMA).
      init_scale: a factor on T5's standard deviations, or the standard deviation itself for 'normal'.
      context_length: the longest sequence the model is meant for, None if it has no such length (relative
        positions). It changes no computation; those who read or write text look at it.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    decoder_layers: int
    encoder_layers: int = 0
    num_kv_heads: int | None = None
    head_dim: int | None = None
    activations: Sequence[str] = ("gelu", "linear")
    positions: str = "relative_bias"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    scale_logits: bool = False
    scale_attention: bool = False
    dropout: float = 0.0
    attention: str = "auto"
    scan_layers: bool | None = None
    remat: str = "none"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    precision: str = "default"
    init: str = "t5"
    init_scale: float = 1.0
    context_length: int | None = None

    def __post_init__(self) -> None:
        activations = (self.activations,) if isinstance(self.activations, str) else tuple(self.activations)
        object.__setattr__(self, "activations", activations)  # a tuple, so that the config can be hashed
        for name in ("vocab_size", "d_model", "d_ff", "num_heads", "decoder_layers"):
            _whole(name, getattr(self, name), 1)
        for name in ("num_kv_heads", "head_dim", "context_length"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        _whole("encoder_layers", self.encoder_layers, 0, "0 makes a decoder-only model")
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model = {self.d_model} is not a multiple of num_heads = {self.num_heads}: "
                "set head_dim, or change one of them"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.kv_heads}: every "
                "key-value head must serve the same number of query heads"
            )
        if len(activations) not in (1, 2):
            raise ValueError(f"activations = {activations} must name one activation, or two for a gated MLP")
        for name in activations:
            _choice("activations", name, ACTIVATIONS)
        for field, choices in (
            ("positions", POSITIONS),
            ("attention", ATTENTIONS),
            ("remat", REMATS),
            ("dtype", DTYPES),
            ("param_dtype", DTYPES),
            ("precision", PRECISIONS),
            ("init", INITS),
        ):
            _choice(field, getattr(self, field), choices)
        if self.positions == "rope":
            if self.heads_width % 2:
                raise ValueError(
                    f"head_dim = {self.heads_width} must be even for positions = 'rope', which rotates pairs"
                )
            if not self.rope_theta > 1:
                raise ValueError(f"rope_theta = {self.rope_theta} must be greater than 1")
        else:
            # Half of the buckets are exact distances, a quarter of them per direction in an encoder.
            if self.relative_buckets < 4 or self.relative_buckets % 4:
                raise ValueError(
                    f"relative_buckets = {self.relative_buckets} must be a multiple of 4, at least 4"
                )
            if self.relative_max_distance <= self.relative_buckets // 2:
                raise ValueError(
                    f"relative_max_distance = {self.relative_max_distance} must exceed relative_buckets / 2 "
                    f"= {self.relative_buckets // 2}, the distances that have buckets of their own"
                )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout = {self.dropout} must be at least 0 and less than 1")
        for name in ("norm_eps", "init_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.dropout and self.attention == "dot_product":
            raise ValueError(
                f"attention = 'dot_product' cannot drop attention weights (dropout = {self.dropout}): "
                "use 'auto', or dropout 0"
            )

    @property
    def architecture(self) -> str:
        """'encoder_decoder' or 'decoder_only'."""
        return "encoder_decoder" if self.encoder_layers else "decoder_only"

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def heads_width(self) -> int:
        """Width of one head, head_dim or its default."""
        return self.d_model // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def gated(self) -> bool:
        """Whether the MLP's hidden layer is a product of two projections."""
        return len(self.activations) == 2

    def replace(self, **changes: Any) -> "TransformerConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The config as JSON text, what a run folder keeps as model.json."""
        fields = dataclasses.asdict(self) | {"activations": list(self.activations)}
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes | Mapping[str, Any]) -> "TransformerConfig":
        """The config that to_json wrote (or the mapping parsed from it).

        Raises:
          ValueError: not JSON, a field this version does not know, a required field missing, or inconsistent
            values.
        """
        if isinstance(text, Mapping):
            fields = dict(text)
        else:
            try:
                fields = json.loads(text)
            except ValueError as error:
                raise ValueError(f"not a model config: the text is not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(
                f"not a model config: a JSON object is expected, this is {type(fields).__name__}"
            )
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(
                f"the model config has fields this version does not know: {', '.join(unknown)}; "
                "it was written by another version of t5style"
            )
        required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in fields]:
            raise ValueError(f"the model config lacks {', '.join(missing)}")
        return cls(**fields)


def _whole(name: str, value: object, least: int, why: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{name} = {value!r} must be a whole number of at least {least}" + (f" ({why})" if why else "")
        )


def _choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is not one of {', '.join(choices)}")
