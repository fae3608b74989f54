"""Objectives: span corruption is T5's, and every objective gives back the text it was made of."""

from __future__ import annotations

import collections
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus.vocabulary import ByteVocabulary
from t5style.data.objectives import (
    DECODER_ONLY,
    ENCODER_DECODER,
    CausalLM,
    Examples,
    PrefixLM,
    SpanCorruption,
    Supervised,
    corrupt,
    noise_counts,
    random_spans_noise_mask,
    spans_helper,
)
from t5style.data.random import RowRandom

GOLDEN = pathlib.Path(__file__).with_name("golden_t5_span_corruption.npz")


class T5Ids:
    """The ids of T5's own vocabulary."""

    vocab_size, extra_ids, eos_id, bos_id = 32_100, 100, 1, 0

    def sentinel_id(self, index: int) -> int:
        return 32_099 - index


def rows(count: int, seed: int = 0) -> RowRandom:
    return RowRandom(seed, np.arange(count))


def split_flat(flat: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]


# ------------------------------------------------------------------------------------------ span corruption


def test_exactly_t5_given_the_same_mask() -> None:
    golden = np.load(GOLDEN)
    assert len(golden["cases"]) == 28
    for number, (length, density, mean) in enumerate(golden["cases"]):
        tokens, mask = golden["tokens"][None, : int(length)], golden[f"mask{number}"][None]
        inputs, input_lengths, targets, target_lengths = corrupt(tokens, mask, T5Ids())
        assert inputs.tolist() == [*golden[f"inputs{number}"], 1], (length, density, mean)
        assert targets.tolist() == [*golden[f"targets{number}"], 1], (length, density, mean)
        assert [*input_lengths, *target_lengths] == [len(inputs), len(targets)]
        # t5's mask has as many noise tokens and spans as ours would have.
        spans = int((np.diff(mask[0].astype(int), prepend=0) == 1).sum())
        assert (int(mask.sum()), spans) == noise_counts(int(length), density, mean)


def test_lengths_are_those_of_random_spans_helper() -> None:
    golden = np.load(GOLDEN)
    for (length, density, mean), expected in zip(golden["helper_cases"], golden["helper"], strict=True):
        assert spans_helper(int(length), density, mean) == tuple(expected), (length, density, mean)
    assert spans_helper(512, 0.15, 3.0) == (568, 114)


def test_against_an_installed_t5() -> None:
    preprocessors = pytest.importorskip("t5.data.preprocessors")
    import tensorflow as tf

    for seed in range(5):
        mask = preprocessors.random_spans_noise_mask(
            568, 0.15, tf.constant([[seed, 1], [seed, 2]]), 3.0
        ).numpy()
        ours = random_spans_noise_mask(568, 0.15, 3.0, rows(1, seed))[0]
        assert mask.sum() == ours.sum()
        assert np.diff(mask.astype(int)).clip(0).sum() == np.diff(ours.astype(int)).clip(0).sum()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.floats(0.01, 0.95), st.floats(1.0, 20.0), st.integers(0, 2**32))
def test_mask_has_the_published_counts(length: int, density: float, mean: float, seed: int) -> None:
    masks = random_spans_noise_mask(length, density, mean, rows(4, seed))
    assert masks.shape == (4, length)
    noise, spans = noise_counts(length, density, mean)
    if length == 1:  # t5 draws for length 2 and cuts
        assert not masks.any()
        return
    assert (masks.sum(axis=1) == noise).all()
    assert noise == min(max(int(np.round(np.float32(length) * np.float32(density))), 1), length - 1)
    assert not masks[:, 0].any()
    assert masks[:, -1].all()
    starts = np.diff(masks.astype(int), axis=1, prepend=0) == 1
    assert (starts.sum(axis=1) == spans).all()


def test_every_mask_is_equally_likely() -> None:
    # 10 tokens, 4 of noise in 2 spans: C(3, 1) ways to cut the noise times C(5, 1) for the rest.
    draws = 30_000
    masks = random_spans_noise_mask(10, 0.4, 2.0, rows(draws, seed=5))
    counts = collections.Counter(map(bytes, masks))
    assert len(counts) == math.comb(3, 1) * math.comb(5, 1)
    expected = draws / len(counts)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 36.1  # the 99.9 % point for 14 degrees of freedom; the seed is fixed


def test_density_and_mean_span_length_at_t5s_setting() -> None:
    masks = random_spans_noise_mask(568, 0.15, 3.0, rows(2000))
    assert masks.mean() == pytest.approx(85 / 568)
    spans = (np.diff(masks.astype(int), axis=1, prepend=0) == 1).sum(axis=1)
    assert (spans == 28).all()
    # Where noise falls: by symmetry flat but for the two ends, where the first span is kept and the last
    # is noise.
    share = masks.mean(axis=0)[100:468]
    assert abs(share - 0.15).max() < 0.04  # five standard errors of 0.008


