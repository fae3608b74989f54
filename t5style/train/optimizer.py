"""Optimisers: optax's AdamW and Adafactor with the settings T5 and today's language models use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from t5style.parallel.rules import is_axes
from t5style.train.schedules import Schedule

NAMES = ("adamw", "adafactor")
Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser and its learning-rate schedule.

    Attributes:
      name: 'adamw' (Loshchilov & Hutter 2019, `optax.adamw`) or 'adafactor' (Shazeer & Stern 2018,
        `optax.adafactor`). Adafactor runs with T5's settings (Raffel et al. 2020 §3.1.2, `t5x.adafactor`):
        factored second moments for dimensions of 128 and up, updates scaled by the parameter's root mean
        square and clipped at RMS 1, second-moment decay 1 - n^-0.8, no first moment.
      learning_rate: the schedule.
      b1, b2, eps: AdamW's. 0.95 for b2 is what LLaMA and GPT-3 use; optax's own default is 0.999.
      weight_decay: decoupled, times the learning rate, for either optimiser; on matrices only: norms' scales,
        biases and relative-position tables keep their size.
      clip_norm: the gradient's global norm is clipped to this; None for no clipping (T5 with Adafactor).
      decay_rate: Adafactor's second-moment exponent.
      multiply_by_parameter_scale: Adafactor's relative step size.
    """

    name: str = "adamw"
    learning_rate: Schedule = dataclasses.field(default_factory=Schedule)
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    decay_rate: float = 0.8
    multiply_by_parameter_scale: bool = True

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"Optimizer.name is {self.name!r}; it must be one of {', '.join(NAMES)}.")
        for field in ("b1", "b2"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"Optimizer.{field} is {getattr(self, field)}; it must lie in [0, 1).")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(
                f"Optimizer.clip_norm is {self.clip_norm}; it must be above 0, or None for no clipping."
            )
        if self.weight_decay < 0:
            raise ValueError(f"Optimizer.weight_decay is {self.weight_decay}; it must be 0 or more.")

    def build(self, axes: Any, steps: int) -> optax.GradientTransformation:
        """Returns the optax transformation.

        Args:
          axes: the parameters' logical axes, a tree of tuples of names like the parameters' own tree.
          steps: the number of steps of the run, for the schedule.
        """
        schedule = self.learning_rate.build(steps)
        mask = decay_mask(axes)
        chain = [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        if self.name == "adamw":
            chain.append(
                optax.adamw(
                    schedule, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mask=mask
                )
            )
        else:
            inner = optax.adafactor(
                learning_rate=None,
                decay_rate=self.decay_rate,
                multiply_by_parameter_scale=self.multiply_by_parameter_scale,
                clipping_threshold=1.0,
                momentum=None,
            )
            # optax.adafactor's own weight_decay_rate is not multiplied by the learning rate; ours is, as in
            # AdamW. Updates have their sign already, hence -weight_decay and flip_sign=False.
            chain += [
                on_matrices(inner, axes),
                optax.add_decayed_weights(-self.weight_decay, mask=mask),
                optax.scale_by_learning_rate(schedule, flip_sign=False),
            ]
        return optax.chain(*chain)


def decay_mask(axes: Any) -> Any:
    """True for the parameters that weight decay applies to: matrices, but no relative-position table and no
    bias.

    Args:
      axes: tree of logical-axis tuples; a leading 'layers' axis only stacks layers and does not count.
    """

    def decays(path: tuple[Any, ...], names: Axes) -> bool:
        own = [name for name in names if name != "layers"]
        last = jax.tree_util.keystr(path[-1:], simple=True)
        return len(own) >= 2 and "relpos_buckets" not in own and last not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(decays, axes, is_leaf=is_axes)


def on_matrices(inner: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """Applies a per-leaf transformation to each layer's matrix instead of to the stacked tensor we store.

    Adafactor looks at shapes: of [layers, embed, heads, head_dim] it would factor the two longest dimensions
    and take one root mean square over all layers. T5X's logical factor rules
    (`t5x.adafactor.standard_logical_factor_rules`) treat 'layers' as a batch dimension, 'embed' as rows and
    everything else, joined, as columns; so does this: the tensor becomes [embed, heads * head_dim], and
    layers are mapped over.
    """

    def matrix(shape: tuple[int, ...], names: Axes) -> tuple[int, ...]:
        """Shape of one layer's matrix: dimensions beside 'embed' joined; vectors as they are."""
        stacked = names[:1] == ("layers",)
        shape, names = (shape[1:], names[1:]) if stacked else (shape, names)
        if len(shape) <= 2 or "embed" not in names:
            return shape
        at = names.index("embed")
        before, after = shape[:at], shape[at + 1 :]
        parts = [before, shape[at : at + 1], after]
        return tuple(math.prod(part) for part in parts if part)

    def mapped(names: Axes, function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(function) if names[:1] == ("layers",) else function

    def reshape(x: jax.Array, names: Axes) -> jax.Array:
        lead = x.shape[:1] if names[:1] == ("layers",) else ()
        return x.reshape(lead + matrix(x.shape, names))  # [layers, embed, rest], or [embed, rest]

    def init(params: Any) -> Any:
        return jax.tree.map(
            lambda names, p: mapped(names, inner.init)(reshape(p, names)), axes, params, is_leaf=is_axes
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(names: Axes, u: jax.Array, s: Any, p: jax.Array) -> tuple[jax.Array, Any]:
            new, new_state = mapped(names, inner.update)(reshape(u, names), s, reshape(p, names))
            return new.reshape(u.shape), new_state

        pairs = jax.tree.map(one, axes, updates, state, params, is_leaf=is_axes)
        treedef: Any = jax.tree.structure(axes, is_leaf=is_axes)
        flat = treedef.flatten_up_to(pairs)
        return treedef.unflatten([u for u, _ in flat]), treedef.unflatten([s for _, s in flat])

    return optax.GradientTransformation(init, update)
