"""Memory of a training step on long sequences divided over a TPU slice, compiled ahead of time.

python experiments/benchmarks/long_context.py --lengths=65536,131072 --kinds=ring,gather

A small decoder of two layers, bfloat16, one row, on v5e:2x4 with sequence=8. Each line says the peak memory
of a chip, or why the step does not fit. Takes one to two minutes of CPU for each; needs libtpu
(pip install 'jax[tpu]').
"""

import argparse
import os

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}

import jax
from jax.experimental import topologies

from t5style.models.config import TransformerConfig
from t5style.parallel.mesh import MeshConfig
from t5style.train.program import TrainingProgram

MESH = MeshConfig(data=1, sequence=8)


def peak(length: int, kind: str, implementation: str) -> str:
    """Peak memory of the training step, or the compiler's refusal."""
    config = TransformerConfig(
        vocab_size=4096,
        d_model=512,
        d_ff=1024,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        decoder_layers=2,
        activations=("silu", "linear"),
        positions="rope",
        scale_attention=True,
        tie_embeddings=True,
        init="normal",
        init_scale=0.02,
        remat="full",
        attention=implementation,
        sequence_attention=kind,
    )
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    program = TrainingProgram(config, {"decoder": length}, 1, mesh=MESH)
    try:
        memory = program.compile(MESH.build(devices)).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return f"does not fit: {str(error).splitlines()[0][:160]}"
    return f"peak {memory.peak_memory_in_bytes / 1e9:.2f} GB a chip"


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="65536,131072")
    parser.add_argument("--kinds", default="ring,gather")
    parser.add_argument("--attention", default="auto,reference", help="of each kind in turn")
    arguments = parser.parse_args()
    kinds, implementations = arguments.kinds.split(","), arguments.attention.split(",")
    for kind, implementation in zip(kinds, implementations, strict=True):
        for length in map(int, arguments.lengths.split(",")):
            said = peak(length, kind, implementation)
            print(f"{length:>8} tokens, {kind}, {implementation}: {said}", flush=True)


if __name__ == "__main__":
    main()
