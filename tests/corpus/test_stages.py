import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5style.corpus.document import Document
from t5style.corpus.normalize import Normalize, normalize
from t5style.corpus.split import HashSplit, TailSplit
from t5style.corpus.stages import Drop, MaxLength, MinLength
from t5style.run_dir import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("e\u0301", "é"),
        ("a\r\nb\rc\nd", "a\nb\nc\nd"),
        ("a\x0cb\x85c\u2028d\u2029e", "a\nb\nc\nd\ne"),
        ("\ufeffa\x00b\x7f\x1b[0m\x9f", "ab[0m"),
        ("e\x00\u0301 e\ufeff\u0301", "é é"),
        ("  spaces\t stay \n\n\n", "  spaces\t stay \n\n\n"),
        ("half \ud800 pair", "half \ufffd pair"),
        ("ﬁ ² 🙂", "ﬁ ² 🙂"),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_normalizing_twice_is_normalizing_once(text):
    once = normalize(text)
    assert normalize(once) == once
    assert unicodedata.is_normalized("NFC", once)
    once.encode()
    assert not any(unicodedata.category(character) == "Cc" and character not in "\n\t" for character in once)


def test_normalize_stage_changes_only_the_text():
    document = Document("a\r\n", "x", "s", meta={"k": 1})
    assert Normalize()(document) == Document("a\n", "x", "s", meta={"k": 1})
    clean = Document("a", "x")
    assert Normalize()(clean) is clean


def test_lengths():
    document = Document("  four  ", "x")
    assert MinLength(4)(document) is document
    assert MinLength(5)(document) == Drop("shorter than 5 characters")
    assert MinLength(1)(Document(" \n", "x")) == Drop("blank")
    assert MaxLength(8)(document) is document
    assert MaxLength(7)(document) == Drop("longer than 7 characters")
    with pytest.raises(UserError, match=r"MinLength\.characters must be 1 or more, not 0"):
        MinLength(0)
    with pytest.raises(UserError, match=r"MaxLength\.characters must be 1 or more, not -1"):
        MaxLength(-1)


def routed(split, documents):
    total = sum(len(item.text) for item in documents)
    start = 0
    result = []
    for item in documents:
        result += split.route(item, start, total)
        start += len(item.text)
    return result


def test_hash_split_draws_the_shares_and_does_not_depend_on_order():
    documents = [Document("t", f"id{index}") for index in range(20_000)]
    split = HashSplit(validation=0.05, test=0.1)
    result = {item.id: name for name, item in routed(split, documents)}
    counts = {name: sum(other == name for other in result.values()) for name in split.names}
    # Binomial standard deviations are 31 and 42 documents.
    assert abs(counts["validation"] - 1000) < 5 * 31
    assert abs(counts["test"] - 2000) < 5 * 42
    assert {item.id: name for name, item in routed(split, documents[::-1])} == result
    other = {item.id: name for name, item in routed(HashSplit(0.05, 0.1, seed=1), documents)}
    assert sum(result[id] != other[id] for id in result) > 3000


def test_small_corpora_fill_every_split_and_tiny_ones_are_refused():
    for count in (3, 9, 100):
        documents = [Document("t", f"id{index}") for index in range(count)]
        split = HashSplit().fitted((item.id for item in documents), count)
        result = routed(split, documents)
        assert {name for name, _ in result} == {"train", "validation", "test"}
        assert sorted(item.id for _, item in result) == sorted(item.id for item in documents)
        unmoved = {item.id: name for name, item in routed(HashSplit(), documents)}
        assert sum(unmoved[item.id] != name for name, item in result) <= 2
    with pytest.raises(UserError, match=r"2 documents cannot fill the splits.*TailSplit"):
        HashSplit().fitted(["a", "b"], 2)
    split = HashSplit()
    assert split.fitted(iter(()), 10_000) is split


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_tail_split_cuts_the_joined_text_once(texts, fraction):
    documents = [Document(text, f"id{index}") for index, text in enumerate(texts)]
    result = routed(TailSplit(fraction), documents)
    joined = "".join(texts)
    border = int(len(joined) * (1 - fraction))
    assert "".join(item.text for name, item in result if name == "train") == joined[:border]
    assert "".join(item.text for name, item in result if name == "validation") == joined[border:]
    assert len({item.id for _, item in result}) == len(result) <= len(texts) + 1


def test_impossible_shares_are_refused():
    for shares in ((0.5, 0.5), (-0.1, 0), (0, 1.5)):
        with pytest.raises(UserError, match="sum to less than 1"):
            HashSplit(*shares)
    assert HashSplit(0.1, 0).names == ("train", "validation")
    for fraction in (0, 1, -1):
        with pytest.raises(UserError, match="between 0 and 1"):
            TailSplit(fraction)
