"""What goes into a program: checked, padded to buckets (powers of two), and put on the mesh."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from t5style.parallel import rules as rules_lib
from t5style.parallel.mesh import BATCH_AXES

MIN_BUCKET = 16  # shorter sequences cost next to nothing more at this length


def bucket(length: int, least: int = MIN_BUCKET) -> int:
    """The smallest power of two that is at least `length` and `least`."""
    return max(least, 1 << max(length - 1, 0).bit_length())


def batch_bucket(rows: int, mesh: Mesh | None) -> int:
    """Rows of the padded batch: a power of two, and a multiple of the mesh's data × fsdp × expert."""
    size = bucket(rows, 1)
    ways = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return -(-size // ways) * ways


def pad_rows(
    rows: Sequence[np.ndarray], batch: int, length: int, pad_id: int, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as int32 [batch, length] tokens and a mask, 1 = real token.

    Rows that are added to fill the batch have one real token, so that nothing attends to an empty set.
    """
    tokens = np.full((batch, length), pad_id, np.int32)
    mask = np.zeros((batch, length), np.int32)
    for i in range(batch):
        row = rows[i] if i < len(rows) else np.asarray([pad_id])
        where = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, where] = row
        mask[i, where] = 1
    return tokens, mask


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None, rules: rules_lib.Rules | None) -> Iterator[None]:
    """`use_mesh` where there is a mesh, else nothing."""
    with contextlib.nullcontext() if mesh is None else rules_lib.use_mesh(mesh, rules):
        yield


def put(arrays: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Arrays [batch, ...] where the program wants them: on the mesh, or left to jit."""
    return dict(arrays) if mesh is None else dict(rules_lib.put_batch(arrays, mesh))


def check_batch_size(batch_size: int) -> None:
    """Raises ValueError unless it is a number of rows to work on at a time."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give at least 1")


def check_tokens(
    name: str, tokens: Any, mask: Any, vocab_size: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, pad_id where the mask is 0, and the mask: both int32 [batch, length].

    Raises ValueError naming `name` and what is wrong: shape, dtype, or an id outside the vocabulary.
    """
    try:
        array = np.asarray(tokens)
    except ValueError:
        raise ValueError(
            f"{name} has rows of different lengths: pad them, and say with a mask which tokens are real"
        ) from None
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{name} has shape {array.shape}: give int ids [batch, length], at least one of each"
        )
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name} has dtype {array.dtype}: give whole numbers")
    real = np.ones(array.shape, np.int32) if mask is None else (np.asarray(mask) != 0).astype(np.int32)
    if real.shape != array.shape:
        raise ValueError(f"the mask of {name} has shape {real.shape}, not {array.shape}")
    used = array[real != 0]
    if used.size and (used.min() < 0 or used.max() >= vocab_size):
        bad = used.min() if used.min() < 0 else used.max()
        raise ValueError(f"{name} holds the id {bad}: the model has ids from 0 to {vocab_size - 1}")
    return np.where(real != 0, array, pad_id).astype(np.int32), real


def check_texts(name: str, texts: Sequence[str], empty: bool = False) -> list[str]:
    """The texts as a list, checked."""
    if isinstance(texts, str):
        raise ValueError(f"{name} is a single string: give a list of strings")
    rows = list(texts)
    if not rows:
        raise ValueError(f"{name} is empty: give at least one text")
    for i, text in enumerate(rows):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{i}] is {type(text).__name__}, not a string")
        if not text and not empty:
            raise ValueError(f"{name}[{i}] is empty: give a text of at least one token")
    return rows
