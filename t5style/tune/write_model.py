"""A model that no training has made, a student or a merged one, as a run folder or a Hugging Face
directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from t5style import run_dir
from t5style.infer import storage
from t5style.infer.ids import TokenIds, token_ids
from t5style.models import adapters
from t5style.models.config import TransformerConfig
from t5style.models.params import abstract_params
from t5style.parallel.rules import path_name
from t5style.train import checkpoint

FORMATS = ("run", "huggingface")
FOLDER = "model"


def check_format(name: str) -> None:
    """Raises ValueError for a format that there is not."""
    if name not in FORMATS:
        raise ValueError(f"format is {name!r}; it must be one of {', '.join(FORMATS)}.")


def has_adapter(path: str) -> bool:
    """Whether what lies there is a run, or a checkpoint of one, that has trained an adapter."""
    place = epath.Path(path)
    return any((folder / adapters.FILE).exists() for folder in (place, place.parent, place.parent.parent))


def read(path: str) -> storage.Stored:
    """A model with all its parameters, and no others: what low-rank adapters add is added.

    Raises:
      UserError: it has adapters of another kind.
    """
    stored = storage.load(path)
    tree = folded(stored.params)
    wanted, found = (_names(each) for each in (abstract_params(stored.config), tree))
    if left := sorted(wanted ^ found):
        raise run_dir.UserError(
            f"{path} has {left[0]} beside a model's parameters: of adapters only low-rank ones (LoRA, DoRA) "
            "can be "
            "added to what they adapt. Take the model without it"
        )
    return dataclasses.replace(stored, params=tree)


def _names(tree: Any) -> set[str]:
    return {path_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)}


def folded(params: Any, path: tuple[str, ...] = ()) -> Any:
    """The parameters of a model with low-rank adapters, as those of one without: W + s A B for W, its columns
    scaled to DoRA's magnitudes (models/adapters.Lora).

    Args:
      params: nested dict; of stacked layers if `path`, where it lies, has 'layers' in it.
    """
    if not isinstance(params, Mapping):
        return params
    if "lora_a" not in params:
        return {name: folded(part, (*path, name)) for name, part in params.items()}
    left, right, kernel = (np.asarray(params[name], np.float32) for name in ("lora_a", "lora_b", "kernel"))
    lead = kernel.shape[:1] if {"layers", "moe_layers"} & {*path} else ()
    rank = left.shape[-1]
    product = left.reshape(*lead, -1, rank) @ right.reshape(*lead, rank, -1)  # [layers, inner, outer]
    kernel = kernel.reshape(product.shape) + product
    if "lora_magnitude" in params:
        norm = np.linalg.norm(kernel, axis=-2, keepdims=True)  # [layers, 1, outer]
        kernel *= np.asarray(params["lora_magnitude"], np.float32).reshape(norm.shape) / norm
    rest = {name: value for name, value in params.items() if not name.startswith("lora_")}
    return rest | {"kernel": kernel.reshape(params["kernel"].shape)}


def write(
    run: run_dir.RunDir,
    config: TransformerConfig,
    params: Any,
    like: storage.Stored,
    format: str,
    lineage: Mapping[str, Any],
) -> str:
    """Writes a model; returns where it lies.

    As a 'run' the folder holds what training leaves, with the parameters as the checkpoint of step 0; as
    'huggingface' its folder `model` is a directory that transformers loads.

    Args:
      run: the folder.
      config, params: the model.
      like: where it comes from: vocabulary, ids and family are its.
      format: see above.
      lineage: for `lineage.json`.
    """
    run.create()
    run.write_lineage(lineage)
    if format == "huggingface":
        ids = like.ids or (TokenIds() if like.vocabulary is None else token_ids(like.vocabulary))
        stored = dataclasses.replace(like, config=config, params=params, ids=ids, embedding=None)
        storage.save_huggingface(stored, run.path / FOLDER)
        return str(run.path / FOLDER)
    run_dir.atomic_write(run.path / storage.MODEL_FILE, config.to_json())
    if like.vocabulary is not None:
        like.vocabulary.save(run.path / storage.VOCABULARY_FOLDER)
    keeper = checkpoint.Checkpointer(run.path / storage.CHECKPOINTS)
    metadata = {
        "model": json.loads(config.to_json()),
        "vocabulary_fingerprint": None if like.vocabulary is None else like.vocabulary.fingerprint,
        "data_fingerprint": None,
        "seed": None,
        "step": 0,
    }
    keeper.save(0, {"step": jnp.int32(0), "params": params}, metadata)
    keeper.close()
    return str(run.path)
