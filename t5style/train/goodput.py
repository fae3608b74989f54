"""Where the time of a run goes, and how much of the hardware's peak its steps use."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import jax

from t5style import run_dir

# Peak dense bf16 FLOP/s of one jax device, by the start of its device_kind. Sources: Google Cloud's "TPU
# architecture" pages (a v2 or v3 chip is two jax devices, and so is a TPU7x chip) and NVIDIA's data sheets
# (without sparsity).
PEAK_FLOPS: dict[str, float] = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak bf16 FLOP/s of a device, None where it is not known (CPUs: there is no MFU then)."""
    kind = str(getattr(device, "device_kind", ""))
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


def mfu(flops_per_second: float, devices: Any) -> float | None:
    """Model FLOP utilisation (Chowdhery et al. 2022, PaLM, appendix B): the model's own FLOP/s over the
    peak.
    """
    peak = peak_flops(next(iter(devices)))
    return None if peak is None else flops_per_second / (peak * len(devices))


class Goodput:
    """Seconds by what they were spent on; nested categories do not count twice.

    Categories: 'start' (building, restoring, preflight), 'compile', 'data_wait', 'step', 'checkpoint',
      'evaluate'.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stack: list[str] = ["start"]
        self._since = time.perf_counter()
        self.started = time.time()

    def _switch(self) -> None:
        now = time.perf_counter()
        top = self._stack[-1]
        self.seconds[top] = self.seconds.get(top, 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def timed(self, category: str) -> Iterator[None]:
        """Books the time of the block on `category`."""
        self._switch()
        self._stack.append(category)
        try:
            yield
        finally:
            self._switch()
            self._stack.pop()

    def snapshot(self) -> dict[str, float]:
        """Seconds by category until now."""
        self._switch()
        return dict(self.seconds)

    def fractions(self) -> dict[str, float]:
        """'goodput': share of all time spent stepping; 'data_wait': share of the training time spent waiting
        for data.
        """
        seconds = self.snapshot()
        total = sum(seconds.values())
        step, data = seconds.get("step", 0.0), seconds.get("data_wait", 0.0)
        return {
            "goodput": step / total if total else 0.0,
            "data_wait": data / (step + data) if step + data else 0.0,
        }

    def write(self, run: run_dir.RunDir, first_step: int, last_step: int) -> None:
        """Adds or replaces this process's entry in `goodput.json` (one entry per start of the run)."""
        if not run_dir.is_main_process():
            return
        file = run.path / "goodput.json"
        sessions = json.loads(file.read_text()) if file.exists() else []
        entry = {
            "started": round(self.started, 3),
            "first_step": first_step,
            "last_step": last_step,
            "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
            "seconds": {name: round(value, 3) for name, value in self.snapshot().items()},
            **{name: round(value, 4) for name, value in self.fractions().items()},
        }
        sessions = [s for s in sessions if s["started"] != entry["started"]] + [entry]
        run_dir.atomic_write(file, json.dumps(sessions, indent=1) + "\n")
