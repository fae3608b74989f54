"""A model that no training has made, a student or a merged one, as a run folder or a Hugging Face
directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath

from t5style import run_dir
from t5style.infer import chat_template, storage
from t5style.infer.ids import TokenIds, token_ids
from t5style.models import adapters
from t5style.models.adapters_merge import merge_adapters
from t5style.models.config import TransformerConfig
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
    """A model with all its parameters, and no others: adapters are merged into what they adapt.

    Raises:
      UserError: there is no model, or it has an adapter that cannot be merged.
    """
    stored = storage.load(path)
    if not has_adapter(path):
        return stored
    return dataclasses.replace(stored, params=merge_adapters(stored.config, stored.params))


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
    if like.ids is not None:  # what its texts begin and end with, and how its chats look
        run_dir.atomic_write(run.path / storage.IDS, json.dumps(dataclasses.asdict(like.ids)) + "\n")
    if like.path and (templates := chat_template.of(like.path)):
        chat_template.save(templates, run.path / storage.VOCABULARY_FOLDER)
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
