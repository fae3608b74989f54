import dataclasses
import functools
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from t5style.nn import activations, grouped, platform
from t5style.nn.moe import (
    ExpertsProjection,
    MoeMlp,
    RouterStats,
    balance_loss,
    route,
    within_capacity,
    z_loss,
)
from t5style.nn.parameter import is_named, normal, unbox
from t5style.nn.settings import MoE
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import Rules, param_shardings, spec, use_mesh
from tests.nn.moe_families import (
    EXPERTS,
    FAMILIES,
    GOLDEN,
    SWIGLU,
    WIDTH,
    inputs,
    transformers_output,
    weights,
)


class Mlp(nn.Module):
    """The shared MLP, which the model hands in."""

    width: int
    activations: tuple[str, ...]

    @nn.compact
    def __call__(self, x, deterministic):
        def dense(width, name):
            return nn.Dense(width, use_bias=False, name=name)

        hidden = [dense(self.width, f"inputs_{i}")(x) for i in range(len(self.activations))]
        return dense(x.shape[-1], "output")(activations.hidden(hidden, self.activations))


def module(moe, names=SWIGLU, clamp=None, **fields):
    shared = Mlp(moe.shared_d_ff, names, parent=None) if moe.shared_d_ff else None
    init = normal(1.0)
    return MoeMlp(moe, WIDTH, names, init, init, init, clamp=clamp, shared=shared, **fields)


def apply(moe, params, x, names=SWIGLU, clamp=None, real=None, stats=False):
    y, router = _compiled(moe, names, clamp, stats)(params, jnp.asarray(x), real)
    return y, jax.tree.map(lambda leaf: leaf.sum(axis=0), router)


@functools.cache
def _compiled(moe, names, clamp, stats):
    return jax.jit(
        lambda params, x, real: module(moe, names, clamp).apply({"params": params}, x, real=real, stats=stats)
    )


def reference(moe, params, x, names=SWIGLU, clamp=None, real=None):
    """A loop over tokens and their experts, in float64."""
    functions = {
        "relu": lambda a: np.maximum(a, 0),
        "silu": lambda a: a / (1 + np.exp(-a)),
        "silu_1702": lambda a: a / (1 + np.exp(-1.702 * a)),
        "linear": lambda a: a,
        "linear_plus_one": lambda a: a + 1,
    }

    def linear(a, tree, index=()):
        return a @ tree["kernel"][index] + (tree["bias"][index] if "bias" in tree else 0)

    def mlp(a, tree, index=(), clamp=None):
        parts = [linear(a, tree[f"inputs_{i}"], index) for i in range(len(names))]
        if clamp is not None:
            parts = [np.minimum(parts[0], clamp), np.clip(parts[1], -clamp, clamp)]
        hidden = functions[names[0]](parts[0])
        return linear(
            hidden * functions[names[1]](parts[1]) if len(names) == 2 else hidden, tree["output"], index
        )

    def largest(values, count):
        return sorted(range(len(values)), key=lambda i: -values[i])[:count]

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, out = np.asarray(x, np.float64), np.zeros(x.shape)
    choices = np.zeros((*x.shape[:2], moe.per_token), int)
    chosen_weights = np.zeros((*x.shape[:2], moe.per_token))
    for b, row in enumerate(x):
        for t, token in enumerate(row):
            logits = linear(token, params["router"])
            if moe.router == "softmax":
                scores = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            else:
                scores = 1 / (1 + np.exp(-logits))
            choice = scores + params.get("router_bias", 0)
            if moe.groups > 1:
                size = moe.experts // moe.groups
                groups = [sorted(choice[g * size : (g + 1) * size]) for g in range(moe.groups)]
                best = [group[-1] if moe.group_score == "max" else group[-1] + group[-2] for group in groups]
                allowed = largest(best, moe.groups_per_token)
                choice = [choice[e] if e // size in allowed else -np.inf for e in range(moe.experts)]
            experts = largest(choice, moe.per_token)
            weight = scores[experts]
            if moe.normalize or moe.choose_first:
                weight = weight / weight.sum()
            choices[b, t], chosen_weights[b, t] = experts, weight * moe.scale
            if moe.shared_d_ff:
                gate = linear(token, params["shared_gate"]) if moe.shared_gate else np.inf
                out[b, t] = mlp(token, params["shared"]) / (1 + np.exp(-gate))
        room = np.full(moe.experts, moe.capacity_for(x.shape[1]) or x.shape[1])
        for k in range(moe.per_token):
            for t, token in enumerate(row):
                e = choices[b, t, k]
                if (real is None or real[b, t]) and room[e] > 0:
                    room[e] -= 1
                    out[b, t] += chosen_weights[b, t, k] * mlp(token, params["experts"], e, clamp)
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_those_of_transformers(name):
    moe, names, clamp = FAMILIES[name]
    x, params = inputs(), weights(moe, names)
    got, _ = apply(moe, params, x, names, clamp)
    golden = np.asarray(json.loads(GOLDEN.read_text())[name])
    scale = np.abs(golden).max()
    np.testing.assert_allclose(got, golden, atol=1e-5 * scale)
    np.testing.assert_allclose(reference(moe, params, x, names, clamp), golden, atol=1e-5 * scale)
    if clamp is not None:
        assert np.abs(apply(moe, params, x, names, None)[0] - golden).max() > 0.01 * scale


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None,
    reason="needs torch and transformers",
)
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_itself(name):
    moe, names, clamp = FAMILIES[name]
    x, params = inputs(seed=5), weights(moe, names, seed=7)
    want = transformers_output(name, x, params)
    got, _ = apply(moe, params, x, names, clamp)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


