"""Beam search: the sequences of highest length-normalised log-probability that a beam finds.

As transformers 5's `GenerationMixin._beam_search` (and its earlier BeamSearchScorer): each step the best
continuations of all beams are taken, those that end leave the beam with the score log p / length ** penalty,
and the best others go on. All prompts of a batch are searched in one compiled loop; of the cache only what
differs between the beams of a prompt is re-ordered: the decoder's own keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5style.corpus.vocabulary import Vocabulary
from t5style.infer.answers import Completion
from t5style.infer.batch import bucket, check_batch_size, on_mesh
from t5style.infer.engine import Cache, Engine, last_logits
from t5style.models.config import TransformerConfig

_NONE = -1e9  # the score of a beam that is none
_NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Beams:
    """How to search.

    Attributes:
      num_beams: beams of each prompt, at least 1.
      length_penalty: an answer's score is log-probability / length ** length_penalty, the token that ended
        it included in both; above 0 favours long answers, below 0 short ones.
      n: answers of each prompt, the best first, at most num_beams.
      max_new_tokens: at most so many tokens.
      early_stopping: when a prompt is finished, if it has num_beams ended answers. True: at once; False: when
        the best running beam, if it ended now, would be no better than the worst of them (a heuristic where
        length_penalty > 0); "never": when no running beam can become better.
      stop_tokens: what ends an answer; None: the model's end of sequence.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    n: int = 1
    max_new_tokens: int = 128
    early_stopping: bool | str = False
    stop_tokens: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("num_beams", "n"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.n > self.num_beams:
            raise ValueError(f"n is {self.n} and num_beams {self.num_beams}: there are not so many answers")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty is {self.length_penalty}: give a finite number (0 = none)")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping is {self.early_stopping!r}: give True, False or 'never'")


@dataclasses.dataclass(frozen=True)
class BeamAnswer:
    """An answer: its tokens without the one that ended it, whether there was one, and its score."""

    tokens: list[int]
    stopped: bool
    score: float


