"""Running a stack of equal layers, whose parameters are stacked along a first dimension."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

Carry = TypeVar("Carry")
Layer = Callable[[Any, Carry, jax.Array | None], Carry]

# Names that layers give (checkpoint_name) to what a policy may keep.
QKV = ("query", "key", "value")


def remat(layer: Layer[Carry], policy: str, *, scanned: bool) -> Layer[Carry]:
    """The layer, its backward pass recomputing what `policy` does not keep (see TransformerConfig.remat)."""
    if policy == "none":
        return layer
    policies = jax.checkpoint_policies
    kept = {
        "full": None,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "qkv": policies.save_only_these_names(*QKV),
    }[policy]
    # Inside a scan XLA cannot merge the recomputation with the original; outside it would.
    return jax.checkpoint(layer, policy=kept, prevent_cse=not scanned)


def unstack(params: Any, layers: int) -> tuple[Any, ...]:
    """One tree per layer from a tree of arrays `[layers, ...]`.

    lax.split and not indexing: its transpose is one concatenation, that of indexing a sum of padded arrays.
    """
    leaves, tree = jax.tree.flatten(params)
    split = [[part[0] for part in jax.lax.split(leaf, [1] * layers, axis=0)] for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, [parts[i] for parts in split]) for i in range(layers))


def stack(layers: Sequence[Any]) -> Any:
    """The inverse of unstack."""
    return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *layers)


def run_layers(
    layer: Layer[Carry],
    params: Any,
    carry: Carry,
    *,
    layers: int,
    keys: jax.Array | None,
    policy: str,
    scan: bool,
) -> Carry:
    """Applies `layer(params, carry, key)` for each layer in turn.

    Args:
      layer: one layer as a pure function.
      params: a tree of arrays `[layers, ...]`, or a tuple of one tree per layer (then they are never
        scanned).
      carry: what the first layer gets.
      layers: how many.
      keys: random keys `[layers]` or None.
      policy: what the backward pass recomputes, see remat.
      scan: one lax.scan, or unrolled.
    """
    scan = scan and not isinstance(params, tuple)
    layer = remat(layer, policy, scanned=scan)
    if scan:
        return jax.lax.scan(lambda state, xs: (layer(xs[0], state, xs[1]), None), carry, (params, keys))[0]
    for index, one in enumerate(params if isinstance(params, tuple) else unstack(params, layers)):
        carry = layer(one, carry, None if keys is None else keys[index])
    return carry
