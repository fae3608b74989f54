"""Writes tests/models/golden.

python -m tests.models.make_golden shapes    # parameter shapes and names of presets: our format
python -m tests.models.make_golden models    # tiny models made by transformers: weights, inputs, logits, loss
"""

import json
import pathlib
import sys

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
VOCABULARY = 48
# Their config.json fields, as transformers 4 wrote them for published checkpoints.
SIZES = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
         "num_attention_heads": 4, "hidden_act": "silu"}  # fmt: skip
MODELS = {
    "t5_1_0": {"model_type": "t5", **SIZES, "num_decoder_layers": 3},
    "t5_1_1": {"model_type": "t5", **SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "llama": {**LLAMA, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
              "rope_theta": 5000.0, "tie_word_embeddings": False},
    "llama_tied": {**LLAMA, "num_hidden_layers": 1, "head_dim": 8, "rms_norm_eps": 1e-6,
                   "tie_word_embeddings": True},
}  # fmt: skip


def inputs(kind: str) -> dict[str, np.ndarray]:
    """Tokens, labels (-100: no loss) and masks with padding on the left and on the right."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, VOCABULARY, (3, 9))
    mask = np.array([[1] * 9, [0] * 4 + [1] * 5, [1] * 6 + [0] * 3])
    arrays = {"tokens": tokens, "mask": mask}
    arrays["labels"] = np.where(mask, rng.integers(2, VOCABULARY, (3, 9)), -100)
    if kind.startswith("llama"):
        # Their loss has each token foretold by the one before it, which must be real.
        arrays["labels"][:, 1:][mask[:, :-1] == 0] = -100
    if kind.startswith("t5"):
        arrays["encoder_tokens"] = rng.integers(2, VOCABULARY, (3, 25))  # farther than the last bucket begins
        arrays["encoder_mask"] = np.array([[1] * 20 + [0] * 5, [1] * 25, [0] * 7 + [1] * 18])
    return arrays


def make_model(kind: str, seed: int = 0):
    """A tiny random transformers model of this kind."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    fields = dict(MODELS[kind])
    if fields.pop("model_type") == "t5":
        model = T5ForConditionalGeneration(T5Config(**fields, dropout_rate=0.0))
    else:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta", 10_000.0)}
        model = LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)  # ones would hide a norm in the wrong place
            elif kind.startswith("llama"):
                parameter.normal_(0, 0.2)
        if kind == "t5_1_1":
            # transformers 5 ties on construction whatever the config says, and unties what holds a head.
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 16) * 0.3)
    return model.eval()


def run_model(model, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """Logits, and the loss that transformers itself computes."""
    import torch

    given = {name: torch.tensor(value) for name, value in arrays.items()}
    with torch.no_grad():
        if "encoder_tokens" in given:
            out = model(
                input_ids=given["encoder_tokens"],
                attention_mask=given["encoder_mask"],
                decoder_input_ids=given["tokens"],
                decoder_attention_mask=given["mask"],
                labels=given["labels"],
            )
        else:
            positions = (given["mask"].cumsum(1) - 1).clamp(min=0)
            out = model(
                input_ids=given["tokens"],
                attention_mask=given["mask"],
                position_ids=positions,
                labels=given["labels"],
            )
    return out.logits.numpy(), float(out.loss)


def weights_of(model) -> dict[str, np.ndarray]:
    """The tensors a checkpoint of this model holds: its parameters, a shared one once."""
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def write_models() -> None:
    for kind, config in MODELS.items():
        model, arrays = make_model(kind), inputs(kind)
        logits, loss = run_model(model, arrays)
        weights = {f"weights:{name}": value for name, value in weights_of(model).items()}
        path = GOLDEN / f"{kind}.npz"
        np.savez_compressed(path, config=json.dumps(config), logits=logits, loss=loss, **arrays, **weights)
        print(path.name, path.stat().st_size, "bytes")


def write_shapes() -> None:
    from t5style.models import presets
    from tests.models.test_params import described

    for name in ("t5_small", "t5_1_1_base", "llama3_8b"):
        lines = [
            f"{json.dumps(path)}: {json.dumps(value)}"
            for path, value in described(presets.PRESETS[name]()).items()
        ]
        (GOLDEN / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    {"shapes": write_shapes, "models": write_models}[sys.argv[1]]()