VARIANTS = {
    "dropless": MoE(EXPERTS, 3, 6, normalize=True),
    "few places": MoE(EXPERTS, 2, 6, capacity_factor=0.75),
    "as many choices as experts": MoE(4, 4, 6, router="sigmoid", scale=0.5),
    "one expert": MoE(1, 1, 6),
    "everything": MoE(
        EXPERTS, 2, 6, router="sigmoid", correction_bias=True, normalize=True, groups=2, groups_per_token=1,
        group_score="top2", shared_d_ff=4, shared_gate=True, bias=True, capacity=3,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "padded"), [(name, i % 2 == 0) for i, name in enumerate(VARIANTS)] + [("everything", False)]
)
def test_it_is_the_loop_over_tokens_and_experts(name, padded):
    moe = VARIANTS[name]
    x, params = inputs(3, 11), weights(moe, SWIGLU)
    real = np.random.default_rng(3).random((3, 11)) < 0.6 if padded else None
    got, _ = apply(moe, params, x, real=real)
    np.testing.assert_allclose(got, reference(moe, params, x, real=real), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "product", "padded"),
    [
        ("gpt_oss", "blocks", False),
        ("deepseek_v3", "blocks", True),
        ("switch_transformers", "blocks", False),
        ("qwen2_moe", "ragged_dot", True),
    ],
)
def test_gradients_are_those_of_all_experts_on_all_tokens(monkeypatch, name, product, padded):
    monkeypatch.setattr(platform, "grouped_product", lambda: product)
    moe, names, clamp = FAMILIES[name]
    x, params = inputs(2, 12), weights(moe, names)
    real = np.arange(12) < np.array([[12], [7]]) if padded else None
    weight = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)

    def dense(params, x):
        logits = x @ params["router"]["kernel"] + params["router"].get("bias", 0)
        routing = route(moe, logits, params.get("router_bias"))
        kept = np.ones(routing.experts.shape, bool) if real is None else real[..., None]
        if moe.capacity:
            kept = kept & within_capacity(routing.experts, real, moe.capacity, moe.experts)
        each = jax.nn.one_hot(routing.experts, moe.experts) * (routing.weights * kept)[..., None]

        def experts(x, tree):
            y = jnp.einsum("...i,eio->...eo" if x.ndim == 3 else "...ei,eio->...eo", x, tree["kernel"])
            return y + tree.get("bias", 0)

        tree = params["experts"]
        hidden = activations.hidden(
            [experts(x, tree[f"inputs_{i}"]) for i in range(len(names))], names, clamp
        )
        y = jnp.einsum("bleo,blke->blo", experts(hidden, tree["output"]), each)
        if moe.shared_d_ff:
            shared = Mlp(moe.shared_d_ff, names).apply({"params": params["shared"]}, x, True)
            gate = jax.nn.sigmoid(x @ params["shared_gate"]["kernel"]) if moe.shared_gate else 1
            y += shared * gate
        return (y * weight).sum()

    def ours(params, x):
        return (module(moe, names, clamp).apply({"params": params}, x, real=real)[0] * weight).sum()

    want = jax.jit(jax.value_and_grad(dense, argnums=(0, 1)))(params, x)
    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(params, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(got[1][0]["experts"]))
    if moe.correction_bias:
        assert not np.any(got[1][0]["router_bias"])


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(14)), st.integers(0, 1000))
def test_permuted_tokens_give_permuted_outputs(order, seed):
    moe = VARIANTS["dropless"]
    params, x = weights(moe, SWIGLU), inputs(2, 7, seed).reshape(14, WIDTH)

    def flat(tokens):
        return np.asarray(apply(moe, params, tokens.reshape(2, 7, WIDTH))[0]).reshape(14, WIDTH)

    np.testing.assert_allclose(flat(x[list(order)]), flat(x)[list(order)], atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=5, max_size=5), st.integers(0, 8))
