"""Two similar texts side by side, word by word."""

from __future__ import annotations

import collections
import difflib
import re

# A word with the white space before it; languages written without spaces go character by character.
_WORD = re.compile(r"\s*(?:[\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s])|\s+")
_CONTEXT = 12  # words shown at either end of a long stretch that is the same in both
# SequenceMatcher compares every place of a word in one text with every place of it in the other, and does so
# again for each match: cubic where one word is repeated. This many comparisons take some hundredths of a
# second at worst.
_PAIRS = 30_000
_WORDS = 800

Run = tuple[str, str]  # ("same", "only" or "gap", text)


def sides(left: str, right: str) -> tuple[list[Run], list[Run], int]:
    """What is the same and what is in one text only.

    Args:
      left, right: texts; of very long or repetitive ones only the beginning is compared.

    Returns:
      Both texts as runs, long stretches common to both cut to their ends (a "gap" says how much is left
      out), and the number of words that are in one of them only.
    """
    words = [_WORD.findall(text)[:_WORDS] for text in (left, right)]
    keys = [[word.strip() for word in side] for side in words]
    length = max(map(len, words))
    while _pairs(keys[0][:length], keys[1][:length]) > _PAIRS:
        length //= 2
    one, other = (side[:length] for side in words)
    matcher = difflib.SequenceMatcher(None, keys[0][:length], keys[1][:length], autojunk=False)
    runs: tuple[list[Run], list[Run]] = ([], [])
    different = 0
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            runs[0].extend(_same(one[a:b]))
            runs[1].extend(_same(other[c:d]))
            continue
        different += b - a + d - c
        for side, text in zip(runs, ("".join(one[a:b]), "".join(other[c:d])), strict=True):
            word = text.lstrip()
            side += [("same", text[: len(text) - len(word)])] if len(word) < len(text) else []
            side += [("only", word)] if word else []
    for side, shown, text in zip(runs, (one, other), (left, right), strict=True):
        if (rest := len(text) - sum(map(len, shown))) > 0:
            side.append(("gap", f"{rest:,} more characters"))
    return *runs, different


def _same(words: list[str]) -> list[Run]:
    if len(words) <= 2 * _CONTEXT + 10:
        return [("same", "".join(words))]
    hidden = len(words) - 2 * _CONTEXT
    return [
        ("same", "".join(words[:_CONTEXT])),
        ("gap", f"{hidden:,} words the same"),
        ("same", "".join(words[-_CONTEXT:])),
    ]


def _pairs(left: list[str], right: list[str]) -> int:
    counts = collections.Counter(right)
    return sum(n * counts[word] for word, n in collections.Counter(left).items())
