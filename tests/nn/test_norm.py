import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5style.nn.norm import Norm
from t5style.nn.parameter import unbox

KINDS = {
    "LLaMA": {"kind": "rms"},
    "Gemma": {"kind": "rms", "plus_one": True},
    "OLMo 1 with a scale": {"kind": "layer"},
    "GPT-2": {"kind": "layer", "bias": True},
    "GPT-2 about one": {"kind": "layer", "bias": True, "plus_one": True},
}


def inputs(fields):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(3, 5, 16)) * 4 + 2
    params = {"scale": jnp.asarray(rng.normal(size=16), jnp.float32)}
    if fields.get("bias"):
        params["bias"] = jnp.asarray(rng.normal(size=16), jnp.float32)
    return x, params


@pytest.mark.parametrize("name", KINDS)
def test_it_is_the_definition_and_keeps_the_dtype(name):
    fields = KINDS[name]
    x, params = inputs(fields)
    centred = x - x.mean(-1, keepdims=True) if fields["kind"] == "layer" else x
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.01)
    want = want * (np.asarray(params["scale"], np.float64) + bool(fields.get("plus_one")))
    want = want + np.asarray(params.get("bias", 0.0), np.float64)
    norm = Norm(epsilon=0.01, **fields)
    got = norm.apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-5)
    half = norm.apply({"params": params}, jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), want, atol=0.06)


@pytest.mark.parametrize("name", KINDS)
def test_initial_parameters_only_normalise_and_know_their_names(name):
    fields = KINDS[name]
    x = jnp.asarray(inputs(fields)[0], jnp.float32)
    norm = Norm(epsilon=1e-6, names=("latent",), **fields)
    params = norm.init(jax.random.key(0), x)["params"]
    assert set(params) == {"scale", "bias"} if fields.get("bias") else {"scale"}
    assert all(box.names == ("latent",) for box in params.values())
    assert all((params["scale"].value == 0) == bool(fields.get("plus_one")))
    plain = {"scale": jnp.ones(16)}
    want = Norm(fields["kind"], 1e-6).apply({"params": plain}, x)
    np.testing.assert_allclose(norm.apply({"params": unbox(params)}, x), want, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma", "layer"])
def test_it_equals_transformers_norms(family):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    make, fields = {
        "llama": (LlamaRMSNorm, KINDS["LLaMA"]),
        "gemma": (GemmaRMSNorm, KINDS["Gemma"]),
        "layer": (torch.nn.LayerNorm, KINDS["GPT-2"]),
    }[family]
    x, params = inputs(fields)
    theirs = make(16, eps=1e-3)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(params["scale"])))
        if "bias" in params:
            theirs.bias.copy_(torch.tensor(np.asarray(params["bias"])))
        want = theirs(torch.tensor(x, dtype=torch.float32)).numpy()
    got = Norm(epsilon=1e-3, **fields).apply({"params": params}, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'batch' is not one of rms, layer"):
        Norm("batch", 1e-6).init(jax.random.key(0), jnp.zeros((1, 4)))