def search(
    engine: Engine, prompts: Sequence[np.ndarray], beams: Beams, batch_size: int = 16
) -> list[list[BeamAnswer]]:
    """The n best answers to each prompt, best first.

    Args:
      engine: the model.
      prompts: int arrays [length] of at least one token.
      beams: how.
      batch_size: about so many beams are searched at a time.
    """
    check_batch_size(batch_size)
    if beams.num_beams > engine.config.vocab_size:
        raise ValueError(
            f"num_beams is {beams.num_beams}: a vocabulary of {engine.config.vocab_size} has not so many "
            "first tokens"
        )
    ends = list(engine.ids.eos if beams.stop_tokens is None else beams.stop_tokens)
    ends += [_NO_TOKEN] * (bucket(len(ends), 1) - len(ends))
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    rows = max(batch_size // beams.num_beams, 1)
    found: dict[int, list[BeamAnswer]] = {}
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        slots = bucket(beams.max_new_tokens)
        prefilled = engine.prefill([prompts[i] for i in chosen], slots - 1)
        with on_mesh(engine.mesh, engine.rules):
            result = _search(
                engine.config,
                engine.variables,
                prefilled.logits,
                prefilled.cache,
                np.arange(prefilled.batch) < len(chosen),
                np.asarray(ends, np.int32),
                np.int32(beams.max_new_tokens),
                np.float32(beams.length_penalty),
                beams=beams.num_beams,
                early=beams.early_stopping,
                slots=slots,
            )
        tokens, lengths, scores = jax.device_get(result)
        for row, i in enumerate(chosen):
            found[int(i)] = [
                _answer(tokens[row, k, : lengths[row, k]].tolist(), ends, float(scores[row, k]))
                for k in range(beams.n)
            ]
    return [found[i] for i in range(len(prompts))]


def completions(found: Sequence[Sequence[BeamAnswer]], vocabulary: Vocabulary | None) -> list[Completion]:
    """What `search` found, as the public API gives it: `score` is as Beams says, and `text` is empty where
    there is no vocabulary.
    """
    return [
        Completion(
            text="" if vocabulary is None else vocabulary.decode(answer.tokens),
            tokens=answer.tokens,
            finish_reason="stop" if answer.stopped else "length",
            request=request,
            sample=sample,
            score=answer.score,
        )
        for request, answers in enumerate(found)
        for sample, answer in enumerate(answers)
    ]


def _answer(tokens: list[int], ends: Sequence[int], score: float) -> BeamAnswer:
    stopped = tokens[-1] in ends
    return BeamAnswer(tokens[:-1] if stopped else tokens, stopped, score)


def _pick(tree: Any, index: jax.Array) -> Any:
    """Beams `[batch, chosen]` of a tree of arrays `[batch, beams, ...]`."""
    here = jnp.arange(len(index))[:, None]
    return jax.tree.map(lambda leaf: leaf[here, index], tree)


def _top(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` best of `[batch, n]`."""
    # Behind the barrier nothing is cut from its results, else XLA sorts all on a CPU: 30 times slower.
    return tuple(jax.lax.optimization_barrier(jax.lax.top_k(scores, count)))


def _choose(
    logits: jax.Array,
    state: dict[str, Any],
    ends: jax.Array,
    limit: jax.Array,
    penalty: jax.Array,
    early: bool | str,
) -> dict[str, Any]:
    """The state after one more token, from logits f32 [batch * beams, vocab]."""
    step, running, ended = state["step"], state["running"], state["ended"]
    batch, beams = running["score"].shape
    vocab = logits.shape[-1]
    total = jax.nn.log_softmax(logits).reshape(batch, beams, vocab) + running["score"][..., None]
    # So many that `beams` remain which do not end, even if each beam's best tokens are all the ends.
    keep = min((1 + len(ends)) * beams, beams * vocab)
    score, index = _top(total.reshape(batch, beams * vocab), keep)  # [batch, keep]
    parent, token = index // vocab, (index % vocab).astype(jnp.int32)
    tokens = jax.lax.dynamic_update_slice_in_dim(
        _pick(running["tokens"], parent), token[..., None], step, axis=2
    )  # [batch, keep, slots]
    length = step + 1
    ends_here = (token[..., None] == ends).any(axis=-1) | (length >= limit)

    _, others = _top(jnp.where(ends_here, score + _NONE, score), beams)
    onward = _pick({"tokens": tokens, "score": jnp.where(ends_here, score + _NONE, score)}, others)

    # Only the best `beams` continuations may end: the others are there to go on if these do.
    may_end = ends_here & (jnp.arange(keep) < beams) & state["open"][:, None]
    fresh = {
        "tokens": tokens,
        "length": jnp.full((batch, keep), length),
        "score": jnp.where(may_end, score / length.astype(jnp.float32) ** penalty, _NONE),
        "real": may_end,
    }
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), ended, fresh)
    ended = _pick(both, _top(both["score"], beams)[1])

    full = ended["real"].all(axis=1)
    if early is True:
        improvable = ~full
    else:
        furthest = jnp.where(penalty > 0, limit, length) if early == "never" else length
        possible = onward["score"][:, 0] / furthest.astype(jnp.float32) ** penalty
        improvable = ~full | (possible > ended["score"].min(axis=1))
    return {
        "step": length,
        "running": onward,
        "ended": ended,
        "open": state["open"] & improvable,
        "token": _pick(token, others).reshape(-1),
        "rows": (_pick(parent, others) + beams * jnp.arange(batch)[:, None]).reshape(-1),
    }


def _reordered(cache: Cache, rows: jax.Array) -> Cache:
    """The cache whose row i goes on from row rows[i], of the same prompt."""

    def layer(entries: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: entry if name.startswith("cross_") else jnp.take(entry, rows, axis=0)
            for name, entry in entries.items()
        }

    return cache | {"layers": tuple(map(layer, cache["layers"]))}


@functools.partial(jax.jit, static_argnames=("config", "beams", "early", "slots"))
def _search(
    config: TransformerConfig,
    variables: Any,
    logits: jax.Array,
    cache: Cache,
    real: jax.Array,
    ends: jax.Array,
    limit: jax.Array,
    penalty: jax.Array,
    *,
    beams: int,
    early: bool | str,
    slots: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens [batch, beams, slots], lengths and scores [batch, beams] of the answers, best first.

    Args:
      config, variables: the model.
      logits, cache: after the prompts, [batch, ...].
      real: bool [batch], rows that are prompts.
      ends: int32 [ends], tokens that end an answer.
      limit: most new tokens.
      penalty: of the length.
      beams, early, slots: of each prompt; early stopping; room for tokens.
    """
    batch = len(logits)
    repeat = jnp.repeat(jnp.arange(batch), beams)
    logits, cache = jax.tree.map(lambda leaf: leaf[repeat] if leaf.ndim else leaf, (logits, cache))
    empty = jnp.zeros((batch, beams, slots), jnp.int32)
    none = jnp.full((batch, beams), _NONE)
    state = {
        "step": jnp.int32(0),
        # All beams are the same at first: only one of them counts.
        "running": {"tokens": empty, "score": none.at[:, 0].set(0.0)},
        "ended": {
            "tokens": empty,
            "length": jnp.zeros((batch, beams), jnp.int32),
            "score": none,
            "real": jnp.zeros((batch, beams), bool),
        },
        "open": real,
    }
    state = _choose(logits, state, ends, limit, penalty, early)

    def unfinished(carry: Any) -> jax.Array:
        _, state = carry
        return (state["step"] < limit) & state["open"].any()

    def body(carry: Any) -> Any:
        cache, state = carry
        cache = _reordered(cache, state["rows"])
        logits, cache = last_logits(config, variables, state["token"][:, None], cache)
        return cache, _choose(logits, state, ends, limit, penalty, early)

    _, state = jax.lax.while_loop(unfinished, body, (cache, state))
    ended = state["ended"]
    return ended["tokens"], ended["length"], ended["score"]
