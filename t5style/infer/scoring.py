"""Logits, scores of given targets, and embeddings: what these methods of Model do."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from t5style.infer import programs
from t5style.infer.batch import bucket, check_batch_size, check_texts, pad_rows

if TYPE_CHECKING:
    from t5style.infer.model import Model


def logits(model: Model, tokens: Any, mask: Any, encoder_tokens: Any, encoder_mask: Any) -> jax.Array:
    """See Model.logits."""
    decoder, decoder_mask = model.check("tokens", tokens, mask)
    batch = {"decoder_input_tokens": decoder, "decoder_segment_ids": decoder_mask}
    if encoder_tokens is not None:
        encoder, encoder_mask = model.check("encoder_tokens", encoder_tokens, encoder_mask)
        if len(encoder) != len(decoder):
            raise ValueError(f"encoder_tokens has {len(encoder)} rows but tokens {len(decoder)}")
        batch |= {"encoder_input_tokens": encoder, "encoder_segment_ids": encoder_mask}
    if model.encoder_decoder != (encoder_tokens is not None):
        raise ValueError(
            "this model is an encoder-decoder: give encoder_tokens"
            if model.encoder_decoder
            else "this model is decoder-only: it takes no encoder_tokens"
        )
    return model.run(programs.logits, batch)[: len(decoder), : decoder.shape[1]]


def token_scores(model: Model, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """See Model.token_scores."""
    names = [
        f"{side}_{what}"
        for side in ("encoder", "decoder")
        for what in ("input_tokens", "segment_ids", "positions")
    ]
    arrays = {name: np.asarray(batch[name]) for name in [*names, "decoder_target_tokens"] if name in batch}
    rows, length = arrays["decoder_target_tokens"].shape
    for name in [name for name in arrays if name.endswith("input_tokens")]:
        arrays.setdefault(name.replace("input_tokens", "segment_ids"), np.ones_like(arrays[name]))
    scores, correct = jax.device_get(model.run(programs.token_scores, arrays))
    return scores[:rows, :length], correct[:rows, :length]


def score(
    model: Model, inputs: Sequence[str], targets: Sequence[str], batch_size: int, eos: bool | None
) -> np.ndarray:
    """See Model.score."""
    check_batch_size(batch_size)
    vocabulary = model.text_vocabulary()
    sources, wanted = (
        check_texts("inputs", inputs, empty=True),
        check_texts("targets", targets, empty=True),
    )
    if len(sources) != len(wanted):
        raise ValueError(f"{len(sources)} inputs but {len(wanted)} targets: give as many of each")
    if eos is None:
        eos = model.encoder_decoder
    if eos and not model.ids.eos:
        raise ValueError("this model has no end-of-sequence token: call score with eos=False")
    ending = list(model.ids.eos[:1]) if eos else []
    pairs = []
    for i, (source, target) in enumerate(zip(sources, wanted, strict=True)):
        answer = vocabulary.encode(target, sentinels=model.encoder_decoder) + ending
        if not answer:
            raise ValueError(f"target {i} is empty: there is no token to score")
        pairs.append((model.prompt_ids(source, i, "input", empty=True), np.asarray(answer, np.int32)))
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    result = np.zeros(len(pairs))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        result[chosen] = _score(model, [pairs[i] for i in chosen])
    return result


def embed(model: Model, inputs: Any, mask: Any, batch_size: int) -> np.ndarray:
    """See Model.embed."""
    if not model.config.encoder_layers:
        raise ValueError("this model is decoder-only and has no encoder: embed needs one with an encoder")
    program = functools.partial(programs.embed, pooling=model.embedding.pooling)
    return model.embedding.finish(_encoded(model, inputs, mask, batch_size, program))


def classify(model: Model, inputs: Any, mask: Any, batch_size: int) -> np.ndarray:
    """See Model.classify."""
    if not (model.config.classes and model.config.pooler):
        raise ValueError(
            f"this model has no classifier of texts (classes = {model.config.classes}, pooler = "
            f"{model.config.pooler})"
        )
    return _encoded(model, inputs, mask, batch_size, programs.classify)


def _encoded(model: Model, inputs: Any, mask: Any, batch_size: int, program: Any) -> np.ndarray:
    """What a program makes of each input, float32 `[inputs, width]`."""
    check_batch_size(batch_size)
    if len(inputs) and isinstance(inputs[0], str):
        if mask is not None:
            raise ValueError("a mask goes with token arrays only, not with texts")
        rows = [model.prompt_ids(text, i, "input") for i, text in enumerate(check_texts("inputs", inputs))]
    else:
        array, real = model.check("inputs", inputs, mask)
        rows = [row[keep != 0] for row, keep in zip(array, real, strict=True)]
    own = model.config.context_length if model.config.positions == "learned" else None
    limits = [limit for limit in (own, model.embedding.max_length) if limit is not None]
    for i, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"input {i} has no real token")
        if limits and len(row) > min(limits):
            raise ValueError(
                f"input {i} has {len(row)} tokens, and this model reads at most {min(limits)}: shorten it"
            )
    result: dict[int, np.ndarray] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = bucket(max(len(rows[i]) for i in chosen))
        tokens, real = pad_rows([rows[i] for i in chosen], len(chosen), longest, model.ids.pad)
        batch = {"encoder_input_tokens": tokens, "encoder_segment_ids": real}
        made = jax.device_get(model.run(program, batch))
        result |= {i: made[row] for row, i in enumerate(chosen)}
    return np.stack([result[i] for i in range(len(rows))])


def _score(model: Model, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Summed log-likelihoods float64 [pairs] of (prompt ids, target ids)."""
    n, pad = len(pairs), model.ids.pad
    if model.encoder_decoder:
        sources = [source for source, _ in pairs]
        starts = [np.r_[np.int32(model.ids.start), target[:-1]] for _, target in pairs]
        goals = [target for _, target in pairs]
    else:
        sources = []
        starts = [np.r_[source, target[:-1]] for source, target in pairs]
        goals = [np.r_[source[1:], target] for source, target in pairs]
    length = bucket(max(map(len, goals)))
    inputs, mask = pad_rows(starts, n, length, pad)
    batch = {
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": pad_rows(goals, n, length, pad)[0],
        "decoder_segment_ids": mask,
    }
    if sources:
        width = bucket(max(map(len, sources)))
        tokens, mask = pad_rows(sources, n, width, pad)
        batch |= {"encoder_input_tokens": tokens, "encoder_segment_ids": mask}
    scores, _ = model.token_scores(batch)
    return np.asarray(
        [
            row[len(goal) - len(target) : len(goal)].astype(np.float64).sum()
            for row, goal, (_, target) in zip(scores, goals, pairs, strict=True)
        ]
    )
