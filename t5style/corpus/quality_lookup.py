"""Strings and rules in the form of tables that the compiled kernels of the quality rules take."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5style.corpus import quality_tables as tables
from t5style.corpus import quality_words


def dictionary(entries: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A table that the kernels can look strings of up to 31 characters up in.

    Returns:
      uint32 bits of the lengths there are by first and last character, uint64 hashes, int32 values.
    """
    filters = np.zeros(1 << 14, np.uint32)
    keys = np.zeros(max(16, 1 << (2 * len(entries)).bit_length()), np.uint64)
    values = np.zeros(len(keys), np.int32)
    for entry, value in entries.items():
        codes = tables.codes_of(entry)
        if not 1 <= len(codes) <= 31:
            raise ValueError(f"{entry!r} has {len(codes)} characters, a dictionary's entries have 1 to 31")
        filters[(codes[0] & 127) << 7 | codes[-1] & 127] |= 1 << len(codes)
        _insert(keys, values, quality_words.hash_codes(codes, 0, len(codes)), value)
    return filters, keys, values


def _insert(keys: np.ndarray, values: np.ndarray, key: Any, value: int) -> None:
    slot = quality_words.find_slot(keys, np.uint64(key))
    keys[slot], values[slot] = key, value


@functools.cache
def splitting(english: bool) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """What ``quality_words.split`` takes as rules and sequences."""
    cases = tables.special_cases(english)
    pieces = np.zeros((len(cases), max(map(len, cases.values()))), np.int32)
    for row, parts in zip(pieces, cases.values(), strict=True):
        row[: len(parts)] = [len(part) for part in parts]
    units = np.zeros((len(tables.UNITS.split()), 6), np.uint32)  # length, code points
    for unit_row, unit in zip(units, tables.UNITS.split(), strict=True):
        unit_row[: len(unit) + 1] = [len(unit), *map(ord, unit)]
    rules = (tables.classes(), units, *dictionary({case: i for i, case in enumerate(cases)}), pieces)
    plain = (tables.classes(), units, *dictionary({}), pieces)
    longest: dict[str, int] = {}
    keys = np.zeros(1 << (2 * len(cases)).bit_length(), np.uint64)
    values = np.zeros(len(keys), np.int32)
    empty = (*dictionary({}), keys, values)
    found = []
    for i, case in enumerate(cases):
        starts, ends = quality_words.split(tables.codes_of(case), plain, empty, False)
        words = [case[a:b] for a, b in zip(starts, ends, strict=True)]
        if len(words) > 1:
            longest[words[0]] = max(longest.get(words[0], 0), len(words))
            found.append((words, i))
    for words, i in found:
        hashes = [np.uint64(quality_words.hash_codes(tables.codes_of(word), 0, len(word))) for word in words]
        key = functools.reduce(lambda h, other: np.uint64(quality_words.combine(h, other)), hashes)
        _insert(keys, values, key, i)
    return rules, (*dictionary(longest), keys, values)
