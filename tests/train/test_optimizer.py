"""Optimisers against optax by itself and against the published formulas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5style.models import params as model_params
from t5style.models.config import TransformerConfig
from t5style.train.optimizer import Optimizer, decay_mask, on_matrices
from t5style.train.schedules import Schedule

AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "norm": {"scale": ("layers", "embed")},
        "query": {
            "kernel": ("layers", "embed", "heads", "head_dim"),
            "bias": ("layers", "heads", "head_dim"),
        },
    },
    "relative_bias": ("relpos_buckets", "heads"),
}
SHAPES = {
    "embedding": (150, 130),
    "layers": {"norm": {"scale": (3, 130)}, "query": {"kernel": (3, 130, 4, 40), "bias": (3, 4, 40)}},
    "relative_bias": (32, 4),
}


def tree(seed: int) -> Any:
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(0, 0.5, shape), jnp.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(transform: optax.GradientTransformation, params: Any, pick: Any = lambda t: t, steps: int = 4) -> Any:
    state = jax.jit(transform.init)(params)

    @jax.jit  # op by op, each of the many small operations would be compiled by itself
    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(steps):
        params, state = update(pick(tree(100 + step)), state, params)
    return params


def assert_same(a: Any, b: Any, rtol: float = 2e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b)


def test_decay_is_for_matrices() -> None:
    assert decay_mask(AXES) == {
        "embedding": True,
        "layers": {"norm": {"scale": False}, "query": {"kernel": True, "bias": False}},
        "relative_bias": False,
    }


def test_decay_mask_of_real_models() -> None:
    for encoder_layers, positions in ((2, "relative_bias"), (0, "rope")):
        config = TransformerConfig(
            vocab_size=8, d_model=8, d_ff=8, num_heads=2, decoder_layers=2,
            encoder_layers=encoder_layers, positions=positions,
        )  # fmt: skip
        mask = decay_mask(model_params.logical_axes(config))
        decayed = {
            jax.tree_util.keystr(path, simple=True, separator="/"): value
            for path, value in jax.tree_util.tree_leaves_with_path(mask)
        }
        for name, value in decayed.items():
            assert value == (not any(word in name for word in ("norm", "relative_bias"))), name
        assert sum(decayed.values()) > 5


def test_adamw_is_optax_with_clipping_and_masked_decay() -> None:
    ours = Optimizer(
        learning_rate=Schedule("linear", 0.1), b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, clip_norm=0.5
    ).build(AXES, 10)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(
            optax.linear_schedule(0.1, 0.0, 10), 0.8, 0.9, 1e-6, weight_decay=0.3, mask=decay_mask(AXES)
        ),
    )
    assert_same(run(ours, tree(0)), run(theirs, tree(0)))


def test_adamw_first_step_by_hand() -> None:
    """Adam's first update is g / (|g| + eps) whatever the betas; decay adds lr * wd * p, on matrices only."""
    params, grads = tree(0), tree(1)
    transform = Optimizer(learning_rate=Schedule("constant", 0.01), weight_decay=0.1, clip_norm=None).build(
        AXES, 10
    )
    updates, _ = transform.update(grads, transform.init(params), params)
    g, p = np.asarray(grads["embedding"]), np.asarray(params["embedding"])
    np.testing.assert_allclose(updates["embedding"], -0.01 * (g / (np.abs(g) + 1e-8) + 0.1 * p), rtol=1e-4)
    g = np.asarray(grads["relative_bias"])
    np.testing.assert_allclose(updates["relative_bias"], -0.01 * g / (np.abs(g) + 1e-8), rtol=1e-4)


def test_adafactor_treats_each_layer_as_a_matrix() -> None:
    """A stack of layers gets the updates that optax.adafactor gives each layer alone, as [embed, heads *
    head_dim].
    """
    transform = Optimizer("adafactor", Schedule("constant", 0.1), clip_norm=None).build(AXES, 10)
    got = run(transform, tree(0))
    plain = optax.adafactor(0.1)

    for layer in range(3):
        pick = lambda t, layer=layer: t["layers"]["query"]["kernel"][layer].reshape(130, 160)  # noqa: E731
        np.testing.assert_allclose(pick(got), run(plain, pick(tree(0)), pick), rtol=1e-5, atol=1e-6)
        pick = lambda t, layer=layer: t["layers"]["norm"]["scale"][layer]  # noqa: E731
        np.testing.assert_allclose(pick(got), run(plain, pick(tree(0)), pick), rtol=1e-5, atol=1e-6)
    pick = lambda t: t["embedding"]  # noqa: E731
    np.testing.assert_allclose(pick(got), run(plain, pick(tree(0)), pick), rtol=1e-5, atol=1e-6)


def test_adafactor_keeps_rows_and_columns_only() -> None:
    state = on_matrices(optax.adafactor(None), AXES).init(tree(0))
    factored = state["layers"]["query"]["kernel"][0]
    assert factored.v_row.shape == (3, 130)
    assert factored.v_col.shape == (3, 160)
    assert factored.v.shape == (3, 1)
    assert state["relative_bias"][0].v.shape == (32, 4)


def test_adafactor_first_step_by_hand() -> None:
    """Shazeer & Stern (2018), algorithm 4: at step 1 the decay is 0, so v is the squared gradient,
    factored.
    """
    params, grads = tree(0), tree(1)
    transform = Optimizer("adafactor", Schedule("constant", 0.1), clip_norm=None, weight_decay=0.2).build(
        AXES, 10
    )
    updates, _ = transform.update(grads, transform.init(params), params)
    g, p = np.asarray(grads["embedding"], np.float64), np.asarray(params["embedding"], np.float64)
    square = g**2 + 1e-30
    rows, columns = square.mean(1, keepdims=True), square.mean(0, keepdims=True)
    u = g / np.sqrt(rows * columns / square.mean())
    u /= max(1.0, np.sqrt((u**2).mean()))
    scale = max(1e-3, np.sqrt((p**2).mean()))
    np.testing.assert_allclose(updates["embedding"], -0.1 * (u * scale + 0.2 * p), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adam"}, "'adam'; it must be one of adamw, adafactor"),
        ({"b2": 1.0}, "b2 is 1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ],
)
def test_bad_values_are_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Optimizer(**fields)
