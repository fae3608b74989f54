"""8-bit training beside bfloat16: experiments/shakespeare_char.gin, the same seeds, data and steps.

    python experiments/benchmarks/low_precision.py --data=tinyshakespeare.txt --runs=runs/8bit --seeds=3

Trains each kind with each seed by `python -m t5style.main` and prints the loss on the whole validation split
and that of training over the last quarter of the steps, and by how much int8 and fp8 differ from bfloat16
with the same seed: mean and standard error. What is trained already in the folder is not trained again.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

KINDS = {"bf16": "None", "int8": "'int8'", "fp8": "'fp8'"}
EVAL = "eval/shakespeare/loss"


def trained(data: str, folder: pathlib.Path, kind: str, seed: int, steps: int) -> dict[str, float]:
    """Losses: of validation after the last step, of training over the last quarter."""
    subprocess.run(
        [
            *(sys.executable, "-m", "t5style.main"),
            "--gin_file=experiments/shakespeare_char.gin",
            f"--gin.DATA={data!r}",
            f"--gin.RUN_DIR={str(folder)!r}",
            f"--gin.STEPS={steps}",
            f"--gin.Pretrain.seed={seed}",
            "--gin.TransformerConfig.dtype='bfloat16'",
            f"--gin.TransformerConfig.quantized_training={KINDS[kind]}",
        ],
        check=True,
        capture_output=True,
    )
    rows = [json.loads(line) for line in (folder / "model" / "metrics.jsonl").read_text().splitlines()]
    late = [row["train/loss"] for row in rows if "train/loss" in row and row["step"] > 0.75 * steps]
    return {
        "validation": next(row[EVAL] for row in reversed(rows) if EVAL in row),
        "training": statistics.mean(late),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="8-bit training beside bfloat16, over seeds.")
    parser.add_argument("--data", required=True, help="the text")
    parser.add_argument("--runs", type=pathlib.Path, required=True, help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    losses: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for seed in range(args.seeds):
        for kind in KINDS:
            made = trained(args.data, args.runs / f"{kind}_{seed}", kind, seed, args.steps)
            losses[kind].append(made)
            print(f"seed {seed}, {kind}: {made}", flush=True)
    for which in ("validation", "training"):
        for kind, runs in losses.items():
            values = [run[which] for run in runs]
            by = [100 * (value / run[which] - 1) for value, run in zip(values, losses["bf16"], strict=True)]
            error = statistics.stdev(by) / len(by) ** 0.5 if len(by) > 1 else float("nan")
            mean = statistics.mean(by)
            print(f"{which}, {kind}: {statistics.mean(values):.4f}, {mean:+.2f} ± {error:.2f} % of bf16")


if __name__ == "__main__":
    main()
