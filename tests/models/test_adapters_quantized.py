"""QLoRA: what is kept of the base, that it computes and differentiates as its dense numbers do, its loss."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest

from t5style.models.adapters import Lora, Tree
from t5style.models.adapters_quantized import QLora, dense
from t5style.models.transformer import Transformer
from t5style.nn import quantized_kernel
from t5style.parallel.rules import is_axes
from tests.models.test_adapters import DECODER, TOKENS, noisy
from tests.models.tiny import params_of

WIDE = DECODER.replace(d_model=64, d_ff=128, decoder_layers=1, scan_layers=True)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.16), ("int8", 0.005)])
def test_codes_are_qwix_s_and_half_a_byte_or_one(kind: str, most: float) -> None:
    """A value is off by at most half the widest gap between levels, in units of its block's largest."""
    qwix = pytest.importorskip("qwix")
    kernel = jax.random.normal(jax.random.key(0), (128, 4, 8))
    codes, scales = quantized_kernel.quantize(kernel, 0, kind, 64)
    assert codes.nbytes == kernel.size // (2 if kind == "nf4" else 1)
    assert scales.shape == (2, 4, 8)
    got = quantized_kernel.dequantize(codes, scales, 0)
    whole = qwix.quantize(kernel, kind, channelwise_axes=[1, 2], tiled_axes={0: 64})
    np.testing.assert_allclose(got, qwix.dequantize(whole), atol=1e-6)
    largest = np.abs(kernel).reshape(2, 64, 4, 8).max(axis=1, keepdims=True)
    assert (np.abs(got - kernel).reshape(2, 64, 4, 8) <= most * largest).all()


def test_it_is_lora_on_the_dense_numbers_of_the_base() -> None:
    pytest.importorskip("qwix")
    config, settings = DECODER.replace(decoder_layers=1), {"rank": 2, "alpha": 4.0, "dora": True}
    adapter, plain = QLora(**settings), Lora(**settings)  # type: ignore[arg-type]
    base = params_of(config)

    @jax.jit
    def made(base: Tree) -> tuple[Tree, Tree, Tree]:
        kept = adapter.prepare(config, base)
        return kept, dense(config, kept), adapter.init(config, jax.random.key(1), base)

    kept, numbers, own = made(base)
    own = noisy(own)
    axes = jax.tree.map(len, adapter.prepared_axes(config), is_leaf=is_axes)
    assert axes == jax.tree.map(lambda leaf: leaf.ndim, kept)

    def loss(own: Tree, base: Tree, adapter: Lora) -> jax.Array:
        tree = adapter.apply(config, base, own)
        return (Transformer(config).apply({"params": tree}, TOKENS) ** 2).mean()

    graded = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    got, want = graded(own, kept, adapter), graded(own, numbers, plain)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), got, want)


def test_its_loss_comes_close_to_that_of_lora_on_the_base_in_floating_point() -> None:
    """Learning one batch by heart from a random base."""
    pytest.importorskip("qwix")
    base, losses = params_of(WIDE), {}
    for adapter in (Lora(rank=4), QLora(rank=4)):
        kept = jax.jit(functools.partial(adapter.prepare, WIDE))(base) if isinstance(adapter, QLora) else base
        own = jax.jit(functools.partial(adapter.init, WIDE))(jax.random.key(1), base)
        optimizer = optax.adam(1e-2)

        def loss(own: Tree, kept: Tree, adapter: Lora = adapter) -> jax.Array:
            logits = Transformer(WIDE).apply({"params": adapter.apply(WIDE, kept, own)}, TOKENS[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

        @jax.jit
        def train(own: Tree, kept: Tree, loss: Any = loss, optimizer: Any = optimizer) -> jax.Array:
            def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
                value, gradient = jax.value_and_grad(loss)(carry[0], kept)
                updates, state = optimizer.update(gradient, carry[1])
                return (optax.apply_updates(carry[0], updates), state), value

            return jax.lax.scan(step, (own, optimizer.init(own)), None, length=40)[1]

        losses[type(adapter)] = np.asarray(train(own, kept))
    float_base, quantised = losses[Lora], losses[QLora]
    assert quantised[-1] < 0.25 * quantised[0]
    assert abs(quantised[-1] - float_base[-1]) < 0.05 * float_base[0]


def test_settings_that_cannot_be_are_named() -> None:
    for fields, because in (({"kind": "int3"}, "QLora.kind"), ({"block": 7}, "QLora.block")):
        with pytest.raises(ValueError, match=because):
            QLora(**fields)
