import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.nn.parameter import normal
from t5style.nn.positions import RelativeBias, relative_bucket, rotary_angles, rotate


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
def test_bias_between_indices_equals_bias_at_positions(bidirectional, queries, keys):
    module = RelativeBias(3, 8, 20, bidirectional=bidirectional, initializer=normal(1.0))
    variables = module.init(jax.random.key(0), 4, 4, method="between")
    positions = jnp.arange(queries)[None], jnp.arange(keys)[None]
    want = module.apply(variables, *positions, method="at")
    got = module.apply(variables, queries, keys, method="between")
    assert got.shape == (1, 3, queries, keys)
    np.testing.assert_array_equal(got, want)

    def gradient(method, *args):
        weight = jnp.sin(jnp.arange(3 * queries * keys)).reshape(1, 3, queries, keys)
        return jax.grad(lambda v: (module.apply(v, *args, method=method) * weight).sum())(variables)

    a, b = gradient("between", queries, keys), gradient("at", *positions)
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
