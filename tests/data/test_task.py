"""Tasks and mixtures: names and rates."""

from __future__ import annotations

import pytest

from t5style.data.objectives import CausalLM, Supervised
from t5style.data.task import Mixture, Task

A, B, C = (Task(name, f"/nowhere/{name}", Supervised()) for name in "abc")


def test_rates_by_number_of_examples_are_seqios() -> None:
    # seqio: mixing_rate_num_examples = min(examples, maximum) ** (1 / temperature)
    assert Mixture("m", [A, B]).proportions([300, 100]) == [0.75, 0.25]
    capped = Mixture("m", [A, B, C], maximum=200).proportions([1000, 200, 100])
    assert capped == pytest.approx([0.4, 0.4, 0.2])
    warm = Mixture("m", [A, B], temperature=2.0).proportions([900, 100])
    assert warm == pytest.approx([30 / 40, 10 / 40])
    both = Mixture("m", [A, B], temperature=2.0, maximum=400).proportions([900, 100])
    assert both == pytest.approx([20 / 30, 10 / 30])


def test_given_rates_are_relative() -> None:
    assert Mixture("m", [A, B], rates=[3, 1]).proportions([1, 10**9]) == [0.75, 0.25]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": []}, "has no task"),
        ({"tasks": [A, A]}, "names a task twice: a, a"),
        ({"tasks": [A, B], "rates": [1.0]}, "give one rate above 0 for each task"),
        ({"tasks": [A, B], "rates": [1.0, 0.0]}, "give one rate above 0 for each task"),
        ({"tasks": [A, B], "temperature": 0.0}, "temperature 0.0; it must be above 0"),
        ({"tasks": [A, B], "maximum": 0}, "maximum 0; it must be at least 1"),
        ({"tasks": [A, B], "rates": [1, 2], "temperature": 2.0}, "leave out one or the other"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture("m", **arguments)  # type: ignore[arg-type]


def test_split_names() -> None:
    assert A.store_split("train") == "train"
    renamed = Task("t", "/nowhere", CausalLM(), splits={"validation": "test"})
    assert renamed.store_split("validation") == "test"
    with pytest.raises(ValueError, match="Task 't' has no split 'train', only 'validation'"):
        renamed.store_split("train")
    with pytest.raises(ValueError, match="needs a name"):
        Task("", "/nowhere", CausalLM())


def test_orders() -> None:
    plain = Task("t", "/nowhere", CausalLM())
    assert plain.split_order("train") == ""
    easy_first = Task("t", "/nowhere", CausalLM(), order="curriculum")
    assert (easy_first.split_order("train"), easy_first.split_order("validation")) == ("curriculum", "")
    other = Task("t", "/nowhere", CausalLM(), order={"test": "run:x/order.npy"})
    assert (other.split_order("train"), other.split_order("test")) == ("", "run:x/order.npy")
    with pytest.raises(
        ValueError, match=r"has order 'easy'; it must be '', 'stored', 'curriculum', 'length'"
    ):
        Task("t", "/nowhere", CausalLM(), order="easy")
