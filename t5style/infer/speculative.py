"""Speculative decoding of one request: several tokens are guessed, and the model reads them all at once.

Leviathan et al. 2023 and Chen et al. 2023, with guesses of a smaller model of the same vocabulary, or of
prompt lookup (Saxena 2023): what followed the last few tokens where they stood before, in the prompt or the
answer.

Where those papers accept a guess by the ratio of two probabilities, here the model draws its own token with
the random numbers that it would have used without guesses, the draft model guesses with the same numbers,
and guesses are kept as long as they are the model's own tokens (the Gumbel coupling of Daliri, Musco and
Suresh 2024, "Coupling without communication and drafter-invariant speculative decoding"). So an answer has
not only the same distribution as without guesses but is the same answer, greedy and sampled, under all
settings; only where rounding decides can they differ, since a step reads several tokens.

A draft model's guess is right with probability at least (1 - d) / (1 + d), where d is the total variation
distance of the two distributions after temperature and cuts; the papers' rule accepts 1 - d, the most that is
possible. A looked-up guess is right with the probability that the model gives it, under both.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5style.corpus.vocabulary import Vocabulary
from t5style.infer import sampling
from t5style.infer.answers import Completion, Following, completion
from t5style.infer.batch import bucket, on_mesh, put
from t5style.infer.decoding import Batch
from t5style.infer.engine import Cache, Engine, forward, last_logits
from t5style.infer.settings import Settings
from t5style.models.cache import rewind
from t5style.models.config import TransformerConfig

MAX_GUESSES = 64
_NO_GUESS = -1
_rewind = jax.jit(rewind, donate_argnames="cache")


@dataclasses.dataclass(frozen=True)
class Speculated(Completion):
    """An answer, and what the guesses were worth.

    Attributes:
      steps: times that the model ran, after it had read the prompt.
      guessed, accepted: tokens that were guessed, and how many of these were right.
    """

    steps: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def accepted_per_step(self) -> float:
        """Guesses that were right in a step, which made one token more than these."""
        return self.accepted / max(self.steps, 1)


def _guess(
    config: TransformerConfig,
    variables: Any,
    cache: Cache,
    state: dict[str, Any],
    rows: sampling.Arrays,
    kinds: sampling.Kinds,
    count: int,
) -> tuple[jax.Array, Cache]:
    """A draft model's tokens int32 [rows, count]; its cache lacks the token before the newest, too, so that
    it never has to read the last of its guesses.
    """

    def draw(logits: jax.Array, history: Any, place: jax.Array | int) -> tuple[jax.Array, Any]:
        processed = sampling.process(logits, rows, history, kinds)
        token = sampling.draw(processed, state["step"] + place, rows, kinds)
        return token, sampling.remember(history, token)

    newest = jnp.stack([state["before"], state["token"]], axis=1)
    logits, cache = last_logits(config, variables, newest, cache)
    first, history = draw(logits, state["history"], 0)

    def another(carry: Any, place: jax.Array) -> Any:
        token, history, cache = carry
        logits, cache = last_logits(config, variables, token[:, None], cache)
        token, history = draw(logits, history, place)
        return (token, history, cache), token

    (_, _, cache), others = jax.lax.scan(another, (first, history, cache), jnp.arange(1, count))
    return jnp.concatenate([first[:, None], others.T], axis=1), cache


def _look_up(text: jax.Array, length: jax.Array, count: int, ngram: int) -> jax.Array:
    """What followed the last tokens of text int32 [slots], of which `length` are there, where they stood
    before: int32 [count], _NO_GUESS for nothing.

    The longest match counts, up to `ngram` tokens, and the latest of these. Where what followed is shorter
    than `count` it is repeated, since the text then is.
    """
    place = jnp.arange(len(text))  # of what followed
    same = (place > 0) & (place < length)
    matched = jnp.zeros_like(place)
    for back in range(1, ngram + 1):
        last = jnp.where(length >= back, text[length - back], _NO_GUESS)
        same = same & (place >= back) & (jnp.roll(text, back) == last)
        matched = matched + same
    best = jnp.argmax(matched * len(text) + place * (matched > 0))
    period = jnp.maximum(length - best, 1)
    found = text[best + jnp.arange(count) % period]
    return jnp.where(matched[best] > 0, found, _NO_GUESS)


@functools.partial(
    jax.jit,
    static_argnames=("config", "draft_config", "kinds", "count", "ngram"),
    donate_argnames=("cache", "draft_cache", "state"),
)
def _advance(
    config: TransformerConfig,
    variables: Any,
    draft_config: TransformerConfig | None,
    draft_variables: Any,
    cache: Cache,
    draft_cache: Cache | None,
    state: dict[str, Any],
    rows: sampling.Arrays,
    stopped: jax.Array,
    until: jax.Array,
    *,
    kinds: sampling.Kinds,
    count: int,
    ngram: int,
) -> tuple[Cache, Cache | None, dict[str, Any]]:
    """Caches and state after at least `until` tokens, or when the answer is finished.

    The request is row 0; others, which fill a mesh, follow it and come to nothing.
    """

    def body(carry: Any) -> Any:
        cache, draft_cache, state = carry
        step = state["step"]
        if draft_config is None:
            guesses = _look_up(state["text"], state["length"], count, ngram)
            guesses = jnp.broadcast_to(guesses, (len(state["token"]), count))
        else:
            guesses, draft_cache = _guess(
                draft_config, draft_variables, draft_cache, state, rows, kinds, count
            )
        fed = jnp.concatenate([state["token"][:, None], jnp.maximum(guesses, 0)], axis=1)
        logits, cache = forward(config, variables, fed, cache)  # [rows, count + 1, vocab]

        def draw(history: Any, given: Any) -> Any:
            logits, place = given
            processed = sampling.process(logits, rows, history, kinds)
            token = sampling.draw(processed, step + place, rows, kinds)
            history = sampling.remember(history, token)
            return history, (token, history)

        places = jnp.arange(count + 1)
        _, (own, histories) = jax.lax.scan(draw, state["history"], (logits.swapaxes(0, 1), places))
        own = own.T  # [rows, count + 1]; a row's are its answer as far as the guesses before are the same
        right = jnp.cumprod(own[0, :-1] == guesses[0]).sum()
        cache = rewind(cache, count - right)
        if draft_cache is not None:
            draft_cache = rewind(draft_cache, count - right)
        ended = (own[0, :, None] == rows["ends"][0]).any(axis=-1) & (places <= right)
        left = jnp.minimum(jnp.where(ended.any(), jnp.argmax(ended), right) + 1, rows["limit"][0] - step)
        state = state | {
            "out": jax.lax.dynamic_update_slice(state["out"], own, (0, step)),
            "history": jax.tree.map(lambda leaf: leaf[right], histories),
            "before": fed[:, right],
            "token": own[:, right],
            "step": step + right + 1,
            "done": state["done"] | ended.any() | (step + right + 1 >= rows["limit"]),
            "steps": state["steps"] + 1,
            "guessed": state["guessed"] + (guesses[0] != _NO_GUESS).sum(),
            # Of an answer that ends at a guess, no more than it.
            "accepted": state["accepted"] + jnp.minimum(right, left),
        }
        if draft_config is None:
            state["text"] = jax.lax.dynamic_update_slice(state["text"], own[0], (state["length"],))
            state["length"] = state["length"] + right + 1
        if kinds.logprobs >= 0:
            flat = logits.reshape(-1, logits.shape[-1])
            told = sampling.logprobs(flat, own.reshape(-1), kinds.logprobs)
            state["told"] = tuple(
                jax.lax.dynamic_update_slice_in_dim(
                    whole, part.reshape(*own.shape, *part.shape[1:]), step, axis=1
                )
                for whole, part in zip(state["told"], told, strict=True)
            )
        return cache, draft_cache, state

    def unfinished(carry: Any) -> jax.Array:
        state = carry[2]
        return (state["step"] < until) & ~state["done"].all()

    state = state | {"done": state["done"] | stopped}
    return jax.lax.while_loop(unfinished, body, (cache, draft_cache, state))


class Speculation(Batch):
    """One request being answered with guesses; `advance` makes at least so many tokens.

    Args:
      engine: the model.
      prompt: int array [length].
      settings: the request's.
      draft: the model that guesses; None: prompt lookup.
      guesses: tokens that are guessed in a step.
      ngram: tokens that prompt lookup compares at most.

    Raises:
      ValueError: more than one answer, a constraint, or a draft model that does not fit.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: np.ndarray,
        settings: Settings,
        draft: Engine | None,
        guesses: int,
        ngram: int,
    ) -> None:
        if settings.n != 1:
            raise ValueError(f"n is {settings.n}: speculative decoding makes one answer, call complete")
        if settings.constraint is not None:
            raise ValueError("speculative decoding takes no constraint: call complete")
        if not 1 <= guesses <= MAX_GUESSES:
            raise ValueError(f"guesses is {guesses}: give 1 to {MAX_GUESSES} tokens")
        if not 1 <= ngram <= MAX_GUESSES:
            raise ValueError(f"ngram is {ngram}: give 1 to {MAX_GUESSES} tokens")
        if draft is not None:
            _check_draft(engine, draft)
        self._draft, self._guesses, self._ngram = draft, guesses, ngram
        self._draft_cache: Cache | None = None
        super().__init__(engine, [prompt], [settings], spare=guesses)
        count = np.zeros((), np.int32)
        self._state |= {"steps": count, "guessed": count, "accepted": count}
        slots = self._state["out"].shape[1]
        if draft is not None:
            prefilled = draft.prefill([prompt], slots, ring=False)
            self._draft_cache = _rewind(prefilled.cache, 1)
        before = np.full(len(self._stopped), engine.ids.pad, np.int32)
        before[0] = engine.ids.start if engine.config.encoder_layers else prompt[-1]
        self._state |= put({"before": before}, engine.mesh)
        if draft is None:
            known = np.r_[prompt, np.asarray(self._state["token"])[:1]].astype(np.int32)
            text = np.zeros(bucket(len(prompt)) + slots, np.int32)
            text[: len(known)] = known
            self._state |= {"text": text, "length": np.int32(len(known))}

    def advance(self, steps: int | None = None) -> None:
        """At least so many tokens more (None: to the end)."""
        if self.finished:
            return
        engine, draft = self._engine, self._draft
        self._stopped[0] = self.answers[0].finish_reason is not None
        with on_mesh(engine.mesh, engine.rules):
            self._cache, self._draft_cache, self._state = _advance(
                engine.config,
                engine.variables,
                None if draft is None else draft.config,
                None if draft is None else draft.variables,
                self._cache,
                self._draft_cache,
                self._state,
                self._rows,
                *put({"stopped": self._stopped}, engine.mesh).values(),
                np.int32(self._step + (steps or 2**30)),
                kinds=self._kinds,
                count=self._guesses,
                ngram=self._ngram,
            )
        self._collect(None)

    @property
    def counts(self) -> dict[str, int]:
        """Speculated's steps, guessed, accepted."""
        return {name: int(self._state[name]) for name in ("steps", "guessed", "accepted")}


