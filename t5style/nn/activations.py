"""Activations of MLPs by name, and the product of gated ones."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "silu_1702": lambda x: x * jax.nn.sigmoid(1.702 * x),  # GPT-OSS; the sigmoid approximation of gelu
    "linear": lambda x: x,
    "linear_plus_one": lambda x: x + 1,  # GPT-OSS
}


def hidden(inputs: Sequence[jax.Array], names: Sequence[str], clamp: float | None = None) -> jax.Array:
    """The hidden layer of an MLP: f(a), or f(a) ∘ g(b) of a gated one (Shazeer 2020).

    Args:
      inputs: a, or a (the gate) and b, all `[..., mlp]`.
      names: f, or f and g.
      clamp: a gate is kept from exceeding it and b within ± it before f and g (GPT-OSS's swiglu_limit).
    """
    if clamp is not None:
        bounds = [(None, clamp), (-clamp, clamp)]
        inputs = [jnp.clip(x, low, high) for x, (low, high) in zip(inputs, bounds, strict=True)]
    factors = [FUNCTIONS[name](x) for name, x in zip(names, inputs, strict=True)]
    return factors[0] * factors[1] if len(factors) == 2 else factors[0]
