"""Time, FLOPs and communication read in programs: written ones whose figures are known, and compiled ones."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from t5style.nn.quantized_product import product
from t5style.parallel import topologies
from t5style.parallel.mesh import MeshConfig
from t5style.train.hlo import read_program
from t5style.train.hlo_collectives import mesh_axes, read_groups, sent_bytes
from t5style.train.hlo_cost import cost
from t5style.train.hlo_flops import _valid_positions, instruction_flops

# What libtpu writes, shortened: a loop of three trips in which a matrix product runs beside an all-gather, a
# reduce-scatter that is a fusion, a kernel, and between slices an all-reduce.
PROGRAM = """HloModule jit_step, is_scheduled=true, num_partitions=8

%product (p: bf16[8,16], q: bf16[16,32]) -> f32[8,32] {
  %p = bf16[8,16]{1,0} parameter(0)
  %q = bf16[16,32]{1,0} parameter(1)
  ROOT %convolution = f32[8,32]{1,0} convolution(%p, %q), dim_labels=bf_io->bf
}

%all-reduce-scatter.1 (input: f32[64]) -> f32[16] {
  %input = f32[64]{0} parameter(0)
  %all-reduce.5 = f32[64]{0} all-reduce(%input), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = f32[16]{0} dynamic-slice(%all-reduce.5, %zero), dynamic_slice_sizes={16}
}

%begin (input: bf16[4,16]) -> (bf16[4,16], bf16[16,16], u32[]) {
  %input.1 = bf16[4,16]{1,0} parameter(0)
  %all-gather.7 = bf16[16,16]{1,0} all-gather(%input.1), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %custom-call = (bf16[4,16]{1,0}, bf16[16,16]{1,0}, u32[]) custom-call(%all-gather.7), custom_call_target="AsyncCollectiveStart"
}

%end (input: bf16[16,16]) -> bf16[16,16] {
  %input.2 = bf16[16,16]{1,0} parameter(0)
  %all-gather.8 = bf16[16,16]{1,0} all-gather(%input.2), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %custom-call.1 = bf16[16,16]{1,0} custom-call(%all-gather.8), custom_call_target="AsyncCollectiveDone"
}

%body (c: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %c = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%c), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %shard = bf16[4,16]{1,0} slice(%x), slice={[0:4], [0:16]}
  %async-collective-start = (bf16[4,16]{1,0}, bf16[16,16]{1,0}, u32[]) fusion(%shard), kind=kCustom, calls=%begin
  %w = bf16[16,32]{1,0} constant({...})
  %fusion.1 = f32[8,32]{1,0} fusion(%x, %w), kind=kOutput, calls=%product, metadata={op_name="jit(step)/mlp/dot_general"}, backend_config={"window_config":{"estimated_cycles":"3000"}}
  %done = bf16[16,16]{1,0} get-tuple-element(%async-collective-start), index=1
  %async-collective-done = bf16[16,16]{1,0} fusion(%done), kind=kCustom, calls=%end
  %copy.1 = bf16[8,16]{0,1} copy(%x), backend_config={"window_config":{"estimated_cycles":"500"}}
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%next, %copy.1)
}

%condition (c: (s32[], bf16[8,16])) -> pred[] {
  %c.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i.1, %three), direction=LT
}

%endless (c: s32[]) -> pred[] {
  %c.2 = s32[] parameter(0)
  ROOT %true = pred[] constant(true)
}

%once (c: s32[]) -> s32[] {
  %c.3 = s32[] parameter(0)
  ROOT %more = s32[] negate(%c.3), backend_config={"window_config":{"estimated_cycles":"40"}}
}

