import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.models.params import logical_axes
from t5style.models.transformer import Transformer
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import param_shardings, use_mesh
from tests.models.tiny import KINDS, LLAMA, T5, params_of, runner, tokens_of

ENCODER, DECODER = 11, 9


def inputs(config, seed=0, rows=2):
    decoder = tokens_of(config, rows, DECODER, seed)
    if not config.encoder_layers:
        return {"decoder_input_tokens": decoder}
    return {
        "decoder_input_tokens": decoder,
        "encoder_input_tokens": tokens_of(config, rows, ENCODER, seed + 1),
    }


def call(config, params, arrays):
    return np.asarray(runner(config)(params, **arrays))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_give_what_they_give_alone(kind):
    config = KINDS[kind]
    params = params_of(config)
    lengths = {"decoder": (4, 3), "encoder": (5, 6)}
    alone, packed = [{}, {}], {}
    for side, (first, second) in lengths.items():
        if side == "encoder" and not config.encoder_layers:
            continue
        room = {"decoder": DECODER, "encoder": ENCODER}[side]
        one, two = (tokens_of(config, 1, n, seed) for n, seed in ((first, 3), (second, 4)))
        tail = room - first - second
        packed[f"{side}_input_tokens"] = np.concatenate([one, two, np.zeros((1, tail), np.int32)], axis=1)
        packed[f"{side}_segment_ids"] = np.array([[1] * first + [2] * second + [0] * tail], np.int32)
        packed[f"{side}_positions"] = np.array([[*range(first), *range(second), *[0] * tail]], np.int32)
        for arrays, example, length in ((alone[0], one, first), (alone[1], two, second)):
            # Alone, but at the same lengths (one compiled program): padded on the right.
            arrays[f"{side}_input_tokens"] = np.pad(example, ((0, 0), (0, room - length)))
            arrays[f"{side}_segment_ids"] = (np.arange(room) < length).astype(np.int32)[None]
    got = call(config, params, packed)
    first, second = lengths["decoder"]
    np.testing.assert_allclose(got[0, :first], call(config, params, alone[0])[0, :first], atol=1e-5)
    np.testing.assert_allclose(
        got[0, first : first + second], call(config, params, alone[1])[0, :second], atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_left_and_right_padding_change_nothing(kind):
    config = KINDS[kind]
    params = params_of(config)
    short = tokens_of(config, 1, 6, 5)
    plain = {"decoder_input_tokens": short}
    padded = {
        # Row 0 padded on the right, row 1 on the left, with junk.
        "decoder_input_tokens": np.concatenate([np.pad(short, ((0, 0), (0, 3)), constant_values=9),
                                                np.pad(short, ((0, 0), (3, 0)), constant_values=9)]),
        "decoder_segment_ids": np.array([[1] * 6 + [0] * 3, [0] * 3 + [1] * 6], np.int32),
        "decoder_positions": np.array([[*range(6), 0, 0, 0], [0, 0, 0, *range(6)]], np.int32),
    }  # fmt: skip
    if config.encoder_layers:
        source = tokens_of(config, 1, 7, 6)
        plain["encoder_input_tokens"] = source
        padded["encoder_input_tokens"] = np.concatenate(
            [
                np.pad(source, ((0, 0), (4, 0)), constant_values=8),
                np.pad(source, ((0, 0), (0, 4)), constant_values=8),
            ]
        )
        padded["encoder_segment_ids"] = np.array([[0] * 4 + [1] * 7, [1] * 7 + [0] * 4], np.int32)
    want, got = call(config, params, plain), call(config, params, padded)
    np.testing.assert_allclose(got[0, :6], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1, 3:], want[0], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decoder_is_causal_and_uses_all_it_may(kind):
    config = KINDS[kind]
    arrays = inputs(config)
    before = call(config, params_of(config), arrays)
    changed = arrays["decoder_input_tokens"].copy()
    changed[:, 5] = (changed[:, 5] + 7) % config.vocab_size
    after = call(config, params_of(config), arrays | {"decoder_input_tokens": changed})
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(-1) > 1e-4).all()
    if config.encoder_layers:
        source = arrays["encoder_input_tokens"].copy()
        source[:, -1] = (source[:, -1] + 7) % config.vocab_size
        after = call(config, params_of(config), arrays | {"encoder_input_tokens": source})
        assert (np.abs(before - after).max(-1) > 1e-5).all()  # every position sees the encoder's last token


