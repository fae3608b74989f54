"""What a request may ask for, through the public API: streams, stop texts, several answers, constraints,
log-probabilities, long prompts; and that a request's answer is its own.
"""

import dataclasses

import jax
import numpy as np
import pytest

from t5style.infer import decoding, engine
from t5style.infer.model import Model
from t5style.infer.settings import Settings
from t5style.models.params import init_params
from tests.infer.conftest import tiny

PROMPT = "tell me"
SAMPLED = Settings(max_new_tokens=24, temperature=1.0, seed=4, stop_tokens=())


def compiled():
    """Programs compiled so far for prompts and steps."""
    return sum(p._cache_size() for p in (engine._start, engine._read, decoding._begin, decoding._advance))


def test_a_stream_is_the_answer_and_compiles_nothing_more(model):
    whole = model.complete([PROMPT], settings=SAMPLED)[0]
    before = compiled()
    stream = model.stream(PROMPT, settings=SAMPLED)
    with pytest.raises(ValueError, match="not finished"):
        _ = stream.completion
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3
    assert stream.completion == whole
    assert compiled() == before
    ids = model.prompt_ids(PROMPT, 0)
    assert "".join(model.stream(ids, settings=SAMPLED)) == whole.text
    with pytest.raises(ValueError, match="n is 2: a stream is one answer"):
        model.stream(PROMPT, settings=SAMPLED, n=2)
    with pytest.raises(ValueError, match="temperature is -1"):
        model.stream(PROMPT, temperature=-1)


def test_stop_texts_cut_the_answer_across_token_borders(model):
    whole = model.complete([PROMPT], settings=SAMPLED)[0]
    at = next(i for i in range(6, 20) if "\ufffd" not in whole.text[i : i + 3])
    stop = whole.text[at : at + 3]
    cut = model.complete(
        [PROMPT, PROMPT], settings=[dataclasses.replace(SAMPLED, stop=("no", stop)), SAMPLED]
    )
    assert cut[0].text == whole.text[: whole.text.index(stop)]
    assert cut[0].finish_reason == "stop"
    assert stop in model.vocabulary.decode(cut[0].tokens)
    assert cut[0].tokens == whole.tokens[: len(cut[0].tokens)]
    assert stop not in model.vocabulary.decode(cut[0].tokens[:-1])
    assert dataclasses.replace(cut[1], request=0) == whole
    assert whole.finish_reason == "length"
    stream = model.stream(PROMPT, settings=SAMPLED, stop=stop)
    assert "".join(stream) == cut[0].text
    assert stream.completion.finish_reason == "stop"
    asked = model.complete([PROMPT], settings=SAMPLED, stop=stop, logprobs=2)[0]
    assert len(asked.logprobs) == len(asked.top_logprobs) == len(asked.tokens) == len(cut[0].tokens)


def test_several_answers_are_independent_and_read_the_prompt_once(model, monkeypatch):
    rows = []
    original = engine.Engine.prefill
    monkeypatch.setattr(
        engine.Engine, "prefill", lambda self, p, *a, **k: rows.append(len(p)) or original(self, p, *a, **k)
    )
    answers = model.complete([PROMPT, "other"], settings=SAMPLED, n=[3, 1])
    assert rows == [2]
    assert [(a.request, a.sample) for a in answers] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert len({tuple(a.tokens) for a in answers}) == 4
    assert answers[0] == model.complete([PROMPT], settings=SAMPLED)[0]
    two = model.complete([PROMPT], settings=SAMPLED, n=2)
    assert [a.tokens for a in two] == [a.tokens for a in answers[:2]]
    assert model.generate([PROMPT], settings=SAMPLED, n=2) == [a.text for a in two]
    out = model.generate_tokens([model.prompt_ids(PROMPT, 0)], settings=SAMPLED, n=2)
    assert out.tolist() == [a.tokens for a in two]


