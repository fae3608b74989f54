"""Writes golden/t5, golden/t5_1_1 and golden/llama: tiny Hugging Face directories and what transformers says
of them.

    python tests/infer/make_golden.py        (needs torch and transformers)

Each holds config.json, generation_config.json, model.safetensors and expected.npz: padded token arrays,
masks, logits, greedy answers. The weights are random and large, so that the answers vary and no two logits
nearly tie.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
VOCAB, NEW = 64, 12


def make(name: str) -> Any:
    """A transformers model of the family `name`."""
    import torch
    import transformers

    torch.manual_seed(5)
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        return transformers.LlamaForCausalLM(config).eval()
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="relu" if name == "t5" else "gated-gelu",
        tie_word_embeddings=name == "t5",
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    torch.manual_seed(2)  # of the seeds tried, the answers differ most
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                # T5 does not scale its attention: with larger queries and keys it would be so sharp that
                # rounding decides. Large values keep the answers from repeating themselves.
                sharp = ".q." in name or ".k." in name
                parameter.normal_(0, 0.15 if sharp else 1.0 if "relative" in name else 0.5)
    return model


def inputs() -> dict[str, np.ndarray]:
    """Tokens int [4, 11] with padding on the left of some rows and on the right of others, and decoder
    inputs.
    """
    random = np.random.default_rng(3)
    tokens = random.integers(3, VOCAB, (4, 11))
    mask = np.ones_like(tokens)
    mask[0, :6] = mask[2, :3] = mask[3, :1] = 0
    return {
        "tokens": tokens,
        "left": mask,
        "right": mask[:, ::-1].copy(),
        "decoder_tokens": np.concatenate([np.zeros((4, 1), int), random.integers(3, VOCAB, (4, 6))], axis=1),
    }


def expected(model: Any) -> dict[str, np.ndarray]:
    """Logits for both paddings, and greedy answers (left padding: what generate needs of a decoder-only
    model).
    """
    import torch

    given = inputs()
    tokens = torch.tensor(given["tokens"])
    result = {}
    with torch.no_grad():
        for side in ("left", "right"):
            arguments = {"input_ids": tokens, "attention_mask": torch.tensor(given[side])}
            if model.config.is_encoder_decoder:
                arguments["decoder_input_ids"] = torch.tensor(given["decoder_tokens"])
            result[f"logits_{side}"] = model(**arguments).logits.numpy()
        answer = model.generate(
            input_ids=tokens, attention_mask=torch.tensor(given["left"]), max_new_tokens=NEW, do_sample=False
        ).numpy()
    answer = answer[:, 1:] if model.config.is_encoder_decoder else answer[:, tokens.shape[1] :]
    result["greedy"] = np.pad(
        answer, ((0, 0), (0, NEW - answer.shape[1]))
    )  # generate stops when all rows have
    return result


if __name__ == "__main__":
    for name in ("t5", "t5_1_1", "llama"):
        model = make(name)
        model.save_pretrained(GOLDEN / name)
        np.savez_compressed(GOLDEN / name / "expected.npz", **expected(model))