@functools.cache
def _loss_and_gradients(config, kind):
    arrays = inputs(KINDS[kind])

    def loss(params):
        logits = Transformer(config).apply({"params": params}, **arrays)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3])

    return jax.jit(jax.value_and_grad(loss))(params_of(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": True, "remat": "qkv"},
        {"scan_layers": False, "remat": "full"},
        {"attention": "reference"},
        {"attention": "dot_product", "remat": "dots"},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_no_value_nor_gradient(kind, changes):
    config = KINDS[kind]
    value, gradients = _loss_and_gradients(config.replace(**changes), kind)
    want, want_gradients = _loss_and_gradients(config, kind)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=2e-4), gradients, want_gradients
    )
    assert all(
        np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(want_gradients)
    )  # every parameter takes part


def test_dropout_needs_its_key_follows_it_and_is_off_when_deterministic():
    config = T5.replace(dropout=0.3)
    params, arrays = params_of(T5), inputs(T5)

    @functools.partial(jax.jit, static_argnames="scan")
    def run(key, scan):
        module = Transformer(config.replace(scan_layers=scan))
        return module.apply({"params": params}, **arrays, deterministic=False, rngs={"dropout": key})

    one, two = (jax.random.key(seed, impl="rbg") for seed in (1, 2))  # much quicker to compile than threefry
    np.testing.assert_allclose(run(one, False), run(one, True), atol=1e-5)  # scanned: the same masks
    assert not np.allclose(run(one, False), run(two, False))
    np.testing.assert_array_equal(call(config, params, arrays), call(T5, params, arrays))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32_and_logits_are_float32(kind):
    config = KINDS[kind]
    params, arrays = params_of(config), inputs(config)
    want = call(config, params, arrays)
    got = runner(config.replace(dtype="bfloat16"))(params, **arrays)
    assert got.dtype == jnp.float32
    assert np.abs(np.asarray(got) - want).max() < 0.05 * np.abs(want).max()


def test_a_mesh_changes_no_logit():
    config = T5.replace(vocab_size=64)
    params, arrays = params_of(config), inputs(config, rows=4)
    want = call(config, params, arrays)
    devices = MeshConfig(data=2, fsdp=2, tensor=2).build()
    sharded = jax.device_put(params, param_shardings(logical_axes(config), params, devices))
    with use_mesh(devices):
        got = runner(config)(sharded, **arrays)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_tied_scaled_logits_are_those_of_the_embedding():
    config = LLAMA.replace(scale_logits=True)
    params = params_of(config)
    hidden = jax.random.normal(jax.random.key(3), (2, 3, config.d_model))
    got = runner(config, "logits")(params, hidden)
    np.testing.assert_allclose(got, hidden / 4 @ params["embedding"].T, atol=1e-5)  # 4 = sqrt(d_model)


@pytest.mark.parametrize(
    ("config", "arrays", "message"),
    [
        (T5, {"decoder_input_tokens": np.zeros((1, 2), np.int32)}, "needs encoder_input_tokens"),
        (LLAMA, inputs(T5), "takes no encoder_input_tokens"),
    ],
)  # fmt: skip
def test_inputs_of_the_other_architecture_are_refused(config, arrays, message):
    with pytest.raises(ValueError, match=message):
        Transformer(config).apply({"params": params_of(config)}, **arrays)


def test_encode_of_a_decoder_only_model_is_refused():
    with pytest.raises(ValueError, match="has no encoder"):
        Transformer(LLAMA).apply({"params": params_of(LLAMA)}, np.zeros((1, 2), np.int32), method="encode")
