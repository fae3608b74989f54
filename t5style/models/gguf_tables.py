"""Models in GGUF files under Hugging Face's names: config.json's fields, and tensors.

llama.cpp's converter renames fields and tensors and changes some of them (its convert_hf_to_gguf.py); here
all of that is undone, so that the tables of Hugging Face's families take it from there. What no table here
names is an error.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from t5style.models import convert_stream
from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import Family, Fields
from t5style.models.families.registry import FAMILIES
from t5style.models.gguf import DTYPES, GgufFile
from t5style.models.gguf_metadata import Keys, decimal, rope_scaling
from t5style.models.params import abstract_params, logical_axes
from t5style.models.safetensors_files import some
from t5style.parallel.rules import param_shardings
from t5style.run_dir import UserError

Reader = Callable[[str], np.ndarray]


def load_gguf(
    file: GgufFile | str | Path, dtype: str = "float32", *, mesh: Mesh | None = None, shardings: Any = None
) -> tuple[TransformerConfig, Any]:
    """Config and parameters of the model in a GGUF file, dequantised layer by layer.

    Args:
      file: the file, or where it is.
      dtype: of the parameters and of the computation: 'float32', 'bfloat16' or 'float16'.
      mesh: divides the parameters by the default rules of parallel/rules.py.
      shardings: a tree of shardings like the parameters', instead of a mesh. Without both, all parameters are
        on the default device.

    Returns:
      The config and the parameters, a tree of jax.Arrays.

    Raises:
      UserError: the file is damaged, or its architecture, a metadata key, a tensor or a tensor's type is not
        one we honour. The sentence names it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    if mesh is not None and shardings is not None:
        raise ValueError("give a mesh or shardings, not both")
    config, placed, read = gguf_rows(file, dtype)
    if mesh is not None:
        shardings = param_shardings(logical_axes(config), abstract_params(config), mesh)
    return config, convert_stream.load(placed, read, dtype, shardings)


def gguf_rows(
    file: GgufFile | str | Path, dtype: str = "float32"
) -> tuple[TransformerConfig, list[convert_stream.Placed], Reader]:
    """What load_gguf loads, see convert.rows."""
    file = file if isinstance(file, GgufFile) else GgufFile(file)
    theirs, shapes, read = huggingface(file, dtype)
    family, config = _family(file, theirs, dtype)
    placed = convert_stream.place(config, family.rows(config), family.architecture)
    used = convert_stream.check(placed, shapes, str(file.path), "metadata")
    if left := sorted(set(shapes) - used):
        raise UserError(f"{file.path} has {len(left)} tensors with no place in this model: {some(left)}")
    return config, placed, read


def gguf_config(file: GgufFile, dtype: str = "float32") -> TransformerConfig:
    """The config of the model in a GGUF file, whose weights are not read."""
    return _family(file, huggingface(file, dtype)[0], dtype)[1]


def _family(file: GgufFile, theirs: Mapping[str, Any], dtype: str) -> tuple[Family, TransformerConfig]:
    if theirs["model_type"] not in FAMILIES:
        raise UserError(f"{file.path}: {theirs['model_type']} models are not supported yet")
    family = FAMILIES[theirs["model_type"]]
    return family, family.config(Fields(theirs, str(file.path))).replace(dtype=dtype, param_dtype=dtype)


def huggingface(
    file: GgufFile, dtype: str = "float32"
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], Reader]:
    """A GGUF file as a Hugging Face directory would hold it.

    Args:
      file: the opened file.
      dtype: of the arrays that `read` gives.

    Returns:
      The fields of config.json; the shapes of the tensors by name; and a function that reads one tensor.

    Raises:
      UserError: an architecture, a metadata key or a tensor that is not supported, or values that contradict
        the tensors.
    """
    keys = Keys(file)
    name = keys.architecture
    if name not in _ARCHITECTURES:
        raise keys.error(f"general.architecture = {name!r} is not supported; {', '.join(_ARCHITECTURES)} are")
    if file.metadata.get("general.type", "model") != "model":
        raise keys.error(f"general.type = {file.metadata['general.type']!r}: it holds no whole model")
    if file.metadata.get("split.count", 1) != 1:
        raise keys.error(
            f"it is one of {file.metadata['split.count']} parts: join them with llama.cpp's "
            "llama-gguf-split --merge"
        )
    architecture = _ARCHITECTURES[name]
    config = _common(keys)
    architecture.settings(keys, config)
    keys.finish()
    sources = _sources(file, architecture, config)
    _check(keys, config)

    def read(wanted: str) -> np.ndarray:
        source = sources[wanted]
        # What is changed by arithmetic is changed in float32; an order may change in any type.
        value = file.read(source.name, "float32" if source.minus_one else dtype, source.index)
        if source.minus_one:
            return (value - np.float32(1)).astype(DTYPES[dtype])
        return _rotate_half(value, source.heads) if source.heads else value

    return config, {wanted: source.shape for wanted, source in sources.items()}, read


