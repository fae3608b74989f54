"""Deduplication of documents, lines and passages: the keys that tell what is the same, and what is done with
them. All are functions of the text alone, with the same results in any process.

Words are those of words.py: case and punctuation make no difference.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np

from t5style.run_dir import UserError

_SPACES = re.compile(r"\s+")


def text_digest(text: str) -> bytes:
    """16 bytes, BLAKE2b of the text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


@dataclasses.dataclass(frozen=True)
class MinHash:
    """MinHash signatures (Broder 1997) of a text's word n-grams, and their bands (Leskovec, Rajaraman &
    Ullman, Mining of Massive Datasets, section 3.4).

    Two texts whose sets of n-grams have Jaccard similarity s agree in each value of the signature with
    probability s, and in the key of at least one band with 1 - (1 - s**rows)**bands. A text of fewer words
    than ``ngram`` has one n-gram, all of them. A text without any word has the keys of its digest: it
    matches the same text only.

    Attributes:
      ngram: words in a shingle.
      bands: number of bands.
      rows: values of the signature in a band.
      seed: of the permutations.
    """

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        for name, most in (("ngram", 100), ("bands", 10_000), ("rows", 10_000)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 1 <= value <= most:
                raise UserError(f"MinHash.{name} must be a whole number from 1 to {most}, not {value!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 64:
            raise UserError(f"MinHash.seed must be a whole number from 0 to 2**64 - 1, not {self.seed!r}")

    def signature(self, text: str) -> np.ndarray:
        """uint32 [bands * rows]; all 2**32 - 1 where there is no word."""
        return self._signature(text)[0]

    def _signature(self, text: str) -> tuple[np.ndarray, int]:
        from t5style.corpus import dedup_kernels, words

        constants = _permutations(self.bands * self.rows, self.seed)
        return dedup_kernels.signature(words.utf8(text), words.table(), self.ngram, constants)

    def band_keys(self, text: str) -> np.ndarray:
        """uint64 [bands], never 0; the band's number is hashed too, so that different bands never match."""
        from t5style.corpus import dedup_kernels

        signature, words = self._signature(text)
        if not words:
            digest = np.frombuffer(text_digest(text), np.uint32)
            signature = np.resize(digest, self.bands * self.rows)
        keys = np.empty(self.bands, np.uint64)
        dedup_kernels.bands(signature, self.rows, keys)
        return keys


@functools.cache
def _permutations(number: int, seed: int) -> np.ndarray:
    """uint32 [3, number]: what is added, and two odd multipliers, for each permutation of 32 bits."""
    # Raw output of Philox, which is the same for all versions of NumPy.
    raw = np.random.Philox(key=seed).random_raw(3 * number)
    constants = (raw >> np.uint64(32)).astype(np.uint32).reshape(3, number)
    constants[1:] |= np.uint32(1)
    return constants


def shingles(text: str, ngram: int = 5) -> np.ndarray:
    """The set of a text's word n-grams as 64-bit hashes, sorted: uint64 [different n-grams]."""
    from t5style.corpus import words

    hashes = words.split(words.utf8(text), words.table())[0]
    return np.unique(words.runs(hashes, min(ngram, len(hashes)) or 1))


def jaccard(a: str, b: str, ngram: int = 5) -> float:
    """Jaccard similarity of the texts' sets of word n-grams, 0 to 1. Without words on both sides: whether
    the texts are the same.
    """
    return _jaccard(shingles(a, ngram), shingles(b, ngram)) if a != b else 1.0


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(len(a) + len(b) - common, 1)


def components(n: int, pairs: np.ndarray) -> np.ndarray:
    """Connected components.

    Args:
      n: number of items.
      pairs: int64 [m, 2], which items are connected.

    Returns:
      int64 [n]: for each item the smallest one of its component.

    Raises:
      ValueError: a pair names an item outside 0 to n - 1.
    """
    from t5style.corpus import dedup_kernels

    pairs = np.ascontiguousarray(pairs, np.int64).reshape(-1, 2)
    if len(pairs) and not 0 <= pairs.min() <= pairs.max() < n:
        raise ValueError(f"pairs name items {pairs.min()} to {pairs.max()}, but there are {n}")
    return dedup_kernels.components(n, pairs)


def band_pairs(keys: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Links each item to the first one with the same key.

    Args:
      keys: uint64 [n], of one band.
      order: [n], the least is first; of equal ones the first in the array.

    Returns:
      int64 [m, 2]: (first, item), by item.
    """
    from t5style.corpus import dedup_kernels

    keys = np.ascontiguousarray(keys, np.uint64)
    firsts = dedup_kernels.firsts(keys, np.ascontiguousarray(order), np.argsort(keys))
    items = np.flatnonzero(firsts != np.arange(len(keys)))
    return np.stack([firsts[items], items], axis=1)


def near_duplicates(
    texts: Sequence[str], ngram: int = 5, bands: int = 14, rows: int = 8, verify: float | None = None
) -> list[list[int]]:
    """Clusters of similar texts: connected components of texts that agree in a band (see ``MinHash``).

    Args:
      texts: texts.
      ngram, bands, rows: see ``MinHash``.
      verify: connect only texts whose exact Jaccard similarity is at least this. Each text is compared with
        the first one of every band key that it shares.

    Returns:
      Clusters of two texts or more: sorted indices, the clusters sorted by their first.
    """
    if verify is not None and not 0 <= verify <= 1:
        raise UserError(f"near_duplicates: verify must be from 0 to 1, not {verify}")
    minhash = MinHash(ngram, bands, rows)
    keys = np.empty((bands, len(texts)), np.uint64)
    for number, text in enumerate(texts):
        keys[:, number] = minhash.band_keys(text)
    order = np.arange(len(texts))
    pairs = np.concatenate([band_pairs(band, order) for band in keys])
    if verify is not None:
        pairs = np.unique(pairs, axis=0)
        sets = {number: shingles(texts[number], ngram) for number in np.unique(pairs).tolist()}
        similar = [texts[a] == texts[b] or _jaccard(sets[a], sets[b]) >= verify for a, b in pairs.tolist()]
        pairs = pairs[np.array(similar, bool)]
    roots = components(len(texts), pairs)
    sizes = np.bincount(roots, minlength=len(texts))
    members = np.flatnonzero(sizes[roots] > 1) if len(texts) else order
    members = members[np.argsort(roots[members], kind="stable")]
    return [list(group) for _, group in itertools.groupby(members.tolist(), key=roots.tolist().__getitem__)]


@functools.cache
def _digits() -> np.ndarray:
    """bool [0x10000]: decimal digits of any script."""
    return np.array([chr(code).isdecimal() for code in range(0x10000)])


def _units(text: str, unit: str) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    from t5style.corpus import dedup_kernels, words

    if unit not in ("line", "paragraph"):
        raise UserError(f"unit must be 'line' or 'paragraph', not {unit!r}")
    data = words.utf8(text)
    return data, dedup_kernels.units(data, words.table(), _digits(), unit == "paragraph")


def line_keys(text: str, unit: str = "line", min_characters: int = 20) -> np.ndarray:
    """Keys of a text's lines or paragraphs; those with the same key are duplicates.

    As in CCNet (Wenzek et al. 2020, section 3.1) case, punctuation and white space make no difference and
    every digit counts as 0; unlike there accents do.

    Args:
      text: text.
      unit: "line" (between line feeds) or "paragraph" (lines that are not blank between such that are).
      min_characters: shorter ones never count as duplicates, white space at either end not counted.

    Returns:
      uint64 [units]; 0 for those that never count: too short, or without letters and digits.
    """
    _, (_, _, characters, keys) = _units(text, unit)
    keys[characters < min_characters] = 0
    return keys


def remove_units(text: str, drop: np.ndarray, unit: str = "line") -> str:
    """The text without some of its lines or paragraphs.

    What is left stays as it is, but for blank lines that would follow one another, or begin or end the text,
    where something was removed.

    Args:
      text: text.
      drop: bool [units], those of ``line_keys``.
      unit: "line" or "paragraph".

    Raises:
      ValueError: ``drop`` is not as long as the text has units.
    """
    data, (starts, ends, characters, _) = _units(text, unit)
    drop = np.asarray(drop, bool)
    if drop.shape != starts.shape:
        raise ValueError(f"drop has shape {drop.shape}, but the text has {len(starts)} units")
    if not drop.any():
        return text
    raw = data.tobytes()
    pieces: list[bytes] = []
    gap = 0  # where what comes before the next unit begins
    blank = True  # whether what is kept so far ends in a blank line, or is nothing
    cut = False  # whether something was removed since
    for start, end, empty, dropped in zip(
        starts.tolist(), ends.tolist(), (characters == 0).tolist(), drop.tolist(), strict=True
    ):
        if dropped:
            cut = True
        elif not (cut and empty and blank):
            pieces += [raw[gap:start] if pieces or not cut else b"", raw[start:end]]
            blank = empty
            cut = cut and empty
        gap = end
    if cut:
        return _decode(b"".join(pieces).rstrip())
    return _decode(b"".join([*pieces, raw[gap:]]))


@dataclasses.dataclass(frozen=True)
class Substrings:
    """Passages of ``min_words`` words or more that occur more than once (Lee et al. 2021, ExactSubstr), by
    hashes in two steps. ``fingerprints`` are few: hashes of half as many words, winnowed (Schleimer et al.
    2003) such that any passage that repeats has one that repeats. ``windows`` then gives the hashes of whole
    passages only where a fingerprint repeats.

    Attributes:
      min_words: shorter passages may repeat.
    """

    min_words: int = 50

    def __post_init__(self) -> None:
        if not isinstance(self.min_words, int) or not 2 <= self.min_words <= 1_000_000:
            raise UserError(
                f"min_words must be a whole number from 2 to 1000000, not {self.min_words!r}; "
                "50 is usual, and fewer than 20 finds common phrases"
            )

    def _winnowed(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Hashes of words, hashes of k-grams, and for each window where its chosen k-gram is."""
        from t5style.corpus import dedup_kernels, words

        k = self.min_words // 2
        hashes = words.split(words.utf8(text), words.table())[0]
        if len(hashes) < self.min_words:
            hashes = hashes[:0]
        grams = words.runs(hashes, k)
        return hashes, grams, dedup_kernels.winnow(grams, self.min_words - k + 1)

    def fingerprints(self, text: str) -> np.ndarray:
        """uint64 [m], never 0: one for each k-gram that some window of ``min_words`` words has chosen, in
        order; equal ones where the text repeats itself.
        """
        _, grams, chosen = self._winnowed(text)
        return grams[chosen[np.diff(chosen, prepend=-1) != 0]]

    def windows(self, text: str, repeated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of the windows of ``min_words`` words that may occur more than once.

        Args:
          text: text.
          repeated: uint64, sorted: the fingerprints that occur more than once among all texts.

        Returns:
          (hashes uint64 [k], positions int64 [k] of their first words, ascending).
        """
        from t5style.corpus import words

        hashes, grams, chosen = self._winnowed(text)
        if not len(chosen) or not len(repeated):
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        distinct, inverse = np.unique(chosen, return_inverse=True)
        values = grams[distinct]
        places = np.minimum(np.searchsorted(repeated, values), len(repeated) - 1)
        positions = np.flatnonzero((repeated[places] == values)[inverse])
        if not len(positions):
            return np.empty(0, np.uint64), positions
        return words.runs(hashes, self.min_words)[positions], positions

    def remove(self, text: str, positions: np.ndarray) -> str:
        """The text without the words of some windows.

        With a passage go the punctuation up to the next white space, and an opening sign before its first
        word; of the white space on both sides the larger stays.

        Args:
          text: text.
          positions: of the windows' first words, in any order.

        Raises:
          ValueError: the text has no such window.
        """
        from t5style.corpus import words

        data = words.utf8(text)
        _, starts, ends = words.split(data, words.table())
        positions = np.unique(np.asarray(positions, np.int64))
        if not len(positions):
            return text
        if positions[0] < 0 or positions[-1] + self.min_words > len(starts):
            raise ValueError(
                f"windows begin at words {positions[0]} to {positions[-1]}, and the text has {len(starts)}"
            )
        breaks = np.flatnonzero(np.diff(positions) > self.min_words)
        first = positions[np.concatenate([[0], breaks + 1])]
        last = positions[np.concatenate([breaks, [len(positions) - 1]])] + self.min_words - 1
        return cut_words(data.tobytes(), starts, ends, zip(first.tolist(), last.tolist(), strict=True))


def cut_words(raw: bytes, starts: np.ndarray, ends: np.ndarray, cuts: Iterable[tuple[int, int]]) -> str:
    """The text without runs of words, with tidy seams (see ``Substrings.remove``).

    Args:
      raw: the text in UTF-8.
      starts, ends: int64 [words], byte offsets.
      cuts: first and last word of each run, ascending, with words between the runs.
    """
    pieces = []
    done = 0
    for first, last in cuts:
        begin = ends[first - 1] if first else 0
        end = starts[last + 1] if last + 1 < len(starts) else len(raw)
        before, after = _decode(raw[begin : starts[first]]), _decode(raw[ends[last] : end])
        spaces = list(_SPACES.finditer(before))
        head, left = (before[: spaces[-1].start()], spaces[-1].group()) if spaces else (before, "")
        space = _SPACES.search(after)
        right, tail = (space.group(), after[space.end() :]) if space else ("", "")
        if not first:
            seam = tail
        elif last + 1 == len(starts) and not tail:
            seam = head
        else:
            seam = head + max(left, right, key=lambda white: (white.count("\n"), len(white))) + tail
            if not seam and _spaced(raw, starts[first - 1]) and _spaced(raw, end):
                seam = " "
        pieces += [raw[done:begin], seam.encode("utf-8", "surrogatepass")]
        done = end
    return _decode(b"".join([*pieces, raw[done:]]))


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogatepass")


def _spaced(raw: bytes, at: int) -> bool:
    """Whether the character at this byte is of a script that is written with spaces."""
    from t5style.corpus import words

    entry, _ = words.character(np.frombuffer(raw[at : at + 4], np.uint8), 0, words.table())
    return bool(entry >> words.KIND_SHIFT == words.LETTER)
