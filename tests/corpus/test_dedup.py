"""Duplicates of documents, lines and passages."""

import collections
import hashlib
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus import dedup
from t5style.run_dir import UserError

DATA = pathlib.Path(__file__).parents[2].parent / "shared/data"
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _sets(text: str, ngram: int) -> set[tuple[str, ...]]:
    words = text.split()
    n = min(ngram, len(words))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _edited(rng: random.Random, words: int, edits: int) -> tuple[str, str]:
    """A random text, and a copy with as many words replaced."""
    text = ["".join(rng.choices(LETTERS, k=5)) for _ in range(words)]
    copy = list(text)
    for place in rng.sample(range(words), edits):
        copy[place] = "".join(rng.choices(LETTERS, k=6))
    return " ".join(text), " ".join(copy)


def test_text_digest_is_of_the_bytes() -> None:
    assert dedup.text_digest("ä") == hashlib.blake2b("ä".encode(), digest_size=16).digest()
    assert len(dedup.text_digest("\ud800")) == 16


@pytest.mark.parametrize("edits", [2, 4, 8, 12, 20])
def test_recall_follows_theory_at_known_similarity(edits: int) -> None:
    rng = random.Random(edits)
    minhash = dedup.MinHash()
    hits, agreed, similarities = 0, [], []
    for _ in range(300):
        a, b = _edited(rng, 150, edits)
        left, right = _sets(a, 5), _sets(b, 5)
        similarities.append(len(left & right) / len(left | right))
        hits += bool((minhash.band_keys(a) == minhash.band_keys(b)).any())
        agreed.append((minhash.signature(a) == minhash.signature(b)).mean())
    s = np.array(similarities)
    p = 1 - (1 - s**8) ** 14
    # Four standard deviations: one in 16,000 correct implementations would fail with another seed.
    assert abs(hits - p.sum()) <= 4 * np.sqrt((p * (1 - p)).sum()) + 1e-9
    assert abs(np.mean(agreed) - s.mean()) <= 4 * np.sqrt((s * (1 - s)).sum() / 112) / len(s)


def test_values_of_a_signature_are_independent() -> None:
    """The number of agreeing values varies as a binomial one: permutations do not move together."""
    rng = random.Random(0)
    minhash = dedup.MinHash(ngram=1)
    counts = []
    for _ in range(500):
        words = rng.sample(range(1_000_000), 150)
        a, b = " ".join(map(str, words[:100])), " ".join(map(str, words[50:]))
        counts.append((minhash.signature(a) == minhash.signature(b)).sum())
    s = 50 / 150
    # The sample variance of 500 draws has a relative standard deviation of sqrt(2 / 499).
    assert np.var(counts) / (112 * s * (1 - s)) == pytest.approx(1, abs=4 * np.sqrt(2 / 499))


def test_band_keys_tell_bands_seeds_and_sizes_apart() -> None:
    text = "one two three four five six seven"
    keys = dedup.MinHash().band_keys(text)
    assert keys.dtype == np.uint64
    assert keys.shape == (14,)
    assert keys.all()
    assert len(set(keys.tolist())) == 14
    assert dedup.MinHash().signature(text).shape == (112,)
    assert not np.intersect1d(keys, dedup.MinHash(seed=2).band_keys(text)).size
    assert dedup.MinHash(bands=3, rows=2).band_keys(text).shape == (3,)
    assert (keys == dedup.MinHash().band_keys("One, two: THREE four\nfive six seven.")).all()


def test_keys_are_the_same_in_every_process() -> None:
    # Decided once: an index of a corpus that is extended holds keys.
    code = "from t5style.corpus import dedup; print(dedup.MinHash().band_keys('a b c d e f')[0])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == dedup.MinHash().band_keys("a b c d e f")[0] == 11640587156273545384


