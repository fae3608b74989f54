"""Hugging Face directories (config.json and safetensors) <-> our config and parameters.

A family is a table of rows (convert_rows.py, families/): which of their tensors is which of ours. A tensor or
a config field that no row and no list names is an error, never a silent default.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from t5style import run_dir
from t5style.models import convert_stream
from t5style.models.config import DTYPES, TransformerConfig
from t5style.models.convert_rows import Family, Fields, computation, same
from t5style.models.families.registry import FAMILIES
from t5style.models.params import abstract_params, logical_axes
from t5style.models.safetensors_files import Tensor, read_folder, read_json, some, write_folder
from t5style.parallel.rules import param_shardings
from t5style.run_dir import PathLike, UserError


def load_huggingface(
    folder: str | Path, dtype: str = "float32", *, mesh: Mesh | None = None, shardings: Any = None
) -> tuple[TransformerConfig, Any]:
    """Config and parameters of a Hugging Face model directory.

    Tensors go to the devices layer by layer, and of each layer only what this process's devices hold is
    read, where a tensor is a transposed or reshaped one of ours: the host holds one layer at a time.

    Args:
      folder: holds config.json and model.safetensors, or model.safetensors.index.json and its shards.
      dtype: of the parameters and of the computation: 'float32', 'bfloat16' or 'float16'.
      mesh: divides the parameters by the default rules of parallel/rules.py.
      shardings: a tree of shardings like the parameters', instead of a mesh. Without both, all parameters are
        on the default device.

    Returns:
      The config and the parameters, a tree of jax.Arrays.

    Raises:
      UserError: a file is missing or damaged, the family, a config field or a tensor is not one we honour, a
        tensor is missing or has another shape. The sentence names it.
    """
    if mesh is not None and shardings is not None:
        raise ValueError("give a mesh or shardings, not both")
    config, placed, tensors = _open(Path(folder), dtype)
    if mesh is not None:
        shardings = param_shardings(logical_axes(config), abstract_params(config), mesh)
    return config, convert_stream.load(placed, lambda name: tensors[name].read(), dtype, shardings)


def huggingface_config(folder: str | Path, dtype: str = "float32") -> TransformerConfig:
    """The config of a Hugging Face model directory, which is checked as load_huggingface does, but not read:
    for those who decide by it where the parameters go, or whether they want them.
    """
    return _open(Path(folder), dtype)[0]


def rows(
    folder: str | Path, dtype: str = "float32"
) -> tuple[TransformerConfig, list[convert_stream.Placed], Callable[[str], np.ndarray]]:
    """What load_huggingface loads, for those who want one parameter after the other: the config, the rows,
    and what reads a tensor of theirs; `convert_stream.load` makes parameters of some of the rows.
    """
    config, placed, tensors = _open(Path(folder), dtype)
    return config, placed, lambda name: tensors[name].read()


def _open(
    folder: Path, dtype: str
) -> tuple[TransformerConfig, list[convert_stream.Placed], dict[str, Tensor]]:
    """All that is checked before any parameter is made."""
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
    theirs = read_json(folder / "config.json")
    family = _family(theirs, folder)
    tensors = _renamed(family, read_folder(folder), folder)
    config = family.config(Fields(theirs, str(folder / "config.json")))
    if family.held is not None:
        config = family.held(config, {name: tensor.shape for name, tensor in tensors.items()})
    # transformers 5 writes "tied" for T5 1.1 too; the files say whether it is.
    if config.tie_embeddings and family.head in tensors and family.embedding in tensors:
        head, embedding = tensors[str(family.head)].read(), tensors[family.embedding].read()
        if not np.array_equal(head, embedding):
            config = config.replace(tie_embeddings=False)
    config = config.replace(dtype=dtype, param_dtype=dtype)
    placed = convert_stream.place(config, family.rows(config), family.architecture)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    used = convert_stream.check(placed, shapes, str(folder))
    _check_left(family, tensors, used, folder)
    _check_dtypes(tensors, used)
    return config, placed, tensors


def save_huggingface(
    folder: PathLike,
    config: TransformerConfig,
    params: Any,
    *,
    family: str | None = None,
    extra: Mapping[str, Any] | None = None,
    also: Callable[[epath.Path], None] | None = None,
) -> None:
    """Writes a model directory that transformers loads, one layer in memory at a time.

    In a job of several processes all of them call this; process 0 writes.

    Args:
      folder: to be written; an existing one is replaced as a whole, once the new one is complete.
      config: the model's.
      params: its parameters, arrays of any placement; saved in their own dtype.
      family: the model_type to save it as, that of the directory it was loaded from, say; None: the first one
        that computes the same.
      extra: entries for config.json beside those of the model: ids of special tokens, say.
      also: writes what else belongs into the folder, a tokenizer say, before it takes its name.

    Raises:
      UserError: no family of Hugging Face's computes what this config describes; the sentence says what is in
        the way.
    """
    name, theirs = family_of(config, family)
    chosen = FAMILIES[name]
    clash = sorted(set(theirs) & set(extra or {}))
    if clash:
        raise UserError(f"extra names {', '.join(clash)}, which the model's own config decides")
    placed = convert_stream.place(config, chosen.rows(config), chosen.architecture)
    planned = convert_stream.plan(placed, params)
    leaves = jax.tree.leaves(params)
    theirs = {"architectures": [chosen.architecture]} | theirs
    theirs |= {"model_type": name, "dtype": str(leaves[0].dtype)}
    theirs |= dict(chosen.tokens) | dict(extra or {})
    if jax.process_index() == 0:
        with run_dir.atomic_folder(folder) as made:
            write_folder(Path(made), planned)
            (Path(made) / "config.json").write_text(json.dumps(theirs, indent=2, sort_keys=True) + "\n")
            if also is not None:
                also(made)
    else:
        for tensor in planned:
            tensor.make()
    run_dir.barrier("save_huggingface")


# --- loading ---


def _family(theirs: Mapping[str, Any], folder: Path) -> Family:
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{folder / 'config.json'}: model_type = {kind!r} is not a family we can load "
            f"({', '.join(FAMILIES)})"
        )
    if quantised := theirs.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise UserError(
            f"{folder / 'config.json'}: quantization_config says that the weights are quantised ({method}), "
            "which we do not load: take the checkpoint in bfloat16 or float32"
        )
    return FAMILIES[kind]


def _renamed(family: Family, found: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if (ours := family.rename(name)) in tensors:
            raise UserError(f"{folder} holds the tensor {ours} under two names, {name} is one of them")
        tensors[ours] = tensor
    return tensors


def _check_left(family: Family, tensors: Mapping[str, Tensor], used: set[str], folder: Path) -> None:
    """Refuses tensors that no row uses, but for those the family knows to be copies or of no use."""
    left = []
    for name in sorted(set(tensors) - used):
        if name in family.copies and family.embedding in tensors:
            if not np.array_equal(tensors[name].read(), tensors[family.embedding].read()):
                raise UserError(
                    f"{folder}: {name} differs from {family.embedding}; this family has one embedding"
                )
        elif not any(pattern.fullmatch(name) for pattern in family.unused):
            left.append(name)
    if left:
        raise UserError(f"{folder} has {len(left)} tensors with no place in this model: {some(left)}")


def _check_dtypes(tensors: Mapping[str, Tensor], used: set[str]) -> None:
    for name in sorted(used):
        tensors[name].check_dtype()


# --- saving ---


def family_of(config: TransformerConfig, family: str | None) -> tuple[str, dict[str, Any]]:
    """The name of the family to save as, and its config.json."""
    if family is not None and family not in FAMILIES:
        raise UserError(f"family = {family!r} is not one of {', '.join(FAMILIES)}")
    family = family and (FAMILIES[family].saved_as or family)
    names = [family] if family else [n for n in FAMILIES if FAMILIES[n].kind == config.architecture]
    reasons: list[UserError] = []
    for name in names:
        try:
            return name, _described(config, name)
        except UserError as error:
            reasons.append(error)
    if not reasons:
        raise UserError(f"no Hugging Face family for {config.architecture} models")
    if len(reasons) == 1:
        raise reasons[0]
    raise UserError(
        f"{reasons[0]}; nor is it a model of another family ({', '.join(names[1:])}): with family='...' you "
        "are told what is in the way"
    )


def _described(config: TransformerConfig, name: str) -> dict[str, Any]:
    """Their config.json, once it has been seen to describe the same computation."""
    family = FAMILIES[name]
    if family.kind != config.architecture:
        raise UserError(f"a Hugging Face {family.architecture} is {family.kind}, not {config.architecture}")
    theirs = family.save_config(config)
    ours = computation(config)
    back = family.config(Fields({"model_type": name, **theirs}, f"the config.json of {name}"))
    if family.held is not None:
        placed = convert_stream.place(config, family.rows(config), family.architecture)
        back = family.held(back, dict(tensor for one in placed for tensor in one.tensors()))
    again = computation(back)
    for field in ours | again:
        if not same(ours.get(field), again.get(field)):
            raise UserError(
                f"a Hugging Face {family.architecture} cannot have {field} = {ours.get(field)!r} (it would "
                f"have {again.get(field)!r}), so this model cannot be saved as one"
            )
    return theirs
