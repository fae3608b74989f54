"""T5X checkpoints, as Google publishes T5 1.1, mT5, UMT5 and FLAN-T5: the model of a directory -> ours.

Such a directory (t5x/checkpoints.py) has a msgpack file `checkpoint`, whose leaves are small arrays or say
where an array is, and a zarr array for each parameter, `target.encoder.layers_0.attention.query.kernel`; what
begins with `state.` is the optimiser's and is not read. Names and shapes are those of t5x/examples/t5 and of
t5x/examples/scalable_t5, which scans its layers: one array [first, layers, ...] in place of one per layer.

There is no config. Sizes come from shapes: the table of relative positions is [heads, buckets]; a model
without logits_dense ties its embeddings (and scales, as T5 1.0). What shapes do not say comes from arguments,
then from the network's gin settings beside the checkpoint, then from what T5 is: a gated MLP is gelu's (1.1),
another one relu's (1.0).
"""

import ast
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from t5style.models import convert_stream
from t5style.models.config import DTYPES, TransformerConfig
from t5style.models.convert_rows import SAME, Row, Transform, matrix
from t5style.models.params import abstract_params, logical_axes
from t5style.models.safetensors_files import some
from t5style.parallel.rules import param_shardings
from t5style.run_dir import PathLike, UserError

_INDEX, _PREFIX = "checkpoint", "target."
_CACHE_BYTES = 256_000_000  # of decoded chunks: one chunk may hold pieces of all layers
_GIN_FILES = ("config.gin", "operative_config.gin", "model-info.txt")

Tensors = dict[str, "_Tensor"]


def load_t5x(
    folder: PathLike,
    dtype: str = "float32",
    *,
    mesh: Mesh | None = None,
    shardings: Any = None,
    **fields: Any,
) -> tuple[TransformerConfig, Any]:
    """Config and parameters of a T5X checkpoint, read layer by layer.

    Args:
      folder: `checkpoint_1000000`, say, on a disk or on gs://.
      dtype: of the parameters and of the computation: 'float32', 'bfloat16' or 'float16'.
      mesh: divides the parameters by the default rules of parallel/rules.py.
      shardings: a tree of shardings like the parameters', instead of a mesh. Without both, all parameters are
        on the default device.
      **fields: fields of TransformerConfig that shapes do not decide: activations, dropout,
        relative_max_distance, norm_eps, scale_logits.

    Returns:
      The config and the parameters, a tree of jax.Arrays.

    Raises:
      UserError: a file is missing or damaged, a tensor is missing, has no place in T5 or a shape that does
        not go with the others'. The sentence names it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    if mesh is not None and shardings is not None:
        raise ValueError("give a mesh or shardings, not both")
    where = os.fspath(folder)
    tensors = _open(where)
    config = _config(tensors, where, _gin(where), fields).replace(dtype=dtype, param_dtype=dtype)
    placed = convert_stream.place(config, _rows(config), "T5 of T5X")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    used = convert_stream.check(placed, shapes, where, "other tensors' shapes")
    if left := sorted(set(shapes) - used):
        raise UserError(f"{where} has {len(left)} tensors with no place in this model: {some(left)}")
    if mesh is not None:
        shardings = param_shardings(logical_axes(config), abstract_params(config), mesh)
    return config, convert_stream.load(placed, lambda name: tensors[name].read(), dtype, shardings)


def is_t5x(folder: PathLike) -> bool:
    """Whether a directory looks like a T5X checkpoint."""
    path = epath.Path(folder)
    return (path / _INDEX).is_file() and (path / f"{_PREFIX}token_embedder.embedding").is_dir()


# --- files ---


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A parameter, of one layer where there are layers.

    Attributes:
      name: in the checkpoint, for errors.
      array: a TensorStore or a NumPy array.
      layer: which part of the array's dimension 1, if it holds all layers.
      shape: as t5x/examples/t5 has it, with heads and head_dim in one dimension.
    """

    name: str
    array: Any
    layer: int | None
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The values."""
        array = self.array if self.layer is None else self.array[:, self.layer]
        try:
            value = array if isinstance(array, np.ndarray) else array.read().result()
        except Exception as error:  # TensorStore raises ValueError, OSError and others
            raise UserError(f"{self.name} cannot be read, copy it again: {error}") from error
        return np.asarray(value).reshape(self.shape)


def _open(where: str) -> Tensors:
    """All parameters of the model, by the names of a model that does not scan."""
    arrays = _arrays(where)
    tensors: Tensors = {}
    for name, array in arrays.items():
        shape = tuple(array.shape)
        full = f"{where}/{_PREFIX}{name}"
        match = re.fullmatch(r"(encoder|decoder)\.\1\.(.+)", name)
        if match is None:
            tensors[name] = _Tensor(full, array, None, _joined(name, shape))
            continue
        if len(shape) < 2:
            raise UserError(f"{full} has shape {list(shape)}, [first, layers, ...] is expected")
        for layer in range(shape[1]):
            one = f"{match[1]}.layers_{layer}.{match[2]}"
            if one in tensors:
                raise UserError(f"{where} holds {one} both by itself and in {name}")
            tensors[one] = _Tensor(full, array, layer, _joined(name, (shape[0], *shape[2:])))
    return tensors


def _joined(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with heads and head_dim in one dimension."""
    if len(shape) == 3 and name.endswith(".out.kernel"):
        return shape[0] * shape[1], shape[2]
    if len(shape) == 3 and re.search(r"\.(query|key|value)\.kernel$", name):
        return shape[0], shape[1] * shape[2]
    return shape