def test_short_and_empty_texts() -> None:
    keys = dedup.MinHash().band_keys
    assert (keys("two words") == keys("Two words!")).all()
    assert not (keys("two words") == keys("two other")).any()
    assert not (keys("") == keys("...")).any()
    assert (keys("...") == keys("...")).all()
    assert dedup.near_duplicates(["", "!", "a", "?", "!"]) == [[1, 4]]
    assert (dedup.MinHash().signature("") == 2**32 - 1).all()
    assert dedup.near_duplicates([]) == []


@pytest.mark.parametrize(
    "settings", [{"ngram": 0}, {"bands": 0}, {"rows": -1}, {"seed": -1}, {"ngram": 2.5}, {"bands": 10**6}]
)
def test_minhash_settings_that_cannot_be(settings: dict) -> None:
    with pytest.raises(UserError, match=f"MinHash.{next(iter(settings))} must"):
        dedup.MinHash(**settings)


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_components_are_those_of_a_search(n: int, pairs: list[tuple[int, int]]) -> None:
    pairs = [(a % n, b % n) for a, b in pairs]
    near = collections.defaultdict(set)
    for a, b in pairs:
        near[a].add(b)
        near[b].add(a)
    expected = [-1] * n
    for item in range(n):
        stack = [item] if expected[item] < 0 else []
        while stack:
            at = stack.pop()
            if expected[at] < 0:
                expected[at] = item
                stack += near[at]
    assert dedup.components(n, np.array(pairs, np.int64).reshape(-1, 2)).tolist() == expected


def test_components_of_a_long_chain_and_of_nothing() -> None:
    n = 200_000
    chain = np.stack([np.arange(n - 1, 0, -1), np.arange(n - 2, -1, -1)], axis=1)
    assert not dedup.components(n, chain).any()
    assert dedup.components(0, np.empty((0, 2), np.int64)).tolist() == []
    with pytest.raises(ValueError, match="but there are 2"):
        dedup.components(2, np.array([[0, 2]]))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=30))
def test_band_pairs_link_to_the_first(items: list[tuple[int, int]]) -> None:
    keys = np.array([key for key, _ in items], np.uint64)
    order = np.array([rank for _, rank in items], np.int64)
    expected = []
    for i, (key, _) in enumerate(items):
        first = min((rank, j) for j, (other, rank) in enumerate(items) if other == key)[1]
        if first != i:
            expected.append((first, i))
    assert [tuple(pair) for pair in dedup.band_pairs(keys, order).tolist()] == expected


def test_jaccard_is_that_of_sets_of_ngrams() -> None:
    rng = random.Random(1)
    for edits in (0, 1, 5, 30):
        a, b = _edited(rng, 60, edits)
        left, right = _sets(a, 5), _sets(b, 5)
        assert dedup.jaccard(a, b) == pytest.approx(len(left & right) / len(left | right))
    assert dedup.jaccard("", "") == dedup.jaccard("a", "A") == 1
    assert dedup.jaccard("", "a") == dedup.jaccard("", ".") == 0


def test_verify_takes_out_what_is_not_similar_enough() -> None:
    a, b = _edited(random.Random(3), 200, 4)
    texts = ["something else altogether", a, b, a]
    assert dedup.near_duplicates(texts) == [[1, 2, 3]]
    assert dedup.near_duplicates(texts, verify=0.5) == [[1, 2, 3]]
    assert dedup.near_duplicates(texts, verify=0.99) == [[1, 3]]
    with pytest.raises(UserError, match="verify"):
        dedup.near_duplicates(texts, verify=2)


@pytest.mark.parametrize("size", [100, 1000])
@pytest.mark.skipif(not DATA.exists(), reason="shared data is absent")
def test_planted_articles_are_found_and_no_others(size: int) -> None:
    lines = (DATA / f"dedup/articles_{size}.train").read_text().splitlines()
    names, texts = zip(*(line.split(" ", 1) for line in lines), strict=True)
    truth = (DATA / f"dedup/articles_{size}.truth").read_text().splitlines()
    expected = {frozenset(line.split()) for line in truth if line}
    assert {frozenset(names[i] for i in group) for group in dedup.near_duplicates(texts)} == expected


