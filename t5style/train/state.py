"""What training changes: step, parameters and optimiser state, made sharded from the start."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from t5style.models import params as model_params
from t5style.models.adapters import Adapter
from t5style.models.config import TransformerConfig
from t5style.parallel import mesh as mesh_lib
from t5style.parallel import rules as rules_lib


@struct.dataclass
class TrainState:
    """A pytree; with ShapeDtypeStructs or Shardings in place of arrays, also what describes one.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: nested dict of arrays, in the config's param_dtype (f32 unless said otherwise: the master copy).
      opt_state: optax's.
    """

    step: Any
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Trained:
    """Which parameters are trained: all of a model's, or an adapter's own; and heads on top of it.

    Attributes:
      config: the model.
      adapter: what is trained in place of the model's parameters; None: those themselves.
      heads: names of linear maps of the decoder's hidden states to one number, 'value_head': parameters
        `{name: {'kernel': f32 [embed, 1], 'bias': f32 [1]}}` beside the model's.
    """

    config: TransformerConfig
    adapter: Adapter | None = None
    heads: tuple[str, ...] = ()

    def axes(self) -> Any:
        """Logical axis names of the trained parameters, see `models.params.logical_axes`."""
        own = (
            model_params.logical_axes(self.config) if self.adapter is None else self.adapter.axes(self.config)
        )
        return {**own, **{name: {"kernel": ("embed", None), "bias": (None,)} for name in self.heads}}

    def init(self, key: jax.Array, base: Any = None) -> Any:
        """Initial values of the trained parameters; base: the model's, None for random ones."""
        own = model_params.init_params(self.config, key) if base is None else base
        if self.adapter is not None:
            own = self.adapter.init(self.config, key, own)
        kernel = jnp.zeros((self.config.d_model, 1), jnp.float32)
        return {**own, **{name: {"kernel": kernel, "bias": jnp.zeros(1)} for name in self.heads}}

    def merged(self, params: Any, base: Any = None) -> Any:
        """All of the model's parameters, and the heads', of the trained ones and the adapter's base."""
        if self.adapter is None:
            return params
        heads = {name: params[name] for name in self.heads}
        own = {name: value for name, value in params.items() if name not in heads}
        return {**self.adapter.apply(self.config, base, own), **heads}


# Tracing a model takes a second; the same question is asked several times on the way to the first step. It is
# traced without a mesh: of what does not divide by that, `rules.spec` says more than the layers would.
@functools.lru_cache(maxsize=16)
def logical_axes(model: TransformerConfig | Trained) -> Any:
    """Logical axis names of the (trained) parameters, see `models.params.logical_axes`."""
    with rules_lib.no_mesh():
        return _trained(model).axes()


@functools.lru_cache(maxsize=16)
def abstract_params(model: TransformerConfig | Trained) -> Any:
    """ShapeDtypeStructs of the (trained) parameters; nothing is allocated."""
    with rules_lib.no_mesh():
        return jax.eval_shape(lambda: _trained(model).init(jax.random.key(0)))


@functools.lru_cache(maxsize=16)
def abstract_state(model: TransformerConfig | Trained, optimizer: optax.GradientTransformation) -> TrainState:
    """ShapeDtypeStructs of the state; nothing is allocated."""
    with rules_lib.no_mesh():
        return jax.eval_shape(lambda: _fresh(_trained(model), optimizer, jax.random.key(0)))


def _trained(model: TransformerConfig | Trained) -> Trained:
    return model if isinstance(model, Trained) else Trained(model)


def state_shardings(
    abstract: TrainState,
    model: TransformerConfig | Trained,
    mesh: Mesh,
    rules: rules_lib.Rules | None = None,
) -> TrainState:
    """Shardings of the state: optimiser moments lie where their parameters lie.

    An optimiser leaf belongs to the parameter whose path it contains. Of the same shape, it gets the same
    sharding; of another (Adafactor's row and column statistics, a few vectors per matrix) it is replicated.

    Raises:
      ValueError: a parameter's dimension does not divide by its mesh axes.
    """
    part = _trained(model).adapter is not None
    params = rules_lib.param_shardings(logical_axes(model), abstract.params, mesh, rules, part=part)
    whole = mesh_lib.replicated(mesh)
    shapes = {keys: leaf.shape for keys, leaf in jax.tree_util.tree_flatten_with_path(abstract.params)[0]}
    where = dict(jax.tree_util.tree_flatten_with_path(params)[0])
    depths = sorted({len(keys) for keys in where})

    def owner(path: tuple[Any, ...]) -> tuple[Any, ...] | None:
        for start in range(len(path)):
            for depth in depths:
                if path[start : start + depth] in where:
                    return path[start : start + depth]
        return None

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = owner(path)
        return where[keys] if keys is not None and shapes[keys] == leaf.shape else whole

    return TrainState(
        step=whole,
        params=params,
        opt_state=jax.tree_util.tree_map_with_path(one, abstract.opt_state),
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """The ShapeDtypeStructs with their shardings in them: what a checkpoint is restored onto."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )


def init_state(
    model: TransformerConfig | Trained,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: rules_lib.Rules | None = None,
    seed: int = 0,
    params: Any = None,
) -> TrainState:
    """A state at step 0, each device making only its own part.

    Args:
      model: the model, or what of it is trained.
      optimizer: the optax transformation.
      mesh: where the state goes.
      rules: logical-axis rules.
      seed: of the initial parameters; they are the same on every mesh (jax's partitionable Threefry).
      params: trained parameters to start from instead of random ones (moved onto the mesh).
    """
    abstract = abstract_state(model, optimizer)
    shardings = state_shardings(abstract, model, mesh, rules)
    if params is None:
        make = jax.jit(lambda key: _fresh(_trained(model), optimizer, key), out_shardings=shardings)
        return make(jax.random.key(seed))
    params = jax.tree.map(_place, params, abstract.params, shardings.params)
    make_opt = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    step = jax.jit(lambda: jnp.int32(0), out_shardings=shardings.step)()
    return TrainState(step=step, params=params, opt_state=make_opt(params))


def _place(value: Any, like: Any, sharding: Any) -> jax.Array:
    """An array of the state from one that may lie elsewhere; every process serves its own devices."""
    if isinstance(value, jax.Array) and value.sharding == sharding and value.dtype == like.dtype:
        return value
    whole = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(like.shape, sharding, lambda index: whole[index])


def _fresh(trained: Trained, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = trained.init(key)
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def bytes_per_device(abstract: Any, shardings: Any) -> int:
    """Bytes one device holds of a tree laid out by `shardings`."""
    total = 0
    for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        count = 1
        for size in sharding.shard_shape(leaf.shape):
            count *= size
        total += count * leaf.dtype.itemsize
    return total
