"""What is asked of a model, checked: the settings of each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from t5style.infer.settings import Settings, settings_of

if TYPE_CHECKING:
    from t5style.infer.model import Model


def settings(
    model: Model,
    prompts: Sequence[np.ndarray],
    max_new_tokens: Any,
    given: Settings | Sequence[Settings] | None,
    fields: Any,
) -> list[Settings]:
    """The settings of each prompt, checked with it and against the model; all banned texts as tokens."""
    if not model.config.decoder_layers:
        raise ValueError("this model is encoder-only: it embeds texts, and cannot generate")
    changes = dict(fields) if max_new_tokens is None else {**fields, "max_new_tokens": max_new_tokens}
    rows = settings_of(len(prompts), given, changes)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        if not len(prompt):
            raise ValueError(f"row {i} has no real token: give at least one, and a mask that is not all 0")
        check_length(model, i, len(prompt), row.max_new_tokens)
    return [_with_tokens(model, row) for row in rows]


def check_length(model: Model, number: int, length: int, new: int) -> None:
    """Raises ValueError where a prompt of so many tokens and the new ones go beyond the model's positions."""
    limit = model.config.context_length
    used = length + (0 if model.encoder_decoder else new)
    if limit is None or used <= limit:
        return
    raise ValueError(
        f"prompt {number} has {length} tokens"
        + ("" if model.encoder_decoder else f", with max_new_tokens {new} that is {used}")
        + f", but the model was made for {limit} positions: shorten the prompt"
        + ("" if model.encoder_decoder else " or lower max_new_tokens")
    )


def _with_tokens(model: Model, row: Settings) -> Settings:
    for token in row.tokens():
        if not 0 <= token < model.config.vocab_size:
            raise ValueError(
                f"logit_bias, stop_tokens or banned holds the id {token}: the model has ids from 0 to "
                f"{model.config.vocab_size - 1}"
            )
    if row.stop:
        model.text_vocabulary()
    if not any(isinstance(item, str) for item in row.banned):
        return row
    encode = model.text_vocabulary().encode
    banned: list[Any] = []
    for item in row.banned:
        banned += [encode(item), encode(" " + item)] if isinstance(item, str) else [item]
    return dataclasses.replace(row, banned=banned)
