"""Steps of fine-tuning, LoRA, DPO and GRPO beside TRL and PEFT on PyTorch, on the CPU, in one run.

    python experiments/benchmarks/tuning.py --model=smollm2/                  # a Hugging Face directory
    python experiments/benchmarks/tuning.py --model=smollm2/ --method=dpo --rounds=5

Both sides tune the same model, in float32, on the same texts (the King James Bible of the package's samples:
128 tokens of prompt and 128 of completion), with AdamW; adapters are LoRA of rank 16 on all projections. Each
contestant lives in a process of its own (this script again, with `--worker`) and makes a step whenever it is
asked; the parent asks them in turn, so that whatever else the machine does falls on both alike. TRL's
trainers are run as they are, with the settings in which they are fastest here (no gradient checkpointing);
GRPO's steps include their generations. Reported: the median seconds of a step, TRL's divided by ours, and the
peak memory of each process.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

METHODS = ("sft", "lora", "dpo", "grpo")
SIDES = ("ours", "trl")
PROMPT = COMPLETION = 128
ROWS = {"sft": 4, "lora": 4, "dpo": 2}  # of DPO pairs
# GRPO: prompts of so many tokens, answers of exactly so many, a group for each prompt.
GRPO_PROMPT, GRPO_NEW, GRPO_GROUP, GRPO_PROMPTS = 32, 64, 4, 2
RANK, ALPHA, BETA, PEAK = 16, 32, 0.1, 1e-5


def texts(tokenizer: Any, count: int, lengths: tuple[int, ...]) -> list[list[np.ndarray]]:
    """`count` times token ids of these lengths, one after the other in a text."""
    from t5style.corpus import sources

    samples = sources.Samples(("bible-kjv",))
    documents = itertools.islice(samples.read(samples.inputs()[0], ""), 40)
    text = "\n".join(document.text for document in documents)
    ids = np.asarray(tokenizer(text)[: count * sum(lengths)], np.int32)
    parts = np.split(ids, np.cumsum(lengths * count)[:-1])
    return [parts[i : i + len(lengths)] for i in range(0, len(parts), len(lengths))]


# --- ours ---


def ours(method: str, folder: pathlib.Path) -> Callable[[], None]:
    """A function that makes one step."""
    import jax

    import t5style
    from t5style.parallel import rules
    from t5style.parallel.mesh import MeshConfig
    from t5style.train.optimizer import Optimizer
    from t5style.train.program import TrainingProgram
    from t5style.train.schedules import Schedule
    from t5style.tune import parent

    model = t5style.load(folder)
    mesh = MeshConfig(devices=1).build()
    settings: dict[str, Any] = {
        "model": parent.config(str(folder)),
        "lengths": {"decoder": PROMPT + COMPLETION},
        "optimizer": Optimizer(learning_rate=Schedule("constant", PEAK)),
    }
    if method != "sft":
        from t5style.models.adapters import Lora

        settings["adapter"] = Lora(rank=RANK, alpha=ALPHA)
    rows = ROWS[method]
    example = texts(model.vocabulary.encode, 2 * rows, (PROMPT, COMPLETION))
    if method == "dpo":
        from t5style.tune import pairs
        from t5style.tune.preferences import Preference, PreferenceLoss

        settings["custom_loss"] = PreferenceLoss(settings["model"], Preference("dpo", beta=BETA))
        settings |= {"example": pairs.example(settings["lengths"]), "with_reference": True}
        chosen = _batch(example[:rows])
        mixed = zip(example[:rows], example[rows:], strict=True)
        rejected = _batch([[prompt, other] for (prompt, _), (_, other) in mixed])
        batch = {name: np.stack([chosen[name], rejected[name]], axis=1) for name in chosen}
    else:
        batch = _batch(example[:rows])
    program = TrainingProgram(batch_size=rows, **settings)
    with rules.use_mesh(mesh):
        step = program.compile(mesh)
        frozen = program.freeze(mesh, dict.fromkeys(program.frozen_models, model.params))
        state = program.begin(mesh, 0, model.params)
    extra = (frozen,) if frozen else ()
    batch, key = rules.put_batch(batch, mesh), jax.random.key(0)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch, key, *extra)
        loss, weight = jax.device_get(metrics["loss"])
        if not np.isfinite(loss / weight):
            raise RuntimeError(f"the loss is {loss / weight}")

    return run


def ours_grpo(folder: pathlib.Path, turn: Callable[[], None], done: Callable[[], None]) -> None:
    """Runs the job, as `trl` does."""
    import jax

    import t5style
    from t5style.data.token_store import TokenStoreWriter
    from t5style.models.adapters import Lora
    from t5style.parallel.mesh import MeshConfig
    from t5style.run_dir import RunDir
    from t5style.train.optimizer import Optimizer
    from t5style.train.schedules import Schedule
    from t5style.tune import rewards
    from t5style.tune.policy import Method
    from t5style.tune.reinforce import Reinforce
    from t5style.tune.rollouts import Sampling

    class Timed(Reinforce):
        def _batches(self, start: int, source: Any, mesh: Any, loop: Any, frozen: Any) -> Any:
            for_ever = super()._batches(start, source, mesh, loop, frozen)
            while True:
                turn()
                yield next(for_ever)
                jax.block_until_ready(loop.params)
                done()

    place = pathlib.Path(tempfile.mkdtemp())
    vocabulary = t5style.load(folder).vocabulary
    with TokenStoreWriter(str(place / "store"), ("prompt",), vocabulary) as writer:
        for (prompt,) in texts(vocabulary.encode, 64, (GRPO_PROMPT - 1,)):  # a start token comes before it
            writer.add("train", {"prompt": prompt.tolist()})
    (place / "store/train/records.jsonl").write_text("{}\n" * 64)
    Timed(
        init_from=str(folder),
        store=str(place / "store"),
        adapter=Lora(rank=RANK, alpha=ALPHA),
        method=Method("grpo", kl=0.04),
        rewards={"words": rewards.WordCount(words=20)},
        prompts=GRPO_PROMPTS,
        group=GRPO_GROUP,
        sampling=Sampling(max_new_tokens=GRPO_NEW),
        eval_split=None,
        steps=1000,
        mesh=MeshConfig(devices=1),
        optimizer=Optimizer(learning_rate=Schedule("constant", PEAK)),
    )(RunDir(place / "run").create())


def _batch(pairs: list[list[np.ndarray]]) -> dict[str, np.ndarray]:
    """Prompts and completions as rows; the first token is read and not foretold."""
    tokens = np.stack([np.concatenate(pair) for pair in pairs])
    weights = np.tile(np.arange(tokens.shape[1]) >= PROMPT, (len(tokens), 1)).astype(np.int32)
    return {
        "decoder_input_tokens": np.pad(tokens[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": tokens,
        "decoder_loss_weights": weights,
        "decoder_segment_ids": np.ones_like(tokens),
        "decoder_positions": np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1)),
    }


# --- TRL ---


def trl(
    method: str, folder: pathlib.Path, threads: int, turn: Callable[[], None], done: Callable[[], None]
) -> None:
    """Trains until the parent has gone; `turn` waits for a step's turn and `done` reports it."""
    import datasets
    import peft
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    from t5style.tune.rewards import WordCount

    torch.set_num_threads(threads)

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            done()

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = model.config.eos_token_id
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end[0] if isinstance(end, list) else end)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 1000,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rate": PEAK,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1000,
        "disable_tqdm": True,
    }
    lora = None
    if method != "sft":
        lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    given = {"model": model, "processing_class": tokenizer, "peft_config": lora, "callbacks": [Turns()]}
    if method == "grpo":
        prompts = texts(encode, 64, (GRPO_PROMPT,))
        data = datasets.Dataset.from_list([{"prompt": tokenizer.decode(ids)} for (ids,) in prompts])
        settings = GRPOConfig(
            per_device_train_batch_size=GRPO_GROUP * GRPO_PROMPTS,
            num_generations=GRPO_GROUP,
            max_completion_length=GRPO_NEW,
            generation_kwargs={"min_new_tokens": GRPO_NEW},
            beta=0.04,
            **common,
        )
        reward = lambda completions, **_: WordCount(words=20)({}, completions)  # noqa: E731
        GRPOTrainer(reward_funcs=reward, args=settings, train_dataset=data, **given).train()
        return
    rows = ROWS[method]
    found = texts(encode, 2 * rows, (PROMPT, COMPLETION))
    decode = lambda ids: tokenizer.decode(ids.tolist())  # noqa: E731
    if method == "dpo":
        records = [
            {"prompt": decode(prompt), "chosen": decode(chosen), "rejected": decode(rejected)}
            for (prompt, chosen), (_, rejected) in zip(found[:rows], found[rows:], strict=True)
        ]
        settings = DPOConfig(per_device_train_batch_size=rows, beta=BETA, max_length=None, **common)
        DPOTrainer(args=settings, train_dataset=datasets.Dataset.from_list(records), **given).train()
        return
    records = [{"prompt": decode(prompt), "completion": decode(answer)} for prompt, answer in found[:rows]]
    settings = SFTConfig(per_device_train_batch_size=rows, max_length=None, **common)
    SFTTrainer(args=settings, train_dataset=datasets.Dataset.from_list(records), **given).train()


