"""The model on a batch: hidden states, and how probable each target is. All losses begin here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5style.models.adapters_virtual import Counts, counts, virtual_ids
from t5style.models.config import TransformerConfig
from t5style.models.transformer import Transformer
from t5style.nn.moe import RouterStats
from t5style.parallel import rules

Batch = Mapping[str, jax.Array]

PIECE = 256  # positions whose logits are in memory at once, see of_wanted

_INPUTS = tuple(
    f"{side}_{what}"
    for side in ("encoder", "decoder")
    for what in ("input_tokens", "target_tokens", "loss_weights", "segment_ids", "positions")
)


def flatten_pairs(batch: Batch) -> dict[str, jax.Array]:
    """A batch of pairs, `[pairs, 2, length]`, as rows `[2 · pairs, length]`: chosen, rejected, chosen, …
    Arrays that are not the model's (T5X's feature names) are left out; a batch of rows stays as it is.
    """
    return {
        name: value.reshape(-1, value.shape[-1]) if value.ndim == 3 else value
        for name, value in batch.items()
        if name in _INPUTS
    }


def hidden_states(
    config: TransformerConfig, params: Any, batch: Batch, dropout_key: jax.Array | None
) -> tuple[jax.Array, dict[str, RouterStats]]:
    """The decoder's last hidden states `[rows, length, embed]`, and the routers' statistics by side.

    Args:
      config: the model.
      params: all of its parameters.
      batch: int32 `[rows, length]` under T5X's names.
      dropout_key: of dropout and embedding noise; None for neither.

    An adapter's virtual tokens are put before each row, which must hold one example; what the decoder makes
    of them is left out.
    """
    found = counts(config, params)
    if any(found):
        batch = _with_virtual(config, batch, found)
    deterministic = dropout_key is None or not config.is_random
    arguments: dict[str, Any] = {
        "decoder_positions": batch["decoder_positions"],
        "decoder_segment_ids": batch["decoder_segment_ids"],
    }
    encoder_tokens = None
    if config.architecture == "encoder_decoder":
        encoder_tokens = batch["encoder_input_tokens"]
        arguments["encoder_positions"] = batch["encoder_positions"]
        arguments["encoder_segment_ids"] = batch["encoder_segment_ids"]
    hidden, routers = Transformer(config).apply(
        {"params": params},
        batch["decoder_input_tokens"],
        encoder_tokens,
        **arguments,
        deterministic=deterministic,
        rngs={} if dropout_key is None else {"dropout": dropout_key},
        method="hidden_and_routers",
    )
    return hidden[:, found.decoder :], routers


def _with_virtual(config: TransformerConfig, batch: Batch, found: Counts) -> dict[str, jax.Array]:
    """What the model reads of a batch, with virtual tokens before each row."""
    made = dict(batch)
    for side, count in zip(("encoder", "decoder"), found, strict=True):
        if not count:
            continue
        tokens, segments = batch[f"{side}_input_tokens"], batch[f"{side}_segment_ids"]
        shape = (len(tokens), count)
        before = {
            "input_tokens": jnp.broadcast_to(jnp.asarray(virtual_ids(config, count), jnp.int32), shape),
            "segment_ids": jnp.broadcast_to(segments.max(axis=1, keepdims=True), shape),
            "positions": jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), shape),
        }
        after = {
            "input_tokens": tokens,
            "segment_ids": segments,
            "positions": batch[f"{side}_positions"] + count,
        }
        for name, first in before.items():
            made[f"{side}_{name}"] = jnp.concatenate([first, after[name]], axis=1)
    return made


def logits(config: TransformerConfig, params: Any, hidden: jax.Array) -> jax.Array:
    """Float32 `[tokens, vocab]` of hidden states `[..., embed]`.

    Head and loss work on [tokens, ...]: on CPU, a product of a 3-D operand is nearly twice as slow.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    return Transformer(config).apply({"params": params}, flat, method="logits")


def of_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log p of each target, float32 `[tokens]`, from logits `[tokens, vocab]` and ids int32 `[tokens]`."""
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1, mode="clip")[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def of_wanted(
    config: TransformerConfig, params: Any, hidden: jax.Array, targets: jax.Array, wanted: jax.Array
) -> jax.Array:
    """log p of those targets that are wanted, 0 of the others: float32 like the targets.

    Answers are a part of their rows, prompts and padding the rest, of which nobody needs logits. The wanted
    positions are brought together, and the head runs over as many pieces as they fill, computing them again
    for the gradient: with 22 % of 2,048 positions wanted and 49,152 ids on two cores, 0.43 s instead of 1.35,
    and never the logits of more than `PIECE` positions in memory. Over several devices positions stay where
    they are, and all have logits.

    Args:
      config, params: the model.
      hidden: `[..., embed]`.
      targets: int32 `[...]`.
      wanted: bool `[...]`.
    """
    shape, hidden, targets = targets.shape, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    targets, wanted = jnp.asarray(targets), jnp.asarray(wanted).reshape(-1)  # [...] -> [positions]
    mesh = rules.current_mesh()
    if len(targets) <= PIECE or (mesh is not None and mesh.size > 1):
        found = of_targets(logits(config, params, hidden), targets)
        return jnp.where(wanted, found, 0.0).reshape(shape)
    count = wanted.sum()
    order = jnp.argsort(~wanted, stable=True)  # the wanted ones first
    pieces = -(-len(targets) // PIECE)
    places = jnp.pad(order, (0, pieces * PIECE - len(order))).reshape(pieces, PIECE)

    @jax.checkpoint
    def piece(number: jax.Array, places: jax.Array) -> jax.Array:
        return jax.lax.cond(
            number * PIECE < count,
            lambda: of_targets(logits(config, params, hidden[places]), targets[places]),
            lambda: jnp.zeros(PIECE, jnp.float32),
        )

    found = jax.lax.map(lambda item: piece(*item), (jnp.arange(pieces), places)).reshape(-1)[: len(order)]
    return jnp.where(wanted, jnp.zeros(len(order)).at[order].set(found), 0.0).reshape(shape)


def log_likelihoods(
    config: TransformerConfig, params: Any, batch: Batch, dropout_key: jax.Array | None = None
) -> jax.Array:
    """log p of each `decoder_target_tokens`, float32 `[rows, length]`, 0 where `decoder_loss_weights` is 0.

    A batch of pairs `[pairs, 2, length]` gives `[2 · pairs, length]`.
    """
    rows = flatten_pairs(batch)
    hidden, _ = hidden_states(config, params, rows, dropout_key)
    targets = rows["decoder_target_tokens"]
    return of_wanted(config, params, hidden, targets, rows["decoder_loss_weights"] > 0)
