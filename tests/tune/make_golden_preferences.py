"""What TRL computes of preferences, for the tests: python -m tests.tune.make_golden_preferences

Needs torch, transformers and trl (1.16). Writes golden/preference_losses.npz (losses and metrics of given
log-likelihoods) and golden/tiny_llama/ (a model) with golden/tiny_dpo.npz (what DPOTrainer makes of it).
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
BETA, SMOOTHING, GAMMA = 0.3, 0.15, 0.9
PAIRS = 6
LETTERS = "abcdefghijkl"


def token_log_likelihoods() -> dict[str, np.ndarray]:
    """Per token, f32 [2 * pairs, length], chosen rows first, 0 outside of answers of different lengths."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 12, 2 * PAIRS)
    prompts = np.tile(rng.integers(1, 6, PAIRS), 2)
    places = np.arange(18)
    mask = (places >= prompts[:, None]) & (places < (prompts + lengths)[:, None])
    policy = np.where(mask, -rng.exponential(1.5, mask.shape), 0.0).astype(np.float32)
    reference = np.where(mask, -rng.exponential(1.5, mask.shape), 0.0).astype(np.float32)
    mismatched = [np.where(mask, -rng.exponential(rate, mask.shape), 0.0) for rate in (1.2, 1.7)]
    return {
        "mask": mask.astype(np.int32),
        "policy": policy,
        "reference": reference,
        "policy_kl": mismatched[0].astype(np.float32),
        "reference_kl": mismatched[1].astype(np.float32),
        "desirable": np.array([1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 1], np.int32),
    }


class _Model:
    """Gives the trainers the same log-likelihoods, whatever they ask."""

    training = True
    is_gradient_checkpointing = False
    _modules: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, tokens: np.ndarray) -> None:
        import torch

        self.tokens = torch.tensor(tokens, requires_grad=True)

    def __call__(self, **ignored: Any) -> Any:
        import torch

        zeros = torch.zeros_like(self.tokens)
        return SimpleNamespace(
            log_probs=self.tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), aux_loss=None
        )


def _accelerator() -> Any:
    import torch

    def same(value: Any) -> Any:
        return value

    return SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same)


