"""Metadata of a model in a GGUF file: keys that must all be read, and rotary embeddings' scaling."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from t5style.models.gguf import GgufFile
from t5style.run_dir import UserError


class Keys:
    """The metadata of the model itself, `<architecture>.*`; what is not read is an error in the end."""

    # Sizes that the tensors themselves say, and remarks.
    _INERT = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))
        self._left = {
            key.removeprefix(f"{self.architecture}."): value
            for key, value in file.metadata.items()
            if key.startswith(f"{self.architecture}.")
        }
        for key in self._INERT:
            self._left.pop(key, None)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of a key, a whole number >= 0, a finite float, a string or a bool."""
        value = self._left.pop(key, default)
        if value is default:
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        number: Any = value if kind in (int, float) else 0
        if type(value) is not kind or not 0 <= number < math.inf:
            shown = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
            raise self.error(f"{self.architecture}.{key} = {shown} is not supported, one {kind.__name__} is")
        return value

    def need(self, key: str, kind: type) -> Any:
        """The value of a key that must be there."""
        if key not in self._left:
            raise self.error(f"the metadata lack {self.architecture}.{key}")
        return self.get(key, kind)

    def must_be(self, key: str, kind: type, *allowed: Any) -> None:
        """Refuses values of a feature that we do not compute; absent is allowed."""
        value = self.get(key, kind, allowed[0])
        if not any(close(value, one) for one in allowed):
            raise self.error(
                f"{self.architecture}.{key} = {value!r} is not supported; "
                f"only {' or '.join(map(repr, allowed))} is"
            )

    def finish(self) -> None:
        """Refuses what nobody read."""
        if self._left:
            names = sorted(self._left)
            raise self.error(
                f"the metadata {self.architecture}.{names[0]} = {self._left[names[0]]!r} is not one we honour"
                + (f" (nor {', '.join(names[1:])})" if names[1:] else "")
            )

    def vector(self, name: str) -> np.ndarray | None:
        """A tensor that holds settings, as float64, or None."""
        return self.file.read(name).astype(np.float64) if name in self.file.tensors else None

    def error(self, text: str) -> UserError:
        """An error that names the file."""
        return UserError(f"{self.file.path}: {text}")


def close(one: Any, other: Any) -> bool:
    """Equality; numbers in the file are float32."""
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-5)
    return bool(one == other)


def decimal(value: float) -> float:
    """The shortest decimal number that is this float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_scaling(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """rope_scaling of config.json."""
    factor = keys.get("rope.scaling.factor", float, keys.get("rope.scale_linear", float))
    kind = keys.get("rope.scaling.type", str, "linear" if factor else "none")
    original = keys.get("rope.scaling.original_context_length", int)
    attention = keys.get("rope.scaling.attn_factor", float)
    divisors = keys.vector("rope_freqs.weight")
    if divisors is not None:
        if kind != "none":
            raise keys.error(f"it has both rope_freqs.weight and rope.scaling.type = {kind!r}")
        return _llama3(keys, divisors, config)
    if kind == "longrope" or "rope_factors_long.weight" in keys.file.tensors:
        return _longrope(keys, original, attention, config)
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return None
    if kind not in ("linear", "yarn") or not factor:
        raise keys.error(f"rope.scaling.type = {kind!r} with the factor {factor} is not supported")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        if original is None:
            raise keys.error(f"{keys.architecture}.rope.scaling.original_context_length is missing")
        scaling["original_max_position_embeddings"] = original
        # ggml multiplies YaRN's own factor, 0.1 ln(factor) + 1, by these.
        own = (attention or 1.0) * keys.get("rope.scaling.yarn_attn_factor", float, 1.0)
        if not close(own, 1.0):
            scaling["attention_factor"] = own * (0.1 * math.log(factor) + 1.0)
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            if not close(value := keys.get(f"rope.scaling.yarn_{name}", float, default), default):
                scaling[name] = value
        keys.must_be("rope.scaling.yarn_ext_factor", float, 1.0)
        keys.must_be("rope.scaling.yarn_log_multiplier", float, 0.0)
    elif attention is not None and not close(attention, 1.0):
        raise keys.error(f"{keys.architecture}.rope.scaling.attn_factor = {attention} is not supported")
    return scaling


def _llama3(keys: Keys, divisors: np.ndarray, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """LLaMA 3's settings, of which the file holds only what comes out: a divisor for each frequency."""
    factor, width = float(divisors.max()), config["head_dim"]
    if divisors.shape != (width // 2,):
        raise keys.error(f"rope_freqs.weight has shape {list(divisors.shape)} for heads of width {width}")
    lengths = 2 * np.pi * config["rope_theta"] ** (np.arange(0, width, 2) / width)  # of a turn, in tokens
    if (divisors == 1).all():
        return None
    for original in (8192, 4096, 2048, 16384, 32768):
        low, high = 1.0, 4.0
        smooth = np.clip((original / lengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(expected, divisors, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise keys.error(
        "rope_freqs.weight is not what LLaMA 3's scaling gives (low_freq_factor 1, high_freq_factor 4): "
        "not supported"
    )


def _longrope(
    keys: Keys, original: int | None, attention: float | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Phi-3's two lists of divisors."""
    long, short = (keys.vector(f"rope_factors_{name}.weight") for name in ("long", "short"))
    if long is None or short is None or original is None or original < 2:
        raise keys.error(
            "rope.scaling.type = 'longrope' needs rope_factors_long.weight, rope_factors_short.weight and "
            f"{keys.architecture}.rope.scaling.original_context_length"
        )
    scale = config["max_position_embeddings"] / original
    own = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "long_factor": [decimal(value) for value in long],
        "short_factor": [decimal(value) for value in short],
        "original_max_position_embeddings": original,
    }
    if attention is not None and not close(attention, own):
        scaling["attention_factor"] = attention
    return scaling
