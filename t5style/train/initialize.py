"""Parameters to start from that another run, or Hugging Face, has made."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from etils import epath

from t5style import run_dir
from t5style.corpus import vocabulary as vocabulary_lib
from t5style.models.config import TransformerConfig
from t5style.parallel.rules import path_name
from t5style.train import checkpoint

# Fields that say how a model is computed or drawn, not what its parameters mean.
_FREE_FIELDS = frozenset(
    {
        "dtype",
        "param_dtype",
        "dropout",
        "attention",
        "scan_layers",
        "remat",
        "precision",
        "init",
        "init_scale",
    }
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where parameters came from.

    Attributes:
      params: nested dict of arrays.
      source: in words, with the step if there is one.
      lineage: for `lineage.json`.
    """

    params: Any
    source: str
    lineage: dict[str, Any]


def load_params(
    path: str,
    config: TransformerConfig,
    abstract_params: Any,
    shardings: Any,
    vocabulary: vocabulary_lib.Vocabulary,
) -> Start:
    """Parameters from `path`: a run folder, a checkpoint of one, or a Hugging Face directory.

    Raises:
      UserError: nothing there, another architecture, or another vocabulary; the sentence names the first
        difference.
    """
    folder = epath.Path(path)
    if not folder.exists():
        raise run_dir.UserError(
            f"init_from is {path}, but there is nothing there: give a run folder, a checkpoint, or a "
            "Hugging Face "
            "directory."
        )
    if (folder / "config.json").exists():
        return _from_huggingface(folder, config, abstract_params)
    found = checkpoint.find(folder)
    metadata = checkpoint.read_metadata(found)
    _same_model(TransformerConfig.from_json(metadata["model"]), config, str(found))
    expected = metadata.get("vocabulary_fingerprint")
    if expected is not None and expected != vocabulary.fingerprint:
        raise run_dir.UserError(
            f"init_from {found} was trained with the vocabulary {expected}, this run's token store has "
            f"{vocabulary.fingerprint}: the same ids would mean other words. Tokenize with the vocabulary in "
            f"{found.parent.parent / 'vocabulary'}."
        )
    params = checkpoint.restore_params(found, shardings, abstract=abstract_params)
    lineage = {
        "parent": str(found),
        "parent_step": metadata.get("step"),
        "parent_dataset_fingerprint": metadata.get("data_fingerprint"),
    }
    return Start(params, f"the parameters of {found} (step {metadata.get('step')})", lineage)


def _from_huggingface(folder: epath.Path, config: TransformerConfig, abstract_params: Any) -> Start:
    from t5style.models import convert  # safetensors is only needed here

    saved, params = convert.load_huggingface(str(folder), dtype=config.param_dtype)
    _same_model(saved, config, str(folder))
    want, have = (_shapes(tree) for tree in (abstract_params, params))
    for name in [*want, *have]:
        if want.get(name) != have.get(name):
            raise run_dir.UserError(
                f"init_from {folder} is of another architecture: at {name} it has "
                f"{have.get(name, 'nothing')}, this "
                f"model {want.get(name, 'nothing')}. Give the model the settings of {folder / 'config.json'}."
            )
    return Start(params, f"the Hugging Face model {folder}", {"parent": str(folder)})


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path_name(keys): tuple(x.shape) for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def _same_model(saved: TransformerConfig, ours: TransformerConfig, where: str) -> None:
    theirs, mine = dataclasses.asdict(saved), dataclasses.asdict(ours)
    theirs |= {"num_kv_heads": saved.kv_heads, "head_dim": saved.heads_width}
    mine |= {"num_kv_heads": ours.kv_heads, "head_dim": ours.heads_width}
    for name, value in mine.items():
        if name not in _FREE_FIELDS and theirs[name] != value:
            raise run_dir.UserError(
                f"init_from {where} is of another architecture: its {name} is {theirs[name]!r}, this "
                "model's is "
                f"{value!r}. Give the model the settings it was trained with."
            )
