"""Running a stack of equal layers, whose parameters are stacked along a first dimension."""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax

from t5style.nn import remat as remat_lib

Carry = TypeVar("Carry")
Output = Any  # what a layer gives beside the carry, a tree of arrays
# (params, carry, key), and the kind where there are several, to (carry, output)
Layer = Callable[..., tuple[Carry, Output]]


def remat(layer: Layer[Carry], policy: str, *, scanned: bool) -> Layer[Carry]:
    """The layer, its backward pass recomputing what `policy` does not keep (nn/remat.py)."""
    if policy == "none":
        return layer
    policies, kept = jax.checkpoint_policies, remat_lib.parse(policy)
    if kept is None:  # 'dots'
        keep = policies.dots_with_no_batch_dims_saveable
    elif kept.offloaded:
        keep = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(kept.saved),
            names_which_can_be_offloaded=list(kept.offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        keep = policies.save_only_these_names(*kept.saved)
    # Inside a scan XLA cannot merge the recomputation with the original; outside it would.
    return jax.checkpoint(layer, policy=keep, prevent_cse=not scanned)


def unstack(params: Any) -> tuple[Any, ...]:
    """One tree per layer from a tree of arrays `[layers, ...]`.

    lax.split and not indexing: its transpose is one concatenation, that of indexing a sum of padded arrays.
    """
    leaves, tree = jax.tree.flatten(params)
    layers = leaves[0].shape[0]
    split = [[part[0] for part in jax.lax.split(leaf, [1] * layers, axis=0)] for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, [parts[i] for parts in split]) for i in range(layers))


def stack(layers: Sequence[Any]) -> Any:
    """The inverse of unstack."""
    return jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *layers)


def run_layers(
    layer: Layer[Carry],
    params: Mapping[str, Any],
    carry: Carry,
    *,
    order: Sequence[tuple[str, Hashable]],
    keys: jax.Array | None,
    policy: str,
    scan: bool,
) -> tuple[Carry, dict[str, Output]]:
    """Applies `layer(params, carry, key, kind)`, which gives (carry, output), for each layer in turn.

    Args:
      layer: one layer as a pure function; kind is static.
      params: by the name of a group, what its layers have: a tree of arrays `[layers of the group, ...]`, or
        a tuple of one tree per layer (then they are never scanned).
      carry: what the first layer gets.
      order: for each layer the name of its group, of which it takes the next, and its kind.
      keys: random keys `[layers]` or None.
      policy: what the backward pass recomputes, see remat.
      scan: one lax.scan over the part of the order that repeats itself, the rest unrolled; or all unrolled.

    Returns:
      The last carry, and by the name of a group its layers' outputs, stacked: arrays `[layers of the group,
      ...]`. Layers of a group give outputs of the same shapes; None is an output too.
    """
    scan = scan and not any(isinstance(group, tuple) for group in params.values())
    start, period, repeats = repetition(tuple(order)) if scan else (0, 1, 0)
    stop = start + period * repeats
    names = [name for name, _ in order]
    trees = {
        name: group if isinstance(group, tuple) or scan else unstack(group) for name, group in params.items()
    }

    def run(
        tree: Any, carry: Carry, key: jax.Array | None, kind: Hashable, scanned: bool
    ) -> tuple[Carry, Output]:
        return remat(functools.partial(layer, kind=kind), policy, scanned=scanned)(tree, carry, key)

    def unrolled(carry: Carry, first: int, end: int) -> Carry:
        for index in range(first, end):
            name, kind = order[index]
            group, number = trees[name], names[:index].count(name)
            tree = group[number] if isinstance(group, tuple) else _at(group, number)
            carry, output = run(tree, carry, None if keys is None else keys[index], kind, False)
            outputs[name].append(jax.tree.map(lambda leaf: leaf[None], output))
        return carry

    def step(carry: Carry, xs: Any) -> tuple[Carry, dict[str, Output]]:
        groups, drawn = xs
        given: dict[str, list[Output]] = {name: [] for name in groups}
        for index in range(period):
            name, kind = order[start + index]
            tree = _at(groups[name], len(given[name]))
            carry, output = run(tree, carry, None if drawn is None else drawn[index], kind, True)
            given[name].append(output)
        return carry, {name: stack(each) for name, each in given.items()}

    outputs: dict[str, list[Output]] = {name: [] for name in names}  # of arrays [some layers, ...]
    carry = unrolled(carry, 0, start)
    if repeats:
        groups = {
            name: jax.tree.map(
                functools.partial(
                    _cut,
                    first=names[:start].count(name),
                    repeats=repeats,
                    count=names[start : start + period].count(name),
                ),
                trees[name],
            )
            for name in dict.fromkeys(names[start : start + period])
        }
        drawn = None if keys is None else _cut(keys, start, repeats, period)
        carry, given = jax.lax.scan(step, carry, (groups, drawn))  # given: [repeats, count, ...]
        for name, output in given.items():
            outputs[name].append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), output))
    carry = unrolled(carry, stop, len(order))
    return carry, {
        name: jax.tree.map(lambda *leaves: jax.numpy.concatenate(leaves), *parts)
        for name, parts in outputs.items()
    }


def _at(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _cut(leaf: jax.Array, first: int, repeats: int, count: int) -> jax.Array:
    """`[layers, ...] -> [repeats, count, ...]`, from layer `first` on."""
    if first or repeats * count < leaf.shape[0]:
        leaf = jax.lax.slice_in_dim(leaf, first, first + repeats * count)
    return leaf.reshape(repeats, count, *leaf.shape[1:])


@functools.lru_cache
def repetition(order: Sequence[Hashable]) -> tuple[int, int, int]:
    """Where a sequence repeats itself: (start, period, repeats), such that the fewest elements are left to
    look at: those before, one period, and those after. Repeats is 0 where nothing does.
    """
    n = len(order)
    best, left = (0, 1, 0), n
    for start in range(n):
        for period in range(1, (n - start) // 2 + 1):
            repeats = 1
            while (
                order[start + repeats * period : start + (repeats + 1) * period]
                == order[start : start + period]
            ):
                repeats += 1
            if repeats > 1 and n - period * (repeats - 1) < left:
                best, left = (start, period, repeats), n - period * (repeats - 1)
    return best