def slow_t5(tokens: list[int], mask: list[bool], ids: T5Ids) -> tuple[list[int], list[int]]:
    """Span corruption said token by token, from the paper's description."""
    inputs, targets = [], []
    spans = -1
    for position, (token, noise) in enumerate(zip(tokens, mask, strict=True)):
        starts = position == 0 or mask[position - 1] != noise
        if noise:
            if starts:
                spans += 1
                inputs.append(ids.sentinel_id(spans))
            targets.append(token)
        else:
            inputs.append(token)
        if not noise and starts:
            targets.append(ids.sentinel_id(spans + 1))
    return [*inputs, ids.eos_id], [*targets, ids.eos_id]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 80), st.floats(0.05, 0.8), st.floats(1.0, 6.0), st.integers(0, 2**32))
def test_corruption_equals_the_token_by_token_description(
    length: int, density: float, mean: float, seed: int
) -> None:
    tokens = np.random.default_rng(seed).integers(3, 32_000, (3, length)).astype(np.int32)
    masks = random_spans_noise_mask(length, density, mean, rows(3, seed))
    inputs, input_lengths, targets, target_lengths = corrupt(tokens, masks, T5Ids())
    expected = [slow_t5(t.tolist(), m.tolist(), T5Ids()) for t, m in zip(tokens, masks, strict=True)]
    assert split_flat(inputs, input_lengths) == [e[0] for e in expected]
    assert split_flat(targets, target_lengths) == [e[1] for e in expected]


def undo(inputs: list[int], targets: list[int], sentinels: set[int], eos: int) -> list[int]:
    """Puts the targets' spans back where their sentinels stand in the inputs."""
    spans: dict[int, list[int]] = {}
    current: list[int] = []
    for token in targets[:-1]:
        if token in sentinels:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    assert inputs[-1] == targets[-1] == eos
    return [t for token in inputs[:-1] for t in (spans[token] if token in sentinels else [token])]


@settings(max_examples=40, deadline=None)
@given(st.text(min_size=2, max_size=80), st.integers(0, 1000))
def test_round_trip_to_the_text(text: str, seed: int) -> None:
    vocabulary = ByteVocabulary()
    tokens = np.array([vocabulary.encode(text)], np.int32)
    if tokens.shape[1] < 2:
        return
    examples = SpanCorruption().apply(tokens, rows(1, seed), ENCODER_DECODER, vocabulary)
    sentinels = {vocabulary.sentinel_id(k) for k in range(vocabulary.extra_ids)}
    inputs, targets = examples.inputs.tolist(), examples.targets.tolist()
    assert vocabulary.decode(undo(inputs, targets, sentinels, vocabulary.eos_id)) == text
    assert [t for t in inputs if t in sentinels] == [t for t in targets if t in sentinels]
    order = [t for t in inputs if t in sentinels]
    assert order == [vocabulary.vocab_size - 1 - k for k in range(len(order))]


def test_window_fills_the_encoder() -> None:
    for encoder in [*range(8, 200), 512, 1024, 2048]:
        objective = SpanCorruption()
        window = objective.window({"encoder": encoder, "decoder": 1024}, ENCODER_DECODER, T5IdsMany())
        tokens = np.full((1, window), 7, np.int32)
        examples = objective.apply(tokens, rows(1), ENCODER_DECODER, T5IdsMany())
        assert encoder - 2 <= examples.input_lengths[0] <= encoder
    assert SpanCorruption().window({"encoder": 512, "decoder": 114}, ENCODER_DECODER, T5Ids()) == 568


class T5IdsMany(T5Ids):
    extra_ids = 2000


def test_lengths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match="needs 114 decoder tokens, but the decoder's length is 100; set it to 114"
    ):
        SpanCorruption().window({"encoder": 512, "decoder": 100}, ENCODER_DECODER, T5Ids())
    few = T5IdsMany()
    few.extra_ids = 27
    with pytest.raises(ValueError, match="needs 28 sentinels, but the vocabulary has 27 extra ids"):
        SpanCorruption().window({"encoder": 512, "decoder": 114}, ENCODER_DECODER, few)
    with pytest.raises(ValueError, match="windows of at least 2 tokens"):
        SpanCorruption().window({"encoder": 2, "decoder": 8}, ENCODER_DECODER, T5Ids())
    with pytest.raises(ValueError, match=r"noise_density is 1\.5"):
        SpanCorruption(noise_density=1.5)
    with pytest.raises(ValueError, match=r"mean_noise_span_length is 0\.5"):
        SpanCorruption(mean_noise_span_length=0.5)
    with pytest.raises(ValueError, match="on_overlong is 'cut'"):
        Supervised(on_overlong="cut")


def test_decoder_only_span_corruption_is_one_sequence() -> None:
    objective = SpanCorruption()
    window = objective.window({"decoder": 512}, DECODER_ONLY, T5Ids())
    tokens = np.random.default_rng(0).integers(3, 32_000, (2, window)).astype(np.int32)
    joined = objective.apply(tokens, rows(2), DECODER_ONLY, T5Ids())
    apart = objective.apply(tokens, rows(2), ENCODER_DECODER, T5Ids())
    assert (joined.target_lengths <= 512).all()
    assert joined.target_lengths[0] >= 510
    inputs, targets = (
        split_flat(apart.inputs, apart.input_lengths),
        split_flat(apart.targets, apart.target_lengths),
    )
    # Without the end-of-sequence token that closes an encoder's inputs.
    expected = [i[:-1] + t for i, t in zip(inputs, targets, strict=True)]
    assert split_flat(joined.targets, joined.target_lengths) == expected
    weights = [[0] * (len(i) - 1) + [1] * len(t) for i, t in zip(inputs, targets, strict=True)]
    assert split_flat(joined.weights, joined.target_lengths) == weights


