"""Presets of decoder-only families: parameter counts and released configs."""

import pytest

from t5style.models.convert_rows import Fields
from t5style.models.families.registry import FAMILIES
from t5style.models.params import count_params
from t5style.models.presets import PRESETS
from t5style.models.presets_decoder import PRESETS as DECODERS

# transformers' num_parameters of each; of DeepSeek-V3 without the layer that foretells a second token, and
# with 58 · 256 corrections, which are no parameters there.
PUBLISHED = {
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
    "mistral_7b": 7_241_732_096,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "qwen1_5_moe_a2_7b": 14_315_784_192,
    "qwen3_30b_a3b": 30_532_122_624,
    "gemma_2b": 2_506_172_416,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "phi3_mini": 3_821_079_552,
    "phi4": 14_659_507_200,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_404_352 + 58 * 256,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
}


def _sizes(vocabulary, width, hidden, layers, heads, kv_heads, **more):
    return {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16",
        "rms_norm_eps": 1e-6, **more,
    }  # fmt: skip


_SILU = {"hidden_act": "silu", "tie_word_embeddings": False}
_LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
           "original_max_position_embeddings": 8192}  # fmt: skip
_SMOLLM2 = {**_SILU, "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None,
            "model_type": "llama", "attention_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True, "max_position_embeddings": 8192}  # fmt: skip
_QWEN = {**_SILU, "use_sliding_window": False, "rope_theta": 1e6}
_QWEN3 = {**_QWEN, "head_dim": 128, "attention_bias": False, "max_position_embeddings": 40960,
          "rope_scaling": None, "sliding_window": None}  # fmt: skip
_GEMMA2 = {"model_type": "gemma2", "head_dim": 256, "attention_bias": False, "hidden_act":
           "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
           "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
           "rope_theta": 10000.0, "sliding_window": 4096, "max_position_embeddings": 8192}  # fmt: skip
_GEMMA3 = {"attention_bias": False, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
           "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
           "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_theta": 1000000,
           "sliding_window_pattern": 6}  # fmt: skip
_OLMO2 = {**_SILU, "model_type": "olmo2", "attention_bias": False, "max_position_embeddings": 4096,
          "rope_scaling": None, "rope_theta": 500000}  # fmt: skip
_PHI = {**_SILU, "model_type": "phi3", "embd_pdrop": 0.0, "resid_pdrop": 0.0, "rope_scaling": None,
        "attention_bias": False, "rms_norm_eps": 1e-5}  # fmt: skip
_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096,
         "type": "yarn"}  # fmt: skip
_DEEPSEEK = {**_SILU, "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1,
             "kv_lora_rank": 512, "max_position_embeddings": 163840, "pretraining_tp": 1, "seq_aux": True,
             "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
             "rope_theta": 10000}  # fmt: skip
_GPT_OSS = {**_SILU, "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
            "initial_context_length": 4096, "max_position_embeddings": 131072, "num_experts_per_tok": 4,
            "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 150000,
            "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "rope_scaling":
            {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
             "rope_type": "yarn", "truncate": False}}  # fmt: skip