def dpo_losses(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Loss, gradient and metrics of DPOTrainer by method."""
    import torch
    from trl import DPOTrainer

    whole = np.pad(arrays["mask"], ((0, 0), (1, 0)))  # a mask of tokens; the first is never predicted
    found: dict[str, Any] = {}
    for name in ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"):
        model, reference = _Model(arrays["policy"]), _Model(arrays["reference"])
        trainer = SimpleNamespace(
            **{
                "model": model,
                "ref_model": reference,
                "accelerator": _accelerator(),
                "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
                "aux_loss_enabled": False,
                "ld_alpha": None,
                "precompute_ref_logps": False,
                "f_divergence_type": "reverse_kl",
                "loss_types": [name],
                "loss_weights": [1.0],
                "beta": BETA,
                "label_smoothing": SMOOTHING,
                "use_weighting": False,
                "_metrics": {"train": defaultdict(list)},
                "_total_train_tokens": 0,
                "_tp_size": 1,
            }
        )
        inputs = {
            "input_ids": torch.zeros(whole.shape, dtype=torch.long),
            "attention_mask": torch.ones(whole.shape),
            "completion_mask": torch.tensor(whole),
        }
        loss = DPOTrainer._compute_loss(trainer, model, inputs, False)
        loss.backward()
        found[f"{name}/loss"] = loss.item()
        found[f"{name}/gradient"] = model.tokens.grad.numpy()
        for metric in ("accuracies", "margins", "chosen", "rejected"):
            found[f"{name}/{metric}"] = trainer._metrics["train"][f"rewards/{metric}"][0]
        for metric in ("chosen", "rejected"):
            found[f"{name}/logps_{metric}"] = trainer._metrics["train"][f"logps/{metric}"][0]
    return found


def kto_losses(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Loss and metrics of KTOTrainer, with a positive and with a clipped KL."""
    import torch
    from trl import KTOTrainer

    found: dict[str, Any] = {}
    whole = np.pad(arrays["mask"], ((0, 0), (1, 0)))
    for name, ours, theirs in (
        ("kto", "policy_kl", "reference_kl"),
        ("kto_clipped", "reference_kl", "policy_kl"),
    ):
        model, reference = _Model(arrays["policy"]), _Model(arrays["reference"])
        of_kl = {id(model): arrays[ours], id(reference): arrays[theirs]}
        trainer = SimpleNamespace(
            **{
                "model": model,
                "ref_model": reference,
                "accelerator": _accelerator(),
                "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
                "aux_loss_enabled": False,
                "calculate_KL": True,
                "precompute_ref_logps": False,
                "loss_type": "kto",
                "beta": BETA,
                "desirable_weight": 1.3,
                "undesirable_weight": 0.8,
                "_metrics": {"train": defaultdict(list)},
                "_total_train_tokens": 0,
                "_tp_size": 1,
                "_compute_kl_logps": lambda which, batch, of_kl=of_kl: torch.tensor(of_kl[id(which)]).sum(-1),
            }
        )
        batch = {
            "input_ids": torch.zeros(whole.shape, dtype=torch.long),
            "attention_mask": torch.ones(whole.shape),
            "completion_mask": torch.tensor(whole),
            "label": torch.tensor(arrays["desirable"]).bool(),
        }
        loss = KTOTrainer._compute_loss(trainer, model, batch, False)
        loss.backward()
        found[f"{name}/loss"] = loss.item()
        found[f"{name}/gradient"] = model.tokens.grad.numpy()
        found[f"{name}/kl"] = trainer._metrics["train"]["kl"][0]
        for metric in ("chosen", "rejected"):
            found[f"{name}/{metric}"] = trainer._metrics["train"][f"rewards/{metric}"][0]
    return found


def other_losses(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Losses by pair, f32 [pairs], of CPOTrainer, ORPOTrainer and RewardTrainer."""
    import torch
    from trl import RewardTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    sums = torch.tensor(arrays["policy"].sum(-1))
    ratios = sums - torch.tensor(arrays["reference"].sum(-1))
    means = sums / torch.tensor(arrays["mask"].sum(-1))
    settings = {
        "accelerator": _accelerator(),
        "alpha": 0.0,
        "beta": BETA,
        "simpo_gamma": GAMMA,
        "label_smoothing": 0.0,
        "loss_type": "sigmoid",
    }

    def cpo(values: Any, **changed: Any) -> np.ndarray:
        trainer = SimpleNamespace(**(settings | changed))
        return CPOTrainer.cpo_loss(trainer, *values.chunk(2))[0].numpy()

    found: dict[str, Any] = {
        "cpo/losses": cpo(sums),
        "cpo_smoothed/losses": cpo(sums, label_smoothing=SMOOTHING),
        "simpo/losses": cpo(means, loss_type="simpo"),
        # DPOTrainer has no label smoothing of its sigmoid loss; this is the same formula, of log-ratios
        "cdpo/losses": cpo(ratios, label_smoothing=SMOOTHING),
        "orpo/losses": -ORPOTrainer.odds_ratio_loss(SimpleNamespace(**settings), *means.chunk(2))[0].numpy(),
    }
    for name, centering in (("bradley_terry", None), ("centered", 0.05)):
        rewards = torch.tensor(ratios.numpy(), requires_grad=True)
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=_accelerator(),
            args=SimpleNamespace(center_rewards_coefficient=centering),
            _metrics={"train": defaultdict(list)},
            _total_train_tokens=0,
            _tp_size=1,
        )

        def score(rewards: Any = rewards, **ignored: Any) -> Any:
            return SimpleNamespace(logits=rewards[:, None])

        inputs = {"attention_mask": torch.ones(1)}
        if centering is not None:
            inputs["margin"] = torch.linspace(0, 1, PAIRS)
        loss = RewardTrainer.compute_loss(trainer, score, inputs)
        loss.backward()
        found[f"{name}/loss"] = loss.item()
        found[f"{name}/gradient"] = rewards.grad.numpy()
        found[f"{name}/accuracy"] = trainer._metrics["train"]["accuracy"][0]
    return found


def tiny_dpo() -> dict[str, Any]:
    """A tiny LLaMA, saved, and the batch, losses and gradients of a real DPOTrainer on it."""
    import tokenizers
    import torch
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.bfloat16())  # half of the bits are zeros: small golden files
    reference = transformers.LlamaForCausalLM(config)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value)).copy_(value.bfloat16())
    for name, each in (("tiny_llama", model), ("tiny_llama_reference", reference)):
        each.save_pretrained(GOLDEN / name)
        (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    rows = [
        {"prompt": "<s> a b c", "chosen": " d e", "rejected": " f g h i"},
        {"prompt": "<s> b", "chosen": " a a c e l k", "rejected": " j"},
        {"prompt": "<s> l k j i h", "chosen": " g", "rejected": " f e"},
        {"prompt": "<s> c c", "chosen": " d b a", "rejected": " a b d"},
    ]
    found: dict[str, Any] = {}
    for loss_type in ("sigmoid", "ipo"):
        with tempfile.TemporaryDirectory() as folder:
            arguments = DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=4,
                beta=BETA,
                loss_type=[loss_type],
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            )
            trainer = DPOTrainer(
                model=model,
                ref_model=reference,
                args=arguments,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            )
            batch = trainer.data_collator(list(trainer.train_dataset))
            model.zero_grad()
            loss = trainer.compute_loss(model, batch)
            loss.backward()
        found[f"{loss_type}/loss"] = loss.item()
        found[f"{loss_type}/embedding_gradient"] = model.model.embed_tokens.weight.grad.numpy().copy()
        for name, values in trainer._metrics["train"].items():
            found[f"{loss_type}/{name}"] = values[0]
    found |= {name: values.numpy() for name, values in batch.items()}
    return found


def main() -> None:
    """Writes the files."""
    arrays = token_log_likelihoods()
    values = dpo_losses(arrays) | kto_losses(arrays) | other_losses(arrays)
    np.savez_compressed(GOLDEN / "preference_losses.npz", **arrays, **values)
    np.savez_compressed(GOLDEN / "tiny_dpo.npz", **tiny_dpo())
    print(json.dumps({k: v for k, v in values.items() if isinstance(v, float)}, indent=1))


if __name__ == "__main__":
    main()
