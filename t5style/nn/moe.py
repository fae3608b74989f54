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
from jax.ad_checkpoint import checkpoint_name

from t5style.nn import activations
from t5style.nn.attention import Dropout
from t5style.nn.grouped import project_groups
from t5style.nn.parameter import Init, named, zeros
from t5style.nn.projection import Projection
from t5style.nn.settings import MoE
from t5style.parallel.rules import constrain


class RouterStats(NamedTuple):
    """Sums over the real tokens of a batch; those of several batches or devices add up.

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


def route(moe: MoE, logits: jax.Array, correction: jax.Array | None = None) -> Routing:
    """Chooses experts by logits f32 `[..., experts]`; correction f32 `[experts]` if moe.correction_bias."""
    if moe.choose_first:
        best, experts = jax.lax.top_k(logits, moe.per_token)
        weights = jax.nn.softmax(best, axis=-1)
        probability = jax.nn.softmax(logits, axis=-1)
    else:
        scores = jax.nn.softmax(logits, axis=-1) if moe.router == "softmax" else jax.nn.sigmoid(logits)
        choice = scores if correction is None else scores + correction
        choice = jax.lax.stop_gradient(choice)
        if moe.groups > 1:
            grouped = choice.reshape(*choice.shape[:-1], moe.groups, -1)  # [..., groups, experts of a group]
            best = jax.lax.top_k(grouped, 2 if moe.group_score == "top2" else 1)[0].sum(axis=-1)
            chosen = jax.lax.top_k(best, moe.groups_per_token)[1]  # [..., groups_per_token]
            open_groups = jax.nn.one_hot(chosen, moe.groups, dtype=bool).any(axis=-2)  # [..., groups]
            choice = jnp.where(open_groups[..., None], grouped, -jnp.inf).reshape(choice.shape)
        experts = jax.lax.top_k(choice, moe.per_token)[1]
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_rows(x: jax.Array, order: jax.Array, inverse: jax.Array, copies: int) -> jax.Array:
    """Rows of x, each repeated `copies` times, in another order.

    Its own gradient because a gather's would be a scatter; that of a permutation is a gather again.

    Args:
      x: `[rows, width]`.
      order: int32 `[rows · copies]`, a permutation of the repeated rows.
      inverse: its inverse.
      copies: how often each row is there.
    """
    del inverse
    return jnp.take(x, order // copies, axis=0)  # [rows · copies, width]


def _take_rows_forward(
    x: jax.Array, order: jax.Array, inverse: jax.Array, copies: int
) -> tuple[jax.Array, jax.Array]:
    return take_rows(x, order, inverse, copies), inverse


def _take_rows_backward(copies: int, inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    rows = jnp.take(gradient, inverse, axis=0).reshape(-1, copies, gradient.shape[-1])
    return rows.sum(axis=1), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


class ExpertsProjection(nn.Module):
    """A linear map for each expert: kernel `[experts, inner, outer]`, bias `[experts, outer]`."""

    experts: int
    inner: int
    outer: int
    names: tuple[str, str]
    initializer: Init
    bias: bool
    param_dtype: str
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array, sizes: jax.Array, expert: jax.Array, all_rows: bool) -> jax.Array:
        """`[rows, inner] -> [rows, outer]`; row r belongs to `expert[r]`, sizes say how many each has.

        all_rows: every row belongs to an expert; others have a number that no expert has, and come last.
        """
        dtype, names = jnp.dtype(self.param_dtype), ("expert", *self.names)

        def init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
            return jax.vmap(lambda k: self.initializer(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

        kernel = self.param("kernel", named(init, names), (self.experts, self.inner, self.outer), dtype)
        y = project_groups(x, kernel, sizes, all_rows=all_rows, precision=self.precision)
        if self.bias:
            bias = self.param("bias", named(zeros, ("expert", names[2])), (self.experts, self.outer), dtype)
            y = y + jnp.take(bias, expert, axis=0, mode="clip").astype(y.dtype)
        return y


class Experts(nn.Module):
    """The MLPs of all experts; the fields are those of MoeMlp."""

    moe: MoE
    d_model: int
    activations: tuple[str, ...]
    input_init: Init
    output_init: Init
    clamp: float | None
    dropout: float
    param_dtype: str
    precision: str

    def setup(self) -> None:
        make = functools.partial(
            ExpertsProjection,
            self.moe.experts,
            bias=self.moe.bias,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        width, inner = self.d_model, self.moe.d_ff
        self.inputs = [
            make(inner=width, outer=inner, names=("embed", "mlp"), initializer=self.input_init)
            for _ in self.activations
        ]
        self.output = make(inner=inner, outer=width, names=("mlp", "embed"), initializer=self.output_init)

    def __call__(
        self,
        x: jax.Array,
        experts: jax.Array,
        weights: jax.Array,
        kept: jax.Array | None,
        deterministic: bool,
    ) -> jax.Array:
        """Sum of the chosen experts' outputs, weighted.

        Args:
          x: `[tokens, embed]`.
          experts: int32 `[tokens, per_token]`.
          weights: f32 `[tokens, per_token]`.
          kept: bool `[tokens, per_token]`; a choice that is not kept adds 0. None: all are.
          deterministic: no dropout.

        Returns:
          `[tokens, embed]`.
        """
        tokens, per_token = experts.shape
        expert = experts if kept is None else jnp.where(kept, experts, self.moe.experts)
        expert = expert.reshape(-1)  # [tokens · per_token]
        order = jnp.argsort(expert)  # stable, so that an expert's tokens stay in order
        inverse = jnp.argsort(order)
        sizes = jnp.sum(expert[:, None] == jnp.arange(self.moe.experts), axis=0, dtype=jnp.int32)
        groups = {"sizes": sizes, "expert": jnp.take(expert, order), "all_rows": kept is None}
        rows = take_rows(x, order, inverse, per_token)  # [tokens · per_token, embed]
        inputs = [checkpoint_name(each(rows, **groups), "mlp_hidden") for each in self.inputs]
        hidden = activations.hidden(inputs, self.activations, self.clamp)  # [tokens · per_token, mlp]
        if self.dropout and not deterministic:
            hidden = Dropout(self.dropout, self.make_rng("dropout"))(hidden)
        out = self.output(hidden, **groups)
        out = take_rows(out, inverse, order, 1).reshape(tokens, per_token, self.d_model)
        if kept is not None:
            weights = jnp.where(kept, weights, 0.0)
        return (out.astype(jnp.float32) * weights[..., None]).sum(axis=1).astype(x.dtype)


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
            self.activations,
            self.input_init,
            self.output_init,
            self.clamp,
            self.dropout,
            self.param_dtype,
            self.precision,
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
          stats: whether to compute RouterStats; otherwise None is returned for them.
        """
        moe, (batch, length, width) = self.moe, x.shape
        logits = self.router(x.astype(jnp.float32))  # [batch, length, experts]
        routing = route(moe, logits, self.router_bias if moe.correction_bias else None)
        kept = None
        if real is not None:
            real = real.astype(bool)
            kept = jnp.broadcast_to(real[..., None], routing.experts.shape)
        capacity = moe.capacity_for(length)
        if capacity is not None and capacity < length:
            kept = within_capacity(routing.experts, real, capacity, moe.experts)
        y = self.experts(
            x.reshape(batch * length, width),
            routing.experts.reshape(batch * length, -1),
            routing.weights.reshape(batch * length, -1),
            None if kept is None else kept.reshape(batch * length, -1),
            deterministic,
        ).reshape(batch, length, width)
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
    load = jnp.einsum("ble,bl->e", chosen, weight)
    return RouterStats(
        tokens=weight.sum(),
        load=load,
        probability=jnp.einsum("ble,bl->e", routing.probability, weight),
        log_partition=jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * weight),
        dropped=jnp.zeros(()) if kept is None else load.sum() - kept.sum(dtype=jnp.float32),
    )
