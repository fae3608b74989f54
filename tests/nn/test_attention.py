import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5style.nn import attention_cpu, platform
from t5style.nn.attention import Dropout, attention, cached_attention, mask_bias

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 10, 12, 4, 8
# Packed rows: two examples and padding at the end; padding on the left.
QUERY_SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
KEY_SEGMENTS = np.array([[1] * 5 + [2] * 5 + [0] * 2, [0] * 4 + [1] * 8], np.int32)


SINKS = jnp.asarray([0.5, -1.0, 2.0, 0.0])
# name: kind of attention, width of values, what else it does.
EXTRAS = {
    "window": ("causal", WIDTH, {"window": 3}),
    "window both ways": ("full", WIDTH, {"window": 3}),
    "softcap": ("causal", WIDTH, {"softcap": 0.7}),
    "sinks": ("full", WIDTH, {"sinks": SINKS}),
    "narrow values": ("cross", 5, {}),
    "wide values and all": ("causal", 11, {"window": 5, "softcap": 0.7, "sinks": SINKS}),
}


def by_hand(
    query,
    key,
    value,
    bias,
    query_segments,
    key_segments,
    causal,
    scale,
    window=None,
    softcap=None,
    sinks=None,
):
    """The definition, one query at a time, in float64."""
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    group = query.shape[2] // key.shape[2]
    for b, i, h in np.ndindex(*query.shape[:3]):
        seen = np.ones(key.shape[1], bool)
        if query_segments is not None:
            seen &= (key_segments[b] == query_segments[b, i]) & (key_segments[b] > 0)
        if causal:
            seen &= np.arange(key.shape[1]) <= i
        if window is not None:
            seen &= np.abs(np.arange(key.shape[1]) - i) < window
        if not seen.any():
            continue
        scores = scale * key[b, seen, h // group] @ query[b, i, h]
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[0, h, i, seen]
        weights = np.exp(scores - scores.max())
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[h] - scores.max()))
        out[b, i, h] = weights / total @ value[b, seen, h // group]
    return out


def make(kind, kv_heads, dtype=np.float32, value_width=WIDTH):
    """Arguments of attention for packed self-attention (full or causal) or packed cross-attention."""
    rng = np.random.default_rng(7)
    keys = KEYS if kind == "cross" else QUERIES
    arrays = {
        "query": rng.normal(size=(BATCH, QUERIES, HEADS, WIDTH)),
        "key": rng.normal(size=(BATCH, keys, kv_heads, WIDTH)),
        "value": rng.normal(size=(BATCH, keys, kv_heads, value_width)),
    }
    arrays = {name: jnp.asarray(value, dtype) for name, value in arrays.items()}
    bias = None if kind == "cross" else jnp.asarray(rng.normal(size=(1, HEADS, QUERIES, keys)), jnp.float32)
    masks = {
        "query_segments": QUERY_SEGMENTS,
        "key_segments": KEY_SEGMENTS if kind == "cross" else QUERY_SEGMENTS,
        "causal": kind == "causal",
    }
    return arrays, bias, masks


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["full", "causal", "cross"])
def test_reference_is_the_definition(kind, kv_heads):
    arrays, bias, masks = make(kind, kv_heads)
    got = attention(**arrays, bias=bias, **masks, scale=0.3, implementation="reference")
    want = by_hand(*(np.asarray(a, np.float64) for a in arrays.values()), bias, *masks.values(), 0.3)
    real = QUERY_SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-6)


def test_reference_without_masks_is_the_definition():
    arrays, bias, _ = make("full", 4)
    got = attention(**arrays, bias=bias, implementation="reference")
    want = by_hand(*(np.asarray(a, np.float64) for a in arrays.values()), bias, None, None, False, 1.0)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("name", EXTRAS)
