"""Tiny models in Hugging Face directories, with a vocabulary of characters."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

from t5style.corpus.vocabulary import CharacterVocabulary
from t5style.infer.model import Model
from t5style.models import params
from t5style.models.config import TransformerConfig

VOCABULARY = CharacterVocabulary("abcdefghijklmnopqrstuvwxyz:\n ", extra_ids=0)


def config(decoder_only: bool, **changes: Any) -> TransformerConfig:
    """Some thousand parameters."""
    return TransformerConfig(
        vocab_size=40,
        d_model=16,
        d_ff=32,
        num_heads=2,
        encoder_layers=0 if decoder_only else 1,
        decoder_layers=1,
        positions="rope" if decoder_only else "relative_bias",
        scale_attention=decoder_only,
        activations=("silu", "linear") if decoder_only else ("gelu", "linear"),
        dtype="float32",
        **changes,
    )


def save(folder: pathlib.Path, decoder_only: bool, **changes: Any) -> str:
    """Writes one with random parameters; returns its folder."""
    made = config(decoder_only, **changes)
    Model(made, params.init_params(made, jax.random.key(0)), VOCABULARY).save(folder)
    return str(folder)
