"""What the backward pass keeps of a layer, keeps on the host, or computes again: TransformerConfig.remat."""

import difflib
from collections.abc import Iterable
from typing import NamedTuple

# The arrays that layers name (checkpoint_name), in the order in which a layer makes them.
NAMES = {
    "layer_input": "the residual stream that enters a layer",
    "query": "queries, rotated",
    "key": "keys, rotated",
    "value": "values",
    "attention_context": "what attention makes of values, before its output projection; of the TPU's kernel "
    "also the softmax's denominators",
    "attention_output": "attention's output projection",
    "mlp_input_0": "the first input projection of an MLP or of experts, the gate of a gated one",
    "mlp_input_1": "the second one",
    "mlp_output": "the output projection of an MLP or of experts",
}
GROUPS = {
    "qkv": ("query", "key", "value"),
    "mlp_hidden": ("mlp_input_0", "mlp_input_1"),
    "projections": (
        *("query", "key", "value", "attention_output"),
        *("mlp_input_0", "mlp_input_1", "mlp_output"),
    ),
}


class Kept(NamedTuple):
    """What a policy keeps, by name: on the device, and in the host's memory."""

    saved: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()


# Policies by name, from little memory to much; what is not kept is computed again. 'none' (nothing is) and
# 'dots' (matrix products are not) go by what XLA sees and not by names.
POLICIES: dict[str, Kept | None] = {
    "full": Kept(),
    "input_offloaded": Kept((), ("layer_input",)),
    "qkv_offloaded": Kept((), GROUPS["qkv"]),
    "minimal_offloaded": Kept((), GROUPS["projections"]),
    "context": Kept(("attention_context",)),
    "qkv": Kept(GROUPS["qkv"]),
    "qkv_context": Kept((*GROUPS["qkv"], "attention_context")),
    "mlp": Kept(GROUPS["mlp_hidden"]),
    "dots": None,
    "minimal": Kept(GROUPS["projections"]),
    "minimal_context": Kept((*GROUPS["projections"], "attention_context")),
    "none": None,
}


def parse(policy: str) -> Kept | None:
    """What `policy` keeps: a name of POLICIES, or a list 'save:query,key;offload:mlp_hidden' of names of
    arrays and groups, either half of which may be left out. None for 'none' and 'dots'.

    Raises:
      ValueError: neither; an array that no layer names; or one that is both saved and offloaded.
    """
    if policy in POLICIES:
        return POLICIES[policy]
    if not isinstance(policy, str) or ":" not in policy:
        raise ValueError(
            f"remat = {policy!r} is not one of {', '.join(POLICIES)}, nor a list as "
            f"'save:query,key,value;offload:mlp_hidden'{_near(policy, POLICIES)}"
        )
    parts: dict[str, tuple[str, ...]] = {}
    for part in policy.split(";"):
        where, _, names = part.partition(":")
        where = where.strip()
        if where not in ("save", "offload") or where in parts:
            raise ValueError(
                f"remat = {policy!r}: {part.strip()!r} must begin with 'save:' or 'offload:', each once"
            )
        parts[where] = _names(policy, names)
    kept = Kept(parts.get("save", ()), parts.get("offload", ()))
    if both := set(kept.saved) & set(kept.offloaded):
        raise ValueError(f"remat = {policy!r} both saves and offloads {', '.join(sorted(both))}: choose one")
    return kept


def _names(policy: str, text: str) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for name in (name.strip() for name in text.split(",")):
        if name not in NAMES and name not in GROUPS:
            raise ValueError(
                f"remat = {policy!r} names {name!r}, which no layer does"
                f"{_near(name, [*NAMES, *GROUPS])}; layers name {', '.join(NAMES)}, and there are the "
                f"groups {', '.join(GROUPS)}"
            )
        names.update(dict.fromkeys(GROUPS.get(name, (name,))))
    return tuple(names)


def _near(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
