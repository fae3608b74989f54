"""Decoder-only models from LLaMA 3.1 on. See presets.py.

Sizes and settings are those of the released config.json. The papers: LLaMA 3, Grattafiori et al. 2024;
Mistral and Mixtral, Jiang et al. 2023 and 2024; Qwen 2.5 and 3, Qwen team 2024 and 2025; SmolLM 2, Ben Allal
et al. 2025; Gemma 1 to 3, Gemma team 2024 and 2025; OLMo 2, OLMo team 2024; Phi-3 and 4, Abdin et al. 2024;
DeepSeek-V2 and V3, DeepSeek-AI 2024; GPT-OSS, OpenAI 2025.
"""

from typing import Any

from t5style.models.config import LatentAttention
from t5style.models.presets_encoder import Preset, preset
from t5style.nn.settings import MoE, RopeScaling


def _decoder(
    vocab_size: int, d_model: int, d_ff: int, layers: int, heads: int, kv_heads: int | None, **more: Any
) -> Preset:
    fields = {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_ff": d_ff,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "decoder_layers": layers,
        "activations": ("silu", "linear"),
        "positions": "rope",
        "scale_attention": True,
        "norm_eps": 1e-6,
        "init": "normal",
        "init_scale": 0.02,
    }
    return preset(**fields | more)


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "context_length": 131_072,
        "rope_scaling": RopeScaling(
            "llama3", factor, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0
        ),
    }


def _smollm2(context: int, theta: float, **more: Any) -> dict[str, Any]:
    own = {"context_length": context, "rope_theta": theta, "norm_eps": 1e-5, "tie_embeddings": True}
    return own | more


def _qwen2(context: int, **more: Any) -> dict[str, Any]:
    return {"context_length": context, "rope_theta": 1e6, "attention_bias": True, **more}


def _qwen3(**more: Any) -> dict[str, Any]:
    own = {"context_length": 40_960, "rope_theta": 1e6, "head_dim": 128, "query_key_norm": "head"}
    return own | more


def _gemma(**more: Any) -> dict[str, Any]:
    own = {
        "activations": ("gelu", "linear"),
        "head_dim": 256,
        "norm_plus_one": True,
        "scale_embeddings": True,
        "tie_embeddings": True,
        "context_length": 8192,
    }
    return own | more


def _gemma2(**more: Any) -> dict[str, Any]:
    own = {
        "norm_placement": "both",
        "attention_scale": 256**-0.5,
        "attention_softcap": 50.0,
        "logits_softcap": 30.0,
        "window": 4096,
        "layer_pattern": ("window", "full"),
    }
    return _gemma(**own | more)


def _gemma3(**more: Any) -> dict[str, Any]:
    six = ("window",) * 5 + ("full",)
    own = {
        "norm_placement": "both",
        "attention_scale": 256**-0.5,
        "query_key_norm": "head",
        "rope_theta": 1e6,
        "rope_local_theta": 10_000.0,
        "layer_pattern": six,
    }
    return _gemma(**own | more)


def _olmo2(**more: Any) -> dict[str, Any]:
    own = {"context_length": 4096, "rope_theta": 500_000.0}
    return own | {"norm_placement": "output", "query_key_norm": "width"} | more


def _deepseek(layers: int, dense: int, query_rank: int | None, mscale: float, moe: MoE) -> dict[str, Any]:
    scaling = RopeScaling("yarn", 40, original_length=4096, mscale=mscale, mscale_all_dim=mscale)
    return {
        "context_length": 163_840,
        "rope_scaling": scaling,
        "attention_scale": 192**-0.5 * scaling.softmax_factor,
        "latent": LatentAttention(512, 128, 64, 128, query_rank),
        "moe": moe,
        "moe_layers": tuple(range(dense, layers)),
    }


def _gpt_oss(experts: int, layers: int) -> Preset:
    return _decoder(
        *(201_088, 2880, 2880, layers, 64, 8),
        head_dim=64,
        activations=("silu_1702", "linear_plus_one"),
        mlp_clamp=7.0,
        norm_eps=1e-5,
        rope_theta=150_000.0,
        rope_scaling=RopeScaling("yarn", 32.0, original_length=4096, truncate=False),
        context_length=131_072,
        window=128,
        layer_pattern=("window", "full"),
        attention_bias=True,
        attention_output_bias=True,
        attention_sinks=True,
        moe=MoE(experts, 4, 2880, choose_first=True, bias=True),
    )


