"""What a model is asked to learn from tokens: span corruption, causal LM, prefix LM, supervised, chat, pairs.

An objective turns tokens into examples: what the encoder reads (`inputs`) and what the decoder is to say
(`targets`). `CausalLM`, `PrefixLM` and `SpanCorruption` cut the split into windows (all its documents, one
after the other, each closed by its end-of-sequence token); the others take a store's examples as they are.
For a decoder-only model inputs and targets become one sequence, with loss on the targets only; there, inputs
are not closed by an end-of-sequence token, so that a prompt goes on as text does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np

from t5style.data.random import RowRandom
from t5style.run_dir import UserError

ENCODER_DECODER = "encoder_decoder"
DECODER_ONLY = "decoder_only"


class Ids(Protocol):
    """What an objective asks of a vocabulary."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def extra_ids(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def bos_id(self) -> int: ...
    def sentinel_id(self, index: int, /) -> int: ...


@dataclasses.dataclass(frozen=True)
class Examples:
    """Many examples of different lengths, flat.

    Attributes:
      inputs: int32 [sum(input_lengths)]; empty for a decoder-only model.
      input_lengths: int64 [examples].
      targets: int32 [sum(target_lengths)].
      target_lengths: int64 [examples].
      weights: 1 where the target token counts in the loss: int32 [sum(target_lengths)].
      first: what stands before the first target in the decoder's inputs: int32 [examples]; None for bos.
    """

    inputs: np.ndarray
    input_lengths: np.ndarray
    targets: np.ndarray
    target_lengths: np.ndarray
    weights: np.ndarray
    first: np.ndarray | None = None

    def joined(self) -> Examples:
        """The decoder-only form: inputs and targets in one sequence, loss on the targets only."""
        lengths = self.input_lengths + self.target_lengths
        starts = np.cumsum(lengths) - lengths
        into_inputs = spread(starts, self.input_lengths)
        into_targets = spread(starts + self.input_lengths, self.target_lengths)
        tokens = np.empty(int(lengths.sum()), np.int32)
        weights = np.zeros(len(tokens), np.int32)
        tokens[into_inputs], tokens[into_targets] = self.inputs, self.targets
        weights[into_targets] = self.weights
        nothing = np.zeros(0, np.int32)
        return Examples(nothing, np.zeros_like(lengths), tokens, lengths, weights, self.first)


def spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """For each i the positions starts[i] … starts[i] + lengths[i] - 1: int64 [sum(lengths)]."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(int(ends[-1]) if len(ends) else 0)


def without_inputs(targets: np.ndarray, first: np.ndarray | None = None) -> Examples:
    """Examples from windows int32 [rows, length], all of it targets with loss."""
    rows, length = targets.shape
    return Examples(
        np.zeros(0, np.int32),
        np.zeros(rows, np.int64),
        targets.reshape(-1),  # [rows, length] -> [rows * length]
        np.full(rows, length, np.int64),
        np.ones(rows * length, np.int32),
        first,
    )


def _length(lengths: Mapping[str, int], name: str) -> int:
    if name not in lengths or lengths[name] < 1:
        raise ValueError(
            f"lengths has {name}={lengths.get(name)}; give a length of at least 1 for the {name}."
        )
    return int(lengths[name])


@dataclasses.dataclass(frozen=True)
class Windowed:
    """Base of the objectives that read windows of the feature `feature`.

    Attributes:
      feature: the store's feature that is read.
    """

    feature: str = "text"
    reads_previous: ClassVar[bool] = False

    def window(self, lengths: Mapping[str, int], architecture: str, ids: Ids) -> int:
        """Tokens in one window. Raises ValueError where lengths, architecture or vocabulary do not fit."""
        raise TypeError(f"{type(self).__name__} is not an objective by itself")

    def apply(self, tokens: np.ndarray, random: RowRandom, architecture: str, ids: Ids) -> Examples:
        """Windows int32 [rows, length] → one example for each. `random` has one stream for each row."""
        raise TypeError(f"{type(self).__name__} is not an objective by itself")


@dataclasses.dataclass(frozen=True)
class CausalLM(Windowed):
    """Predict every token from those before it (decoder-only).

    Attributes:
      carry_over: the first token of a window is predicted from the token before the window (as nanoGPT does)
        instead of from the start token. The model then never sees a start token, except at the split's
        beginning.
    """

    carry_over: bool = False

    def window(self, lengths: Mapping[str, int], architecture: str, ids: Ids) -> int:
        if architecture != DECODER_ONLY:
            raise ValueError("CausalLM has nothing for an encoder to read; use PrefixLM or SpanCorruption.")
        return _length(lengths, "decoder")

    def apply(self, tokens: np.ndarray, random: RowRandom, architecture: str, ids: Ids) -> Examples:
        return without_inputs(tokens)


@dataclasses.dataclass(frozen=True)
class PrefixLM(Windowed):
    """Read a prefix, predict the rest. The split point is uniform in [1, length) (t5
    `random_prefix_noise_mask`).

    An encoder-decoder reads the prefix in its encoder; both halves are closed by an end-of-sequence token. A
    decoder-only model has the window whole, with loss on the suffix.
    """

    def window(self, lengths: Mapping[str, int], architecture: str, ids: Ids) -> int:
        if architecture == DECODER_ONLY:
            length = _length(lengths, "decoder")
        else:
            # Either half may be as long as the window less one token; each gets an end-of-sequence token.
            length = min(_length(lengths, "encoder"), _length(lengths, "decoder"))
        if length < 2:
            raise ValueError(f"PrefixLM needs lengths of at least 2, got {dict(lengths)}.")
        return length

    def apply(self, tokens: np.ndarray, random: RowRandom, architecture: str, ids: Ids) -> Examples:
        length = tokens.shape[1]
        if length < 2:  # nothing to read: predict it all
            return without_inputs(tokens)
        split = random.integers(1, length)
        prefix = np.arange(length) < split[:, None]  # [rows, length]
        if architecture == DECODER_ONLY:
            return dataclasses.replace(without_inputs(tokens), weights=(~prefix).reshape(-1).astype(np.int32))
        inputs, input_lengths = _take(tokens, prefix, ids.eos_id)
        targets, target_lengths = _take(tokens, ~prefix, ids.eos_id)
        return Examples(inputs, input_lengths, targets, target_lengths, np.ones(len(targets), np.int32))


@dataclasses.dataclass(frozen=True)
class SpanCorruption(Windowed):
    """T5's objective: spans of the window are replaced by sentinels, and the decoder says what stood there.

    Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text transformer"
    (2020), §3.1.4; the algorithm is that of t5's `random_spans_noise_mask`, `noise_span_to_unique_sentinel`
    and `nonnoise_span_to_unique_sentinel`, and the window's length that of its `random_spans_helper`.

    Attributes:
      noise_density: share of tokens to corrupt.
      mean_noise_span_length: tokens.
    """

    noise_density: float = 0.15
    mean_noise_span_length: float = 3.0

    def __post_init__(self) -> None:
        if not 0.0 < self.noise_density < 1.0:
            raise ValueError(f"noise_density is {self.noise_density}; it must lie between 0 and 1.")
        if self.mean_noise_span_length < 1.0:
            raise ValueError(
                f"mean_noise_span_length is {self.mean_noise_span_length}; it must be at least 1."
            )

    def window(self, lengths: Mapping[str, int], architecture: str, ids: Ids) -> int:
        decoder = _length(lengths, "decoder")
        if architecture == DECODER_ONLY:
            window = decoder
            while window > 1 and sum(self._example_lengths(window)) - 1 > decoder:
                window -= 1
        else:
            encoder = _length(lengths, "encoder")
            window, targets = spans_helper(encoder, self.noise_density, self.mean_noise_span_length)
            while window > 1 and self._example_lengths(window)[0] > encoder:
                window -= 1
            targets = self._example_lengths(window)[1]
            if targets > decoder:
                raise ValueError(
                    f"Span corruption of {encoder} encoder tokens needs {targets} decoder tokens, but the "
                    f"decoder's "
                    f"length is {decoder}; set it to {targets}, or lower the encoder's length or "
                    f"noise_density."
                )
        if window < 2:
            raise ValueError(
                f"Span corruption needs windows of at least 2 tokens; lengths {dict(lengths)} allow {window}."
            )
        _, spans = noise_counts(window, self.noise_density, self.mean_noise_span_length)
        if spans > ids.extra_ids:
            raise ValueError(
                f"Span corruption of {window} tokens needs {spans} sentinels, but the vocabulary has "
                f"{ids.extra_ids} extra ids; train the vocabulary with extra_ids >= {spans}, or use "
                f"shorter lengths."
            )
        return window

    def _example_lengths(self, window: int) -> tuple[int, int]:
        noise, spans = noise_counts(window, self.noise_density, self.mean_noise_span_length)
        return window - noise + spans + 1, noise + spans + 1

    def apply(self, tokens: np.ndarray, random: RowRandom, architecture: str, ids: Ids) -> Examples:
        mask = random_spans_noise_mask(
            tokens.shape[1], self.noise_density, self.mean_noise_span_length, random
        )
        inputs, input_lengths, targets, target_lengths = corrupt(
            tokens, mask, ids, close_inputs=architecture == ENCODER_DECODER
        )
        examples = Examples(inputs, input_lengths, targets, target_lengths, np.ones(len(targets), np.int32))
        return examples.joined() if architecture == DECODER_ONLY else examples


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Learn `targets` from `inputs`, both features of the store, one example after the other.

    Attributes:
      on_overlong: what happens to an example longer than the lengths: `truncate` (t5: cut, and the
        end-of-sequence token put back), `drop`, or `error`.
    """

    inputs: str = "inputs"
    targets: str = "targets"
    on_overlong: str = "truncate"

    def __post_init__(self) -> None:
        _check_overlong(self.on_overlong)