ENTRY %main (x: bf16[8,16], g: f32[64], q: bf16[2,256,128]) -> f32[16] {
  %x.1 = bf16[8,16]{1,0} parameter(0)
  %g = f32[64]{0} parameter(1)
  %q = bf16[2,256,128]{2,1,0} parameter(2)
  %zero.1 = s32[] constant(0)
  %t.1 = (s32[], bf16[8,16]{1,0}) tuple(%zero.1, %x.1)
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%t.1), condition=%condition, body=%body, metadata={op_name="jit(step)/layers/while"}
  %while.2 = s32[] while(%zero.1), condition=%endless, body=%once
  %splash.1 = (f32[128,128]{1,0}, f32[128,128]{1,0}, f32[128,128]{1,0}, bf16[2,256,128]{2,1,0}) custom-call(%q, %q, %q), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/splash_mha_fwd_no_residuals/pallas_call"}, backend_config={"custom_call_config":{"body":"QUJD"}}
  %own.1 = f32[8]{0} custom-call(%g), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/mine/pallas_call"}, backend_config={"custom_call_config":{"body":"QUJD","cost_estimate":{"flops":"5000","transcendentals":"0","bytes_accessed":"9"}}}
  %secret.1 = f32[8]{0} custom-call(%g), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/secret/pallas_call"}
  %token = token[] after-all()
  %send = (f32[64]{0}, u32[], token[]) send(%g, %token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r1",_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64]{0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="r1",_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[64]{0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  %sum = f32[64]{0} get-tuple-element(%recv-done), index=0
  %big = f32[1024,1024]{1,0:S(1)} copy(%sum)
  ROOT %fusion.2 = f32[16]{0} fusion(%sum), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def speed(kind, axes, n):
    return 64.0 if axes == ("slices",) else 1024.0


def read(**settings):
    return cost(
        PROGRAM, clock_hz=1000.0, peak_flops=1e6, mesh_shape={"data": 2, "fsdp": 4}, top=3, **settings
    )


def test_time_is_cycles_times_trips_plus_kernels():
    told = read()
    splash = 2 * 2 * 256 * 256 * 128 * 2 * 0.5  # two products, heads, queries, keys, head_dim
    assert told.kernel_flops == splash + 5000
    assert told.categories == pytest.approx(
        {"matmul": 3 * 3.0, "copy": 3 * 0.5, "kernel": (splash + 5000) / 1e6, "other": 0.04, "fusion": 0.0}
    )
    assert told.seconds == pytest.approx(sum(told.categories.values()))
    assert told.flops == 3 * 2 * 8 * 16 * 32 + told.kernel_flops
    assert [each.name.split()[0] for each in told.top] == [
        "splash_mha_fwd_no_residuals",
        "fusion.1",
        "copy.1",
    ]
    assert told.top[1].times == 3
    assert told.top[1].op_name == "jit(step)/mlp/dot_general"
    assert [(loop.name, loop.trips, loop.known) for loop in told.loops] == [
        ("while.1", 3, True),
        ("while.2", 1, False),
    ]
    assert told.loops[0].seconds == pytest.approx(10.5)
    assert [each.name for each in told.uncounted] == ["big"]
    assert told.communication_seconds is None
    assert told.exposed_seconds is None


def test_warnings_name_what_is_not_known():
    unknown_loop, unknown_kernel = read().warnings
    assert "while.2" in unknown_loop
    assert "once" in unknown_loop
    assert "secret" in unknown_kernel
    assert "0" in unknown_kernel


def test_attention_fraction_by_place():
    def fraction(op_name, queries, keys):
        assert "splash" in op_name
        assert (queries, keys) == (256, 256)
        return 1.0

    assert read(attention_fraction=fraction).kernel_flops - 5000 == 2 * (read().kernel_flops - 5000)


def test_collectives():
    told = read(bandwidth=speed)
    by_kind = {each.kind: each for each in told.collectives}
    gather, scatter, between = (by_kind[kind] for kind in ("all-gather", "reduce-scatter", "all-reduce"))
    assert len(told.collectives) == 3  # parts of one count once
    assert (gather.group, gather.axes, gather.times, gather.loop) == (4, ("fsdp",), 3, ("while.1",))
    assert gather.asynchronous
    assert gather.arrays == ("bf16[16,16]",)
    assert gather.bytes == 3 * 4 * 16 * 2
    assert gather.seconds == pytest.approx(3 * 384 / 1024)
    # Covered by the product (3 s a trip).
    assert gather.cover_seconds == pytest.approx(9.0)
    assert gather.exposed_seconds == 0
    assert (scatter.group, scatter.axes, scatter.times) == (4, ("fsdp",), 1)
    assert not scatter.asynchronous
    assert scatter.bytes == 3 / 4 * 64 * 4
    assert scatter.exposed_seconds == scatter.seconds == pytest.approx(192 / 1024)
    # Nothing runs beside it.
    assert (between.group, between.axes, between.asynchronous) == (2, ("slices",), True)
    assert between.exposed_seconds == between.seconds == pytest.approx(256 / 64)
    assert told.exposed_seconds == pytest.approx(4 + 192 / 1024)
    assert told.step_seconds == pytest.approx(told.seconds + told.exposed_seconds)
    assert json.loads(json.dumps(told.to_json()))["collectives"][0]["kind"] == "all-reduce"


def test_slow_links_are_exposed_as_far_as_nothing_covers_them():
    told = read(bandwidth=96.0)  # the all-gather takes 4 s a trip, the product beside it 3
    gather = next(each for each in told.collectives if each.kind == "all-gather")
    assert gather.seconds == pytest.approx(12)
    assert gather.exposed_seconds == pytest.approx(3)


def test_replica_groups():
    assert read_groups("{{0,2},{1,3}}").tolist() == [[0, 2], [1, 3]]
    assert read_groups("[2,4]<=[8]").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert read_groups("[4,2]<=[4,2]T(1,0)").tolist() == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert read_groups("mesh['a'=2,'b'=4] {'b':(2)2}").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert read_groups("mesh['a'=2,'b'=4] {'b':(1)2}").tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    mesh = "mesh['b'=4,'a'=2], device_ids=([2,4]T(1,0)) {'b'}"
    assert read_groups(mesh).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert read_groups("{}") is None
    assert read_groups("{{0,1},{2}}") is None
    assert read_groups("?") is None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_groups_of_mesh_axes_are_named_after_them(sizes, data):
    mesh = {f"axis_{n}": size for n, size in enumerate(sizes)}
    wanted = [name for name in mesh if data.draw(st.booleans())]
    written = ",".join(f"'{name}'={size}" for name, size in mesh.items())
    groups = read_groups(f"mesh[{written}] {{{','.join(repr(name) for name in wanted)}}}")
    assert sorted(groups.ravel().tolist()) == list(range(math.prod(sizes)))
    assert groups.shape[1] == math.prod(mesh[name] for name in wanted)
    assert mesh_axes(groups, mesh) == tuple(name for name in wanted if mesh[name] > 1)
    lists = "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups.tolist()) + "}"
    assert read_groups(lists).tolist() == groups.tolist()


