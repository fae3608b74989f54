"""Speculative decoding: the same answers as without, their distribution, and how often guesses are right."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats

from t5style.infer import sampling, speculative
from t5style.infer.model import Model
from t5style.infer.settings import Settings
from t5style.models.cache import init_cache, rewind
from t5style.models.params import init_params
from t5style.models.transformer import Transformer
from t5style.parallel.mesh import MeshConfig
from tests.infer.conftest import VOCABULARY, config_of, tiny

PROMPT = np.random.default_rng(5).integers(3, 264, 11)
SAMPLED = {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 3}
PENALIZED = {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "banned": [[30, 31], 32]}


@functools.cache
def target(kind: str) -> Model:
    """A model of one layer, which compiles soon."""
    config = config_of(kind).replace(decoder_layers=1, encoder_layers=int(kind == "encoder_decoder"))
    return Model(config, jax.jit(lambda key: init_params(config, key))(jax.random.key(1)), VOCABULARY)


@functools.cache
def draft(kind: str) -> Model:
    """A model that often agrees with target(kind): its parameters with some noise."""
    model = target(kind)
    leaves, tree = jax.tree.flatten(model.params)
    random = np.random.default_rng(0)
    noisy = [leaf * (1 + 0.1 * random.standard_normal(leaf.shape).astype(np.float32)) for leaf in leaves]
    return Model(model.config, jax.tree.unflatten(tree, noisy), model.vocabulary)


def drafts(model: Model) -> dict[str, Model | None]:
    return {"itself": model, "near": draft(model.config.architecture), "lookup": None}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("decoder_only", {}), ("encoder_decoder", {}), ("decoder_only", {**SAMPLED, **PENALIZED})],
    ids=["decoder_only", "encoder_decoder", "sampled"],
)
def test_the_answer_is_that_without_guesses(kind, fields):
    model = target(kind)
    plain = model.complete_tokens([PROMPT], 30, stop_tokens=(), **fields)[0]
    for name, guesser in drafts(model).items():
        answer = model.generate_speculative(PROMPT, guesser, 30, guesses=4, stop_tokens=(), **fields)
        assert answer.tokens == plain, name
        assert answer.text == model.vocabulary.decode(plain)
        assert 0 <= answer.accepted <= answer.guessed
        # The first token comes of the prompt; each step makes one, and those that were guessed.
        assert answer.steps + answer.accepted in (29, 30)
        if name == "itself":
            assert answer.steps == 6  # 29 tokens, 5 a step
            assert answer.guessed == 24
        if name == "near":
            assert 0 < answer.accepted < answer.guessed
            assert answer.accepted_per_step == answer.accepted / answer.steps
    ends = plain[7], plain[12]
    last = min(plain.index(end) for end in ends)
    for guesser in drafts(model).values():
        ended = model.generate_speculative(PROMPT, guesser, 30, guesses=4, stop_tokens=ends, **fields)
        assert (ended.tokens, ended.finish_reason) == (plain[:last], "stop")
        assert ended.steps + ended.accepted <= last + 1


@functools.cache
def small(seed: int, scale: float) -> Model:
    """A model of 8 tokens."""
    config = config_of("decoder_only").replace(vocab_size=8, decoder_layers=1, init_scale=scale)
    return Model(config, jax.jit(lambda key: init_params(config, key))(jax.random.key(seed)))


@pytest.mark.parametrize("looked_up", [False, True])
def test_samples_have_the_models_distribution(looked_up):
    model, guesser, prompt, draws = small(1, 0.15), small(2, 0.15), np.asarray([1, 2, 3, 1, 2]), 500
    fields = {"temperature": 1.5, "top_k": 6, "top_p": 0.95}
    rows, _ = sampling.arrays([Settings(**fields)], [0], [prompt], (), 1, 8)

    def probabilities(*after):
        logits = model.logits([[*prompt, *after]])[:, -1]
        return np.asarray(jax.nn.softmax(sampling.warp(logits, rows)))[0].astype(np.float64)

    # Of the second and third token, both of which are guessed.
    expected = np.zeros((8, 8))
    for first, p in enumerate(probabilities()):
        for second, q in enumerate(probabilities(first) if p else []):
            expected[second] += p * q * (probabilities(first, second) if q else 0)
    expected /= expected.sum()  # is 1 but for rounding
    counts, accepted, steps = np.zeros((8, 8)), 0, 0
    for seed in range(draws):
        answer = model.generate_speculative(
            prompt, None if looked_up else guesser, 3, guesses=2, seed=seed, stop_tokens=(), **fields
        )
        counts[tuple(answer.tokens[1:])] += 1
        accepted, steps = accepted + answer.accepted, steps + answer.steps
    assert counts[expected == 0].sum() == 0
    common = expected * draws >= 5
    observed = np.r_[counts[common], counts[~common].sum()]
    wanted = np.r_[expected[common], expected[~common].sum()] * draws
    keep = wanted > 0
    assert common.sum() > 10
    assert scipy.stats.chisquare(observed[keep], wanted[keep]).pvalue > 1e-3
    assert 0.05 < accepted / steps < 1.9  # guesses were right and wrong


def test_prompt_lookup_finds_what_followed():
    def look_up(text, count=4, ngram=3):
        padded = np.zeros(24, np.int32)
        padded[: len(text)] = text
        return speculative._look_up(padded, np.int32(len(text)), count, ngram).tolist()

    assert look_up([5, 6, 7, 8, 9, 10, 5, 6]) == [7, 8, 9, 10]
    assert look_up([1, 2, 3, 40, 9, 2, 3, 41, 8, 1, 2, 3], 2) == [40, 9]  # the longest match
    assert look_up([1, 2, 3, 40, 9, 2, 3, 41, 8, 1, 2, 3], 2, ngram=2) == [41, 8]  # the latest
    assert look_up([4, 5, 6, 5, 6]) == [5, 6, 5, 6]  # goes on as the text does
    assert look_up([4, 4]) == [4] * 4
    assert look_up([1, 2, 3]) == [-1] * 4
    assert look_up([7]) == [-1] * 4
    assert look_up([1, 2, 0]) == [-1] * 4  # padding is no text


def test_prompt_lookup_is_right_where_the_answer_repeats():
    model = target("decoder_only")
    pattern = [40, 41, 42, 43, 44]
    bias = dict.fromkeys(pattern, 1e4)
    banned = [[a, b] for a in pattern for b in pattern if (b - a) % 5 != 1]
    answer = model.generate_speculative(
        pattern * 2, max_new_tokens=45, guesses=10, stop_tokens=(), logit_bias=bias, banned=banned
    )
    assert answer.tokens == pattern * 9
    assert answer.steps == 4  # 44 tokens, 11 a step
    assert answer.accepted_per_step == 10


def test_what_else_a_request_may_ask_for():
    model = target("decoder_only")
    prompt, fields = "tell me", {"temperature": 1.0, "seed": 4, "stop_tokens": ()}
    whole = model.complete([prompt], 24, logprobs=2, **fields)[0]
    guesser = draft("decoder_only")
    answer = model.generate_speculative(prompt, guesser, 24, logprobs=2, **fields)
    assert (answer.tokens, answer.text) == (whole.tokens, whole.text)
    np.testing.assert_allclose(answer.logprobs, whole.logprobs, atol=1e-4)
    assert answer.score == pytest.approx(whole.score, abs=1e-3)
    assert [[t for t, _ in row] for row in answer.top_logprobs] == [
        [t for t, _ in row] for row in whole.top_logprobs
    ]
    at = next(i for i in range(6, 20) if "\ufffd" not in whole.text[i : i + 2])
    stop = whole.text[at : at + 2]
    cut = model.generate_speculative(prompt, guesser, 24, stop=stop, **fields)
    assert cut == speculative.Speculated(
        whole.text[: whole.text.index(stop)],
        cut.tokens,
        "stop",
        steps=cut.steps,
        guessed=cut.guessed,
        accepted=cut.accepted,
    )
    assert cut.tokens == model.complete([prompt], 24, stop=stop, **fields)[0].tokens
    one = model.generate_speculative(prompt, guesser, 1, **fields)
    assert (one.tokens, one.steps, one.accepted_per_step) == (whole.tokens[:1], 0, 0)


def test_nothing_recompiles_within_a_bucket():
    model = target("decoder_only")
    for guesser in (draft("decoder_only"), None):
        model.generate_speculative(PROMPT, guesser, 20, guesses=4)
        before = speculative._advance._cache_size()
        model.generate_speculative(PROMPT[:4], guesser, 30, guesses=4, stop_tokens=[5])
        assert speculative._advance._cache_size() == before


def test_windows_and_meshes():
    model = target("decoder_only")
    config = model.config.replace(window=4, layer_pattern=("window",))
    windowed = Model(config, model.params, model.vocabulary)
    plain = windowed.complete_tokens([PROMPT], 12, stop_tokens=())[0]
    assert windowed.generate_speculative(PROMPT, model, 12, guesses=3, stop_tokens=()).tokens == plain
    mesh = MeshConfig(data=8).build()
    spread, near = (
        Model(m.config, m.params, m.vocabulary, mesh=mesh) for m in (model, draft("decoder_only"))
    )
    plain = model.complete_tokens([PROMPT], 12, stop_tokens=())[0]
    assert spread.generate_speculative(PROMPT, near, 12, stop_tokens=()).tokens == plain
    with pytest.raises(ValueError, match="on other devices"):
        spread.generate_speculative(PROMPT, model)


def test_a_rewound_cache_is_as_before():
    model = target("decoder_only")
    apply = jax.jit(
        functools.partial(Transformer(model.config).apply, {"params": model.params}, method="decode")
    )
    tokens = PROMPT[None, :]
    _, cache = apply(tokens[:, :5], init_cache(model.config, 1, 16))
    _, longer = apply(tokens[:, 5:9], cache)
    again = rewind(longer, 3)
    assert (int(again["slot"]), again["length"].tolist(), int(again["valid"].sum())) == (6, [6], 6)
    expected, _ = apply(tokens[:, 5:8], cache)
    np.testing.assert_allclose(apply(tokens[:, 6:8], again)[0], expected[:, 1:], atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guesses": 0}, "guesses is 0: give 1 to 64"),
        ({"guesses": 65}, "guesses is 65"),
        ({"ngram": 0}, "ngram is 0"),
        ({"n": 2, "temperature": 1.0}, "n is 2: speculative decoding makes one answer"),
        ({"constraint": lambda: None}, "takes no constraint"),
        ({"temperature": -1}, "temperature is -1"),
    ],
)
def test_bad_input_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny("decoder_only").generate_speculative([5, 6], **fields)


def test_draft_models_that_do_not_fit_are_named():
    model = target("decoder_only")
    with pytest.raises(ValueError, match="the draft model has 8 tokens and the model 264"):
        model.generate_speculative([5, 6], small(1, 0.15))
    with pytest.raises(ValueError, match="the draft model is encoder_decoder and the model decoder_only"):
        model.generate_speculative([5, 6], tiny("encoder_decoder"))
    short = Model(model.config.replace(context_length=16), model.params, model.vocabulary)
    with pytest.raises(ValueError, match="made for 16 positions"):
        model.generate_speculative([5, 6], short, 30)