def _check_draft(engine: Engine, draft: Engine) -> None:
    ours, theirs = engine.config, draft.config
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"the draft model has {theirs.vocab_size} tokens and the model {ours.vocab_size}: take one with "
            "the same vocabulary"
        )
    if ours.architecture != theirs.architecture:
        raise ValueError(f"the draft model is {theirs.architecture} and the model {ours.architecture}")
    if engine.mesh != draft.mesh:
        raise ValueError("the draft model is on other devices than the model: load both onto one mesh")


def speculate(
    engine: Engine,
    prompt: np.ndarray,
    settings: Settings,
    vocabulary: Vocabulary | None,
    draft: Engine | None,
    guesses: int | None,
    ngram: int,
) -> Speculated:
    """The answer that the model gives without guesses, and how many of them were right.

    Args:
      engine: the model.
      prompt: int array [length].
      settings: the request's: one answer, and no constraint.
      vocabulary: None: no stop texts, and the text of the answer is empty.
      draft: a smaller model of the same vocabulary and architecture; None: prompt lookup.
      guesses: tokens guessed at a time; None: 5 of a draft model, 10 of prompt lookup.
      ngram: how many tokens prompt lookup compares at most.

    Raises:
      ValueError: settings or a draft model that do not fit.
    """
    guesses = guesses if guesses is not None else 10 if draft is None else 5
    batch = Speculation(engine, prompt, settings, draft, guesses, ngram)
    following = Following(batch, vocabulary)
    while not batch.finished:
        following.advance()
    (answer,), (stream,) = batch.answers, following.streams
    if stream is not None:
        text = stream.text
    else:
        text = "" if vocabulary is None else vocabulary.decode(answer.tokens)
    done = completion(answer, text)
    fields: dict[str, Any] = {field.name: getattr(done, field.name) for field in dataclasses.fields(done)}
    return Speculated(**(fields | batch.counts))