def test_ring_bytes():
    # Gathering and then summing shards of 100 bytes over 4 devices: an all-reduce is a reduce-scatter and an
    # all-gather.
    assert sent_bytes("all-gather", 100, 4) == sent_bytes("reduce-scatter", 400, 4) == 300
    assert sent_bytes("all-reduce", 400, 4) == 600
    assert sent_bytes("all-to-all", 400, 4) == 300
    assert sent_bytes("collective-permute", 400, 4) == 400
    assert sent_bytes("all-reduce", 400, 1) == 0


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 5),
    st.integers(1, 4), st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_positions_of_a_window_are_those_of_counting(size, window, outputs, stride, low, dilation, spread):
    dilated = [n % dilation == 0 for n in range((size - 1) * dilation + 1)]
    places = [n * stride + k * spread - low for n in range(outputs) for k in range(window)]
    met = sum(0 <= place < len(dilated) and dilated[place] for place in places)
    assert _valid_positions(size, window, outputs, stride, low, dilation, spread) == met


def test_flops_and_collectives_of_a_program_for_cpu():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    place = functools.partial(NamedSharding, mesh)
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=place(PartitionSpec("data", "tensor")))
    w = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=place(PartitionSpec("tensor", "fsdp")))

    def layers(x, w):
        x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=6)[0]
        return jnp.einsum("bd,bd->b", x, x)

    text = jax.jit(layers).lower(x, w).compile().as_text()
    told = cost(text, clock_hz=1.0, peak_flops=1.0, mesh_shape=dict(mesh.shape), bandwidth=1e9)
    assert told.seconds is None
    assert told.step_seconds is None
    assert told.exposed_seconds is None
    assert "no estimates" in told.warnings[0]
    # All devices multiply [8, 16] by [16, 16], or as many.
    matmul = 6 * 2 * 16 * 32 * 32 / 8
    assert told.flops in (matmul, matmul + 2 * 16 * 32 / 4)
    summed = [each for each in told.collectives if each.kind == "all-reduce" and each.loop]
    assert summed
    assert all(each.times == 6 and each.axes == ("tensor",) for each in summed)


