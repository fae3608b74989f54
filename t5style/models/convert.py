"""Hugging Face directories (config.json and safetensors) <-> our config and parameters.

A family is a table of rows (convert_tables.py): which of their tensors is which of ours. A tensor or a
config field that no row and no list names is an error, never a silent default.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from t5style import run_dir
from t5style.models.config import DTYPES, TransformerConfig
from t5style.models.convert_tables import FAMILIES, Family, Row
from t5style.models.params import abstract_params
from t5style.run_dir import PathLike, UserError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_BYTES = 5_000_000_000
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def load_huggingface(folder: str | Path, dtype: str = "float32") -> tuple[TransformerConfig, Any]:
    """Config and parameters of a Hugging Face model directory.

    Args:
      folder: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.
      dtype: of the parameters and of the computation: 'float32', 'bfloat16' or 'float16'.

    Returns:
      The config, and the parameters as a tree of NumPy arrays on the host; jax.device_put places them.

    Raises:
      UserError: a file is missing or damaged, the family, a config field or a tensor is not one we honour, a
        tensor is missing or has another shape. The sentence names it.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    folder = Path(folder)
    theirs = _read_json(folder / "config.json")
    family = _family(theirs, folder)
    with _tensors(folder) as (shapes, read):
        config = family.config(theirs, str(folder / "config.json"))
        # transformers 5 writes "tied" for T5 1.1 too; the files say whether it is.
        both = config.tie_embeddings and {family.head, family.embedding} <= set(shapes)
        if both and not np.array_equal(read(family.head), read(family.embedding)):
            config = config.replace(tie_embeddings=False)
        config = config.replace(dtype=dtype, param_dtype=dtype)
        return config, _collect(config, family, shapes, read, folder)


def save_huggingface(
    folder: PathLike,
    config: TransformerConfig,
    params: Any,
    *,
    extra: Mapping[str, Any] | None = None,
    also: Callable[[epath.Path], None] | None = None,
) -> None:
    """Writes a model directory that transformers loads.

    Args:
      folder: to be written; an existing one is replaced as a whole, once the new one is complete.
      config: the model's.
      params: its parameters, arrays of any placement; saved in their own dtype.
      extra: entries for config.json beside those of the model: ids of special tokens, say.
      also: writes what else belongs into the folder, a tokenizer say, before it takes its name.

    Raises:
      UserError: no family of Hugging Face's computes what this config describes; the sentence says what is in
        the way.
    """
    name, family = _family_of(config)
    theirs = family.save_config(config)
    clash = sorted(set(theirs) & set(extra or {}))
    if clash:
        raise UserError(f"extra names {', '.join(clash)}, which the model's own config decides")
    leaves = jax.tree.leaves(params)
    theirs |= {"model_type": name, "architectures": [family.architecture], "dtype": str(leaves[0].dtype)}
    theirs |= dict(family.tokens) | dict(extra or {})
    with run_dir.atomic_folder(folder) as made:
        _write_shards(Path(made), _export(config, family, params))
        (Path(made) / "config.json").write_text(json.dumps(theirs, indent=2, sort_keys=True) + "\n")
        if also is not None:
            also(made)


# --- reading ---


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path} is missing: a Hugging Face model directory has config.json and safetensors files"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, a JSON object is expected")
    return value


def _family(theirs: Mapping[str, Any], folder: Path) -> Family:
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{folder / 'config.json'}: model_type = {kind!r} is not a family we can load "
            f"({', '.join(FAMILIES)})"
        )
    return FAMILIES[kind]


