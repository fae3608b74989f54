"""Writes golden/policy.npz: what TRL makes of rewards and log-likelihoods. Run by hand; it needs trl.

python tests/tune/make_golden_policy.py
"""

from __future__ import annotations

import collections
import inspect
import pathlib
import textwrap
import types
from typing import Any

import numpy as np
import torch
import trl
from trl.trainer import grpo_trainer, rloo_trainer

ROWS, LENGTH, GROUP = 8, 12, 4
LOSSES = {  # our name: (trainer, TRL's arguments)
    "grpo": {"loss_type": "grpo"},
    "grpo_kl": {"loss_type": "grpo", "beta": 0.04},
    "token": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dual": {"loss_type": "grpo", "delta": 1.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-2},
}


def data() -> dict[str, np.ndarray]:
    """Rewards [prompts, n], log-likelihoods [rows, length] and a mask, as a policy gives them."""
    generator = np.random.default_rng(7)
    lengths = np.array([12, 1, 5, 8, 3, 12, 7, 2])
    old = -generator.exponential(1.0, (ROWS, LENGTH))
    return {
        "rewards": generator.normal(size=(ROWS // GROUP, GROUP)).round(2),
        "old": old,
        "new": old + 0.3 * generator.normal(size=old.shape),
        "reference": old + 0.5 * generator.normal(size=old.shape),
        "mask": (np.arange(LENGTH) < lengths[:, None]).astype(np.float64),
        "advantages": generator.normal(size=ROWS),
    }


def block(function: Any, first: str, last: str) -> str:
    """TRL's own lines, from the one that begins with `first` to the one that begins with `last`."""
    lines = inspect.getsource(function).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines) if i > begin and line.strip().startswith(last))
    return textwrap.dedent("\n".join(lines[begin : end + 1]))


def advantages(rewards: np.ndarray, **settings: Any) -> np.ndarray:
    """TRL's advantages of rewards [prompts, n]."""
    flat = torch.tensor(rewards.reshape(-1, 1), dtype=torch.float64)
    names = {
        "self": types.SimpleNamespace(
            reward_weights=torch.ones(1, dtype=torch.float64), beta=0.0, **settings
        ),
        "rewards_per_func": flat,
        "num_generations": rewards.shape[1],
        "unscorable_mask": torch.zeros(len(flat), dtype=torch.bool),
        "device": "cpu",
        "torch": torch,
    }
    if "scale_rewards" in settings:
        function = grpo_trainer.GRPOTrainer._generate_and_score_completions
        source = block(function, "rewards = (rewards_per_func", "advantages = advantages / (std")
        names["nanstd"] = grpo_trainer.nanstd
        source += "\n"
    else:
        function = rloo_trainer.RLOOTrainer._generate_and_score_completions
        source = block(function, "grouped_rewards = rewards.view", "advantages = torch.nan_to_num")
        names |= {"rewards": flat[:, 0], "nanstd": rloo_trainer.nanstd}
    exec(source, names)
    return names["advantages"].numpy()


def loss(trainer: Any, arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> tuple[float, np.ndarray]:
    """TRL's loss, and its gradient by the new log-likelihoods."""
    tensors = {name: torch.tensor(value) for name, value in arrays.items()}
    new = tensors["new"].requires_grad_()
    fields = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "delta": None,
        **settings,
    }
    accelerator = types.SimpleNamespace(
        gather=lambda x: x, num_processes=1, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x
    )
    fake = types.SimpleNamespace(
        **{name: value for name, value in fields.items() if name != "delta"},
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=LENGTH,
        model=types.SimpleNamespace(training=True),
        _entropy_bonus_enabled=False,
        accelerator=accelerator,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        args=types.SimpleNamespace(
            delta=fields["delta"], use_bias_correction_kl=False, steps_per_generation=1
        ),
    )
    ids = torch.zeros(new.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": tensors["mask"],
        "advantages": tensors["advantages"],
        "old_per_token_logps": tensors["old"],
        "old_logps": (tensors["old"] * tensors["mask"]).sum(1),
        "ref_per_token_logps": tensors["reference"],
        "num_items_in_batch": tensors["mask"].sum(),
    }
    value = trainer._compute_loss(fake, None, inputs)
    value.backward()
    return float(value.detach()), new.grad.numpy()


def main() -> None:
    """Writes the file."""
    arrays = data()
    found: dict[str, Any] = {f"in/{name}": value for name, value in arrays.items()}
    shared = {"multi_objective_aggregation": "sum_then_normalize"}
    found["advantages/group"] = advantages(arrays["rewards"], scale_rewards="group", **shared)
    found["advantages/none"] = advantages(arrays["rewards"], scale_rewards="none", **shared)
    found["advantages/rloo"] = advantages(arrays["rewards"], normalize_advantages=False)
    for name, settings in LOSSES.items():
        found[f"loss/{name}"], found[f"gradient/{name}"] = loss(grpo_trainer.GRPOTrainer, arrays, settings)
    found["loss/rloo"], found["gradient/rloo"] = loss(rloo_trainer.RLOOTrainer, arrays, {})
    found["trl"] = np.array(trl.__version__)
    folder = pathlib.Path(__file__).with_name("golden")
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "policy.npz", **found)
    print({name: value for name, value in found.items() if name.startswith(("loss", "adv"))})


if __name__ == "__main__":
    main()
