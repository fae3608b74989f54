"""Beam search: equal to transformers'."""

import itertools
import json

import numpy as np
import pytest

import t5style
from t5style.infer import beams
from t5style.infer.model import Model
from t5style.parallel.mesh import MeshConfig
from tests.infer import make_golden, make_golden_beams
from tests.infer.conftest import tiny


def prompts():
    given = make_golden.inputs()
    return [row[keep != 0] for row, keep in zip(given["tokens"], given["left"], strict=True)]


def agrees(model, family, expected):
    """The model's answers against transformers'; returns how many ended before the limit."""
    early = 0
    for case, answers in zip(make_golden_beams.cases(family), expected, strict=True):
        found = model.beam_search(
            prompts(), max_new_tokens=make_golden.NEW, stop_tokens=make_golden_beams.STOP, **case
        )
        assert [(a.request, a.sample) for a in found] == list(itertools.product(range(4), range(case["n"])))
        for ours, (tokens, score) in zip(found, answers, strict=True):
            stopped = tokens[-1] in make_golden_beams.STOP
            assert ours.tokens == (tokens[:-1] if stopped else tokens), case
            assert ours.finish_reason == ("stop" if stopped else "length")
            assert ours.score == pytest.approx(score, rel=1e-5, abs=1e-5)
            assert ours.text == ""
            early += stopped
    return early


@pytest.mark.parametrize("family", make_golden_beams.FAMILIES)
def test_equal_to_stored_answers_of_transformers(family):
    model = t5style.load(make_golden.GOLDEN / family)
    before = beams._search._cache_size()
    expected = json.loads(make_golden_beams.FILE.read_text())[family]
    early = agrees(model, family, expected)
    total = sum(map(len, expected))
    assert total // 10 < early < total  # both ways to end are there
    kinds = {case.get("early_stopping", False) for case in make_golden_beams.cases(family)}
    assert beams._search._cache_size() == before + len(kinds)  # nothing recompiles for a penalty


@pytest.mark.parametrize("family", make_golden_beams.FAMILIES)
def test_stored_answers_are_those_of_transformers(family):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    stored = json.loads(make_golden_beams.FILE.read_text())[family]
    fresh = make_golden_beams.expected(family, make_golden.make(family))
    for ours, theirs in zip(stored, fresh, strict=True):
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        np.testing.assert_allclose([score for _, score in ours], [score for _, score in theirs], rtol=1e-5)


def test_scores_are_normalised_log_probabilities_and_one_beam_is_greedy(model: Model):
    ids = [model.prompt_ids(text, 0) for text in ("tell me", "and another")]
    found = model.beam_search(ids, 3, 0.7, n=3, max_new_tokens=6, stop_tokens=())
    for answer in found:
        assert len(answer.tokens) == 6
        if model.encoder_decoder:
            start = [model.ids.start, *answer.tokens[:-1]]
            logits = model.logits([start], encoder_tokens=[ids[answer.request]])[0]
        else:
            logits = model.logits([[*ids[answer.request], *answer.tokens[:-1]]])[0]
        logits = np.asarray(logits, np.float64)[-6:]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = logprobs[np.arange(6), answer.tokens].sum()
        assert answer.score == pytest.approx(total / 6**0.7, abs=1e-4)
        assert answer.text == model.vocabulary.decode(answer.tokens)
    scores = np.asarray([answer.score for answer in found]).reshape(2, 3)
    assert (np.diff(scores) <= 0).all()
    assert len({tuple(answer.tokens) for answer in found}) == 6
    one = model.beam_search(["tell me", "and another"], 1, max_new_tokens=6, stop_tokens=())
    assert [a.tokens for a in one] == model.complete_tokens(ids, 6, stop_tokens=())


def test_the_same_alone_and_on_a_mesh():
    model = tiny("decoder_only")
    given = [np.arange(3, 3 + n) for n in (4, 9, 30)]
    together = model.beam_search(given, max_new_tokens=5, n=2)
    for i, prompt in enumerate(given[:2]):
        alone = model.beam_search([prompt], max_new_tokens=5, n=2)
        assert [a.tokens for a in alone] == [a.tokens for a in together[2 * i : 2 * i + 2]]
    spread = Model(model.config, model.params, model.vocabulary, mesh=MeshConfig(data=4, tensor=2).build())
    assert [a.tokens for a in spread.beam_search(given, max_new_tokens=5, n=2)] == [
        a.tokens for a in together
    ]


def test_window_layers_keep_rings_that_are_reordered():
    model = tiny("decoder_only")
    config = model.config.replace(window=4, layer_pattern=("window", "full"))
    model = Model(config, model.params, model.vocabulary)
    prompt = np.arange(3, 40)
    found = model.beam_search([prompt], 3, n=3, max_new_tokens=8, stop_tokens=())
    for answer in found:
        logits = np.asarray(model.logits([[*prompt, *answer.tokens[:-1]]])[0], np.float64)[-8:]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert answer.score == pytest.approx(logprobs[np.arange(8), answer.tokens].sum() / 8, abs=1e-4)
    cache = model.engine.prefill([np.arange(3, 19)] * 2, 40).cache
    assert {layer["key"].shape[2] for layer in cache["layers"]} == {19, 56}  # there is a ring


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"n": 0}, "n is 0"),
        ({"n": 5}, "n is 5 and num_beams 4"),
        ({"length_penalty": float("nan")}, "length_penalty is nan"),
        ({"early_stopping": 1}, "early_stopping is 1"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop_tokens": [264]}, "holds the id 264"),
        ({"num_beams": 300}, "num_beams is 300: a vocabulary of 264"),
    ],
)
def test_bad_input_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny("decoder_only").beam_search([[5, 6]], **fields)