# --- the race ---


def work(side: str, method: str, folder: pathlib.Path, threads: int) -> None:
    """A worker: for each line on stdin one step, and its seconds and the peak memory on stdout."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])  # XLA sizes its thread pool by this
    began = 0.0

    def turn() -> None:
        nonlocal began
        if not sys.stdin.readline():
            os._exit(0)
        began = time.perf_counter()

    def done() -> None:
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        answers.write(json.dumps([seconds, peak]) + "\n")

    if side == "trl":
        trl(method, folder, threads, turn, done)
        raise RuntimeError("TRL's trainer has come to its end")
    if method == "grpo":
        ours_grpo(folder, turn, done)
        raise RuntimeError("the job has come to its end")
    run = ours(method, folder)
    while True:
        turn()
        run()
        done()


@dataclasses.dataclass
class Worker:
    """A contestant's process."""

    side: str
    process: subprocess.Popen[str]
    seconds: list[float] = dataclasses.field(default_factory=list)
    gigabytes: float = 0.0

    def step(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker {self.side} ended with {self.process.wait()}; see above")
        seconds, self.gigabytes = json.loads(line)
        return float(seconds)


def race(method: str, sides: list[str], folder: pathlib.Path, rounds: int, threads: int) -> None:
    """Both sides in turn; prints a line of the table."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")
    environment.pop("XLA_FLAGS", None)
    workers = []
    for side in sides:
        command = [sys.executable, __file__, f"--worker={side}", f"--method={method}", f"--model={folder}"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*command, f"--threads={threads}"], stdin=pipe, stdout=pipe, text=True, env=environment
        )
        workers.append(Worker(side, process))
    try:
        for worker in workers:  # compiles, and warms up
            worker.step()
            worker.step()
        for _ in range(rounds):
            for worker in workers:
                worker.seconds.append(worker.step())
    finally:
        for worker in workers:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
            worker.process.wait()
    medians = {worker.side: statistics.median(worker.seconds) for worker in workers}
    figures = [f"{w.side} {medians[w.side]:.2f} s a step, {w.gigabytes:.2f} GiB" for w in workers]
    ratio = f"; TRL / ours {medians['trl'] / medians['ours']:.2f}" if len(medians) == 2 else ""
    print(f"{method:5} {', '.join(figures)}{ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=pathlib.Path, required=True, help="a Hugging Face directory of a decoder"
    )
    parser.add_argument("--method", choices=METHODS, action="append", help="all if not given")
    parser.add_argument("--side", choices=SIDES, action="append", help="both if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.method[0], options.model, options.threads)
        return
    for method in options.method or METHODS:
        race(method, options.side or list(SIDES), options.model, options.rounds, options.threads)


if __name__ == "__main__":
    main()
