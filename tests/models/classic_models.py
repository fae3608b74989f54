"""Tiny transformers models of T5's relatives, GPT-2, GPT-NeoX and BERT, with all their oddities on.

python -m tests.models.classic_models    # writes their golden files: weights, inputs, outputs, loss
"""

import json

import numpy as np

from tests.models.make_golden import GOLDEN, SIZES, VOCABULARY

_BERT = {"model_type": "bert", "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
         "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 24,
         "type_vocab_size": 3, "layer_norm_eps": 1e-4, "hidden_act": "gelu"}  # fmt: skip
_NEOX = {"model_type": "gpt_neox", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24,
         "num_hidden_layers": 2, "num_attention_heads": 4, "rotary_pct": 0.25, "rotary_emb_base": 500,
         "layer_norm_eps": 1e-4, "max_position_embeddings": 32}  # fmt: skip
_GATED = {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# Fields of their config.json, as transformers 4 wrote them for published checkpoints; `head`: the class for
# BERT.
MODELS = {
    "mt5": {"model_type": "mt5", **_GATED},
    "umt5": {"model_type": "umt5", **_GATED, "num_decoder_layers": 3},
    "byt5": {"model_type": "t5", **_GATED, "num_layers": 3, "num_decoder_layers": 1, "num_heads": 3},
    "ul2": {"model_type": "t5", **_GATED, "feed_forward_proj": "gated-silu"},
    "switch": {"model_type": "switch_transformers", **SIZES, "num_layers": 4, "num_decoder_layers": 3,
               "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1, "num_experts": 3,
               "expert_capacity": 20, "d_model": 12, "d_ff": 16},
    "gpt2": {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4,
             "n_inner": 24, "n_positions": 24, "layer_norm_epsilon": 1e-4},
    "gpt2_untied": {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1, "n_head": 2,
                    "n_positions": 16, "tie_word_embeddings": False, "scale_attn_weights": False,
                    "activation_function": "gelu"},
    "gpt_neox": _NEOX,
    "gpt_neox_sequential": {**_NEOX, "use_parallel_residual": False, "attention_bias": False,
                            "rotary_pct": 0.5, "hidden_act": "gelu_fast"},
    "bert": _BERT,
    "bert_words": {**_BERT, "head": "MaskedLM"},
    "bert_classes": {**_BERT, "num_hidden_layers": 1, "head": "SequenceClassification"},
    "bert_tokens": {**_BERT, "num_hidden_layers": 1, "head": "TokenClassification"},
}  # fmt: skip
CLASSES = 3


def fields_of(kind: str) -> dict:
    """The fields of config.json."""
    return {name: value for name, value in MODELS[kind].items() if name != "head"}


def inputs(kind: str) -> dict[str, np.ndarray]:
    """Tokens, labels (-100: no loss) and masks with padding on the left and on the right."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, VOCABULARY, (3, 9))
    mask = np.array([[1] * 9, [0] * 4 + [1] * 5, [1] * 6 + [0] * 3])
    arrays = {"tokens": tokens, "mask": mask}
    arrays["labels"] = np.where(mask, rng.integers(2, VOCABULARY, (3, 9)), -100)
    theirs = MODELS[kind]["model_type"]
    if theirs == "bert":
        arrays["types"] = rng.integers(0, 3, (3, 9))
        if kind == "bert_classes":  # reads the first token of a row, so it must be real
            arrays["mask"] = np.array([[1] * 9, [1] * 5 + [0] * 4, [1] * 6 + [0] * 3])
            arrays["labels"] = rng.integers(0, CLASSES, 3)
        elif kind == "bert_tokens":
            arrays["labels"] = np.where(mask, rng.integers(0, CLASSES, (3, 9)), -100)
        elif kind == "bert":
            del arrays["labels"]
    elif theirs.startswith("gpt"):
        # Their loss has each token foretold by the one before it, which must be real.
        arrays["labels"][:, 1:][mask[:, :-1] == 0] = -100
    else:
        arrays["encoder_tokens"] = rng.integers(2, VOCABULARY, (3, 25))  # farther than the last bucket begins
        arrays["encoder_mask"] = np.array([[1] * 20 + [0] * 5, [1] * 25, [0] * 7 + [1] * 18])
        if kind == "switch":  # padding before the text takes an expert's places in transformers
            arrays["encoder_mask"][2] = arrays["encoder_mask"][2][::-1]
    return arrays


def make_model(kind: str, seed: int = 0):
    """A tiny random transformers model of this kind."""
    import torch
    import transformers

    torch.manual_seed(seed)
    fields = dict(MODELS[kind])
    theirs, head = fields.pop("model_type"), fields.pop("head", None)
    config = transformers.AutoConfig.for_model(theirs, **fields)
    if theirs == "bert":
        config.num_labels = CLASSES
        name = f"BertFor{head}" if head else "BertModel"
    else:
        name = {
            "t5": "T5ForConditionalGeneration",
            "mt5": "MT5ForConditionalGeneration",
            "umt5": "UMT5ForConditionalGeneration",
            "switch_transformers": "SwitchTransformersForConditionalGeneration",
            "gpt2": "GPT2LMHeadModel",
            "gpt_neox": "GPTNeoXForCausalLM",
        }[theirs]
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3)  # zeros would hide a bias left out
            elif "norm" in parameter_name.lower() or ".ln_" in parameter_name:
                parameter.uniform_(0.5, 1.5)  # as ones would a norm in the wrong place
            elif theirs in ("gpt2", "gpt_neox", "bert"):
                parameter.normal_(0, 0.3)
            elif "router" in parameter_name:
                parameter.normal_(0, 1.0)
        if fields.get("tie_word_embeddings") is False and "t5" in theirs:
            # transformers 5 ties on construction whatever the config says, and unties what holds a head.
            model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, config.d_model) * 0.3)
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())  # half of the bits are zeros: small golden files
    return unscaled(model).eval()


def unscaled(model):
    """UMT5 of transformers 5 says that it ties, whatever was read, and scales; one with a head does not."""
    if model.config.model_type == "umt5":
        model.config.tie_word_embeddings = False
    return model


def run_model(model, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the model gives: 'logits' or 'classes', 'encoded', 'pooled', and the loss it computes."""
    import torch

    given = {name: torch.tensor(value) for name, value in arrays.items()}
    call = {"input_ids": given["tokens"], "attention_mask": given["mask"]}
    kind = model.config.model_type
    if "labels" in given:
        call["labels"] = given["labels"]
    if "encoder_tokens" in given:
        call = {
            "input_ids": given["encoder_tokens"],
            "attention_mask": given["encoder_mask"],
            "decoder_input_ids": given["tokens"],
            "decoder_attention_mask": given["mask"],
            "labels": given["labels"],
        }
    else:
        call["position_ids"] = (given["mask"].cumsum(1) - 1).clamp(min=0)
    if kind == "bert":
        call["token_type_ids"] = given["types"]
    with torch.no_grad():
        out = model(**call)
    result = {"loss": np.asarray(float(out.loss))} if "labels" in arrays else {}
    if "logits" in out:
        classes = kind == "bert" and "MaskedLM" not in type(model).__name__
        result["classes" if classes else "logits"] = out.logits.numpy()
    else:
        result |= {"encoded": out.last_hidden_state.numpy(), "pooled": out.pooler_output.numpy()}
    return result


def weights_of(model) -> dict[str, np.ndarray]:
    """The tensors a checkpoint of this model holds: its parameters, a shared one once."""
    names = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    # transformers 5 calls GPT-NeoX's head otherwise in memory.
    return {
        "embed_out.weight" if model.config.model_type == "gpt_neox" and name == "lm_head.weight" else name: x
        for name, x in names.items()
    }


def golden(kind: str):
    """config.json's fields, tensors by name, inputs, and what transformers made of them."""
    with np.load(GOLDEN / f"{kind}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    parts: dict[str, dict] = {"weights": {}, "inputs": {}, "outputs": {}}
    config = json.loads(str(arrays.pop("config")))
    for name, value in arrays.items():
        part, _, rest = name.partition(":")
        parts[part][rest] = value
    return config, parts["weights"], parts["inputs"], parts["outputs"]


def main() -> None:
    """Writes the golden files."""
    for kind in MODELS:
        model, arrays = make_model(kind), inputs(kind)
        outputs = run_model(model, arrays)
        path = GOLDEN / f"{kind}.npz"
        np.savez_compressed(
            path,
            config=json.dumps(fields_of(kind)),
            **{f"weights:{name}": value for name, value in weights_of(model).items()},
            **{f"inputs:{name}": value.astype(np.int32) for name, value in arrays.items()},
            **{f"outputs:{name}": value for name, value in outputs.items()},
        )
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
