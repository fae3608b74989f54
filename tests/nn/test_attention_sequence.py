"""Attention of divided sequences, and windows with global tokens, against a masked einsum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.nn import attention_ring, attention_tiles
from t5style.nn.attention import Dropout, attention
from t5style.nn.attention_sequence import by_distance, check
from t5style.nn.attention_sparse import chunk_segments
from t5style.nn.attention_tiles import BiasByDistance, Pattern
from t5style.nn.settings import AttentionBlocks
from t5style.parallel import topologies
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import use_mesh

BATCH, LENGTH, HEADS, GROUPS, WIDTH, VALUE_WIDTH = 2, 32, 4, 2, 8, 5
SCALE, CAP = 0.3, 3.0
# Two examples and padding behind; padding in front.
SEGMENTS = np.ones((BATCH, LENGTH), np.int32)
SEGMENTS[0, 10:25], SEGMENTS[0, 25:], SEGMENTS[1, :3] = 2, 0, 0


@functools.cache
def operands(length=LENGTH):
    rng = np.random.default_rng(0)
    shapes = {
        "query": (BATCH, length, HEADS, WIDTH),
        "key": (BATCH, length, GROUPS, WIDTH),
        "value": (BATCH, length, GROUPS, VALUE_WIDTH),
        "line": (HEADS, 2 * length - 1),
        "sinks": (HEADS,),
    }
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def visible(pattern, length):
    """Which key (column) a query (row) sees by its index."""
    query, key = np.arange(length)[:, None], np.arange(length)
    seen = np.ones((length, length), bool)
    if pattern.window is not None:
        seen = np.abs(query - key) < pattern.window
        seen |= (query < pattern.global_tokens) | (key < pattern.global_tokens)
    return seen & (key <= query) if pattern.causal else seen


def value_and_gradients(run, segments=SEGMENTS, length=LENGTH):
    """Of a loss of real tokens that is no plain sum."""

    def loss(given):
        context = jnp.where((segments > 0)[:, :, None, None], run(**given), 0)
        return (context * jnp.cos(jnp.arange(VALUE_WIDTH))).sum() + (context**2).sum()

    return jax.jit(jax.value_and_grad(loss))(operands(length))


@functools.cache
def definition(pattern, bias, length=LENGTH):
    segments = np.tile(SEGMENTS, (1, length // LENGTH))
    seen = visible(pattern, length) & (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]

    def run(query, key, value, line, sinks):
        share = HEADS // GROUPS
        grouped = query.reshape(BATCH, length, GROUPS, share, WIDTH)
        scores = jnp.einsum("bqgnd,bkgd->bgnqk", grouped, key).reshape(BATCH, HEADS, length, length)
        scores = CAP * jnp.tanh(SCALE * scores / CAP)
        if bias:
            distance = np.arange(length) - np.arange(length)[:, None] + length - 1
            scores = scores + line[:, distance]
        scores = jnp.where(seen[:, None], scores, -1e9)
        sink = jnp.broadcast_to(sinks[:, None, None], (BATCH, HEADS, length, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1))[..., :-1]
        weights = weights.reshape(BATCH, GROUPS, share, length, length)
        return jnp.einsum("bgnqk,bkgd->bqgnd", weights, value).reshape(BATCH, length, HEADS, VALUE_WIDTH)

    return value_and_gradients(run, segments, length)


def computed(pattern, bias, sequence, sizes, length=LENGTH, implementation="reference", **settings):
    segments = np.tile(SEGMENTS, (1, length // LENGTH))

    def run(query, key, value, line, sinks):
        return attention(
            query,
            key,
            value,
            bias=BiasByDistance(line[None]) if bias else None,
            query_segments=segments,
            key_segments=segments,
            **pattern._asdict(),
            scale=SCALE,
            softcap=CAP,
            sinks=sinks,
            implementation=implementation,
            sequence=sequence,
            **settings,
        )

    if sizes is None:
        return value_and_gradients(run, segments, length)
    with use_mesh(MeshConfig(**({"data": 1} | sizes)).build()):
        return value_and_gradients(run, segments, length)


def check_equal(got, want):
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        scale = max(float(jnp.abs(b).max()), 1e-6)
        assert float(jnp.abs(a - b).max()) <= 1e-5 * scale, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("pattern", "bias", "sizes"),
    [
        (Pattern(True), False, {"sequence": 8}),
        (Pattern(True), True, {"sequence": 2, "tensor": 4}),
        (Pattern(False), True, {"sequence": 4, "fsdp": 2}),
        (Pattern(True, 6), False, {"sequence": 8}),
        (Pattern(False, 6), True, {"sequence": 8}),
        (Pattern(False, 5, 3), False, {"sequence": 4, "data": 2}),
    ],
    ids=str,
)
def test_a_ring_computes_the_definition(monkeypatch, pattern, bias, sizes):
    monkeypatch.setattr(attention_tiles, "TILE", 4)  # several tiles even of a part
    check_equal(computed(pattern, bias, "ring", sizes), definition(pattern, bias))


@pytest.mark.parametrize(
    ("pattern", "bias", "sizes"),
    [
        (Pattern(True, 5), True, {"sequence": 2, "tensor": 2, "data": 2}),
        (Pattern(False, 5, 3), False, {"sequence": 4, "fsdp": 2}),
    ],
    ids=str,
)
def test_ulysses_computes_the_definition(pattern, bias, sizes):
    check_equal(computed(pattern, bias, "ulysses", sizes), definition(pattern, bias))


@pytest.mark.parametrize("pattern", [Pattern(True, 5, 3), Pattern(False, 11, 6)], ids=str)
def test_global_tokens_on_one_device_are_the_definition(monkeypatch, pattern):
    monkeypatch.setattr(attention_tiles, "TILE", 4)
    check_equal(computed(pattern, True, "gather", None), definition(pattern, True))


def test_a_ring_of_the_tpus_kernel_computes_the_definition():
    length = 4 * 128  # parts as short as its tiles
    got = computed(
        Pattern(True), False, "ring", {"sequence": 2, "data": 2, "devices": 4}, length, "splash",
        blocks=AttentionBlocks(),
    )  # fmt: skip
    check_equal(got, definition(Pattern(True), False, length))


def test_every_tile_that_is_seen_is_in_the_ranges_and_few_others():
    length, size = 64, 4
    for pattern in (
        Pattern(True),
        Pattern(True, 7),
        Pattern(False, 7),
        Pattern(True, 9, 5),
        Pattern(False, 9, 5),
    ):
        seen = visible(pattern, length)
        for first in range(0, length, size):
            rows = np.arange(first, first + size)
            met = np.zeros((size, length), int)
            width = 0
            for low, high, are_global in pattern.ranges(first, first + size - 1, length):
                columns = np.arange(max(int(low), 0), min(int(high), length))
                width += len(columns)
                part = pattern.visible(rows[:, None], columns, are_global)
                met[:, columns] += np.ones((size, len(columns)), int) if part is None else np.asarray(part)
            np.testing.assert_array_equal(met, seen[rows])  # each once
            if pattern.window is not None and first >= pattern.global_tokens:
                assert width <= 2 * pattern.window + size + pattern.global_tokens


def test_keys_travel_no_further_than_they_are_seen():
    assert attention_ring.walks(8, 16, Pattern(True)) == ((1, 7),)
    assert attention_ring.walks(8, 16, Pattern(True, 17)) == ((1, 1),)
    assert attention_ring.walks(8, 16, Pattern(True, 18)) == ((1, 2),)
    assert attention_ring.walks(8, 16, Pattern(False, 18)) == ((1, 2), (-1, 2))
    assert attention_ring.walks(8, 16, Pattern(False, 100)) == ((1, 7),)
    assert attention_ring.walks(8, 16, Pattern(True, 1)) == ((1, 0),)


def test_chunks_are_those_of_each_example():
    # An example of 7 tokens and one of 6, in chunks of 3, and padding.
    segments = np.array([[1] * 7 + [2] * 6 + [0] * 2])
    positions = np.array([[*range(7), *range(6), 0, 0]])
    ids = np.asarray(chunk_segments(jnp.asarray(segments), jnp.asarray(positions), 3))[0]
    index = np.arange(15)
    near = np.abs(index[:, None] - index) < 3
    seen = near & (ids[:, None] == ids) & (ids > 0)
    want = (
        (segments[0][:, None] == segments[0])
        & (positions[0][:, None] // 3 == positions[0] // 3)
        & (segments[0] > 0)
    )
    np.testing.assert_array_equal(seen, want)
    np.testing.assert_array_equal(chunk_segments(None, jnp.arange(6)[None], 2), [[2, 2, 3, 3, 2, 2]])


def test_memory_does_not_grow_with_the_square_of_the_length():
    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

        def loss(query, key, value):
            return attention(query, key, value, causal=True, window=64, global_tokens=8).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 2.2 * temporaries(8192)
    assert temporaries(16384) < 16384**2  # scores as bytes would already take this


MESH = {"data": 1, "sequence": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("kind", "length", "heads", "pattern", "sentence"),
    [
        (
            "ring",
            36,
            4,
            Pattern(True),
            "divides 36 positions by sequence=4, and twice for causal .*32 or 40",
        ),
        ("ring", 30, 4, Pattern(True, 4), "divides 30 positions by sequence=4: .*28 or 32"),
        ("ulysses", 3, 8, Pattern(), "divides 3 positions by sequence=4: .*multiple of 4"),
        ("ulysses", 32, 12, Pattern(), "divides 12 heads by sequence=4 × tensor=2 = 8"),
        ("rings", 32, 4, Pattern(), "'rings' is not one of gather, ring, ulysses"),
    ],
)
def test_what_does_not_divide_is_refused(kind, length, heads, pattern, sentence):
    with use_mesh(MeshConfig(**MESH).build()):
        with pytest.raises(ValueError, match=sentence):
            check(kind, length, length, heads, pattern)
        check(kind if kind in ("ring", "ulysses") else "gather", 64, 64, 8, pattern)
    if kind != "rings":
        check(kind, length, length, heads, pattern)  # no mesh, nothing to divide


def test_tiles_refuse_dropout_and_biases_of_all_pairs():
    x = jnp.ones((1, 8, 2, 4))
    with pytest.raises(ValueError, match="cannot drop attention weights"):
        attention(x, x, x, window=2, global_tokens=1, dropout=Dropout(0.1, jax.random.key(0)))
    with pytest.raises(ValueError, match="cannot add a bias of every query and key"):
        attention(x, x, x, window=2, global_tokens=1, bias=jnp.zeros((1, 2, 8, 8)))


def test_only_a_ring_in_force_wants_a_bias_by_distance():
    assert not by_distance("ring", 32)
    with use_mesh(MeshConfig(**MESH).build()):
        assert by_distance("ring", 32)
        assert not by_distance("gather", 32)
        assert not by_distance("ring", 1)  # making parameters


def test_a_softmax_of_nothing_is_zero():
    softmax = attention_tiles.empty(jnp.ones((1, 1, 1, 2, 4)), 3, None)
    context, logarithm = softmax.result()
    np.testing.assert_array_equal(context, 0)
    assert np.isfinite(np.asarray(logarithm)).all()


@pytest.mark.tpu_aot
def test_a_ring_on_a_tpu_runs_its_kernel_on_parts_and_gathers_no_keys():
    """Forwards and backwards; each of four devices holds a quarter of the sequence."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    mesh = MeshConfig(data=1, sequence=4).build(topologies.devices(topologies.parse_slice("v5e-4")))
    length, spec = 4096, jax.sharding.PartitionSpec(None, "sequence")
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
        for shape, dtype in (
            ((1, length, 2, 128), jnp.bfloat16),
            ((1, length, 1, 128), jnp.bfloat16),
            ((1, length), jnp.int32),
        )
    ]

    def run(query, key, segments):
        def f(query, key):
            masks = {"query_segments": segments, "key_segments": segments}
            made = attention(query, key, key, causal=True, sequence="ring", **masks)
            return made.astype(jnp.float32).sum()

        return jax.grad(f, (0, 1))(query, key)

    with use_mesh(mesh):
        text = jax.jit(run).lower(*arguments).compile().as_text()
    for kernel in ("fwd", "dkv"):
        assert f"splash_mha_{kernel}" in text
    assert "collective-permute" in text
    assert "all-gather" not in text
    assert f"{length // 4},{length // 4}]" not in text  # no scores
