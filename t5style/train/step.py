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
from t5style.nn.moe import RouterStats
from t5style.parallel.rules import constrain
from t5style.train import likelihood
from t5style.train.losses import Metrics, cross_entropy, router_losses
from t5style.train.state import TrainState

Batch = Mapping[str, jax.Array]
# The trained parameters, and what stays as it is, to the whole model's.
Merge = Callable[[Any, Any], Any]

# Metrics that go to after_step only: (choices of each expert [layers, experts], tokens [layers]) by side.
_LOAD = "expert_load/"


class Loss(Protocol):
    """What a job learns from: one function for training and, with dropout_key None, for evaluation."""

    def __call__(
        self, params: Any, batch: Batch, dropout_key: jax.Array | None, reference: Any = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """Returns (summed objective, its weight, metrics as (sum, weight)).

        params are all of a model's; reference: those of a model that stays as it is, for losses that compare
        with one. Such a loss has the attribute `reference_model`: its config, or None for the same as the
        trained model's.

        A loss may also have a method `after_step(old, new, metrics) -> (new, metrics)` for what the optimiser
        does not do, given the parameters before and after it; and `batch_means(params, batch, reference) ->
        {name: (sum, weight)}` for what it needs of the whole batch, which with accumulation it finds as means
        under these names in each microbatch.
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
        self, params: Any, batch: Batch, dropout_key: jax.Array | None, reference: Any = None
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """See `Loss`. Batch keys are T5X's; int32 `[batch, length]`."""
        hidden, routers = likelihood.hidden_states(self.config, params, batch, dropout_key)  # [B, L, D]
        logits = likelihood.logits(self.config, params, hidden)  # [B·L, V] f32
        weights = batch["decoder_loss_weights"].reshape(-1)  # [B·L]
        objective, metrics = cross_entropy(
            logits,
            batch["decoder_target_tokens"].reshape(-1),
            weights,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        total = weights.sum().astype(jnp.float32)
        added, figures = self.routing(routers, total, training=dropout_key is not None)
        return objective + added, total, metrics | figures

    def routing(
        self, routers: Mapping[str, RouterStats], total: jax.Array, *, training: bool
    ) -> tuple[jax.Array | float, Metrics]:
        """What routers add to an objective of weight `total`, and their metrics; nothing without any."""
        moe = self.config.moe
        if moe is None or not routers:
            return 0.0, {}
        added, metrics = router_losses(list(routers.values()), moe, total)
        if moe.bias_update_rate and training:
            metrics |= {f"{_LOAD}{side}": (router.load, router.tokens) for side, router in routers.items()}
        return added, metrics

    def after_step(self, old: Any, new: Any, metrics: Metrics) -> tuple[Any, Metrics]:
        """Moves the routers' corrections by their load in this step, that of all microbatches together (Wang
        et al. 2024, algorithm 1); whatever the optimiser made of them is forgotten.
        """
        rest = _without_load(metrics)
        for name in sorted(metrics.keys() - rest.keys()):
            path = (name.removeprefix(_LOAD), "moe_layers", "mlp", "router_bias")
            load = metrics[name][0]  # [layers, experts]
            missing = jnp.sign(load.mean(axis=-1, keepdims=True) - load)
            assert self.config.moe is not None
            bias = functools.reduce(operator.getitem, path, old)
            new = _replaced(new, path, bias + self.config.moe.bias_update_rate * missing)
        return new, rest


def _without_load(metrics: Metrics) -> Metrics:
    return {name: pair for name, pair in metrics.items() if not name.startswith(_LOAD)}


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
    merge: Merge | None = None,
    reference: Callable[[Any], Any] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Returns step(state, batch, key, frozen=None) -> (new state, metrics), to be jitted, the state donated.

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
      merge: (state.params, frozen) -> all of the model's parameters, where only some are trained.
      reference: frozen -> parameters of a model that the loss compares with.

    Metrics beside the loss's own: 'grad_norm' (before clipping), 'learning_rate', 'tokens' (non-padding
    positions the model read), 'nonfinite' (1 where loss or gradient was not finite).
    """

    whole = _whole(loss, merge, reference)

    def objective(
        params: Any, batch: Batch, key: jax.Array, frozen: Any
    ) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        total, weight, metrics = whole(params, batch, key, frozen)
        return total, (weight, metrics)

    gradient = jax.value_and_grad(objective, has_aux=True)
    means = _means(loss, merge, reference)

    after_step = getattr(loss, "after_step", None)
    if merge is not None and after_step is not None:  # routers are not among what an adapter trains
        after_step = lambda old, new, metrics: (new, _without_load(metrics))  # noqa: E731

    def sums(
        params: Any, batch: Batch, key: jax.Array, frozen: Any
    ) -> tuple[Any, jax.Array, jax.Array, Metrics]:
        (total, (weight, metrics)), grads = gradient(params, batch, key, frozen)
        return grads, total, weight, metrics

    def train_step(
        state: TrainState, batch: Batch, key: jax.Array, frozen: Any = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        if accumulation == 1:
            grads, total, weight, metrics = sums(state.params, batch, key, frozen)
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
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sums, state.params, first, key, frozen)
            )

            known: dict[str, jax.Array] = {} if means is None else means(state.params, micro, frozen)

            def add(carry: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
                index, rows = item
                part = sums(state.params, {**rows, **known}, jax.random.fold_in(key, index), frozen)
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


def make_eval_step(
    loss: Loss, merge: Merge | None = None, reference: Callable[[Any], Any] | None = None
) -> Callable[..., Metrics]:
    """Returns step(params, batch, frozen=None) -> metrics as (sum, weight), without dropout."""
    whole = _whole(loss, merge, reference)

    def eval_step(params: Any, batch: Batch, frozen: Any = None) -> Metrics:
        return whole(params, batch, None, frozen)[2]

    return eval_step


def _whole(
    loss: Loss, merge: Merge | None, reference: Callable[[Any], Any] | None
) -> Callable[..., tuple[jax.Array, jax.Array, Metrics]]:
    """The loss as a function of the trained parameters, the batch, the key, and what is frozen."""

    def whole(
        params: Any, batch: Batch, key: jax.Array | None, frozen: Any
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        params = params if merge is None else merge(params, frozen)
        return loss(params, batch, key) if reference is None else loss(params, batch, key, reference(frozen))

    return whole


def _means(
    loss: Loss, merge: Merge | None, reference: Callable[[Any], Any] | None
) -> Callable[[Any, Batch, Any], dict[str, jax.Array]] | None:
    """The loss's batch_means over microbatches `[accumulation, rows, ...]`; None where it has none."""
    of_batch = getattr(loss, "batch_means", None)
    if of_batch is None:
        return None

    def means(params: Any, micro: Batch, frozen: Any) -> dict[str, jax.Array]:
        params = jax.lax.stop_gradient(params if merge is None else merge(params, frozen))
        other = None if reference is None else reference(frozen)
        pairs = jax.lax.map(lambda rows: of_batch(params, rows, other), micro)
        return {name: total.sum() / jnp.maximum(weight.sum(), 1.0) for name, (total, weight) in pairs.items()}

    return means


def count_tokens(batch: Batch) -> jax.Array:
    """Non-padding positions that enter the model (encoder and decoder), f32 scalar."""
    return sum(
        (jnp.sum(batch[name] > 0).astype(jnp.float32) for name in batch if name.endswith("_segment_ids")),
        start=jnp.float32(0.0),
    )
