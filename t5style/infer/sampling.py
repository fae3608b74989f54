"""The next token from a row of logits: every row with its own settings and its own randomness.

`arrays` turns the settings of a batch into what the programs take, `process` applies what changes logits,
`warp` cuts the distribution, `draw` chooses. Definitions are those of `Settings`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5style.infer.batch import bucket
from t5style.infer.settings import Settings

# Most probable tokens among which a cut distribution nearly always ends: choosing them takes a fiftieth of
# the time that sorting 32,000 takes on a CPU. Where it ends later, all are sorted.
CANDIDATES = 256
_NONE = -1  # no token has this id
_BEFORE = -2  # stands before the first token of a row

Arrays = dict[str, Any]


class Kinds(NamedTuple):
    """What a batch of settings needs of a program, which is compiled for it.

    sampled: some row draws at random; else all take the most probable token.
    whole: some row draws from the whole distribution.
    cut: some row draws from a distribution that top_k, top_p or min_p cut.
    biased, penalized, banned, masked: some row has a bias, a penalty, a banned sequence, a constraint.
    logprobs: alternatives that are told, a power of two or 0; -1 for no log-probabilities.
    tempered: some row is told those after its temperature.
    """

    sampled: bool = False
    whole: bool = False
    cut: bool = False
    biased: bool = False
    penalized: bool = False
    banned: bool = False
    masked: bool = False
    logprobs: int = -1
    tempered: bool = False


def arrays(
    settings: Sequence[Settings],
    samples: Sequence[int],
    contexts: Sequence[np.ndarray],
    eos: Sequence[int],
    batch: int,
    vocab_size: int,
) -> tuple[Arrays, Kinds]:
    """The arrays [batch, ...] of a batch, and what it needs; rows beyond the settings are greedy.

    Args:
      settings: of each row; `banned` holds token ids only.
      samples: of each row, the number of the answer among those of its request.
      contexts: of each row, the tokens that the decoder has read, which penalties and bans look at.
      eos: the model's end of sequence, where settings say nothing else.
      batch: rows of the arrays.
      vocab_size: width of the logits.
    """
    rows = list(settings) + [Settings()] * (batch - len(settings))
    contexts = [*contexts, *[np.zeros(0, np.int32)] * (batch - len(contexts))]

    def column(name: str, dtype: Any) -> np.ndarray:
        return np.asarray([getattr(row, name) for row in rows], dtype)

    result: Arrays = {
        name: column(name, np.float32)
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
    }
    result["top_k"] = np.asarray([min(row.top_k, 2**31 - 1) for row in rows], np.int32)
    result["limit"] = column("max_new_tokens", np.int32)
    # Seeds beyond 2**32 wrap instead of failing.
    result["seed"] = np.asarray([row.seed % 2**32 for row in rows], np.uint32)
    result["sample"] = np.asarray([*samples, *[0] * (batch - len(samples))], np.uint32)
    result["done"] = np.arange(batch) >= len(settings)
    ends = [list(eos if row.stop_tokens is None else row.stop_tokens) for row in rows]
    result["ends"] = np.full((batch, bucket(max(map(len, ends)), 1)), _NONE, np.int32)
    for i, end in enumerate(ends):
        result["ends"][i, : len(end)] = end
    sequences = [_sequences(row, end) for row, end in zip(rows, ends, strict=True)]
    biases = [
        {**row.logit_bias, **{sequence[0]: -math.inf for sequence in sequence_list if len(sequence) == 1}}
        for row, sequence_list in zip(rows, sequences, strict=True)
    ]
    longer = [[sequence for sequence in row if len(sequence) > 1] for row in sequences]
    penalized = [
        (row.repetition_penalty, row.presence_penalty, row.frequency_penalty) != (1, 0, 0) for row in rows
    ]
    cut = [row.temperature > 0 and (row.top_k > 0 or row.top_p < 1 or row.min_p > 0) for row in rows]
    sampled = [row.temperature > 0 for row in rows]
    asked = [row.logprobs for row in rows if row.logprobs is not None]
    kinds = Kinds(
        sampled=any(sampled),
        whole=any(s and not c for s, c in zip(sampled, cut, strict=True)),
        cut=any(cut),
        biased=any(biases),
        penalized=any(penalized),
        banned=any(longer),
        masked=any(row.constraint is not None for row in rows),
        logprobs=-1 if not asked else min(bucket(max(asked), 1), vocab_size) if max(asked) else 0,
        tempered=any(row.tempered and row.logprobs is not None for row in rows),
    )
    if kinds.tempered:
        told = [row.temperature if row.tempered and row.temperature > 0 else 1.0 for row in rows]
        result["told_temperature"] = np.asarray(told, np.float32)
    result["cut"] = np.asarray(cut)
    if kinds.biased:
        result["bias"] = np.zeros((batch, vocab_size), np.float32)
        for i, bias in enumerate(biases):
            result["bias"][i, list(bias)] = list(bias.values())
    if kinds.penalized:
        result["seen"] = np.zeros((batch, vocab_size), bool)
        for i, context in enumerate(contexts):
            result["seen"][i, context] = True
    if kinds.banned:
        most = bucket(max(map(len, longer)), 1)
        length = bucket(max(len(sequence) for row in longer for sequence in row), 2)
        result["banned"] = np.full((batch, most, length), _NONE, np.int32)
        result["tail"] = np.full((batch, length - 1), _BEFORE, np.int32)
        for i, (row, context) in enumerate(zip(longer, contexts, strict=True)):
            for j, sequence in enumerate(row):
                result["banned"][i, j, length - len(sequence) :] = sequence
            last = context[-(length - 1) :]
            result["tail"][i, length - 1 - len(last) :] = last
    return result, kinds


def _sequences(row: Settings, ends: Sequence[int]) -> list[list[int]]:
    """What is banned, as token ids; an end of sequence by itself is not, as in transformers."""
    result = []
    for item in row.banned:
        if isinstance(item, str):
            raise ValueError(f"banned holds the text {item!r}, but there is no tokenizer: give token ids")
        sequence = [int(item)] if isinstance(item, int | np.integer) else [int(token) for token in item]
        if sequence not in ([end] for end in ends):
            result.append(sequence)
    return result


def history(rows: Arrays, kinds: Kinds) -> Arrays:
    """What `process` has to know of earlier tokens, before the first."""
    state = {}
    if kinds.penalized:
        state["counts"] = jnp.zeros(rows["seen"].shape, jnp.int32)
    if kinds.banned:
        state["tail"] = jnp.asarray(rows["tail"])
    return state


def remember(state: Arrays, token: jax.Array) -> Arrays:
    """The history with one more token of each row, int32 [batch]."""
    state = dict(state)
    if "counts" in state:
        state["counts"] = state["counts"].at[jnp.arange(len(token)), token].add(1)
    if "tail" in state:
        state["tail"] = jnp.concatenate([state["tail"][:, 1:], token[:, None]], axis=1)
    return state


def process(
    logits: jax.Array, rows: Arrays, state: Arrays, kinds: Kinds, mask: jax.Array | None = None
) -> jax.Array:
    """Logits f32 [batch, vocab] after bias, penalties and bans, and constraints: mask bool [batch, vocab]."""
    if kinds.biased:
        logits = logits + rows["bias"]
    if kinds.penalized:
        counts = state["counts"]
        repetition = rows["repetition_penalty"][:, None]
        repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
        logits = jnp.where(rows["seen"] | (counts > 0), repeated, logits)
        logits = logits - rows["frequency_penalty"][:, None] * counts
        logits = logits - rows["presence_penalty"][:, None] * (counts > 0)
    if kinds.banned:
        before, last = (
            rows["banned"][..., :-1],
            rows["banned"][..., -1],
        )  # [batch, most, length - 1], [.., most]
        match = ((before == state["tail"][:, None, :]) | (before == _NONE)).all(axis=-1) & (last != _NONE)
        change = jnp.where(match, -jnp.inf, 0.0)
        logits = logits.at[jnp.arange(len(logits))[:, None], jnp.maximum(last, 0)].add(change)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    return logits


def _kept(ranked: jax.Array, total: jax.Array, rows: Arrays) -> jax.Array:
    """Which of sorted logits [batch, ranks] are kept; total: logsumexp of the whole row, [batch].

    Exactly k tokens stay even where the k-th ties.
    """
    rank = jnp.arange(ranked.shape[-1], dtype=jnp.int32)[None, :]
    top_k, top_p = rows["top_k"][:, None], rows["top_p"][:, None]
    kept = (top_k == 0) | (rank < top_k)
    # Top-p goes by what top-k left, renormalised.
    left = jax.nn.logsumexp(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    total = jnp.where(rows["top_k"] == 0, total, left)[:, None]
    probabilities = jnp.where(kept, jnp.exp(ranked - total), 0.0)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the probability of all better tokens
    # p = 1 must keep all, and float32 sums can pass 1 early.
    kept &= (before < top_p) | (top_p >= 1) | (rank == 0)
    return kept & (jnp.exp(ranked - ranked[:, :1]) >= rows["min_p"][:, None])


def warp(logits: jax.Array, rows: Arrays) -> jax.Array:
    """Logits f32 [batch, vocab] divided by the temperature (where it is not 0), -inf outside of top_k, top_p
    and min_p: the distribution that a row draws from is its softmax.
    """
    scaled = _scaled(logits, rows)
    order = jnp.argsort(scaled, axis=-1, stable=True, descending=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    kept = _kept(ranked, jax.nn.logsumexp(scaled, axis=-1), rows)
    here = jnp.arange(len(logits))[:, None]
    return jnp.full_like(scaled, -jnp.inf).at[here, order].set(jnp.where(kept, ranked, -jnp.inf))


def _scaled(logits: jax.Array, rows: Arrays) -> jax.Array:
    return logits / jnp.where(rows["temperature"] > 0, rows["temperature"], 1.0)[:, None]


def _gumbel(rows: Arrays, step: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise f32 for token ids int32 [batch, count] or [1, count]: of a token, it depends on its id and
    the row's seed, sample and step alone, so that a row draws the same token whichever others are looked at.
    """

    def row(seed: jax.Array, sample: jax.Array, ids: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), sample)
        key = jax.random.fold_in(key, step)
        words = jax.vmap(lambda token: jax.random.key_data(jax.random.fold_in(key, token))[0])(ids)
        # Uniform in (0, 1), finest near 0, which is where large noise comes from.
        uniform = (words.astype(jnp.float32) + 0.5) * 2.0**-32
        return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, 1 - 2.0**-24)))

    return jax.vmap(row)(
        rows["seed"], rows["sample"], jnp.broadcast_to(ids, (len(rows["seed"]), ids.shape[1]))
    )


