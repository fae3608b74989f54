"""The counts that the quality rules look at, compiled. Import it where it is used: it loads numba."""

from __future__ import annotations

import numpy as np

from t5style.corpus import quality_tables as tables
from t5style.corpus.quality_words import BASE, class_of, compiled, find, find_slot, hash_codes, leaf, split

_SPACE, _SYMBOL, _LETTER = tables.SPACE, tables.SYMBOL, tables.LETTER
_TERMINAL, _LINE_END, _CATEGORY_P = tables.TERMINAL, tables.LINE_END, tables.CATEGORY_P
_INVERSE = np.uint64(pow(int(BASE), -1, 1 << 64))
_ONE, _ZERO = np.uint64(1), np.uint64(0)
_BLANK = np.uint64(33)


@compiled
def _table(entries):  # type: ignore[no-untyped-def]
    """The keys of an empty open-addressing table for so many entries."""
    size = 16
    while size < 2 * entries:
        size *= 2
    return np.zeros(size, np.uint64)


@leaf
def _first_time(keys, key):  # type: ignore[no-untyped-def]
    """Puts the key into the set; whether it was not there."""
    slot = find_slot(keys, key)
    if keys[slot] == key:
        return False
    keys[slot] = key
    return True


@leaf
def _count_lines(codes, classes, counts):  # type: ignore[no-untyped-def]
    """Lines as ``str.splitlines`` finds them, and symbols. counts[5:10], counts[21]."""
    size = len(codes)
    start = i = dots = 0
    while i < size:
        code = codes[i]
        if code == 10:
            counts[21] += 1
        elif code == 35:
            counts[5] += 1
        elif code == 0x2026:
            counts[6] += 1
        elif code == 46:
            dots += 1
            if dots == 3:
                counts[6] += 1
                dots = 0
        if code != 46:
            dots = 0
        ends = (class_of(classes, code) & _LINE_END) != 0
        if ends or i == size - 1:
            a, b = start, i if ends else size
            while a < b and class_of(classes, codes[a]) & _SPACE:
                a += 1
            while b > a and class_of(classes, codes[b - 1]) & _SPACE:
                b -= 1
            counts[7] += 1
            if a < b:
                counts[8] += codes[a] == 0x2022 or codes[a] == 45
                last = codes[b - 1]
                three = last == 46 and b - a >= 3 and codes[b - 2] == 46 and codes[b - 3] == 46
                counts[9] += three or last == 0x2026
            if code == 13 and i + 1 < size and codes[i + 1] == 10:
                counts[21] += 1
                i += 1
            start = i + 1
        i += 1


@leaf
def _count_repeats(codes, classes, short, seen, counts):  # type: ignore[no-untyped-def]
    """Repeated lines and paragraphs. counts[11:21].

    Gopher's lines are what runs of line feeds separate, its paragraphs what runs of two or more do; FineWeb's
    lines are what single line feeds separate, where there is more than white space in them.
    """
    size = len(codes)
    if size == 0:
        return
    counts[11] = (codes[0] == 10) + (codes[size - 1] == 10)  # empty strings before and after
    if counts[11] == 2:
        counts[12] = 1
    start = 0
    for i in range(size + 1):
        if i < size and codes[i] != 10:
            continue
        if i > start:
            first = _first_time(seen, hash_codes(codes, start, i))
            counts[11] += 1
            if not first:
                counts[12] += 1
                counts[13] += i - start
            full = False
            for j in range(start, i):
                if not class_of(classes, codes[j]) & _SPACE:
                    full = True
                    break
            if full:
                counts[17] += 1
                counts[18] += (class_of(classes, codes[i - 1]) & _TERMINAL) != 0
                counts[19] += i - start <= short
                if not first:
                    counts[20] += i - start
        start = i + 1
    a, b = 0, size
    while a < b and class_of(classes, codes[a]) & _SPACE:
        a += 1
    while b > a and class_of(classes, codes[b - 1]) & _SPACE:
        b -= 1
    for i in range(len(seen)):
        seen[i] = _ZERO
    start = i = a
    while i <= b:
        if i == b or (codes[i] == 10 and codes[i + 1] == 10):
            counts[14] += 1
            if not _first_time(seen, hash_codes(codes, start, i)):
                counts[15] += 1
                counts[16] += i - start
            while i < b and codes[i] == 10:
                i += 1
            start = i
            if i == b:
                break
        else:
            i += 1


@leaf
def _count_words(codes, starts, ends, classes, stop_words, found, prefix, inverse, lengths, counts):  # type: ignore[no-untyped-def]
    """Sorts of words. counts[1:5], counts[10].

    Fills in polynomials in BASE modulo 2^64 of all words, a blank after each: the difference of two of
    ``prefix``, brought back to the power 0 by ``inverse``, is the hash of what lies between them. ``lengths``
    are the characters before each word.
    """
    filters, keys, values = stop_words
    total, power, back = _ZERO, _ONE, _ONE
    for w in range(len(starts)):
        a, b = starts[w], ends[w]
        real = letter = np.uint32(0)
        inverse[w] = back
        prefix[w] = total
        for i in range(a, b):
            kind = class_of(classes, codes[i])
            real |= ~kind & _SYMBOL
            letter |= kind & _LETTER
            total += (np.uint64(codes[i]) + _ONE) * power
            power *= BASE
            back *= _INVERSE
        total += _BLANK * power  # so that "a bc" is not "ab c"
        power *= BASE
        back *= _INVERSE
        lengths[w + 1] = lengths[w] + b - a
        if real:
            counts[2] += 1
            counts[3] += b - a
        counts[4] += letter != 0
        place = find(codes, a, b, filters, keys, values)
        if place >= 0 and not found[place]:
            found[place] = 1
            counts[10] += 1
    prefix[len(starts)] = total
    counts[1] = len(starts)


