"""Histograms, the stream of documents, and word-by-word comparisons."""

import math
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5style.report import diff, pictures
from tests.report.made_corpus import edges_of


def joined(runs):
    return "".join(text for kind, text in runs if kind != "gap")


@given(
    st.lists(st.sampled_from(["a", "b", " c", "d ", "\n", "。", "日"]), max_size=30).map("".join), st.data()
)
def test_diff_loses_nothing(left, data):
    right = data.draw(st.one_of(st.just(left), st.text("ab c日\n", max_size=30)))
    one, other, different = diff.sides(left, right)
    assert joined(one) == left
    assert joined(other) == right
    assert not {kind for kind, _ in [*one, *other]} - {"same", "only"}
    assert different >= sum(kind == "only" for kind, _ in [*one, *other])
    if left == right:
        assert different == 0


def test_diff_marks_the_words_that_differ():
    words = [f"word{i}" for i in range(100)]
    changed = [*words[:50], "other", *words[51:]]
    one, other, different = diff.sides(" ".join(words), " ".join(changed))
    assert different == 2
    assert [run for run in one if run[0] == "only"] == [("only", "word50")]
    assert [run for run in other if run[0] == "only"] == [("only", "other")]
    assert ("gap", "26 words the same") in one
    assert joined(one).startswith("word0 word1 ")
    assert joined(one).endswith("word98 word99")
    assert diff.sides("甲乙丙", "甲丁丙")[0] == [("same", "甲"), ("only", "乙"), ("same", "丙")]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("a " * 50_000, "a " * 49_000),
        ("a " * 50_000, " ".join("a" if i % 2 else f"b{i}" for i in range(50_000))),  # 7 s without a bound
        (
            " ".join(random.Random(0).choices("ab", k=50_000)),
            " ".join(random.Random(1).choices("ab", k=50_000)),
        ),
    ],
    ids=["one word", "every other word", "two words"],
)
def test_diff_of_repetitive_texts_takes_no_time(left, right):
    began = time.process_time()
    one, _, _ = diff.sides(left, right)
    assert time.process_time() - began < 1
    assert one[-1][0] == "gap"
    assert "more characters" in one[-1][1]


counts_of = st.lists(st.integers(0, 1000), min_size=1, max_size=60)


@given(counts_of, st.data())
def test_histogram_keeps_proportions(read, data):
    kept = [data.draw(st.integers(0, n)) for n in read]
    low = data.draw(st.floats(-1e3, 1e3))
    edges = edges_of(low, low + data.draw(st.floats(1e-3, 1e6)), len(read), False)
    if data.draw(st.booleans()) and len(read) > 1:
        edges = [0.0, *edges_of(1, 10 ** data.draw(st.integers(1, 9)), len(read) - 1, True)]
    picture = pictures.histogram("x", {"edges": edges, "read": read, "kept": kept}, sum(read), sum(kept))
    if not sum(read):
        assert picture is None
        return
    heights = [100 - float(y) for y in re.findall(r"V([\d.]+)H", picture["read"])]
    filled = [n for n in read if n]
    assert heights[0] > 0
    assert heights[-1] > 0
    assert len(heights) == picture["bins"]
    assert max(heights) == pytest.approx(100)
    assert sum(heights) == pytest.approx(100 * sum(read) / max(filled), abs=0.01 * len(read))
    places = [x for x, _ in picture["ticks"]]
    assert places == sorted(places)
    assert all(0 <= x <= 100 for x in places)
    assert len(places) <= 16


def test_axes_have_round_numbers():
    def labels(edges, first=0):
        n = len(edges) - 1
        ones = [0] * first + [1] * (n - first)
        picture = pictures.histogram("x", {"edges": edges, "read": ones, "kept": ones}, n, n)
        return [label for _, label in picture["ticks"]]

    assert labels(edges_of(0, 1, 40, False)) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert labels(edges_of(0, 20, 40, False)) == ["0", "5", "10", "15", "20"]
    assert labels(edges_of(10, 1e6, 40, True)) == ["10", "100", "1 k", "10 k", "100 k", "1 M"]
    assert labels(edges_of(10, 1e6, 40, True), first=32) == ["100 k", "200 k", "500 k", "1 M"]
    assert labels([-math.inf, 0, 1, 2, math.inf]) == ["-1", "0", "1", "2", "3"]


def test_the_stream_narrows_by_what_is_left_out():
    rows = pictures.stream([{"name": "a", "in": 1000, "kept": 750}, {"name": "b", "in": 750, "kept": 750}])
    assert rows[0]["kept_path"] == "M0 0H645.0V40H0Z"
    assert rows[0]["lost_path"].startswith("M645.0 0H860.0C")
    assert (rows[1]["kept_path"], rows[1]["lost_path"]) == ("M0 0H645.0L645.0 40H0Z", "")
    (tiny,) = pictures.stream([{"name": "a", "in": 10**9, "kept": 10**9 - 1}])
    assert tiny["lost_path"].startswith("M858.0 0H860.0C")  # still to be seen


def test_pictures_of_samples_are_to_the_scale_of_all_documents():
    counts = {"edges": [0, 1, 2], "read": [30, 10], "kept": [10, 10]}
    picture = pictures.histogram("x", counts, 4_000, 2_000)
    assert picture["read"] == "M0 100V0.00H1V66.67H2V100Z"  # 3,000 and 1,000
    assert picture["kept"] == "M0 100V66.67H1V66.67H2V100Z"  # 1,000 and 1,000
    assert picture["top"] == 0.75
    assert picture["medians"] == ("0.667", "1")
