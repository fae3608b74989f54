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
        key, value = (divisible(x, query.shape[1], ways) for x in (key, value))
        whole, by_row = PartitionSpec(rows, heads), PartitionSpec(rows)
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(whole, whole, whole, by_row, by_row, PartitionSpec(heads)),
            out_specs=whole,
            check_vma=False,  # the kernel does not say over which axes its output varies
        )
    return run(query, key, value, query_segments, key_segments, sinks).swapaxes(1, 2)


def divisible(x: jax.Array, heads: int, ways: int, axis: int = 1) -> jax.Array:
    """Keys or values, repeated along the axis of their heads until they divide as the query heads do."""
    groups = x.shape[axis]
    if groups % ways == 0:
        return x
    times = next(
        n for n in range(1, heads // groups + 1) if groups * n % ways == 0 and heads % (groups * n) == 0
    )
    return jnp.repeat(x, times, axis=axis)


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
    operands = _padded(query, key, value, query_segments, key_segments, blocks)
    kernel = operands.kernel(masking, softcap)
    return operands.each_row(kernel)(*operands.arrays, sinks)[:, :, : query.shape[2]]


def local_forward(
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
) -> tuple[jax.Array, jax.Array]:
    """As local_attention, and the logarithms of the softmax's denominators, f32 `[batch, heads, queries]`.

    For attention to keys in several parts: contexts of the parts are summed with the weights
    exp(logarithm - logarithm of the sum of all exp(logarithm)). Where a query sees no key of a part, its
    logarithm is about -2e38. Not differentiable: the gradients of a part are local_backward's.
    """
    operands = _padded(query, key, value, query_segments, key_segments, blocks)
    kernel = operands.kernel(masking, softcap, save_residuals=True)
    context, (logarithm,) = operands.each_row(kernel)(*operands.arrays, sinks)
    return context[:, :, : query.shape[2]], logarithm[:, :, : query.shape[2]]


def local_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    context: jax.Array,
    logarithm: jax.Array,
    gradient: jax.Array,
    *,
    masking: Masking,
    softcap: float | None = None,
    blocks: AttentionBlocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, of a part of the keys.

    Args:
      query, key, value, query_segments, key_segments: as local_forward's.
      context: of all parts together, `[batch, heads, queries, value_dim]`.
      logarithm: of all parts together, f32 `[batch, heads, queries]`.
      gradient: of that context.
      masking, softcap, blocks: as local_forward's.

    Returns:
      Arrays like query, key and value.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    operands = _padded(query, key, value, query_segments, key_segments, blocks)
    kernel = operands.kernel(masking, softcap)

    def row(*arrays: Any) -> tuple[jax.Array, ...]:
        query, key, value, segments, context, logarithm, gradient = arrays
        masks = (kernel.dq_mask_info, kernel.dkv_mask_info)
        residuals = (query, key, value, segments, None, context, logarithm, *masks)
        found = splash_attention_kernel._splash_attention_bwd(**kernel.kwargs, res=residuals, do=gradient)
        return tuple(found[3:6])  # before them come those of the masks

    queries = operands.arrays[0].shape[2]
    given = (_pad(x, 2, queries) for x in (context, logarithm, gradient))
    by_query, by_key, by_value = jax.vmap(row)(*operands.arrays, *given)
    return by_query[:, :, : query.shape[2]], by_key[:, :, : key.shape[2]], by_value[:, :, : key.shape[2]]


class _Operands(NamedTuple):
    """What the kernel takes, of lengths that its blocks divide."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    segments: Any  # of queries and of keys, or None
    blocks: AttentionBlocks

    @property
    def arrays(self) -> tuple[Any, ...]:
        return self[:4]

    def kernel(self, masking: Masking, softcap: float | None, save_residuals: bool = False) -> Any:
        """A callable for one row of the batch. (Pallas is imported here: it takes 0.15 s.)"""
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        heads, queries = self.query.shape[1:3]
        shape, window = (queries, self.key.shape[2]), masking.window
        mask: Any
        if window is not None:
            mask = splash.LocalMask(shape, (window - 1, 0 if masking.causal else window - 1), offset=0)
        else:
            mask = splash.CausalMask(shape) if masking.causal else splash.FullMask(shape)
        sizes = dataclasses.asdict(self.blocks)
        for name in ("q_layout", "k_layout", "v_layout"):
            minor = "HEAD_DIM_MINOR" if sizes[name] == "head_dim_minor" else "SEQ_MINOR"
            sizes[name] = splash.QKVLayout[minor]
        if self.blocks.use_fused_bwd_kernel:
            sizes["block_q_dq"] = sizes["block_kv_dq"] = None
        return splash.make_splash_mha(
            splash.MultiHeadMask([mask] * heads),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            save_residuals=save_residuals,
            residual_checkpoint_name=None if save_residuals else CONTEXT,
            interpret=platform.platform() != "tpu",
        )

    def each_row(self, kernel: Any) -> Any:
        """The kernel over a batch, of query, key, value, segments and sinks, which all rows share."""
        return jax.vmap(kernel, in_axes=(0, 0, 0, None if self.segments is None else 0, None))


def _padded(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
    blocks: AttentionBlocks,
) -> _Operands:
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    blocks, padded_queries, padded_keys = blocks.fit(queries, keys)
    if query_segments is None and (queries, keys) != (padded_queries, padded_keys):
        query_segments = jnp.ones((batch, queries), jnp.int32)
        key_segments = jnp.ones((batch, keys), jnp.int32)
    segments = None
    if query_segments is not None and key_segments is not None:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        segments = SegmentIds(_pad(query_segments, 1, padded_queries), _pad(key_segments, 1, padded_keys))
    key, value = _pad(key, 2, padded_keys), _pad(value, 2, padded_keys)
    return _Operands(_pad(query, 2, padded_queries), key, value, segments, blocks)


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Zeros behind, up to `size`: values that no query sees, and segment 0."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis]) if i == axis else (0, 0) for i in range(x.ndim)])