@contextlib.contextmanager
def _tensors(folder: Path) -> Iterator[tuple[dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]]:
    """Shapes by name, and a function that reads one tensor, over all safetensors files of a directory."""
    import safetensors

    if (folder / _SINGLE).is_file():
        files = [folder / _SINGLE]
        placed = None
    elif (folder / _INDEX).is_file():
        placed = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(placed, dict):
            raise UserError(
                f"{folder / _INDEX} has no weight_map: it does not say which file holds which tensor"
            )
        files = [folder / name for name in sorted(set(placed.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"{file} is missing, and {folder / _INDEX} names it: download the directory again"
                )
    else:
        found = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {', '.join(found[:3])} can be converted by transformers' save_pretrained" if found else ""
        raise UserError(f"{folder} has neither {_SINGLE} nor {_INDEX}{hint}")
    with contextlib.ExitStack() as stack:
        shapes: dict[str, tuple[int, ...]] = {}
        homes: dict[str, Any] = {}
        for file in files:
            try:
                # 'flax' and not 'numpy': NumPy alone has no bfloat16.
                opened = stack.enter_context(safetensors.safe_open(str(file), framework="flax"))
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    shapes[name] = tuple(opened.get_slice(name).get_shape())
                    homes[name] = opened
            except safetensors.SafetensorError as error:
                raise UserError(
                    f"{file} is damaged or not a safetensors file ({error}): download it again"
                ) from error
        if placed is not None and set(placed) != set(shapes):
            odd = sorted(set(placed) ^ set(shapes))
            raise UserError(
                f"{folder / _INDEX} and the files disagree about {_some(odd)}: download the directory again"
            )
        yield shapes, lambda name: np.asarray(homes[name].get_tensor(name))


def _collect(
    config: TransformerConfig,
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    folder: Path,
) -> Any:
    dtype = _NUMPY[config.param_dtype]
    params: dict[str, Any] = {}
    used: set[str] = set()
    missing: list[str] = []
    for row, path, shape, layers in _rows(config, family):
        one = shape[1:] if layers else shape
        whole = np.empty(shape, dtype)
        for layer in range(layers or 1):
            name = row.theirs.format(layer)
            if name not in shapes:
                missing.append(name)
                continue
            if shapes[name] != row.their_shape(one):
                raise UserError(
                    f"{folder}: the tensor {name} has shape {list(shapes[name])}, and its config.json "
                    f"makes it {list(row.their_shape(one))}"
                )
            used.add(name)
            value = row.to_ours(read(name), one).astype(dtype)
            if layers:
                whole[layer] = value
            else:
                whole[...] = value
        _put(params, path, whole)
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} tensors that its config.json calls for: {_some(missing)}"
        )
    left = sorted(set(shapes) - used)
    for name in list(left):
        if name in family.copies and name != family.embedding:
            if not np.array_equal(read(name), read(family.embedding)):
                raise UserError(
                    f"{folder}: {name} differs from {family.embedding}; this family has one embedding"
                )
            left.remove(name)
        elif any(pattern.fullmatch(name) for pattern in family.unused):
            left.remove(name)
    if left:
        raise UserError(f"{folder} has {len(left)} tensors with no place in this model: {_some(left)}")
    return params


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


# --- writing ---


def _family_of(config: TransformerConfig) -> tuple[str, Family]:
    for name, family in FAMILIES.items():
        if family.kind == config.architecture:
            return name, family
    raise UserError(f"no Hugging Face family for {config.architecture} models")


def _export(config: TransformerConfig, family: Family, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    known = {path for _, path, _, _ in _rows(config, family)}
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        ours = tuple(str(key.key) for key in path)
        if ours not in known:
            raise UserError(
                f"the parameter {'/'.join(ours)} has no place in a Hugging Face {family.architecture}"
            )
    for row, path, shape, layers in _rows(config, family):
        leaf = params
        for key in path:
            leaf = leaf[key]
        if tuple(leaf.shape) != shape:
            raise UserError(
                f"the parameter {'/'.join(path)} has shape {list(leaf.shape)}; "
                f"the config makes it {list(shape)}"
            )
        for layer in range(layers or 1):
            value = np.asarray(leaf[layer] if layers else leaf)
            yield row.theirs.format(layer), np.ascontiguousarray(row.to_theirs(value))


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    """One model.safetensors, or shards of at most 5 GB and their index: never more than a shard in memory."""
    from safetensors.numpy import save_file

    metadata = {"format": "pt"}  # transformers asks for it: the tensors lie as PyTorch has them
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        shards.append(list(held))
        save_file(held, folder / f"{len(shards)}.part", metadata=metadata)
        held.clear()

    for name, value in tensors:
        if held and sum(array.nbytes for array in held.values()) + value.nbytes > _SHARD_BYTES:
            flush()
        held[name] = value
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (folder / "1.part").rename(folder / _SINGLE)
        return
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        placed |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


# --- both ---


def _rows(
    config: TransformerConfig, family: Family
) -> Iterator[tuple[Row, tuple[str, ...], tuple[int, ...], int]]:
    """Each of our parameters with its row: (row, path, shape, number of layers or 0)."""
    rows = {row.ours: row for row in family.rows(config)}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config)):
        path = tuple(str(key.key) for key in keys)
        layers = leaf.shape[0] if "layers" in path else 0
        try:
            row = rows["/".join(path)]
        except KeyError:
            raise UserError(
                f"the parameter {'/'.join(path)} has no place in a Hugging Face {family.architecture}"
            ) from None
        yield row, path, leaf.shape, layers


def _put(tree: dict[str, Any], path: tuple[str, ...], value: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
