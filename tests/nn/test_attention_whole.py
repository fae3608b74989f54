"""The TPU's kernel for T5, interpreted, against the reference; and compiled for described TPUs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.nn.attention import attention
from t5style.nn.attention_tiles import BiasByDistance
from t5style.parallel import topologies
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import use_mesh

ROWS, HEADS, WIDTH = 4, 4, 64  # two heads of this width are computed together


def operands(queries, keys, dtype=jnp.float32):
    """Queries, keys, values and the bias by distance."""
    rng = np.random.default_rng(0)
    shapes = [(ROWS, length, HEADS, WIDTH) for length in (queries, keys, keys)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return *arrays, jnp.asarray(rng.normal(size=(1, HEADS, queries + keys - 1)), jnp.float32)


def segments(length):
    """Two examples, then padding."""
    return jnp.asarray(np.repeat([[1] * 9 + [2] * (length - 12) + [0] * 3], ROWS, axis=0))


def loss(implementation, query, key, value, line, *, biased=True, **settings):
    """A function of the context of real queries."""
    weights = np.random.default_rng(1).normal(size=query.shape)
    if settings.get("query_segments") is not None:
        weights = weights * (settings["query_segments"] > 0)[..., None, None]
    bias = BiasByDistance(line) if biased else None
    out = attention(query, key, value, bias=bias, implementation=implementation, **settings)
    return (out.astype(jnp.float32) * weights).sum()


MESH = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("queries", "keys", "packed", "settings", "mesh"),
    [
        pytest.param(20, 20, True, {"causal": True, "scale": 0.25}, None, id="decoder"),
        pytest.param(20, 33, True, {"biased": False}, MESH, id="cross"),
        pytest.param(33, 20, False, {}, MESH, id="nothing packed"),
    ],
)
def test_it_equals_the_reference(queries, keys, packed, settings, mesh):
    arrays = operands(queries, keys)
    if packed:
        settings = settings | {"query_segments": segments(queries), "key_segments": segments(keys)}
    found = []
    for implementation in ("whole", "reference"):
        f = jax.value_and_grad(functools.partial(loss, implementation, **settings), (0, 1, 2, 3))
        with use_mesh(mesh.build()) if mesh else contextlib.nullcontext():
            found.append(jax.device_get(jax.jit(f)(*arrays)))
    (value, gradients), (expected, wanted) = found
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    for got, want in zip(gradients, wanted, strict=True):
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


def test_under_vmap_as_a_stage_of_a_pipeline_runs_it():
    arrays = [jnp.stack([x, 2 * x]) for x in operands(20, 20)]
    found = []
    for implementation in ("whole", "reference"):
        f = jax.vmap(jax.grad(functools.partial(loss, implementation), (0, 3)))
        found.append(jax.device_get(jax.jit(f)(*arrays)))
    for got, want in zip(*found, strict=True):
        assert np.abs(got - want).max() <= 2e-6 * np.abs(want).max()


def test_bfloat16_is_as_near_as_the_reference():
    exact = jax.grad(functools.partial(loss, "reference"), (0, 3))(*operands(20, 20))
    arrays = operands(20, 20, jnp.bfloat16)
    errors = {}
    for implementation in ("whole", "reference"):
        got = jax.grad(functools.partial(loss, implementation), (0, 3))(*arrays)
        errors[implementation] = [
            float(jnp.abs(a.astype(jnp.float32) - b).max()) for a, b in zip(got, exact, strict=True)
        ]
    assert all(
        mine <= 1.5 * theirs for mine, theirs in zip(errors["whole"], errors["reference"], strict=True)
    )


LINE = BiasByDistance(jnp.zeros((1, HEADS, 8192 + 64 - 1)))


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"queries": 4096, "keys": 4096}, {}, "4096 queries and 4096 keys need .* MiB of vector memory"),
        ({"queries": 8192, "keys": 64}, {"bias": LINE}, "8192 queries and 64 keys need 5.. MiB"),
        ({"groups": 2}, {}, "the same heads of the same width"),
        ({}, {"precision": "highest"}, "not 'highest'"),
        ({}, {"softcap": 3.0}, "no windows, soft caps or sinks"),
        ({}, {"bias": jnp.zeros((1, HEADS, 20, 20))}, "a bias by distance only"),
    ],
)
def test_what_it_cannot_compute(change, settings, words):
    query, keys = change.get("queries", 20), change.get("keys", 20)
    query = jnp.zeros((1, query, HEADS, WIDTH))
    key = jnp.zeros((1, keys, change.get("groups", HEADS), WIDTH))
    with pytest.raises(ValueError, match=words):
        attention(query, key, key, implementation="whole", **settings)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("name", "queries", "keys", "width", "kernel"),
    [
        ("v5e-4", 512, 512, 64, True),
        ("v5p-8", 114, 512, 64, True),
        ("v6e-4", 512, 512, 128, True),
        ("v5e-4", 114, 114, 64, False),  # few scores
        ("v4-8", 512, 512, 64, False),  # cannot turn rows
    ],
)
def test_auto_takes_it_for_t5_on_a_tpu_and_no_scores_are_written(name, queries, keys, width, kernel):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    mesh = MeshConfig(data=-1).build(topologies.devices(topologies.parse_slice(name)))
    rows = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    query, key = (
        jax.ShapeDtypeStruct((mesh.size, length, 2 * HEADS, width), jnp.bfloat16, sharding=rows)
        for length in (queries, keys)
    )
    line = jax.ShapeDtypeStruct((1, 2 * HEADS, queries + keys - 1), jnp.float32, sharding=everywhere)
    f = jax.value_and_grad(functools.partial(loss, "auto", causal=queries == keys), (0, 1, 2, 3))
    with use_mesh(mesh):
        text = jax.jit(f).lower(query, key, key, line).compile().as_text()
    assert [f"attention_whole_{name}" in text for name in ("fwd", "bwd")] == [kernel, kernel]
    assert (f"{2 * HEADS},{queries},{keys}]" in text) != kernel
