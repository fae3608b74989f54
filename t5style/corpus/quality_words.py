"""Word splitting for the quality rules, compiled. Import it where it is used: it loads numba.

Texts come as arrays of code points (uint32). Words are split as spaCy 3.8's rule-based tokenizer does for
English (Honnibal et al.; algorithm in its documentation, "How spaCy's tokenizer works"): chunks between white
space lose prefixes and suffixes, unless what is left is a special case or a URL, and are then cut at infixes.
``quality_tables`` has the character classes and the special cases.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import njit

from t5style.corpus import quality_tables as tables

_SPACE, _ALPHA, _LOWER, _UPPER = tables.SPACE, tables.ALPHA, tables.LOWER, tables.UPPER
_QUOTE, _PREFIX, _SUFFIX, _INFIX = tables.QUOTE, tables.PREFIX, tables.SUFFIX, tables.INFIX
_CURRENCY, _BEFORE_DOT, _LETTER, _HOST = tables.CURRENCY, tables.BEFORE_DOT, tables.LETTER, tables.HOST
_UNSPACED, _MARK, _PLAIN, _CUTS = tables.UNSPACED, tables.MARK, tables.PLAIN, tables.CUTS

compiled: Any = functools.partial(njit, cache=True, nogil=True)
# For functions that make no arrays: numba need not count references to those they are given, which at one
# function call for each word cost more than all else together.
leaf: Any = compiled(_nrt=False)

_K = np.uint64(0x9E3779B97F4A7C15)
BASE = np.uint64(0xD6E8FEB86659FD93)  # odd, so that it has an inverse modulo 2^64
_ONE, _ZERO = np.uint64(1), np.uint64(0)
_S29, _S32 = np.uint64(29), np.uint64(32)


@leaf
def hash_codes(codes, a, b):  # type: ignore[no-untyped-def]
    """A 64-bit hash of ``codes[a:b]``, never 0."""
    h = _K
    for i in range(a, b):
        h = (h ^ np.uint64(codes[i])) * _K
        h ^= h >> _S29
    return h | _ONE


@leaf
def find_slot(keys, key):  # type: ignore[no-untyped-def]
    """Where in an open-addressing table (its size a power of two) the key is, or the free place for it."""
    mask = np.uint64(len(keys) - 1)
    i = ((key * _K) >> _S32) & mask
    while keys[i] != _ZERO and keys[i] != key:
        i = (i + _ONE) & mask
    return np.int64(i)


@leaf
def _maybe(codes, a, b, filters):  # type: ignore[no-untyped-def]
    """Whether a dictionary may hold ``codes[a:b]``, by its length and first and last character."""
    length = b - a
    if length > 31 or length < 1:
        return False
    place = ((codes[a] & np.uint32(127)) << np.uint32(7)) | (codes[b - 1] & np.uint32(127))
    return ((filters[place] >> np.uint32(length)) & np.uint32(1)) != 0


@leaf
def _look(codes, a, b, keys, values):  # type: ignore[no-untyped-def]
    key = hash_codes(codes, a, b)
    i = find_slot(keys, key)
    return np.int64(values[i]) if keys[i] == key else -1


@leaf
def find(codes, a, b, filters, keys, values):  # type: ignore[no-untyped-def]
    """What the dictionary (``quality_tables.dictionary``) holds under ``codes[a:b]``, or -1."""
    return _look(codes, a, b, keys, values) if _maybe(codes, a, b, filters) else -1


@leaf
def class_of(classes, code):  # type: ignore[no-untyped-def]
    return classes[code] if code < len(classes) else np.uint32(0)


@leaf
def _digit(code):  # type: ignore[no-untyped-def]
    return code >= 48 and code <= 57


@leaf
def _prefix(codes, a, b, classes):  # type: ignore[no-untyped-def]
    """Length of the prefix that is split off ``codes[a:b]``."""
    code = codes[a]
    if class_of(classes, code) & _PREFIX:
        return 1
    if code == 43:  # + but not +1
        return 0 if a + 1 < b and _digit(codes[a + 1]) else 1
    if code == 46:
        end = a + 1
        while end < b and codes[end] == 46:
            end += 1
        return end - a if end - a > 1 else 0
    if (code == 65 or code == 67) and a + 1 < b and codes[a + 1] == 36:  # A$ C$
        return 2
    if code == 85 and a + 2 < b and codes[a + 1] == 83 and codes[a + 2] == 36:  # US$
        return 3
    return 0


@leaf
def _suffix(codes, a, b, classes, units):  # type: ignore[no-untyped-def]
    """Length of the suffix that is split off ``codes[a:b]``."""
    if a >= b:
        return 0
    code = codes[b - 1]
    before = codes[b - 2] if b - 2 >= a else np.uint32(0)
    kind = class_of(classes, code)
    if code == 46:
        start = b - 1
        while start > a and codes[start - 1] == 46:
            start -= 1
        if b - start > 1:
            return b - start
        if class_of(classes, before) & _BEFORE_DOT:
            return 1
        if b - 3 >= a:
            if class_of(classes, before) & _UPPER and class_of(classes, codes[b - 3]) & _UPPER:
                return 1
            if codes[b - 3] == 0xB0 and (before == 70 or before == 67 or before == 75):  # °F. °C. °K.
                return 1
        return 0
    if code == 0x2026 and before == 0x2026:
        return 2
    if (code == 115 or code == 83) and (before == 39 or before == 0x2019):
        return 2
    if kind & _SUFFIX:
        return 1
    if code == 43 or kind & _CURRENCY:
        if _digit(before):
            return 1
        if code == 36 and b - 3 >= a:
            if (before == 65 or before == 67) and _digit(codes[b - 3]):
                return 2
            if before == 83 and codes[b - 3] == 85 and b - 4 >= a and _digit(codes[b - 4]):
                return 3
        return 0
    for length in range(1, 6):  # a unit of measurement after a digit
        i = b - 1 - length
        if i < a:
            break
        if _digit(codes[i]):
            for row in range(len(units)):
                if units[row, 0] == length:
                    same = True
                    for j in range(length):
                        same &= units[row, 1 + j] == codes[i + 1 + j]
                    if same:
                        return length
            break
    return 0


@leaf
def _infix(codes, a, i, b, classes):  # type: ignore[no-untyped-def]
    """Length of the infix of ``codes[a:b]`` that begins at i, or 0."""
    code = codes[i]
    kind = class_of(classes, code)
    if not kind & _CUTS:
        return 0
    if kind & _INFIX:
        return 1
    if code == 46:
        end = i + 1
        while end < b and codes[end] == 46:
            end += 1
        if end - i > 1:
            return end - i
    if i == a or i + 1 >= b:
        return 0
    before, after = class_of(classes, codes[i - 1]), class_of(classes, codes[i + 1])
    number = _digit(codes[i - 1])
    if code == 46:
        return 1 if before & (_LOWER | _QUOTE) and after & (_UPPER | _QUOTE) else 0
    if code == 44:
        return 1 if before & _ALPHA and after & _ALPHA else 0
    if code == 43 or code == 45 or code == 42 or code == 94:
        if number and (_digit(codes[i + 1]) or codes[i + 1] == 45):
            return 1
        if code != 45:
            return 0
    if not (number or before & _ALPHA):
        return 0
    if after & _ALPHA:
        return 1
    if code == 45 or code == 0x2014:  # two or three hyphens, two dashes
        longest = 3 if code == 45 else 2
        end = i + 1
        while end < b and end - i < longest and codes[end] == code:
            end += 1
            if end < b and class_of(classes, codes[end]) & _ALPHA:
                return end - i
    return 0


@leaf
def _rest_of_url(codes, i, b):  # type: ignore[no-untyped-def]
    """Whether ``codes[i:b]`` is an optional port and an optional path."""
    if i < b and codes[i] == 58:
        start = i + 1
        i = start
        while i < b and _digit(codes[i]):
            i += 1
        if i - start < 2 or i - start > 5:
            return False
    return i == b or codes[i] == 47 or codes[i] == 63 or codes[i] == 35


@leaf
def _host(codes, a, b, classes):  # type: ignore[no-untyped-def]
    """Whether ``codes[a:b]`` is a public IPv4 address or a domain name, with what may follow in a URL."""
    first = second = third = fourth = 0
    i = a
    part = 0
    while part < 4 and i < b and _digit(codes[i]):
        start = i
        number = 0
        while i < b and _digit(codes[i]) and i - start < 4:
            number = number * 10 + np.int64(codes[i]) - 48
            i += 1
        first, second, third, fourth = second, third, fourth, number
        if i - start > 3 or (codes[start] == 48 and (part == 0 or part == 3 or i - start == 3)):
            break
        part += 1
        if part < 4:
            if i >= b or codes[i] != 46:
                break
            i += 1
    if part == 4:
        private = first == 10 or first == 127
        private |= (first == 169 and second == 254) or (first == 192 and second == 168)
        private |= first == 172 and second >= 16 and second <= 31
        inside = first >= 1 and first <= 223 and second <= 255 and third <= 255
        inside &= fourth >= 1 and fourth <= 254
        if inside and not private and _rest_of_url(codes, i, b):
            return True
    labels = 0
    i = a
    while True:
        start = i
        lower = True
        while i < b and (class_of(classes, codes[i]) & _HOST or codes[i] == 45 or codes[i] == 95):
            lower &= (class_of(classes, codes[i]) & _LOWER) != 0
            i += 1
        length = i - start
        if i < b and codes[i] == 46:
            ends = length > 0 and class_of(classes, codes[start]) & _HOST
            if not ends or not class_of(classes, codes[i - 1]) & _HOST or length > 64:
                return False
            labels += 1
            i += 1
            continue
        return labels > 0 and lower and length >= 2 and length <= 63 and _rest_of_url(codes, i, b)


@leaf
def _is_url(codes, a, b, classes):  # type: ignore[no-untyped-def]
    """Whether ``codes[a:b]`` is one: [scheme://][user@]host[:port][/path]."""
    dot = False
    for i in range(a, b):
        dot |= codes[i] == 46
    if not dot:
        return False
    if _host(codes, a, b, classes):
        return True
    i = a
    while i < b:
        code = codes[i]
        if not (class_of(classes, code) & _LETTER or _digit(code)) and code not in (43, 45, 46, 95):
            break
        i += 1
    scheme = i - a >= 2 and i + 3 < b and codes[i] == 58 and codes[i + 1] == 47 and codes[i + 2] == 47
    found = scheme and _host(codes, i + 3, b, classes)
    for i in range(a + 1, b - 1):
        found = found or (codes[i] == 64 and _host(codes, i + 1, b, classes))
    return found


@leaf
def _put(starts, ends, count, a, b):  # type: ignore[no-untyped-def]
    starts[count] = a
    ends[count] = b
    return count + 1


@leaf
def _put_special(starts, ends, count, a, pieces, special):  # type: ignore[no-untyped-def]
    for i in range(pieces.shape[1]):
        length = pieces[special, i]
        if length:
            count = _put(starts, ends, count, a, a + length)
            a += length
    return count


@leaf
def _split_chunk(codes, a, b, rules, stack, starts, ends, count):  # type: ignore[no-untyped-def]
    """Appends the words of the chunk ``codes[a:b]``, which holds no white space; returns their new count."""
    classes, units, filters, keys, values, pieces = rules
    suffixes = 0
    last = 0
    special = -1
    while a < b and b - a != last:
        special = find(codes, a, b, filters, keys, values)
        if special >= 0:
            break
        last = b - a
        before = _prefix(codes, a, b, classes)
        if before:
            special = find(codes, a + before, b, filters, keys, values)
            if special >= 0:
                count = _put(starts, ends, count, a, a + before)
                a += before
                break
        after = _suffix(codes, a + before, b, classes, units)
        if after:
            special = find(codes, a, b - after, filters, keys, values)
            if special >= 0:
                stack[suffixes] = after
                suffixes += 1
                b -= after
                break
        if before:
            count = _put(starts, ends, count, a, a + before)
            a += before
        if after:
            stack[suffixes] = after
            suffixes += 1
            b -= after
    if special >= 0:
        count = _put_special(starts, ends, count, a, pieces, special)
    elif a < b:
        cuts = False
        for i in range(a, b):
            cuts |= (class_of(classes, codes[i]) & _CUTS) != 0
        if not cuts or _is_url(codes, a, b, classes):
            count = _put(starts, ends, count, a, b)
        else:
            start = i = a
            while i < b:
                length = _infix(codes, a, i, b, classes)
                if not length:
                    i += 1
                    continue
                if i > a:  # an infix at the very beginning stays with what follows
                    if i > start:
                        count = _put(starts, ends, count, start, i)
                    count = _put(starts, ends, count, i, i + length)
                    start = i + length
                i += length
            if start < b:
                count = _put(starts, ends, count, start, b)
    for i in range(suffixes - 1, -1, -1):
        count = _put(starts, ends, count, b, b + stack[i])
        b += stack[i]
    return count


@compiled
def split(codes, rules, sequences, unspaced):  # type: ignore[no-untyped-def]
    """Splits a text into words.

    Args:
      codes: uint32 code points.
      rules: character classes, units and special cases, from ``quality_tables.splitting``.
      sequences: the special cases that the rules alone would split, by their words.
      unspaced: whether letters of scripts written without spaces (with their marks) are words by themselves.

    Returns:
      Starts and ends of the words, int32 each. White space belongs to none.
    """
    size = len(codes)
    starts = np.empty(size, np.int32)
    ends = np.empty(size, np.int32)
    stack = np.empty(size, np.int32)
    count = _split_chunks(codes, rules, unspaced, stack, starts, ends)
    # Four special cases that begin with the same word are more than there are in any real text.
    found = np.empty((4 * count + 16, 3), np.int32)
    matches = _find_sequences(codes, starts, ends, count, sequences, found)
    if matches:
        joined_starts = np.empty(size, np.int32)
        joined_ends = np.empty(size, np.int32)
        taken = np.zeros(count, np.uint8)
        chosen = np.full(count, -1, np.int32)
        arguments = (found, matches, taken, chosen, rules[5], joined_starts, joined_ends)
        count = _join(starts, ends, count, *arguments)
        starts, ends = joined_starts, joined_ends
    return starts[:count], ends[:count]


@leaf
def _split_chunks(codes, rules, unspaced, stack, starts, ends):  # type: ignore[no-untyped-def]
    """Fills in the words between white space; returns their number."""
    classes, _, filters, keys, values, _ = rules
    size = len(codes)
    count = i = np.int64(0)  # a plain 0 has a type of its own, for which numba would compile all once more
    while i < size:
        kind = class_of(classes, codes[i])
        if kind & _SPACE:
            i += 1
            continue
        a = i
        plain = _PLAIN
        while i < size:
            kind = class_of(classes, codes[i])
            if kind & _SPACE:
                break
            if unspaced and kind & _UNSPACED:
                if a < i:
                    count = _split_chunk(codes, a, i, rules, stack, starts, ends, count)
                a = i
                i += 1
                while i < size and class_of(classes, codes[i]) & _MARK:
                    i += 1
                count = _put(starts, ends, count, a, i)
                a = i
                continue
            plain &= kind
            i += 1
        if a == i:
            continue
        if plain and find(codes, a, i, filters, keys, values) < 0:
            count = _put(starts, ends, count, a, i)
        else:
            count = _split_chunk(codes, a, i, rules, stack, starts, ends, count)
    return count


@leaf
def _find_sequences(codes, starts, ends, count, sequences, found):  # type: ignore[no-untyped-def]
    """Finds words that together are special cases: first word, number of words, which. Returns how many."""
    filters, keys, values, sequence_keys, sequence_values = sequences
    matches = 0
    for i in range(count):
        longest = find(codes, starts[i], ends[i], filters, keys, values)
        if longest < 0:
            continue
        h = hash_codes(codes, starts[i], ends[i])
        for j in range(i + 1, min(i + longest, count)):
            gap = starts[j] - ends[j - 1]
            if gap > 1 or (gap == 1 and codes[ends[j - 1]] != 32) or ends[j] - starts[j] > 31:
                break
            h = combine(h, hash_codes(codes, starts[j], ends[j]))
            slot = find_slot(sequence_keys, h)
            if sequence_keys[slot] == h and matches < len(found):
                found[matches, 0] = i
                found[matches, 1] = j - i + 1
                found[matches, 2] = sequence_values[slot]
                matches += 1
    return matches


@leaf
def _join(starts, ends, count, found, matches, taken, chosen, pieces, new_starts, new_ends):  # type: ignore[no-untyped-def]
    """Splits what ``_find_sequences`` found as its own rules say; returns the new number of words.

    As in spaCy, longer ones win, then earlier ones; and words with one blank between them are in the way of
    others, although they are left as they are.
    """
    for words in range(16, 1, -1):
        for m in range(matches):
            if found[m, 1] == words:
                i = found[m, 0]
                together = True
                for j in range(i + 1, i + words):
                    together &= starts[j] == ends[j - 1]
                if together and not taken[i] and not taken[i + words - 1]:
                    chosen[i] = m
                for j in range(i, i + words):
                    taken[j] = 1
    new = i = 0
    while i < count:
        if chosen[i] >= 0:
            m = chosen[i]
            new = _put_special(new_starts, new_ends, new, starts[i], pieces, found[m, 2])
            i += found[m, 1]
        else:
            new = _put(new_starts, new_ends, new, starts[i], ends[i])
            i += 1
    return new


@leaf
def combine(h, other):  # type: ignore[no-untyped-def]
    """The hash of a sequence of hashes, one by one; never 0."""
    h = (h ^ (other * BASE)) * _K
    return (h ^ (h >> _S29)) | _ONE