# Compiled ahead of time for a chip that is not here: jax could not read such programs back from its cache.


@pytest.fixture
def no_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@functools.cache
def tpu():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")
    return topologies.parse_slice("v5e-8"), topologies.devices(topologies.parse_slice("v5e-8"))


def compiled(function, *shapes):
    """Its cost on one v5e, and what the chip can do."""
    where, devices = tpu()
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(devices[0]))
        for shape, dtype in shapes
    ]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    chip = where.chip
    return cost(text, clock_hz=chip.clock, peak_flops=chip.bf16_flops), chip


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("no_cache")
def test_a_large_product_takes_a_little_longer_than_the_peak_allows():
    square = ((8192, 8192), jnp.bfloat16)
    told, chip = compiled(jnp.matmul, square, square)
    assert told.flops == 2 * 8192**3
    assert 0.85 < told.flops / chip.bf16_flops / told.seconds < 0.95


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("no_cache")
def test_int8_training_multiplies_integers_in_less_time():
    """A projection forwards and backwards (nn/quantized_product.py), quantising included."""

    def step(multiply, x, kernel, gradient):
        y, pull = jax.vjp(lambda x, kernel: multiply(x, kernel).astype(x.dtype), x, kernel)
        return y, pull(gradient)

    shapes = [((8192, 4096), jnp.bfloat16), ((4096, 8192), jnp.float32), ((8192, 8192), jnp.bfloat16)]
    plain, _ = compiled(functools.partial(step, lambda x, w: x @ w.astype(x.dtype)), *shapes)
    int8, _ = compiled(functools.partial(step, lambda x, w: product(x, w, 1, "int8")), *shapes)
    assert int8.flops == plain.flops == 3 * 2 * 8192 * 4096 * 8192
    assert int8.categories["matmul"] < 0.7 * plain.categories["matmul"]
    assert int8.seconds < plain.seconds


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("no_cache")
def test_loops_multiply():
    def layers(outer, inner, x, w):
        def step(x, _):
            return jnp.tanh(x @ w), None

        def steps(x, _):
            return jax.lax.scan(step, x, None, length=inner)[0], None

        return jax.lax.scan(steps, x, None, length=outer)[0]

    square = ((2048, 2048), jnp.bfloat16)
    products = {}
    for outer, inner in ((1, 7), (3, 5)):
        told, _ = compiled(functools.partial(layers, outer, inner), square, square)
        (product,) = (each for each in told.top if each.category == "matmul")
        assert product.times == outer * inner
        assert told.flops == outer * inner * 2 * 2048**3
        assert max(loop.times for loop in told.loops) == outer * inner
        products[outer, inner] = product.seconds / product.times
    assert products[1, 7] == pytest.approx(products[3, 5], rel=0.02)


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("fused", [False, True])
def test_splash_attention_in_a_loop(fused):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        BlockSizes,
        CausalMask,
        MultiHeadMask,
        make_splash_mha,
    )

    heads, length, head_dim, layers = 2, 512, 128, 3
    sizes = dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv"), 256)
    sizes |= {} if fused else {"block_q_dq": 256, "block_kv_dq": 256}
    mask = MultiHeadMask([CausalMask((length, length))] * heads)

    def attend(q, k, v):
        kernel = make_splash_mha(
            mask, block_sizes=BlockSizes(**sizes, use_fused_bwd_kernel=fused), head_shards=1, q_seq_shards=1
        )
        x = jax.lax.scan(lambda q, _: (kernel(q, k, v), None), q, None, length=layers)[0]
        return x.astype(jnp.float32).sum()

    array = ((heads, length, head_dim), jnp.bfloat16)
    told, chip = compiled(jax.grad(attend, (0, 1, 2)), array, array, array)
    product = 2 * heads * length * length * head_dim / 2
    flops = sorted(each.flops / layers / product for each in told.kernels)
    assert flops == ([2, 5] if fused else [2, 3, 4])
    assert told.categories["kernel"] == pytest.approx(told.kernel_flops / chip.bf16_flops)
    assert not told.warnings


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("no_cache")
def test_grouped_products_by_kernels():
    from jax.experimental.pallas.ops.tpu.megablox import ops

    rows, groups, width, hidden = 1024, 4, 256, 512

    def loss(x, w, sizes):
        y = ops.gmm(x, w, sizes, jnp.bfloat16, (256, 256, 256))
        return jnp.square(y.astype(jnp.float32)).sum()

    told, _ = compiled(
        jax.grad(loss, (0, 1)),
        ((rows, width), jnp.bfloat16),
        ((groups, width, hidden), jnp.bfloat16),
        ((groups,), jnp.int32),
    )
    assert [each.flops for each in told.kernels] == [2 * rows * width * hidden] * 3


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("no_cache")
@pytest.mark.parametrize("shape", [(1024, 4, 256, 512), (8192, 8, 1024, 2048)])
def test_grouped_products_by_the_compiler(shape):
    rows, groups, width, hidden = shape
    told, _ = compiled(  # the smaller one becomes a kernel, the larger one a fusion
        jax.lax.ragged_dot,
        ((rows, width), jnp.bfloat16),
        ((groups, width, hidden), jnp.bfloat16),
        ((groups,), jnp.int32),
    )
    assert told.flops == 2 * rows * width * hidden
    assert told.categories["kernel"] > 0


