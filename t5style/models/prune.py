"""Smaller models cut out of bigger ones: fewer layers, heads, hidden units or channels, those that count
most.

    importance   one number for each unit: from the weights, or from what flows through it on batches
                 (models/importance.py)
    choose       which units stay
    cut          the student's config and parameters, which are the teacher's where they stay

A student is then trained, best with its teacher's help (tune/distill.py): Muralidharan et al. 2024
("Minitron", Compact Language Models via Pruning and Knowledge Distillation), whose choices these are where
nothing else is said. Heads and hidden units are chosen in each layer by themselves, for what they add to the
residual stream does not depend on their number; channels of that stream once for the whole model; and heads
of self-attention once for a stack whose layers share T5's relative bias, a row of which belongs to each head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from t5style.models.config import TransformerConfig
from t5style.models.importance import (
    GROUPS,
    SIDES,
    Batch,
    Statistics,
    blocks,
    leaves_of,
    numbers_of,
    of_activations,
    of_weights,
)
from t5style.run_dir import UserError

Size = int | float

IMPORTANCES = ("magnitude", "activations")
DEPTHS = ("spaced", "first", "influence")


@dataclasses.dataclass(frozen=True)
class Student:
    """What stays of a teacher. A whole number is a count, a number between 0 and 1 a share; None: all.

    Attributes:
      encoder_layers, decoder_layers: how many, or which ones (a list of numbers from 0). A share of an
        encoder that there is not is none.
      num_heads, num_kv_heads: where several heads share keys and values, whole groups go with num_kv_heads,
        and num_heads is made of equally many of each group that stays.
      d_ff: hidden units of the MLPs (not of experts).
      d_model: channels of the residual stream.
      importance: of heads, units and channels. 'magnitude': the root of the sum of squares of their weights.
        'activations': the root mean square of what they give on batches (Minitron, equations 1 to 3, with
        squares for means over tokens): of a head's output before the projection, of a hidden unit, of a
        channel after each norm.
      layers: which ones stay of a number: 'spaced' evenly from the first to the last (Sanh et al. 2019,
        DistilBERT, takes every second), the 'first' ones, or those with most 'influence' on batches: 1 -
        cos(input, output) of the residual stream (Men et al. 2024, ShortGPT, equation 1).
    """

    encoder_layers: Size | Sequence[int] | None = None
    decoder_layers: Size | Sequence[int] | None = None
    num_heads: Size | None = None
    num_kv_heads: Size | None = None
    d_ff: Size | None = None
    d_model: Size | None = None
    importance: str = "magnitude"
    layers: str = "spaced"

    def __post_init__(self) -> None:
        for name, choices in (("importance", IMPORTANCES), ("layers", DEPTHS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}."
                )
        for name in ("encoder_layers", "decoder_layers", "num_heads", "num_kv_heads", "d_ff", "d_model"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0.")
            if isinstance(value, float) and value >= 1 and value != int(value):
                raise ValueError(f"{name} is {value}; give a whole number, or a share below 1.")
            if isinstance(value, Sequence) and (
                not value or list(value) != sorted(set(value)) or value[0] < 0
            ):
                raise ValueError(f"{name} is {list(value)}; give ascending numbers of layers, from 0.")

    @property
    def needs_batches(self) -> bool:
        """Whether the teacher must see data."""
        return self.importance == "activations" or self.layers == "influence"


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays, as ascending numbers.

    Attributes:
      layers: by side.
      hidden: by side `[layers of the teacher, d_ff of the student]`.
      heads, kv_heads: by side and block `[layers of the teacher, heads of the student]`.
      channels: `[d_model of the student]`.
    """

    layers: Mapping[str, tuple[int, ...]]
    hidden: Mapping[str, np.ndarray]
    heads: Mapping[tuple[str, str], np.ndarray]
    kv_heads: Mapping[tuple[str, str], np.ndarray]
    channels: np.ndarray


def prune(
    config: TransformerConfig, params: Any, student: Student, batches: Iterable[Batch] | None = None
) -> tuple[TransformerConfig, Any]:
    """A student's config and parameters, arrays on the host.

    Args:
      config, params: the teacher's.
      student: what stays.
      batches: arrays int32 `[rows, length]` under T5X's names, where importance is measured on data.

    Raises:
      UserError: the student is bigger than the teacher, or is no model that a config describes.
    """
    if student.needs_batches and batches is None:
        raise UserError(
            f"importance {student.importance!r} and layers {student.layers!r} are measured on data: give "
            "batches, "
            "or choose 'magnitude' and 'spaced'"
        )
    found = of_weights(config, params)
    if student.needs_batches:
        assert batches is not None
        measured = of_activations(config, params, batches)
        found = measured if student.importance == "activations" else dataclasses.replace(
            found, influence=measured.influence
        )  # fmt: skip
    return cut(config, params, choose(config, student, found))


