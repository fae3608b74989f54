"""TransformerConfig: all that defines a model. Families are presets of it (presets.py), not forks of code."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from t5style.nn import remat as remat_lib
from t5style.nn.settings import SEQUENCE_ATTENTIONS, AttentionBlocks, MoE, Pipeline, RopeScaling

ACTIVATIONS = ("relu", "gelu", "gelu_exact", "silu", "silu_1702", "linear", "linear_plus_one")
POSITIONS = ("relative_bias", "rope", "learned", "none")
ATTENTIONS = ("auto", "reference", "cpu", "dot_product", "splash", "whole")
REMATS = tuple(remat_lib.POLICIES)
DTYPES = ("bfloat16", "float16", "float32")
QUANTIZED: tuple[str | None, ...] = (None, "int8", "fp8")
PRECISIONS = ("default", "high", "highest")
INITS = ("t5", "normal")
NORMS = ("rms", "layer")
NORM_PLACEMENTS = ("pre", "post", "both", "output")
LAYER_KINDS = ("full", "window", "chunk", "full_nope")
QUERY_KEY_NORMS: tuple[str | None, ...] = (None, "head", "width")


class LayerKind(NamedTuple):
    """What a layer is: its self-attention ('full', 'window' or 'full_nope'), and whether it has experts."""

    attention: str
    experts: bool


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values are made from one short vector
    per token, which is what a cache keeps, with one rotary key shared by all heads.

    Attributes:
      key_value_rank: width of that vector.
      nope_dim, rope_dim: widths of a head's query and key without and with rotary embedding.
      value_dim: width of a head's value.
      query_rank: width of the vector that queries are made from; None makes them from the hidden state.
    """

    key_value_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None

    def __post_init__(self) -> None:
        for name in ("key_value_rank", "nope_dim", "rope_dim", "value_dim"):
            _whole(f"LatentAttention.{name}", getattr(self, name), 1)
        if self.query_rank is not None:
            _whole("LatentAttention.query_rank", self.query_rank, 1)
        if self.rope_dim % 2:
            raise ValueError(f"LatentAttention.rope_dim = {self.rope_dim} must be even: pairs are rotated")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A Transformer: encoder-decoder, decoder-only (encoder_layers = 0) or encoder-only (decoder_layers = 0).

    Attributes:
      vocab_size: rows of the embedding, extra ids and padding rows included (T5: 32128).
      d_model, d_ff: widths of the residual stream and of the MLP's hidden layer.
      num_heads, head_dim: attention heads and their width; head_dim None means d_model / num_heads.
      num_kv_heads: heads of keys and values; fewer than num_heads is grouped-query attention (Ainslie et al.
        2023), None means num_heads.
      encoder_layers, decoder_layers: numbers of layers.
      activations: one name for a plain MLP (('relu',): T5 1.0), two for a gated one, whose hidden layer is
        the product (('gelu', 'linear'): T5 1.1; ('silu', 'linear'): LLaMA; Shazeer 2020). 'gelu' is the tanh
        approximation, which T5 1.1 was trained with; 'gelu_exact' uses erf. nn/activations.py has them all.
      mlp_clamp: bound on what enters a gated MLP's product (GPT-OSS): the gate from above, the other from
        both sides.
      moe: experts in place of the MLP (nn/moe.py), in the layers that moe_layers (decoder) and
        moe_encoder_layers number from 0; None: in all of them.
      positions: 'relative_bias' (T5: one bucketed bias table per stack), 'rope' (Su et al. 2021, rotate-half
        order of the LLaMA checkpoints), 'learned' (a table of context_length rows, added to the embeddings:
        GPT-2, BERT) or 'none'.
      relative_buckets, relative_max_distance, rope_theta: their settings.
      relative_bias_per_layer: every layer has a bias table of its own (UMT5).
      rope_fraction: the part of head_dim, from its beginning, that is rotated (GPT-NeoX: 0.25).
      rope_scaling: how rotary embeddings are stretched to longer contexts (nn/positions.py).
      layer_pattern: what the self-attention of each layer sees, repeated over the layers: 'full'; 'window',
        the last `window` tokens only (Mistral; Gemma 2: ('window', 'full')); 'chunk', those of its own chunk
        of `window` positions (LLaMA 4); 'full_nope', all of them without rotary embedding (SmolLM 3).
      window: how many tokens, itself included, a token of a 'window' layer sees, or at most of a 'chunk' one.
      global_tokens: so many first tokens of each row (which should be one example) are seen by all in
        'window' layers, and see all, in decoders all before them (Longformer, BigBird).
      rope_local_theta: rope_theta of 'window' layers, which then are not scaled (Gemma 3); None: as others.
      norm: 'rms' or 'layer' (LayerNorm).
      norm_eps: its epsilon.
      norm_bias: LayerNorm has a bias.
      norm_plus_one: the factor is 1 + the parameter (Gemma).
      norm_placement: of a sub-layer f: 'pre' x + f(norm(x)); 'post' norm(x + f(x)) (BERT); 'both'
        x + norm(f(norm(x))) (Gemma 2, 3); 'output' x + norm(f(x)) (OLMo 2).
      parallel_layers: x + attention(norm(x)) + mlp(norm(x)), with a norm for each (GPT-NeoX).
      final_norm: normalise the output of each stack.
      embedding_norm: normalise the embeddings (BERT).
      token_types: rows of a second embedding, of which kind a token is (BERT: 2); 0 for none.
      scale_embeddings: multiply embeddings by d_model**0.5 (Gemma).
      attention_bias, attention_output_bias, mlp_bias, head_bias: biases of the query, key and value
        projections, of attention's output, of the MLP's projections, of the head.
      query_key_norm: normalise queries and keys, over each 'head' (Qwen 3, Gemma 3) or over the whole 'width'
        (OLMo 2).
      attention_softcap, logits_softcap: c · tanh(x / c) of attention scores and of logits (Gemma 2).
      attention_sinks: one learned logit for each head in the softmax's denominator (GPT-OSS).
      latent: multi-head latent attention (DeepSeek).
      pooler, classes, masked_head: what stands on an encoder-only model (models/encoder_heads.py): a vector
        made of the first token; a classifier of that many classes, of this vector or without it of every
        token; a head that foretells words, with the embedding as its kernel (BERT).
      tie_embeddings: the output head is the embedding's transpose.
      scale_logits: multiply the last hidden states by d_model**-0.5 before the head (T5 1.0, which ties).
      scale_attention: multiply attention scores by head_dim**-0.5 (T5 does not; its initialisation absorbs
        it).
      attention_scale: another factor instead.
      dropout: rate, applied where T5 applies it: embeddings, attention weights, MLP hidden layer, the output
        of every sub-layer and of every stack.
      embedding_noise: alpha of NEFTune (Jain et al. 2023): in training uniform noise of up to alpha /
        sqrt(length · d_model) is added to the embeddings; length is the mean of the row's examples.
      attention: which implementation (nn/attention.py); 'auto' chooses by platform.
      attention_blocks: tiles of the TPU's kernel.
      sequence_attention: how attention is computed where the mesh divides sequences: 'gather' (XLA gathers
        keys), 'ring' or 'ulysses' (nn/attention_sequence.py).
      pipeline: how layers run where the mesh has stages: microbatches, schedule.
      scan_layers: True scans over the stacked layers (compile time does not grow with depth), False unrolls;
        None chooses by platform. The parameters have the same layout either way.
      remat: what the backward pass recomputes: 'none', 'full' (all of every layer), 'dots' (all but matrix
        products), 'qkv' (all but queries, keys and values) and the other POLICIES of nn/remat.py; or what it
        keeps, on the device and in the host's memory, 'save:query,key,value;offload:mlp_hidden'.
      dtype, param_dtype: of activations and of parameters. Norms, softmax and logits are float32 whatever
        dtype is.
      quantized_training: 'int8' or 'fp8': the products of the layers' projections, forwards and backwards,
        are of 8-bit numbers (nn/quantized_product.py); not those of the embedding, the head, routers and
        routed experts.
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
    decoder_layers: int = 0
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
    embedding_noise: float = 0.0
    attention: str = "auto"
    attention_blocks: AttentionBlocks = dataclasses.field(default_factory=AttentionBlocks)
    sequence_attention: str = "gather"
    pipeline: Pipeline = dataclasses.field(default_factory=Pipeline)
    scan_layers: bool | None = None
    remat: str = "none"
    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    precision: str = "default"
    quantized_training: str | None = None
    init: str = "t5"
    init_scale: float = 1.0
    context_length: int | None = None
    mlp_clamp: float | None = None
    moe: MoE | None = None
    moe_layers: Sequence[int] | None = None
    moe_encoder_layers: Sequence[int] | None = None
    relative_bias_per_layer: bool = False
    rope_fraction: float = 1.0
    rope_scaling: RopeScaling | None = None
    layer_pattern: Sequence[str] = ("full",)
    window: int | None = None
    global_tokens: int = 0
    rope_local_theta: float | None = None
    norm: str = "rms"
    norm_bias: bool = False
    norm_plus_one: bool = False
    norm_placement: str = "pre"
    parallel_layers: bool = False
    final_norm: bool = True
    embedding_norm: bool = False
    token_types: int = 0
    scale_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    query_key_norm: str | None = None
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    attention_sinks: bool = False
    latent: LatentAttention | None = None
    pooler: bool = False
    classes: int = 0
    masked_head: bool = False

    def __post_init__(self) -> None:
        for name in ("activations", "layer_pattern", "moe_layers", "moe_encoder_layers"):
            value = getattr(self, name)  # tuples, so that the config can be hashed
            if value is not None:
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        activations = self.activations
        for name in ("vocab_size", "d_model", "d_ff", "num_heads"):
            _whole(name, getattr(self, name), 1)
        for name in ("num_kv_heads", "head_dim", "context_length", "window"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        _whole("encoder_layers", self.encoder_layers, 0, "0 makes a decoder-only model")
        _whole("decoder_layers", self.decoder_layers, 0, "0 makes an encoder-only model")
        _whole("token_types", self.token_types, 0)
        _whole("global_tokens", self.global_tokens, 0)
        _whole("classes", self.classes, 0)
        if not self.encoder_layers and not self.decoder_layers:
            raise ValueError("encoder_layers and decoder_layers are both 0: a model needs layers")
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
            ("sequence_attention", SEQUENCE_ATTENTIONS),
            ("dtype", DTYPES),
            ("param_dtype", DTYPES),
            ("precision", PRECISIONS),
            ("quantized_training", QUANTIZED),
            ("init", INITS),
            ("norm", NORMS),
            ("norm_placement", NORM_PLACEMENTS),
            ("query_key_norm", QUERY_KEY_NORMS),
        ):
            _choice(field, getattr(self, field), choices)
        remat_lib.parse(self.remat)
        self._check_layers()
        if self.positions == "rope":
            if not 0 < self.rope_fraction <= 1:
                raise ValueError(f"rope_fraction = {self.rope_fraction} must be above 0 and at most 1")
            if self.rotated_width % 2:
                part = "" if self.rope_fraction == 1 else f" (rope_fraction leaves {self.rotated_width})"
                raise ValueError(
                    f"head_dim = {self.heads_width}{part} must be even for positions = 'rope', which rotates "
                    "pairs"
                )
            for name in ("rope_theta", "rope_local_theta"):
                if getattr(self, name) is not None and not getattr(self, name) > 1:
                    raise ValueError(f"{name} = {getattr(self, name)} must be greater than 1")
        elif self.positions == "learned" and self.context_length is None:
            raise ValueError("positions = 'learned' needs context_length, the rows of its table")
        elif self.positions == "relative_bias":
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
        if not self.embedding_noise >= 0.0:
            raise ValueError(f"embedding_noise = {self.embedding_noise} must be 0 or more (NEFTune: 5)")
        for name in (
            "norm_eps",
            "init_scale",
            "mlp_clamp",
            "attention_scale",
            "attention_softcap",
            "logits_softcap",
        ):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be positive")
        if self.dropout and self.attention in ("dot_product", "splash", "whole"):
            raise ValueError(
                f"attention = {self.attention!r} cannot drop attention weights (dropout = {self.dropout}): "
                "use 'auto', or dropout 0"
            )
        if self.dropout and (self.global_tokens or self.sequence_attention == "ring"):
            raise ValueError(
                f"global_tokens = {self.global_tokens}, sequence_attention = {self.sequence_attention!r} and "
                f"dropout = {self.dropout} do not go together: attention in tiles, which global tokens and a "
                "ring need, cannot drop its weights"
            )

    def _check_layers(self) -> None:
        """What the layers differ in."""
        if not self.layer_pattern:
            raise ValueError("layer_pattern is empty: name at least one of " + ", ".join(LAYER_KINDS))
        for kind in self.layer_pattern:
            _choice("layer_pattern", kind, LAYER_KINDS)
        if bool({"window", "chunk"} & set(self.layer_pattern)) != (self.window is not None):
            raise ValueError(
                f"window = {self.window} and layer_pattern = {self.layer_pattern} contradict each other: "
                "layers of kind 'window' and 'chunk' need a window, and others have none"
            )
        if self.global_tokens and "window" not in self.layer_pattern:
            raise ValueError(
                f"global_tokens = {self.global_tokens} is for layers of kind 'window': layer_pattern = "
                f"{self.layer_pattern} has none"
            )
        if "full_nope" in self.layer_pattern and self.positions != "rope":
            raise ValueError(
                "layer_pattern 'full_nope' leaves out rotary embeddings: positions must be 'rope'"
            )
        for name, layers in (
            ("moe_layers", self.decoder_layers),
            ("moe_encoder_layers", self.encoder_layers),
        ):
            numbers = getattr(self, name)
            if numbers is None:
                continue
            if self.moe is None:
                raise ValueError(f"{name} = {numbers} needs moe, the experts' settings")
            if list(numbers) != sorted(set(numbers)) or any(not 0 <= n < layers for n in numbers):
                raise ValueError(f"{name} = {numbers} must be ascending numbers from 0 to {layers - 1}")
        if self.norm_bias and self.norm != "layer":
            raise ValueError("norm_bias = True needs norm = 'layer': RMSNorm has no bias")
        if self.parallel_layers and (self.norm_placement != "pre" or self.encoder_layers):
            raise ValueError(
                f"parallel_layers = True is for decoder-only models with norm_placement = 'pre', not "
                f"{self.norm_placement!r}"
            )
        for name in ("pooler", "classes", "masked_head"):
            if getattr(self, name) and self.decoder_layers:
                raise ValueError(
                    f"{name} = {getattr(self, name)!r} is for encoder-only models (decoder_layers = 0)"
                )
        if self.latent is not None:
            unlike = {
                "num_kv_heads": self.kv_heads == self.num_heads,
                "query_key_norm": self.query_key_norm is None,
                "attention_bias": not self.attention_bias,
                "attention_output_bias": not self.attention_output_bias,
                "positions": self.positions == "rope",
                "rope_fraction": self.rope_fraction == 1,
                "encoder_layers": not self.encoder_layers,
            }
            if wrong := [name for name, fine in unlike.items() if not fine]:
                raise ValueError(
                    f"{wrong[0]} = {getattr(self, wrong[0])!r} does not go with latent attention, which "
                    "has rotary positions, a key for every head, no biases, and no encoder"
                )

    @property
    def architecture(self) -> str:
        """'encoder_decoder', 'decoder_only' or 'encoder_only'."""
        if not self.decoder_layers:
            return "encoder_only"
        return "encoder_decoder" if self.encoder_layers else "decoder_only"

    @property
    def is_random(self) -> bool:
        """Whether training draws random numbers in the model."""
        return self.dropout > 0 or self.embedding_noise > 0

    def layers_of(self, side: str) -> tuple["LayerKind", ...]:
        """What each layer of the 'encoder' or the 'decoder' is."""
        count, experts = (
            (self.encoder_layers, self.moe_encoder_layers)
            if side == "encoder"
            else (self.decoder_layers, self.moe_layers)
        )
        kinds = []
        for index in range(count):
            kind = self.layer_pattern[index % len(self.layer_pattern)]
            moe = self.moe is not None and (experts is None or index in experts)
            kinds.append(LayerKind(kind, moe))
        return tuple(kinds)

    @property
    def rotated_width(self) -> int:
        """How many dimensions of a head are rotated."""
        if self.latent is not None:
            return self.latent.rope_dim
        return int(self.heads_width * self.rope_fraction)

    @property
    def query_scale(self) -> float:
        """The factor on attention scores."""
        if self.attention_scale is not None:
            return self.attention_scale
        if not self.scale_attention:
            return 1.0
        width = self.heads_width if self.latent is None else self.latent.nope_dim + self.latent.rope_dim
        return float(width**-0.5)

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
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

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
        required = [
            name
            for name, field in known.items()
            if field.default is field.default_factory is dataclasses.MISSING
        ]
        if missing := [name for name in required if name not in fields]:
            raise ValueError(f"the model config lacks {', '.join(missing)}")
        for name, kind in (
            ("moe", MoE),
            ("rope_scaling", RopeScaling),
            ("latent", LatentAttention),
            ("attention_blocks", AttentionBlocks),
            ("pipeline", Pipeline),
        ):
            if isinstance(fields.get(name), Mapping):
                try:
                    fields[name] = kind(**fields[name])
                except TypeError as error:
                    raise ValueError(f"the model config's {name}: {error}") from error
        return cls(**fields)


def _whole(name: str, value: object, least: int, why: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{name} = {value!r} must be a whole number of at least {least}" + (f" ({why})" if why else "")
        )


def _choice(name: str, value: object, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r} is not one of {', '.join(map(str, choices))}")
