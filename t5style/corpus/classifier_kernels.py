"""The classifier's inner loops, compiled: hashed features of a text, their sum, and one pass of training."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

# FNV-1a (RFC 9923), 64 bits, one start for each family of features; Knuth's multiplier spreads the sums over
# the top bits, of which the index is made.
_WORD = np.uint64(0xCBF29CE484222325)
_CHARACTERS = np.uint64(0x84222325CBF29CE4)
_PRIME = np.uint64(0x100000001B3)
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_SPACE = np.uint64(32)
_SMALL = np.float32(1e-12)  # squares of the smallest gradients are 0

# What a byte belongs to: 0 white space, 1 a word (letters, digits, anything beyond ASCII), 2 other signs, 3
# line ends.
_KIND = np.full(256, 2, np.uint8)
_KIND[:33] = 0
_KIND[127] = 0
_KIND[10] = 3
_KIND[128:] = 1
for _byte in b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ":
    _KIND[_byte] = 1

_jit: Any = numba.njit(cache=True, nogil=True)


@_jit
def _scale(count):  # type: ignore[no-untyped-def]
    """What the sum of so many features is multiplied by."""
    return 1.0 / math.sqrt(max(count, 1))


@_jit
def scan(text, words, least, most, bits, weights, out, record):  # type: ignore[no-untyped-def]
    """Sums the weights of a text's features, those of words and those of characters each over the root of
    their number.

    A token is a run of word bytes, of other signs or of line ends. The features are all n-grams of up to
    ``words`` tokens, and of every word, with a space at either end, all n-grams of ``least`` to ``most``
    characters (Bojanowski et al. 2017, section 3.2). ``most`` 0: none of these.

    Args:
      text: uint8 [bytes], UTF-8 in lower case.
      words, least, most: see above.
      bits: there are 2**bits features.
      weights: float32 [2**bits].
      out: uint32 [2, ``room(...)``], filled with the indices of words' and of characters' features where
        ``record``; else not looked at.

    Returns:
      The sum; (scale of words, of characters); (number of words' features, of characters').
    """
    shift = np.uint64(64 - bits)
    total = np.zeros(2)
    count = np.zeros(2, np.int64)
    past = np.zeros(max(words, 1), np.uint64)
    seen = 0
    size = len(text)
    i = 0
    while i < size:
        kind = _KIND[text[i]]
        if kind == 0:
            i += 1
            continue
        start = i
        token = _WORD
        while i < size and _KIND[text[i]] == kind:
            token = (token ^ np.uint64(text[i])) * _PRIME
            i += 1
        end = i
        gram = token
        for back in range(min(words, seen + 1)):
            if back:
                gram = (gram * _PRIME ^ past[(seen - back) % words]) * _SPREAD
            index = (gram * _SPREAD) >> shift
            total[0] += weights[index]
            if record:
                out[0, count[0]] = index
            count[0] += 1
        if words:
            past[seen % words] = token
            seen += 1
        if kind != 1 or most == 0:
            continue
        for first in range(start - 1, end):
            if first >= start and text[first] & 0xC0 == 0x80:
                continue
            gram = _CHARACTERS
            length = 0
            j = first
            while j <= end:
                if j < start or j == end:
                    gram = (gram ^ _SPACE) * _PRIME
                else:
                    gram = (gram ^ np.uint64(text[j])) * _PRIME
                j += 1
                if start < j < end and text[j] & 0xC0 == 0x80:
                    continue
                length += 1
                if length >= least:
                    index = (gram * _SPREAD) >> shift
                    total[1] += weights[index]
                    if record:
                        out[1, count[1]] = index
                    count[1] += 1
                    if length == most:
                        break
    scales = (_scale(count[0]), _scale(count[1]))
    return total[0] * scales[0] + total[1] * scales[1], scales, (count[0], count[1])


def room(size: int, words: int, least: int, most: int) -> int:
    """Most features of a family that ``scan`` can find in so many bytes."""
    return size * max(words, 2 * (most - least + 1) if most else 0) + 1


@_jit
def train(  # type: ignore[no-untyped-def]
    data, offsets, targets, importance, order, rates, words, least, most, bits, weights, squares, bias, out
):
    """Logistic regression by AdaGrad (Duchi et al. 2011, figure 1), one example at a time, in place.

    Args:
      data, offsets: all texts joined, uint8, and where each begins, int64 [examples + 1].
      targets, importance: float64 [examples], 0 or 1, and the example's weight in the loss.
      order, rates: which examples to learn from now, int64 [steps], and the rate of each step, float64.
      words, least, most, bits, weights, out: see ``scan``.
      squares: float32 [2**bits], sums of squared gradients.
      bias: float64 [2], the bias and its sum of squared gradients.

    Returns:
      The sum of the losses, each before its own step, in nats.
    """
    loss = 0.0
    for step in range(len(order)):
        example = order[step]
        text = data[offsets[example] : offsets[example + 1]]
        total, scales, counts = scan(text, words, least, most, bits, weights, out, True)
        margin = bias[0] + total
        probability = 1.0 / (1.0 + math.exp(-margin)) if margin > -700 else 0.0
        wrong = (probability - targets[example]) * importance[example]
        signed = margin if targets[example] > 0.5 else -margin
        loss += importance[example] * (math.log1p(math.exp(-abs(signed))) + max(-signed, 0.0))
        bias[1] += wrong * wrong
        bias[0] -= rates[step] * wrong / (math.sqrt(bias[1]) + _SMALL)
        rate = np.float32(rates[step])
        for family in range(2):
            gradient = np.float32(wrong * scales[family])
            for k in range(counts[family]):
                index = out[family, k]
                squares[index] += gradient * gradient
                weights[index] -= rate * gradient / (math.sqrt(squares[index]) + _SMALL)
    return loss


@_jit
def smallest_shingle(text, words):  # type: ignore[no-untyped-def]
    """The smallest hash of any ``words`` words in a row (Broder 1997), of all words where there are fewer.

    Two texts have the same with the probability that is the Jaccard similarity of their sets of such runs.
    Signs, white space and digits do not count.
    """
    past = np.zeros(words, np.uint64)
    seen = 0
    smallest = np.uint64(0xFFFFFFFFFFFFFFFF)
    size = len(text)
    i = 0
    while i < size:
        if _KIND[text[i]] != 1:
            i += 1
            continue
        token = _WORD
        while i < size and _KIND[text[i]] == 1:
            byte = np.uint64(48) if 48 <= text[i] < 58 else np.uint64(text[i])
            token = (token ^ byte) * _PRIME
            i += 1
        past[seen % words] = token
        seen += 1
        if seen >= words:
            smallest = min(smallest, _joined(past, seen, words))
    if 0 < seen < words:
        smallest = _joined(past, seen, seen)
    return smallest


@_jit
def _joined(past, seen, count):  # type: ignore[no-untyped-def]
    """A hash of the last ``count`` tokens."""
    value = _WORD
    for back in range(count):
        value = (value ^ past[(seen - count + back) % len(past)]) * _SPREAD
        value ^= value >> np.uint64(32)
    return value
