"""Parameters to start from that another run, or Hugging Face, has made."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from t5style import run_dir
from t5style.corpus import vocabulary as vocabulary_lib
from t5style.models.config import TransformerConfig
from t5style.train import checkpoint

# Fields that say how a model is computed or drawn, not what its parameters mean.
_FREE_FIELDS = frozenset(
    {
        "dtype",
        "param_dtype",
        "dropout",
        "embedding_noise",
        "attention",
        "attention_blocks",
        "sequence_attention",
        "pipeline",
        "scan_layers",
        "remat",
        "precision",
        "quantized_training",
        "init",
        "init_scale",
        "context_length",
    }
)
# The same of MoE: how experts are balanced, and how many tokens they take.
_FREE_MOE_FIELDS = frozenset(
    {"capacity", "capacity_factor", "balance_loss", "router_z_loss", "bias_update_rate"}
)
# Of a Hugging Face directory; the first that can be told equal needs no library to read tokenizer.json.
_TOKENIZER_FILES = ("vocabulary.json", "spiece.model", "tokenizer.model", "tokenizer.json")


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
        return _from_huggingface(folder, config, shardings, vocabulary)
    found = checkpoint.find(folder)
    metadata = checkpoint.read_metadata(found)
    same_model(TransformerConfig.from_json(metadata["model"]), config, str(found))
    expected = metadata.get("vocabulary_fingerprint")
    if expected is not None and expected != vocabulary.fingerprint:
        raise other_vocabulary(found, expected, vocabulary, found.parent.parent / "vocabulary")
    params = checkpoint.restore_params(found, shardings, abstract=abstract_params)
    lineage = {
        "parent": str(found),
        "parent_step": metadata.get("step"),
        "parent_dataset_fingerprint": metadata.get("data_fingerprint"),
    }
    return Start(params, f"the parameters of {found} (step {metadata.get('step')})", lineage)


def _from_huggingface(
    folder: epath.Path,
    config: TransformerConfig,
    shardings: Any,
    vocabulary: vocabulary_lib.Vocabulary,
) -> Start:
    from t5style.models import convert  # safetensors is only needed here

    source = f"the Hugging Face model {folder}"
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).exists()]
    # A bare SentencePiece model does not say how many sentinels are on top: as many as in the store.
    theirs = (vocabulary_lib.load(file, extra_ids=vocabulary.extra_ids) for file in files)
    if not files:
        source += " (it has no tokenizer file, so nobody has checked that its ids mean what the store's do)"
    elif vocabulary not in theirs:
        other = vocabulary_lib.load(files[0], extra_ids=vocabulary.extra_ids)
        raise other_vocabulary(folder, other.fingerprint, vocabulary, files[0])
    same_model(convert.huggingface_config(str(folder), config.param_dtype), config, str(folder))
    _, params = convert.load_huggingface(str(folder), config.param_dtype, shardings=shardings)
    return Start(params, source, {"parent": str(folder)})


def other_vocabulary(
    found: epath.Path, theirs: str, ours: vocabulary_lib.Vocabulary, where: epath.Path
) -> run_dir.UserError:
    """The error of a parent whose vocabulary is not the token store's."""
    return run_dir.UserError(
        f"init_from {found} was trained with the vocabulary {theirs}, this run's token store has "
        f"{ours.fingerprint}: the same ids would mean other words. Tokenize with the vocabulary in {where}."
    )


def same_model(saved: TransformerConfig, ours: TransformerConfig, where: str) -> None:
    """Raises UserError where parameters of one config mean something else in the other."""
    theirs, mine = dataclasses.asdict(saved), dataclasses.asdict(ours)
    theirs |= {"num_kv_heads": saved.kv_heads, "head_dim": saved.heads_width}
    mine |= {"num_kv_heads": ours.kv_heads, "head_dim": ours.heads_width}
    for fields in (theirs, mine):
        if fields["moe"] is not None:
            fields["moe"] = {
                name: value for name, value in fields["moe"].items() if name not in _FREE_MOE_FIELDS
            }
    for name, value in mine.items():
        if name not in _FREE_FIELDS and theirs[name] != value:
            raise run_dir.UserError(
                f"init_from {where} is of another architecture: its {name} is {theirs[name]!r}, this "
                "model's is "
                f"{value!r}. Give the model the settings it was trained with."
            )
