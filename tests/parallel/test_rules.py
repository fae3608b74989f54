import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import (
    Rules,
    batch_sharding,
    check_batch,
    constrain,
    current_mesh,
    host_shard,
    param_shardings,
    parameter_axes,
    put_batch,
    spec,
    use_mesh,
)

AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "query": ("layers", "embed", "heads", "head_dim"),
        "norm": ("layers", "embed"),
        "wi": ("layers", "embed", "mlp"),
    },
}


def parameters(vocab=96, heads=8):
    shapes = {
        "embedding": (vocab, 16),
        "layers": {"query": (2, 16, heads, 4), "norm": (2, 16), "wi": (2, 16, 32)},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def specs(mesh, rules=None, **sizes):
    return jax.tree.map(
        lambda sharding: sharding.spec, param_shardings(AXES, parameters(**sizes), mesh.build(), rules)
    )


def test_parameters_are_divided_by_the_default_rules():
    assert specs(MeshConfig(data=2, fsdp=2, tensor=2)) == {
        "embedding": P("tensor", "fsdp"),
        "layers": {
            "query": P(None, "fsdp", "tensor"),
            "norm": P(None, "fsdp"),
            "wi": P(None, "fsdp", "tensor"),
        },
    }
    assert specs(MeshConfig(data=8))["layers"]["wi"] == P()


def test_rules_change_the_table():
    rules = Rules(parameters={"vocab": None, "embed": ("fsdp", "tensor")})
    assert specs(MeshConfig(data=2, fsdp=2, tensor=2), rules) == {
        "embedding": P(None, ("fsdp", "tensor")),
        # The first dimension that wants the tensor axis has it.
        "layers": {
            "query": P(None, ("fsdp", "tensor")),
            "norm": P(None, ("fsdp", "tensor")),
            "wi": P(None, ("fsdp", "tensor")),
        },
    }
    assert rules == Rules(parameters={"vocab": None, "embed": ("fsdp", "tensor")})
    assert hash(rules) == hash(Rules(parameters={"embed": ("fsdp", "tensor"), "vocab": None}))


@pytest.mark.parametrize(
    ("mesh", "sizes", "words"),
    [
        (
            MeshConfig(data=1, tensor=8),
            {"vocab": 100},
            "embedding: its axis 'vocab' of size 100 does not divide by tensor=8.*104",
        ),
        (
            MeshConfig(tensor=4),
            {"heads": 6},
            "its axis 'heads' of size 6 does not divide by tensor=4. Choose tensor among 1, 2, 3",
        ),
    ],
)
def test_what_does_not_divide_is_refused(mesh, sizes, words):
    with pytest.raises(ValueError, match=words):
        specs(mesh, **sizes)


def test_an_axis_that_divides_nothing_is_refused():
    """Stages divide stacked layers; this model has none."""
    with pytest.raises(ValueError, match=r"stage=2 divides nothing in this model.*set stage=1"):
        param_shardings({"w": ("embed", "mlp")}, {"w": jnp.ones((8, 8))}, MeshConfig(data=4, stage=2).build())


def test_a_copy_on_each_device_must_be_asked_for():
    mesh = MeshConfig(data=1, tensor=8)
    assert specs(mesh, Rules(parameters={"vocab": None}), vocab=100)["embedding"] == P()


def test_unknown_names_have_near_ones():
    with pytest.raises(ValueError, match=r"'embd', which is not one of .* Did you mean 'embed'"):
        Rules(parameters={"embd": "fsdp"})
    with pytest.raises(ValueError, match=r"mesh axis 'tensr'.* Did you mean 'tensor'"):
        Rules(activations={"mlp": "tensr"})
    with pytest.raises(ValueError, match=r"'haeds'.*Did you mean 'heads'"):
        param_shardings({"w": ("haeds",)}, {"w": jnp.ones(8)}, MeshConfig().build())
    with pytest.raises(ValueError, match=r"shape \(8,\) but 2 logical axes"):
        param_shardings({"w": ("heads", "embed")}, {"w": jnp.ones(8)}, MeshConfig().build())
    with pytest.raises(ValueError, match="differ at layers/bias"):
        param_shardings({"layers": {"bias": ("embed",)}}, {}, MeshConfig().build())


def test_a_batch_must_divide():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    check_batch(8, mesh)
    check_batch(8, mesh, accumulation=2)
    with pytest.raises(
        ValueError, match="batch of 10 rows does not divide by data 2 × fsdp 2 = 4: choose 8 or 12 rows"
    ):
        check_batch(10, mesh)
    with pytest.raises(
        ValueError,
        match="batch of 4 rows does not divide by data 2 × fsdp 2 × accumulation 2 = 8: choose 8 rows",
    ):
        check_batch(4, mesh, accumulation=2)


def test_rows_are_divided_over_the_expert_axis_too():
    mesh = MeshConfig(data=2, fsdp=1, expert=4).build()
    check_batch(16, mesh)
    with pytest.raises(
        ValueError, match="12 rows does not divide by data 2 × fsdp 1 × expert 4 = 8: choose 8 or 16 rows"
    ):
        check_batch(12, mesh)
    rows = np.arange(16).reshape(8, 2)
    array = put_batch({"x": rows}, mesh)["x"]
    np.testing.assert_array_equal(array, rows)  # the same rows in the same order
    held = {shard.device.id: int(shard.data[0, 0]) // 2 for shard in array.addressable_shards}
    assert held == {device.id: n for n, device in enumerate(mesh.devices.reshape(-1))}


def test_the_expert_axis_divides_experts_and_whatever_else_is_stored():
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2).build()
    assert spec(("expert", "mlp", "embed"), (4, 8, 8), mesh, Rules()) == P("expert", "tensor", "fsdp")
    assert spec(("embed", "mlp"), (8, 8), mesh, Rules()) == P(("fsdp", "expert"), "tensor")
    with pytest.raises(
        ValueError,
        match=r"of size 6 does not divide by expert=4\. Choose expert among 1, 2, 3, make the size",
    ):
        spec(("expert", "embed", "mlp"), (6, 8, 8), MeshConfig(expert=4).build(), Rules(), "experts/kernel")
    with use_mesh(mesh):
        assert parameter_axes(("expert", "embed")) == [("expert",), ("fsdp",)]
    assert parameter_axes(("expert", "embed")) == [(), ()]


def test_put_batch_deals_rows_out():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    rows = np.arange(24).reshape(8, 3)
    array = put_batch({"x": rows}, mesh)["x"]
    assert array.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}


