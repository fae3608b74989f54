"""Writes golden/beams.json: what transformers' beam search finds with the models golden/llama and golden/t5.

python tests/infer/make_golden_beams.py        (needs torch and transformers)
"""

from __future__ import annotations

import json
from typing import Any

from tests.infer.make_golden import GOLDEN, NEW, inputs, make

FILE = GOLDEN / "beams.json"
FAMILIES = ("llama", "t5")
STOP = [2, 9, 20, 33, 41]  # so many that some answers end early
CASES: tuple[dict[str, Any], ...] = (
    {"num_beams": 4, "length_penalty": 0.6, "n": 2},
    {"num_beams": 4, "length_penalty": 1.0, "n": 2},
    {"num_beams": 4, "length_penalty": 2.0, "n": 2},
    {"num_beams": 4, "length_penalty": -1.0, "n": 4},
    {"num_beams": 4, "length_penalty": 1.0, "n": 2, "early_stopping": True},
    {"num_beams": 4, "length_penalty": 2.0, "n": 2, "early_stopping": "never"},
)


def cases(family: str) -> tuple[dict[str, Any], ...]:
    """The searches of a family."""
    return CASES if family == "llama" else CASES[:3]


def expected(family: str, model: Any) -> list[list[tuple[list[int], float]]]:
    """For each case n answers to each of four prompts: tokens, with the one that ended them, and score."""
    import torch

    given = inputs()
    tokens, mask = torch.tensor(given["tokens"]), torch.tensor(given["left"])
    result = []
    for case in cases(family):
        fields = {name: value for name, value in case.items() if name != "n"}
        found = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            num_return_sequences=case["n"],
            eos_token_id=STOP,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **fields,
        )
        skip = 1 if model.config.is_encoder_decoder else tokens.shape[1]
        answers = []
        for row, score in zip(
            found.sequences[:, skip:].tolist(), found.sequences_scores.tolist(), strict=True
        ):
            last = next((i for i, token in enumerate(row) if token in STOP), len(row) - 1)
            answers.append((row[: last + 1], score))
        result.append(answers)
    return result


if __name__ == "__main__":
    FILE.write_text(json.dumps({family: expected(family, make(family)) for family in FAMILIES}) + "\n")