def test_logprobs_are_the_models_own(model):
    changed = {"repetition_penalty": 1.3, "logit_bias": {5: 2.0}, "logprobs": 3, "temperature": 0.5}
    answer = model.complete([PROMPT], settings=SAMPLED, **changed)[0]
    ids = model.prompt_ids(PROMPT, 0)
    if model.encoder_decoder:
        logits = model.logits([[model.ids.start, *answer.tokens[:-1]]], encoder_tokens=[ids])[0]
    else:
        logits = model.logits([[*ids, *answer.tokens[:-1]]])[0, len(ids) - 1 :]
    logits = np.asarray(logits, np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    steps = np.arange(len(answer.tokens))
    np.testing.assert_allclose(answer.logprobs, expected[steps, answer.tokens], atol=1e-4)
    best = np.argsort(-expected, axis=-1)[:, :3]
    assert [[token for token, _ in row] for row in answer.top_logprobs] == best.tolist()
    np.testing.assert_allclose(
        [[value for _, value in row] for row in answer.top_logprobs],
        np.take_along_axis(expected, best, axis=-1),
        atol=1e-4,
    )
    assert answer.score == pytest.approx(sum(answer.logprobs))
    only = model.complete([PROMPT], settings=SAMPLED, **{**changed, "logprobs": 0})[0]
    assert only.tokens == answer.tokens
    assert only.top_logprobs is None
    assert only.logprobs == answer.logprobs
    assert model.complete([PROMPT], settings=SAMPLED)[0].score is None
    # The token that ends an answer counts in its score, and is none of its tokens.
    end = answer.tokens[9]
    ended = model.complete([PROMPT], settings=SAMPLED, **{**changed, "stop_tokens": [end]})[0]
    first = answer.tokens.index(end)
    assert (ended.tokens, ended.finish_reason) == (answer.tokens[:first], "stop")
    assert ended.score == pytest.approx(sum(answer.logprobs[: first + 1]))


def test_constraints_are_asked_for_every_token_and_kept(model):
    vocab, asked = model.config.vocab_size, []

    def digits():
        def allowed(tokens):
            asked.append(tuple(tokens))
            mask = np.zeros(vocab, bool)
            mask[model.ids.eos[0] if len(tokens) == 5 else model.vocabulary.encode("0123456789")] = True
            return mask

        return allowed

    settings = [Settings(max_new_tokens=9, constraint=digits), Settings(max_new_tokens=9)]
    answer, free = model.complete([PROMPT, PROMPT], settings=settings)
    assert len(answer.text) == 5
    assert answer.text.isdigit()
    assert answer.finish_reason == "stop"
    assert asked == [tuple(answer.tokens[:i]) for i in range(6)]
    assert free.tokens == model.complete([PROMPT], 9)[0].tokens
    # Together in one batch, and as a stream.
    together = decoding.Batch(model.engine, [model.prompt_ids(PROMPT, 0)] * 2, settings)
    while not together.finished:
        together.advance()
    assert [answer.tokens for answer in together.answers] == [answer.tokens, free.tokens]
    assert "".join(model.stream(PROMPT, settings=settings[0])) == answer.text
    with pytest.raises(ValueError, match="allows no token after 0 tokens"):
        model.complete([PROMPT], constraint=lambda: lambda _: np.zeros(vocab, bool))
    with pytest.raises(ValueError, match=r"gave int64 \(3,\): it must give bool \(264,\)"):
        model.complete([PROMPT], constraint=lambda: lambda _: np.zeros(3, np.int64))
    one = np.arange(vocab) == 9
    with pytest.raises(ValueError, match="allows only tokens that its settings ban"):
        model.complete([PROMPT], constraint=lambda: lambda _: one, banned=[9])


def test_penalties_and_bans_see_prompt_and_answer(model):
    free = model.complete([PROMPT], 16, stop_tokens=())[0]
    banned = model.complete([PROMPT], 16, stop_tokens=(), banned=[free.tokens[3:6], free.tokens[0]])[0]
    assert free.tokens[0] not in banned.tokens
    assert str(free.tokens[3:6])[1:-1] not in str(banned.tokens)
    text = model.vocabulary.decode(free.tokens[:2])
    if model.vocabulary.encode(text) == free.tokens[:2]:
        again = model.complete([PROMPT], 16, stop_tokens=(), banned=text)[0]
        assert text not in again.text
    once = model.complete([PROMPT], 16, stop_tokens=(), presence_penalty=1e4)[0]
    assert len(set(once.tokens)) == 16
    often = model.complete([PROMPT], 16, stop_tokens=(), logit_bias={40: 1e5}, frequency_penalty=0.1)[0]
    assert often.tokens == [40] * 16
    with pytest.raises(ValueError, match="holds the id 264: the model has ids from 0 to 263"):
        model.complete([PROMPT], banned=[264])


def mixed_requests():
    """Requests unlike each other in length and settings."""
    random = np.random.default_rng(7)
    fields = [
        {},
        {"temperature": 1.3, "top_k": 7, "repetition_penalty": 1.2},
        {"temperature": 0.9, "min_p": 0.05, "n": 3, "frequency_penalty": 0.3},
        {"temperature": 1.0, "logprobs": 2, "banned": [[30, 31], 32]},
        {"temperature": 1.0, "max_new_tokens": 14},
    ]
    prompts = [random.integers(3, 264, n) for n in (3, 60, 17, 140, 9)]
    rows = [Settings(**{"max_new_tokens": 12, "seed": 50 + i, **f}) for i, f in enumerate(fields)]
    return prompts, rows


def test_a_request_has_the_same_answer_alone_and_in_any_batch(model):
    prompts, rows = mixed_requests()
    alone = [
        tokens
        for prompt, row in zip(prompts, rows, strict=True)
        for tokens in model.complete_tokens([prompt], settings=[row])
    ]
    assert len(alone) == 7
    assert model.complete_tokens(prompts, settings=rows) == alone
    reverse = model.complete_tokens(prompts[::-1], settings=rows[::-1], batch_size=4)
    assert sorted(map(tuple, reverse)) == sorted(map(tuple, alone))
    batch = decoding.Batch(model.engine, prompts, rows)
    while not batch.finished:
        batch.advance(3)
    assert [answer.tokens for answer in batch.answers] == alone


def test_long_prompts_are_read_in_chunks(monkeypatch):
    model = tiny("decoder_only")
    random = np.random.default_rng(2)
    prompts = [random.integers(3, 264, n) for n in (70, 3, 33)]
    settings = {"settings": SAMPLED, "max_new_tokens": 8}
    whole = model.complete_tokens(prompts, **settings)
    monkeypatch.setattr(engine, "CHUNK", 32)
    assert model.complete_tokens(prompts, **settings) == whole
    assert model.complete_tokens(prompts[:1], **settings) == whole[:1]


def test_programs_are_few_over_all_lengths(monkeypatch):
    """One program for the first chunk, one for the others, one for the first token, one for the steps, for
    each size of the cache; none for a length.
    """
    model = tiny("decoder_only")
    monkeypatch.setattr(engine, "CHUNK", 32)
    config = model.config.replace(decoder_layers=1)  # programs of its own
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(1))
    model = Model(config, params, model.vocabulary)
    before, lengths = compiled(), list(range(1, 129, 3))
    for length in lengths:
        model.complete_tokens([np.full(length, 9)], 5)
    sizes = {engine.prompt_bucket(n if n <= 32 else -(-n // 32) * 32) for n in lengths}
    assert sizes == {16, 32, 64, 96, 128}
    assert compiled() - before <= 3 * len(sizes) + 1
    before = compiled()
    for length in (2, 50, 120):
        model.complete_tokens([np.full(length, 9)], 3, seed=9, stop_tokens=[4])
    assert compiled() == before
    assert [engine.prompt_bucket(n) for n in (64, 65, 96, 97, 1537)] == [64, 96, 96, 128, 2048]
