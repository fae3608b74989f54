"""GPT-2, GPT-NeoX and Pythia. See presets.py.

Sizes and settings are those of the released config.json; the papers: GPT-2, Radford et al. 2019;
GPT-NeoX-20B, Black et al. 2022; Pythia, Biderman et al. 2023.
"""

from typing import Any

from t5style.models.presets_encoder import Preset, preset


def _fields(vocab_size: int, d_model: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": 4 * d_model,
        "num_heads": heads,
        "decoder_layers": layers,
        "norm_eps": 1e-5,
        "scale_attention": True,
        "init": "normal",
        "init_scale": 0.02,
        "norm": "layer",
        "norm_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    }


def _gpt2(d_model: int, layers: int, heads: int) -> Preset:
    return preset(
        **_fields(50257, d_model, layers, heads),
        activations=("gelu",),
        positions="learned",
        context_length=1024,
        tie_embeddings=True,
        dropout=0.1,
    )


def _neox(vocab_size: int, d_model: int, layers: int, heads: int, activation: str = "gelu_exact") -> Preset:
    return preset(
        **_fields(vocab_size, d_model, layers, heads),
        activations=(activation,),
        positions="rope",
        rope_fraction=0.25,
        context_length=2048,
        parallel_layers=True,
    )


PRESETS: dict[str, Preset] = {
    "gpt2_small": _gpt2(768, 12, 12),
    "gpt2_medium": _gpt2(1024, 24, 16),
    "gpt2_large": _gpt2(1280, 36, 20),
    "gpt2_xl": _gpt2(1600, 48, 25),
    "pythia_70m": _neox(50304, 512, 6, 8),
    "pythia_160m": _neox(50304, 768, 12, 12),
    "pythia_410m": _neox(50304, 1024, 24, 16),
    "pythia_1b": _neox(50304, 2048, 16, 8),
    "pythia_1_4b": _neox(50304, 2048, 24, 16),
    "pythia_2_8b": _neox(50304, 2560, 32, 32),
    "pythia_6_9b": _neox(50432, 4096, 32, 32),
    "pythia_12b": _neox(50688, 5120, 36, 40),
    "gpt_neox_20b": _neox(50432, 6144, 44, 64, activation="gelu"),
}
