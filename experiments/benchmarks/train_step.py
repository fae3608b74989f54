"""One training step of ours beside Hugging Face transformers on PyTorch, on the CPU, in one run.

    python experiments/benchmarks/train_step.py                       # both workloads, f32 and bf16
    python experiments/benchmarks/train_step.py --workload=t5 --dtype=f32 --rounds=5

Each contestant lives in a process of its own (this script again, with `--worker`): it builds the model,
warms up and then runs a few steps whenever it is asked. The parent asks them in turn, A B C A B C ..., so
that whatever else the machine does falls on all of them alike; the processes that are not being asked sleep.
Reported per step: the median wall time, the median CPU time, and the peak resident memory while stepping. A
ratio above 1 means that ours is better.

PyTorch runs with `OMP_WAIT_POLICY=PASSIVE`: otherwise its idle threads spin and their spinning counts as CPU
time. Dropout is off, the optimiser is AdamW (PyTorch's fused one), every token is real, and bf16 means bf16
arithmetic over f32 parameters (`torch.autocast`).
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model's shape and its batch."""

    title: str
    encoder_decoder: bool
    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    head_dim: int
    layers: int  # of the decoder, and of the encoder where there is one
    batch: int
    decoder_length: int
    encoder_length: int = 0

    def arrays(self) -> dict[str, np.ndarray]:
        """Ids: `targets`, `decoder` int32 [batch, decoder_length]; `encoder` [batch, encoder_length]."""
        generator = np.random.default_rng(0)
        targets = generator.integers(3, self.vocab_size, (self.batch, self.decoder_length), dtype=np.int32)
        decoder = np.roll(targets, 1, axis=1)
        decoder[:, 0] = 0
        found = {"targets": targets, "decoder": decoder}
        if self.encoder_decoder:
            shape = (self.batch, self.encoder_length)
            found["encoder"] = generator.integers(3, self.vocab_size, shape, dtype=np.int32)
        return found


WORKLOADS = {
    "llama": Workload("LLaMA-style 384 x 6, batch 8 x 512", False, 8192, 384, 1024, 6, 64, 6, 8, 512),
    "t5": Workload(
        "T5 1.1-small, batch 8 x (512 in, 114 out)", True, 32128, 512, 1024, 6, 64, 8, 8, 114, 512
    ),
    # For the script's own test: seconds instead of minutes.
    "tiny": Workload("tiny LLaMA-style, batch 2 x 16", False, 64, 32, 64, 2, 16, 2, 2, 16),
}
DTYPES = ("f32", "bf16")
CONTESTANTS = ("ours", "torch-eager", "torch-compiled")
LEARNING_RATE = 1e-4


def torch_step(workload: Workload, dtype: str, threads: int, compiled: bool) -> Callable[[], float]:
    """One step of transformers' model on PyTorch; returns the loss."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    w = workload
    arrays = {name: torch.from_numpy(a.astype(np.int64)) for name, a in w.arrays().items()}
    model: Any
    if w.encoder_decoder:
        config = transformers.T5Config(
            vocab_size=w.vocab_size,
            d_model=w.d_model,
            d_ff=w.d_ff,
            d_kv=w.head_dim,
            num_heads=w.num_heads,
            num_layers=w.layers,
            num_decoder_layers=w.layers,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            use_cache=False,
        )
        # T5 1.1 has one embedding for both stacks and a head of its own. transformers 5.23 ignores
        # tie_word_embeddings as an argument of T5Config; as an attribute it parts the stacks' embeddings too.
        config.tie_word_embeddings = False
        model = transformers.T5ForConditionalGeneration(config)
        model.set_input_embeddings(model.shared)
        inputs = {
            "input_ids": arrays["encoder"],
            "decoder_input_ids": arrays["decoder"],
            "labels": arrays["targets"],
        }
    else:
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=w.vocab_size,
                hidden_size=w.d_model,
                intermediate_size=w.d_ff,
                num_hidden_layers=w.layers,
                num_attention_heads=w.num_heads,
                max_position_embeddings=w.decoder_length,
                use_cache=False,
                tie_word_embeddings=False,
            )
        )
        inputs = {"input_ids": arrays["decoder"], "labels": arrays["decoder"]}  # shifted inside by one
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            loss = forward(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def our_step(workload: Workload, dtype: str, threads: int) -> Callable[[], float]:
    """One step of t5style's own training step, on the batch a job would give it; returns the loss."""
    del threads  # XLA takes the CPUs this process may use
    import jax
    import jax.numpy as jnp

    from t5style.models import params as model_params
    from t5style.models.config import TransformerConfig
    from t5style.parallel.mesh import MeshConfig
    from t5style.train.optimizer import Optimizer
    from t5style.train.schedules import Schedule
    from t5style.train.state import init_state
    from t5style.train.step import LanguageModelLoss, make_train_step

    w = workload
    family = (
        {"activations": ("gelu", "linear"), "positions": "relative_bias"}
        if w.encoder_decoder
        else {"activations": ("silu", "linear"), "positions": "rope", "scale_attention": True}
    )
    config = TransformerConfig(
        vocab_size=w.vocab_size,
        d_model=w.d_model,
        d_ff=w.d_ff,
        num_heads=w.num_heads,
        head_dim=w.head_dim,
        decoder_layers=w.layers,
        encoder_layers=w.layers if w.encoder_decoder else 0,
        dtype="bfloat16" if dtype == "bf16" else "float32",
        **family,
    )
    arrays = w.arrays()
    batch = {
        "decoder_input_tokens": arrays["decoder"],
        "decoder_target_tokens": arrays["targets"],
        "decoder_loss_weights": np.ones_like(arrays["targets"]),
    }
    if w.encoder_decoder:
        batch["encoder_input_tokens"] = arrays["encoder"]
    for side in ("decoder", "encoder") if w.encoder_decoder else ("decoder",):
        shape = batch[f"{side}_input_tokens"].shape
        batch[f"{side}_segment_ids"] = np.ones(shape, np.int32)
        batch[f"{side}_positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    schedule = Schedule(kind="constant", peak=LEARNING_RATE)
    optimizer = Optimizer(learning_rate=schedule, b2=0.999, weight_decay=0.01, clip_norm=None)
    transform = optimizer.build(model_params.logical_axes(config), 1000)
    state = init_state(config, transform, MeshConfig().build())
    step = jax.jit(
        make_train_step(LanguageModelLoss(config), transform, schedule.build(1000)), donate_argnums=0
    )
    key = jax.random.key(0)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, {name: jnp.asarray(x) for name, x in batch.items()}, key)
        total, weight = metrics["loss"]
        return float(total) / float(weight)

    return run


