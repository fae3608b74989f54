"""Small token stores for this room's tests."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from t5style.corpus.vocabulary import ByteVocabulary, Vocabulary
from t5style.data.token_store import TokenStoreWriter

MakeStore = Callable[..., str]


@pytest.fixture
def make_store(tmp_path: pathlib.Path) -> MakeStore:
    """make_store({split: {feature: [texts]}}, name="store", vocabulary=ByteVocabulary()) → folder."""

    def make(
        texts: Mapping[str, Mapping[str, Sequence[str]]],
        name: str = "store",
        vocabulary: Vocabulary | None = None,
    ) -> str:
        vocabulary = vocabulary or ByteVocabulary()
        folder = tmp_path / name
        features = tuple(next(iter(texts.values())))
        with TokenStoreWriter(folder, features, vocabulary) as writer:
            for split, columns in texts.items():
                writer.add_split(split)
                for values in zip(*columns.values(), strict=True):
                    tokens = {
                        f: [*vocabulary.encode(v), vocabulary.eos_id]
                        for f, v in zip(columns, values, strict=True)
                    }
                    writer.add(split, tokens)
        return str(folder)

    return make


@pytest.fixture
def text_store(make_store: MakeStore) -> str:
    """Splits train (60 documents) and validation (11), feature text, bytes."""
    random = np.random.default_rng(0)

    def document(number: int) -> str:
        return f"document {number}: " + " ".join(
            f"w{n}" for n in random.integers(0, 999, random.integers(1, 60))
        )

    return make_store(
        {
            "train": {"text": [document(n) for n in range(60)]},
            "validation": {"text": [document(n) for n in range(60, 71)]},
        }
    )


@pytest.fixture
def pair_store(make_store: MakeStore) -> str:
    """Splits train (200 pairs) and validation (23), features inputs and targets, every text different."""

    def pairs(start: int, stop: int) -> dict[str, list[str]]:
        return {
            "inputs": [f"add {n} and " + "1" * (n % 17) for n in range(start, stop)],
            "targets": [f"sum {n} " + "x" * (n % 7) for n in range(start, stop)],
        }

    return make_store({"train": pairs(0, 200), "validation": pairs(200, 223)}, name="pairs")