class _Device:
    def __init__(self, number: int, process: int) -> None:
        self.id, self.process_index, self.platform, self.device_kind = number, process, "cpu", "cpu"


@pytest.mark.parametrize(
    ("sizes", "owners", "me", "expected"),
    [
        ({"data": 8}, "00001111", 1, (1, 2)),
        ({"data": 2, "tensor": 4}, "00001111", 0, (0, 2)),
        ({"data": 1, "tensor": 8}, "00001111", 1, (0, 1)),  # both read every row
        ({"data": 2, "tensor": 4}, "00112233", 3, (1, 2)),  # two processes share a shard
        ({"data": 8}, "00110011", 1, (1, 2)),  # interleaved hosts: rows 2, 3, 6, 7
        ({"data": 2, "fsdp": 2, "tensor": 2}, "00112233", 2, (2, 4)),
        ({"data": 2, "expert": 2, "tensor": 2}, "00112233", 2, (2, 4)),
        ({"data": 1, "expert": 8}, "00001111", 1, (1, 2)),
    ],
)
def test_host_shard(monkeypatch, sizes, owners, me, expected):
    devices = [_Device(number, int(owner)) for number, owner in enumerate(owners)]
    monkeypatch.setattr(jax, "process_index", lambda: me)
    assert host_shard(MeshConfig(**sizes).build(devices)) == expected


def test_host_shard_refuses_partly_shared_rows(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    # Process 0 holds rows 0 and 1, process 1 rows 1 and 2, process 2 rows 2 and 3.
    devices = [_Device(number, int(owner)) for number, owner in enumerate("00011122")]
    with pytest.raises(ValueError, match="3 processes overlapping parts of the batch"):
        host_shard(MeshConfig(data=4, tensor=2).build(devices))


def _through_scan(x):
    def body(carry, _):
        return constrain(jnp.tanh(carry), ("batch", "length", "embed")), None

    return jax.lax.scan(jax.checkpoint(body), x, None, length=2)[0]


def test_constrain_under_transformations():
    x = jnp.linspace(-1, 1, 8 * 4 * 6).reshape(8, 4, 6)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    plain = jax.jit(_through_scan)
    expected = plain(x)
    assert len(expected.sharding.device_set) == 1  # no mesh, no change
    with use_mesh(mesh):
        assert current_mesh() is mesh
        # The same jitted function, traced anew for the mesh.
        divided = plain(x)
        assert divided.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), 3)
        np.testing.assert_allclose(divided, expected, rtol=1e-6)
        gradient = jax.jit(jax.grad(lambda x: _through_scan(x).sum()))(x)
        assert jax.eval_shape(plain, x).shape == x.shape
        assert jax.vmap(plain)(x[None]).shape == (1, 8, 4, 6)
    assert current_mesh() is None
    np.testing.assert_allclose(gradient, jax.grad(lambda x: _through_scan(x).sum())(x), rtol=1e-5)


def test_constrain_leaves_whole_what_does_not_divide():
    with use_mesh(MeshConfig(data=8).build()) as mesh:
        one_row = jax.jit(_through_scan)(jnp.ones((1, 4, 6)))
        assert one_row.sharding.is_equivalent_to(NamedSharding(mesh, P()), 3)
        with pytest.raises(ValueError, match=r"shape \(1, 4, 6\) with 2 names"):
            constrain(jnp.ones((1, 4, 6)), ("batch", "length"))
        with pytest.raises(ValueError, match="Did you mean 'batch'"):
            constrain(jnp.ones(8), ("bacth",))
