"""Published models and a few small ones as configs. Each takes changes by name: `t5_1_1_small(dropout=0.1)`.

PRESETS has all of them, those of presets_encoder.py, presets_gpt.py and presets_decoder.py too:
`PRESETS['gpt2_small']()`.
The same models are in gin/models/*.gin, field by field, for configurations (a test compares the two).
Sizes: T5 1.0, Raffel et al. 2020 section 3.7; T5 1.1, the text-to-text-transfer-transformer release notes;
LLaMA 2, Touvron et al. 2023 and its released config.json; LLaMA 3, Grattafiori et al. 2024, table 3.
Parameter counts are those of the published checkpoints.
"""

from typing import Any

from t5style.models import presets_decoder, presets_encoder, presets_gpt
from t5style.models.config import TransformerConfig


def _t5_1_0(
    d_model: int, d_ff: int, heads: int, head_dim: int, layers: int, changes: dict[str, Any]
) -> TransformerConfig:
    fields: dict[str, Any] = {
        "vocab_size": 32128,
        "d_model": d_model,
        "d_ff": d_ff,
        "num_heads": heads,
        "head_dim": head_dim,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "activations": ("relu",),
        "tie_embeddings": True,
        "scale_logits": True,
        "dropout": 0.1,
    }
    return TransformerConfig(**fields | changes)


def _t5_1_1(d_model: int, d_ff: int, heads: int, layers: int, changes: dict[str, Any]) -> TransformerConfig:
    # Pretrained without dropout; its authors fine-tune with 0.1.
    fields: dict[str, Any] = {
        "vocab_size": 32128,
        "d_model": d_model,
        "d_ff": d_ff,
        "num_heads": heads,
        "head_dim": 64,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "activations": ("gelu", "linear"),
    }
    return TransformerConfig(**fields | changes)


def _llama(
    vocab_size: int, d_model: int, d_ff: int, heads: int, kv_heads: int, layers: int, changes: dict[str, Any]
) -> TransformerConfig:
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": d_ff,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "decoder_layers": layers,
        "activations": ("silu", "linear"),
        "positions": "rope",
        "scale_attention": True,
        "norm_eps": 1e-5,
        "init": "normal",
        "init_scale": 0.02,
    }
    return TransformerConfig(**fields | changes)


def t5_tiny(**changes: Any) -> TransformerConfig:
    """T5 1.1's layers at a size that trains on a laptop's CPU: 8.4 M parameters."""
    return _t5_1_1(256, 512, 4, 4, {"vocab_size": 4096, **changes})


def t5_small(**changes: Any) -> TransformerConfig:
    """T5 1.0 small, 60.5 M parameters."""
    return _t5_1_0(512, 2048, 8, 64, 6, changes)


def t5_base(**changes: Any) -> TransformerConfig:
    """T5 1.0 base, 222.9 M parameters."""
    return _t5_1_0(768, 3072, 12, 64, 12, changes)


def t5_large(**changes: Any) -> TransformerConfig:
    """T5 1.0 large, 737.7 M parameters."""
    return _t5_1_0(1024, 4096, 16, 64, 24, changes)


def t5_3b(**changes: Any) -> TransformerConfig:
    """T5 1.0 3B, 2.85 B parameters."""
    return _t5_1_0(1024, 16384, 32, 128, 24, changes)


def t5_11b(**changes: Any) -> TransformerConfig:
    """T5 1.0 11B, 11.3 B parameters."""
    return _t5_1_0(1024, 65536, 128, 128, 24, changes)


def t5_1_1_small(**changes: Any) -> TransformerConfig:
    """T5 1.1 small, 77.0 M parameters."""
    return _t5_1_1(512, 1024, 6, 8, changes)


def t5_1_1_base(**changes: Any) -> TransformerConfig:
    """T5 1.1 base, 247.6 M parameters."""
    return _t5_1_1(768, 2048, 12, 12, changes)


def t5_1_1_large(**changes: Any) -> TransformerConfig:
    """T5 1.1 large, 783.2 M parameters."""
    return _t5_1_1(1024, 2816, 16, 24, changes)


def t5_1_1_xl(**changes: Any) -> TransformerConfig:
    """T5 1.1 XL, 2.85 B parameters."""
    return _t5_1_1(2048, 5120, 32, 24, changes)


def t5_1_1_xxl(**changes: Any) -> TransformerConfig:
    """T5 1.1 XXL, 11.1 B parameters."""
    return _t5_1_1(4096, 10240, 64, 24, changes)


def llama_tiny(**changes: Any) -> TransformerConfig:
    """A LLaMA-style model for trials, 5.3 M parameters."""
    return _llama(4096, 256, 688, 4, 4, 4, changes)


def llama_small(**changes: Any) -> TransformerConfig:
    """The LLaMA-style model of the CPU benchmarks, 16.9 M parameters."""
    return _llama(8192, 384, 1024, 6, 6, 6, changes)


def llama2_7b(**changes: Any) -> TransformerConfig:
    """LLaMA 2 7B, 6.74 B parameters."""
    return _llama(32000, 4096, 11008, 32, 32, 32, {"context_length": 4096, **changes})


def llama3_8b(**changes: Any) -> TransformerConfig:
    """LLaMA 3 8B, 8.03 B parameters (3.0: without the RoPE scaling of 3.1)."""
    return _llama(
        128256, 4096, 14336, 32, 8, 32, {"context_length": 8192, "rope_theta": 500_000.0, **changes}
    )


PRESETS: dict[str, presets_encoder.Preset] = {
    **{
        preset.__name__: preset
        for preset in (
            t5_tiny,
            t5_small,
            t5_base,
            t5_large,
            t5_3b,
            t5_11b,
            t5_1_1_small,
            t5_1_1_base,
            t5_1_1_large,
            t5_1_1_xl,
            t5_1_1_xxl,
            llama_tiny,
            llama_small,
            llama2_7b,
            llama3_8b,
        )
    },
    **presets_encoder.PRESETS,
    **presets_gpt.PRESETS,
    **presets_decoder.PRESETS,
}
