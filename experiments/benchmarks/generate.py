"""Greedy generation of ours beside transformers' `generate` and CTranslate2, on the CPU, in one run.

    python experiments/benchmarks/generate.py                  # both models, batch 1 and 8, all contestants
    python experiments/benchmarks/generate.py --workload=t5 --contestant=ours --contestant=transformers

The models are random ones of known shapes, which all read from one directory: a LLaMA-style one of 25 M
parameters, and T5 1.1-small. Prompts have 32 tokens, answers 128, and nothing ends them early. Each
contestant lives in a process of its own (this script again, with `--worker`), builds its model, warms up, and
answers whenever it is asked; the parent asks them in turn, A B C A B C ..., so that whatever else the machine
does falls on all of them alike. Reported: tokens per second of all rows together, from the median wall time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

PROMPT, NEW = 32, 128
BATCHES = (1, 8)
CONTESTANTS = ("ours", "ours-int8", "transformers", "ctranslate2", "ctranslate2-int8")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model: a preset of ours with changes, and transformers' class."""

    title: str
    preset: str
    model: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    vocab_size: int = 8192


WORKLOADS = {
    "llama": Shape(
        "LLaMA-style 512 x 6, 25 M",
        "llama_small",
        "LlamaForCausalLM",
        {"d_model": 512, "d_ff": 1152, "num_heads": 8, "num_kv_heads": 8},
    ),
    "t5": Shape("T5 1.1-small", "t5_1_1_small", "T5ForConditionalGeneration", vocab_size=32128),
    # For the script's own test: seconds instead of minutes.
    "tiny": Shape(
        "tiny LLaMA-style",
        "llama_tiny",
        "LlamaForCausalLM",
        {"d_model": 16, "d_ff": 32, "num_heads": 2, "num_kv_heads": 2, "decoder_layers": 1},
        vocab_size=64,
    ),
}


