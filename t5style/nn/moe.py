"""Mixture of experts: each token is computed by a few of many MLPs, which a learned router chooses.

Families differ in how scores become choices and weights; each difference is a field of MoE:

| family | fields that are not the default |
|---|---|
| Switch Transformer (Fedus et al. 2021) | per_token 1, capacity |
| Mixtral, Qwen3-MoE | normalize |
| Qwen2-MoE | shared_d_ff, shared_gate |
| DeepSeek-V2 | scale, shared_d_ff, groups, groups_per_token |
| DeepSeek-V3 | the same, router 'sigmoid', correction_bias, normalize, group_score 'top2' |
| GPT-OSS | choose_first, bias |
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.nn import platform
from t5style.nn.moe_dispatch import Choices, ExpertMlp, Parameters, Weights, run_experts
from t5style.nn.parameter import Init, named, zeros
from t5style.nn.projection import Projection
from t5style.nn.settings import MoE
from t5style.parallel.rules import constrain


class RouterStats(NamedTuple):
    """Sums over the real tokens of a row, `[batch, ...]`; those of rows, batches and devices add up.

    Layers give them by row, so that rows are added once after all layers and not, between devices, in each.
    What follows is what is left when rows are added.

    Attributes:
      tokens: f32 `[]`, how many.
      load: f32 `[experts]`, how many chose each expert (its capacity not considered).
      probability: f32 `[experts]`, sum of their scores, each token's divided by their sum.
      log_partition: f32 `[]`, sum of logsumexp(logits)².
      dropped: f32 `[]`, choices that found their expert full.
    """

    tokens: jax.Array
    load: jax.Array
    probability: jax.Array
    log_partition: jax.Array
    dropped: jax.Array


def balance_loss(stats: RouterStats) -> jax.Array:
    """Load-balancing loss of a layer, experts · Σ f·P (Fedus et al. 2021, equations 4 to 6).

    f is the number of choices of an expert per token, so that f adds up to per_token and an even load gives
    per_token: transformers' load_balancing_loss_func of one layer. Stacked statistics `[layers, ...]` give
    `[layers]`.
    """
    tokens = jnp.maximum(stats.tokens, 1.0)[..., None]
    return stats.load.shape[-1] * jnp.sum(stats.load / tokens * (stats.probability / tokens), axis=-1)


def z_loss(stats: RouterStats) -> jax.Array:
    """Router z-loss of a layer, the mean of logsumexp(logits)² (Zoph et al. 2022, ST-MoE, equation 5)."""
    return stats.log_partition / jnp.maximum(stats.tokens, 1.0)


class Routing(NamedTuple):
    """What each token chose.

    Attributes:
      experts: int32 `[..., per_token]`, best first.
      weights: f32 `[..., per_token]`.
      probability: f32 `[..., experts]`, scores divided by their sum.
    """

    experts: jax.Array
    weights: jax.Array
    probability: jax.Array


def top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """jax.lax.top_k over the last axis, which each device computes of its own rows only."""
    if platform.divides_top_k():
        values, indices = jax.lax.top_k(x, count)
        return values, indices
    order = jnp.argsort(x, axis=-1, stable=True, descending=True)[..., :count]
    return jnp.take_along_axis(x, order, axis=-1), order


def route(moe: MoE, logits: jax.Array, correction: jax.Array | None = None) -> Routing:
    """Chooses experts by logits f32 `[..., experts]`; correction f32 `[experts]` if moe.correction_bias."""
    if moe.choose_first:
        best, experts = top_k(logits, moe.per_token)
        weights = jax.nn.softmax(best, axis=-1)
        probability = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.softmax(logits, axis=-1) if moe.router == "softmax" else jax.nn.sigmoid(logits)
        choice = scores if correction is None else scores + correction
        choice = jax.lax.stop_gradient(choice)
        if moe.groups > 1:
            grouped = choice.reshape(*choice.shape[:-1], moe.groups, -1)  # [..., groups, experts of a group]
            best = top_k(grouped, 2 if moe.group_score == "top2" else 1)[0].sum(axis=-1)
            chosen = top_k(best, moe.groups_per_token)[1]  # [..., groups_per_token]
            open_groups = jax.nn.one_hot(chosen, moe.groups, dtype=bool).any(axis=-2)  # [..., groups]
            choice = jnp.where(open_groups[..., None], grouped, -jnp.inf).reshape(choice.shape)
        experts = top_k(choice, moe.per_token)[1]
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        probability = scores
        if moe.router == "sigmoid":
            probability = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
    if moe.normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, weights * moe.scale, probability)


def within_capacity(experts: jax.Array, real: jax.Array | None, capacity: int, count: int) -> jax.Array:
    """Which choices find room: all first choices of a row in order, then all second ones, and so on.

    Args:
      experts: int32 `[batch, length, per_token]`.
      real: bool `[batch, length]`, False for padding, which takes no room; None: none is padding.
      capacity: tokens of a row that an expert takes.
      count: how many experts there are.

    Returns:
      bool `[batch, length, per_token]`, False for padding.
    """
    batch, length, per_token = experts.shape
    ordered = experts.swapaxes(1, 2).reshape(batch, per_token * length)
    taken = jax.nn.one_hot(ordered, count, dtype=jnp.int32)  # [batch, per_token · length, experts]
    if real is not None:
        taken = taken * jnp.tile(real, (1, per_token))[..., None]
    place = jnp.cumsum(taken, axis=1)  # counted from 1
    fits = (taken * (place <= capacity)).any(axis=-1)
    return fits.reshape(batch, per_token, length).swapaxes(1, 2)


class ExpertsProjection(nn.Module):
    """A linear map for each expert: kernel `[experts, inner, outer]`, bias `[experts, outer]`."""

    experts: int
    inner: int
    outer: int
    names: tuple[str, str]
    initializer: Init
    bias: bool
    param_dtype: str

    @nn.compact
    def __call__(self) -> Weights:
        """The parameters."""
        dtype, names = jnp.dtype(self.param_dtype), ("expert", *self.names)

        def init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
            return jax.vmap(lambda k: self.initializer(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

        kernel = self.param("kernel", named(init, names), (self.experts, self.inner, self.outer), dtype)
        bias = None
        if self.bias:
            bias = self.param("bias", named(zeros, ("expert", names[2])), (self.experts, self.outer), dtype)
        return Weights(kernel, bias)


class Experts(nn.Module):
    """The MLPs of all experts; the fields are those of MoeMlp."""

    moe: MoE
    d_model: int
    mlp: ExpertMlp
    input_init: Init
    output_init: Init
    param_dtype: str

    def setup(self) -> None:
        make = functools.partial(
            ExpertsProjection, self.moe.experts, bias=self.moe.bias, param_dtype=self.param_dtype
        )
        width, inner = self.d_model, self.moe.d_ff
        self.inputs = [
            make(inner=width, outer=inner, names=("embed", "mlp"), initializer=self.input_init)
            for _ in self.mlp.activations
        ]
        self.output = make(inner=inner, outer=width, names=("mlp", "embed"), initializer=self.output_init)

    def __call__(
        self, x: jax.Array, choices: Choices, capacity: int | None, deterministic: bool
    ) -> jax.Array:
        """See nn/moe_dispatch.run_experts: `[batch, length, embed]`."""
        parameters = Parameters(tuple(each() for each in self.inputs), self.output())
        if self.is_initializing():
            return x  # parameters are all that is wanted
        dropping = self.mlp.dropout and not deterministic
        key = self.make_rng("dropout") if dropping else None
        return run_experts(x, choices, parameters, self.mlp, capacity=capacity, key=key)


class MoeMlp(nn.Module):
    """A mixture of experts in place of a layer's MLP.

    Parameters: `router/kernel` `[embed, experts]` (and `router/bias`), `router_bias` `[experts]` (the
    correction), `experts/inputs_{0,1}/kernel` `[experts, embed, mlp]`, `experts/output/kernel` `[experts,
    mlp, embed]` (and their `bias`), `shared/...`, `shared_gate/kernel` `[embed, 1]`.

    Attributes:
      moe: the settings.
      d_model: width of the tokens.
      activations: one name for plain experts, two for gated ones (nn/activations.py).
      router_init, input_init, output_init: initializers of the router and of the two sides of an expert, each
        called with the shape of one matrix.
      clamp: see nn/activations.hidden.
      dropout: rate, on the experts' hidden layer.
      param_dtype: of all parameters; the computation is in x's dtype, routing in float32.
      precision: of the experts' products, see nn/projection.project.
      shared: the MLP of moe.shared_d_ff, called with (x, deterministic), None if there is none. Built inline
        (parent=None), its parameters are `shared/...`.
    """

    moe: MoE
    d_model: int
    activations: tuple[str, ...]
    router_init: Init
    input_init: Init
    output_init: Init
    clamp: float | None = None
    dropout: float = 0.0
    param_dtype: str = "float32"
    precision: str = "default"
    shared: nn.Module | None = None

    def setup(self) -> None:
        moe = self.moe
        if (self.shared is None) == bool(moe.shared_d_ff):
            raise ValueError(
                f"MoeMlp: moe.shared_d_ff = {moe.shared_d_ff} and shared = {self.shared} contradict"
                " each other"
            )
        self.router = Projection(
            (self.d_model,),
            (moe.experts,),
            ("embed", "expert"),
            self.router_init,
            param_dtype=self.param_dtype,
            # In float32 throughout: rounding decides between experts (Fedus et al. 2021, section 2.4).
            precision="highest",
            bias=moe.bias,
        )
        if moe.correction_bias:
            self.router_bias = self.param(
                "router_bias", named(zeros, ("expert",)), (moe.experts,), jnp.dtype("float32")
            )
        self.experts = Experts(
            moe,
            self.d_model,
            ExpertMlp(self.activations, self.clamp, self.precision, self.dropout),
            self.input_init,
            self.output_init,
            self.param_dtype,
        )
        if moe.shared_gate:
            self.shared_gate = Projection(
                (self.d_model,),
                (1,),
                ("embed", "one"),
                self.router_init,
                param_dtype=self.param_dtype,
                precision=self.precision,
            )

    def __call__(
        self,
        x: jax.Array,
        *,
        real: jax.Array | None = None,
        deterministic: bool = True,
        stats: bool = False,
    ) -> tuple[jax.Array, RouterStats | None]:
        """`[batch, length, embed] -> [batch, length, embed]`, and the router's statistics if asked for.

        Args:
          x: the tokens, normalised.
          real: `[batch, length]`, 0 or False for padding, to which experts add 0 and which takes no capacity
            and no part in statistics; None: every token is real.
          deterministic: no dropout.
          stats: whether to compute RouterStats, by row; otherwise None is returned for them.
        """
        moe, length = self.moe, x.shape[1]
        logits = self.router(x.astype(jnp.float32))  # [batch, length, experts]
        logits = constrain(logits, ("batch", "length", None))
        routing = route(moe, logits, self.router_bias if moe.correction_bias else None)
        kept = None
        if real is not None:
            real = real.astype(bool)
            kept = jnp.broadcast_to(real[..., None], routing.experts.shape)
        capacity = moe.capacity_for(length)
        if capacity is not None and capacity < length:
            kept = within_capacity(routing.experts, real, capacity, moe.experts)
        choices = Choices(routing.experts, routing.weights, kept)
        y = self.experts(x, choices, capacity, deterministic)
        y = constrain(y, ("batch", "length", "embed"))
        if self.shared is not None:
            shared = self.shared(x, deterministic)
            if moe.shared_gate:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x))
            y = y + shared
        return y, _statistics(logits, routing, real, kept) if stats else None


def _statistics(
    logits: jax.Array, routing: Routing, real: jax.Array | None, kept: jax.Array | None
) -> RouterStats:
    weight = jnp.ones(logits.shape[:2]) if real is None else real.astype(jnp.float32)  # [batch, length]
    chosen = jax.nn.one_hot(routing.experts, logits.shape[-1], dtype=jnp.float32).sum(axis=-2)
    load = jnp.einsum("ble,bl->be", chosen, weight)
    dropped = jnp.zeros(load.shape[:1])
    if kept is not None:
        dropped = load.sum(axis=-1) - kept.sum(axis=(1, 2), dtype=jnp.float32)
    return RouterStats(
        tokens=weight.sum(axis=1),
        load=load,
        probability=jnp.einsum("ble,bl->be", routing.probability, weight),
        log_partition=jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * weight, axis=1),
        dropped=dropped,
    )
