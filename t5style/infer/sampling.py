"""The next token from a row of logits: greedy, temperature, top-k, top-p; every row with its own settings and
its own randomness.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How each request of a batch samples; all arrays are [batch].

    temperature: float32, 0 = greedy (the most probable token; the lowest id where several tie).
    top_k: int32, keep the k most probable tokens, 0 = all.
    top_p: float32, keep the smallest set of most probable tokens whose probability reaches p, 1 = all.
    seed: uint32, one stream of random numbers for each request, whatever else is in the batch.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    seed: np.ndarray

    @classmethod
    def of(
        cls,
        batch: int,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
    ) -> Sampling:
        """One setting for all requests or one for each. A single seed s gives request i the seed s + i.

        Raises ValueError naming the value and its limits.
        """

        def rows(name: str, value: object, dtype: type) -> np.ndarray:
            array = np.asarray(value)
            if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != batch):
                raise ValueError(
                    f"{name} has shape {array.shape}: give one number or one for each of the {batch} requests"
                )
            return np.broadcast_to(array, (batch,)).astype(dtype)

        temperatures, ks, ps = (
            rows("temperature", temperature, np.float32),
            rows("top_k", 0 if top_k is None else top_k, np.int64),
            rows("top_p", 1.0 if top_p is None else top_p, np.float32),
        )
        if not np.all((temperatures >= 0) & np.isfinite(temperatures)):
            raise ValueError(f"temperature is {temperature}: give a finite number ≥ 0 (0 = greedy)")
        if not np.all(ks >= 0):
            raise ValueError(f"top_k is {top_k}: give a whole number ≥ 1, or 0 to keep all tokens")
        if not np.all((ps > 0) & (ps <= 1)):
            raise ValueError(f"top_p is {top_p}: give a number above 0 and at most 1 (1 = keep all tokens)")
        # Python integers, so that seeds beyond 2**32 wrap instead of failing.
        if isinstance(seed, int | np.integer):
            seeds = [int(seed) + i for i in range(batch)]
        else:
            seeds = [int(s) for s in rows("seed", seed, object)]
        return cls(
            temperatures,
            np.minimum(ks, np.iinfo(np.int32).max).astype(np.int32),
            ps,
            np.asarray([s % 2**32 for s in seeds], np.uint32),
        )

    @property
    def sampled(self) -> bool:
        """Whether any request samples at all; greedy batches compile to a plain argmax."""
        return bool(np.any(self.temperature > 0))

    @property
    def truncated(self) -> bool:
        """Whether any sampling request cuts the distribution; only then is the vocabulary sorted at every
        step.
        """
        return bool(np.any((self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1))))


def truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sorted logits with everything outside top-k and top-p at -inf, and the token ids in that order.

    logits f32 [batch, vocab]; top_k int32 [batch], 0 = all; top_p f32 [batch], 1 = all. Both results are
    [batch, vocab]. Top-k first, then top-p of what is left, renormalised (the order of transformers' warpers;
    nucleus sampling: Holtzman et al. 2020, §3.1: the smallest set whose probability is at least p). Exactly k
    tokens stay even where the k-th ties: the lower id wins.
    """
    order = jnp.argsort(logits, axis=-1, stable=True, descending=True)  # [batch, vocab]
    ranked = jnp.take_along_axis(logits, order, axis=-1)  # [batch, vocab]
    rank = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]  # [1, vocab]
    ranked = jnp.where((top_k[:, None] > 0) & (rank >= top_k[:, None]), -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # the probability of all better tokens
    # p = 1 must keep all, and float32 sums can pass 1 early.
    keep = (before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0)
    return jnp.where(keep, ranked, -jnp.inf), order


def next_token(
    logits: jax.Array,
    step: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    seed: jax.Array,
    *,
    sampled: bool,
    truncated: bool,
) -> jax.Array:
    """Next token ids int32 [batch] from f32 logits [batch, vocab]; the other arrays are `Sampling`'s, step is
    a scalar.

    The draw of row i at step s depends on (seed[i], s) and the row's logits alone. Gumbel-max sampling.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not sampled:
        return greedy
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), step))(seed)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (logits.shape[-1],), jnp.float32))(
        keys
    )  # [batch, vocab]
    if truncated:
        ranked, order = truncate(scaled, top_k, top_p)
        place = jnp.argmax(ranked + jnp.take_along_axis(noise, order, axis=-1), axis=-1)
        drawn = jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0]
    else:
        drawn = jnp.argmax(scaled + noise, axis=-1)
    return jnp.where(temperature > 0, drawn.astype(jnp.int32), greedy)
