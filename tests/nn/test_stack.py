import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from t5style.models.config import REMATS
from t5style.nn.stack import repetition, run_layers, stack, unstack

LAYERS, WIDTH = 4, 16
ORDER = (("all", "one"),) * LAYERS


def layer(params, x, key, kind):
    assert kind == "one"
    hidden = jnp.tanh(checkpoint_name(x @ params["up"], "query"))
    if key is not None:
        hidden = hidden * jax.random.bernoulli(key, 0.5, hidden.shape)
    return x + jnp.sin(hidden) @ params["down"], None


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0))
    return {
        "up": jax.random.normal(keys[0], (LAYERS, WIDTH, 4 * WIDTH)) * 0.2,
        "down": jax.random.normal(keys[1], (LAYERS, 4 * WIDTH, WIDTH)) * 0.2,
    }


def loss(params, x, keys, policy, scan):
    out, _ = run_layers(layer, {"all": params}, x, order=ORDER, keys=keys, policy=policy, scan=scan)
    return (out**2).sum()


plain_gradients = jax.jit(functools.partial(jax.grad(loss), policy="none", scan=False))


@pytest.mark.parametrize("policy", REMATS)
@pytest.mark.parametrize("scan", [True, False])
def test_scan_and_remat_change_no_value(params, policy, scan):
    x = jax.random.normal(jax.random.key(1), (8, WIDTH))
    keys = jax.random.split(jax.random.key(2), LAYERS)
    want = x
    for i in range(LAYERS):
        want, _ = layer(jax.tree.map(lambda leaf, i=i: leaf[i], params), want, keys[i], "one")
    value, gradients = jax.jit(functools.partial(jax.value_and_grad(loss), policy=policy, scan=scan))(
        params, x, keys
    )
    np.testing.assert_allclose(value, (want**2).sum(), rtol=1e-5)
    plain = plain_gradients(params, x, keys)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients, plain)


def _compiled(params, policy, scan):
    step = jax.jit(functools.partial(jax.grad(loss), policy=policy, scan=scan))
    return step.lower(params, jnp.ones((4096, WIDTH)), None).compile()


def test_remat_saves_memory_in_a_scan(params):
    none, qkv, full = (
        _compiled(params, policy, True).memory_analysis().temp_size_in_bytes
        for policy in ("none", "qkv", "full")
    )
    assert full < 0.5 * qkv < 0.5 * none


def test_remat_recomputes_when_unrolled(params):
    # XLA must not merge the second computation with the first.
    none, full = (_compiled(params, policy, False).as_text().count(" tanh(") for policy in ("none", "full"))
    assert full == 2 * none


def test_unstack_is_undone_by_stack_and_has_its_gradient(params):
    parts = unstack(params)
    assert len(parts) == LAYERS
    assert parts[2]["up"].shape == (WIDTH, 4 * WIDTH)
    np.testing.assert_array_equal(parts[2]["up"], params["up"][2])
    jax.tree.map(np.testing.assert_array_equal, stack(parts), params)
    gradient = jax.grad(lambda p: sum((i + 1) * part["up"].sum() for i, part in enumerate(unstack(p))))(
        params
    )
    np.testing.assert_array_equal(gradient["up"][:, 0, 0], [1, 2, 3, 4])


def test_a_tuple_of_layers_is_run_as_it_is(params):
    x = jnp.ones((2, WIDTH))
    run = functools.partial(run_layers, layer, carry=x, order=ORDER, keys=None, policy="none", scan=True)
    apart, _ = run(params={"all": unstack(params)})
    np.testing.assert_allclose(apart, run(params={"all": params})[0], rtol=1e-5)


@pytest.mark.parametrize(
    "order", ["AAAAAA", "ABABAB", "ABBABBA", "CABBABBA", "ABC", "A", "CCABABAB", "AABAABB"]
)
@pytest.mark.parametrize("scan", [True, False])
def test_layers_of_several_kinds_run_in_their_order(order, scan):
    """Each layer notes which it is; kinds B and C have parameters of their own."""
    groups = {name: "own" if name in "BC" else "plain" for name in order}
    count = {group: [groups[kind] for kind in order].count(group) for group in groups.values()}
    params = {group: 100.0 * (group == "own") + jnp.arange(1.0, n + 1)[:, None] for group, n in count.items()}
    letters = {"A": 1.0, "B": 2.0, "C": 3.0}

    def note(tree, state, key, kind):
        place, seen = state
        seen = seen.at[place].set(jnp.stack([tree[0], letters[kind], key]))
        return (place + 1, seen), None if groups[kind] == "plain" else {
            "of": tree[0],
            "at": jnp.asarray(place),
        }

    (_, seen), outputs = jax.jit(
        lambda params: run_layers(
            note,
            params,
            (0, jnp.zeros((len(order), 3))),
            order=[(groups[kind], kind) for kind in order],
            keys=jnp.arange(len(order), dtype=jnp.float32),
            policy="none",
            scan=scan,
        )
    )(params)
    taken = {group: iter(values[:, 0]) for group, values in params.items()}
    want = [(next(taken[groups[kind]]), letters[kind], i) for i, kind in enumerate(order)]
    np.testing.assert_array_equal(seen, want)
    assert set(outputs) == set(count)
    assert outputs.get("plain") is None
    if "own" in count:
        np.testing.assert_array_equal(outputs["own"]["of"], params["own"][:, 0])
        np.testing.assert_array_equal(
            outputs["own"]["at"], [i for i, kind in enumerate(order) if kind in "BC"]
        )


@pytest.mark.parametrize(
    ("order", "found"),
    [("AAAA", (0, 1, 4)), ("ABABA", (0, 2, 2)), ("CAAA", (1, 1, 3)), ("ABC", (0, 1, 0)), ("A", (0, 1, 0))],
)
def test_what_repeats_is_found(order, found):
    assert repetition(tuple(order)) == found
