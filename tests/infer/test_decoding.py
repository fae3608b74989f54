"""Decoding with a cache: equal to decoding without one, however prompts are padded, batched, or spread over
devices.
"""

import numpy as np
import pytest
import scipy.stats

from t5style.infer import decoding, engine
from t5style.infer.model import Model
from t5style.parallel.mesh import MeshConfig
from tests.infer.conftest import tiny

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, 264, n) for n in (3, 9, 14, 17)]


def compiled():
    """Programs compiled so far for prompts and steps."""
    return sum(p._cache_size() for p in (engine._start, engine._read, decoding._begin, decoding._advance))


def padded(rows, side):
    """Token array and mask, padded on the given side with ids that must not matter."""
    length = max(map(len, rows))
    tokens, mask = np.full((len(rows), length), 7), np.zeros((len(rows), length), int)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, where], mask[i, where] = row, 1
    return tokens, mask


def without_cache(model: Model, prompt, steps):
    """Greedy decoding by whole forward passes."""
    answer = []
    for _ in range(steps):
        if model.encoder_decoder:
            logits = model.logits([[model.ids.start, *answer]], encoder_tokens=[list(prompt)])
        else:
            logits = model.logits([[*prompt, *answer]])
        answer.append(int(np.argmax(logits[0, -1])))
    return answer


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_equals_argmax_without_a_cache(model, side):
    tokens, mask = padded(PROMPTS, side)
    new = model.generate_tokens(tokens, mask, max_new_tokens=12, stop_tokens=())
    assert new.shape == (4, 12)
    assert new.dtype == np.int32
    for row, prompt in zip(new, PROMPTS, strict=True):
        assert row.tolist() == without_cache(model, prompt, 12)
    assert len({tuple(row) for row in new.tolist()}) > 1  # the answers do depend on the prompts


def test_after_the_end_token_comes_padding(model):
    tokens, mask = padded(PROMPTS, "left")
    free = model.generate_tokens(tokens, mask, max_new_tokens=12, stop_tokens=())
    end = int(free[1, 4])
    stopped = model.generate_tokens(tokens, mask, max_new_tokens=12, stop_tokens=[end])
    several = model.generate_tokens(tokens, mask, max_new_tokens=12, stop_tokens=[end, int(free[0, 6])])
    for ends, result in (((end,), stopped), ((end, int(free[0, 6])), several)):
        for before, after in zip(free, result, strict=True):
            places = np.flatnonzero(np.isin(before, ends))
            last = places[0] if len(places) else 11
            assert after[: last + 1].tolist() == before[: last + 1].tolist()
            assert (after[last + 1 :] == model.ids.pad).all()
    assert (stopped == model.ids.pad).any()


def test_nothing_recompiles_within_a_bucket(model):
    def run(lengths, new, **settings):
        tokens, mask = padded([np.resize(PROMPTS[3], n) for n in lengths], "right")
        model.generate_tokens(tokens, mask, max_new_tokens=new, **settings)
        return compiled()

    before = run([20, 25, 31], 20)
    assert run([17, 32, 18], 32) == before
    assert run([17, 32, 18, 30], 17) == before  # 3 rows take the place of 4
    assert run([30, 30, 30], 25, stop_tokens=[9], temperature=0.0, top_k=3, seed=5) == before
    # Another bucket is other programs, one for the prompt and one for the steps: the count does count.
    assert run([33, 17, 18], 20) == before + 2
    sampled = run([20, 25, 31], 20, temperature=1.0)
    assert run([21, 26, 32], 21, temperature=0.3, seed=9) == sampled


def test_samples_follow_the_models_distribution(model):
    n, prompt = 4096, PROMPTS[0]
    if model.encoder_decoder:
        logits = model.logits([[model.ids.start]], encoder_tokens=[prompt])[0, -1]
    else:
        logits = model.logits([prompt])[0, -1]
    probabilities = np.exp(np.asarray(logits, np.float64) / 1.5)
    probabilities /= probabilities.sum()
    drawn = model.generate_tokens(np.tile(prompt, (n, 1)), max_new_tokens=1, temperature=1.5, seed=3)[:, 0]
    counts = np.bincount(drawn, minlength=264)
    common = probabilities * n >= 5
    observed = np.r_[counts[common], counts[~common].sum()]
    expected = n * np.r_[probabilities[common], probabilities[~common].sum()]
    keep = expected > 0
    assert scipy.stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3
    top = model.generate_tokens(np.tile(prompt, (512, 1)), max_new_tokens=1, temperature=1.5, top_k=4)[:, 0]
    assert set(top.tolist()) == set(np.argsort(-probabilities)[:4].tolist())