# --- which ones stay ---


def _count(name: str, wanted: Size | None, all_of_them: int) -> int:
    """How many of something stay."""
    if wanted is None:
        return all_of_them
    count = max(1, round(wanted * all_of_them)) if isinstance(wanted, float) and wanted < 1 else int(wanted)
    if count > all_of_them:
        raise UserError(
            f"{name} is {count}, but the teacher has {all_of_them}: a student is cut out of its teacher"
        )
    return count


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """The numbers of the highest scores along the last axis, ascending; of equals the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
    return np.sort(order, axis=-1)


def choose(config: TransformerConfig, student: Student, statistics: Statistics) -> Kept:
    """Which of the teacher's units stay.

    Raises:
      UserError: there are not as many, or heads that are normalised together would be torn apart.
    """
    if config.architecture == "encoder_only":
        raise UserError("an encoder-only model is not pruned: give an encoder-decoder or a decoder-only one")
    layers = {side: _layers(config, student, statistics, side) for side in SIDES if config.layers_of(side)}
    if not (
        student.encoder_layers is None or isinstance(student.encoder_layers, float) or config.encoder_layers
    ):
        raise UserError(
            f"encoder_layers is {student.encoder_layers}, but the teacher has no encoder: leave it out"
        )
    d_ff = _count("d_ff", student.d_ff, config.d_ff)
    groups = _count("num_kv_heads", student.num_kv_heads, config.kv_heads)
    shared = config.num_heads // config.kv_heads
    if student.num_heads is not None and student.num_kv_heads is None and shared == 1:
        groups = _count("num_heads", student.num_heads, config.num_heads)
    count = (
        groups * shared
        if student.num_heads is None
        else _count("num_heads", student.num_heads, config.num_heads)
    )
    if student.num_heads is not None and isinstance(student.num_heads, float):
        count = max(groups, count - count % groups)
    if count % groups or count // groups > shared:
        raise UserError(
            f"num_heads is {count} and num_kv_heads {groups}, of {config.num_heads} and {config.kv_heads}: "
            "each group "
            f"of heads that share keys must keep equally many, from 1 to {shared}"
        )
    if config.query_key_norm == "width" and (count, groups) != (config.num_heads, config.kv_heads):
        raise UserError(
            "query_key_norm is 'width', one norm over all heads of a layer: with fewer of them the others "
            "would "
            "change. Keep all heads, and prune layers, d_ff or d_model"
        )
    heads, kv_heads = {}, {}
    for side, block in blocks(config):
        scores = statistics.heads[side, block]  # [layers, heads]
        if (
            block == "attention"
            and config.positions == "relative_bias"
            and not config.relative_bias_per_layer
        ):
            scores = np.broadcast_to(scores[list(layers[side])].sum(axis=0), scores.shape)
        by_group = scores.reshape(len(scores), config.kv_heads, shared)
        chosen = _best(by_group.sum(axis=-1), groups)  # [layers, groups]
        inside = np.take_along_axis(by_group, chosen[..., None], axis=1)  # [layers, groups, shared]
        within = _best(inside, count // groups)
        heads[side, block] = (chosen[..., None] * shared + within).reshape(len(scores), -1)
        kv_heads[side, block] = chosen
    return Kept(
        layers,
        {side: _best(statistics.hidden[side], d_ff) for side in layers},
        heads,
        kv_heads,
        _best(statistics.channels, _count("d_model", student.d_model, config.d_model)),
    )


def _layers(
    config: TransformerConfig, student: Student, statistics: Statistics, side: str
) -> tuple[int, ...]:
    wanted, there = getattr(student, f"{side}_layers"), len(config.layers_of(side))
    if isinstance(wanted, Sequence):
        if wanted[-1] >= there:
            raise UserError(
                f"{side}_layers names layer {wanted[-1]}, the teacher's are numbered 0 to {there - 1}"
            )
        return tuple(wanted)
    count = _count(f"{side}_layers", wanted, there)
    if student.layers == "first" or count == there:
        return tuple(range(count))
    if student.layers == "influence":
        return tuple(_best(statistics.influence[side], count).tolist())
    return tuple(int(i) for i in np.round(np.linspace(0, there - 1, count) if count > 1 else [0]))


# --- the student ---


def student_config(config: TransformerConfig, kept: Kept) -> TransformerConfig:
    """The config of what stays.

    Raises:
      UserError: the kinds of the layers that stay are no pattern that both sides could share.
    """
    where = next(iter(kept.heads))
    sizes = {
        "num_heads": kept.heads[where].shape[1],
        "d_model": len(kept.channels),
        "d_ff": next(iter(kept.hidden.values())).shape[1],
    }
    changes: dict[str, Any] = {name: size for name, size in sizes.items() if size != getattr(config, name)}
    if kept.kv_heads[where].shape[1] != config.kv_heads or (
        config.num_kv_heads is not None and "num_heads" in changes
    ):
        changes["num_kv_heads"] = kept.kv_heads[where].shape[1]
    if {"num_heads", "d_model"} & changes.keys():
        changes["head_dim"] = config.heads_width
    patterns = {}
    for side, layers in kept.layers.items():
        kinds = config.layers_of(side)
        if len(layers) == len(kinds):
            continue
        changes[f"{side}_layers"] = len(layers)
        patterns[side] = tuple(kinds[number].attention for number in layers)
        experts = "moe_encoder_layers" if side == "encoder" else "moe_layers"
        if getattr(config, experts) is not None:
            changes[experts] = tuple(i for i, number in enumerate(layers) if kinds[number].experts)
    made = config.replace(**changes)
    for side, pattern in patterns.items():
        if tuple(kind.attention for kind in made.layers_of(side)) == pattern:
            continue
        if len(kept.layers) > 1:
            raise UserError(
                f"of the {side} layers {list(kept.layers[side])} stay, which are {', '.join(pattern)}: "
                "encoder and "
                f"decoder share layer_pattern {config.layer_pattern}. Name layers that repeat it"
            )
        made = made.replace(
            layer_pattern=pattern, window=made.window if {"window", "chunk"} & {*pattern} else None
        )
    return made


def cut(config: TransformerConfig, params: Any, kept: Kept) -> tuple[TransformerConfig, Any]:
    """The student's config and parameters, arrays on the host.

    Factors that depend on d_model (scale_embeddings, scale_logits) stay the teacher's: they go into the
    embedding and the last norm.
    """
    made = student_config(config, kept)
    tree: dict[str, Any] = {}
    for path, leaf, names in leaves_of(config, params):
        value = _cut_leaf(config, kept, path, np.asarray(leaf), names)
        *parents, last = path.split("/")
        node = functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)
        node[last] = value
    _keep_factors(config, made, tree)
    return made, tree


def _cut_leaf(
    config: TransformerConfig, kept: Kept, path: str, value: np.ndarray, names: tuple[str, ...]
) -> np.ndarray:
    side, group, block, *_ = [*path.split("/"), "", ""]
    stacked = group in GROUPS
    numbers: list[int] = []
    if stacked:
        there = numbers_of(config, side, group)
        numbers = [number for number in there if number in kept.layers[side]]
        value = value[[there.index(number) for number in numbers]]
    for axis, name in enumerate(names):
        if name == "embed":
            value = np.take(value, kept.channels, axis)
        elif name == "mlp" and group == "layers":
            value = _of_each(value, axis, kept.hidden[side][numbers])
        elif name in ("heads", "kv_heads") and config.query_key_norm != "width":
            table = kept.heads if name == "heads" else kept.kv_heads
            if stacked and (side, block) in table:
                value = _of_each(value, axis, table[side, block][numbers])
            elif stacked:  # the bias of a layer
                value = _of_each(value, axis, table[side, "attention"][numbers])
            else:  # the bias of a stack
                value = np.take(value, table[side, "attention"][0], axis)
    return np.ascontiguousarray(value)


def _of_each(value: np.ndarray, axis: int, chosen: np.ndarray) -> np.ndarray:
    """value `[layers, ...]` with those of an axis that are chosen in each layer, int `[layers, some]`."""
    shape = [1] * value.ndim
    shape[0], shape[axis] = chosen.shape
    return np.take_along_axis(value, chosen.reshape(shape), axis)


def _keep_factors(config: TransformerConfig, made: TransformerConfig, tree: dict[str, Any]) -> None:
    ratio = math.sqrt(config.d_model / made.d_model)
    if ratio == 1:
        return
    logits = 1.0
    if config.scale_embeddings:
        tree["embedding"] = (tree["embedding"] * ratio).astype(tree["embedding"].dtype)
        logits /= ratio if config.tie_embeddings else 1.0
    logits /= ratio if config.scale_logits else 1.0
    if logits == 1.0 or not config.final_norm:
        return
    norm = tree["decoder"]["final_norm"]
    for name, value in norm.items():
        one = 1.0 if config.norm_plus_one and name == "scale" else 0.0
        norm[name] = ((value + one) * logits - one).astype(value.dtype)
