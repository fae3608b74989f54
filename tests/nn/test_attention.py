import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.nn import platform
from t5style.nn.attention import Dropout, attention, cached_attention, mask_bias

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 10, 12, 4, 8
# Packed rows: two examples and padding at the end; padding on the left.
QUERY_SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
KEY_SEGMENTS = np.array([[1] * 5 + [2] * 5 + [0] * 2, [0] * 4 + [1] * 8], np.int32)


def by_hand(query, key, value, bias, query_segments, key_segments, causal, scale):
    """The definition, one query at a time, in float64."""
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for b, i, h in np.ndindex(*query.shape[:3]):
        seen = np.ones(key.shape[1], bool)
        if query_segments is not None:
            seen &= (key_segments[b] == query_segments[b, i]) & (key_segments[b] > 0)
        if causal:
            seen &= np.arange(key.shape[1]) <= i
        if not seen.any():
            continue
        scores = scale * key[b, seen, h // group] @ query[b, i, h]
        if bias is not None:
            scores = scores + bias[0, h, i, seen]
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ value[b, seen, h // group]
    return out


def make(kind, kv_heads, dtype=np.float32):
    """Arguments of attention for packed self-attention (full or causal) or packed cross-attention."""
    rng = np.random.default_rng(7)
    keys = KEYS if kind == "cross" else QUERIES
    arrays = {
        "query": rng.normal(size=(BATCH, QUERIES, HEADS, WIDTH)),
        "key": rng.normal(size=(BATCH, keys, kv_heads, WIDTH)),
        "value": rng.normal(size=(BATCH, keys, kv_heads, WIDTH)),
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


@pytest.mark.parametrize("implementation", ["cpu", "dot_product"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["full", "causal", "cross"])
def test_values_and_gradients_equal_the_references(monkeypatch, kind, kv_heads, implementation):
    monkeypatch.setattr(platform, "CAUSAL_BLOCK", 4)  # of ten queries
    arrays, bias, masks = make(kind, kv_heads)
    real = jnp.asarray(QUERY_SEGMENTS > 0)[:, :, None, None]
    weights = jnp.cos(jnp.arange(WIDTH))  # a loss that is no plain sum, of real positions only

    def run(name):
        def loss(arrays, bias):
            out = jnp.where(real, attention(**arrays, bias=bias, **masks, scale=0.3, implementation=name), 0)
            return (out * weights).sum() + (out**2).sum(), out

        argnums = 0 if bias is None else (0, 1)
        return jax.jit(jax.value_and_grad(loss, argnums=argnums, has_aux=True))(arrays, bias)

    (_, want), want_gradients = run("reference")
    (_, got), got_gradients = run(implementation)
    np.testing.assert_allclose(got, want, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got_gradients, want_gradients)


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
def test_bfloat16_stays_near_float32(implementation):
    arrays, bias, masks = make("causal", 2)
    want = attention(**arrays, bias=bias, **masks, scale=0.3, implementation="reference")
    half = {name: value.astype(jnp.bfloat16) for name, value in arrays.items()}
    got = attention(**half, bias=bias, **masks, scale=0.3, implementation=implementation)
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
    assert asked == ["cudnn"]


def test_heads_that_do_not_divide_are_refused():
    arrays, _, _ = make("full", 3)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        attention(**arrays)


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
    ("kind", "dropout", "chosen"),
    [
        ("cpu", False, "cpu"),
        ("cpu", True, "reference"),
        ("gpu", False, "reference"),
        ("gpu", True, "reference"),
        ("tpu", False, "reference"),
    ],
)
def test_auto_chooses_by_platform_and_never_what_cannot_drop_weights(monkeypatch, kind, dropout, chosen):
    monkeypatch.setattr(platform, "platform", lambda: kind)
    assert platform.attention_implementation(dropout=dropout) == chosen