def test_a_request_gets_the_same_answer_whatever_else_is_in_the_batch(model):
    tokens, mask = padded(PROMPTS, "right")
    settings = {"max_new_tokens": 8, "temperature": 0.8, "top_p": 0.9, "stop_tokens": ()}
    together = model.generate_tokens(tokens, mask, seed=[5, 6, 7, 8], **settings)
    reverse = model.generate_tokens(tokens[::-1], mask[::-1], seed=[8, 7, 6, 5], **settings)
    assert reverse[::-1].tolist() == together.tolist()
    other = np.flip(tokens, axis=1).copy()
    other[2], other_mask = tokens[2], np.ones_like(mask)
    other_mask[2] = mask[2]
    assert (
        model.generate_tokens(other, other_mask, seed=[1, 2, 7, 3], **settings)[2].tolist()
        == together[2].tolist()
    )
    assert model.generate_tokens(tokens, mask, seed=5, **settings).tolist() == together.tolist()  # 5, 6, 7, 8
    assert model.generate_tokens(tokens, mask, seed=50, **settings).tolist() != together.tolist()


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8)])
def test_the_same_answers_on_a_mesh(model, mesh):
    import jax

    from t5style.models.params import logical_axes
    from t5style.parallel.rules import param_shardings

    built = mesh.build()
    params = jax.device_put(model.params, param_shardings(logical_axes(model.config), model.params, built))
    spread = Model(model.config, params, model.vocabulary, mesh=built)
    tokens, mask = padded(PROMPTS[:3], "left")
    expected = model.generate_tokens(tokens, mask, max_new_tokens=6, stop_tokens=())
    assert (
        spread.generate_tokens(tokens, mask, max_new_tokens=6, stop_tokens=()).tolist() == expected.tolist()
    )
    kwargs = {"encoder_tokens": tokens, "encoder_mask": mask} if model.encoder_decoder else {}
    decoder = (tokens[:, :4],) if model.encoder_decoder else (tokens, mask)
    np.testing.assert_allclose(spread.logits(*decoder, **kwargs), model.logits(*decoder, **kwargs), atol=2e-4)


def test_bfloat16_decodes_as_it_scores():
    """In bfloat16 the cached and the whole forward pass differ by rounding: the chosen token must be a
    near-best one.
    """
    kind = tiny("decoder_only")
    half = Model(kind.config.replace(dtype="bfloat16"), kind.params, kind.vocabulary)
    new = half.generate_tokens([PROMPTS[1]], max_new_tokens=8, stop_tokens=())[0]
    logits = np.asarray(half.logits([np.r_[PROMPTS[1], new[:-1]]]))[0, len(PROMPTS[1]) - 1 :]
    assert (logits.max(axis=-1) - logits[np.arange(8), new] < 0.15).all()


@pytest.mark.parametrize(
    ("tokens", "mask", "settings", "message"),
    [
        ([[1, 2], [3]], None, {}, "rows of different lengths"),
        ([1, 2], None, {}, "shape"),
        ([[1.5]], None, {}, "dtype float64"),
        ([[264]], None, {}, "holds the id 264: the model has ids from 0 to 263"),
        ([[-1]], None, {}, "holds the id -1"),
        ([[5, 6]], [[1]], {}, "mask of tokens has shape"),
        ([[5, 6], [7, 8]], [[1, 1], [0, 0]], {}, "row 1 has no real token"),
        ([[5]], None, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[5]], None, {"temperature": -1}, "temperature is -1"),
        ([[5]], None, {"top_p": 0}, "top_p is 0"),
    ],
)
def test_bad_input_is_named(model, tokens, mask, settings, message):
    with pytest.raises(ValueError, match=message):
        model.generate_tokens(tokens, mask, **settings)
