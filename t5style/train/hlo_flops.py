"""Multiplications of a compiled program, from the shapes of what it multiplies.

A multiplication and an addition are two FLOPs. `instruction_flops` counts matrix products and convolutions
(the TPU compiler writes all matrix products as convolutions); `kernel_flops` knows the Pallas kernels that a
transformer uses, which to the compiler are closed boxes.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable

import numpy as np

from t5style.train.hlo import Computation, Instruction, Program, Shape

# Share of the pairs of queries and keys that attention computes: 0.5 if causal. Or a function of the kernel's
# place in the program (`op_name`), its queries and its keys.
AttentionFraction = float | Callable[[str, int, int], float]
# Matrix products of splash attention's kernels, for every pair of a query and a key: forward Q·Kᵀ and P·V;
# backward the first again and what each kernel returns. (jax 0.10, pallas/ops/tpu/splash_attention: dq needs
# S, dP, dQ; dkv needs S, dV, dP, dK; the fused kernel all five.)
_SPLASH = {"fwd": (1, 1), "dq": (2, 1), "dkv": (2, 2), "fused": (3, 2)}  # over head_dim of Q and K, of V


def instruction_flops(program: Program, instruction: Instruction) -> float:
    """FLOPs of one run of an instruction: of a fusion, of what is in it; 0 where nothing is multiplied."""
    if instruction.opcode == "fusion" or " calls=" in instruction.attributes:
        ragged = is_ragged(instruction)
        return float(sum(_own_flops(program, each, ragged) for each in program.inside(instruction)))
    return float(_own_flops(program, instruction))


def is_ragged(instruction: Instruction) -> bool:
    """Whether a fusion is `lax.ragged_dot` that knows where the groups begin.

    It is written as one product of all rows for each group, of which a row's own is kept. (The compiler also
    makes masked products of ragged_dot that do run once for each group, and kernels.)
    """
    return "ragged_dot" in instruction.op_name and instruction.attribute("kind") == "kCustom"


def _own_flops(program: Program, instruction: Instruction, ragged: bool = False) -> int:
    computation = program.computations[instruction.computation]
    if instruction.opcode == "dot":
        return _dot(computation, instruction)
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction, ragged)
    if instruction.opcode == "custom-call" and "$gemm" in (instruction.attribute("custom_call_target") or ""):
        return _library_product(computation, instruction)
    return 0


def _shape(computation: Computation, instruction: Instruction, operand: int) -> Shape | None:
    operands = computation.operands(instruction)
    return operands[operand].shapes[0] if operand < len(operands) and operands[operand].shapes else None


def _numbers(text: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text or "")]


def _dot(computation: Computation, instruction: Instruction) -> int:
    left = _shape(computation, instruction, 0)
    if left is None:
        return 0
    contracted = _numbers(instruction.attribute("lhs_contracting_dims"))
    return 2 * instruction.shapes[0].elements * math.prod(left.dims[dim] for dim in contracted)


def _library_product(computation: Computation, instruction: Instruction) -> int:
    """cuBLAS, as XLA for GPU calls it."""
    left = _shape(computation, instruction, 0)
    match = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.config)
    if left is None or match is None:
        return 0
    return 2 * instruction.shapes[0].elements * math.prod(left.dims[dim] for dim in _numbers(match[1]))


def _convolution(computation: Computation, instruction: Instruction, ragged: bool) -> int:
    left, right = _shape(computation, instruction, 0), _shape(computation, instruction, 1)
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels") or "")
    if left is None or right is None or labels is None:
        return 0
    size_of = [
        dict(zip(names, shape.dims, strict=False))
        for names, shape in zip(labels.groups(), (left, right, instruction.shapes[0]), strict=True)
    ]
    window = {
        key: value.split("x")
        for key, value in re.findall(r"(\w+)=([\w\-]+)", instruction.attribute("window") or "")
    }
    flops = 2 * size_of[0]["b"] * size_of[1]["o"] * size_of[1]["i"]
    flops //= int(instruction.attribute("batch_group_count") or 1)
    for n in range(len(labels[1]) - 2):

        def of(key: str, default: str, n: int = n) -> str:
            return window[key][n] if key in window else default

        low = re.match(r"(-?\d+)_", of("pad", "0_0"))
        flops *= _valid_positions(
            size_of[0][str(n)],
            size_of[1][str(n)],
            size_of[2][str(n)],
            int(of("stride", "1")),
            int(low[1]) if low else 0,
            int(of("lhs_dilate", "1")),
            int(of("rhs_dilate", "1")),
        )
    return flops // size_of[0].get("0", 1) if ragged else flops


@functools.cache
def _valid_positions(
    size: int, window: int, outputs: int, stride: int, low: int, dilation: int, window_dilation: int
) -> int:
    """Along one dimension, how often the window meets an element: not padding, not a hole of dilation.

    The compiler writes batch dimensions as windows of which only one position meets anything.
    """
    at = (
        np.arange(outputs, dtype=np.int64)[:, None] * stride
        + np.arange(window, dtype=np.int64)[None] * window_dilation
        - low
    )
    return int(((at >= 0) & (at % dilation == 0) & (at // dilation < size)).sum())


def kernel_flops(
    computation: Computation, instruction: Instruction, attention_fraction: AttentionFraction
) -> tuple[str, float, str] | None:
    """Name, FLOPs and where they come from, of a Pallas kernel for TPU; None if neither the kernel nor its
    author says.

    The author's estimate (`pl.CostEstimate`, which the compiler keeps) counts before our formulas.

    Args:
      computation: the one that the kernel's call is in.
      instruction: the call.
      attention_fraction: share of the pairs of queries and keys that attention computes (its kernel skips
        blocks that the mask leaves empty), or a function that tells it.
    """
    name = kernel_name(instruction)
    if estimate := cost_estimate(instruction):
        return name, float(estimate.get("flops", 0)), "the kernel's own estimate"
    operands = [each.shapes[0] for each in computation.operands(instruction) if each.shapes]
    arrays = [shape for shape in operands if shape.dtype in ("bf16", "f32", "f16") and len(shape.dims) >= 2]
    if "splash" in name:
        found = _splash(instruction, arrays, attention_fraction)
        return (name, *found) if found else None
    if name == "ragged-dot-metadata":  # where the groups begin, for the kernel that multiplies
        return name, 0.0, "no products"
    if re.search(r"t?gmm", name):
        shapes = [*arrays[:2], instruction.shapes[0]]
        return name, _grouped(shapes), "rows × in × out"
    return None


def kernel_name(instruction: Instruction) -> str:
    """What a Pallas kernel is called: the last part of its place in the program that is a name."""
    parts = [part for part in re.split(r"[/()]", instruction.op_name) if part]
    known = [part for part in parts if re.search(r"splash_m[hq]a|gmm$", part)]
    if known:
        return known[-1]
    named = [part for part in parts if part not in ("pallas_call", "custom_call", "jit", "vmap", "jvp")]
    return named[-1] if named else instruction.name


def cost_estimate(instruction: Instruction) -> dict[str, int]:
    """FLOPs and bytes by its author, {} if there are none."""
    match = re.search(r'"cost_estimate":(\{[^}]*\})', instruction.config)
    return {key: int(value) for key, value in json.loads(match[1]).items()} if match else {}


def _splash(
    instruction: Instruction, arrays: list[Shape], share: AttentionFraction
) -> tuple[float, str] | None:
    """Splash attention (jax.experimental.pallas.ops.tpu and those made after it): Q, K, V are its first
    arrays, [..., length, head_dim].
    """
    kind = re.search(r"(fwd|dq|dkv)", kernel_name(instruction))
    arrays = [shape for shape in arrays if len(shape.dims) >= 3]
    if kind is None or len(arrays) < 3:
        return None
    settings = instruction.attribute("frontend_attributes") or ""
    # Its layouts: 1 has head_dim last, 2 the length.
    layouts = dict(re.findall(r'\\"([qkv])_layout\\": (\d)', settings))
    query, key, value = (
        (*shape.dims[:-2], shape.dims[-1], shape.dims[-2]) if layouts.get(which) == "2" else shape.dims
        for which, shape in zip("qkv", arrays, strict=False)
    )
    step = kind[1]
    if step == "dkv" and len(instruction.shapes) > 4:  # two scratch arrays, dK, dV; fused dQ as well
        step = "fused"
    over_keys, over_values = _SPLASH[step]
    pairs = math.prod(query[:-1]) * key[-2]
    fraction = share(instruction.op_name, query[-2], key[-2]) if callable(share) else share
    flops = 2 * pairs * (over_keys * query[-1] + over_values * value[-1]) * fraction
    products = over_keys + over_values
    return flops, f"{products} products of {query[-2]} queries and {key[-2]} keys × {fraction:g}"


def _grouped(shapes: list[Shape]) -> float:
    """Grouped matrix products, of rows [m, k] with one of [groups, k, n] each, and their gradients: each is
    of three arrays of m·k, k·n (a group's) and m·n elements, whose product is (m·k·n)².
    """
    sizes = [shape.elements // (shape.dims[0] if len(shape.dims) == 3 else 1) for shape in shapes]
    return 2 * math.sqrt(math.prod(sizes))