@dataclasses.dataclass(frozen=True)
class _Source:
    """Where a tensor of theirs is in the file.

    Attributes:
      name: llama.cpp's.
      shape: theirs.
      index: which expert of a stack, if of one.
      heads: how many heads' rows are to be reordered, if any.
      minus_one: whether 1 was added to it.
    """

    name: str
    shape: tuple[int, ...]
    index: int | None = None
    heads: int = 0
    minus_one: bool = False


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """An architecture of llama.cpp's.

    Attributes:
      settings: adds to config what is its own.
      layer: its tensors of one layer, beside the common ones: llama.cpp's name -> Hugging Face's.
      interleaved: rows of queries and keys lie in pairs (0, d/2, 1, d/2 + 1, ...), as Meta's LLaMA has them.
      plus_one: 1 was added to the factors of norms.
    """

    settings: Callable[["Keys", dict[str, Any]], None]
    layer: Mapping[str, str] = dataclasses.field(default_factory=dict)
    interleaved: bool = False
    plus_one: bool = False


# --- metadata ---


def _common(keys: Keys) -> dict[str, Any]:
    tensors = keys.file.tensors
    if "token_embd.weight" not in tensors:
        raise keys.error("the tensor token_embd.weight is missing")
    if len(tensors["token_embd.weight"].shape) != 2:
        raise keys.error("the tensor token_embd.weight is no matrix")
    # First of all: a count that lies would be many layers to describe.
    count = keys.need("block_count", int)
    layers = {int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if len(layers) != count or layers != set(range(count)):
        raise keys.error(
            f"{keys.architecture}.block_count = {count}, but there are tensors of {len(layers)} layers"
        )
    heads = keys.need("attention.head_count", int)
    width = keys.need("embedding_length", int)
    if heads < 1:
        raise keys.error(f"{keys.architecture}.attention.head_count = {heads} must be at least 1")
    config = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": keys.need("feed_forward_length", int),
        "num_hidden_layers": count,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", int, heads),
        "head_dim": keys.get("attention.key_length", int, width // heads),
        "max_position_embeddings": keys.need("context_length", int),
        "rms_norm_eps": decimal(keys.need("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": decimal(keys.get("rope.freq_base", float, 10_000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    keys.must_be("attention.value_length", int, config["head_dim"])
    keys.must_be("attention.causal", bool, True)
    if (scaling := rope_scaling(keys, config)) is not None:
        config["rope_scaling"] = scaling
    ids = {
        f"{name}_token_id": keys.file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {"model_type": "", **config, **{name: value for name, value in ids.items() if value is not None}}


# --- architectures ---


def _llama(keys: Keys, config: dict[str, Any]) -> None:
    """LLaMA, SmolLM, Mistral and, with experts, Mixtral: llama.cpp has one architecture for them."""
    keys.must_be("rope.dimension_count", int, config["head_dim"])
    experts = keys.get("expert_count", int, 0)
    used = keys.get("expert_used_count", int, 0)
    window = keys.get("attention.sliding_window", int, 0)
    config["hidden_act"] = "silu"
    if experts:
        config |= {
            "num_local_experts": experts,
            "num_experts_per_tok": used,
            "sliding_window": window or None,
        }
        config["model_type"] = "mixtral"
    elif window:
        config |= {"model_type": "mistral", "sliding_window": window}
    else:
        # A bias that only some projections have is found by the family's table: a tensor is missing.
        biased = {name for name in ("attn_q", "ffn_gate") if f"blk.0.{name}.bias" in keys.file.tensors}
        config |= {
            "model_type": "llama",
            "attention_bias": "attn_q" in biased,
            "mlp_bias": "ffn_gate" in biased,
        }


def _qwen2(keys: Keys, config: dict[str, Any]) -> None:
    keys.must_be("rope.dimension_count", int, config["head_dim"])
    if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]:
        del config["head_dim"]  # Qwen 2 has no such field
    config |= {"model_type": "qwen2", "hidden_act": "silu"}


def _qwen3(keys: Keys, config: dict[str, Any]) -> None:
    keys.must_be("rope.dimension_count", int, config["head_dim"])
    config |= {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False}


def _gemma(keys: Keys, config: dict[str, Any]) -> None:
    keys.must_be("rope.dimension_count", int, config["head_dim"])
    config |= {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}


def _query_scalar(config: Mapping[str, Any], largest: int) -> float:
    """query_pre_attn_scalar, which files do not hold: the 27 B models, with this many layers, differ."""
    if config["num_hidden_layers"] == largest:
        return config["hidden_size"] / config["num_attention_heads"]
    return config["head_dim"]


def _pattern(config: Mapping[str, Any], period: int) -> list[str]:
    """layer_types of a model in which every so-many-th layer sees everything."""
    layers = range(1, config["num_hidden_layers"] + 1)
    return ["sliding_attention" if number % period else "full_attention" for number in layers]


def _gemma2(keys: Keys, config: dict[str, Any]) -> None:
    _gemma(keys, config)
    config |= {
        "model_type": "gemma2",
        "query_pre_attn_scalar": _query_scalar(config, 46),
        "attn_logit_softcapping": keys.get("attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": keys.get("final_logit_softcapping", float, 30.0),
        "sliding_window": keys.get("attention.sliding_window", int, 4096),
        "layer_types": _pattern(config, 2),
    }


def _gemma3(keys: Keys, config: dict[str, Any]) -> None:
    _gemma(keys, config)
    period = keys.get("attention.sliding_window_pattern", int, 6)
    config |= {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": _query_scalar(config, 62),
        "final_logit_softcapping": keys.get("final_logit_softcapping", float),
        "sliding_window": keys.need("attention.sliding_window", int),
        "layer_types": _pattern(config, max(period, 1)),
        "rope_local_base_freq": decimal(keys.get("rope.freq_base_swa", float, 10_000.0)),
    }


def _phi3(keys: Keys, config: dict[str, Any]) -> None:
    rotated = keys.get("rope.dimension_count", int, config["head_dim"])
    window = keys.get("attention.sliding_window", int, 0)
    scaling = config.get("rope_scaling")
    if scaling is not None:
        config["original_max_position_embeddings"] = scaling.pop("original_max_position_embeddings", None)
    if rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    if config.pop("head_dim") * config["num_attention_heads"] != config["hidden_size"]:
        raise keys.error("the width of its heads is not hidden size / heads, as Phi-3's must be")
    config |= {"model_type": "phi3", "hidden_act": "silu", "sliding_window": window or None}


_GEMMA_2_3 = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_QUERY_KEY_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MOE = "block_sparse_moe"

_ARCHITECTURES = {
    "llama": _Architecture(
        _llama,
        {
            "ffn_gate_inp": f"{_MOE}.gate",
            "ffn_gate_exps": f"{_MOE}.experts.{{}}.w1",
            "ffn_down_exps": f"{_MOE}.experts.{{}}.w2",
            "ffn_up_exps": f"{_MOE}.experts.{{}}.w3",
        },
        interleaved=True,
    ),
    "qwen2": _Architecture(_qwen2),
    "qwen3": _Architecture(_qwen3, _QUERY_KEY_NORM),
    "gemma": _Architecture(_gemma, plus_one=True),
    "gemma2": _Architecture(_gemma2, _GEMMA_2_3, plus_one=True),
    "gemma3": _Architecture(_gemma3, {**_GEMMA_2_3, **_QUERY_KEY_NORM}, plus_one=True),
    "phi3": _Architecture(_phi3, {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
}


# --- tensors ---

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_SETTINGS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _sources(file: GgufFile, architecture: _Architecture, config: Mapping[str, Any]) -> dict[str, _Source]:
    """Where each of their tensors is."""
    table = {**_LAYER, **architecture.layer}
    rows = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    sources: dict[str, _Source] = {}
    for name, tensor in file.tensors.items():
        if name in _SETTINGS:
            continue
        if name in _WHOLE:
            norm = architecture.plus_one and name == "output_norm.weight"
            sources[_WHOLE[name]] = _Source(name, tensor.shape, minus_one=norm)
            continue
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in table:
            raise UserError(f"{file.path}: the tensor {name} has no place in a model of this architecture")
        theirs = f"model.layers.{match[1]}.{table[match[2]]}.{match[3]}"
        if "{}" in theirs:
            if len(tensor.shape) < 2 or tensor.shape[0] != (experts := config.get("num_local_experts", 0)):
                raise UserError(
                    f"{file.path}: the tensor {name} has shape {list(tensor.shape)} for {experts} experts"
                )
            for expert in range(tensor.shape[0]):
                sources[theirs.format(expert)] = _Source(name, tensor.shape[1:], index=expert)
            continue
        heads = rows.get(match[2], 0) if architecture.interleaved else 0
        norm = architecture.plus_one and match[2].endswith("norm")
        sources[theirs] = _Source(name, tensor.shape, heads=heads, minus_one=norm)
    return sources


def _rotate_half(value: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[heads * head_dim, ...]` in pairs, reordered so that each head's first half meets its second."""
    pairs = value.reshape(heads, -1, 2, *value.shape[1:])
    return pairs.swapaxes(1, 2).reshape(value.shape)


def _check(keys: Keys, config: Mapping[str, Any]) -> None:
    """Compares sizes in the metadata with the tensors: what they describe is going to be allocated."""
    tensors = keys.file.tensors
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    width = config.get("head_dim", config["hidden_size"] // heads)
    if kv_heads < 1 or heads % kv_heads or width < 1:
        raise keys.error(f"{heads} heads of width {width} with {kv_heads} key-value heads are not possible")
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    expected = {
        "token_embd.weight": (config["vocab_size"], hidden),
        "blk.0.attn_q.weight": (heads * width, hidden),
        "blk.0.attn_k.weight": (kv_heads * width, hidden),
        "blk.0.attn_qkv.weight": ((heads + 2 * kv_heads) * width, hidden),
        "blk.0.ffn_down.weight": (hidden, inner),
        "blk.0.ffn_down_exps.weight": (config.get("num_local_experts", 0), hidden, inner),
    }
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            raise keys.error(
                f"the tensor {name} has shape {list(tensors[name].shape)}, and its metadata "
                f"make it {list(shape)}"
            )