def test_line_keys_as_in_ccnet() -> None:
    keys = dedup.line_keys(
        "  Page 12 of 40\nPAGE 77, of 99!\n\nPage 1 of 40\n-----\nPagé 12 of 40", min_characters=5
    )
    assert keys[0] == keys[1] != 0
    assert keys[2] == keys[4] == 0
    assert len(set(keys[[0, 3, 5]].tolist())) == 3
    assert dedup.line_keys("short\n" + "x" * 20).tolist()[0] == 0
    assert dedup.line_keys("", min_characters=1).tolist() == [0]
    assert dedup.line_keys("\u3000 five \u2003", min_characters=5).tolist() == [0]
    assert dedup.line_keys(" fives ", min_characters=5).all()


def test_paragraphs_are_what_blank_lines_part() -> None:
    text = "\n \nOne line\nand two.\n\t\n\nOne line and two\n"
    keys = dedup.line_keys(text, "paragraph", 1)
    assert len(keys) == 2
    assert keys[0] == keys[1] != 0
    assert dedup.remove_units(text, np.array([False, True]), "paragraph") == "\n \nOne line\nand two."
    assert dedup.remove_units(text, np.array([True, False]), "paragraph") == "One line and two\n"
    assert dedup.line_keys(" \n", "paragraph", 1).tolist() == []


@pytest.mark.parametrize(
    ("text", "drop", "expected"),
    [
        ("a\nb\nc", [0, 1, 0], "a\nc"),
        ("a\n\nb\n\nc\n", [0, 0, 1, 0, 0, 0], "a\n\nc\n"),
        ("a\n\nb", [1, 0, 0], "b"),
        ("a\n\nb\n", [0, 0, 1, 0], "a"),
        ("a\nb", [1, 1], ""),
        ("\n\na\n\n\nb", [0] * 6, "\n\na\n\n\nb"),
    ],
)
def test_remove_lines(text: str, drop: list[int], expected: str) -> None:
    assert dedup.remove_units(text, np.array(drop, bool)) == expected


@given(st.text("ab \n.\u3000é"), st.data())
def test_removing_leaves_the_other_units(text: str, data: st.DataObject) -> None:
    for unit in ("line", "paragraph"):
        keys = dedup.line_keys(text, unit, 1)
        units = text.split("\n")
        assert unit == "paragraph" or len(keys) == len(units)
        drop = np.array(data.draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys))), bool)
        left = dedup.remove_units(text, drop, unit)
        kept = keys[~drop]
        assert [k for k in dedup.line_keys(left, unit, 1).tolist() if k] == [k for k in kept.tolist() if k]
        if not drop.any():
            assert left == text


def test_units_that_cannot_be() -> None:
    with pytest.raises(UserError, match="'line' or 'paragraph'"):
        dedup.line_keys("a", "sentence")
    with pytest.raises(ValueError, match="2 units"):
        dedup.remove_units("a\nb", np.array([True]))


def _brute(corpus: list[list[str]], size: int) -> list[list[int]]:
    """For each text the windows that occurred before."""
    seen: set[tuple[str, ...]] = set()
    result = []
    for words in corpus:
        found = []
        for i in range(len(words) - size + 1):
            window = tuple(words[i : i + size])
            if window in seen:
                found.append(i)
            seen.add(window)
        result.append(found)
    return result


def _two_steps(texts: list[str], substrings: dedup.Substrings) -> list[list[int]]:
    values, counts = np.unique(
        np.concatenate([substrings.fingerprints(t) for t in texts]), return_counts=True
    )
    seen: set[int] = set()
    result = []
    for text in texts:
        found = []
        for key, position in zip(*substrings.windows(text, values[counts > 1]), strict=True):
            if int(key) in seen:
                found.append(int(position))
            seen.add(int(key))
        result.append(found)
    return result


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=60), min_size=1, max_size=4), st.integers(2, 12))
def test_repeated_passages_are_those_of_all_windows(corpus: list[list[str]], size: int) -> None:
    texts = [" ".join(words) for words in corpus]
    assert _two_steps(texts, dedup.Substrings(size)) == _brute(corpus, size)


