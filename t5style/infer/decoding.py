"""Autoregressive decoding with a key-value cache: the engine behind Model.generate, stream, and their kin.

How it is built, for those who add to it:

- `Settings` (settings.py) is what one request may ask for; `sampling.py` turns the settings of a batch into
  arrays, and logits into the next token on the device.
- `Engine` (engine.py) holds what decoding needs of a model. `engine.prefill(prompts, room)` reads prompts (in
  chunks of CHUNK tokens) and returns a `Prefilled`: the cache, with room for `room` more tokens, and the
  logits f32 [rows, vocab] of what comes first; rows are padded to `Prefilled.batch`.
  `engine.forward(tokens, cache)` feeds int32 [rows, count] and returns logits f32 [rows, count, vocab] and
  the cache (donated: the one given is gone). Beam search and speculative decoding are loops of their own on
  these, or compile `forward(config, variables, tokens, cache)` into one.
- The cache is opaque. `take_rows(cache, rows)` repeats or reorders its rows (every array in it has the rows
  first, scalars are shared).
- `Batch(engine, prompts, settings)` is a batch being decoded. `advance(steps)` runs up to so many steps in
  one compiled while-loop and brings the new tokens to `batch.answers`, one `Answer` for each row; n answers
  to one prompt are n rows, for which it was read once. The host may end an answer (`answer.stop()`) between
  two calls: stop strings are found so, in text.py. Programs, buffers and the cache are the same whether
  one call runs all steps or each runs a few: streaming costs a call for some steps, no more.
- Constrained rows: `Settings.constraint()` is called once for each answer and makes its `allowed(tokens)`,
  which gets the tokens of the answer so far and returns bool [vocab], what may come next (settings.py). A
  batch with such a row takes one step per call; other rows of it are free.

Prompts, answers and batches are padded to buckets, and everything a request asks for is an argument of the
program, so that a program is compiled for each bucket and not for each length, number or seed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5style.infer import sampling
from t5style.infer.batch import batch_bucket, bucket, on_mesh, put
from t5style.infer.engine import Cache, Engine, last_logits, take_rows
from t5style.infer.settings import Allowed, Settings
from t5style.models.config import TransformerConfig


def _choose(
    logits: jax.Array,
    state: dict[str, Any],
    rows: sampling.Arrays,
    mask: jax.Array | None,
    pad_id: jax.Array,
    kinds: sampling.Kinds,
) -> dict[str, Any]:
    """The state after one more token in every row that is not done."""
    step, done = state["step"], state["done"]
    state = dict(state)
    token = sampling.draw(sampling.process(logits, rows, state["history"], kinds, mask), step, rows, kinds)
    if kinds.logprobs >= 0:
        own = logits / rows["told_temperature"][:, None] if kinds.tempered else logits
        told = sampling.logprobs(own, token, kinds.logprobs)
        state["told"] = tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part[:, None], step, axis=1)
            for whole, part in zip(state["told"], told, strict=True)
        )
    token = jnp.where(done, pad_id, token)
    state["history"] = sampling.remember(state["history"], token)
    state["out"] = jax.lax.dynamic_update_slice(state["out"], token[:, None], (0, step))
    ended = (token[:, None] == rows["ends"]).any(axis=1)
    return state | {
        "token": token,
        "done": done | ended | (step + 1 >= rows["limit"]),
        "step": step + 1,
    }


@functools.partial(jax.jit, static_argnames=("slots", "kinds"))
def _begin(
    logits: jax.Array,
    rows: sampling.Arrays,
    mask: jax.Array | None,
    pad_id: jax.Array,
    *,
    slots: int,
    kinds: sampling.Kinds,
) -> dict[str, Any]:
    """The state after the first token; room for `slots` of them."""
    batch = len(logits)
    state = {
        "step": jnp.int32(0),
        "done": rows["done"],
        "out": jnp.full((batch, slots), pad_id, jnp.int32),
        "history": sampling.history(rows, kinds),
    }
    if kinds.logprobs >= 0:
        several = (batch, slots, kinds.logprobs)
        state["told"] = (
            jnp.zeros((batch, slots), jnp.float32),
            jnp.zeros(several, jnp.int32),
            jnp.zeros(several, jnp.float32),
        )
    return _choose(logits, state, rows, mask, pad_id, kinds)


@functools.partial(jax.jit, static_argnames=("config", "kinds", "layout"), donate_argnames=("cache", "state"))
def _advance(
    config: TransformerConfig,
    variables: Any,
    cache: Cache,
    state: dict[str, Any],
    rows: sampling.Arrays,
    stopped: jax.Array,
    mask: jax.Array | None,
    pad_id: jax.Array,
    until: jax.Array,
    *,
    kinds: sampling.Kinds,
    layout: Any,
) -> tuple[Cache, dict[str, Any]]:
    """Cache and state after the step number `until`, or when all rows are done.

    layout: the shardings that the results shall have, those of the arguments; None off a mesh.
    """

    def unfinished(carry: Any) -> jax.Array:
        _, state = carry
        return (state["step"] < until) & ~state["done"].all()

    def body(carry: Any) -> Any:
        cache, state = carry
        logits, cache = last_logits(config, variables, state["token"][:, None], cache)
        return cache, _choose(logits, state, rows, mask, pad_id, kinds)

    state = state | {"done": state["done"] | stopped}
    result = jax.lax.while_loop(unfinished, body, (cache, state))
    if layout is not None:
        leaves, tree = jax.tree.flatten(result)
        result = jax.tree.unflatten(tree, map(jax.lax.with_sharding_constraint, leaves, layout))
    return result


@dataclasses.dataclass
class Answer:
    """One answer while it is made, and when it is done.

    Attributes:
      request, sample: the number of its request in the batch, and its own among the answers to it.
      settings: the request's.
      tokens: so far, without the one that ended it.
      end: the stop token that ended it.
      finish_reason: "stop" (a stop token or text), "length" (max_new_tokens), or None: not yet.
      logprobs: of each of `tokens` and of `end` behind them, where they were asked for.
      top: for each of these the most probable tokens' ids and log-probabilities.
    """

    request: int
    sample: int
    settings: Settings
    tokens: list[int] = dataclasses.field(default_factory=list)
    end: int | None = None
    finish_reason: str | None = None
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None

    def stop(self, keep: int) -> None:
        """Ends the answer from outside, after its first `keep` tokens."""
        for told in (self.tokens, self.logprobs, self.top):
            if told is not None:
                del told[keep:]
        self.end, self.finish_reason = None, "stop"


class Batch:
    """Requests being answered together.

    Attributes:
      answers: the answers of request 0, of request 1, and so on; each has its first token at once.
    """

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[np.ndarray],
        settings: Sequence[Settings],
        spare: int = 0,
    ) -> None:
        """Reads the prompts. spare: room for so many tokens more, which may be taken back from the cache."""
        self._engine = engine
        self.answers = [
            Answer(request, sample, row) for request, row in enumerate(settings) for sample in range(row.n)
        ]
        slots = bucket(max(row.max_new_tokens for row in settings))
        # The last token is never fed back. A ring cannot be rewound.
        prefilled = engine.prefill(prompts, slots - 1 + spare, ring=not spare)
        logits, self._cache = prefilled.logits, prefilled.cache
        batch = batch_bucket(len(self.answers), engine.mesh)
        index = np.zeros(batch, np.int32)
        index[: len(self.answers)] = [answer.request for answer in self.answers]
        if batch != prefilled.batch or any(row.n > 1 for row in settings):
            logits, self._cache = take_rows((logits, self._cache), index)
        start = np.asarray([engine.ids.start], np.int32)
        arrays, self._kinds = sampling.arrays(
            [answer.settings for answer in self.answers],
            [answer.sample for answer in self.answers],
            [start if engine.config.encoder_layers else prompts[answer.request] for answer in self.answers],
            engine.ids.eos,
            batch,
            engine.config.vocab_size,
        )
        self._ends = arrays["ends"]
        self._stopped = np.zeros(batch, bool)
        self._allowed: list[Allowed | None] = [
            answer.settings.constraint() if answer.settings.constraint is not None else None
            for answer in self.answers
        ]
        self._rows = put(arrays, engine.mesh)
        self._pad = np.int32(engine.ids.pad)
        with on_mesh(engine.mesh, engine.rules):
            mask = self._mask()
            self._state = _begin(logits, self._rows, mask, self._pad, slots=slots + spare, kinds=self._kinds)
        self._layout: Any = None
        if engine.mesh is not None:
            leaves = jax.tree.leaves((self._cache, self._state))
            self._layout = tuple(leaf.sharding for leaf in leaves)
        self._step = 0
        self._collect(mask)

    @property
    def finished(self) -> bool:
        """Whether all answers are."""
        return all(answer.finish_reason is not None for answer in self.answers)

    @property
    def constrained(self) -> bool:
        """Whether a row takes single steps."""
        return self._kinds.masked

    def advance(self, steps: int | None = None) -> None:
        """Up to so many steps more (None: to the end); a constrained batch takes one."""
        if self.finished:
            return
        engine = self._engine
        for i, answer in enumerate(self.answers):
            self._stopped[i] = answer.finish_reason is not None
        until = self._step + (1 if self.constrained else steps or 2**30)
        mask = self._mask()
        with on_mesh(engine.mesh, engine.rules):
            self._cache, self._state = _advance(
                engine.config,
                engine.variables,
                self._cache,
                self._state,
                self._rows,
                *put({"stopped": self._stopped}, engine.mesh).values(),
                mask,
                self._pad,
                np.int32(until),
                kinds=self._kinds,
                layout=self._layout,
            )
        self._collect(mask)

    def _mask(self) -> Any:
        """What the constraints allow, bool [batch, vocab]; None where there are none."""
        if not self.constrained:
            return None
        vocab = self._engine.config.vocab_size
        mask = np.ones((len(self._stopped), vocab), bool)
        for i, (answer, allowed) in enumerate(zip(self.answers, self._allowed, strict=True)):
            if allowed is None or answer.finish_reason is not None:
                continue
            row = np.asarray(allowed(tuple(answer.tokens)))
            if row.shape != (vocab,) or row.dtype != bool:
                raise ValueError(
                    f"the constraint of request {answer.request} gave {row.dtype} {row.shape}: it must give "
                    f"bool ({vocab},), which tokens may come next"
                )
            if not row.any():
                raise ValueError(
                    f"the constraint of request {answer.request} allows no token after "
                    f"{len(answer.tokens)} tokens: it must allow at least one, such as the end of sequence"
                )
            mask[i] = row
        return next(iter(put({"mask": mask}, self._engine.mesh).values()))

    def _collect(self, mask: Any) -> None:
        """Brings what the device has added to the answers."""
        wanted = {name: self._state[name] for name in ("step", "out", "told") if name in self._state}
        state = jax.device_get(wanted)
        first, self._step = self._step, int(state["step"])
        for i, answer in enumerate(self.answers):
            if answer.finish_reason is not None:
                continue
            count = min(self._step, answer.settings.max_new_tokens)
            fresh = state["out"][i, first:count]
            ends = np.flatnonzero(np.isin(fresh, self._ends[i]))
            if len(ends):
                answer.tokens += fresh[: ends[0]].tolist()
                answer.end, answer.finish_reason = int(fresh[ends[0]]), "stop"
            else:
                answer.tokens += fresh.tolist()
                if count == answer.settings.max_new_tokens:
                    answer.finish_reason = "length"
            if mask is not None and self._allowed[i] is not None and not mask[i, fresh[0]]:
                raise ValueError(
                    f"the constraint of request {answer.request} allows only tokens that its settings ban"
                )
            if answer.settings.logprobs is not None:
                self._tell(answer, *(part[i] for part in state["told"]))

    def _tell(self, answer: Answer, chosen: np.ndarray, ids: np.ndarray, best: np.ndarray) -> None:
        count = len(answer.tokens) + (answer.end is not None)
        answer.logprobs = chosen[:count].tolist()
        if most := answer.settings.logprobs:
            answer.top = [
                list(zip(row.tolist(), values.tolist(), strict=True))
                for row, values in zip(ids[:count, :most], best[:count, :most], strict=True)
            ]