def make(workload: str, folder: pathlib.Path) -> None:
    """Writes the random model and a tokenizer whose token i is the word `w<i>`."""
    import jax
    import tokenizers

    from t5style.models import convert, presets
    from t5style.models.params import init_params

    shape = WORKLOADS[workload]
    config = presets.PRESETS[shape.preset](vocab_size=shape.vocab_size, dtype="float32", **shape.changes)
    convert.save_huggingface(folder, config, init_params(config, jax.random.key(0)))
    special = {0: "<pad>", 1: "</s>", 2: "<unk>"}
    words = {special.get(i, f"w{i}"): i for i in range(shape.vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings |= {"eos_token": "</s>", "bos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def prompts(workload: str, batch: int) -> np.ndarray:
    """int32 [batch, PROMPT]."""
    size = (batch, PROMPT)
    return np.random.default_rng(batch).integers(3, WORKLOADS[workload].vocab_size, size, dtype=np.int32)


def ours(folder: pathlib.Path, quantize: bool) -> Callable[[np.ndarray], Any]:
    """Answers token ids [batch, NEW]."""
    import t5style

    model = t5style.load(folder, **({"quantize": "int8"} if quantize else {}))
    return lambda tokens: model.generate_tokens(tokens, max_new_tokens=NEW, stop_tokens=())


def transformers_(folder: pathlib.Path, workload: str, threads: int) -> Callable[[np.ndarray], Any]:
    """As ours."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = getattr(transformers, WORKLOADS[workload].model).from_pretrained(folder).eval()
    start = 1 if workload == "t5" else PROMPT

    def answer(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            given = torch.from_numpy(tokens.astype(np.int64))
            out = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
            )
        return out[:, start:].numpy()

    return answer


def ctranslate2_(
    folder: pathlib.Path, workload: str, threads: int, quantize: bool
) -> Callable[[np.ndarray], Any]:
    """As ours; its tokens are words."""
    import ctranslate2

    converted = folder / "ctranslate2"
    if not converted.exists():
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted))
    settings = {
        "device": "cpu",
        "intra_threads": threads,
        "inter_threads": 1,
        "compute_type": "int8" if quantize else "float32",
    }
    kind = ctranslate2.Translator if workload == "t5" else ctranslate2.Generator
    model = kind(str(converted), **settings)

    def words(tokens: np.ndarray) -> list[list[str]]:
        return [[f"w{token}" for token in row] for row in tokens]

    if workload == "t5":
        return lambda tokens: [
            result.hypotheses[0]
            for result in model.translate_batch(
                words(tokens), beam_size=1, max_decoding_length=NEW, min_decoding_length=NEW
            )
        ]
    return lambda tokens: [
        result.sequences_ids[0]
        for result in model.generate_batch(
            words(tokens),
            beam_size=1,
            sampling_topk=1,
            max_length=NEW,
            min_length=NEW,
            include_prompt_in_result=False,
        )
    ]


def work(contestant: str, workload: str, folder: pathlib.Path, threads: int) -> None:
    """A worker: for each batch size that is asked on stdin, the seconds of one answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA sizes its thread pool by this
    quantize = contestant.endswith("int8")
    if contestant.startswith("ours"):
        answer = ours(folder, quantize)
    elif contestant == "transformers":
        answer = transformers_(folder, workload, threads)
    else:
        answer = ctranslate2_(folder, workload, threads, quantize)
    for batch in BATCHES:
        answer(prompts(workload, batch))
    answers.write("ready\n")
    for line in sys.stdin:
        tokens = prompts(workload, int(line))
        began = time.perf_counter()
        out = answer(tokens)
        seconds = time.perf_counter() - began
        if any(len(row) != NEW for row in out):
            raise RuntimeError(f"{contestant} answered {[len(row) for row in out]} tokens")
        answers.write(json.dumps(seconds) + "\n")


class Worker:
    """A contestant's process."""

    def __init__(self, contestant: str, workload: str, folder: pathlib.Path, threads: int) -> None:
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), JAX_PLATFORMS="cpu")
        environment.pop("XLA_FLAGS", None)
        command = [sys.executable, __file__, f"--worker={contestant}", f"--workload={workload}"]
        self.name = contestant
        self.process = subprocess.Popen(
            [*command, f"--folder={folder}", f"--threads={threads}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.seconds: dict[int, list[float]] = {batch: [] for batch in BATCHES}
        self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker {self.name} ended with {self.process.wait()}; see above")
        return line

    def run(self, batch: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        self.seconds[batch].append(json.loads(self._line()))

    def speed(self, batch: int) -> float:
        """Tokens per second."""
        return batch * NEW / statistics.median(self.seconds[batch])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def race(workload: str, contestants: list[str], folder: pathlib.Path, rounds: int, threads: int) -> None:
    """All contestants on one model, alternating; prints the table."""
    workers: list[Worker] = []
    try:
        for contestant in contestants:
            workers.append(Worker(contestant, workload, folder, threads))
        for _ in range(rounds):
            for batch in BATCHES:
                for worker in workers:
                    worker.run(batch)
    finally:
        for worker in workers:
            worker.close()
    print(f"\n{WORKLOADS[workload].title}, {threads} threads, {rounds} rounds: tokens per second")
    print(f"{'':20}" + "".join(f"{f'batch {batch}':>10}" for batch in BATCHES) + "   ours is times as fast")
    first = next((worker for worker in workers if worker.name == "ours"), None)
    for worker in workers:
        speeds = [worker.speed(batch) for batch in BATCHES]
        ratios = [first.speed(batch) / worker.speed(batch) for batch in BATCHES] if first else []
        print(
            f"{worker.name:20}"
            + "".join(f"{speed:10.0f}" for speed in speeds)
            + "   "
            + "".join(f"{ratio:8.2f}" for ratio in ratios)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="llama and t5 if not given")
    parser.add_argument("--contestant", choices=CONTESTANTS, action="append", help="all if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=pathlib.Path, help="where the models are kept; temporary if not given"
    )
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.workload, options.folder, options.threads)
        return
    with tempfile.TemporaryDirectory() as temporary:
        for workload in [options.workload] if options.workload else ("llama", "t5"):
            folder = (options.folder or pathlib.Path(temporary)) / workload
            if not (folder / "config.json").exists():
                make(workload, folder)
            race(workload, options.contestant or list(CONTESTANTS), folder, options.rounds, options.threads)


if __name__ == "__main__":
    main()
