import jax
import numpy as np
import pytest

from t5style.models.cache import init_cache
from t5style.models.params import unstack_layers
from tests.models.tiny import KINDS, LLAMA, T5, params_of, runner, tokens_of

SLOTS, LENGTH, SOURCE = 12, 10, 7


def setup(kind, rows=3, dtype=None):
    """params, decoder tokens, logits of whole rows without a cache, a function making an empty cache."""
    config = KINDS[kind]
    params = params_of(config)
    tokens = tokens_of(config, rows, LENGTH)
    arrays, extra = {}, {}
    if config.encoder_layers:
        source = tokens_of(config, rows, SOURCE, 1)
        segments = (np.arange(SOURCE) < np.array([SOURCE, 4, 6])[:rows, None]).astype(np.int32)
        arrays = {"encoder_input_tokens": source, "encoder_segment_ids": segments}
        encoded = runner(config, "encode")(params, source, segment_ids=segments)
        extra = {"params": params, "encoded": encoded, "encoder_segment_ids": segments}
    want = np.asarray(runner(config)(params, tokens, **arrays))
    return config, params, tokens, want, lambda: init_cache(config, rows, SLOTS, dtype=dtype, **extra)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [(1,) * LENGTH, (6, 1, 1, 1, 1), (4, 4, 2)], ids=str)
def test_decoding_in_pieces_equals_the_forward_pass_at_every_position(kind, pieces):
    config, params, tokens, want, empty = setup(kind)
    decode, cache, start = runner(config, "decode"), empty(), 0
    params = unstack_layers(params) if pieces[0] == 1 else params  # both layouts of the layers
    for piece in pieces:
        logits, cache = decode(params, tokens[:, start : start + piece], cache)
        np.testing.assert_allclose(logits, want[:, start : start + piece], atol=1e-5)
        start += piece
    assert int(cache["slot"]) == LENGTH
    np.testing.assert_array_equal(cache["length"], [LENGTH] * 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths_in_one_batch(kind, side):
    config, params, tokens, want, empty = setup(kind)
    lengths, room = np.array([5, 2, 3]), 5
    prompt = np.full((3, room), 7, np.int32)  # junk where there is padding
    valid = np.zeros((3, room), np.int32)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(room - length, room)
        prompt[row, place], valid[row, place] = tokens[row, :length], 1
    decode = runner(config, "decode")
    logits, cache = decode(params, prompt, empty(), valid=valid)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(np.asarray(logits)[row, valid[row] > 0], want[row, :length], atol=1e-5)
    for step in range(4):
        now = lengths + step
        logits, cache = decode(params, tokens[np.arange(3), now][:, None], cache)
        np.testing.assert_allclose(np.asarray(logits)[:, 0], want[np.arange(3), now], atol=1e-5)
    np.testing.assert_array_equal(cache["length"], lengths + 4)


def test_cache_layout_and_dtype():
    cache = init_cache(LLAMA, 3, SLOTS, dtype="bfloat16")
    assert len(cache["layers"]) == LLAMA.decoder_layers
    assert {leaf.shape for leaf in jax.tree.leaves(cache["layers"])} == {
        (3, 2, SLOTS, 4)
    }  # kv heads before slots
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(cache["layers"])} == {"bfloat16"}
    assert str(init_cache(LLAMA.replace(dtype="float32"), 1, 1)["layers"][0]["key"].dtype) == "float32"


def test_a_bfloat16_cache_is_near():
    config, params, tokens, want, empty = setup("llama", dtype="bfloat16")
    logits, cache = runner(config, "decode")(params, tokens, empty())
    assert str(cache["layers"][0]["key"].dtype) == "bfloat16"
    assert 0 < np.abs(np.asarray(logits) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (LLAMA, {"batch": 0, "max_length": 3}, "0 rows and 3 slots"),
        (T5, {"batch": 2, "max_length": 3}, "needs params and encoded"),
        (LLAMA, {"batch": 2, "max_length": 3, "encoded": np.zeros((2, 3, 16))}, "takes no encoded inputs"),
        (
            T5,
            {"batch": 2, "max_length": 3, "params": {}, "encoded": np.zeros((4, 3, 16))},
            "4 rows and the cache 2",
        ),
    ],
)
def test_a_cache_that_cannot_be_is_refused(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        init_cache(config, **arguments)
