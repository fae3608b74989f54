"""The TPU's kernel, interpreted, against the reference; and compiled for a described TPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.models.attention_layers import Attention
from t5style.models.config import TransformerConfig
from t5style.nn import attention_splash, platform
from t5style.nn.attention import Dropout, attention
from t5style.nn.positions import rotary_angles
from t5style.nn.settings import AttentionBlocks
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import use_mesh

BLOCKS = AttentionBlocks(*[128] * 8)
CAUSAL = attention_splash.Masking(causal=True)
SINKS = jnp.asarray([0.5, 1.0, -1.0, 0.0])


def made(queries, keys, kv_heads, width, value_width, packed, dtype=jnp.float32, rows=2):
    """Arguments of attention of 4 heads, and which queries are no padding `[rows, queries, 1, 1]`."""
    rng = np.random.default_rng(3)
    query = rng.normal(size=(rows, queries, 4, width))
    key, value = (rng.normal(size=(rows, keys, kv_heads, w)) for w in (width, value_width))
    arrays = {"query": query, "key": key, "value": value}
    real = np.ones((rows, queries, 1, 1))
    masks = {}
    if packed:  # three examples, then padding; of keys too
        segments = np.sort(rng.integers(1, 4, (rows, queries)), axis=1)
        segments[:, queries - 17 :] = 0
        of_keys = segments if queries == keys else np.sort(rng.integers(1, 4, (rows, keys)), axis=1)
        masks = {"query_segments": jnp.asarray(segments), "key_segments": jnp.asarray(of_keys)}
        real = (segments > 0)[:, :, None, None]
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}, masks, real


def value_and_gradients(implementation, arrays, masks, real, **settings):
    """Output of real queries and gradients of a function of it."""
    weights = (
        np.random.default_rng(4).normal(size=(*arrays["query"].shape[:3], arrays["value"].shape[3])) * real
    )

    @jax.jit
    def run(arrays):
        def f(arrays):
            out = attention(**arrays, **masks, implementation=implementation, **settings)
            return (out.astype(jnp.float32) * weights).sum(), out * real

        (_, out), gradients = jax.value_and_grad(f, has_aux=True)(arrays)
        return {"out": out, **gradients}

    return jax.device_get(run(arrays))


def assert_close(ours, theirs, tolerance):
    for name, expected in theirs.items():
        expected = expected.astype(np.float32)
        error = np.abs(ours[name].astype(np.float32) - expected).max() / np.abs(expected).max()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        # queries, keys, kv_heads, head_dim, value_dim, packed
        pytest.param((256, 256, 2, 32, 32, True), {"causal": True}, id="packed, grouped, causal"),
        pytest.param(
            (200, 200, 1, 32, 24, True),
            {"causal": True, "window": 70, "softcap": 2.0},
            id="window, cap, narrow values, padded length",
        ),
        pytest.param((256, 256, 4, 24, 24, False), {"window": 50, "sinks": SINKS}, id="both ways, sinks"),
        pytest.param((130, 300, 4, 16, 16, False), {}, id="cross, padded lengths"),
        pytest.param((128, 256, 4, 16, 16, True), {}, id="cross, packed"),
    ],
)
def test_values_and_gradients_equal_the_reference(shape, settings):
    arguments = made(*shape)
    settings = {"scale": shape[3] ** -0.5, "blocks": BLOCKS, **settings}
    ours, theirs = (value_and_gradients(name, *arguments, **settings) for name in ("splash", "reference"))
    assert_close(ours, theirs, 5e-6)


@pytest.mark.parametrize(
    "blocks",
    [
        AttentionBlocks(),
        AttentionBlocks(256, 128, 128, 128, 256, 128, use_fused_bwd_kernel=True, k_layout="sequence_minor"),
    ],
)
def test_bfloat16_and_other_blocks(blocks):
    arguments = made(256, 256, 2, 32, 32, True, jnp.bfloat16)
    settings = {"causal": True, "scale": 32**-0.5, "blocks": blocks}
    ours, theirs = (value_and_gradients(name, *arguments, **settings) for name in ("splash", "reference"))
    assert ours["out"].dtype == jnp.bfloat16
    assert_close(ours, theirs, 0.02)


def test_parts_of_the_keys_make_the_whole():
    """As in ring attention: the second queries see the first keys, all of them, and causally the second."""
    arrays, masks, real = made(256, 256, 2, 16, 16, True)
    query, key, value = (x.swapaxes(1, 2) for x in arrays.values())  # [batch, heads, length, dim]
    segments = masks["query_segments"]
    real = real.swapaxes(1, 2)
    gradient = jnp.asarray(np.random.default_rng(5).normal(size=query.shape) * real, jnp.float32)
    settings = {"blocks": BLOCKS, "softcap": 3.0}
    last = gradient[:, :, 128:]

    @jax.jit
    def whole(**arrays):
        run = functools.partial(attention, **masks, causal=True, softcap=3.0, implementation="reference")
        out, pull = jax.vjp(lambda arrays: run(**arrays), arrays)
        found = {"out": out, **pull(gradient.swapaxes(1, 2))[0]}
        return [found[name].swapaxes(1, 2) for name in ("out", "query", "key", "value")]

    @jax.jit
    def in_parts(query, key, value):
        queries, ids = query[:, :, 128:], segments[:, 128:]
        parts = [
            (
                (queries, key[:, :, keys], value[:, :, keys], ids, segments[:, keys]),
                settings | {"masking": masking},
            )
            for keys, masking in ((slice(128), attention_splash.Masking()), (slice(128, None), CAUSAL))
        ]
        contexts, logarithms = zip(*(attention_splash.local_forward(*a, **b) for a, b in parts), strict=True)
        total = jnp.logaddexp(*logarithms)
        context = sum(
            c * jnp.exp(one - total)[..., None] for c, one in zip(contexts, logarithms, strict=True)
        )
        found = [attention_splash.local_backward(*a, context, total, last, **b) for a, b in parts]
        return context, found[0][0] + found[1][0], *found[1][1:]  # the second keys, which no others see

    for ours, expected in zip(in_parts(query, key, value), whole(**arrays), strict=True):
        scale = real[:, :, 128:]  # padding's output is unspecified
        np.testing.assert_allclose(ours * scale, expected[:, :, 128:] * scale, atol=2e-5)


def test_padding_is_finite_forwards_and_backwards():
    arrays, masks, _ = made(128, 256, 4, 16, 16, True)
    found = value_and_gradients("splash", arrays, masks, 1.0)
    assert all(np.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("kv_heads", [4, 1])  # one is repeated, so that each device has its own
def test_a_mesh_divides_rows_and_heads(kv_heads):
    arguments = made(128, 128, kv_heads, 16, 16, True, rows=4)
    settings = {"causal": True, "sinks": SINKS}
    theirs = value_and_gradients("reference", *arguments, **settings)
    with use_mesh(MeshConfig(data=2, fsdp=2, tensor=2).build()):
        run = functools.partial(attention, **arguments[1], **settings, implementation="splash")
        sharding = jax.jit(run).lower(**arguments[0]).compile().output_shardings
        ours = value_and_gradients("splash", *arguments, **settings)
    assert sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    assert_close(ours, theirs, 5e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bias": jnp.zeros((1, 4, 128, 128))}, "no bias"),
        ({"dropout": Dropout(0.1, jax.random.key(0))}, "drop attention weights"),
        ({"precision": "highest"}, "precision"),
    ],
)
def test_what_it_cannot_compute_is_refused_and_auto_computes_it(settings, words):
    arrays, _, _ = made(128, 128, 4, 16, 16, False)
    with pytest.raises(ValueError, match=words):
        attention(**arrays, implementation="splash", **settings)
    assert attention(**arrays, **settings).shape == (2, 128, 4, 16)


def test_blocks_fit_lengths_with_little_padding():
    blocks = AttentionBlocks(block_q=512, block_kv=1024, block_kv_dkv=1024)
    for queries, keys, expected in (
        (2048, 2048, (2048, 2048, 512, 1024)),
        (100, 640, (128, 640, 128, 640)),
        (640, 1408, (768, 1536, 384, 768)),
        (513, 8192, (768, 8192, 384, 1024)),
    ):
        fitted, padded_queries, padded_keys = blocks.fit(queries, keys)
        assert (padded_queries, padded_keys, fitted.block_q, fitted.block_kv) == expected
        for block in (fitted.block_q, fitted.block_q_dkv, fitted.block_q_dq):
            assert padded_queries % block == 0
        for block in (fitted.block_kv, fitted.block_kv_dkv, fitted.block_kv_dq):
            assert padded_keys % block == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_q": 100}, "block_q = 100 must be a multiple of 128"),
        ({"block_kv": 0}, "block_kv = 0"),
        ({"block_kv_compute": 384}, "must divide block_kv = 512"),
        ({"q_layout": "wide"}, "'wide' is not one of"),
    ],
)
def test_impossible_blocks_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        AttentionBlocks(**fields)


@pytest.mark.parametrize("positions", ["rope", "none"])
def test_queries_may_be_scaled_where_they_are_made(monkeypatch, positions):
    config = TransformerConfig(
        vocab_size=16,
        d_model=16,
        d_ff=16,
        num_heads=2,
        decoder_layers=1,
        positions=positions,
        scale_attention=True,
        dtype="float32",
    )
    layer, x = Attention(config), jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 16)), jnp.float32)
    angles = rotary_angles(jnp.arange(5)[None], 8, 10_000.0) if positions == "rope" else None
    settings = {"angles": angles, "bias": None, "segments": None, "source_segments": None}
    settings |= {"causal": True, "deterministic": True}
    params = layer.init(jax.random.key(0), x, x, **settings)
    found = []
    for early in (False, True):
        monkeypatch.setattr(platform, "scale_queries", lambda early=early: early)
        found.append(layer.apply(params, x, x, **settings))
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def compiled_for_tpu(monkeypatch, run, *arguments):
    """The text of a program for two rows on a v5e slice, its operands of the given shapes."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build(devices)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
        for shape, dtype, spec in arguments
    ]
    with use_mesh(mesh):
        return jax.jit(run).lower(*arguments).compile().as_text()


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("width", "value_width", "settings"),
    [
        (128, 128, {"causal": True}),
        (64, 64, {"causal": True, "window": 300, "softcap": 30.0, "sinks": SINKS}),
        (192, 128, {}),
        (80, 80, {"causal": True, "blocks": AttentionBlocks(use_fused_bwd_kernel=True)}),
    ],
)
def test_it_compiles_for_a_tpu_without_scores(monkeypatch, width, value_width, settings):
    rows, length, spec = 4, 1024, jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")

    def run(query, key, value, segments):
        def f(query, key, value):
            masks = {"query_segments": segments, "key_segments": segments}
            return attention(query, key, value, **masks, **settings).astype(jnp.float32).sum()

        return jax.grad(f, (0, 1, 2))(query, key, value)

    text = compiled_for_tpu(
        monkeypatch,
        run,
        *(
            ((rows, length, heads, w), jnp.bfloat16, spec)
            for heads, w in ((4, width), (2, width), (2, value_width))
        ),
        ((rows, length), jnp.int32, jax.sharding.PartitionSpec(("data", "fsdp"))),
    )
    for kernel in ("fwd", "dkv") + (() if "blocks" in settings else ("dq",)):
        assert f"splash_mha_{kernel}_segmented" in text
    assert f"{length},{length}]" not in text


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("kept", "times"), [((), 2), ((attention_splash.CONTEXT,), 1)])
def test_a_remat_policy_may_keep_what_the_backward_kernels_need(monkeypatch, kept, times):
    spec = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    policy = jax.checkpoint_policies.save_only_these_names(*kept)

    def run(query, key):
        f = jax.checkpoint(functools.partial(attention, causal=True, blocks=BLOCKS), policy=policy)
        return jax.value_and_grad(lambda query, key: f(query, key, key).astype(jnp.float32).sum())(query, key)

    shape = (4, 128, 4, 128), jnp.bfloat16, spec
    text = compiled_for_tpu(monkeypatch, run, shape, shape)
    assert len(re.findall(r"%splash_mha_fwd\S* = .* custom-call\(", text)) == times
