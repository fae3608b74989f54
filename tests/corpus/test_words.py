"""Words as hashes and offsets."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5style.corpus import words


def _split(text: str) -> list[str]:
    data = words.utf8(text)
    _, starts, ends = words.split(data, words.table())
    return [bytes(data[a:b]).decode() for a, b in zip(starts, ends, strict=True)]


def _hashes(text: str) -> list[int]:
    return words.split(words.utf8(text), words.table())[0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" .,!? \n\t…“”🙂", []),
        ("It’s a well-known fact: 3.14!", ["It", "s", "a", "well", "known", "fact", "3", "14"]),
        ("naïve ÉTÉ, жизнь", ["naïve", "ÉTÉ", "жизнь"]),
        ("soft\u00adhyphen", ["soft\u00adhyphen"]),
        ("我们abc。カナ12", ["我", "们", "abc", "カ", "ナ", "12"]),
        ("ที่", ["ที่"]),  # one letter with two marks
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("\U00020000\U00020001x", ["\U00020000", "\U00020001", "x"]),
        ("a\U0010fffdb", ["a", "b"]),
        ("x\ud800y".encode("utf-16", "surrogatepass").decode("utf-16", "replace"), ["x", "y"]),
    ],
)
def test_words_of_many_scripts(text: str, expected: list[str]) -> None:
    assert _split(text) == expected


def test_case_punctuation_and_invisible_signs_make_no_difference() -> None:
    assert _hashes("Don't SHOUT, Straße!") == _hashes("don’t — shout\nstraße")
    assert _hashes("ΣΟΦΟΣ") == _hashes("σοφος") == _hashes("σοφοσ")
    assert _hashes("hy\u00adphen") == _hashes("hyphen")
    assert _hashes("ab c") != _hashes("a bc")


def test_lone_surrogates_separate() -> None:
    assert len(_hashes("a\ud800b")) == 2


@given(st.text(st.characters(max_codepoint=0x7F)))
def test_ascii_words_are_those_of_a_regular_expression(text: str) -> None:
    assert _split(text) == re.findall("[A-Za-z0-9]+", text)


@given(st.text())
def test_every_text_splits_into_words_in_order(text: str) -> None:
    data = words.utf8(text)
    hashes, starts, ends = words.split(data, words.table())
    assert len(hashes) == words.count(data, words.table())
    assert (starts < ends).all()
    assert (ends[:-1] <= starts[1:]).all()
    for start, end in zip(starts, ends, strict=True):
        data[start:end].tobytes().decode()  # whole characters


def test_hashes_are_the_same_in_every_process() -> None:
    # Decided once: indexes on disk depend on it.
    assert _hashes("Hello, 世") == [0xE9C562C0FDB23244, 0x659F38AE50949D3D]


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 8))
def test_runs_are_the_same_where_their_words_are(numbers: list[int], length: int) -> None:
    hashes = np.array(numbers, np.uint64)
    out = words.runs(hashes, length)
    windows = [tuple(numbers[i : i + length]) for i in range(len(numbers) - length + 1)]
    assert len(out) == len(windows)
    assert len(set(out.tolist())) == len(set(windows))
    assert len(set(zip(windows, out.tolist(), strict=True))) == len(set(windows))