@dataclasses.dataclass(frozen=True)
class Chat:
    """Whole conversations, of which some tokens are learnt, for a decoder-only model.

    The tokens are what the model reads, with whatever it begins its texts with: the first is read only.

    Attributes:
      tokens: feature of the conversations.
      mask: feature of the same lengths, 1 for tokens that are learnt and 0 for others.
      on_overlong: "truncate" keeps a conversation's beginning (one of which nothing learnt is left is
        dropped), "drop" leaves it out, "error" refuses it.
    """

    tokens: str = "tokens"
    mask: str = "mask"
    on_overlong: str = "truncate"

    def __post_init__(self) -> None:
        _check_overlong(self.on_overlong)


@dataclasses.dataclass(frozen=True)
class Preferences:
    """Prompts with a better and a worse answer, which stand in a row each: arrays `[pairs, 2, length]`, index
    0 the chosen answer and 1 the rejected one. Loss weights are on the answers; nothing is packed.

    For a decoder-only model prompt and answer share a row, whose first token is read only.

    Attributes:
      prompt, chosen, rejected: features.
      margin: feature that tells how much better the chosen answer is, where the store has it
        (pair_rows.margin_tokens); batches then have `margin` float32 `[pairs]`.
      on_overlong: "truncate" cuts answers at their end (they keep at least half of a decoder-only row) and
        the prompt, of a decoder-only model at its beginning, the same for both answers; "drop"; "error".
        Pairs with an answer of no tokens are dropped in any case.
    """

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    margin: str = "margin"
    on_overlong: str = "truncate"

    def __post_init__(self) -> None:
        _check_overlong(self.on_overlong)


