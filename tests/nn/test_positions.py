import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.nn import platform
from t5style.nn.parameter import normal
from t5style.nn.positions import RelativeBias, relative_bucket, rotary_angles, rotary_frequencies, rotate
from t5style.nn.settings import RopeScaling
from tests.nn import rope_families


def published_bucket(distance: int, bidirectional: bool, buckets: int, max_distance: int) -> int:
    """The rule as Raffel et al. and Mesh TensorFlow state it: floor of a logarithm."""
    bucket = 0
    back = -distance
    if bidirectional:
        buckets //= 2
        bucket = buckets if back < 0 else 0
        back = abs(back)
    back = max(back, 0)
    exact = buckets // 2
    if back < exact:
        return bucket + back
    wide = exact + math.floor(
        math.log(back / exact) / math.log(max_distance / exact) * (buckets - exact) + 1e-9
    )
    return bucket + min(wide, buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (64, 256)])
def test_buckets_follow_the_published_rule(bidirectional, buckets, max_distance):
    distances = np.arange(-600, 601)
    got = relative_bucket(
        jnp.asarray(distances), bidirectional=bidirectional, buckets=buckets, max_distance=max_distance
    )
    want = [published_bucket(int(d), bidirectional, buckets, max_distance) for d in distances]
    np.testing.assert_array_equal(got, want)
    assert set(range(buckets)) >= set(np.asarray(got).tolist())


def test_buckets_of_some_distances():
    # T5's encoder, worked out by hand: 8 exact distances per direction, then each bucket is sqrt(2) wider.
    distances = jnp.array([0, -1, -7, -8, -11, -12, -90, -91, -1000, 1, 8, 1000])
    got = relative_bucket(distances, bidirectional=True, buckets=32, max_distance=128)
    np.testing.assert_array_equal(got, [0, 1, 7, 8, 8, 9, 14, 15, 15, 17, 24, 31])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 9), (9, 3), (1, 1)])
def test_bias_by_distance_equals_bias_at_positions(bidirectional, queries, keys):
    module = RelativeBias(3, 8, 20, bidirectional=bidirectional, initializer=normal(1.0))
    variables = module.init(jax.random.key(0), 4, 4, method="by_distance")
    positions = jnp.arange(queries)[None], jnp.arange(keys)[None]

    def spread(variables):
        return module.apply(variables, queries, keys, method="by_distance").dense(queries, keys)

    def at(variables):
        return module.apply(variables, *positions, method="at")

    assert spread(variables).shape == (1, 3, queries, keys)
    np.testing.assert_array_equal(spread(variables), at(variables))
    weight = jnp.sin(jnp.arange(3 * queries * keys)).reshape(1, 3, queries, keys)
    a, b = (jax.grad(lambda v, f=f: (f(v) * weight).sum())(variables) for f in (spread, at))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), a, b)


