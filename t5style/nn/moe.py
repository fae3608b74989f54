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

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from t5style.nn import activations
from t5style.nn.attention import Dropout
from t5style.nn.grouped import project_groups
from t5style.nn.parameter import Init, named, zeros
from t5style.nn.projection import Projection
from t5style.parallel.rules import constrain

ROUTERS = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")


@dataclasses.dataclass(frozen=True)
class MoE:
    """Settings of a mixture of experts.

    Attributes:
      experts: how many there are.
      per_token: how many compute each token.
      d_ff: width of an expert's hidden layer.
      router: what makes scores of the router's logits: 'softmax' over all experts, or 'sigmoid' of each.
      choose_first: the softmax is over the chosen experts' logits only (Mixtral's paper, GPT-OSS; the same as
        normalize up to rounding).
      normalize: divide the weights of the chosen experts by their sum.
      scale: a factor on the weights, after that.
      correction_bias: a learned number for each expert is added to its score for choosing, not to its weight
        (DeepSeek-V3, section 2.1.2). It has no gradient: whoever trains moves it by the experts' load.
      groups: experts stand in so many groups of equal size, of which each token first chooses
        groups_per_token and then its experts among theirs.
      groups_per_token: see groups.
      group_score: a group's score: the largest of its experts' ('max', DeepSeek-V2) or the sum of its two
        largest ('top2', DeepSeek-V3).
      shared_d_ff: width of an MLP that computes every token besides; 0 for none.
      shared_gate: its output is multiplied by the sigmoid of a learned projection of the token.
      bias: the router and the experts have biases.
      capacity: how many tokens of a row of the batch an expert computes; those that come later pass with a
        zero for its output. None: as many as choose it.
      capacity_factor: the same as a multiple of an even share, length · per_token / experts, rounded up.
    """

    experts: int
    per_token: int
    d_ff: int
    router: str = "softmax"
    choose_first: bool = False
    normalize: bool = False
    scale: float = 1.0
    correction_bias: bool = False
    groups: int = 1
    groups_per_token: int = 1
    group_score: str = "max"
    shared_d_ff: int = 0
    shared_gate: bool = False
    bias: bool = False
    capacity: int | None = None
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("experts", 1),
            ("per_token", 1),
            ("d_ff", 1),
            ("groups", 1),
            ("groups_per_token", 1),
            ("shared_d_ff", 0),
            ("capacity", 1),
        ):
            value = getattr(self, name)
            if value is None and name == "capacity":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"MoE.{name} = {value!r} must be a whole number of at least {least}")
        for name, choices in (("router", ROUTERS), ("group_score", GROUP_SCORES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"MoE.{name} = {getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.experts % self.groups:
            raise ValueError(
                f"MoE.experts = {self.experts} is not a multiple of groups = {self.groups}: groups must be of "
                "equal size"
            )
        if self.groups_per_token > self.groups:
            raise ValueError(
                f"MoE.groups_per_token = {self.groups_per_token} is more than groups = {self.groups}"
            )
        size = self.experts // self.groups
        if self.group_score == "top2" and self.groups > 1 and size < 2:
            raise ValueError(
                f"MoE.group_score = 'top2' needs groups of at least 2 experts, these have {size}: use fewer "
                "groups, or 'max'"
            )
        if self.per_token > (reachable := size * self.groups_per_token):
            among = f" in the {self.groups_per_token} groups a token chooses" if self.groups > 1 else ""
            raise ValueError(f"MoE.per_token = {self.per_token} is more than the {reachable} experts{among}")
        if not self.scale > 0:
            raise ValueError(f"MoE.scale = {self.scale} must be positive")
        if self.choose_first and (self.router != "softmax" or self.correction_bias or self.groups > 1):
            raise ValueError(
                "MoE.choose_first = True takes the softmax of the largest logits: it does not go with router "
                f"= {self.router!r}, correction_bias = {self.correction_bias}, groups = {self.groups}"
            )
        if self.shared_gate and not self.shared_d_ff:
            raise ValueError("MoE.shared_gate = True needs shared_d_ff, the width of the MLP it gates")
        if self.capacity is not None and self.capacity_factor is not None:
            raise ValueError(
                f"MoE.capacity = {self.capacity} and capacity_factor = {self.capacity_factor} both set the "
                "capacity: leave one of them None"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"MoE.capacity_factor = {self.capacity_factor} must be positive")

    def capacity_for(self, length: int) -> int | None:
        """How many tokens of a row of that length an expert computes; None: all that choose it."""
        if self.capacity_factor is None:
            return self.capacity
        return math.ceil(self.capacity_factor * length * self.per_token / self.experts)


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


def within_capacity(experts: jax.Array, real: jax.Array, capacity: int, count: int) -> jax.Array:
    """Which choices find room: all first choices of a row in order, then all second ones, and so on.

    Args:
      experts: int32 `[batch, length, per_token]`.
      real: bool `[batch, length]`; padding takes no room.
      capacity: tokens of a row that an expert takes.
      count: how many experts there are.

    Returns:
      bool `[batch, length, per_token]`, False for padding.
    """
    batch, length, per_token = experts.shape
    ordered = experts.swapaxes(1, 2).reshape(batch, per_token * length)
    taken = jax.nn.one_hot(ordered, count, dtype=jnp.int32)  # [batch, per_token · length, experts]
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
    def __call__(self, x: jax.Array, sizes: jax.Array, expert: jax.Array) -> jax.Array:
        """`[rows, inner] -> [rows, outer]`; row r belongs to `expert[r]`, sizes say how many each has."""
        dtype, names = jnp.dtype(self.param_dtype), ("expert", *self.names)

        def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            return jax.vmap(lambda k: self.initializer(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

        kernel = self.param("kernel", named(init, names), (self.experts, self.inner, self.outer), dtype)
        y = project_groups(x, kernel, sizes, precision=self.precision)
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
        self, x: jax.Array, experts: jax.Array, weights: jax.Array, kept: jax.Array, deterministic: bool
    ) -> jax.Array:
        """Sum of the chosen experts' outputs, weighted.

        Args:
          x: `[tokens, embed]`.
          experts: int32 `[tokens, per_token]`.
          weights: f32 `[tokens, per_token]`.
          kept: bool `[tokens, per_token]`; a choice that is not kept adds 0 and costs nothing where that is
            possible.
          deterministic: no dropout.

        Returns:
          `[tokens, embed]`.
        """
        tokens, per_token = experts.shape
        expert = jnp.where(kept, experts, self.moe.experts).reshape(-1)  # [tokens · per_token]
        order = jnp.argsort(expert)  # stable, so that an expert's tokens stay in order
        inverse = jnp.argsort(order)
        sizes = jnp.bincount(expert, length=self.moe.experts).astype(jnp.int32)
        sorted_expert = jnp.take(expert, order)
        rows = take_rows(x, order, inverse, per_token)  # [tokens · per_token, embed]
        inputs = [checkpoint_name(each(rows, sizes, sorted_expert), "mlp_hidden") for each in self.inputs]
        hidden = activations.hidden(inputs, self.activations, self.clamp)  # [tokens · per_token, mlp]
        if self.dropout and not deterministic:
            hidden = Dropout(self.dropout, self.make_rng("dropout"))(hidden)
        out = self.output(hidden, sizes, sorted_expert)
        out = take_rows(out, inverse, order, 1).reshape(tokens, per_token, self.d_model)
        weights = jnp.where(kept, weights, 0.0)
        return jnp.einsum("tkd,tk->td", out.astype(jnp.float32), weights).astype(x.dtype)


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
                f"MoeMlp: moe.shared_d_ff = {moe.shared_d_ff} and shared = {self.shared} contradict each other"
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
        given = jnp.ones((batch, length), bool) if real is None else real.astype(bool)
        kept = jnp.broadcast_to(given[..., None], routing.experts.shape)
        capacity = moe.capacity_for(length)
        if capacity is not None and capacity < length:
            kept = within_capacity(routing.experts, given, capacity, moe.experts)
        y = self.experts(
            x.reshape(batch * length, width),
            routing.experts.reshape(batch * length, -1),
            routing.weights.reshape(batch * length, -1),
            kept.reshape(batch * length, -1),
            deterministic,
        ).reshape(batch, length, width)
        y = constrain(y, ("batch", "length", "embed"))
        if self.shared is not None:
            shared = self.shared(x, deterministic)
            if moe.shared_gate:
                shared = shared * jax.nn.sigmoid(self.shared_gate(x))
            y = y + shared
        return y, _statistics(logits, routing, given, kept) if stats else None


def _statistics(logits: jax.Array, routing: Routing, real: jax.Array, kept: jax.Array) -> RouterStats:
    weight = real.astype(jnp.float32)  # [batch, length]
    chosen = jax.nn.one_hot(routing.experts, logits.shape[-1], dtype=jnp.float32).sum(axis=-2)
    wanted = weight.sum() * routing.experts.shape[-1]
    return RouterStats(
        tokens=weight.sum(),
        load=jnp.einsum("ble,bl->e", chosen, weight),
        probability=jnp.einsum("ble,bl->e", routing.probability, weight),
        log_partition=jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * weight),
        dropped=wanted - kept.sum(dtype=jnp.float32),
    )
