"""Deduplication's inner loops, compiled: MinHash signatures, connected components, lines, winnowing."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from t5style.corpus.words import (
    BASE,
    CODE,
    FNV_PRIME,
    FNV_START,
    KIND_SHIFT,
    LETTER,
    character,
    finished,
    mix,
    next_word,
    power,
)

_jit: Any = numba.njit(cache=True, nogil=True)

_BLOCK = 512  # shingles taken through the permutations together
_FULL = np.uint32(0xFFFFFFFF)
_HALF = np.uint32(16)
_TOP = np.uint64(32)
_NEWLINE = np.uint8(10)


@_jit
def _lower(block, number, add, first, second, low):  # type: ignore[no-untyped-def]
    """Takes ``low`` down to the least value of each permutation over the block's shingles."""
    permutations = len(low)
    for i in range(number):
        shingle = block[i]
        # A multiplication alone keeps low bits low, and the minima of two permutations depend on one another
        # where their multipliers have a simple ratio; folding the upper half in between ends both.
        for j in range(permutations):
            value = np.uint32(np.uint32(shingle + add[j]) * first[j])
            value = np.uint32(np.uint32(value ^ (value >> _HALF)) * second[j])
            low[j] = min(low[j], value)


@_jit
def signature(text, table, ngram, constants):  # type: ignore[no-untyped-def]
    """(uint32 [permutations], number of words): the least value of each permutation over the hashes of all
    runs of ``ngram`` words; over that of all words together where there are fewer.

    Args:
      text: uint8 [bytes].
      table: ``words.table()``.
      constants: uint32 [3, permutations]: added, and odd multipliers.
    """
    add, first, second = constants[0], constants[1], constants[2]
    low = np.full(constants.shape[1], _FULL, np.uint32)
    block = np.empty(_BLOCK, np.uint32)
    held = 0
    ring = np.zeros(ngram, np.uint64)
    oldest = power(ngram)
    total = np.uint64(0)
    number = 0
    slot = 0
    end = 0
    while True:
        start, end, word = next_word(text, end, table)
        if start < 0:
            break
        total = total * BASE + word - ring[slot] * oldest
        ring[slot] = word
        slot += 1
        if slot == ngram:
            slot = 0
        number += 1
        if number >= ngram:
            block[held] = np.uint32(finished(total, ngram) >> _TOP)
            held += 1
            if held == _BLOCK:
                _lower(block, held, add, first, second, low)
                held = 0
    if 0 < number < ngram:
        block[0] = np.uint32(finished(total, number) >> _TOP)
        held = 1
    _lower(block, held, add, first, second, low)
    return low, number


@_jit
def bands(signature, rows, out):  # type: ignore[no-untyped-def]
    """Fills ``out``, uint64 [bands], with a hash of each band's rows and number; never 0."""
    for band in range(len(out)):
        key = np.uint64(band + 1)
        for row in range(rows):
            key = mix(key * BASE + np.uint64(signature[band * rows + row]))
        out[band] = key if key else np.uint64(1)


@_jit
def components(n, pairs):  # type: ignore[no-untyped-def]
    """int64 [n]: the smallest member of each one's connected component. Union-find with path halving; roots
    are the smallest members.
    """
    parent = np.arange(n)
    for i in range(len(pairs)):
        a = pairs[i, 0]
        b = pairs[i, 1]
        while parent[a] != a:
            parent[a] = parent[parent[a]]
            a = parent[a]
        while parent[b] != b:
            parent[b] = parent[parent[b]]
            b = parent[b]
        if a < b:
            parent[b] = a
        else:
            parent[a] = b
    for i in range(n):  # parents come before their children, so they are done
        parent[i] = parent[parent[i]]
    return parent


@_jit
def firsts(keys, order, ranks):  # type: ignore[no-untyped-def]
    """int64 [n]: for each item the one of least ``order`` (then index) with the same key.

    Args:
      ranks: int64 [n], the items sorted by key.
    """
    n = len(keys)
    out = np.empty(n, np.int64)
    begin = 0
    while begin < n:
        key = keys[ranks[begin]]
        first = ranks[begin]
        stop = begin + 1
        while stop < n and keys[ranks[stop]] == key:
            item = ranks[stop]
            if order[item] < order[first] or (order[item] == order[first] and item < first):
                first = item
            stop += 1
        for i in range(begin, stop):
            out[ranks[i]] = first
        begin = stop
    return out


@_jit
def _is_space(text, i, step):  # type: ignore[no-untyped-def]
    """Whether white space is at byte ``i``."""
    byte = text[i]
    if step == 1:
        return byte == 32 or (byte >= 9 and byte <= 13) or (byte >= 28 and byte <= 31)
    if step == 2:
        return byte == 0xC2 and (text[i + 1] == 0xA0 or text[i + 1] == 0x85)
    if step == 3:
        code = (
            np.int64(text[i] & 0xF) << 12 | np.int64(text[i + 1] & 0x3F) << 6 | np.int64(text[i + 2] & 0x3F)
        )
        return (
            (code >= 0x2000 and code <= 0x200A)
            or code == 0x3000
            or code == 0x2028
            or code == 0x2029
            or code == 0x202F
            or code == 0x205F
            or code == 0x1680
        )
    return False


