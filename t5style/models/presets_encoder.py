"""Published models with an encoder: T5's relatives and BERT's. See presets.py.

Sizes and settings are those of the released config.json; the papers: FLAN-T5, Chung et al. 2022; mT5, Xue et
al. 2021; UMT5, Chung et al. 2023; ByT5, Xue et al. 2022; UL2, Tay et al. 2023; Switch Transformer, Fedus et
al. 2021; BERT, Devlin et al. 2019; all-MiniLM-L6-v2, Reimers and Gurevych 2019 and Wang et al. 2020.
"""

import functools
from collections.abc import Callable
from typing import Any

from t5style.models.config import TransformerConfig
from t5style.nn.settings import MoE

Preset = Callable[..., TransformerConfig]


def preset(**fields: Any) -> Preset:
    """A function of changes to these fields."""

    def make(fields: dict[str, Any], **changes: Any) -> TransformerConfig:
        return TransformerConfig(**fields | changes)

    return functools.partial(make, fields)


def _t5(
    vocab_size: int,
    d_model: int,
    d_ff: int,
    heads: int,
    layers: int,
    decoder_layers: int | None = None,
    **more: Any,
) -> Preset:
    """T5 1.1's form, pretrained without dropout."""
    fields = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": d_ff,
        "num_heads": heads,
        "head_dim": 64,
        "encoder_layers": layers,
        "decoder_layers": decoder_layers or layers,
        "activations": ("gelu", "linear"),
    }
    return preset(**fields | more)


def _switch(experts: int) -> Preset:
    every_second = tuple(range(1, 12, 2))
    return _t5(
        *(32128, 768, 3072, 12, 12),
        activations=("relu",),
        tie_embeddings=True,
        scale_logits=True,
        dropout=0.1,
        moe=MoE(experts=experts, per_token=1, d_ff=3072, capacity=64),
        moe_layers=every_second,
        moe_encoder_layers=every_second,
    )


def _bert(d_model: int, layers: int, heads: int) -> Preset:
    return preset(
        vocab_size=30522,
        d_model=d_model,
        d_ff=4 * d_model,
        num_heads=heads,
        encoder_layers=layers,
        activations=("gelu_exact",),
        positions="learned",
        norm_eps=1e-12,
        tie_embeddings=True,
        scale_attention=True,
        dropout=0.1,
        init="normal",
        init_scale=0.02,
        context_length=512,
        norm="layer",
        norm_bias=True,
        norm_placement="post",
        final_norm=False,
        embedding_norm=True,
        token_types=2,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        pooler=True,
    )


# d_model, d_ff, heads, layers: T5 1.1's sizes, which its relatives share.
_SIZES = {
    "small": (512, 1024, 6, 8),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 16, 24),
    "xl": (2048, 5120, 32, 24),
    "xxl": (4096, 10240, 64, 24),
}

PRESETS: dict[str, Preset] = {
    **{f"flan_t5_{name}": _t5(32128, *size, dropout=0.1) for name, size in _SIZES.items()},
    **{f"mt5_{name}": _t5(250112, *size) for name, size in _SIZES.items()},
    **{
        f"umt5_{name}": _t5(256384, *_SIZES[name], relative_bias_per_layer=True)
        for name in ("small", "base", "xl", "xxl")
    },
    "byt5_small": _t5(384, 1472, 3584, 6, 12, 4),
    "byt5_base": _t5(384, 1536, 3968, 12, 18, 6),
    "byt5_large": _t5(384, 1536, 3840, 16, 36, 12),
    "byt5_xl": _t5(384, 2560, 6720, 32, 36, 12),
    "byt5_xxl": _t5(384, 4672, 12352, 64, 36, 12),
    "ul2": _t5(32128, 4096, 16384, 16, 32, head_dim=256, activations=("silu", "linear")),
    "switch_base_8": _switch(8),
    "switch_base_128": _switch(128),
    "bert_base": _bert(768, 12, 12),
    "bert_large": _bert(1024, 24, 16),
    "minilm_l6": _bert(384, 6, 12),
}