CONFIGS = {
    "llama3_1_8b": _sizes(128256, 4096, 14336, 32, 32, 8, **_SILU, model_type="llama", mlp_bias=False,
        attention_bias=False, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0,
        rope_scaling=_LLAMA3, pretraining_tp=1),
    "llama3_2_1b": _sizes(128256, 2048, 8192, 16, 32, 8, hidden_act="silu", tie_word_embeddings=True,
        model_type="llama", head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_theta=500000.0, rope_scaling={**_LLAMA3, "factor": 32.0}),
    "smollm2_135m": _sizes(49152, 576, 1536, 30, 9, 3, **_SMOLLM2, rope_theta=100000)
        | {"initializer_range": 0.041666666666666664},
    "smollm2_360m": _sizes(49152, 960, 2560, 32, 15, 5, **_SMOLLM2, rope_theta=100000),
    "smollm2_1_7b": _sizes(49152, 2048, 8192, 24, 32, 32, **_SMOLLM2, rope_theta=130000),
    "smollm3_3b": _sizes(128256, 2048, 11008, 36, 16, 4, model_type="smollm3", hidden_act="silu",
        attention_bias=False, mlp_bias=False, max_position_embeddings=65536, max_window_layers=28,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, rope_theta=5000000.0, rope_scaling=None,
        layer_types=["full_attention"] * 36, sliding_window=None, use_sliding_window=False,
        pretraining_tp=2),
    "mistral_7b": _sizes(32000, 4096, 14336, 32, 32, 8, **_SILU, model_type="mistral", rope_theta=10000.0,
        sliding_window=4096, max_position_embeddings=32768) | {"rms_norm_eps": 1e-5},
    "mixtral_8x7b": _sizes(32000, 4096, 14336, 32, 32, 8, **_SILU, model_type="mixtral", rope_theta=1e6,
        sliding_window=None, max_position_embeddings=32768, num_experts_per_tok=2, num_local_experts=8,
        output_router_logits=False, router_aux_loss_coef=0.02) | {"rms_norm_eps": 1e-5},
    "qwen2_5_0_5b": _sizes(151936, 896, 4864, 24, 14, 2, **_QWEN, model_type="qwen2", sliding_window=32768,
        max_position_embeddings=32768, max_window_layers=24, use_mrope=False)
        | {"tie_word_embeddings": True},
    "qwen2_5_7b": _sizes(152064, 3584, 18944, 28, 28, 4, **_QWEN, model_type="qwen2", sliding_window=131072,
        max_position_embeddings=131072, max_window_layers=28, use_mrope=False),
    "qwen3_0_6b": _sizes(151936, 1024, 3072, 28, 16, 8, **_QWEN3, model_type="qwen3", max_window_layers=28)
        | {"tie_word_embeddings": True},
    "qwen3_8b": _sizes(151936, 4096, 12288, 36, 32, 8, **_QWEN3, model_type="qwen3", max_window_layers=36),
    "qwen1_5_moe_a2_7b": _sizes(151936, 2048, 5632, 24, 16, 16, **_QWEN, model_type="qwen2_moe",
        sliding_window=32768, max_position_embeddings=8192, max_window_layers=21, decoder_sparse_step=1,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts_per_tok=4,
        num_experts=60, norm_topk_prob=False, output_router_logits=False, router_aux_loss_coef=0.001),
    "qwen3_30b_a3b": _sizes(151936, 2048, 6144, 48, 32, 4, **_QWEN3, model_type="qwen3_moe",
        max_window_layers=48, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=768,
        norm_topk_prob=True, num_experts=128, num_experts_per_tok=8, output_router_logits=False,
        router_aux_loss_coef=0.001),
    "gemma_2b": _sizes(256000, 2048, 16384, 18, 8, 1, model_type="gemma", head_dim=256, hidden_act="gelu",
        hidden_activation=None, attention_bias=False, max_position_embeddings=8192, rope_theta=10000.0,
        rope_scaling=None),
    "gemma2_2b": _sizes(256000, 2304, 9216, 26, 8, 4, **_GEMMA2),
    "gemma2_9b": _sizes(256000, 3584, 14336, 42, 16, 8, **_GEMMA2),
    "gemma3_1b": _sizes(262144, 1152, 6912, 26, 4, 1, **_GEMMA3, model_type="gemma3_text",
        sliding_window=512, max_position_embeddings=32768, rope_scaling=None),
    "gemma3_4b": {"model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000,
        "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "vision_config": {"model_type": "siglip_vision_model"}, "text_config": {"hidden_size": 2560,
        "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}},
    "olmo2_1b": _sizes(100352, 2048, 8192, 16, 16, 16, **_OLMO2),
    "olmo2_7b": _sizes(100352, 4096, 11008, 32, 32, 32, **_OLMO2),
    "phi3_mini": _sizes(32064, 3072, 8192, 32, 32, 32, **_PHI, max_position_embeddings=4096,
        original_max_position_embeddings=4096, rope_theta=10000.0, sliding_window=2047),
    "phi4": _sizes(100352, 5120, 17920, 40, 40, 10, **_PHI, max_position_embeddings=16384,
        original_max_position_embeddings=16384, rope_theta=250000, sliding_window=None),
    "deepseek_v2_lite": _sizes(102400, 2048, 10944, 27, 16, 16, **_DEEPSEEK, model_type="deepseek_v2",
        first_k_dense_replace=1, moe_intermediate_size=1408, n_group=1, n_routed_experts=64, topk_group=1,
        n_shared_experts=2, norm_topk_prob=False, num_experts_per_tok=6, q_lora_rank=None,
        routed_scaling_factor=1.0, scoring_func="softmax", topk_method="greedy",
        rope_scaling={**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "deepseek_v3": _sizes(129280, 7168, 18432, 61, 128, 128, **_DEEPSEEK, model_type="deepseek_v3",
        first_k_dense_replace=3, moe_intermediate_size=2048, n_group=8, n_routed_experts=256, topk_group=4,
        n_shared_experts=1, norm_topk_prob=True, num_experts_per_tok=8, q_lora_rank=1536,
        routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc",
        num_nextn_predict_layers=1, rope_scaling={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "gpt_oss_20b": _sizes(201088, 2880, 2880, 24, 64, 8, num_local_experts=32,
        layer_types=["sliding_attention", "full_attention"] * 12, **_GPT_OSS),
    "gpt_oss_120b": _sizes(201088, 2880, 2880, 36, 64, 8, num_local_experts=128, **_GPT_OSS),
}  # fmt: skip


def test_every_preset_has_its_count():
    assert set(PUBLISHED) == set(DECODERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert count_params(PRESETS[name]()) == PUBLISHED[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_published_config_is_the_preset(name):
    fields = CONFIGS[name]
    got = FAMILIES[fields["model_type"]].config(Fields(fields, "config.json"))
    want = PRESETS[name]()
    assert got == want.replace(head_dim=got.head_dim)
    assert got.heads_width == want.heads_width
