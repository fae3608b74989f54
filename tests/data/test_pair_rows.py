"""What stores of conversations and of answers to compare may not hold."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from t5style.data.objectives import Chat, Preferences, Unpaired
from t5style.run_dir import UserError
from tests.data.test_examples import END, A, B, C, D, source, store

PAIR = {"prompt": [A, B], "chosen": [C, END], "rejected": [D, END]}
SINGLE = {"prompt": [A], "completion": [B, END], "desirable": [1]}


@pytest.mark.parametrize(
    ("objective", "examples", "message"),
    [
        (Chat(), [{"tokens": [A, B], "mask": [0, 2]}], "mask 'mask' of split 'train' holds 2; it must be 1"),
        (Chat(), [{"tokens": [A, B], "mask": [1]}], "example 0 .* has 2 tokens and a mask of 1"),
        (Chat(), [{"tokens": [A, B], "mask": [0, 0]}], "none of the 1 examples .* has anything to learn"),
        (Unpaired(), [SINGLE, SINGLE | {"desirable": [3]}], "'desirable' of example 1 .* no single 0 or 1"),
        (Unpaired(), [SINGLE, SINGLE | {"desirable": []}], "'desirable' of example 1 .* no single 0 or 1"),
        (Preferences(), [PAIR | {"margin": [1, 0]}], "'margin' of example 0 of split 'train' is no 32 bits"),
        (
            Preferences(on_overlong="error"),
            [PAIR, PAIR | {"prompt": [A] * 4}],
            "example 1 .* has 4 prompt and 2 chosen and 2 rejected tokens, more than",
        ),
        (Preferences(), [PAIR | {"chosen": []}], "none of the 1 examples .* has anything to learn"),
    ],
)
def test_bad_stores(tmp_path: pathlib.Path, objective: Any, examples: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        source(store(tmp_path, examples), objective, 1, 4)


def test_what_has_nothing_to_learn_is_left_out_and_counted(tmp_path: pathlib.Path) -> None:
    pairs = source(store(tmp_path / "pairs", [PAIR | {"rejected": []}, PAIR]), Preferences(), 2, 4)
    assert pairs.evaluation_batch_at(0)["example"].tolist() == [1, 0]  # the second row is padding
    assert not pairs.evaluation_batch_at(0)["decoder_segment_ids"][1].any()
    chats = [{"tokens": [A, B], "mask": [0, 0]}, {"tokens": [A, B], "mask": [0, 1]}]
    conversations = source(store(tmp_path / "chats", chats), Chat(), 2, 4)
    for made in (pairs, conversations):
        statistics = made.statistics["t"]
        assert (statistics["dropped"], statistics["cut"], statistics["rows"]) == (1, 0, 1)