@leaf
def _find_ngrams(prefix, inverse, n, places, left, keys, times, slots):  # type: ignore[no-untyped-def]
    """Where in the table each n-gram at ``places[:left]`` is, and how often it is there."""
    for k in range(left):
        i = places[k]
        key = (prefix[i + n] - prefix[i]) * inverse[i]
        key += np.uint64(key == _ZERO)  # 0 is a free place of the table
        slot = find_slot(keys, key)
        keys[slot] = key
        times[slot] += 1
        slots[k] = slot


@leaf
def _top_ngram(lengths, n, places, left, times, slots):  # type: ignore[no-untyped-def]
    """Characters, with blanks between words, in the most frequent n-gram; the first of several such."""
    best, most = 0, 1
    for k in range(left):
        if times[slots[k]] > most:
            best, most = places[k], times[slots[k]]
    return (lengths[best + n] - lengths[best] + n - 1) * most


@leaf
def _repeated_ngrams(lengths, n, places, left, times, slots):  # type: ignore[no-untyped-def]
    """Characters in n-grams that were there before, from left to right and without overlap.

    ``times`` of n-grams met on the way become negative.
    """
    total = free = 0
    for k in range(left):
        i, slot = places[k], slots[k]
        if i >= free and (times[slot] > 1 or times[slot] < 0):
            if times[slot] < 0:
                total += lengths[i + n] - lengths[i]
                free = i + n
            else:
                times[slot] = -times[slot]
    return total


@leaf
def _narrow(n, words, places, left, times, slots):  # type: ignore[no-untyped-def]
    """Keeps the places where an (n+1)-gram may be that is there twice; returns their number."""
    kept = 0
    for k in range(left - 1):
        i = places[k]
        if places[k + 1] == i + 1 and abs(times[slots[k]]) > 1 and abs(times[slots[k + 1]]) > 1:
            places[kept] = i
            kept += 1
    return kept


@compiled
def _count_ngrams(prefix, inverse, lengths, wanted, top, repeated):  # type: ignore[no-untyped-def]
    """The share of frequent and repeated n-grams by n.

    An n-gram occurs twice only where the (n-1)-grams at its place and the next do: so each n looks only at
    what is left from the one before, which soon is next to nothing.
    """
    words = len(prefix) - 1
    n = 1
    while n < len(wanted) and not wanted[n]:
        n += 1
    left = max(words - n + 1, 0) if n < len(wanted) else 0
    places = np.arange(left).astype(np.int32)
    slots = np.empty(left, np.int32)
    while n < len(wanted) and words >= n:
        keys = _table(left)
        times = np.zeros(len(keys), np.int32)
        _find_ngrams(prefix, inverse, n, places, left, keys, times, slots)
        if wanted[n] & 1:
            top[n] = _top_ngram(lengths, n, places, left, times, slots)
        if wanted[n] & 2:
            repeated[n] = _repeated_ngrams(lengths, n, places, left, times, slots)
        left = _narrow(n, words, places, left, times, slots)
        n += 1


@compiled
def measure(codes, rules, sequences, stop_words, unspaced, short, wanted):  # type: ignore[no-untyped-def]
    """All counts of one text in one go.

    Args:
      codes: uint32 code points.
      rules, sequences: ``quality_tables.splitting``.
      stop_words: a dictionary of ``quality_tables.dictionary``.
      unspaced: see ``quality_words.split``.
      short: characters up to which a line is short.
      wanted: uint8 by n: 1 for the most frequent n-gram, 2 for repeated n-grams, 3 for both.

    Returns:
      float64: ``quality._COUNTS``, then the characters in the most frequent n-gram by n, then those in
      repeated n-grams by n.
    """
    classes = rules[0]
    size = len(wanted)
    out = np.zeros(22 + 2 * size)
    out[0] = len(codes)
    _count_lines(codes, classes, out)
    _count_repeats(codes, classes, short, _table(out[21] + 1), out)
    starts, ends = split(codes, rules, sequences, unspaced)
    words = len(starts)
    prefix = np.empty(words + 1, np.uint64)
    inverse = np.empty(words + 1, np.uint64)
    lengths = np.zeros(words + 1, np.int64)
    found = np.zeros(len(stop_words[1]), np.uint8)
    _count_words(codes, starts, ends, classes, stop_words, found, prefix, inverse, lengths, out)
    _count_ngrams(prefix, inverse, lengths, wanted, out[22 : 22 + size], out[22 + size :])
    return out


@compiled
def sentences(codes, rules, sequences, unspaced):  # type: ignore[no-untyped-def]
    """The number of sentences, each line (up to a line feed) by itself: see ``_count_sentences``."""
    starts, ends = split(codes, rules, sequences, unspaced)
    return _count_sentences(codes, starts, ends, rules[0])


@leaf
def _count_sentences(codes, starts, ends, classes):  # type: ignore[no-untyped-def]
    """A sentence begins after a full stop, question or exclamation mark (of any script) with the first word
    that is no punctuation: spaCy's Sentencizer.
    """
    total = 0
    ended = False
    line = 0  # where the line of the last word ends
    for w in range(len(starts)):
        a, b = starts[w], ends[w]
        if w == 0 or a >= line:
            total += 1
            ended = False
            line = b
            while line < len(codes) and codes[line] != 10:
                line += 1
        elif ended:
            punctuation = True
            for i in range(a, b):
                punctuation &= (class_of(classes, codes[i]) & (_CATEGORY_P | _TERMINAL)) != 0
            if not punctuation:
                total += 1
                ended = False
        if b - a == 1 and class_of(classes, codes[a]) & _TERMINAL:
            ended = True
    return total
