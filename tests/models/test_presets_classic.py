"""Presets of T5's relatives, GPT-2, GPT-NeoX and BERT."""

import pytest

from t5style.models.convert_rows import Fields
from t5style.models.families.registry import FAMILIES
from t5style.models.params import count_params
from t5style.models.presets import PRESETS

# As the published checkpoints have them (transformers' num_parameters of each; BERT with its pooler).
PUBLISHED = {
    "flan_t5_small": 76_961_152,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
    "umt5_small": 306_601_984,
    "umt5_base": 592_043_520,
    "umt5_xl": 3_768_356_864,
    "umt5_xxl": 12_972_531_712,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "byt5_large": 1_228_183_552,
    "byt5_xl": 3_737_801_728,
    "byt5_xxl": 12_906_899_328,
    "ul2": 19_591_209_984,
    "switch_base_8": 619_339_008,
    "switch_base_128": 7_415_217_408,
    "bert_base": 109_482_240,
    "bert_large": 335_141_888,
    "minilm_l6": 22_713_216,
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "pythia_70m": 70_426_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1_4b": 1_414_647_808,
    "pythia_2_8b": 2_775_208_960,
    "pythia_6_9b": 6_857_302_016,
    "pythia_12b": 11_846_072_320,
    "gpt_neox_20b": 20_554_567_680,
}

_T5 = {"d_kv": 64, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
       "initializer_factor": 1.0, "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06,
       "relative_attention_num_buckets": 32, "dropout_rate": 0.1, "use_cache": True}  # fmt: skip
# config.json of published checkpoints: what decides, and what one must not stumble over.
CONFIGS = {
    "gpt2_small": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
        "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "vocab_size": 50257,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "pythia_70m": {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "hidden_size": 512, "initializer_range": 0.02, "intermediate_size": 2048, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 8,
        "num_hidden_layers": 6, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "torch_dtype": "float16", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
    },
    "gpt_neox_20b": {
        "architectures": ["GPTNeoXForCausalLM"], "attention_probs_dropout_prob": 0, "bos_token_id": 0,
        "eos_token_id": 0, "hidden_act": "gelu_fast", "hidden_dropout_prob": 0, "hidden_size": 6144,
        "initializer_range": 0.02, "intermediate_size": 24576, "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 64,
        "num_hidden_layers": 44, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "torch_dtype": "float16", "use_cache": True, "vocab_size": 50432,
    },
    "bert_base": {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
        "gradient_checkpointing": False, "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
        "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
        "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
    },
    "mt5_small": {
        **_T5, "architectures": ["MT5ForConditionalGeneration"], "d_ff": 1024, "d_model": 512,
        "feed_forward_proj": "gated-gelu", "model_type": "mt5", "num_decoder_layers": 8, "num_heads": 6,
        "num_layers": 8, "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer", "vocab_size": 250112,
    },
    "umt5_small": {
        **_T5, "architectures": ["UMT5ForConditionalGeneration"], "classifier_dropout": 0.0, "d_ff": 1024,
        "d_model": 512, "dense_act_fn": "gelu_new", "feed_forward_proj": "gated-gelu", "is_gated_act": True,
        "model_type": "umt5", "num_decoder_layers": 8, "num_heads": 6, "num_layers": 8,
        "relative_attention_max_distance": 128, "scalable_attention": True, "tie_word_embeddings": False,
        "vocab_size": 256384,
    },
    "byt5_small": {
        **_T5, "architectures": ["T5ForConditionalGeneration"], "d_ff": 3584, "d_model": 1472,
        "feed_forward_proj": "gated-gelu", "gradient_checkpointing": False, "model_type": "t5",
        "num_decoder_layers": 4, "num_heads": 6, "num_layers": 12, "tie_word_embeddings": False,
        "tokenizer_class": "ByT5Tokenizer", "vocab_size": 384,
    },
    "ul2": {
        **_T5, "architectures": ["T5ForConditionalGeneration"], "d_ff": 16384, "d_kv": 256, "d_model": 4096,
        "feed_forward_proj": "gated-silu", "model_type": "t5", "n_positions": 512, "num_decoder_layers": 32,
        "num_heads": 16, "num_layers": 32, "output_past": True, "tie_word_embeddings": False,
        "vocab_size": 32128,
    },
    "switch_base_8": {
        **_T5, "add_router_probs": False, "architectures": ["SwitchTransformersForConditionalGeneration"],
        "d_ff": 3072, "d_model": 768, "decoder_sparse_step": 2, "dense_act_fn": "relu",
        "encoder_sparse_step": 2, "expert_capacity": 64, "feed_forward_proj": "relu", "is_gated_act": False,
        "model_type": "switch_transformers", "num_decoder_layers": 12, "num_experts": 8, "num_heads": 12,
        "num_layers": 12, "num_sparse_decoder_layers": 6, "num_sparse_encoder_layers": 6,
        "relative_attention_max_distance": 128, "router_aux_loss_coef": 0.001, "router_bias": False,
        "router_dtype": "float32", "router_ignore_padding_tokens": False, "router_jitter_noise": 0.01,
        "router_type": "tokens_masked", "router_z_loss_coef": 0.001, "vocab_size": 32128,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert count_params(PRESETS[name]()) == PUBLISHED[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_published_config_is_the_preset(name):
    fields = CONFIGS[name]
    got = FAMILIES[fields["model_type"]].config(Fields(fields, "config.json"))
    want = PRESETS[name]()
    # Pretrained without dropout, its config.json is for fine-tuning; the pooler is seen in the tensors.
    want = want.replace(dropout=got.dropout, pooler=got.pooler, head_dim=got.head_dim)
    assert got == want


def test_presets_take_changes():
    assert PRESETS["mt5_small"](dropout=0.25).dropout == 0.25
    assert PRESETS["mt5_small"]().dropout == 0.0