def build(contestant: str, workload: Workload, dtype: str, threads: int) -> Callable[[], float]:
    if contestant == "ours":
        return our_step(workload, dtype, threads)
    return torch_step(workload, dtype, threads, compiled=contestant == "torch-compiled")


def forget_peak() -> None:
    """Gives freed pages back and starts the kernel's record of this process's peak memory anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most resident memory since the last ``forget_peak``."""
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def work(contestant: str, workload: Workload, dtype: str, threads: int) -> None:
    """A worker: says when it is ready, then answers every line of its input, a number of steps, with a
    record.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA sizes its thread pool by this
    started = time.perf_counter()
    step = build(contestant, workload, dtype, threads)
    losses = [step(), step(), step()]
    answers.write(json.dumps({"ready": time.perf_counter() - started, "losses": losses}) + "\n")
    for line in sys.stdin:
        forget_peak()
        step()  # not counted: memory that lay idle while the others ran has to come back first
        before, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        steps = int(line)
        for _ in range(steps):
            loss = step()
        wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        record = {"wall": wall / steps, "cpu": cpu / steps, "peak": peak_bytes(), "loss": loss}
        answers.write(json.dumps(record) + "\n")


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: str, workload: str, dtype: str, threads: int) -> None:
        environment = dict(
            os.environ, OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS=str(threads), JAX_PLATFORMS="cpu"
        )
        # The tests' eight pretended devices would share the two threads.
        environment.pop("XLA_FLAGS", None)
        if contestant == "ours":
            environment.setdefault(
                "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
            )  # as t5style.main starts itself
        self.name = contestant
        self.process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                f"--worker={contestant}",
                f"--workload={workload}",
                f"--dtype={dtype}",
                f"--threads={threads}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.records: list[dict[str, float]] = []
        self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the {self.name} worker ended with status {self.process.wait()}; its message is above"
            )
        return dict(json.loads(line))

    def steps(self, count: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        self.records.append(self.answer())

    def median(self, key: str) -> float:
        return statistics.median(record[key] for record in self.records)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def race(
    workload: str, dtype: str, contestants: list[str], rounds: int, steps: int, threads: int
) -> dict[str, Any]:
    """All contestants on one workload, alternating; prints the table and returns its numbers."""
    workers: list[Worker] = []
    try:
        for contestant in contestants:
            workers.append(Worker(contestant, workload, dtype, threads))
            ready = workers[-1].ready
            print(
                f"  {contestant}: ready after {ready['ready']:.0f} s, losses {ready['losses'][0]:.3f} -> "
                f"{ready['losses'][-1]:.3f}",
                flush=True,
            )
        for _ in range(rounds):
            for worker in workers:
                worker.steps(steps)
    finally:
        for worker in workers:
            worker.close()
    rows = {
        w.name: {"wall_s": w.median("wall"), "cpu_s": w.median("cpu"), "peak_gb": w.median("peak") / 1e9}
        for w in workers
    }
    print(f"\n{WORKLOADS[workload].title}, {dtype}, {threads} threads, {rounds} rounds of {steps} step(s)")
    print(f"  {'':16}{'wall s':>9}{'CPU s':>9}{'peak GB':>9}")
    for name, row in rows.items():
        print(f"  {name:16}{row['wall_s']:9.3f}{row['cpu_s']:9.3f}{row['peak_gb']:9.2f}")
    others = [name for name in rows if name != "ours"]
    if "ours" in rows and others:
        ratios = {key: min(rows[name][key] for name in others) / rows["ours"][key] for key in rows["ours"]}
        print(
            "  best torch / ours: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()) + "\n"
        )
        return {"workload": workload, "dtype": dtype, "rows": rows, "ratios": ratios}
    return {"workload": workload, "dtype": dtype, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="llama and t5 if not given")
    parser.add_argument("--dtype", choices=DTYPES, help="both if not given")
    parser.add_argument("--contestant", choices=CONTESTANTS, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=2, help="steps in a row before the next contestant's turn"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, help="also write the numbers here")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, WORKLOADS[args.workload], args.dtype, args.threads)
        return
    contestants = args.contestant or list(CONTESTANTS)
    try:
        import torch
        import transformers

        print(f"PyTorch {torch.__version__}, transformers {transformers.__version__}")
    except ImportError as problem:
        skipped = [name for name in contestants if name != "ours"]
        print(f"skipping {', '.join(skipped) or 'nothing'}: {problem}. `pip install -e '.[parity]'` adds it.")
        contestants = [name for name in contestants if name == "ours"]
    found = [
        race(workload, dtype, contestants, args.rounds, args.steps, args.threads)
        for workload in ([args.workload] if args.workload else ["llama", "t5"])
        for dtype in ([args.dtype] if args.dtype else DTYPES)
    ]
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
