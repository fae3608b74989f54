"""Settings of layers: plain values, in a module that does not load jax, for configs are read without it."""

from __future__ import annotations

import dataclasses
import math

ROUTERS = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """TODO: moved here from nn/positions.py as soon as it is there."""


@dataclasses.dataclass(frozen=True)
class MoE:
    """Settings of a mixture of experts.

    Attributes:
      experts: how many there are.
      per_token: how many compute each token.
      d_ff: width of an expert's hidden layer.
      router: what makes scores of the router's logits: 'softmax' over all experts, or 'sigmoid' of each.
      choose_first: the softmax is over the chosen experts' logits only (Mixtral's paper, GPT-OSS; the same as
        normalize up to rounding).
      normalize: divide the weights of the chosen experts by their sum.
      scale: a factor on the weights, after that.
      correction_bias: a learned number for each expert is added to its score for choosing, not to its weight
        (DeepSeek-V3, section 2.1.2). It has no gradient: whoever trains moves it by the experts' load.
      groups: experts stand in so many groups of equal size, of which each token first chooses
        groups_per_token and then its experts among theirs.
      groups_per_token: see groups.
      group_score: a group's score: the largest of its experts' ('max', DeepSeek-V2) or the sum of its two
        largest ('top2', DeepSeek-V3).
      shared_d_ff: width of an MLP that computes every token besides; 0 for none.
      shared_gate: its output is multiplied by the sigmoid of a learned projection of the token.
      bias: the router and the experts have biases.
      capacity: how many tokens of a row of the batch an expert computes; those that come later pass with a
        zero for its output. None: as many as choose it.
      capacity_factor: the same as a multiple of an even share, length · per_token / experts, rounded up.
    """

    experts: int
    per_token: int
    d_ff: int
    router: str = "softmax"
    choose_first: bool = False
    normalize: bool = False
    scale: float = 1.0
    correction_bias: bool = False
    groups: int = 1
    groups_per_token: int = 1
    group_score: str = "max"
    shared_d_ff: int = 0
    shared_gate: bool = False
    bias: bool = False
    capacity: int | None = None
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        for name, least in (
            ("experts", 1),
            ("per_token", 1),
            ("d_ff", 1),
            ("groups", 1),
            ("groups_per_token", 1),
            ("shared_d_ff", 0),
            ("capacity", 1),
        ):
            value = getattr(self, name)
            if value is None and name == "capacity":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"MoE.{name} = {value!r} must be a whole number of at least {least}")
        for name, choices in (("router", ROUTERS), ("group_score", GROUP_SCORES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"MoE.{name} = {getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.experts % self.groups:
            raise ValueError(
                f"MoE.experts = {self.experts} is not a multiple of groups = {self.groups}: groups must be "
                "of equal size"
            )
        if self.groups_per_token > self.groups:
            raise ValueError(
                f"MoE.groups_per_token = {self.groups_per_token} is more than groups = {self.groups}"
            )
        size = self.experts // self.groups
        if self.group_score == "top2" and self.groups > 1 and size < 2:
            raise ValueError(
                f"MoE.group_score = 'top2' needs groups of at least 2 experts, these have {size}: use fewer "
                "groups, or 'max'"
            )
        if self.per_token > (reachable := size * self.groups_per_token):
            among = f" in the {self.groups_per_token} groups a token chooses" if self.groups > 1 else ""
            raise ValueError(f"MoE.per_token = {self.per_token} is more than the {reachable} experts{among}")
        if not self.scale > 0:
            raise ValueError(f"MoE.scale = {self.scale} must be positive")
        if self.choose_first and (self.router != "softmax" or self.correction_bias or self.groups > 1):
            raise ValueError(
                "MoE.choose_first = True takes the softmax of the largest logits: it does not go with router "
                f"= {self.router!r}, correction_bias = {self.correction_bias}, groups = {self.groups}"
            )
        if self.shared_gate and not self.shared_d_ff:
            raise ValueError("MoE.shared_gate = True needs shared_d_ff, the width of the MLP it gates")
        if self.capacity is not None and self.capacity_factor is not None:
            raise ValueError(
                f"MoE.capacity = {self.capacity} and capacity_factor = {self.capacity_factor} both set the "
                "capacity: leave one of them None"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"MoE.capacity_factor = {self.capacity_factor} must be positive")

    def capacity_for(self, length: int) -> int | None:
        """How many tokens of a row of that length an expert computes; None: all that choose it."""
        if self.capacity_factor is None:
            return self.capacity
        return math.ceil(self.capacity_factor * length * self.per_token / self.experts)