@dataclasses.dataclass(frozen=True)
class Unpaired:
    """Prompts with one answer, desirable or not: arrays `[rows, 2, length]`, index 0 the example and 1 its
    prompt with the answer of another example, by which KTO estimates a divergence (Ethayarajh et al. 2024,
    section 4.1). Batches also have `desirable` int32 `[rows]`.

    Attributes:
      prompt, completion: features.
      desirable: feature of one token, 1 or 0.
      on_overlong: as of Preferences.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    desirable: str = "desirable"
    on_overlong: str = "truncate"

    def __post_init__(self) -> None:
        _check_overlong(self.on_overlong)


Objective = SpanCorruption | CausalLM | PrefixLM | Supervised | Chat | Preferences | Unpaired


def objective_for(features: Sequence[str], place: str) -> Objective:
    """What is asked of a store's examples, which its features say; place: where it lies, for the error.

    Raises:
      UserError: no objective of examples has these features.
    """
    for objective in (Supervised(), Chat(), Preferences(), Unpaired()):
        names = [value for name, value in vars(objective).items() if name != "on_overlong"]
        if set(features) == set(names) or {*features, "margin"} == set(names):
            return objective
    raise UserError(
        f"the token store {place} has the features {', '.join(features)}, which no objective of examples "
        "reads: give a task that says what is to be learnt."
    )


def _check_overlong(value: str) -> None:
    if value not in ("truncate", "drop", "error"):
        raise ValueError(f"on_overlong is {value!r}; it must be 'truncate', 'drop' or 'error'.")


def spans_helper(inputs_length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """How many tokens to corrupt so that the inputs fill `inputs_length`, and how long the targets become.

    The rule of t5's `random_spans_helper` with one sentinel for each span and one end-of-sequence token:
    512 → (568, 114).
    """

    def lengths(tokens: int) -> tuple[int, int]:
        noise = round(tokens * noise_density)
        spans = round(noise / mean_noise_span_length)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    targets = lengths(tokens)[1]
    if noise_density == 0.5 and targets > inputs_length:
        # t5 makes the two lengths equal here, since inputs_length is more often the round number.
        return tokens - 1, targets - 1
    return tokens, targets


def noise_counts(length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """(noise tokens, noise spans) of a window of `length` tokens, in float32 and rounding half to even as t5
    does.
    """
    length = max(length, 2)  # t5: avoids degenerate spans
    noise = int(np.round(np.float32(length) * np.float32(noise_density)))
    noise = min(max(noise, 1), length - 1)
    spans = max(int(np.round(np.float32(noise) / np.float32(mean_noise_span_length))), 1)
    # Every span needs a token of noise and one before it that is not; t5 assumes it.
    return noise, min(spans, noise, length - noise)


def random_spans_noise_mask(
    length: int, noise_density: float, mean_noise_span_length: float, random: RowRandom
) -> np.ndarray:
    """Which tokens are noise: bool [rows, length] (t5 `random_spans_noise_mask`).

    Noise and the rest are each cut into the same number of spans, every way to cut them equally likely; the
    spans alternate and the first is not noise.
    """
    noise, spans = noise_counts(length, noise_density, mean_noise_span_length)
    padded = max(length, 2)
    kept_lengths = _random_segmentation(padded - noise, spans, random)
    noise_lengths = _random_segmentation(noise, spans, random)
    rows = len(kept_lengths)
    interleaved = np.stack([kept_lengths, noise_lengths], axis=2).reshape(
        rows, 2 * spans
    )  # [rows, spans, 2] -> flat
    boundaries = np.cumsum(interleaved, axis=1)[:, :-1]  # where a span ends and the next begins
    changes = np.zeros((rows, padded), np.int8)
    np.put_along_axis(changes, boundaries, 1, axis=1)
    return (np.cumsum(changes, axis=1, dtype=np.int8) & 1).astype(bool)[:, :length]


def _random_segmentation(items: int, segments: int, random: RowRandom) -> np.ndarray:
    """`items` cut into `segments` parts of at least one, all ways equally likely: int64 [rows, segments]."""
    cuts = random.choose(items - 1, segments - 1) + 1  # [rows, segments - 1]
    return np.diff(cuts, axis=1, prepend=0, append=items)


def corrupt(
    tokens: np.ndarray, mask: np.ndarray, ids: Ids, close_inputs: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and targets of span corruption, given the noise mask.

    Args:
      tokens: int32 [rows, length].
      mask: bool [rows, length], True for noise.
      ids: the vocabulary; T5's sentinels descend from vocab_size - 1.
      close_inputs: whether the inputs end with an end-of-sequence token (the targets always do).

    Returns: inputs flat int32, input lengths int64 [rows], targets flat int32, target lengths int64 [rows].
    """
    inputs, input_lengths = _replace_spans(tokens, mask, ids, close_inputs)
    targets, target_lengths = _replace_spans(tokens, ~mask, ids, True)
    return inputs, input_lengths, targets, target_lengths


def _replace_spans(
    tokens: np.ndarray, mask: np.ndarray, ids: Ids, close: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Each run of True becomes one sentinel, the k-th run of a row sentinel k
    (t5 `noise_span_to_unique_sentinel`).
    """
    first = mask.copy()
    first[:, 1:] &= ~mask[:, :-1]
    order = np.cumsum(first, axis=1, dtype=np.int32)  # [rows, length], from 1
    sentinels = np.array([0] + [ids.sentinel_id(k) for k in range(int(order.max(initial=0)))], np.int32)
    replaced = np.where(first, sentinels[order], tokens)
    return _take(replaced, first | ~mask, ids.eos_id if close else None)


def _take(tokens: np.ndarray, keep: np.ndarray, eos_id: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The kept tokens of each row, closed by `eos_id` unless None: flat int32 and lengths int64 [rows]."""
    if eos_id is not None:
        rows = len(tokens)
        tokens = np.concatenate([tokens, np.full((rows, 1), eos_id, tokens.dtype)], axis=1)
        keep = np.concatenate([keep, np.ones((rows, 1), bool)], axis=1)
    return tokens[keep].astype(np.int32, copy=False), keep.sum(axis=1)