def _arrays(where: str) -> dict[str, Any]:
    """TensorStores and NumPy arrays by name, without `target.`."""
    import tensorstore

    root = where if "://" in where else "file://" + os.path.abspath(where)
    try:
        store = tensorstore.KvStore.open(root.rstrip("/") + "/").result()
        keys = [key.decode() for key in store.list().result()]
    except Exception as error:  # TensorStore raises ValueError, OSError and others
        raise UserError(f"{where} cannot be read: {error}") from error
    files: dict[str, int] = {}  # how many chunks there are
    for key in keys:
        head, _, tail = key.partition("/")
        if head.startswith(_PREFIX) and not tail.startswith("."):
            files[head] = files.get(head, 0) + 1
        elif head.startswith(_PREFIX) and tail == ".zarray":
            files.setdefault(head, 0)
    named = _index(store, where) if _INDEX in keys else {name: name for name in files}
    if not named:
        raise UserError(
            f"{where} is no T5X checkpoint: it has neither the file {_INDEX} nor folders {_PREFIX}*; name "
            "the folder of one step, checkpoint_1000000, say"
        )
    if absent := sorted(name for name, at in named.items() if isinstance(at, str) and at not in files):
        raise UserError(f"{where} lacks the arrays {some(absent)}, which {_INDEX} names: copy it again")
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    opening = {
        name: tensorstore.open(
            {"driver": "zarr", "kvstore": f"{root.rstrip('/')}/{at}/"}, open=True, read=True, context=context
        )
        for name, at in named.items()
        if isinstance(at, str)
    }
    arrays: dict[str, Any] = {}
    for name, at in named.items():
        short = name.removeprefix(_PREFIX)
        if not isinstance(at, str):
            arrays[short] = at
            continue
        try:
            opened = opening[name].result()
        except Exception as error:  # as above
            raise UserError(f"{where}/{at} is damaged, copy it again: {error}") from error
        if not opened.dtype.name.startswith(("float", "bfloat")):
            raise UserError(f"{where}/{at} holds {opened.dtype.name}, which is no floating point")
        # A chunk that is not there reads as zeros.
        chunks = opened.chunk_layout.write_chunk.shape or ()
        wanted = math.prod(
            -(-size // int(chunk or 1)) for size, chunk in zip(opened.shape, chunks, strict=True)
        )
        if files[at] != wanted:
            raise UserError(f"{where}/{at} has {files[at]} of its {wanted} chunks: copy it again")
        arrays[short] = opened
    return arrays


def _index(store: Any, where: str) -> dict[str, Any]:
    """What the file `checkpoint` says about the model: a folder's name, or the array, for each parameter."""
    from flax import serialization, traverse_util

    try:
        content = serialization.msgpack_restore(store.read(_INDEX).result().value)
        tree = content["optimizer"]["target"]
        # A leaf is a description of an array, which is a dict too.
        leaves = traverse_util.flatten_dict(tree, is_leaf=lambda _, value: "kvstore" in value)
    except Exception as error:  # msgpack and flax raise whatever there is
        raise UserError(
            f"{where}/{_INDEX} is damaged or not T5X's: {type(error).__name__} {error}; copy it again"
        ) from error
    named: dict[str, Any] = {}
    for path, leaf in leaves.items():
        name = _PREFIX + ".".join(map(str, path))
        if isinstance(leaf, Mapping):
            named[name] = str(leaf["kvstore"].get("path", name)).rstrip("/").rpartition("/")[2]
        elif isinstance(leaf, str | bytes):  # Orbax: 'PLACEHOLDER://target.encoder...'
            named[name] = name
        elif isinstance(leaf, np.ndarray):
            named[name] = leaf
        else:
            raise UserError(f"{where}/{_INDEX} holds a {type(leaf).__name__} for {name}")
    return named


# --- config ---

# Fields of network.T5Config that shapes decide (with ours), and those that change no result.
_GIN_SIZES = {
    "vocab_size": "vocab_size",
    "emb_dim": "d_model",
    "mlp_dim": "d_ff",
    "num_heads": "num_heads",
    "head_dim": "head_dim",
    "num_encoder_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "logits_via_embedding": "tie_embeddings",
}
_GIN_FREE = {"dtype", "float32_attention_logits", "scan_layers", "remat_policy"}
_GIN_OURS = {"mlp_activations": "activations", "dropout_rate": "dropout"}


def _gin(where: str) -> dict[str, Any]:
    """The settings of network.T5Config in a gin file beside the checkpoint or in the folder above."""
    folder = epath.Path(where)
    found = (one / name for one in (folder, folder.parent) for name in _GIN_FILES)
    file = next((file for file in found if file.is_file()), None)
    if file is None:
        return {}
    text = file.read_text().replace("\\\n", "")
    macros = dict(re.findall(r"^(\w+)[ \t]*=[ \t]*(.+)$", text, re.MULTILINE))
    settings: dict[str, Any] = {}
    for name, value in re.findall(r"^[\w./]*\bT5Config\.(\w+)[ \t]*=[ \t]*(.+)$", text, re.MULTILINE):
        if name in _GIN_FREE:
            continue
        value = macros.get(value[1:], value) if value.startswith("%") else value
        try:
            settings[name] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as error:
            raise UserError(f"{file}: T5Config.{name} = {value} is not a plain value") from error
        if name not in _GIN_SIZES | _GIN_OURS:
            raise UserError(f"{file}: T5Config.{name} = {value} is not one we honour")
    return settings


def _config(
    tensors: Tensors, where: str, gin: Mapping[str, Any], fields: Mapping[str, Any]
) -> TransformerConfig:
    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if name not in tensors:
            raise UserError(f"{where} lacks {_PREFIX}{name}: it is no T5 encoder-decoder of T5X's")
        if len(tensors[name].shape) != dimensions:
            raise UserError(f"{where}: {_PREFIX}{name} has shape {list(tensors[name].shape)}")
        return tensors[name].shape

    per_layer = "encoder.layers_0.relpos_bias.rel_embedding" in tensors
    table = "encoder.layers_0.relpos_bias" if per_layer else "encoder.relpos_bias"
    heads, buckets = shape(f"{table}.rel_embedding")
    width = shape("encoder.layers_0.attention.query.kernel")[1]
    if width % heads:
        raise UserError(f"{where}: queries of {width} numbers cannot be those of {heads} heads")
    gated = "encoder.layers_0.mlp.wi_0.kernel" in tensors
    tied = "decoder.logits_dense.kernel" not in tensors
    vocab_size, d_model = shape("token_embedder.embedding")
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": shape(f"encoder.layers_0.mlp.{'wi_0' if gated else 'wi'}.kernel")[1],
        "num_heads": heads,
        "head_dim": width // heads,
        "encoder_layers": _layers(tensors, "encoder"),
        "decoder_layers": _layers(tensors, "decoder"),
        "relative_buckets": buckets,
        "relative_bias_per_layer": per_layer,
        "tie_embeddings": tied,
    }
    if clash := sorted(set(fields) & set(sizes)):
        raise UserError(f"{where}: {', '.join(clash)} cannot be given, the checkpoint's shapes decide it")
    for theirs, ours in _GIN_SIZES.items():
        if theirs in gin and gin[theirs] != sizes[ours]:
            raise UserError(
                f"{where}: its gin file says T5Config.{theirs} = {gin[theirs]!r}, its tensors {sizes[ours]!r}"
            )
    others: dict[str, Any] = {
        "activations": ("gelu", "linear") if gated else ("relu",),
        "scale_logits": tied,
        **{ours: gin[theirs] for theirs, ours in _GIN_OURS.items() if theirs in gin},
        **fields,
    }
    try:
        config = TransformerConfig(**sizes, **others)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error
    if config.gated != gated:
        raise UserError(
            f"{where}: activations = {config.activations} do not go with its MLP, which has "
            f"{'wi_0 and wi_1' if gated else 'wi'}"
        )
    return config