PRESETS: dict[str, Preset] = {
    "llama3_1_8b": _decoder(128_256, 4096, 14336, 32, 32, 8, **_llama3(8.0)),
    "llama3_1_70b": _decoder(128_256, 8192, 28672, 80, 64, 8, **_llama3(8.0)),
    "llama3_2_1b": _decoder(128_256, 2048, 8192, 16, 32, 8, **_llama3(32.0), tie_embeddings=True),
    "smollm2_135m": _decoder(49_152, 576, 1536, 30, 9, 3, **_smollm2(8192, 1e5, init_scale=1 / 24)),
    "smollm2_360m": _decoder(49_152, 960, 2560, 32, 15, 5, **_smollm2(8192, 1e5)),
    "smollm2_1_7b": _decoder(49_152, 2048, 8192, 24, 32, 32, **_smollm2(8192, 130_000.0)),
    "smollm3_3b": _decoder(
        *(128_256, 2048, 11008, 36, 16, 4),
        context_length=65_536,
        rope_theta=5e6,
        tie_embeddings=True,
        layer_pattern=("full", "full", "full", "full_nope"),
    ),
    "mistral_7b": _decoder(
        *(32_000, 4096, 14336, 32, 32, 8),
        context_length=32_768,
        norm_eps=1e-5,
        window=4096,
        layer_pattern=("window",),
    ),
    "mixtral_8x7b": _decoder(
        *(32_000, 4096, 14336, 32, 32, 8),
        context_length=32_768,
        norm_eps=1e-5,
        rope_theta=1e6,
        moe=MoE(8, 2, 14336, normalize=True),
    ),
    "qwen2_5_0_5b": _decoder(151_936, 896, 4864, 24, 14, 2, **_qwen2(32_768, tie_embeddings=True)),
    "qwen2_5_7b": _decoder(152_064, 3584, 18944, 28, 28, 4, **_qwen2(131_072)),
    "qwen3_0_6b": _decoder(151_936, 1024, 3072, 28, 16, 8, **_qwen3(tie_embeddings=True)),
    "qwen3_8b": _decoder(151_936, 4096, 12288, 36, 32, 8, **_qwen3()),
    "qwen1_5_moe_a2_7b": _decoder(
        *(151_936, 2048, 5632, 24, 16, 16),
        **_qwen2(8192, moe=MoE(60, 4, 1408, shared_d_ff=5632, shared_gate=True)),
    ),
    "qwen3_30b_a3b": _decoder(
        *(151_936, 2048, 6144, 48, 32, 4), **_qwen3(moe=MoE(128, 8, 768, normalize=True))
    ),
    "gemma_2b": _decoder(256_000, 2048, 16384, 18, 8, 1, **_gemma()),
    "gemma2_2b": _decoder(256_000, 2304, 9216, 26, 8, 4, **_gemma2()),
    "gemma2_9b": _decoder(256_000, 3584, 14336, 42, 16, 8, **_gemma2()),
    "gemma3_1b": _decoder(*(262_144, 1152, 6912, 26, 4, 1), **_gemma3(window=512, context_length=32_768)),
    "gemma3_4b": _decoder(
        *(262_208, 2560, 10240, 34, 8, 4),
        **_gemma3(window=1024, context_length=131_072, rope_scaling=RopeScaling("linear", 8.0)),
    ),
    "olmo2_1b": _decoder(100_352, 2048, 8192, 16, 16, 16, **_olmo2()),
    "olmo2_7b": _decoder(100_352, 4096, 11008, 32, 32, 32, **_olmo2()),
    "phi3_mini": _decoder(
        *(32_064, 3072, 8192, 32, 32, 32),
        context_length=4096,
        norm_eps=1e-5,
        window=2047,
        layer_pattern=("window",),
    ),
    "phi4": _decoder(
        *(100_352, 5120, 17920, 40, 40, 10),
        context_length=16_384,
        norm_eps=1e-5,
        rope_theta=250_000.0,
    ),
    "deepseek_v2_lite": _decoder(
        *(102_400, 2048, 10944, 27, 16, None),
        **_deepseek(27, 1, None, 0.707, MoE(64, 6, 1408, shared_d_ff=2816)),
    ),
    "deepseek_v3": _decoder(
        *(129_280, 7168, 18432, 61, 128, None),
        **_deepseek(
            *(61, 3, 1536, 1.0),
            MoE(
                *(256, 8, 2048, "sigmoid"),
                normalize=True,
                scale=2.5,
                correction_bias=True,
                groups=8,
                groups_per_token=4,
                group_score="top2",
                shared_d_ff=2048,
            ),
        ),
    ),
    "gpt_oss_20b": _gpt_oss(32, 24),
    "gpt_oss_120b": _gpt_oss(128, 36),
}
