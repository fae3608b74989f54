"""Attention by the TPU's Pallas kernel ("splash": sparse flash attention; Dao et al. 2022, online softmax).

Scores live in the chip's vector memory, a tile at a time, forwards and backwards: memory grows with the
length and not with its square, and tiles that causality or a window mask altogether are not computed.
The kernel is jax.experimental.pallas.ops.tpu.splash_attention. On CPU it is interpreted, which is slow and
meant for tests.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5style.nn import platform
from t5style.nn.settings import AttentionBlocks
from t5style.parallel.rules import activation_axes, current_mesh

# The name under which a remat policy may keep what the backward kernels need of the forward one, its output
# and the logarithms of the softmax's denominators, so that it does not run again.
CONTEXT = "attention_context"


class Masking(NamedTuple):
    """Which keys a query may see, by its index.

    Attributes:
      causal: none after itself.
      window: none before i - window + 1 and, unless causal, none after i + window - 1.
    """

    causal: bool = False
    window: int | None = None


def refusal(
    query: jax.Array, key: jax.Array, value: jax.Array, *, bias: bool, dropout: bool, precision: str
) -> str | None:
    """Why the kernel cannot compute attention of these operands, or None if it can."""
    if bias:
        return "it takes no bias of the scores, as relative positions are"
    if dropout:
        return "it cannot drop attention weights"
    if precision != "default":
        return f"its products have the precision 'default', not {precision!r}"
    if query.dtype not in (jnp.bfloat16, jnp.float32) or not query.dtype == key.dtype == value.dtype:
        return (
            "it takes queries, keys and values of one dtype, bfloat16 or float32, not "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if platform.platform() == "gpu":
        return "it is a program for TPUs"
    return None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    masking: Masking,
    scale: float,
    softcap: float | None,
    sinks: jax.Array | None,
    blocks: AttentionBlocks,
) -> jax.Array:
    """As nn/attention.py's, of what `refusal` does not refuse: `[batch, length, heads, dim]` in and out.

    Under a mesh each device computes its rows of the batch and its heads, over whole sequences.
    """
    # [batch, heads, length, dim]
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    if scale != 1.0:
        query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    run = functools.partial(local_attention, masking=masking, softcap=softcap, blocks=blocks)
    mesh = current_mesh()
    if mesh is not None and mesh.size > 1:
        rows, heads = activation_axes(("batch", "heads"), query.shape[:2])
        ways = math.prod(mesh.shape[axis] for axis in heads)
        key, value = (_divisible(x, query.shape[1], ways) for x in (key, value))
        whole, by_row = PartitionSpec(rows, heads), PartitionSpec(rows)
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(whole, whole, whole, by_row, by_row, PartitionSpec(heads)),
            out_specs=whole,
            check_vma=False,  # the kernel does not say over which axes its output varies
        )
    return run(query, key, value, query_segments, key_segments, sinks).swapaxes(1, 2)


def _divisible(x: jax.Array, heads: int, ways: int) -> jax.Array:
    """Keys or values `[batch, kv_heads, ...]`, repeated until they divide as the query heads do."""
    groups = x.shape[1]
    if groups % ways == 0:
        return x
    times = next(
        n for n in range(1, heads // groups + 1) if groups * n % ways == 0 and heads % (groups * n) == 0
    )
    return jnp.repeat(x, times, axis=1)


def local_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    sinks: jax.Array | None = None,
    *,
    masking: Masking,
    softcap: float | None = None,
    blocks: AttentionBlocks,
) -> jax.Array:
    """Attention of one device's arrays.

    Args:
      query: `[batch, heads, queries, head_dim]`, scaled already.
      key, value: `[batch, kv_heads, keys, head_dim]`, `[batch, kv_heads, keys, value_dim]`.
      query_segments, key_segments: int32 `[batch, queries]`, `[batch, keys]`, or None.
      sinks: f32 `[heads]` or None.
      masking: which keys a query may see by its index.
      softcap: see nn/attention.py.
      blocks: the kernel's tiles.

    Returns:
      `[batch, heads, queries, value_dim]` in query's dtype.
    """
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    blocks, padded_queries, padded_keys = blocks.fit(queries, keys)
    if query_segments is None and (queries, keys) != (padded_queries, padded_keys):
        query_segments = jnp.ones((batch, queries), jnp.int32)
        key_segments = jnp.ones((batch, keys), jnp.int32)
    query = _pad(query, 2, padded_queries)
    key, value = _pad(key, 2, padded_keys), _pad(value, 2, padded_keys)
    interpret = platform.platform() != "tpu"
    kernel = _kernel(heads, padded_queries, padded_keys, masking, softcap, blocks, interpret)
    segments = None
    if query_segments is not None and key_segments is not None:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        segments = SegmentIds(_pad(query_segments, 1, padded_queries), _pad(key_segments, 1, padded_keys))
    run = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0, None))
    return run(query, key, value, segments, sinks)[:, :, :queries]


def _kernel(
    heads: int,
    queries: int,
    keys: int,
    masking: Masking,
    softcap: float | None,
    blocks: AttentionBlocks,
    interpret: bool,
) -> Any:
    """The kernel for one row of a batch, a callable. (Pallas is imported here: it takes 0.15 s.)"""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape, window = (queries, keys), masking.window
    mask: Any
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0 if masking.causal else window - 1), offset=0)
    else:
        mask = splash.CausalMask(shape) if masking.causal else splash.FullMask(shape)
    sizes = dataclasses.asdict(blocks)
    for name in ("q_layout", "k_layout", "v_layout"):
        minor = "HEAD_DIM_MINOR" if sizes[name] == "head_dim_minor" else "SEQ_MINOR"
        sizes[name] = splash.QKVLayout[minor]
    if blocks.use_fused_bwd_kernel:
        sizes["block_q_dq"] = sizes["block_kv_dq"] = None
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=CONTEXT,
        interpret=interpret,
    )


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind, up to `size`: values that no query sees, and segment 0."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)])
