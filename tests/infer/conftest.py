"""Tiny models with large random weights, so that greedy answers vary and argmax has no near ties."""

import functools

import jax
import pytest

from t5style.corpus.vocabulary import ByteVocabulary
from t5style.infer.model import Model
from t5style.models.config import TransformerConfig
from t5style.models.params import init_params

VOCABULARY = ByteVocabulary(extra_ids=5)  # 264 ids


@functools.cache
def config_of(kind: str) -> TransformerConfig:
    common = {
        "vocab_size": 264,
        "d_model": 32,
        "d_ff": 64,
        "num_heads": 4,
        "decoder_layers": 2,
        "dtype": "float32",
    }
    if kind == "encoder_decoder":
        return TransformerConfig(**common, encoder_layers=2)
    return TransformerConfig(
        **common, positions="rope", num_kv_heads=2, scale_attention=True, init="normal", init_scale=0.3
    )


@functools.cache
def tiny(kind: str) -> Model:
    """A model with ByteVocabulary; one for the whole session."""
    config = config_of(kind)
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(1))
    return Model(config, params, VOCABULARY)


@pytest.fixture(params=["encoder_decoder", "decoder_only"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny(request.param)
