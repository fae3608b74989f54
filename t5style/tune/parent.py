"""The model that tuning starts from: its config without its weights, then the weights on a mesh."""

from __future__ import annotations

from typing import Any

from etils import epath

from t5style import run_dir
from t5style.corpus.vocabulary import Vocabulary
from t5style.infer import gguf_vocabulary, storage
from t5style.infer.chat import located
from t5style.models import convert, gguf_tables
from t5style.models.config import TransformerConfig
from t5style.models.gguf import GgufFile
from t5style.train import initialize


def config(path: str) -> TransformerConfig:
    """The config of a run folder, a checkpoint in one, a Hugging Face directory or a .gguf file.

    Of the latter two in float32, parameters and computation.

    Raises:
      UserError: there is no such model.
    """
    place = epath.Path(located(path))
    if place.suffix == ".gguf" and place.is_file():
        return gguf_tables.gguf_config(GgufFile(str(place)), "float32")
    for folder in (place, place.parent, place.parent.parent):
        if (folder / storage.MODEL_FILE).exists():
            return TransformerConfig.from_json((folder / storage.MODEL_FILE).read_text())
    if (place / "config.json").exists():
        return convert.huggingface_config(str(place))
    raise run_dir.UserError(
        f"init_from is {path}, but there is no model: give a run folder, a checkpoint, a Hugging Face "
        "directory, or a .gguf file."
    )


def load(
    path: str, model: TransformerConfig, abstract: Any, shardings: Any, vocabulary: Vocabulary
) -> initialize.Start:
    """The parameters, laid out by `shardings`; as initialize.load_params, also from .gguf files.

    Raises:
      UserError: nothing there, another architecture, or another vocabulary than the data's.
    """
    place = located(path)
    if not place.endswith(".gguf"):
        return initialize.load_params(place, model, abstract, shardings, vocabulary)
    file = GgufFile(place)
    own = gguf_vocabulary.vocabulary(file.metadata, place)
    if own is not None and own != vocabulary:
        raise initialize.other_vocabulary(epath.Path(place), own.fingerprint, vocabulary, epath.Path(place))
    theirs = gguf_tables.gguf_config(file, model.param_dtype)
    initialize.same_model(theirs, model, place)
    _, params = gguf_tables.load_gguf(file, model.param_dtype, shardings=shardings)
    return initialize.Start(params, f"the model in {place}", {"parent": place})
