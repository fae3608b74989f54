"""Tiny transformers models of decoder-only families, with all their oddities on.

python -m tests.models.decoder_models    # writes their golden files: what is saved, inputs, logits, loss
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

from tests.models.make_golden import GOLDEN, VOCABULARY

BASE = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip
WIDE = {**BASE, "head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
          "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 2,
          "moe_intermediate_size": 8, "first_k_dense_replace": 1, "num_hidden_layers": 3,
          "routed_scaling_factor": 1.5}  # fmt: skip
# name: (model_type, fields of their configuration class).
MODELS = {
    "llama_linear": ("llama", {**WIDE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama_llama3": ("llama", {**BASE, "hidden_size": 32, "rope_parameters": {"rope_type": "llama3",
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0,
        "original_max_position_embeddings": 16}}),
    "llama_yarn": ("llama", {**BASE, "hidden_size": 32, "rope_parameters": YARN}),
    "mistral": ("mistral", {**WIDE, "sliding_window": 3}),
    "mixtral": ("mixtral", {**BASE, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4}),
    "qwen2": ("qwen2", {**BASE, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 3,
        "max_window_layers": 1, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3": ("qwen3", {**WIDE, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "attention_bias": True,
        "rope_parameters": YARN}),
    "qwen2_moe": ("qwen2_moe", {**BASE, **ROUTED, "num_hidden_layers": 4, "decoder_sparse_step": 2,
        "mlp_only_layers": [1], "shared_expert_intermediate_size": 10, "use_sliding_window": True,
        "sliding_window": 3, "max_window_layers": 4}),
    "qwen3_moe": ("qwen3_moe", {**WIDE, **ROUTED, "norm_topk_prob": True, "mlp_only_layers": [0]}),
    "smollm3": ("smollm3", {**BASE, "num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0],
        "attention_bias": True}),
    "gemma": ("gemma", {**WIDE, "attention_bias": True}),
    "gemma2": ("gemma2", {**WIDE, "num_hidden_layers": 3, "sliding_window": 3, "query_pre_attn_scalar": 5,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**WIDE, "num_hidden_layers": 4, "sliding_window": 3,
        "query_pre_attn_scalar": 5, "layer_types": ["sliding_attention", "sliding_attention",
        "full_attention", "sliding_attention"], "rope_parameters": {"sliding_attention": {"rope_type":
        "default", "rope_theta": 100.0}, "full_attention": {"rope_type": "linear", "factor": 4.0,
        "rope_theta": 5000.0}}}),
    "olmo2": ("olmo2", {**BASE, "attention_bias": True}),
    "phi3": ("phi3", {**BASE, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 4,
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16, "rope_parameters":
        {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 6.0]}}),
    "deepseek_v2": ("deepseek_v2", {**BASE, **LATENT, "q_lora_rank": None, "n_group": 2, "topk_group": 1,
        "topk_method": "group_limited_greedy", "rope_parameters": {**YARN, "mscale": 0.5,
        "mscale_all_dim": 0.7}}),
    "deepseek_v3": ("deepseek_v3", {**BASE, **LATENT, "q_lora_rank": 9, "n_group": 2, "topk_group": 1,
        "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "gpt_oss": ("gpt_oss", {**WIDE, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 3,
        "swiglu_limit": 1.0, "num_hidden_layers": 3, "rope_parameters": {**YARN, "truncate": False}}),
}  # fmt: skip


def inputs() -> dict[str, np.ndarray]:
    """Tokens, labels (-100: no loss) and masks with padding on the left and on the right."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, VOCABULARY, (3, 9))
    mask = np.array([[1] * 9, [0] * 3 + [1] * 6, [1] * 6 + [0] * 3])
    labels = np.where(mask, rng.integers(2, VOCABULARY, (3, 9)), -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # a label is foretold by the token before it, which must be real
    return {"tokens": tokens, "mask": mask, "labels": labels}


def make_model(kind: str, seed: int = 0, more: dict | None = None):
    """A tiny random transformers model of this kind; more: further fields."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    theirs, fields = MODELS[kind]
    fields = json.loads(json.dumps(fields | (more or {})))  # their classes change what they are given
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(theirs, **fields), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or "embed_scale" in name:
                continue
            if name.endswith("bias") or "sinks" in name:
                value.normal_(0, 0.3)  # zeros would hide a bias left out
            elif "norm" in name:
                value.uniform_(-0.5 if theirs.startswith("gemma") else 0.5, 1.5)
            else:
                value.normal_(0, 0.3)
            value.copy_(value.bfloat16())  # half of the bits are zeros: small golden files
    return model.eval()


def run_model(model, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """Logits, and the loss that transformers itself computes."""
    import torch

    given = {name: torch.tensor(value) for name, value in arrays.items()}
    with torch.no_grad():
        out = model(
            input_ids=given["tokens"],
            attention_mask=given["mask"],
            position_ids=(given["mask"].cumsum(1) - 1).clamp(min=0),
            labels=given["labels"],
        )
    return out.logits.numpy(), float(out.loss)


def golden(kind: str):
    """config.json's fields, tensors by name, inputs, logits, loss."""
    with np.load(GOLDEN / f"{kind}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    weights = {name.split(":")[1]: arrays.pop(name) for name in list(arrays) if ":" in name}
    config = json.loads(str(arrays.pop("config")))
    return config, weights, arrays, arrays.pop("logits"), float(arrays.pop("loss"))


def main(kinds) -> None:
    """Writes the golden files: what transformers saves, and what it computes."""
    from safetensors.numpy import load_file

    for kind in kinds:
        model, arrays = make_model(kind), inputs()
        logits, loss = run_model(model, arrays)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            weights = load_file(pathlib.Path(folder) / "model.safetensors")
            config = json.loads((pathlib.Path(folder) / "config.json").read_text())
        path = GOLDEN / f"{kind}.npz"
        np.savez_compressed(
            path,
            config=json.dumps(config),
            logits=logits,
            loss=loss,
            **{name: value.astype(np.int32) for name, value in arrays.items()},
            **{f"weights:{name}": weights[name] for name in sorted(weights)},
        )
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main(sys.argv[1:] or MODELS)