def test_reference_with_more_settings_is_the_definition(name):
    kind, width, extras = EXTRAS[name]
    arrays, bias, masks = make(kind, 2, value_width=width)
    got = attention(**arrays, bias=bias, **masks, scale=0.3, **extras, implementation="reference")
    exact = (np.asarray(a, np.float64) for a in arrays.values())
    want = by_hand(*exact, bias, *masks.values(), 0.3, **extras)
    real = QUERY_SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_a_sink_is_a_key_without_a_value(implementation):
    arrays, _, _ = make("full", 4)

    def with_sinks(arrays, sinks):
        out = attention(**arrays, sinks=sinks, implementation=implementation)
        return (out * jnp.cos(jnp.arange(WIDTH))).sum()

    def with_keys(arrays, sinks):
        bias = jnp.zeros((1, HEADS, QUERIES, QUERIES + 1)).at[..., -1].set(sinks[:, None])
        none = {name: jnp.pad(arrays[name], ((0, 0), (0, 1), (0, 0), (0, 0))) for name in ("key", "value")}
        out = attention(arrays["query"], **none, bias=bias, implementation="reference")
        return (out * jnp.cos(jnp.arange(WIDTH))).sum()

    got = jax.value_and_grad(with_sinks, argnums=(0, 1))(arrays, SINKS)
    want = jax.value_and_grad(with_keys, argnums=(0, 1))(arrays, SINKS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def both(kind, kv_heads, value_width, extras, implementation):
    """Value and gradients of a loss, of the reference and of an implementation."""
    arrays, bias, masks = make(kind, kv_heads, value_width=value_width)
    real = jnp.asarray(QUERY_SEGMENTS > 0)[:, :, None, None]
    weights = jnp.cos(jnp.arange(value_width))  # a loss that is no plain sum, of real positions only
    learned = {"bias": bias, "sinks": extras.get("sinks")}
    learned = {name: array for name, array in learned.items() if array is not None}
    settings = {**masks, **extras, "scale": 0.3}

    def run(name):
        def loss(arrays, learned):
            out = attention(**arrays, **{**settings, **learned}, implementation=name)
            out = jnp.where(real, out, 0)
            return (out * weights).sum() + (out**2).sum(), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(arrays, learned)

    return run("reference"), run(implementation)


def check_both(want, got):
    np.testing.assert_allclose(got[0][1], want[0][1], atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got[1], want[1])


@pytest.mark.parametrize("implementation", ["cpu", "dot_product"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["full", "causal", "cross"])
def test_values_and_gradients_equal_the_references(monkeypatch, kind, kv_heads, implementation):
    monkeypatch.setattr(platform, "CAUSAL_BLOCK", 4)  # of ten queries
    check_both(*both(kind, kv_heads, WIDTH, {}, implementation))


@pytest.mark.parametrize("name", EXTRAS)
def test_values_and_gradients_with_more_settings_equal_the_references(monkeypatch, name):
    monkeypatch.setattr(platform, "CAUSAL_BLOCK", 4)
    kind, width, extras = EXTRAS[name]
    check_both(*both(kind, 2, width, extras, "cpu"))


def test_what_the_library_has_not_is_computed_by_the_reference():
    kind, width, extras = EXTRAS["wide values and all"]
    check_both(*both(kind, 2, width, extras, "dot_product"))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_that_reaches_everything_changes_nothing(implementation, causal):
    arrays, bias, _ = make("full", 4)
    settings = {"bias": bias, "causal": causal, "implementation": implementation}
    want = attention(**arrays, **settings)
    np.testing.assert_allclose(attention(**arrays, **settings, window=QUERIES), want, atol=1e-6)
    assert not np.allclose(attention(**arrays, **settings, window=QUERIES - 1), want, atol=1e-6)


@hypothesis.settings(deadline=None)
@given(
    length=st.integers(1, 60),
    block=st.integers(1, 20),
    window=st.none() | st.integers(1, 70),
    causal=st.booleans(),
)
def test_blocks_hold_the_keys_that_some_query_sees_and_no_others(length, block, window, causal):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "CAUSAL_BLOCK", block)
        found = attention_cpu.visible_blocks(length, causal=causal, window=window)
    assert [i for start, end, _, _ in found for i in range(start, end)] == list(range(length))
    behind = np.arange(length)[:, None] - np.arange(length)  # how far key j is behind query i
    visible = np.abs(behind) < (length if window is None else window)
    if causal:
        visible &= behind >= 0
    for start, end, first, last in found:
        np.testing.assert_array_equal(np.flatnonzero(visible[start:end].any(axis=0)), np.arange(first, last))


def test_keys_before_a_window_are_not_multiplied(monkeypatch):
    monkeypatch.setattr(platform, "CAUSAL_BLOCK", 4)
    arrays, _, masks = make("causal", 4)

    def keys_of_products(**extras):
        program = jax.make_jaxpr(lambda a: attention(**a, **masks, implementation="cpu", **extras))(arrays)
        return str(program).count("f32[2,2,10]")

    # Scores `[batch, queries, keys]` of the last block: two queries and all 10 keys, or 4 of them.
    assert keys_of_products() > 0
    assert keys_of_products(window=3) == 0


@pytest.mark.parametrize("implementation", ["reference", "cpu", "dot_product"])
def test_nothing_leaks_between_segments_nor_from_padding_nor_from_the_future(implementation):
    arrays, bias, masks = make("causal", 4)
    out = attention(**arrays, bias=bias, **masks, implementation=implementation)
    disturbed = dict(arrays)
    # Row 0: the second example and the padding; row 1: the padding on the left and the last token.
    other = jnp.asarray(np.array([[0] * 4 + [1] * 6, [1, 1] + [0] * 7 + [1]], bool))[:, :, None, None]
    for name in ("key", "value"):
        disturbed[name] = jnp.where(other, 1e3, arrays[name])
    again = attention(**disturbed, bias=bias, **masks, implementation=implementation)
    np.testing.assert_array_equal(out[0, :4], again[0, :4])
    np.testing.assert_array_equal(out[1, 2:9], again[1, 2:9])
    assert not np.allclose(out[0, 4:8], again[0, 4:8])


@pytest.mark.parametrize("implementation", ["reference", "cpu", "dot_product"])
def test_rows_that_see_nothing_are_finite_with_finite_gradients(implementation):
    arrays, bias, _ = make("full", 4)
    nothing = np.zeros_like(QUERY_SEGMENTS)

    def loss(arrays):
        return attention(
            **arrays, bias=bias, query_segments=nothing, key_segments=nothing, implementation=implementation
        ).sum()

    value, gradients = jax.value_and_grad(loss)(arrays)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("extras", [{}, EXTRAS["wide values and all"][2]], ids=["plain", "all"])
def test_bfloat16_stays_near_float32(implementation, extras):
    arrays, bias, masks = make("causal", 2)
    settings = {"bias": bias, **masks, "scale": 0.3, **extras}
    want = attention(**arrays, **settings, implementation="reference")
    half = {name: value.astype(jnp.bfloat16) for name, value in arrays.items()}
    got = attention(**half, **settings, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    real = QUERY_SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got, np.float32)[real], np.asarray(want)[real], atol=0.04)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_dropout_keeps_the_mean_and_follows_the_key(implementation):
    arrays, bias, masks = make("causal", 4)

    @jax.jit
    def run(key):
        return attention(
            **arrays, bias=bias, **masks, dropout=Dropout(0.4, key), implementation=implementation
        )

    plain = attention(**arrays, bias=bias, **masks, implementation=implementation)
    many = jax.vmap(run)(jax.random.split(jax.random.key(0), 3000))
    real = QUERY_SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(many.mean(0))[real], np.asarray(plain)[real], atol=0.15)
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"implementation": "dot_product", "dropout": Dropout(0.1, jax.random.key(0))},
            "cannot drop attention weights",
        ),
        ({"implementation": "flash"}, "'flash' is not one of"),
        ({"query_segments": None}, "both query_segments and key_segments"),
        ({"window": 0}, "window = 0 must be at least 1"),
        ({"softcap": -1.0}, "softcap = -1.0 must be positive"),
        ({"sinks": jnp.zeros(3)}, r"sinks \(3,\) must be one number for each of 4 query heads"),
        ({"value": jnp.zeros((BATCH, QUERIES + 1, 4, WIDTH))}, "must be alike in batch, length"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message):
    arrays, bias, masks = make("full", 4)
    with pytest.raises(ValueError, match=message):
        attention(**{**arrays, "bias": bias, **masks, **changes})


