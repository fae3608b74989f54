"""What a model has to beat: trivial predictors that only look at the task's training split.

Two kinds. Text baselines predict an answer and are scored by the task's metrics; likelihood baselines give
every target token a probability and are scored by loss, bits per byte and token accuracy.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Pair:
    """An example as text."""

    inputs: str
    target: str


@runtime_checkable
class TextBaseline(Protocol):
    """Predicts an answer for each input."""

    @property
    def name(self) -> str: ...

    def predict(self, train: Sequence[Pair], inputs: Sequence[str]) -> list[str]: ...


@runtime_checkable
class LikelihoodBaseline(Protocol):
    """Gives every token id a probability, from the scored target tokens of training examples."""

    @property
    def name(self) -> str: ...

    def log_probabilities(self, train: Sequence[np.ndarray], vocab_size: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class MajorityTarget:
    """Always the most frequent training target (of equally frequent ones, the first in code point order)."""

    name: str = "majority_target"

    def predict(self, train: Sequence[Pair], inputs: Sequence[str]) -> list[str]:
        """One answer for each input."""
        counts = collections.Counter(pair.target for pair in train)
        best = min(counts, key=lambda target: (-counts[target], target))
        return [best] * len(inputs)


@dataclasses.dataclass(frozen=True)
class CopyInput:
    """The input itself."""

    name: str = "copy_input"

    def predict(self, train: Sequence[Pair], inputs: Sequence[str]) -> list[str]:
        """One answer for each input."""
        return list(inputs)


@dataclasses.dataclass(frozen=True)
class NearestTarget:
    """The target of the training example with the most similar input: what pure memory achieves.

    Similarity is the cosine of bags of words weighted by log(1 + N / document frequency) (Salton & Buckley
    1988); of equally similar examples the first; where no word is shared, the first training example.
    """

    name: str = "nearest_target"

    def predict(self, train: Sequence[Pair], inputs: Sequence[str]) -> list[str]:
        """One answer for each input."""
        bags = [collections.Counter(pair.inputs.lower().split()) for pair in train]
        frequency = collections.Counter(word for bag in bags for word in bag)
        weight = {word: math.log1p(len(bags) / count) for word, count in frequency.items()}
        postings: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
        for number, bag in enumerate(bags):
            norm = math.sqrt(sum((count * weight[word]) ** 2 for word, count in bag.items())) or 1.0
            for word, count in bag.items():
                postings[word].append((number, count * weight[word] / norm))
        index = {
            word: (np.asarray([n for n, _ in rows]), np.asarray([w for _, w in rows]))
            for word, rows in postings.items()
        }
        answers = []
        for text in inputs:
            similarity = np.zeros(len(train))
            for word, count in collections.Counter(text.lower().split()).items():
                if word in index:
                    numbers, weights = index[word]
                    similarity[numbers] += count * weight[word] * weights
            answers.append(train[int(similarity.argmax())].target)
        return answers


@dataclasses.dataclass(frozen=True)
class UnigramTokens:
    """Every token with its frequency among the training targets' tokens, each count one more than seen
    (Laplace).
    """

    name: str = "unigram_tokens"

    def log_probabilities(self, train: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
        """Natural logarithms, float64 [vocab_size]."""
        counts = 1.0 + np.bincount(np.concatenate(train), minlength=vocab_size)
        return np.log(counts / counts.sum())
