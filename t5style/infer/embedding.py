"""How a text's embedding is made of its tokens', as sentence-transformers writes it beside a model."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath

from t5style.run_dir import UserError, atomic_write

POOLINGS = ("mean", "first", "max")
_MODULES, _TEXTS = "modules.json", "sentence_bert_config.json"
# Their names for poolings: fields of 1_Pooling/config.json, and values of its newer field pooling_mode.
_FIELDS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "first",
    "pooling_mode_max_tokens": "max",
}
_MODES = {"mean": "mean", "cls": "first", "max": "max"}


@dataclasses.dataclass(frozen=True)
class Embedding:
    """How a text's embedding is made.

    Attributes:
      pooling: of the real tokens' vectors: their 'mean' (Ni et al. 2022, "encoder mean"), the 'first' one
        (BERT's [CLS]) or the 'max' of each dimension.
      normalize: divide it by its length.
      max_length: the most tokens of a text, those that open and close it included; None: the model's own
        limit.
    """

    pooling: str = "mean"
    normalize: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling = {self.pooling!r} is not one of {', '.join(POOLINGS)}")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length = {self.max_length} must be at least 1")

    def finish(self, pooled: np.ndarray) -> np.ndarray:
        """`[texts, embed]`, of length 1 if they are to be."""
        if not self.normalize:
            return pooled
        length = np.sqrt((pooled.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
        return (pooled / np.maximum(length, 1e-12)).astype(np.float32)


def read(folder: epath.Path) -> Embedding | None:
    """What a directory of sentence-transformers says; None for other directories.

    Raises:
      UserError: it has a module or an option that we do not compute.
    """
    if not (folder / _MODULES).exists():
        return None
    pooling, normalize = "mean", False
    modules = _json(folder / _MODULES)
    for module in modules if isinstance(modules, list) else [modules]:
        kind = str(module.get("type") if isinstance(module, dict) else module)
        if kind.endswith(".Pooling"):
            pooling = _pooling(folder / module.get("path", "") / "config.json")
        elif kind.endswith(".Normalize"):
            normalize = True
        elif not kind.endswith(".Transformer"):
            raise UserError(
                f"{folder / _MODULES}: the module {kind} is not supported; only Transformer, Pooling and "
                "Normalize are"
            )
    longest = None
    if (folder / _TEXTS).exists():
        texts = _json(folder / _TEXTS)
        if texts.get("do_lower_case"):
            raise UserError(
                f"{folder / _TEXTS}: do_lower_case = True is not supported; lower the texts' case"
            )
        longest = texts.get("max_seq_length")
    return Embedding(pooling, normalize, longest)


def _pooling(path: epath.Path) -> str:
    settings = _json(path)
    mode = settings.get("pooling_mode")
    if mode is not None:
        chosen = [_MODES.get(str(mode))]
    else:
        names = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on]
        chosen = [_FIELDS.get(name) for name in names]
    if len(chosen) != 1 or chosen[0] is None:
        raise UserError(f"{path}: its pooling is not supported; one of mean, cls and max is")
    return chosen[0]


def write(embedding: Embedding, width: int, folder: epath.Path) -> None:
    """Writes it for sentence-transformers and `read`."""
    kind = "sentence_transformers.models."
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{kind}Transformer"}]
    modules.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}Pooling"})
    if embedding.normalize:
        modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{kind}Normalize"})
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    pooling: dict[str, Any] = {name: embedding.pooling == ours for name, ours in _FIELDS.items()}
    files: dict[str, Any] = {
        _MODULES: modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **pooling},
    }
    if embedding.max_length is not None:
        files[_TEXTS] = {"max_seq_length": embedding.max_length, "do_lower_case": False}
    for name, content in files.items():
        atomic_write(folder / name, json.dumps(content, indent=2) + "\n")


def _json(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