def draw(logits: jax.Array, step: jax.Array, rows: Arrays, kinds: Kinds) -> jax.Array:
    """Token ids int32 [batch] from processed logits f32 [batch, vocab]; step: int32 scalar.

    A draw at random takes the largest logit after adding Gumbel noise. It depends on the row's logits,
    settings, seed, sample, and the step alone.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not kinds.sampled:
        return greedy
    vocab = logits.shape[-1]
    scaled = _scaled(logits, rows)
    ids = jnp.arange(vocab, dtype=jnp.int32)[None, :]
    drawn = greedy
    if kinds.whole:
        drawn = jnp.argmax(scaled + _gumbel(rows, step, ids), axis=-1).astype(jnp.int32)
    if kinds.cut:
        total = jax.nn.logsumexp(scaled, axis=-1)
        # Behind the barrier nothing is cut from its results, else XLA sorts all on a CPU: 30 times slower.
        ranked, order = jax.lax.optimization_barrier(jax.lax.top_k(scaled, min(CANDIDATES, vocab)))
        kept = _kept(ranked, total, rows)

        def among(ranked: jax.Array, kept: jax.Array, order: jax.Array) -> jax.Array:
            noisy = jnp.where(kept, ranked, -jnp.inf) + _gumbel(rows, step, order)
            return jnp.take_along_axis(order, jnp.argmax(noisy, axis=-1)[:, None], axis=-1)[:, 0]

        def among_all() -> jax.Array:
            order = jnp.argsort(scaled, axis=-1, stable=True, descending=True)
            ranked = jnp.take_along_axis(scaled, order, axis=-1)
            return among(ranked, _kept(ranked, total, rows), order)

        if vocab > CANDIDATES:
            top_k = rows["top_k"]
            ends = jnp.where(top_k == 0, ~kept[:, -1], top_k <= CANDIDATES)
            few = (ends | ~rows["cut"]).all()
            choice = jax.lax.cond(few, lambda: among(ranked, kept, order), among_all)
        else:
            choice = among(ranked, kept, order)
        drawn = jnp.where(rows["cut"], choice.astype(jnp.int32), drawn)
    return jnp.where(rows["temperature"] > 0, drawn, greedy)


def logprobs(logits: jax.Array, token: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the token [batch]; ids and log-probabilities [batch, count] of the most probable."""
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - total
    best, ids = jax.lax.top_k(logits, count)
    return chosen, ids.astype(jnp.int32), best - total[:, None]
