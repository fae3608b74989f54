"""One training step and one evaluation step, as functions to be jitted."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from t5style.models.config import TransformerConfig
from t5style.models.transformer import Transformer
from t5style.parallel.rules import constrain
from t5style.train.losses import Metrics, cross_entropy, router_losses
from t5style.train.state import TrainState

Batch = Mapping[str, jax.Array]

# Metrics that go to after_step only: (choices of each expert [layers, experts], tokens [layers]) by side.
_LOAD = "expert_load/"


class Loss(Protocol):
    """What a job learns from: one function for training and, with dropout_key None, for evaluation."""

    def __call__(
        self, params: Any, batch: Batch, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Returns (summed objective, its weight, metrics as (sum, weight)).

        A loss may also have a method `after_step(old, new, metrics) -> (new, metrics)` for what the optimiser
        does not do, given the parameters before and after it.
        """
        ...


@dataclasses.dataclass(frozen=True)
class LanguageModelLoss:
    """Cross-entropy of the decoder's targets, for encoder-decoders and decoder-only models.

    Of models with experts the routers' losses are added, which see all real tokens of both sides
    (losses.router_losses). With accumulation each microbatch is balanced by itself.

    Attributes:
      config: the model.
      label_smoothing, z_loss: see `losses.cross_entropy`.
    """

    config: TransformerConfig
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(
        self, params: Any, batch: Batch, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """See `Loss`. Batch keys are T5X's; int32 `[batch, length]`."""
        model = Transformer(self.config)
        deterministic = dropout_key is None or self.config.dropout == 0.0
        arguments: dict[str, Any] = {
            "decoder_positions": batch["decoder_positions"],
            "decoder_segment_ids": batch["decoder_segment_ids"],
        }
        encoder_tokens = None
        if self.config.architecture == "encoder_decoder":
            encoder_tokens = batch["encoder_input_tokens"]
            arguments["encoder_positions"] = batch["encoder_positions"]
            arguments["encoder_segment_ids"] = batch["encoder_segment_ids"]
        rngs = {} if deterministic else {"dropout": dropout_key}
        hidden, routers = model.apply(
            {"params": params},
            batch["decoder_input_tokens"],
            encoder_tokens,
            **arguments,
            deterministic=deterministic,
            rngs=rngs,
            method="hidden_and_routers",
        )  # [B, L, D]
        # Head and loss work on [tokens, ...]: on CPU, a product of a 3-D operand is nearly twice as slow.
        hidden = hidden.reshape(-1, hidden.shape[-1])  # [B·L, D]
        logits = model.apply({"params": params}, hidden, method="logits")  # [B·L, V] f32
        weights = batch["decoder_loss_weights"].reshape(-1)  # [B·L]
        objective, metrics = cross_entropy(
            logits,
            batch["decoder_target_tokens"].reshape(-1),
            weights,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        total = weights.sum().astype(jnp.float32)
        moe = self.config.moe
        if moe is not None and routers:
            added, figures = router_losses(list(routers.values()), moe, total)
            objective, metrics = objective + added, metrics | figures
            if moe.bias_update_rate and dropout_key is not None:
                metrics |= {
                    f"{_LOAD}{side}": (router.load, router.tokens) for side, router in routers.items()
                }
        return objective, total, metrics

    def after_step(self, old: Any, new: Any, metrics: Metrics) -> tuple[Any, Metrics]:
        """Moves the routers' corrections by their load in this step, that of all microbatches together (Wang
        et al. 2024, algorithm 1); whatever the optimiser made of them is forgotten.
        """
        rest = {name: pair for name, pair in metrics.items() if not name.startswith(_LOAD)}
        for name in sorted(metrics.keys() - rest.keys()):
            path = (name.removeprefix(_LOAD), "moe_layers", "mlp", "router_bias")
            load = metrics[name][0]  # [layers, experts]
            missing = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
            assert self.config.moe is not None
            bias = functools.reduce(operator.getitem, path, old)
            new = _replaced(new, path, bias + self.config.moe.bias_update_rate * missing)
        return new, rest


def _replaced(tree: Any, path: Sequence[str], value: Any) -> Any:
    """The nested dictionary with another value at a path."""
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)} if path else value


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    accumulation: int = 1,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Returns step(state, batch, key) -> (new state, metrics), to be jitted with the state donated.

    The gradient is that of (sum of the objective over all target tokens) / (number of target tokens):
    microbatches add sums and weights and divide once, so accumulation equals the big batch whatever the token
    counts.

    Args:
      loss: see `Loss`.
      optimizer: the optax transformation.
      schedule: the learning rate by step, for the metrics.
      accumulation: microbatches per step; must divide the batch (and its share on each device).
      skip_nonfinite: keep parameters and optimiser state as they were where loss or gradient is not finite;
        the metrics of such a step weigh nothing.

    Metrics beside the loss's own: 'grad_norm' (before clipping), 'learning_rate', 'tokens' (non-padding
    positions the model read), 'nonfinite' (1 where loss or gradient was not finite).
    """

    def objective(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        total, weight, metrics = loss(params, batch, key)
        return total, (weight, metrics)

    gradient = jax.value_and_grad(objective, has_aux=True)

    after_step = getattr(loss, "after_step", None)

    def sums(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, jax.Array, jax.Array, Metrics]:
        (total, (weight, metrics)), grads = gradient(params, batch, key)
        return grads, total, weight, metrics

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if accumulation == 1:
            grads, total, weight, metrics = sums(state.params, batch, key)
        else:
            # Row r goes to microbatch r mod accumulation: each device keeps its own rows.
            # [B, ...] -> [A, B/A, ...]
            micro = {
                name: constrain(
                    x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1),
                    (None, "batch", *[None] * (x.ndim - 1)),
                )
                for name, x in batch.items()
            }
            first = {name: x[0] for name, x in micro.items()}
            zeros = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, state.params, first, key)
            )

            def add(carry: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
                index, rows = item
                part = sums(state.params, rows, jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, carry, part), None

            (grads, total, weight, metrics), _ = jax.lax.scan(
                add, zeros, (jnp.arange(accumulation), micro), length=accumulation
            )
        scale = 1.0 / jnp.maximum(weight, 1.0)
        grads = jax.tree.map(lambda g: g * scale, grads)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if after_step is not None:
            params, metrics = after_step(state.params, params, metrics)
        finite = jnp.isfinite(total) & jnp.isfinite(norm)
        one = jnp.float32(1.0)
        metrics = {
            **metrics,
            "grad_norm": (norm, one),
            "learning_rate": (jnp.asarray(schedule(state.step), jnp.float32), one),
            "tokens": (count_tokens(batch), one),
        }
        if skip_nonfinite:
            keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)  # noqa: E731
            params, opt_state = keep(params, state.params), keep(opt_state, state.opt_state)
            metrics = jax.tree.map(lambda x: jnp.where(finite, x, 0.0), metrics)
        metrics["nonfinite"] = (1.0 - finite.astype(jnp.float32), one)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def make_eval_step(loss: Loss) -> Callable[[Any, Batch], Metrics]:
    """Returns step(params, batch) -> metrics as (sum, weight), without dropout."""

    def eval_step(params: Any, batch: Batch) -> Metrics:
        return loss(params, batch, None)[2]

    return eval_step


def count_tokens(batch: Batch) -> jax.Array:
    """Non-padding positions that enter the model (encoder and decoder), f32 scalar."""
    return sum(
        (jnp.sum(batch[name] > 0).astype(jnp.float32) for name in batch if name.endswith("_segment_ids")),
        start=jnp.float32(0.0),
    )