def test_cudnn_is_asked_for_what_it_takes_and_the_reference_computes_the_rest(monkeypatch):
    asked, library = [], jax.nn.dot_product_attention

    def record(*args, implementation=None, **kwargs):
        asked.append(implementation)
        return library(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    monkeypatch.setattr(platform, "has_cudnn_attention", lambda: True)
    arrays, bias, masks = make("causal", 2)  # even lengths, 8 wide
    half = {name: jnp.asarray(array, jnp.bfloat16) for name, array in arrays.items()}
    settings = {"bias": bias, **masks, "scale": 0.3}
    got = attention(**half, **settings, implementation="dot_product")
    assert asked == ["cudnn"]
    want = attention(**half, **settings, implementation="reference")
    real = QUERY_SEGMENTS > 0
    np.testing.assert_allclose(
        np.asarray(got, np.float32)[real], np.asarray(want, np.float32)[real], atol=0.03
    )
    odd = {name: array[:, :-1] for name, array in half.items()}
    narrow = {name: array[..., :-1] for name, array in half.items()}
    for others, precision in ((arrays, "default"), (half, "highest"), (narrow, "default"), (odd, "default")):
        attention(**others, causal=True, implementation="dot_product", precision=precision)
    wide = {**half, "value": jnp.concatenate([half["value"]] * 2, axis=-1)}
    for others, extras in ((half, {"softcap": 1.0}), (half, {"sinks": SINKS}), (wide, {})):
        attention(**others, causal=True, implementation="dot_product", **extras)
    assert asked == ["cudnn"]


def test_heads_that_do_not_divide_are_refused():
    arrays, _, _ = make("full", 3)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attention(**arrays)


@pytest.mark.parametrize("limit", [{"causal": True}, {"window": 3}])
def test_limits_along_the_sequence_are_refused_across_sequences(limit):
    arrays, _, _ = make("cross", 4)
    with pytest.raises(ValueError, match="count along one sequence, but there are 10 queries and 12 keys"):
        attention(**arrays, **limit)


@pytest.mark.parametrize("name", EXTRAS)
def test_cached_attention_with_more_settings_equals_the_reference(name):
    kind, width, extras = EXTRAS[name]
    arrays, bias, masks = make(kind, 2, value_width=width)
    want = attention(**arrays, bias=bias, **masks, scale=0.3, **extras, implementation="reference")
    others = {name: value for name, value in extras.items() if name != "window"}
    mask = mask_bias(**masks, queries=QUERIES, keys=arrays["key"].shape[1], window=extras.get("window"))
    key, value = (arrays[name].swapaxes(1, 2) for name in ("key", "value"))
    visible = (mask == 0)[:, 0]
    got = cached_attention(arrays["query"], key, value, visible, bias=bias, scale=0.3, **others)
    real = QUERY_SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=2e-6)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cached_attention_equals_the_reference(kv_heads):
    arrays, bias, masks = make("causal", kv_heads)
    want = attention(**arrays, bias=bias, **masks, scale=0.3, implementation="reference")
    mask = mask_bias(QUERY_SEGMENTS, QUERY_SEGMENTS, causal=True, queries=QUERIES, keys=QUERIES)
    key, value = (arrays[name].swapaxes(1, 2) for name in ("key", "value"))
    got = cached_attention(arrays["query"], key, value, (mask == 0)[:, 0], bias=bias, scale=0.3)
    real = QUERY_SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "dropout", "kernels", "keys", "chosen"),
    [
        ("cpu", False, ["splash", "whole"], 512, "cpu"),
        ("cpu", True, [], 512, "reference"),
        ("gpu", False, [], 512, "reference"),
        ("gpu", True, [], 512, "reference"),
        ("tpu", False, ["splash", "whole"], 512, "splash"),
        ("tpu", False, ["whole"], 512, "whole"),
        ("tpu", False, [], 512, "reference"),
        ("tpu", False, ["splash", "whole"], 114, "whole"),
        ("tpu", False, ["splash", "whole"], 1, "reference"),
    ],
)
def test_auto_chooses_by_platform_and_what_can_be_computed(monkeypatch, kind, dropout, kernels, keys, chosen):
    monkeypatch.setattr(platform, "platform", lambda: kind)
    settings = {"dropout": dropout, "kernels": kernels, "queries": 512, "keys": keys}
    assert platform.attention_implementation(**settings) == chosen
