"""Orders of examples, such as from easy to hard."""

from __future__ import annotations

import numpy as np
from etils import epath

from t5style.run_dir import UserError


def read_order(path: epath.PathLike, count: int) -> np.ndarray:
    """An order of `count` things from a .npy file: int64 [count], each of 0 … count - 1 once.

    Raises: UserError where it is something else.
    """
    try:
        with epath.Path(path).open("rb") as file:
            order = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The order {path} cannot be read: {error}") from error
    if order.ndim != 1 or order.dtype.kind not in "iu":
        shape = list(order.shape)
        raise UserError(f"The order {path} is {order.dtype} {shape}; it must be int64, one entry for each.")
    if len(order) != count:
        raise UserError(
            f"The order {path} has {len(order)} entries for {count}: it was made for other data; "
            "make it again."
        )
    order = order.astype(np.int64)
    if (order < 0).any() or (np.bincount(order, minlength=count) != 1).any():
        raise UserError(f"The order {path} must name each of 0 … {count - 1} once; make it again.")
    return order


def order_of_kept(order: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """An order of things (int64 [n]) as an order of those that are kept (bool [n]), counted anew."""
    number = np.cumsum(kept) - 1
    return number[order[kept[order]]]