@pytest.mark.tpu_aot
@pytest.mark.usefixtures("no_cache")
def test_a_training_step():
    from tests.train.mesh_run import LENGTH, MODELS, ROWS
    from tests.train.test_partitioning import compiled_step

    where, devices = tpu()
    mesh = MeshConfig(data=2, fsdp=4).build(devices)
    config = MODELS["decoder_only"].replace(dtype="bfloat16")
    text = compiled_step(config, mesh).as_text()
    told = cost(text, clock_hz=where.chip.clock, peak_flops=1.0, mesh_shape=dict(mesh.shape), bandwidth=9e10)
    assert not told.warnings
    # Parameters of a layer are gathered over fsdp in loops over layers, their gradients summed over all.
    assert sorted(loop.trips for loop in told.loops) == [config.decoder_layers] * 2
    gathers = [each for each in told.collectives if each.kind == "all-gather" and each.loop]
    assert {each.axes for each in gathers} == {("fsdp",)}
    assert {each.group for each in gathers} == {4}
    summed = {axis for each in told.collectives if "gather" not in each.kind for axis in each.axes}
    assert {"data", "fsdp"} <= summed
    # Nothing in the program runs longer than the program.
    assert 0 < told.exposed_seconds <= told.communication_seconds * 1.001
    assert sum(loop.seconds for loop in told.loops) < told.seconds
    # Of each weight and token a multiplication and an addition, in three passes, and attention's squares.
    shard, width, hidden = ROWS / 8, config.d_model, config.d_ff
    heads = config.num_heads * config.head_dim
    weights = width * heads * (2 + 2 * config.num_kv_heads / config.num_heads) + 3 * width * hidden
    products = config.decoder_layers * (weights + 2 * LENGTH * heads) + width * config.vocab_size
    # (and a few for the rotation of queries and keys).
    assert 1 <= told.flops / (3 * 2 * shard * LENGTH * products) < 1.05


def test_the_flops_of_one_instruction():
    program = read_program(PROGRAM)
    body = program.computations["body"].by_name
    assert instruction_flops(program, body["fusion.1"]) == 2 * 8 * 16 * 32
    assert instruction_flops(program, body["copy.1"]) == 0


def test_mesh_axes_of_devices_that_are_not_in_the_mesh():
    assert mesh_axes(np.array([[0, 9]]), {"data": 8}) == ()
    assert mesh_axes(np.array([[0, 1]]), {"data": 8}) == ("data?",)
