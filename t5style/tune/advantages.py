"""How much better an answer, or a token of it, was than expected: rewards to advantages.

NumPy on the host: rewards come as `[prompts, n]`, n answers to each prompt; `keep` says which of them count
(a failed reward, an answer that is left out: they neither get an advantage nor move the others' baseline).
Per-token functions take `[rows, length]` with `mask` 1 on the tokens of the answer, which stand together.
All give float64.
"""

from __future__ import annotations

import numpy as np

EPSILON = 1e-4  # added to standard deviations, as TRL's


def _moments(rewards: np.ndarray, keep: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rewards, 0 where they do not count; which count (both `[prompts, n]`); how many `[prompts, 1]`."""
    rewards = np.asarray(rewards, np.float64)
    keep = np.ones(rewards.shape, bool) if keep is None else np.asarray(keep, bool)
    return np.where(keep, rewards, 0.0), keep, keep.sum(axis=1, keepdims=True)


def group_centred(rewards: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Reward minus the mean of its prompt's answers: Dr. GRPO (Liu et al. 2025, "Understanding R1-Zero-like
    training", §3.2).
    """
    rewards, keep, count = _moments(rewards, keep)
    mean = rewards.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    return np.where(keep, rewards - mean, 0.0)


def group_spread(rewards: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Standard deviation (n - 1) of each prompt's rewards, `[prompts]`; 0 of fewer than two."""
    centred = group_centred(rewards, keep)
    count = _moments(rewards, keep)[2][:, 0]
    return np.sqrt((centred**2).sum(axis=1) / np.maximum(count - 1, 1))


def group_normalized(rewards: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Centred and divided by the standard deviation of the prompt's answers: GRPO (Shao et al. 2024,
    "DeepSeekMath", equation 4 of §4.1.2; the deviation with n - 1 and EPSILON, as in TRL).
    """
    return group_centred(rewards, keep) / (group_spread(rewards, keep)[:, None] + EPSILON)


def leave_one_out(rewards: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
    """Reward minus the mean of the prompt's other answers: RLOO (Kool et al. 2019; Ahmadian et al. 2024,
    "Back to basics", equation 9). An answer alone has advantage 0.
    """
    rewards, keep, count = _moments(rewards, keep)
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / np.maximum(count - 1, 1)
    return np.where(keep & (count > 1), rewards - others, 0.0)


def normalized(values: np.ndarray, keep: np.ndarray | None = None, epsilon: float = 1e-8) -> np.ndarray:
    """Minus the mean and divided by the standard deviation of all that count, of any shape; the rest 0.

    Over the tokens of a whole batch it is REINFORCE++ (Hu et al. 2025, equation 8), and what PPO does to
    its advantages.
    """
    values = np.asarray(values, np.float64)
    keep = np.ones(values.shape, bool) if keep is None else np.asarray(keep, bool)
    if not keep.any():
        return np.zeros(values.shape)
    chosen = values[keep]
    return np.where(keep, (values - chosen.mean()) / (chosen.std() + epsilon), 0.0)


def token_rewards(
    rewards: np.ndarray, mask: np.ndarray, divergence: np.ndarray | None = None, coefficient: float = 0.0
) -> np.ndarray:
    """Rewards of tokens `[rows, length]`: that of the answer, `[rows]`, at its last token, and at each token
    minus the coefficient times the estimated divergence there (Ziegler et al. 2019, equation 2; Ouyang et
    al. 2022, equation 2).
    """
    mask = np.asarray(mask, bool)
    result = np.zeros(mask.shape)
    if divergence is not None and coefficient:
        result -= coefficient * np.where(mask, divergence, 0.0)
    rows = np.flatnonzero(mask.any(axis=1))
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    result[rows, last[rows]] += np.asarray(rewards, np.float64)[rows]
    return result


def rewards_to_go(rewards: np.ndarray, mask: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """Discounted sum of the rewards from each token on, `[rows, length]`."""
    mask = np.asarray(mask, bool)
    result, later = np.zeros(mask.shape), np.zeros(len(mask))
    for t in range(mask.shape[1] - 1, -1, -1):
        later = np.where(mask[:, t], rewards[:, t] + gamma * later, later)
        result[:, t] = np.where(mask[:, t], later, 0.0)
    return result


def generalized(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float = 1.0, lam: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimates and returns, both `[rows, length]` (Schulman et al. 2016, equation 16).

    Args:
      rewards: of tokens, see `token_rewards`.
      values: the value head's, at the position from which the token is chosen; after the last it is 0.
      mask: 1 on the answer's tokens.
      gamma: discount; lam: 0 trusts the values (low variance), 1 the rewards (no bias).
    """
    mask = np.asarray(mask, bool)
    advantages = np.zeros(mask.shape)
    later = value_later = np.zeros(len(mask))
    for t in range(mask.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * value_later - values[:, t]
        now = delta + gamma * lam * later
        later = np.where(mask[:, t], now, later)
        value_later = np.where(mask[:, t], values[:, t], value_later)
        advantages[:, t] = np.where(mask[:, t], now, 0.0)
    return advantages, np.where(mask, advantages + values, 0.0)
