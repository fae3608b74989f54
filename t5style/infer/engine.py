"""What decoding needs of a model: its parameters layer by layer, reading prompts, and single steps."""

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
from t5style.infer.ids import TokenIds
from t5style.models.adapters_virtual import counts, virtual_ids
from t5style.models.cache import init_cache
from t5style.models.config import TransformerConfig
from t5style.models.params import unstack_layers
from t5style.models.transformer import Transformer
from t5style.parallel import rules as rules_lib

# Tokens of a prompt that are read at a time: more would not be faster, and memory grows with them.
CHUNK = 512

Cache = dict[str, Any]


_unstacked = jax.jit(unstack_layers)


def forward(
    config: TransformerConfig, variables: Any, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Logits f32 [rows, count, vocab] after tokens int32 [rows, count], and the cache with them."""
    logits, cache = Transformer(config).apply(variables, tokens, cache, method="decode")
    return logits, cache


def last_logits(
    config: TransformerConfig, variables: Any, tokens: jax.Array, cache: Cache, valid: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """Logits f32 [rows, vocab] after the last of tokens int32 [rows, count], and the cache with them."""
    model = Transformer(config)
    hidden, cache = model.apply(variables, tokens, cache, valid=valid, method="decode_hidden")
    return model.apply(variables, hidden[:, -1], method="logits"), cache


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _forward(
    config: TransformerConfig, variables: Any, tokens: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    return forward(config, variables, tokens, cache)


@functools.partial(jax.jit, static_argnames=("config", "slots", "dtype", "ring"))
def _start(
    config: TransformerConfig,
    variables: Any,
    arrays: dict[str, jax.Array],
    first: jax.Array,
    *,
    slots: int,
    dtype: str | None,
    ring: bool,
) -> tuple[jax.Array, Cache]:
    """Logits after the first chunk of the prompts (of an encoder-decoder: after `first`, int32 [count], the
    prompts encoded), and the cache.
    """
    tokens, mask = arrays["tokens"], arrays["mask"]
    batch = len(tokens)
    if not config.encoder_layers:
        cache = init_cache(config, batch, slots, dtype=dtype, chunk=tokens.shape[1] if ring else None)
        return last_logits(config, variables, tokens, cache, mask)
    encoded = Transformer(config).apply(
        variables, tokens, segment_ids=mask, method="encode"
    )  # [batch, length, embed]
    cache = init_cache(
        config,
        batch,
        slots,
        params=variables["params"],
        encoded=encoded,
        encoder_segment_ids=mask,
        dtype=dtype,
    )
    return last_logits(config, variables, jnp.broadcast_to(first, (batch, len(first))), cache)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _read(
    config: TransformerConfig, variables: Any, arrays: dict[str, jax.Array], cache: Cache
) -> tuple[jax.Array, Cache]:
    """Logits after a further chunk of the prompts, and the cache with it."""
    return last_logits(config, variables, arrays["tokens"], cache, arrays["mask"])


@jax.jit
def _take(tree: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0) if leaf.ndim else leaf, tree)


def take_rows(cache: Any, rows: Any) -> Any:
    """A cache whose row i is row rows[i] of the given one; any tree of arrays [batch, ...] and scalars."""
    return _take(cache, jnp.asarray(rows, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Prompts that were read: the logits of what comes next, f32 [batch, vocab], and the cache.

    The first rows are the prompts', in their order; the others fill the batch.
    """

    logits: jax.Array
    cache: Cache

    @property
    def batch(self) -> int:
        """Rows."""
        return int(self.logits.shape[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
    """What decoding needs of a model.

    cache_dtype: of the cached keys and values; None: as the model computes.
    """

    config: TransformerConfig
    params: Any
    ids: TokenIds
    mesh: Mesh | None = None
    rules: rules_lib.Rules | None = None
    cache_dtype: str | None = None

    @functools.cached_property
    def variables(self) -> Any:
        """The parameters, each layer's for itself: a loop that reads one layer of stacked arrays would copy
        it at every step. Made once.
        """
        with on_mesh(self.mesh, self.rules):
            return {"params": _unstacked(self.params)}

    def prefill(self, prompts: Sequence[np.ndarray], room: int, ring: bool = True) -> Prefilled:
        """Reads prompts, int arrays [length] of at least one token; `room` tokens may follow in the cache.

        An encoder-decoder encodes them, and its decoder reads the start token. Virtual tokens of an adapter
        are put before them. ring: layers with a window
        forget what no later token sees; this needs all tokens that follow to be real, one or a few at a time.
        """
        batch = batch_bucket(len(prompts), self.mesh)
        found = counts(self.config, self.params)
        before = [np.asarray(virtual_ids(self.config, count), np.int32) for count in found]
        first = np.append(before[1], np.int32(self.ids.start))
        own = before[0] if self.config.encoder_layers else before[1]
        prompts = [np.concatenate([own, prompt]) for prompt in prompts] if len(own) else prompts
        longest = max(map(len, prompts))
        if self.config.encoder_layers:
            tokens, mask = pad_rows(prompts, batch, bucket(longest), self.ids.pad)
            step, slots = tokens.shape[1], len(first)
        else:
            # All prompts end in the same slot, where the first new token follows: padded on the left.
            step = min(bucket(longest), CHUNK)
            width = -(-longest // step) * step
            tokens, mask = pad_rows(prompts, batch, width, self.ids.pad, left=True)
            slots = prompt_bucket(width)
        with on_mesh(self.mesh, self.rules):
            for start in range(0, tokens.shape[1], step):
                part = slice(start, start + step)
                arrays = put({"tokens": tokens[:, part], "mask": mask[:, part]}, self.mesh)
                if start == 0:
                    logits, cache = _start(
                        self.config,
                        self.variables,
                        arrays,
                        first,
                        slots=slots + room,
                        dtype=self.cache_dtype,
                        ring=ring,
                    )
                else:
                    logits, cache = _read(self.config, self.variables, arrays, cache)
        return Prefilled(logits, cache)

    def forward(self, tokens: Any, cache: Cache) -> tuple[jax.Array, Cache]:
        """See `forward`: one compiled step; the cache that is given is gone."""
        with on_mesh(self.mesh, self.rules):
            return _forward(self.config, self.variables, jnp.asarray(tokens, jnp.int32), cache)


def prompt_bucket(length: int) -> int:
    """Slots for a prompt: a power of two, or beyond CHUNK one and a half times one, so that at most a third
    is added to a long prompt.
    """
    size = bucket(length)
    return size // 4 * 3 if CHUNK < length <= size // 4 * 3 else size
