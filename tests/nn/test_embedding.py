"""Looking up embeddings that a mesh divides."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5style.nn.embedding import lookup
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import batch_sharding, constrain, use_mesh

VOCABULARY, WIDTH, ROWS, LENGTH = 64, 32, 16, 24


def loss(table, ids, weights):
    x = constrain(lookup(table, ids, jnp.bfloat16), ("batch", "length", "embed"))
    return (x.astype(jnp.float32) * weights).sum()


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_no_device_ever_has_all_rows_or_the_whole_table(sizes, capfd):
    mesh = MeshConfig(**sizes).build()
    table_sharding = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.random.normal(keys[0], (VOCABULARY, WIDTH))
    ids = jax.random.randint(keys[1], (ROWS, LENGTH), 0, VOCABULARY)
    weights = jax.random.normal(keys[2], (ROWS, LENGTH, WIDTH))
    arguments = (
        jax.device_put(table, table_sharding),
        *(jax.device_put(array, batch_sharding(mesh)) for array in (ids, weights)),
    )
    with use_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, table_sharding))
        compiled = step.lower(*arguments).compile()
        value, gradient = compiled(*arguments)
    assert "full rematerialization" not in capfd.readouterr().err
    text = compiled.as_text()
    assert f"[{ROWS},{LENGTH},{WIDTH}]" not in text
    assert not re.search(rf"(f32|bf16)\[{VOCABULARY},{WIDTH}\]", text)
    want, want_gradient = jax.value_and_grad(loss)(table, ids, weights)
    np.testing.assert_allclose(value, want, rtol=1e-3, atol=0.05)
    np.testing.assert_allclose(gradient, want_gradient, atol=0.1)


def test_ids_beyond_the_table_give_its_last_row():
    table = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(lookup(table, jnp.array([[0, 2, 7]]), "float32")[0, 1:], [[4, 5], [4, 5]])
