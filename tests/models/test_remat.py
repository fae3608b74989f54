"""Policies of rematerialisation: that they name what layers name, and change no gradient."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.models.params import init_params
from t5style.models.transformer import Transformer
from t5style.nn import remat
from t5style.nn.settings import MoE
from tests.models.tiny import LLAMA, tokens_of

CONFIG = LLAMA.replace(moe=MoE(4, 2, 16), moe_layers=(1,), scan_layers=True, attention="reference")


def loss(params, config):
    logits = Transformer(config).apply({"params": params}, tokens_of(CONFIG, 2, 6))
    return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3])


@functools.cache
def gradients(policy):
    params = init_params(CONFIG, jax.random.key(0))
    return jax.jit(jax.grad(functools.partial(loss, config=CONFIG.replace(remat=policy))))(params)


@pytest.mark.parametrize(
    "policy",
    [
        "minimal_context",
        "input_offloaded",
        "save:query,attention_context; offload:mlp_hidden,key",
    ],
)
def test_what_is_kept_changes_no_gradient(policy):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
        gradients(policy),
        gradients("none"),
    )


def named(jaxpr):
    """Names that a jaxpr gives, those of jaxprs within it too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            yield equation.params["name"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from named(inner)


def test_layers_name_what_policies_may_keep():
    params = jax.eval_shape(functools.partial(init_params, CONFIG), jax.random.key(0))
    for config in (CONFIG, CONFIG.replace(remat="qkv")):
        jaxpr = jax.make_jaxpr(functools.partial(loss, config=config))(params)
        assert set(named(jaxpr.jaxpr)) == set(remat.NAMES)
    assert all(set(names) <= set(remat.NAMES) for names in remat.GROUPS.values())


def test_lists_are_read():
    assert remat.parse("offload:qkv; save:mlp_input_1") == (("mlp_input_1",), ("query", "key", "value"))
    assert remat.parse("save:mlp_hidden").saved == ("mlp_input_0", "mlp_input_1")
    assert remat.parse("full") == ((), ())


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("minimum", r"not one of full, .*nor a list .*did you mean 'minimal'"),
        ("save:keys", r"names 'keys', which no layer does \(did you mean 'key'\?\); layers name layer_input"),
        ("save:", "names ''"),
        ("keep:key", "'keep:key' must begin with 'save:' or 'offload:'"),
        ("save:key;save:value", "each once"),
        ("save:qkv;offload:key", "both saves and offloads key"),
        (3, "remat = 3 is not one of"),
    ],
)
def test_bad_policies_are_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        LLAMA.replace(remat=policy)
