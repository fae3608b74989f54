"""Adapters merged into the weights beside which they lie: a dense model, which knows nothing of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5style.models import adapters
from t5style.models.adapters_quantized import dense, replaced
from t5style.models.config import TransformerConfig
from t5style.models.params import abstract_params
from t5style.parallel.rules import path_name
from t5style.run_dir import UserError


def merge_adapters(config: TransformerConfig, params: Any) -> Any:
    """The parameters with what adapters have put beside kernels in these: lora_a and lora_b as their product,
    lora_magnitude as columns of that norm, ia3_input and ia3_output as factors of rows and columns (and of
    the bias). In the kernels' dtypes.

    Raises:
      UserError: a kernel is rounded to int8 (those of QLoRA are made dense), or there is something that no
        weight can hold: virtual tokens, bottlenecks, biases of a model without.
    """
    params = made = dense(config, params)
    for kernel in adapters.kernels(config):
        leaves = adapters.at(params, kernel.path)
        if any(name.startswith(("lora_", "ia3_")) for name in leaves):
            if leaves["kernel"].dtype == jnp.int8 or "kernel_scale" in leaves:
                raise UserError(
                    f"{'/'.join(kernel.path)} is quantised, so an adapter cannot be merged into it: load the "
                    "model without quantisation"
                )
            merged = jax.jit(lambda leaves, kernel=kernel: _merged(kernel, leaves))(dict(leaves))
            made = replaced(made, kernel.path, merged)
    known = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_params(config))}
    found = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(made)}
    if strange := sorted(found - known):
        raise UserError(
            f"{strange[0]} cannot be merged: this model's weights have no place for it; use the adapter "
            "beside them"
        )
    return made


def _merged(kernel: adapters.Kernel, leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """A projection's kernel and bias, of stacked layers, with the adapters in them."""
    lead, weight = kernel.stacked, leaves["kernel"].astype(jnp.float32)
    inner = tuple(range(lead, lead + kernel.sums))
    if "lora_a" in leaves:
        a, b = (leaves[f"lora_{name}"].astype(jnp.float32) for name in "ab")

        def product(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.tensordot(a, b, 1, precision="highest")  # [*inner, rank] · [rank, *outer]

        weight = weight + (jax.vmap(product) if lead else product)(a, b)
    if "lora_magnitude" in leaves:
        norm = jnp.sqrt(jnp.square(weight).sum(axis=inner, keepdims=True))
        weight = weight * (jnp.expand_dims(leaves["lora_magnitude"], inner) / norm)
    bias = leaves.get("bias")
    if "ia3_input" in leaves:
        outer = tuple(range(lead + kernel.sums, weight.ndim))
        weight = weight * jnp.expand_dims(leaves["ia3_input"], outer)
    if "ia3_output" in leaves:
        weight = weight * jnp.expand_dims(leaves["ia3_output"], inner)
        bias = None if bias is None else bias * leaves["ia3_output"].astype(bias.dtype)
    made = {"kernel": weight.astype(leaves["kernel"].dtype)}
    return made if bias is None else made | {"bias": bias}