def test_planted_passages_are_found_and_removed() -> None:
    rng = random.Random(5)
    vocabulary = [a + b for a in LETTERS for b in LETTERS]
    passage = rng.choices(vocabulary, k=70)
    corpus = [rng.choices(vocabulary, k=400) for _ in range(20)]
    for words in corpus[::4]:
        place = rng.randrange(400)
        words[place:place] = passage
    corpus[1][100:100] = passage[:49]  # one word too short
    texts = [" ".join(words) for words in corpus]
    substrings = dedup.Substrings()
    found = _two_steps(texts, substrings)
    assert found == _brute(corpus, 50)
    left = [substrings.remove(text, np.array(part)) for text, part in zip(texts, found, strict=True)]
    assert " ".join(passage) in left[0]
    assert [len(text.split()) for text in left[4::4]] == [400] * 4
    assert left[1] == texts[1]
    # Few hashes tell where to look: 2 in (min_words - k + 2) words.
    assert sum(len(substrings.fingerprints(text)) for text in texts) < 0.1 * sum(map(len, corpus))


@pytest.mark.parametrize(
    ("text", "positions", "expected"),
    [
        ("a b c d e", [1], "a e"),
        ("a b c d e f", [1, 2], "a f"),
        ("a b c d e f g h", [0, 5], "d e"),
        ("Left. (B c d), right", [1], "Left. right"),
        ("One.\n\nB c d.\nTwo", [1], "One.\n\nTwo"),
        ("well-b c d-known", [1], "well-known"),
        ("我是你他们", [1], "我们"),
        ("É b c d. É", [1], "É É"),
        ("a b c.", [0], ""),
        ("ab我们你cd", [1], "ab cd"),
        ("a b c", [], "a b c"),
    ],
)
def test_seams(text: str, positions: list[int], expected: str) -> None:
    assert dedup.Substrings(3).remove(text, np.array(positions, np.int64)) == expected


@given(st.lists(st.sampled_from(["a", "é", "我", "b.", "\n\n", "(c"]), min_size=3, max_size=20), st.data())
def test_removing_passages_leaves_the_other_words(parts: list[str], data: st.DataObject) -> None:
    from t5style.corpus import words

    text = " ".join(parts)

    def hashes(text: str) -> list[int]:
        return words.split(words.utf8(text), words.table())[0].tolist()

    every = hashes(text)
    if len(every) < 3:
        return
    positions = data.draw(st.lists(st.integers(0, len(every) - 3), max_size=3))
    gone = {p + i for p in positions for i in range(3)}
    left = dedup.Substrings(3).remove(text, np.array(positions, np.int64))
    assert hashes(left) == [word for i, word in enumerate(every) if i not in gone]


def test_substrings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="min_words"):
        dedup.Substrings(1)
    with pytest.raises(ValueError, match="the text has 3"):
        dedup.Substrings(3).remove("a b c", np.array([1]))
    assert len(dedup.Substrings(3).fingerprints("a b")) == 0
    assert len(dedup.Substrings(3).windows("a b", np.array([1], np.uint64))[0]) == 0


def test_import_is_light() -> None:
    code = (
        "import sys; from t5style.corpus import dedup, decontaminate; "
        "print([m for m in ('numba', 'pyarrow', 'jax') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 10))
def test_winnowing_chooses_the_last_of_the_least(grams: list[int], window: int) -> None:
    from t5style.corpus import dedup_kernels

    expected = [
        max(range(i, i + window), key=lambda at: (-grams[at], at)) for i in range(len(grams) - window + 1)
    ]
    assert dedup_kernels.winnow(np.array(grams, np.uint64), window).tolist() == expected
