"""Autoregressive decoding with a key-value cache: the engine behind Model.generate, stream, and their kin.

How it is built, for those who add to it:

- `Settings` (settings.py) is what one request may ask for; `sampling.py` turns the settings of a batch into
  arrays, and logits into the next token on the device.
- `Engine` holds what decoding needs of a model. `engine.prefill(prompts, room)` reads prompts (in chunks of
  CHUNK tokens) and returns a `Prefilled`: the cache, with room for `room` more tokens, and the logits f32
  [rows, vocab] of what comes first; rows are padded to `Prefilled.batch`. `engine.forward(tokens, cache)`
  feeds int32 [rows, count] and returns logits f32 [rows, count, vocab] and the cache (donated: the one given
  is gone). Beam search and speculative decoding are loops of their own on these, or compile
  `forward(config, variables, tokens, cache)` into one.
- The cache is opaque. `take_rows(cache, rows)` repeats or reorders its rows (every array in it has the rows
  first, scalars are shared), `rewind(cache, count)` forgets its last `count` tokens in every row.
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
from jax.sharding import Mesh

from t5style.infer.batch import batch_bucket, bucket, on_mesh, pad_rows, put
from t5style.infer.sampling import Sampling, next_token
from t5style.models.cache import init_cache
from t5style.models.config import TransformerConfig
from t5style.models.params import unstack_layers
from t5style.models.transformer import Transformer
from t5style.parallel import rules as rules_lib


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch to decode.

    prompts: token ids of each row, at least one each; an encoder-decoder reads them in its encoder.
    sampling: settings of each row.
    eos_ids: tokens that end an answer (kept as its last token); none: only max_new_tokens does.
    start_id: what the decoder of an encoder-decoder starts with.
    """

    prompts: Sequence[np.ndarray]
    max_new_tokens: int
    sampling: Sampling
    eos_ids: Sequence[int]
    pad_id: int
    start_id: int


def decode(
    config: TransformerConfig,
    params: Any,
    request: Request,
    mesh: Mesh | None = None,
    rules: rules_lib.Rules | None = None,
) -> np.ndarray:
    """New tokens int32 [batch, max_new_tokens]; after a row's end token everything is pad_id."""
    rows, new = len(request.prompts), request.max_new_tokens
    batch = batch_bucket(rows, mesh)
    longest = bucket(max(len(prompt) for prompt in request.prompts))
    both = config.architecture == "encoder_decoder"
    # A decoder's prompts end in the same slot, where the first new token follows: padded on the left.
    tokens, mask = pad_rows(request.prompts, batch, longest, request.pad_id, left=not both)

    def widen(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array, np.zeros(batch - rows, array.dtype)])

    arrays = {
        "tokens": tokens,
        "mask": mask,
        "done": np.arange(batch) >= rows,
        **{
            field.name: widen(getattr(request.sampling, field.name)) for field in dataclasses.fields(Sampling)
        },
    }
    eos = np.full(bucket(len(request.eos_ids), 1), -1, np.int32)  # no token is -1
    eos[: len(request.eos_ids)] = request.eos_ids
    with on_mesh(mesh, rules):
        out = _program(
            config,
            params,
            put(arrays, mesh),
            eos,
            np.int32(request.pad_id),
            np.int32(request.start_id),
            np.int32(new),
            slots=bucket(new),
            sampled=request.sampling.sampled,
            truncated=request.sampling.truncated,
        )
    return np.asarray(jax.device_get(out))[:rows, :new]


@functools.partial(jax.jit, static_argnames=("config", "slots", "sampled", "truncated"))
def _program(
    config: TransformerConfig,
    params: Any,
    arrays: dict[str, jax.Array],
    eos: jax.Array,
    pad_id: jax.Array,
    start_id: jax.Array,
    limit: jax.Array,
    *,
    slots: int,
    sampled: bool,
    truncated: bool,
) -> jax.Array:
    """New tokens int32 [batch, slots], of which the first `limit` columns count."""
    model = Transformer(config)
    tokens, mask = arrays["tokens"], arrays["mask"]
    batch = tokens.shape[0]
    if config.encoder_layers:
        encoded = model.apply(
            {"params": params}, tokens, segment_ids=mask, method="encode"
        )  # [batch, length, embed]
        prompt, valid = jnp.full((batch, 1), start_id, jnp.int32), jnp.ones((batch, 1), jnp.int32)
        start = {"params": params, "encoded": encoded, "encoder_segment_ids": mask}
    else:
        prompt, valid, start = tokens, mask, {}
    cache = init_cache(
        config, batch, prompt.shape[1] + slots - 1, **start
    )  # the last new token is never fed back
    variables = {"params": unstack_layers(config, params)}
    choose = functools.partial(
        next_token,
        temperature=arrays["temperature"],
        top_k=arrays["top_k"],
        top_p=arrays["top_p"],
        seed=arrays["seed"],
        sampled=sampled,
        truncated=truncated,
    )

    def advance(tokens: jax.Array, cache: Any, valid: jax.Array | None) -> tuple[jax.Array, Any]:
        """Logits f32 [batch, vocab] after the last of `tokens` [batch, count], and the cache."""
        hidden, cache = model.apply(variables, tokens, cache, valid=valid, method="decode_hidden")
        return model.apply(variables, hidden[:, -1], method="logits"), cache

    def write(
        out: jax.Array, token: jax.Array, done: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        token = jnp.where(done, pad_id, token)
        out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
        return out, token, done | (token[:, None] == eos[None, :]).any(axis=1)

    logits, cache = advance(prompt, cache, valid)
    out = jnp.full((batch, slots), pad_id, jnp.int32)
    out, token, done = write(out, choose(logits, jnp.int32(0)), arrays["done"], jnp.int32(0))

    def unfinished(state: Any) -> jax.Array:
        step, _, done, _, _ = state
        return (step < limit) & ~done.all()

    def body(state: Any) -> Any:
        step, token, done, out, cache = state
        logits, cache = advance(token[:, None], cache, None)
        out, token, done = write(out, choose(logits, step), done, step)
        return step + 1, token, done, out, cache

    return jax.lax.while_loop(unfinished, body, (jnp.int32(1), token, done, out, cache))[3]