# ------------------------------------------------------------------------------------- the other objectives


def test_causal_lm_is_the_window_itself() -> None:
    tokens = np.arange(3, 23, dtype=np.int32).reshape(2, 10)
    examples = CausalLM().apply(tokens, rows(2), DECODER_ONLY, T5Ids())
    assert split_flat(examples.targets, examples.target_lengths) == tokens.tolist()
    assert examples.weights.tolist() == [1] * 20
    assert CausalLM().window({"decoder": 64}, DECODER_ONLY, T5Ids()) == 64
    with pytest.raises(ValueError, match="CausalLM has nothing for an encoder to read"):
        CausalLM().window({"encoder": 8, "decoder": 8}, ENCODER_DECODER, T5Ids())


def test_prefix_lm_splits_everywhere_equally_often() -> None:
    count, length = 20_000, 9
    tokens = np.tile(np.arange(3, 3 + length, dtype=np.int32), (count, 1))
    apart = PrefixLM().apply(tokens, rows(count), ENCODER_DECODER, T5Ids())
    whole = PrefixLM().apply(tokens, rows(count), DECODER_ONLY, T5Ids())
    prefixes = apart.input_lengths - 1  # less the end of sequence
    counts = np.bincount(prefixes)
    assert counts[0] == 0
    assert len(counts) == length  # prefixes of 1 … length - 1
    expected = count / (length - 1)
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 24.3  # 99.9 % point, 7 degrees of freedom
    for prefix, inputs, targets in list(
        zip(
            prefixes,
            split_flat(apart.inputs, apart.input_lengths),
            split_flat(apart.targets, apart.target_lengths),
            strict=True,
        )
    )[:50]:
        assert inputs == [*range(3, 3 + prefix), 1]
        assert targets == [*range(3 + prefix, 3 + length), 1]
    # The decoder-only form has the same splits, as weights.
    assert (whole.weights.reshape(count, length).sum(axis=1) == length - prefixes).all()
    assert (whole.targets.reshape(count, length) == tokens).all()
    assert (np.diff(whole.weights.reshape(count, length), axis=1) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=10))
def test_joining_keeps_order_and_weights(lengths: list[tuple[int, int]]) -> None:
    inputs = [[100 * i + k for k in range(a)] for i, (a, _) in enumerate(lengths)]
    targets = [[10_000 + 100 * i + k for k in range(b)] for i, (_, b) in enumerate(lengths)]

    def flat(parts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([token for part in parts for token in part], np.int32), np.array(
            [len(p) for p in parts]
        )

    (a, a_lengths), (b, b_lengths) = flat(inputs), flat(targets)
    joined = Examples(a, a_lengths, b, b_lengths, np.ones(len(b), np.int32)).joined()
    assert split_flat(joined.targets, joined.target_lengths) == [
        i + t for i, t in zip(inputs, targets, strict=True)
    ]
    assert split_flat(joined.weights, joined.target_lengths) == [[0] * x + [1] * y for x, y in lengths]


def test_streams_are_independent_of_company_and_order() -> None:
    together = RowRandom(9, np.arange(10)).bits(5)
    alone = RowRandom(9, np.array([7])).bits(5)
    assert (together[7] == alone[0]).all()
    in_two = RowRandom(9, np.array([7]))
    assert np.concatenate([in_two.bits(2), in_two.bits(3)], axis=1).tolist() == alone.tolist()
    assert len(np.unique(together)) == 50
    assert (RowRandom(8, np.arange(10)).bits(5) != together).all()


def test_choose_is_uniform_over_positions() -> None:
    chosen = RowRandom(1, np.arange(20_000)).choose(7, 3)
    assert (np.diff(chosen, axis=1) > 0).all()
    counts = np.bincount(chosen.reshape(-1), minlength=7)
    assert abs(counts - 20_000 * 3 / 7).max() < 4 * math.sqrt(20_000 * 3 / 7 * 4 / 7)
    assert RowRandom(1, np.arange(3)).choose(5, 0).shape == (3, 0)
    assert RowRandom(1, np.arange(3)).choose(5, 5).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_streams_do_not_change_between_versions() -> None:
    # A resumed run must draw what the first part would have drawn: these numbers are fixed for good.
    assert RowRandom(42, np.array([0, 1])).bits(2).tolist() == BITS
    assert random_spans_noise_mask(12, 0.3, 2.0, rows(2, 3)).astype(int).tolist() == MASKS


BITS = [[10996452266160306281, 2958219263312191191], [6332618229526065668, 17630415256238047317]]
MASKS = [[0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1]]
