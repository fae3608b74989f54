"""Peak memory of loading and saving a large Hugging Face checkpoint on a mesh of 8 CPU devices.

    python experiments/benchmarks/checkpoint_memory.py --folder=FOLDER
    python experiments/benchmarks/checkpoint_memory.py --folder=FOLDER --layers=4 --fsdp=4 --tensor=2

A checkpoint of LLaMA 2 7B's shape with random bfloat16 weights (13.5 GB) is written to FOLDER/theirs, loaded
onto the devices in bfloat16, saved to FOLDER/ours, and compared with it, each step in a process of its own.
FOLDER needs room for both copies; they are deleted at the end.

Reported for each step: seconds, CPU seconds, the kernel's VmHWM of the process (most memory it ever held,
mapped file pages among it), and how much that is above the checkpoint's size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import ml_dtypes
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--step", choices=("write", "load", "compare"), help="one step, in this process")
    args = parser.parse_args()
    if args.step is not None:
        {"write": write, "load": load_and_save, "compare": compare}[args.step](args)
        return
    devices = args.fsdp * args.tensor
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    try:
        for step in ("write", "load", "compare"):
            subprocess.run([sys.executable, *sys.argv, f"--step={step}"], env=environment, check=True)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def report(what: str, start: tuple[float, float], size: int | None = None) -> None:
    """One line: time since `start`, and the most memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = f"{what:24} {time.monotonic() - start[0]:7.1f} s {time.process_time() - start[1]:7.1f} s CPU"
    line += f"   peak {peak / 1e9:6.2f} GB"
    if size is not None:
        line += f", checkpoint {size / 1e9:.2f} GB, above it {(peak - size) / 1e9:.2f} GB"
    print(line, flush=True)


def write(args: argparse.Namespace) -> None:
    """The checkpoint: each tensor is a random block, repeated from a place of its own."""
    from t5style.models import convert_stream
    from t5style.models.families.registry import FAMILIES
    from t5style.models.presets import llama2_7b
    from t5style.models.safetensors_files import Planned, write_folder

    start = time.monotonic(), time.process_time()
    config = llama2_7b(decoder_layers=args.layers)
    family = FAMILIES["llama"]
    # bfloat16 of either sign from 2**-8 to 2**-5: sign, mantissa and the exponent's last bit are random.
    block = np.random.default_rng(0).integers(0, 2**16, 1 << 20, dtype=np.uint16) & 0x81FF | 0x3B00

    def value(shape: tuple[int, ...], seed: int) -> np.ndarray:
        size = math.prod(shape)
        repeats = -(-size // block.size)
        blocks = np.concatenate([np.roll(block, seed * 1009 + i * 17) for i in range(repeats)])
        return blocks[:size].reshape(shape).view(ml_dtypes.bfloat16)

    dtype = np.dtype(ml_dtypes.bfloat16)
    placed = convert_stream.place(config, family.rows(config), "LLaMA")
    planned = [
        Planned(name, shape, dtype, lambda shape=shape, seed=seed: value(shape, seed))
        for seed, (name, shape) in enumerate(tensor for one in placed for tensor in one.tensors())
    ]
    folder = args.folder / "theirs"
    folder.mkdir(parents=True)
    write_folder(folder, planned)
    described = {"model_type": "llama", **family.save_config(config)}
    (folder / "config.json").write_text(json.dumps(described))
    report("written", start)


def load_and_save(args: argparse.Namespace) -> None:
    """Onto the mesh, and from it."""
    import jax

    from t5style.models.convert import load_huggingface, save_huggingface
    from t5style.parallel.mesh import MeshConfig

    mesh = MeshConfig(data=1, fsdp=args.fsdp, tensor=args.tensor).build(jax.local_devices())
    start = time.monotonic(), time.process_time()
    report("started", start)
    config, params = load_huggingface(args.folder / "theirs", "bfloat16", mesh=mesh)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    report(f"loaded on {mesh.size} devices", start, size)
    start = time.monotonic(), time.process_time()
    save_huggingface(args.folder / "ours", config, params)
    report("saved", start, size)


def compare(args: argparse.Namespace) -> None:
    """Every tensor, bit by bit."""
    from t5style.models.safetensors_files import read_folder

    theirs, ours = read_folder(args.folder / "theirs"), read_folder(args.folder / "ours")
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert np.array_equal(tensor.read().view(np.uint16), ours[name].read().view(np.uint16)), name
    print(f"{len(theirs)} tensors are equal, in {len({t.file for t in ours.values()})} files")


if __name__ == "__main__":
    main()
