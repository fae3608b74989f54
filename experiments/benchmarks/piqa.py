"""PIQA (Bisk et al. 2020) zero-shot, as lm-eval poses it, of a model that t5style.load reads.

    python experiments/benchmarks/piqa.py --model=SmolLM2-135M-Instruct.Q4_1.gguf --data=valid.jsonl

The data are the 1,838 examples of the validation split as JSON lines: goal, sol1, sol2, label. The prompt is
"Question: {goal}\\nAnswer:", an answer " {sol}"; the one with the higher log-likelihood is the model's choice
(acc), or that with the higher one per character (acc_norm). With --peer the first so many examples are scored
by transformers too, from the same GGUF file, and the choices compared.
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np

import t5style
from t5style import console


def transformers_scores(model: pathlib.Path, contexts: list[str], answers: list[str]) -> np.ndarray:
    """Log-likelihoods float64 [pairs], each pair by itself."""
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": str(model.parent), "gguf_file": model.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    network = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    scores = []
    for context, answer in zip(contexts, answers, strict=True):
        before, after = tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad():
            logits = network(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        chosen = torch.log_softmax(logits, -1)[range(len(after)), after]
        scores.append(float(chosen.double().sum()))
    return np.asarray(scores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--examples", type=int, help="only the first so many")
    parser.add_argument("--peer", type=int, default=0, help="examples for transformers")
    parser.add_argument("--batch_size", type=int, default=32)
    given = parser.parse_args()
    rows = [json.loads(line) for line in given.data.read_text().splitlines()][: given.examples]
    contexts = [f"Question: {row['goal']}\nAnswer:" for row in rows for _ in range(2)]
    answers = [" " + row[name] for row in rows for name in ("sol1", "sol2")]
    model = t5style.load(given.model)
    scores = np.zeros(len(answers))
    order = np.argsort([len(a) + len(b) for a, b in zip(contexts, answers, strict=True)], kind="stable")
    with console.progress("scoring", len(order), "answers") as bar:
        for start in range(0, len(order), given.batch_size):
            part = order[start : start + given.batch_size]
            scores[part] = model.score([contexts[i] for i in part], [answers[i] for i in part])
            bar.advance(len(part))
    labels = np.asarray([row["label"] for row in rows])
    lengths = np.asarray([len(answer) - 1 for answer in answers]).clip(1)
    for name, values in (("acc", scores), ("acc_norm", scores / lengths)):
        right = values.reshape(-1, 2).argmax(1) == labels
        error = right.std(ddof=1) / len(right) ** 0.5
        print(f"{name} {100 * right.mean():.2f} +- {100 * error:.2f} ({right.sum()} of {len(right)})")
    if given.peer:
        count = 2 * min(given.peer, len(rows))
        theirs = transformers_scores(given.model, contexts[:count], answers[:count])
        same = (theirs.reshape(-1, 2).argmax(1) == scores[:count].reshape(-1, 2).argmax(1)).mean()
        apart = np.abs(theirs - scores[:count])
        print(
            f"transformers on {count // 2}: the same choice in {100 * same:.1f} %, log-likelihoods apart by "
            f"{np.median(apart):.5f} (median), {apart.max():.3f} (most)"
        )


if __name__ == "__main__":
    main()
