"""Writes tests/models/golden/peft_*.npz: adapters as PEFT saves them, beside tiny transformers models.

python -m tests.models.make_golden_peft
"""

import json
import pathlib
import tempfile

import numpy as np

from tests.models.make_golden import GOLDEN, LLAMA, SIZES

SMALL_LLAMA = {**LLAMA, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
               "attention_bias": True}  # fmt: skip
SMALL_T5 = {**SIZES, "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# name: (config.json of the base, adapter_config.json).
ADAPTERS = {
    "llama_lora": (SMALL_LLAMA, {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "use_rslora": True,
        "target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "llama_dora": (SMALL_LLAMA, {"peft_type": "LORA", "r": 2, "lora_alpha": 7, "use_dora": True,
        "target_modules": ".*(k_proj|v_proj|o_proj|gate_proj)"}),
    "llama_ia3": (SMALL_LLAMA, {"peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"]}),
    "t5_lora": (SMALL_T5, {"peft_type": "LORA", "r": 3, "lora_alpha": 6,
        "target_modules": ["q", "EncDecAttention.o", "wi_1", "wo"]}),
    "t5_ia3": (SMALL_T5, {"peft_type": "IA3", "target_modules": ["k", "v", "wo"],
        "feedforward_modules": ["wo"]}),
    "llama_prompt": (SMALL_LLAMA, {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3}),
    "llama_prefix": (SMALL_LLAMA, {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM",
        "num_virtual_tokens": 3}),
    "t5_prompt": (SMALL_T5, {"peft_type": "PROMPT_TUNING", "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": 2}),
    "t5_prefix": ({**SMALL_T5, "d_kv": 4}, {"peft_type": "PREFIX_TUNING", "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": 2}),
}  # fmt: skip


def inputs(fields: dict) -> dict[str, np.ndarray]:
    """Tokens, and an encoder's."""
    rng = np.random.default_rng(0)
    arrays = {"tokens": rng.integers(2, fields["vocab_size"], (2, 7))}
    if fields["model_type"] == "t5":
        arrays["encoder_tokens"] = rng.integers(2, fields["vocab_size"], (2, 9))
    return arrays


def make_base(fields: dict):
    """A tiny random transformers model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    fields = dict(fields)
    if fields.pop("model_type") == "t5":
        return T5ForConditionalGeneration(T5Config(**fields, dropout_rate=0.0)).eval()
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def make_adapter(name: str, base):
    """The base with a random adapter in it."""
    import torch
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    fields = dict(ADAPTERS[name][1])
    kinds = {"LORA": LoraConfig, "IA3": IA3Config, "PROMPT_TUNING": PromptTuningConfig,
             "PREFIX_TUNING": PrefixTuningConfig}  # fmt: skip
    torch.manual_seed(1)
    model = get_peft_model(base, kinds[fields.pop("peft_type")](**fields)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ("lora_", "ia3_", "prompt_encoder")):
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def run(model, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Logits."""
    import torch

    tokens = {name: torch.from_numpy(value) for name, value in arrays.items()}
    with torch.no_grad():
        if "encoder_tokens" in tokens:
            out = model(input_ids=tokens["encoder_tokens"], decoder_input_ids=tokens["tokens"])
        else:
            out = model(input_ids=tokens["tokens"])
    return out.logits[:, -7:].numpy()  # without those of virtual tokens


def golden(name: str) -> tuple[dict, dict, dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """(config.json, adapter_config.json, weights of both by file, logits)."""
    stored = dict(np.load(GOLDEN / f"peft_{name}.npz"))
    parts = {"base": {}, "adapter": {}}
    for key in list(stored):
        if key.startswith(("base:", "adapter:")):
            kind, tensor = key.split(":", 1)
            parts[kind][tensor] = stored.pop(key).astype(np.float32)
    config, adapter = (json.loads(str(stored[key])) for key in ("config", "adapter_config"))
    return config, adapter, parts["base"], parts["adapter"], stored["logits"]


def _make(name: str) -> None:
    import torch
    from safetensors.numpy import load_file

    fields = ADAPTERS[name][0]
    base = make_base(fields)
    base.half().float()  # stored in half precision
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        base.save_pretrained(root / "base")
        model = make_adapter(name, base)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.half().float())
        logits = run(model, inputs(fields))
        model.save_pretrained(root / "adapter")
        arrays = {f"base:{key}": value.astype(np.float16) for key, value in
                  load_file(root / "base" / "model.safetensors").items()}  # fmt: skip
        arrays |= {f"adapter:{key}": value.astype(np.float16) for key, value in
                   load_file(root / "adapter" / "adapter_model.safetensors").items()}  # fmt: skip
        config = json.loads((root / "base" / "config.json").read_text())
        described = json.loads((root / "adapter" / "adapter_config.json").read_text())
        described["base_model_name_or_path"] = None
        if isinstance(described.get("target_modules"), list):
            described["target_modules"].sort()  # a set's order is chance
        np.savez_compressed(GOLDEN / f"peft_{name}.npz", config=json.dumps(config), logits=logits,
                            adapter_config=json.dumps(described), **arrays)  # fmt: skip


if __name__ == "__main__":
    for each in ADAPTERS:
        _make(each)
