"""QLoRA: low-rank adaptation of a base whose kernels are kept in nf4 or int8."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from t5style.models import params as model_params
from t5style.models.adapters import Kernel, Lora, Tree, at, kernels
from t5style.models.config import TransformerConfig
from t5style.nn import quantized_kernel
from t5style.parallel.rules import no_mesh


@dataclasses.dataclass(frozen=True)
class QLora(Lora):
    """QLoRA (Dettmers et al. 2023): Lora on a base that is quantised once it is loaded, and made dense again
    one kernel at a time, where it is used, forwards and backwards. Scales are not quantised in turn.

    Quantised are the projections in layers; not embeddings, the head, norms, biases, experts, routers. Other
    attributes are Lora's.

    Attributes:
      kind: 'nf4' (4.5 bits for each weight with blocks of 64) or 'int8' (8.5).
      block: how many weights share a scale.
    """

    kind: str = "nf4"
    block: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in quantized_kernel.KINDS:
            raise ValueError(
                f"QLora.kind is {self.kind!r}; it must be one of {', '.join(quantized_kernel.KINDS)}."
            )
        if not isinstance(self.block, int) or self.block < 2 or self.block % 2:
            raise ValueError(f"QLora.block is {self.block!r}; it must be an even number from 2.")

    def init(self, config: TransformerConfig, key: jax.Array, base: Tree) -> Tree:
        """See Adapter; magnitudes (dora) are those of the quantised base."""
        if self.dora:
            base = dense(config, self.prepare(config, base))
        return super().init(config, key, base)

    def prepare(self, config: TransformerConfig, base: Tree) -> Tree:
        """The base with kernel_codes and kernel_scales in the place of kernels (nn/quantized_kernel.py); one
        that has them stays as it is.
        """
        for kernel in quantized(config):
            leaves = dict(at(base, kernel.path))
            if "kernel_codes" in leaves:
                continue
            weight = leaves.pop("kernel")
            if weight.dtype == jnp.int8:
                raise ValueError(
                    "the base was rounded to int8 already, without blocks: give QLora one that was not"
                )

            def one(weight: jax.Array, kernel: Kernel = kernel) -> tuple[jax.Array, jax.Array]:
                return quantized_kernel.quantize(weight, kernel.sums - 1, self.kind, self.block)

            # A layer at a time: looking for the nearest of 16 values takes 16 times the memory.
            codes, scales = jax.lax.map(one, weight) if kernel.stacked else one(weight)
            base = replaced(base, kernel.path, leaves | {"kernel_codes": codes, "kernel_scales": scales})
        return base

    def prepared_axes(self, config: TransformerConfig) -> Tree:
        """Logical axis names of what `prepare` gives."""
        with no_mesh():
            axes = model_params.logical_axes(config)
        for kernel in quantized(config):
            leaves = dict(at(axes, kernel.path))
            names = leaves.pop("kernel")
            blocked = kernel.stacked + kernel.sums - 1
            scales = tuple(None if i == blocked else name for i, name in enumerate(names))
            axes = replaced(axes, kernel.path, leaves | {"kernel_codes": names, "kernel_scales": scales})
        return axes


def quantized(config: TransformerConfig) -> list[Kernel]:
    """The kernels that are quantised: of an even size along what is summed over last."""
    return [kernel for kernel in kernels(config) if kernel.split(kernel.shape)[1][-1] % 2 == 0]


def dense(config: TransformerConfig, params: Tree) -> Tree:
    """The parameters with kernels in the place of their codes, in the config's param_dtype."""
    for kernel in kernels(config):
        leaves = dict(at(params, kernel.path))
        if "kernel_codes" in leaves:
            codes, scales = leaves.pop("kernel_codes"), leaves.pop("kernel_scales")
            axis = kernel.stacked + kernel.sums - 1
            weight = quantized_kernel.dequantize(codes, scales, axis).astype(config.param_dtype)
            params = replaced(params, kernel.path, leaves | {"kernel": weight})
    return params


def replaced(tree: Any, path: tuple[str, ...], new: Any) -> Any:
    """The nested dict with another part at a path."""
    return {**tree, path[0]: replaced(tree[path[0]], path[1:], new)} if path else new
