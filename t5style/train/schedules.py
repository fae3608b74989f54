"""Learning rates as functions of the step, built from optax's own schedules.

To train a finished model on, on new data, the rate goes up and comes down again ("re-warming and
re-decaying": Ibrahim et al. 2024, section 6.1): kind 'cosine' with warmup_steps of a hundredth or less of the
run, peak as in the first training or below it, and final_fraction 0.1, which is theirs. Where the end of
training is not known, or is to be put off again, 'wsd' goes on from a checkpoint of its constant part without
going up again (their "infinite" schedules, section 7.4, are of this kind): give the new run no warmup, the
same peak, and let it decay.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import optax

KINDS = ("constant", "linear", "cosine", "rsqrt", "wsd")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule: a linear ramp from `initial_fraction` · peak to `peak` over `warmup_steps`,
    then by kind.

    Attributes:
      kind: what follows the ramp.
        'constant': `peak` for ever.
        'linear', 'cosine': down to `final_fraction * peak` at the last step.
        'rsqrt': T5's inverse square root (Raffel et al. 2020, §3.1.2), `peak / sqrt(max(n, timescale) /
          timescale)`: with peak 0.01 and timescale 10,000 this is exactly T5's 1 / sqrt(max(n, 10^4)), flat
          until step 10^4.
        'wsd': warm up, stay at `peak`, then go down linearly over the last `decay_fraction` of the steps
          (warmup-stable-decay: Hu et al. 2024, MiniCPM, §4; Hägele et al. 2024 for the linear cooldown).
      peak: the highest learning rate.
      warmup_steps: length of the ramp, in steps.
      steps: length of the whole schedule, in steps; None takes the length of the run.
      final_fraction: the last learning rate as a fraction of `peak` (linear, cosine, wsd).
      timescale: see 'rsqrt'.
      decay_fraction: see 'wsd'.
      initial_fraction: the learning rate that the ramp begins with, as a fraction of `peak`; where training
        goes on, final_fraction of the run before, for example.
    """

    kind: str = "cosine"
    peak: float = 1e-3
    warmup_steps: int = 0
    steps: int | None = None
    final_fraction: float = 0.0
    timescale: int = 10_000
    decay_fraction: float = 0.2
    initial_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Schedule.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}.")
        if self.peak <= 0:
            raise ValueError(f"Schedule.peak is {self.peak}; a learning rate must be above 0.")
        if self.warmup_steps < 0:
            raise ValueError(f"Schedule.warmup_steps is {self.warmup_steps}; it must be 0 or more.")
        for name in ("final_fraction", "initial_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Schedule.{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"Schedule.decay_fraction is {self.decay_fraction}; it must lie in (0, 1].")
        if self.timescale < 1:
            raise ValueError(f"Schedule.timescale is {self.timescale}; it must be 1 or more.")

    def build(self, run_steps: int) -> optax.Schedule:
        """Returns step (int, counted from 0) -> learning rate (f32).

        Args:
          run_steps: the number of steps of the run, used where `steps` is None.

        Raises:
          ValueError: the warmup is longer than the schedule.
        """
        steps = self.steps if self.steps is not None else run_steps
        rest = steps - self.warmup_steps
        final = self.final_fraction * self.peak
        if self.kind in ("linear", "cosine", "wsd") and rest < 1:
            raise ValueError(
                f"Schedule.warmup_steps ({self.warmup_steps}) leaves nothing of the {steps} steps; "
                "make warmup_steps smaller or the run longer."
            )
        match self.kind:
            case "constant":
                after = optax.constant_schedule(self.peak)
            case "linear":
                after = optax.linear_schedule(self.peak, final, rest)
            case "cosine":
                after = optax.cosine_decay_schedule(self.peak, rest, alpha=self.final_fraction)
            case "wsd":
                decay = min(max(1, round(self.decay_fraction * steps)), rest)
                after = optax.linear_schedule(self.peak, final, decay, transition_begin=rest - decay)
            case _:
                return self._rsqrt
        if self.warmup_steps == 0:
            return after
        return optax.join_schedules(
            [optax.linear_schedule(self.initial_fraction * self.peak, self.peak, self.warmup_steps), after],
            [self.warmup_steps],
        )

    def _rsqrt(self, step: optax.ScalarOrSchedule) -> jnp.ndarray:
        # Not joined at the end of the ramp: T5's curve counts from step 0.
        n = jnp.asarray(step, jnp.float32)
        first = self.initial_fraction
        ramp = first + (1 - first) * jnp.minimum(1.0, n / self.warmup_steps) if self.warmup_steps else 1.0
        return ramp * self.peak * jnp.sqrt(self.timescale / jnp.maximum(n, self.timescale))