def _layers(tensors: Tensors, side: str) -> int:
    """How many layers there are; that none of them is missing is checked with the tensors."""
    found = (re.match(rf"{side}\.layers_(\d+)\.", name) for name in tensors)
    return len({match[1] for match in found if match})


# --- tensors ---


def _kernel(ours: str, theirs: str, transform: Transform) -> Row:
    return Row(f"{ours}/kernel", f"{theirs}.kernel", transform)


def _attention(ours: str, theirs: str) -> tuple[Row, ...]:
    into, out = matrix(1, transposed=False), matrix(2, transposed=False)
    return (
        *(_kernel(f"{ours}/{name}", f"{theirs}.{name}", into) for name in ("query", "key", "value")),
        _kernel(f"{ours}/output", f"{theirs}.out", out),
    )


def _stack(side: str, own: str, gated: bool) -> tuple[Row, ...]:
    ours, theirs = f"{side}/layers", f"{side}.layers_{{layer}}"
    plain, table = matrix(1, transposed=False), matrix()
    inputs = ("wi_0", "wi_1") if gated else ("wi",)
    return (
        Row(f"{side}/relative_bias/table", f"{side}.relpos_bias.rel_embedding", table),
        Row(f"{ours}/relative_bias/table", f"{theirs}.relpos_bias.rel_embedding", table),
        Row(f"{side}/final_norm/scale", f"{side}.{side}_norm.scale", SAME),
        Row(f"{ours}/attention_norm/scale", f"{theirs}.pre_{own}_layer_norm.scale"),
        *_attention(f"{ours}/attention", f"{theirs}.{own}"),
        Row(f"{ours}/cross_attention_norm/scale", f"{theirs}.pre_cross_attention_layer_norm.scale"),
        *_attention(f"{ours}/cross_attention", f"{theirs}.encoder_decoder_attention"),
        Row(f"{ours}/mlp_norm/scale", f"{theirs}.pre_mlp_layer_norm.scale"),
        *(_kernel(f"{ours}/mlp/inputs_{i}", f"{theirs}.mlp.{name}", plain) for i, name in enumerate(inputs)),
        _kernel(f"{ours}/mlp/output", f"{theirs}.mlp.wo", plain),
    )


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    return (
        Row("embedding", "token_embedder.embedding"),
        _kernel("head", "decoder.logits_dense", matrix(1, transposed=False)),
        *_stack("encoder", "attention", config.gated),
        *_stack("decoder", "self_attention", config.gated),
    )