def test_rotation_keeps_lengths_and_products_depend_on_distance_only():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(1, 1, 2, 16)), jnp.float32) for _ in range(2))

    def at(vector, position):
        return rotate(vector, rotary_angles(jnp.array([[position]]), 16, 10_000.0))

    np.testing.assert_allclose(jnp.linalg.norm(at(x, 37), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    near = jnp.sum(at(x, 5) * at(y, 2), axis=-1)
    far = jnp.sum(at(x, 105) * at(y, 102), axis=-1)
    np.testing.assert_allclose(near, far, atol=1e-4)
    assert not np.allclose(near, jnp.sum(at(x, 5) * at(y, 3), axis=-1), atol=1e-3)


def test_rotation_pairs_dimensions_half_a_head_apart():
    x = jnp.zeros((1, 1, 1, 4)).at[..., 0].set(1.0)
    got = rotate(x, rotary_angles(jnp.array([[1]]), 4, 10_000.0))
    np.testing.assert_allclose(got[0, 0, 0], [math.cos(1), 0, math.sin(1), 0], atol=1e-6)
    x = jnp.zeros((1, 1, 1, 4)).at[..., 1].set(1.0)
    got = rotate(x, rotary_angles(jnp.array([[1]]), 4, 10_000.0))
    np.testing.assert_allclose(got[0, 0, 0], [0, math.cos(0.01), 0, math.sin(0.01)], atol=1e-6)


def scaling_of(name: str) -> RopeScaling | None:
    fields = rope_families.CASES[name][3]
    return None if fields is None else RopeScaling(**fields)


def check_frequencies(name, want, want_factor):
    head_dim, theta, fraction = rope_families.CASES[name][:3]
    scaling = scaling_of(name)
    got = rotary_frequencies(int(head_dim * fraction), theta, scaling)
    np.testing.assert_allclose(got, np.asarray(want, np.float32), rtol=1e-6)
    cosine, sine = rotary_angles(jnp.array([[0, 3]]), head_dim, theta, scaling, fraction)
    assert cosine.shape == sine.shape == (1, 2, 1, len(want))
    np.testing.assert_allclose(cosine[0, 0, 0], want_factor, rtol=1e-6)
    np.testing.assert_allclose(
        sine[0, 1, 0], want_factor * np.sin(3 * np.asarray(want)), rtol=2e-5, atol=1e-7
    )


@pytest.mark.parametrize("name", rope_families.CASES)
def test_frequencies_equal_what_transformers_computed(name):
    check_frequencies(name, *json.loads(rope_families.GOLDEN.read_text())[name])


@pytest.mark.parametrize("name", rope_families.CASES)
def test_frequencies_equal_transformers(name):
    pytest.importorskip("torch", reason="torch is not installed: golden numbers only")
    pytest.importorskip("transformers", reason="transformers is not installed: golden numbers only")
    check_frequencies(name, *rope_families.of_transformers(name))


def test_longrope_has_short_factors_where_no_length_is_said():
    long = scaling_of("phi_3, 4097 tokens")
    short = scaling_of("phi_3, 4096 tokens")
    unsaid = dataclasses.replace(long, length_in_use=None)
    of = [rotary_frequencies(12, 10_000.0, scaling) for scaling in (unsaid, short, long)]
    np.testing.assert_array_equal(of[0], of[1])
    assert (of[2] < of[1]).all()


@pytest.mark.parametrize("name", [name for name in rope_families.CASES if scaling_of(name)])
def test_scalings_can_be_hashed_and_survive_json(name):
    scaling = scaling_of(name)
    again = RopeScaling(**json.loads(json.dumps(dataclasses.asdict(scaling))))
    assert again == scaling
    assert hash(again) == hash(scaling)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "dynamic", "factor": 2.0}, "'dynamic' is not one of linear, llama3, yarn, longrope"),
        ({"kind": "linear", "factor": 0.5}, "factor = 0.5 must be at least 1"),
        (
            {"kind": "linear", "factor": 2.0, "beta_fast": 16.0},
            "beta_fast = 16.0 is no setting of kind 'linear'",
        ),
        ({"kind": "yarn", "factor": 2.0}, "kind 'yarn' needs original_length"),
        ({"kind": "yarn", "factor": 2.0, "original_length": 1.5}, "original_length = 1.5 must be a whole"),
        (
            {"kind": "yarn", "factor": 2.0, "original_length": 64, "beta_slow": 40.0},
            "beta_slow = 40.0 must be less than beta_fast = 32.0",
        ),
        (
            {"kind": "yarn", "factor": 2.0, "original_length": 64, "attention_factor": 0.0},
            "attention_factor = 0.0 must be positive",
        ),
        (
            {
                **{"kind": "llama3", "factor": 8.0, "original_length": 64},
                **{"low_freq_factor": 4.0, "high_freq_factor": 4.0},
            },
            "low_freq_factor = 4.0 must be less than high_freq_factor = 4.0",
        ),
        (
            {
                **{"kind": "longrope", "factor": 8.0, "original_length": 64},
                **{"short_factors": [1.0], "long_factors": [1.0, 2.0]},
            },
            "short_factors are 1 numbers and long_factors 2",
        ),
        (
            {
                **{"kind": "longrope", "factor": 8.0, "original_length": 64},
                **{"short_factors": [0.0], "long_factors": [1.0]},
            },
            "must all be positive",
        ),
    ],
)
def test_scalings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RopeScaling(**fields)


def test_factors_that_do_not_fit_the_head_are_refused():
    with pytest.raises(ValueError, match="6 short_factors and long_factors, but 16 rotated dimensions are 8"):
        rotary_frequencies(16, 10_000.0, scaling_of("phi_3, 4096 tokens"))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 1.5])
def test_fractions_that_are_no_pairs_are_refused(fraction):
    with pytest.raises(ValueError, match="must be an even number from 2 to head_dim"):
        rotary_angles(jnp.array([[0]]), 16, 10_000.0, fraction=fraction)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fraction_rotates_the_first_dimensions_as_a_narrower_head_and_leaves_the_rest(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 16)), dtype)
    positions = jnp.array([[0, 5, 6], [2, 3, 9]])
    got = rotate(x, rotary_angles(positions, 16, 10_000.0, fraction=0.25))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    want = rotate(x[..., :4], rotary_angles(positions, 4, 10_000.0))
    np.testing.assert_array_equal(got[..., :4], want)
    assert not np.allclose(np.asarray(got[:, 1:, :, :4], np.float32), np.asarray(x[:, 1:, :, :4], np.float32))


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_product_exchanges_the_halves_exactly(monkeypatch, fraction):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 16)), jnp.bfloat16)
    angles = rotary_angles(jnp.arange(10).reshape(2, 5), 16, 10_000.0, fraction=fraction)

    def both(by_product):
        monkeypatch.setattr(platform, "rotate_by_product", lambda: by_product)
        rotated, pull = jax.vjp(lambda x: rotate(x, angles, 0.25), x)
        return rotated, *pull(x)

    for product, parts in zip(both(True), both(False), strict=True):
        assert product.dtype == jnp.bfloat16
        np.testing.assert_array_equal(product, parts)
