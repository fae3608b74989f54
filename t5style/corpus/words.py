"""Words of a text, compiled: where they are in its UTF-8 bytes, and hashes of them and of runs of them.

A word is a run of letters, digits and the marks on them; everything else keeps words apart and counts for
nothing. Case is folded. Scripts that are written without spaces (Han, Kana, Thai, Lao, Khmer, Myanmar) have
one word for each letter with its marks. Invisible format characters (soft hyphen, zero-width joiner) are
passed over. What a character is follows Python's ``unicodedata``, so hashes are the same on any machine, for
characters that its version of Unicode knows.

Text is handed over as ``utf8(text)``, with ``table()``. Hashes are 64 bits: FNV-1a over code points for a
word, a polynomial over words for a run.
"""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

import numba
import numpy as np

_jit: Any = numba.njit(cache=True, nogil=True)
# Inlined before types are known: arrays handed from function to function are counted at each call.
_inline: Any = numba.njit(cache=True, nogil=True, inline="always")

# Kinds of characters.
_SEPARATOR, LETTER, SINGLE, _MARK, _IGNORED = range(5)
KIND_SHIFT = np.uint32(24)  # of a table's entry; the case-folded code point is below
CODE = np.uint32(0xFFFFFF)
_TABLE_SIZE = 0x20000
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # Han iteration mark and zero
    (0x3021, 0x30FF),  # Han numerals, Hiragana, Katakana
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x9FFF),  # Han
    (0xA9E0, 0xA9FF),  # Myanmar
    (0xAA60, 0xAA7F),  # Myanmar
    (0xF900, 0xFAFF),  # Han compatibility
    (0xFF66, 0xFF9F),  # Katakana of half width
    (0x1AFF0, 0x1B16F),  # Kana
)

# FNV-1a (RFC 9923), 64 bits; the finaliser's multipliers are MurmurHash3's.
FNV_START = np.uint64(0xCBF29CE484222325)
FNV_PRIME = np.uint64(0x100000001B3)
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_HALF = np.uint64(33)
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial; odd, so nothing is lost in multiplying


def utf8(text: str) -> np.ndarray:
    """uint8 [bytes]; lone surrogates are kept, as separators."""
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


@functools.cache
def table() -> np.ndarray:
    """uint32 [0x20000]: kind << 24 | case-folded code point, for each code point of the first two planes."""
    entries = np.zeros(_TABLE_SIZE, np.uint32)
    for code in range(_TABLE_SIZE):
        character = chr(code)
        category = unicodedata.category(character)
        if category[0] in "LN":
            unspaced = category[:2] in ("Lo", "Lm", "Nl") and any(a <= code <= b for a, b in _UNSPACED)
            folded = character.casefold()
            kind = SINGLE if unspaced else LETTER
            entries[code] = kind << 24 | (ord(folded) if len(folded) == 1 else code)
        elif category[0] == "M":
            entries[code] = _MARK << 24 | code
        elif category == "Cf":
            entries[code] = _IGNORED << 24 | code
    return entries


@_jit
def mix(value):  # type: ignore[no-untyped-def]
    """Spreads 64 bits over 64 bits, one to one."""
    value = (value ^ (value >> _HALF)) * _MIX_1
    value = (value ^ (value >> _HALF)) * _MIX_2
    return value ^ (value >> _HALF)


@_inline
def character(text, i, table):  # type: ignore[no-untyped-def]
    """(entry of the table, bytes) of the character at byte ``i``."""
    first = np.uint32(text[i])
    if first < 0x80:
        return table[first], 1
    six = np.uint32(0x3F)
    if first < 0xE0:
        code = (first & np.uint32(0x1F)) << np.uint32(6) | (np.uint32(text[i + 1]) & six)
        return table[code], 2
    if first < 0xF0:
        code = (
            (first & np.uint32(0xF)) << np.uint32(12)
            | (np.uint32(text[i + 1]) & six) << np.uint32(6)
            | (np.uint32(text[i + 2]) & six)
        )
        return table[code], 3
    code = (
        (first & np.uint32(7)) << np.uint32(18)
        | (np.uint32(text[i + 1]) & six) << np.uint32(12)
        | (np.uint32(text[i + 2]) & six) << np.uint32(6)
        | (np.uint32(text[i + 3]) & six)
    )
    if code < _TABLE_SIZE:
        return table[code], 4
    if code < 0x40000:  # planes of Han
        return np.uint32(SINGLE << 24 | code), 4
    if code >= 0xE0000 and code < 0xE1000:  # tags and variation selectors
        return np.uint32(_IGNORED << 24 | code), 4
    return np.uint32(_SEPARATOR), 4


@_jit
def next_word(text, i, table):  # type: ignore[no-untyped-def]
    """(start, end, hash) of the first word at or behind byte ``i``; start -1 where there is none."""
    size = len(text)
    start = -1
    end = i
    single = False
    word = FNV_START
    while i < size:
        entry, step = character(text, i, table)
        kind = entry >> KIND_SHIFT
        if kind == _SEPARATOR:
            if start >= 0:
                break
            i += step
            continue
        if kind == _IGNORED:
            i += step
            continue
        if start >= 0 and (kind == SINGLE or (single and kind == LETTER)):
            break
        if start < 0:
            start = i
            single = kind == SINGLE
        word = (word ^ np.uint64(entry & CODE)) * FNV_PRIME
        i += step
        end = i
    return start, end, mix(word)


@_jit
def count(text, table):  # type: ignore[no-untyped-def]
    """The number of words."""
    number = 0
    end = 0
    while True:
        start, end, _ = next_word(text, end, table)
        if start < 0:
            return number
        number += 1


@_jit
def split(text, table):  # type: ignore[no-untyped-def]
    """(hashes uint64 [words], starts int64 [words], ends int64 [words]), offsets in bytes."""
    number = count(text, table)
    hashes = np.empty(number, np.uint64)
    starts = np.empty(number, np.int64)
    ends = np.empty(number, np.int64)
    end = 0
    for n in range(number):
        start, end, word = next_word(text, end, table)
        hashes[n] = word
        starts[n] = start
        ends[n] = end
    return hashes, starts, ends


@_jit
def power(exponent):  # type: ignore[no-untyped-def]
    """BASE ** exponent, modulo 2**64."""
    result = np.uint64(1)
    for _ in range(exponent):
        result *= BASE
    return result


@_jit
def runs(hashes, length):  # type: ignore[no-untyped-def]
    """Hashes of all runs of ``length`` words: uint64 [max(words - length + 1, 0)], never 0."""
    out = np.empty(max(len(hashes) - length + 1, 0), np.uint64)
    oldest = power(length)
    total = np.uint64(0)
    for i in range(len(hashes)):
        total = total * BASE + hashes[i]
        if i >= length:
            total -= hashes[i - length] * oldest
        if i >= length - 1:
            out[i - length + 1] = finished(total, length)
    return out


@_jit
def finished(total, length):  # type: ignore[no-untyped-def]
    """The hash of a run of ``length`` words from its polynomial; never 0."""
    value = mix(total + np.uint64(length))
    return value if value else np.uint64(1)