def test_groups_of_any_size(sizes, after):
    rows = 64  # one shape to compile; the rest belongs to no group
    sizes = [size * (rows - after) // max(sum(sizes), 1) for size in sizes]
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(rows, 4)).astype("f"), rng.normal(size=(5, 4, 3)).astype("f")
    cotangent = rng.normal(size=(rows, 3)).astype("f")
    group = np.repeat(np.arange(5), sizes)
    want, by_kernel = np.zeros((rows, 3)), np.zeros(kernel.shape)
    by_x = np.zeros(x.shape)
    for row, g in enumerate(group):
        want[row], by_x[row] = x[row] @ kernel[g], kernel[g] @ cotangent[row]
        by_kernel[g] += np.outer(x[row], cotangent[row])
    got, (got_x, got_kernel) = _grouped(x, kernel, jnp.asarray(sizes, jnp.int32), cotangent)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(got_x, by_x, atol=1e-5)
    np.testing.assert_allclose(got_kernel, by_kernel, atol=1e-4)


@jax.jit
def _grouped(x, kernel, sizes, cotangent):
    out, pull = jax.vjp(lambda x, kernel: grouped.project_groups(x, kernel, sizes), x, kernel)
    return out, pull(cotangent)


def test_the_kernels_of_tpus(monkeypatch):
    """Interpreted: rows that do not fill a tile, an empty group, and rows of none."""
    rng = np.random.default_rng(0)
    sizes = jnp.array([5, 0, 11, 3])
    x, kernel, cotangent = (
        jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((23, 32), (4, 32, 48), (23, 48))
    )

    def run():
        out, pull = jax.vjp(lambda x, kernel: grouped.project_groups(x, kernel, sizes), x, kernel)
        return [np.asarray(each, np.float32) for each in (out, *pull(cotangent))]

    want = run()
    monkeypatch.setattr(platform, "grouped_product", lambda: "megablox")
    for got, expected in zip(run(), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=0.02 * np.abs(expected).max())