@_jit
def _measure(text, begin, end, table, digits):  # type: ignore[no-untyped-def]
    """(characters between white space at either end, key) of the bytes; key 0 where there is no word."""
    key = FNV_START
    characters = 0
    trailing = 0  # white space seen since the last other character
    words = False
    apart = False
    i = begin
    while i < end:
        entry, step = character(text, i, table)
        kind = entry >> KIND_SHIFT
        if _is_space(text, i, step):
            trailing += 1
        else:
            characters += 1 + (trailing if characters else 0)
            trailing = 0
        if kind >= LETTER and kind <= LETTER + 2:  # letter, letter of a script without spaces, mark
            if apart and words:
                key = (key ^ np.uint64(32)) * FNV_PRIME
            apart = False
            words = True
            code = entry & CODE
            if code < 0x10000 and digits[code]:
                code = np.uint32(48)
            key = (key ^ np.uint64(code)) * FNV_PRIME
        elif kind == 0:
            apart = True
        i += step
    if not words:
        return characters, np.uint64(0)
    key = mix(key)
    return characters, key if key else np.uint64(1)


@_jit
def units(text, table, digits, paragraphs):  # type: ignore[no-untyped-def]
    """The lines, or the paragraphs, of a text.

    Args:
      text: uint8 [bytes].
      table: ``words.table()``.
      digits: bool [0x10000], of the code points.
      paragraphs: runs of lines that are not blank; else every line.

    Returns:
      (starts int64 [units], ends int64 [units], characters int64 [units], keys uint64 [units]); offsets in
      bytes, line ends not included; characters without white space at either end; 0 for blank units.
    """
    lines = 1
    for i in range(len(text)):
        if text[i] == _NEWLINE:
            lines += 1
    starts = np.empty(lines, np.int64)
    ends = np.empty(lines, np.int64)
    number = 0
    begin = 0
    joined = False
    for _ in range(lines):
        end = begin
        while end < len(text) and text[end] != _NEWLINE:
            end += 1
        if paragraphs:
            i = begin
            while i < end:
                _, step = character(text, i, table)
                if not _is_space(text, i, step):
                    break
                i += step
            if i == end:
                joined = False
            elif joined:
                ends[number - 1] = end
            else:
                starts[number] = begin
                ends[number] = end
                number += 1
                joined = True
        else:
            starts[number] = begin
            ends[number] = end
            number += 1
        begin = end + 1
    characters = np.empty(number, np.int64)
    keys = np.empty(number, np.uint64)
    for n in range(number):
        characters[n], keys[n] = _measure(text, starts[n], ends[n], table, digits)
    return starts[:number], ends[:number], characters, keys


@_jit
def winnow(grams, window):  # type: ignore[no-untyped-def]
    """int64 [max(grams - window + 1, 0)]: where the least of each ``window`` successive hashes is, of equal
    ones the last (Schleimer et al. 2003, section 3).
    """
    number = max(len(grams) - window + 1, 0)
    out = np.empty(number, np.int64)
    queue = np.empty(window, np.int64)  # a ring: positions, their hashes going up
    head = 0
    held = 0
    for i in range(len(grams)):
        if held and queue[head] <= i - window:
            head = (head + 1) % window
            held -= 1
        while held and grams[queue[(head + held - 1) % window]] >= grams[i]:
            held -= 1
        queue[(head + held) % window] = i
        held += 1
        if i >= window - 1:
            out[i - window + 1] = queue[head]
    return out


@_jit
def lookup(hashes, lengths, index, bits):  # type: ignore[no-untyped-def]
    """Runs of words that are in an index.

    Args:
      hashes: uint64 [words].
      lengths: int64, ascending: how many words the index's runs have.
      index: uint64 [runs], sorted hashes of them.
      bits: uint64 [2**b]: of each hash, the top b bits say the word, the next 6 and the lowest 6 a bit of it.

    Returns:
      int64 [found, 3]: first word, number of words, place in the index; by their last words.
    """
    one = np.uint64(1)
    shift = np.uint64(64 - 6)
    size = len(bits)
    while size > 1:
        size >>= 1
        shift -= np.uint64(1)
    sums = np.zeros(len(hashes) + 1, np.uint64)
    for i in range(len(hashes)):
        sums[i + 1] = sums[i] * BASE + hashes[i]
    powers = np.empty(len(lengths), np.uint64)
    for which in range(len(lengths)):
        powers[which] = power(lengths[which])
    found = np.empty((16, 3), np.int64)
    number = 0
    for end in range(1, len(hashes) + 1):
        for which in range(len(lengths)):
            length = lengths[which]
            if length > end:
                break
            value = finished(sums[end] - sums[end - length] * powers[which], length)
            top = value >> shift
            mask = one << (top & np.uint64(63)) | one << (value & np.uint64(63))
            if bits[top >> np.uint64(6)] & mask != mask:
                continue
            place = 0
            above = len(index)
            while place < above:
                middle = (place + above) // 2
                if index[middle] < value:
                    place = middle + 1
                else:
                    above = middle
            if place == len(index) or index[place] != value:
                continue
            if number == len(found):
                grown = np.empty((2 * number, 3), np.int64)
                grown[:number] = found
                found = grown
            found[number, 0] = end - length
            found[number, 1] = length
            found[number, 2] = place
            number += 1
    return found[:number]
