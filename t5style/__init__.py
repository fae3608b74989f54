"""t5style: a JAX/TPU-first research codebase for the whole life of a language model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5style.infer.model import Model


def load(path: str | os.PathLike[str], dtype: Any = None, mesh: Any = None, **options: Any) -> Model:
    """Loads a model from a run folder, a checkpoint, a Hugging Face directory, a .gguf file or a T5X
    checkpoint: see `t5style.infer.model.load`, also for the options.
    """
    from t5style.infer import model  # here, because `python -m t5style.main --help` must not import jax

    return model.load(path, dtype=dtype, mesh=mesh, **options)
