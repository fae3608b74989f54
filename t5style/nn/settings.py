"""Settings of layers: plain values, in a module that does not load jax, for configs are read without it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

ROPE_SCALINGS = ("linear", "llama3", "yarn", "longrope")
ROUTERS = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")
KERNEL_LAYOUTS = ("head_dim_minor", "sequence_minor")
SEQUENCE_ATTENTIONS = ("gather", "ring", "ulysses")
PIPELINE_REMATS = ("layer", "iteration", "both")
LANES = 128  # of a TPU's vector registers: tiles of an attention kernel are multiples of it


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary embeddings trained on short sequences are stretched to longer ones.

    The kinds and the names of their settings are those of Hugging Face configs (`rope_scaling`, or
    `rope_parameters`), where original_length is original_max_position_embeddings. Each kind has the settings
    named with it; others must keep their defaults.

    Attributes:
      kind: 'linear': all frequencies divided by factor (Chen et al. 2023). 'llama3': the long wavelengths
        only, with a smooth transition (LLaMA 3.1). 'yarn': frequencies that turn less than beta_slow times
        within original_length are divided by factor, those that turn more than beta_fast times are kept, a
        ramp over the dimensions between them (Peng et al. 2023, section 3.2), and cosines and sines grow by
        attention_factor (section 3.4). 'longrope': each frequency is divided by a number of its own (Ding et
        al. 2024; Phi-3).
      factor: how many times longer sequences may be (at least 1).
      original_length: llama3, yarn, longrope: tokens of the sequences before stretching.
      low_freq_factor, high_freq_factor: llama3: wavelengths above original_length / low_freq_factor are
        stretched, those below original_length / high_freq_factor are not.
      beta_fast, beta_slow: yarn: see kind.
      truncate: yarn: the ends of the ramp are rounded to whole dimensions (GPT-OSS: no).
      mscale, mscale_all_dim: yarn: make the attention factor where both are given (DeepSeek). DeepSeek also
        multiplies the attention scores by softmax_factor, which is not done here.
      attention_factor: yarn, longrope: factor on cosines and sines; None: what the papers advise.
      short_factors, long_factors: longrope: one number for each pair of rotated dimensions, for sequences up
        to original_length and beyond.
      length_in_use: longrope: how long the sequences are to be. The long factors are used if that is more
        than original_length, and otherwise, or if it is None, the short ones. It is a setting, and not seen
        from each batch as transformers does, so that keys in a cache agree with those that come later.
    """

    kind: str
    factor: float
    original_length: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    short_factors: Sequence[float] | None = None
    long_factors: Sequence[float] | None = None
    length_in_use: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise ValueError(f"RopeScaling.kind = {self.kind!r} is not one of {', '.join(ROPE_SCALINGS)}")
        for name in ("short_factors", "long_factors"):
            if getattr(self, name) is not None:  # tuples, so that it can be hashed
                object.__setattr__(self, name, tuple(getattr(self, name)))
        required = {
            "linear": (),
            "llama3": ("original_length", "low_freq_factor", "high_freq_factor"),
            "yarn": ("original_length",),
            "longrope": ("original_length", "short_factors", "long_factors"),
        }[self.kind]
        optional = {
            "yarn": ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor"),
            "longrope": ("attention_factor", "length_in_use"),
        }.get(self.kind, ())
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in required and value is None:
                raise ValueError(f"RopeScaling of kind {self.kind!r} needs {field.name}")
            if field.name not in ("kind", "factor", *required, *optional) and value != field.default:
                raise ValueError(
                    f"RopeScaling.{field.name} = {value!r} is no setting of kind {self.kind!r}: leave it out"
                )
        self._check_values()

    def _check_values(self) -> None:
        if not self.factor >= 1:
            raise ValueError(f"RopeScaling.factor = {self.factor!r} must be at least 1")
        for name in ("original_length", "length_in_use"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 2):
                raise ValueError(f"RopeScaling.{name} = {value!r} must be a whole number of at least 2")
        for name in (
            *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"),
            *("mscale", "mscale_all_dim", "attention_factor"),
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"RopeScaling.{name} = {value!r} must be positive")
        for less, more in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if getattr(self, less) is not None and not getattr(self, less) < getattr(self, more):
                raise ValueError(
                    f"RopeScaling.{less} = {getattr(self, less)} must be less than {more} = "
                    f"{getattr(self, more)}"
                )
        short, long = self.short_factors or (), self.long_factors or ()
        if len(short) != len(long):
            raise ValueError(
                f"RopeScaling.short_factors are {len(short)} numbers and long_factors {len(long)}: both "
                "must have one for each pair of rotated dimensions"
            )
        if not all(value > 0 for value in (*short, *long)):
            raise ValueError("RopeScaling.short_factors and long_factors must all be positive")

    @property
    def table_factor(self) -> float:
        """The factor on cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            if self.mscale is not None and self.mscale_all_dim is not None:
                return self._yarn_factor(self.mscale) / self._yarn_factor(self.mscale_all_dim)
            return self._yarn_factor(1.0)
        if self.kind == "longrope":
            assert self.original_length is not None
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return 1.0

    @property
    def softmax_factor(self) -> float:
        """The factor on attention scores of DeepSeek's latent attention, 1 without mscale_all_dim."""
        return 1.0 if self.mscale_all_dim is None else self._yarn_factor(self.mscale_all_dim) ** 2

    def _yarn_factor(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0


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
        (DeepSeek-V3, section 2.1.2). It has no gradient: training moves it by bias_update_rate.
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
      balance_loss: weight in training of the load-balancing loss (Fedus et al. 2021, equations 4 to 6:
        0.01), a mean over the layers with experts. An even load costs per_token.
      router_z_loss: weight of the router z-loss (Zoph et al. 2022, equation 5: 0.001), also a mean.
      bias_update_rate: after each step correction_bias grows by so much for experts that had less than the
        mean load and shrinks for those that had more: balancing without a loss (Wang et al. 2024, algorithm
        1; DeepSeek-V3: 0.001).
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
    balance_loss: float = 0.0
    router_z_loss: float = 0.0
    bias_update_rate: float = 0.0

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
        for name in ("balance_loss", "router_z_loss", "bias_update_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"MoE.{name} = {getattr(self, name)} must be at least 0")
        if self.bias_update_rate and not self.correction_bias:
            raise ValueError(
                f"MoE.bias_update_rate = {self.bias_update_rate} moves correction_bias, which is False: set "
                "it to True"
            )

    def capacity_for(self, length: int) -> int | None:
        """How many tokens of a row of that length an expert computes; None: all that choose it."""
        if self.capacity_factor is None:
            return self.capacity
        return math.ceil(self.capacity_factor * length * self.per_token / self.experts)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How layers run where the mesh has stages (nn/pipeline.py).

    Attributes:
      microbatches: into how many parts a batch (of one accumulation step) is divided; a multiple of the
        stages; None: as many as stages.
      repeats: how many groups of layers a stage holds, which a microbatch passes one after the other; 1 is
        GPipe, more make the time in which stages wait shorter.
      remat: what TransformerConfig.remat is applied to. 'layer': to each layer, whose input is kept for each
        microbatch. 'iteration': to a stage's whole group of layers: of a microbatch only what enters the
        stage is kept, and all arrays of one group are there at once when its gradient is made. 'both': little
        memory, for one more forward pass.
    """

    microbatches: int | None = None
    repeats: int = 1
    remat: str = "layer"

    def __post_init__(self) -> None:
        for name in ("microbatches", "repeats"):
            value = getattr(self, name)
            if value is None and name == "microbatches":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Pipeline.{name} = {value!r} must be a whole number of at least 1")
        if self.remat not in PIPELINE_REMATS:
            raise ValueError(f"Pipeline.remat = {self.remat!r} is not one of {', '.join(PIPELINE_REMATS)}")


@dataclasses.dataclass(frozen=True)
class AttentionBlocks:
    """Tiles of the TPU's attention kernel (nn/attention_splash.py), in tokens; multiples of 128.

    They change speed and memory, not results. Sequences shorter than a block use a smaller one (`fit`).

    Attributes:
      block_q, block_kv: queries and keys that the forward kernel holds at a time.
      block_kv_compute: keys of one product within it; divides block_kv.
      block_q_dkv, block_kv_dkv, block_kv_dkv_compute: the same of the kernel of the gradients of keys and
        values.
      block_q_dq, block_kv_dq: the same of the kernel of the gradients of queries.
      use_fused_bwd_kernel: one backward kernel makes all three gradients. It reads its operands once, but
        writes one array of queries' gradients for each block of keys, which are then added.
      q_layout, k_layout, v_layout: how the kernel takes its operands from memory: 'head_dim_minor',
        `[length, head_dim]`, or 'sequence_minor', `[head_dim, length]`.
    """

    block_q: int = 512
    block_kv: int = 512
    block_kv_compute: int = 512
    block_q_dkv: int = 512
    block_kv_dkv: int = 512
    block_kv_dkv_compute: int = 512
    block_q_dq: int = 512
    block_kv_dq: int = 512
    use_fused_bwd_kernel: bool = False
    q_layout: str = "head_dim_minor"
    k_layout: str = "head_dim_minor"
    v_layout: str = "head_dim_minor"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("block_") and (
                not isinstance(value, int) or isinstance(value, bool) or value < LANES or value % LANES
            ):
                raise ValueError(f"AttentionBlocks.{field.name} = {value!r} must be a multiple of {LANES}")
            if field.name.endswith("_layout") and value not in KERNEL_LAYOUTS:
                raise ValueError(
                    f"AttentionBlocks.{field.name} = {value!r} is not one of {', '.join(KERNEL_LAYOUTS)}"
                )
        for whole, part in (
            ("block_kv", "block_kv_compute"),
            ("block_kv_dkv", "block_kv_dkv_compute"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"AttentionBlocks.{part} = {getattr(self, part)} must divide {whole} = "
                    f"{getattr(self, whole)}"
                )

    def fit(self, queries: int, keys: int) -> tuple[AttentionBlocks, int, int]:
        """Blocks for sequences of these lengths, and the lengths to which they must be padded.

        A length is cut into as few blocks as the largest block allows, of equal size: of 1,408 keys three of
        512, of 640 two of 384. So padding is less than 128 tokens for each block. The other blocks become
        the largest sizes that divide the padded length.
        """
        sizes: dict[str, Any] = {name: getattr(self, name) for name in _BLOCKS_OF_QUERIES + _BLOCKS_OF_KEYS}
        padded = []
        for length, names in ((queries, _BLOCKS_OF_QUERIES), (keys, _BLOCKS_OF_KEYS)):
            count = math.ceil(length / max(sizes[name] for name in names))
            block = math.ceil(length / count / LANES) * LANES
            padded.append(count * block)
            sizes.update({name: _divisor(count * block, min(sizes[name], block)) for name in names})
        for whole, part in (("block_kv", "block_kv_compute"), ("block_kv_dkv", "block_kv_dkv_compute")):
            sizes[part] = _divisor(sizes[whole], min(getattr(self, part), sizes[whole]))
        return dataclasses.replace(self, **sizes), padded[0], padded[1]


_BLOCKS_OF_QUERIES = ("block_q", "block_q_dkv", "block_q_dq")
_BLOCKS_OF_KEYS = ("block_kv", "block_kv_dkv", "block_kv_dq")


def _divisor(length: int, most: int) -> int:
    """The largest multiple of LANES up to `most` that divides `length`, itself a multiple."""
    return next(size for size in range(most - most % LANES, 0, -LANES) if length % size == 0)
