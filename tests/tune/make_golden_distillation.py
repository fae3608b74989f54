"""What TRL computes of distillation, for the tests: python -m tests.tune.make_golden_distillation

Needs torch, transformers and trl (1.16). Writes golden/distillation.npz: the generalised Jensen-Shannon
divergence of given logits, and its gradient.
"""

from __future__ import annotations

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden" / "distillation.npz"
SETTINGS = ((0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (0.1, 2.0), (0.0, 3.0))  # beta, temperature


def inputs() -> dict[str, np.ndarray]:
    """Logits f32 [rows, length, vocab] of student and teacher, and labels, -100 where nothing is learnt."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 23, (3, 5))
    labels[0, :2] = labels[2, 4] = -100
    return {
        "student": rng.normal(size=(3, 5, 23)).astype(np.float32) * 2,
        "teacher": rng.normal(size=(3, 5, 23)).astype(np.float32) * 3,
        "labels": labels,
    }


def main() -> None:
    """Writes the file."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    given = inputs()
    found = {}
    for number, (beta, temperature) in enumerate(SETTINGS):
        student = torch.tensor(given["student"], requires_grad=True)
        loss = GKDTrainer.generalized_jsd_loss(
            student,
            torch.tensor(given["teacher"]),
            labels=torch.tensor(given["labels"]),
            beta=beta,
            temperature=temperature,
            num_items_in_batch=int((given["labels"] != -100).sum()),
        )
        loss.backward()
        found[f"loss_{number}"] = loss.detach().numpy()
        found[f"gradient_{number}"] = student.grad.numpy()
    np.savez_compressed(GOLDEN, **found)


if __name__ == "__main__":
    main()
