"""The one place where a choice depends on the kind of device, with the reason for each choice."""

from collections.abc import Sequence

import jax

from t5style.nn.settings import LANES
from t5style.parallel.rules import current_mesh


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': where the program being traced will run.

    The mesh in force decides, because a TPU program may be compiled ahead of time on a CPU host; without one,
    jax's default backend does.
    """
    mesh = current_mesh()
    kind = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    return "gpu" if kind in ("cuda", "rocm", "gpu") else kind


# Queries at a time in the CPU's causal attention, which spares them the keys that come later. Of a training
# step of a LLaMA-style model on rows of 512 (experiments/benchmarks/train_step.py) 256 saved 6 %; 128 saved
# 8 % and took a third longer to compile.
CAUSAL_BLOCK = 256


def flatten_tokens() -> bool:
    """Whether projections see `[tokens, width]` rather than `[batch, length, width]`.

    The CPU backend runs a 2-D product through a tiled kernel and is slower with more dimensions. TPU and GPU
    compilers do as well either way, and keeping the dimensions apart lets both be sharded.
    """
    return platform() == "cpu"


def divides_top_k() -> bool:
    """Whether XLA divides top_k's rows over devices. CPU and GPU have a library's call for it, for which the
    rows of all devices would be gathered in each layer.
    """
    return platform() == "tpu"


def separate_angles() -> bool:
    """Whether rotary angles are kept from being fused into their uses.

    The CPU backend would compute their cosines and sines again for each head and layer, forwards and
    backwards: 8 % of the training step of a LLaMA-style model of 6 layers. Accelerators have them for free.
    """
    return platform() == "cpu"


def rotate_by_product() -> bool:
    """Whether rotary embeddings exchange the halves of a head by a product with a permutation.

    TPU: yes. A half of 64 numbers fills half of a vector register, and XLA writes halves to memory one by
    one before it joins them; the product goes through the matrix unit, which has time.
    """
    return platform() == "tpu"


def turns_rows() -> bool:
    """Whether a Pallas kernel can turn each row of an array further than the one above: TPUs from v5 on."""
    mesh = current_mesh()
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    return not device.device_kind.startswith(("TPU v2", "TPU v3", "TPU v4"))


def scale_queries() -> bool:
    """Whether the factor on attention scores is applied where queries are made, in float32.

    TPU: yes, where it costs nothing, because the attention kernel has no factor of its own, and a product
    in between is one more pass over the queries.
    """
    return platform() == "tpu"


def scan_layers(*, remat: bool) -> bool:
    """Whether layers are scanned when the config leaves it open.

    Accelerators: yes, compile time must not grow with depth. CPU: no, a loop costs 9 to 29 % there (copies
    in and out of its state); but yes with rematerialisation, because XLA's CPU scheduler runs an unrolled
    recomputation early and then saves no memory (10.5 MB against 10.8 without; in a scan 3.9 against 20.5).
    """
    return platform() != "cpu" or remat


def attention_implementation(*, dropout: bool, kernels: Sequence[str], queries: int, keys: int) -> str:
    """The attention implementation that config.attention = 'auto' stands for.

    CPU: one head at a time, so that the scores of a head stay in cache and are recomputed in the backward
    pass; but with dropout the einsum, because the random bits of each head are a program of their own
    (t5_tiny compiles in 23 s of CPU time rather than 31, at the same speed).
    TPU: a Pallas kernel, wherever one can compute what is asked (`kernels`): it never writes scores to
    memory. 'splash' (nn/attention_splash.py), or with T5's relative positions, which it does not take,
    'whole' (nn/attention_whole.py). Not where a head's scores do not fill one tile of 128 × 128: copies
    around a kernel cost as much there as what the einsum does with so few.
    GPU: the einsum. 'dot_product' asks for cuDNN's fused kernel; it is not chosen here because nobody has
    run it on one yet.
    """
    if platform() == "cpu":
        return "reference" if dropout else "cpu"
    if platform() == "tpu" and "splash" in kernels and min(queries, keys) >= LANES:
        return "splash"
    many = queries * keys >= LANES**2 and min(queries, keys) >= LANES // 2
    return "whole" if platform() == "tpu" and "whole" in kernels and many else "reference"


def has_cudnn_attention() -> bool:
    """Whether this process's GPUs run cuDNN's fused attention: NVIDIA's from Ampere (8.0) on.

    AMD's name their capability otherwise ("gfx942"), other devices have none.
    """
    if platform() != "gpu":
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability[:1].isdigit() and float(capability) >= 8.0


def grouped_product() -> str:
    """How rows are multiplied by the weight of their group (nn/grouped.py): 'ragged_dot', 'megablox' or
    'blocks'.

    GPU: jax.lax.ragged_dot, which XLA has a kernel for.
    TPU: Pallas kernels ("megablox"). XLA's ragged_dot is a kernel there too, but not its gradient by weights,
    which multiplies every row by every group's part, and it keeps float32 results: a training step of two
    layers of Mixtral 8x7B with 12 rows of 4096 a device takes 44.2 GB on v5p and 3.06 s by the compiler's
    cycles, and with the Pallas kernels 32.5 GB and 0.98 s. They take bfloat16 only; other types have
    ragged_dot.
    CPU: XLA multiplies every row by every group's weight, and loops over blocks of rows are faster at every
    size. Forwards, ms of CPU time, f32, width 512 (a single product of as many rows takes the last figure),
    experts of width 1024 where there are 8, 256 where 64:
    4096 rows, 8 experts: ragged_dot 428, a masked scan over experts 366, blocks 57 (38); with the gradient
    1359, 1209, 250 (139). 4096 rows, 64 experts: 1138, 499, 28 (11); with the gradient 3177, 2392, 115 (57).
    Decoding, 8 rows, 64 experts: 25, 10, 0.5, and a gather of each row's weights 0.8; 16 rows, 8 experts in
    bfloat16: 5.5, 7.1, 1.8, and 20 for the gather.
    """
    return {"cpu": "blocks", "tpu": "megablox"}.get(platform(), "ragged_dot")


def ragged_exchange() -> bool:
    """Whether devices send each other as many rows as there are (jax.lax.ragged_all_to_all).

    TPU: yes. XLA's CPU backend has no such operation (jax 0.10.2); nobody has run it on several GPUs yet.
    Without it all devices send buffers of the largest size that can be.
    """
    return platform() == "tpu"
