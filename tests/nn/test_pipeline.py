"""The pipeline with layers of one product: schedules, what travels, parameters and outputs in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.nn.pipeline import Schedule, check, deal, run_stack, schedule
from t5style.nn.settings import Pipeline
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import use_mesh

ROWS, LENGTH, WIDTH = 16, 2, 4
MESHES = {stages: MeshConfig(data=8 // stages, stage=stages) for stages in (1, 2, 4)}


def layer(params, x, shared, key, kind):
    """Uses all that a layer may get: what travels, is looked up by row, is whole, a key; gives a sum over
    rows."""
    y = jnp.sin(x @ params["kernel"]) + shared["encoded"].mean(axis=1, keepdims=True) * shared["whole"]
    y = y * shared["segments"][..., None] * (2.0 if kind == "b" else 1.0)
    if key is not None:
        y = y + 0.1 * jax.random.normal(key, ())
    return x + y, {"sum": y.sum()}


def inputs(layers):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    # Small weights: of large ones eight layers of sines would make chaos of the last bits.
    params = {"layers": {"kernel": 0.3 * draw(layers, WIDTH, WIDTH)}}
    shared = {"encoded": draw(ROWS, 3, WIDTH), "whole": draw(1, 1, WIDTH), "none": None}
    shared["segments"] = rng.integers(0, 2, (ROWS, LENGTH)).astype(np.int32)
    return params, draw(ROWS, LENGTH, WIDTH), shared


def run(stages, pipeline, order, keys=None, scan=True, policy="none"):
    """A loss, its gradients, the outputs; with the parameters where they are stored."""
    params, x, shared = inputs(len(order))
    mesh = MESHES[stages].build()
    where = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("stage"))
    params = jax.device_put(params, where)
    order = [("layers", kind) for kind in order]

    def loss(params, x, encoded, whole):
        got, outputs = run_stack(
            layer,
            params,
            x,
            shared | {"encoded": encoded, "whole": whole},
            order=order,
            keys=keys,
            policy=policy,
            scan=scan,
            pipeline=pipeline,
        )
        weight = jnp.arange(ROWS * LENGTH * WIDTH).reshape(got.shape)
        return (weight * got).mean() + (outputs["layers"]["sum"] ** 2).sum(), (got, outputs)

    with use_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
        return jax.device_get(step(params, x, shared["encoded"], shared["whole"]))


alone = functools.cache(lambda order: run(1, Pipeline(), order))


@pytest.mark.parametrize(
    ("stages", "pipeline", "order", "scan"),
    [
        (2, Pipeline(), "aaaa", True),
        (4, Pipeline(8), "aaaa", True),
        (2, Pipeline(4, repeats=2), "abababab", True),
        (4, Pipeline(4), "abababab", False),
        (2, Pipeline(8, repeats=4), "aaaaaaaa", True),
        (4, Pipeline(8, repeats=2, remat="both"), "aaaaaaaa", True),
        (4, Pipeline(repeats=2, remat="iteration"), "aaaaaaaa", True),
    ],
    ids=str,
)
def test_values_outputs_and_gradients_are_those_of_layers_in_turn(stages, pipeline, order, scan):
    policy = "none" if pipeline.remat == "layer" else "full"
    got = run(stages, pipeline, order, scan=scan, policy=policy)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), got, alone(order))


def test_a_batch_that_does_not_divide_runs_layer_by_layer():
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4),
        run(2, Pipeline(6), "aaaa"),
        alone("aaaa"),
    )


def test_each_layer_and_microbatch_draws_its_own_numbers():
    keys = jax.random.split(jax.random.key(0), 4)
    (_, (x, _)), _ = run(2, Pipeline(4, repeats=2), "aaaa", keys=keys)
    (_, (again, _)), _ = run(2, Pipeline(4, repeats=2), "aaaa", keys=keys)
    (_, (plain, _)), _ = run(2, Pipeline(4, repeats=2), "aaaa")
    np.testing.assert_array_equal(x, again)
    assert not np.allclose(x, plain)


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("repeats", [1, 2, 3, 4, 6, 8])
def test_groups_are_dealt_to_the_stages_that_compute_them(stages, repeats):
    sends, receives, rounds = deal(stages, repeats)
    stored = np.arange(stages * repeats).reshape(stages, repeats)
    came = np.zeros((stages, repeats), int)
    for k, pairs in enumerate(rounds):
        assert sorted(to for _, to in pairs) == list(range(stages))
        for source, to in pairs:
            came[to, k] = stored[source, sends[source, k]]
    computed = np.take_along_axis(came, receives, axis=1)
    np.testing.assert_array_equal(computed, np.arange(stages * repeats).reshape(repeats, stages).T)


@pytest.mark.parametrize(
    ("microbatches", "repeats", "bubble"), [(4, 1, 3 / 7), (8, 2, 3 / 19), (4, 5, 3 / 23)]
)
def test_the_loop_is_as_long_as_the_bubble_says(microbatches, repeats, bubble):
    plan = schedule(Pipeline(microbatches, repeats), MESHES[4].build())
    assert plan == Schedule(4, microbatches, repeats)
    assert plan.bubble == pytest.approx(bubble)
    params, x, shared = inputs(4 * repeats)
    with use_mesh(MESHES[4].build()):
        made = jax.make_jaxpr(
            lambda params: run_stack(
                layer,
                params,
                x,
                shared,
                order=[("layers", "a")] * (4 * repeats),
                keys=None,
                policy="none",
                scan=True,
                pipeline=Pipeline(microbatches, repeats),
            )
        )(params)
    lengths = [each.params["length"] for each in made.eqns if each.primitive.name == "scan"]
    # Of each iteration every stage computes a group: what is not a microbatch's is the bubble.
    assert lengths == [plan.iterations]
    assert 1 - microbatches * repeats / lengths[0] == pytest.approx(bubble)


@pytest.mark.parametrize(
    ("kinds", "pipeline", "rows", "words"),
    [
        ("aaa", Pipeline(), 32, "The 3 decoder layers do not divide into 4 equal groups"),
        ("aaaa", Pipeline(repeats=2), 32, "4 decoder layers do not divide into 8 equal groups.*repeats=2"),
        ("abbabbab", Pipeline(), 32, "Layer 2 of the 8 decoder layers is b and layer 0 is a"),
        ("aaaa", Pipeline(6), 32, "microbatches = 6 is not a multiple of the mesh's stage=4: choose 8"),
        ("aaaa", Pipeline(8), 24, "The batch of 24 rows .* = 16: choose 16 or 32 rows"),
    ],
)
def test_what_cannot_be_divided_is_refused(kinds, pipeline, rows, words):
    with pytest.raises(ValueError, match=words):
        check({"decoder layers": kinds}, pipeline, MESHES[4].build(), rows)


def test_what_can_be_divided_is_not():
    check({"decoder layers": "abababab"}, Pipeline(4, repeats=1), MESHES[4].build(), 8)
    check({"decoder layers": "abc"}, Pipeline(3), MESHES[1].build(), 7)


@pytest.mark.parametrize("fields", [{"microbatches": 0}, {"repeats": 1.5}, {"remat": "stage"}])
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ValueError, match=f"Pipeline.{next(iter(fields))} = "):
        Pipeline(**fields)