def test_large_groups_take_several_blocks():
    rng = np.random.default_rng(0)
    sizes = np.array([700, 0, 3, 321])
    x, kernel = rng.normal(size=(1024, 4)).astype("f"), rng.normal(size=(4, 4, 3)).astype("f")
    want = np.einsum("ri,rio->ro", x, kernel[np.repeat(np.arange(4), sizes)])
    out = grouped.project_groups(x, kernel, jnp.asarray(sizes), all_rows=True)
    np.testing.assert_allclose(out, want, atol=1e-5)


def test_sums_are_in_float32_and_results_in_the_inputs_type():
    x, kernel = jnp.ones((6, 4096), jnp.bfloat16), jnp.ones((2, 4096, 3), jnp.float32)
    out = grouped.project_groups(x, kernel, jnp.array([2, 3]))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[:, 0].astype(jnp.float32), [4096] * 5 + [0])
    moe = VARIANTS["dropless"]
    params = weights(moe, SWIGLU)
    half, _ = apply(moe, params, jnp.asarray(inputs(), jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    exact, _ = apply(moe, params, jnp.asarray(inputs(), jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(half.astype(jnp.float32), exact, atol=0.02 * np.abs(exact).max())


def test_padding_takes_no_capacity():
    moe = MoE(2, 1, 6, capacity=3)
    x = inputs(1, 8)
    params = weights(moe, SWIGLU)
    params["router"]["kernel"] = np.zeros((WIDTH, 2), np.float32)  # a tie: all choose the first
    real = np.array([[0, 0, 0, 1, 1, 0, 1, 1]])
    out, stats = apply(moe, params, x, real=real, stats=True)
    computed = np.abs(out[0]).max(axis=-1) > 0
    np.testing.assert_array_equal(computed, [0, 0, 0, 1, 1, 0, 1, 0])
    assert (float(stats.tokens), float(stats.dropped), stats.load.tolist()) == (4, 1, [4, 0])
    # What stands in padding changes nothing, not even when it is no number.
    other = np.where(real[..., None] > 0, x, np.nan)
    np.testing.assert_array_equal(apply(moe, params, other, real=real)[0], out)


def test_first_choices_come_before_second_ones():
    experts = jnp.array([[[0, 1], [1, 0], [0, 1]]])
    kept = within_capacity(experts, None, 2, 2)
    assert kept.tolist() == [[[True, True], [True, False], [True, False]]]


def test_capacity_factor_is_a_multiple_of_an_even_share():
    assert MoE(8, 2, 4, capacity_factor=1.25).capacity_for(512) == 160
    assert MoE(8, 1, 4, capacity_factor=1.0).capacity_for(1) == 1
    assert MoE(8, 1, 4, capacity=64).capacity_for(512) == 64
    assert MoE(8, 1, 4).capacity_for(512) is None


def test_statistics():
    moe = MoE(4, 2, 6)
    x, params = inputs(2, 6), weights(moe, SWIGLU)
    real = np.arange(6) < np.array([[6], [4]])
    _, stats = apply(moe, params, x, real=real, stats=True)
    logits = (x @ params["router"]["kernel"])[real].astype(np.float64)  # [10, 4]
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    load = np.bincount(np.argsort(-scores, axis=-1)[:, :2].ravel(), minlength=4)
    assert float(stats.tokens) == 10
    np.testing.assert_array_equal(stats.load, load)
    np.testing.assert_allclose(stats.probability, scores.sum(0), rtol=1e-5)
    want = 4 * np.sum(load / 10 * scores.mean(0))
    np.testing.assert_allclose(balance_loss(stats), want, rtol=1e-5)
    np.testing.assert_allclose(z_loss(stats), (np.log(np.exp(logits).sum(-1)) ** 2).mean(), rtol=1e-5)
    # Layers stacked, and an even load, which costs as much as there are choices.
    even = RouterStats(*map(jnp.asarray, (8.0, [4.0] * 4, [2.0] * 4, 0.0, 0.0)))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), stats, even)
    np.testing.assert_allclose(balance_loss(stacked), [want, 2.0], rtol=1e-5)
    assert apply(moe, params, x)[1] is None


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch and transformers")
def test_the_balance_loss_is_that_of_transformers():
    pytest.importorskip("transformers")
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    moe = FAMILIES["mixtral"][0]
    x, params = inputs(2, 6), weights(moe, SWIGLU)
    real = np.arange(6) < np.array([[6], [4]])
    _, stats = apply(moe, params, x, real=real, stats=True)
    logits = torch.tensor((x @ params["router"]["kernel"]).reshape(-1, EXPERTS))
    want = load_balancing_loss_func((logits,), EXPERTS, 2, torch.tensor(real))
    np.testing.assert_allclose(balance_loss(stats), float(want), rtol=1e-5)


def test_losses_have_gradients():
    moe = MoE(4, 2, 6)
    params = weights(moe, SWIGLU)

    def losses(params):
        stats = module(moe).apply({"params": params}, inputs(), stats=True)[1]
        stats = jax.tree.map(lambda leaf: leaf.sum(axis=0), stats)
        return jnp.stack([balance_loss(stats), z_loss(stats)])

    gradient = jax.jit(jax.jacrev(losses))(params)
    assert np.all(np.abs(gradient["router"]["kernel"]).max(axis=(1, 2)) > 0)
    assert not np.any(gradient["experts"]["inputs_0"]["kernel"])


def test_parameters_and_their_names():
    moe = VARIANTS["everything"]
    boxes = jax.eval_shape(lambda: module(moe).init(jax.random.key(0), jnp.zeros((1, 2, WIDTH))))["params"]
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (box.names, box.value.shape)
        for path, box in jax.tree_util.tree_leaves_with_path(boxes, is_leaf=is_named)
        if is_named(box)  # the stand-in for the shared MLP has plain arrays
    }
    assert names["router/kernel"] == (("embed", "expert"), (WIDTH, 8))
    assert names["router/bias"] == (("expert",), (8,))
    assert names["router_bias"] == (("expert",), (8,))
    assert names["experts/inputs_1/kernel"] == (("expert", "embed", "mlp"), (8, WIDTH, 6))
    assert names["experts/inputs_1/bias"] == (("expert", "mlp"), (8, 6))
    assert names["experts/output/kernel"] == (("expert", "mlp", "embed"), (8, 6, WIDTH))
    assert names["experts/output/bias"] == (("expert", "embed"), (8, WIDTH))
    assert names["shared_gate/kernel"] == (("embed", "one"), (WIDTH, 1))
    mesh = MeshConfig(data=1, fsdp=2, tensor=2, expert=2).build()
    assert spec(("embed", "one"), (WIDTH, 1), mesh, Rules()) == PartitionSpec(("fsdp", "expert"))
    assert spec(*names["experts/output/kernel"], mesh, Rules()) == PartitionSpec("expert", "tensor", "fsdp")
    want = jax.tree.map(np.shape, weights(moe, SWIGLU))
    assert jax.tree.map(np.shape, unbox(boxes)) == want


def test_each_expert_draws_its_own_weights():
    drawn = []

    def init(key, shape, dtype):
        drawn.append(shape)
        return jax.random.normal(key, shape, dtype)

    projection = ExpertsProjection(3, 4, 5, ("embed", "mlp"), init, False, "float32")
    params = unbox(projection.init(jax.random.key(0)))
    kernel = params["params"]["kernel"]
    assert drawn == [(4, 5)]  # an initializer sees one matrix, whose sizes decide the scale
    assert len(np.unique(kernel)) == 3 * 4 * 5


def test_a_mesh_changes_nothing():
    moe = MoE(EXPERTS, 2, 6, normalize=True, bias=True)
    built = MeshConfig(data=1, fsdp=2, expert=2, tensor=2).build()
    boxes = jax.eval_shape(lambda: module(moe).init(jax.random.key(0), jnp.zeros((1, 2, WIDTH))))["params"]
    axes = jax.tree.map(lambda box: box.names, boxes, is_leaf=is_named)
    shardings = param_shardings(axes, unbox(boxes), built)
    assert "expert" in str(shardings["experts"]["output"]["kernel"].spec)
    params, x = weights(moe, SWIGLU), inputs(4, 6)

    def loss(params, x):
        return (module(moe).apply({"params": params}, x)[0] ** 2).sum()

    want = jax.jit(jax.value_and_grad(loss))(params, x)
    with use_mesh(built):
        got = jax.jit(jax.value_and_grad(loss))(jax.device_put(params, shardings), x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_dropout_drops_hidden_units_only_when_asked():
    moe, params, x = VARIANTS["dropless"], weights(VARIANTS["dropless"], SWIGLU), inputs()
    dropping = module(moe, dropout=0.5)
    plain, _ = apply(moe, params, x)

    @functools.partial(jax.jit, static_argnums=1)
    def run(key, deterministic):
        return dropping.apply({"params": params}, x, deterministic=deterministic, rngs={"dropout": key})[0]

    np.testing.assert_allclose(run(jax.random.key(0), True), plain, atol=1e-5)
    dropped = jnp.stack([run(jax.random.key(i), False) for i in range(400)])
    assert np.abs(dropped[0] - plain).max() > 0.1
    # Gated experts are linear in what is dropped, so the mean over draws is the whole.
    error = np.abs(dropped.mean(axis=0) - plain) / (dropped.std(axis=0) / 20 + 1e-6)
    assert error.max() < 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"experts": 0}, "MoE.experts = 0 must be a whole number of at least 1"),
        ({"per_token": 1.5}, "MoE.per_token = 1.5 must be a whole number"),
        ({"per_token": 9}, "MoE.per_token = 9 is more than the 8 experts"),
        ({"groups": 3}, "MoE.experts = 8 is not a multiple of groups = 3"),
        ({"groups": 2, "groups_per_token": 3}, "groups_per_token = 3 is more than groups = 2"),
        ({"groups": 4, "per_token": 3}, "more than the 2 experts in the 1 groups a token chooses"),
        ({"groups": 8, "groups_per_token": 4, "group_score": "top2"}, "'top2' needs groups of at least 2"),
        ({"router": "tanh"}, "MoE.router = 'tanh' is not one of softmax, sigmoid"),
        ({"scale": 0.0}, "MoE.scale = 0.0 must be positive"),
        ({"scale": math.nan}, "MoE.scale = nan must be positive"),
        ({"choose_first": True, "router": "sigmoid"}, "choose_first = True .* does not go with"),
        ({"shared_gate": True}, "shared_gate = True needs shared_d_ff"),
        ({"capacity": 4, "capacity_factor": 1.0}, "leave one of them None"),
        ({"capacity": 0}, "MoE.capacity = 0 must be"),
        ({"capacity_factor": -1.0}, "capacity_factor = -1.0 must be positive"),
        ({"balance_loss": -0.1}, "MoE.balance_loss = -0.1 must be at least 0"),
        ({"bias_update_rate": 0.1}, "bias_update_rate = 0.1 moves correction_bias, which is False"),
    ],
)
def test_bad_settings(fields, words):
    with pytest.raises(ValueError, match=words):
        MoE(**{"experts": 8, "per_token": 2, "d_ff": 4} | fields)


def test_settings_are_plain_values():
    moe = VARIANTS["everything"]
    again = MoE(**json.loads(json.dumps(dataclasses.asdict(moe))))
    assert again == moe
    assert hash(again) == hash(moe)


def test_a_missing_shared_mlp_is_refused():
    init = normal(1.0)
    with pytest.raises(ValueError, match="shared_d_ff = 4 and shared = None contradict each other"):
        MoeMlp(MoE(8, 2, 4, shared_d_ff=4), WIDTH, SWIGLU, init, init, init).init(jax.random.key(0), inputs())
