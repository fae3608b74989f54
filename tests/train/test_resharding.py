"""What is sent inside the loop over layers without a rule that asks for it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from t5style.models import params as model_params
from t5style.models.transformer import Transformer
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import Rules, batch_sharding, param_shardings, use_mesh
from t5style.train.resharding import part_of, resharding
from tests.train.mesh_run import MODELS

CONFIG = MODELS["decoder_only"]
ROWS, LENGTH = 16, 48


def found(sizes, rules=None):
    """Of the gradient of a scanned decoder."""
    mesh = MeshConfig(**sizes).build()
    abstract = jax.eval_shape(functools.partial(model_params.init_params, CONFIG), jax.random.key(0))
    shardings = param_shardings(model_params.logical_axes(CONFIG), abstract, mesh, rules)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=batch_sharding(mesh))

    def loss(params, tokens):
        return (Transformer(CONFIG).apply({"params": params}, tokens, method="hidden") ** 2).sum()

    with use_mesh(mesh, rules):
        compiled = jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, tokens).compile()
    return resharding(compiled.as_text(), abstract, mesh.shape, small=1024)


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_default_rules_send_what_they_should(sizes):
    assert found(sizes) == []


def test_a_wrong_rule_is_found_with_its_place_and_what_to_do():
    """Queries and keys whole, weights divided: every layer gathers heads."""
    wrong = found({"data": 2, "fsdp": 2, "tensor": 2}, Rules(activations={"heads": None}))
    assert wrong
    gathered = [one for one in wrong if one.kind == "all-gather" and "attention" in one.part]
    assert gathered
    assert gathered[0].axes == ("tensor",)
    assert gathered[0].times == CONFIG.decoder_layers
    assert "heads, hidden units or the vocabulary are divided before it and whole after it" in str(
        gathered[0]
    )


def test_places_are_read():
    name = (
        "jit(train_step)/transpose(jvp(Transformer.hidden))/decoder/while/body/closed_call/checkpoint/Layer/"
        "Layer._sublayer/attention/attention.queries/query/dot_general"
    )
    assert part_of(name) == "decoder/attention/query dot_general, backwards"
    assert part_of("") == "the loop ?"
