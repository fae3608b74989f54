"""Decoder-only families: the same as transformers', both ways."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from t5style.models.cache import init_cache
from t5style.models.convert import load_huggingface, save_huggingface
from t5style.models.params import init_params
from t5style.run_dir import UserError
from tests.models.decoder_models import MODELS, golden, inputs, make_model, run_model
from tests.models.test_convert import check, write
from tests.models.tiny import runner

KINDS = list(MODELS)


@functools.cache
def _loaded(folder):
    config, params = load_huggingface(folder)
    return config.replace(scan_layers=True), params  # compiles faster


@pytest.fixture(scope="module", params=KINDS)
def stored(request, tmp_path_factory):
    """(kind, folder, config, params, inputs, logits, loss) of a golden model."""
    fields, weights, arrays, logits, loss = golden(request.param)
    folder = write(tmp_path_factory.mktemp("models") / request.param, fields, weights)
    return request.param, folder, *_loaded(folder), arrays, logits, loss


def close(got, want, where=None):
    """Within 1e-4 of the scale of what is wanted; where: which are real."""
    off = np.abs(np.asarray(got) - want)
    assert (off if where is None else off[where]).max() <= 1e-4 * max(1.0, np.abs(want).max())


def test_logits_and_loss_equal_the_stored_ones_of_transformers(stored):
    """With padding on either side."""
    *_, config, params, arrays, logits, loss = stored
    check(config, params, arrays, logits, loss)


def test_what_we_save_is_what_we_loaded(stored, tmp_path):
    kind, folder, config, params, *_ = stored
    save_huggingface(tmp_path / "ours", config, params, family=MODELS[kind][0])
    again, params_again = load_huggingface(tmp_path / "ours")
    for name in ("num_kv_heads", "head_dim"):  # a config.json may leave these out; we write them
        again = again.replace(**{name: getattr(config, name)})
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    assert again.replace(scan_layers=True) == config


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_we_agree_on_what_either_saved(kind, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model, arrays = make_model(kind, seed=1), inputs()
    logits, loss = run_model(model, arrays)
    model.save_pretrained(tmp_path / "theirs")
    config, params = _loaded(tmp_path / "theirs")
    check(config, params, arrays, logits, loss)
    ids = {name: MODELS[kind][1][name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    save_huggingface(tmp_path / "ours", config, params, family=MODELS[kind][0], extra=ids)
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    again_logits, again_loss = run_model(again.eval(), arrays)
    real = arrays["mask"] > 0  # what padding gives depends on the implementation of attention
    np.testing.assert_allclose(again_logits[real], logits[real], atol=2e-5 * max(1.0, np.abs(logits).max()))
    assert abs(again_loss - loss) < 1e-5
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [type(model).__name__]


def test_packed_rows_are_those_apart(stored):
    """Rows of 5 and 4 tokens apart, and one row that holds both."""
    *_, config, params, arrays, _, _ = stored
    whole = arrays["tokens"][0]
    rows = np.zeros((3, 9), np.int32)
    rows[0, :5], rows[1, :4], rows[2] = whole[:5], whole[5:], whole
    segments = np.int32([[1] * 5 + [0] * 4, [1] * 4 + [0] * 5, [1] * 5 + [2] * 4])
    counted = np.arange(9)
    positions = np.int32([counted, counted, [0, 1, 2, 3, 4, 0, 1, 2, 3]])
    one, two, packed = np.asarray(
        runner(config)(
            params,
            decoder_input_tokens=rows,
            decoder_segment_ids=segments,
            decoder_positions=positions.astype(np.int32),
        )
    )
    close(packed, np.concatenate([one[:5], two[:4]]))


def test_decoding_in_pieces_is_the_whole(stored):
    """Three pieces of three tokens, padded on either side; in rings, where layers have windows, on the left.

    Two models with windows go without rings.
    """
    kind, _, config, params, arrays, logits, _ = stored
    chunk = 3 if config.window and kind not in ("mixtral", "gemma2") else None
    rows = np.array([0, 1] if chunk else [0, 1, 2])
    mask = arrays["mask"][rows].astype(np.int32)
    cache = init_cache(config, len(mask), mask.shape[1], chunk=chunk)
    if chunk:
        slots = {next(iter(layer.values())).shape[2] for layer in cache["layers"]}
        assert min(slots) == config.window + 2 < 9
    pieces = []
    for start in range(0, 9, 3):
        part = slice(start, start + 3)
        got, cache = runner(config, "decode")(
            params, arrays["tokens"][rows, part], cache, valid=jnp.asarray(mask[:, part])
        )
        pieces.append(got)
    close(np.concatenate(pieces, 1), logits[rows], mask > 0)


# --- configs ---


def _changed(kind, fields, tmp_path):
    theirs, weights, *_ = golden(kind)
    fields = {name: value for name, value in (theirs | fields).items() if value != "left out"}
    return write(tmp_path / "m", fields, weights)


V4 = "left out"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama_llama3", {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
            "rope_parameters": V4}),
        ("llama_linear", {"rope_theta": 500, "rope_scaling": {"type": "linear", "factor": 4},
            "rope_parameters": V4}),
        ("gemma3", {"rope_theta": 5000.0, "rope_local_base_freq": 100.0, "rope_parameters": V4,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("qwen2", {"layer_types": V4, "rope_theta": 1e6, "rope_parameters": V4}),
        ("gemma2", {"layer_types": V4, "cache_implementation": "hybrid", "hidden_act": "gelu"}),
        ("gemma", {"hidden_act": "gelu"}),
        ("gemma", {"hidden_act": V4, "hidden_activation": "gelu_pytorch_tanh"}),
        ("smollm3", {"no_rope_layers": V4, "no_rope_layer_interval": 2, "layer_types": V4}),
        ("qwen3_moe", {"num_local_experts": V4, "num_experts": 4, "max_window_layers": 2}),
        ("phi3", {"rope_parameters": V4, "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
            "rope_scaling": {"type": "su", "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 6.0]}}),
        ("gpt_oss", {"experts_per_token": 2, "initial_context_length": 16, "layer_types": V4}),
        ("deepseek_v2", {"head_dim": V4, "qk_head_dim": V4, "scoring_func": "softmax", "moe_layer_freq": 1}),
    ],
)  # fmt: skip
def test_what_transformers_4_wrote_means_the_same(kind, fields, tmp_path):
    config = load_huggingface(_changed(kind, fields, tmp_path))[0]
    assert config == load_huggingface(_changed(kind, {}, tmp_path))[0]


@pytest.mark.parametrize("names", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_gemma_3_with_images(names, tmp_path):
    text, weights, arrays, logits, loss = golden("gemma3")
    theirs = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "mm_tokens_per_image": 4}
    tensors = {name.replace("model.", names, 1): value for name, value in weights.items()}
    tensors["vision_tower.vision_model.embeddings.patch_embedding.bias"] = np.zeros(3, np.float32)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.zeros(3, np.float32)
    config, params = load_huggingface(write(tmp_path / "m", theirs, tensors))
    check(config, params, arrays, logits, loss)
    save_huggingface(tmp_path / "text", config, params, family="gemma3")
    assert json.loads((tmp_path / "text/config.json").read_text())["model_type"] == "gemma3_text"
    with pytest.raises(UserError, match="the field flux = 3 is not one we honour"):
        load_huggingface(write(tmp_path / "x", theirs | {"flux": 3}, tensors))
    text["flux"] = 3
    with pytest.raises(UserError, match="text_config: the field flux = 3 is not one we honour"):
        load_huggingface(write(tmp_path / "x", theirs, tensors))


def test_corrections_of_routers_stay_in_float32(tmp_path):
    fields, weights, *_ = golden("deepseek_v3")
    config, params = load_huggingface(write(tmp_path / "m", fields, weights), "bfloat16")
    kinds = {path[-1].key: str(x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(params)}
    assert kinds == {"embedding": "bfloat16", "kernel": "bfloat16", "scale": "bfloat16"} | {
        "router_bias": "float32"
    }
    like = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, like)
    save_huggingface(tmp_path / "ours", config, params)
    saved = load_file(tmp_path / "ours/model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(saved[name], weights[name])


def test_the_long_factors_of_phi_3_are_a_setting(tmp_path):
    """transformers takes them for a batch of longer sequences; ours for the length in use that is set."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    own = {"original_max_position_embeddings": 4}
    model, arrays = make_model("phi3", more=own), inputs()
    logits, loss = run_model(model, arrays)
    model.save_pretrained(tmp_path / "theirs")
    config, params = _loaded(tmp_path / "theirs")
    scaling = dataclasses.replace(config.rope_scaling, length_in_use=9)
    config = config.replace(rope_scaling=scaling)
    check(config, params, arrays, logits, loss)
    save_huggingface(tmp_path / "ours", config, params, family="phi3")
    assert load_huggingface(tmp_path / "ours")[0].rope_scaling == dataclasses.replace(
        scaling, length_in_use=None
    )


# --- bad input ---


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_unknown_tensors_are_errors_naming_them(kind, tmp_path):
    fields, weights, *_ = golden(kind)
    missing = sorted(name for name in weights if "layers.1." in name)[-1]
    fewer = {name: value for name, value in weights.items() if name != missing}
    with pytest.raises(UserError, match=rf"lacks 1 tensors .*{missing}"):
        load_huggingface(write(tmp_path / "a", fields, fewer))
    unknown = "model.layers.1.self_attn.q_proj.lora_A.weight"
    with pytest.raises(UserError, match=f"1 tensors with no place in this model: .*{unknown}"):
        load_huggingface(write(tmp_path / "b", fields, weights | {unknown: np.ones(2, np.float32)}))


@pytest.mark.parametrize("kind", KINDS)
def test_fields_nobody_honours_are_errors_naming_them(kind, tmp_path):
    with pytest.raises(UserError, match="the field flux_capacity = 3 is not one we honour"):
        load_huggingface(_changed(kind, {"flux_capacity": 3}, tmp_path))
    with pytest.raises(UserError, match=r"attention_dropout = 0\.1 is not supported"):
        load_huggingface(_changed(kind, {"attention_dropout": 0.1}, tmp_path))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama_yarn", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ("llama_yarn", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn' lacks factor"),
        ("llama_yarn", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
         "rope_parameters.beta_fast = 3"),
        ("llama_yarn", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradict each other"),
        ("llama_yarn", {"rope_parameters": 3}, "rope_parameters = 3 is not an object"),
        ("llama_yarn", {"layer_types": ["full_attention"] * 2}, "the field layer_types"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "the field layer_types"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types holds 'chunked_attention'"),
        ("qwen2", {"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries"),
        ("qwen3", {"use_sliding_window": False}, "use_sliding_window gives no window"),
        ("qwen2_moe", {"layer_types": None}, "use_sliding_window = True needs layer_types"),
        ("qwen2_moe", {"mlp_only_layers": [1, 3]}, "leave no layer with experts"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "MoE.per_token = 5 is more than the 4 experts"),
        ("qwen3_moe", {"num_local_experts": 3}, "tensors with no place|has shape"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "is not an object of full_attention"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave = False"),
        ("deepseek_v3", {"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05 is not supported"),
        ("deepseek_v3", {"first_k_dense_replace": 3}, "first_k_dense_replace = 3 leaves no layer"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, r"quantised \(mxfp4\)"),
        ("gpt_oss", {"swiglu_alpha": 2.0}, "swiglu_alpha = 2.0"),
        ("gpt_oss", {"experts_per_token": 4}, "experts_per_token = 4"),
    ],
)  # fmt: skip
def test_configs_we_cannot_honour_are_errors_naming_the_field(kind, fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_huggingface(_changed(kind, fields, tmp_path))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", {"attention_bias": True}, "cannot have attention_bias = True"),
        ("mistral", {"window": 3, "layer_pattern": ("window", "full")}, "its layers are alike"),
        ("mixtral", {"moe": None}, "cannot have moe = None"),
        ("qwen2", {"attention_bias": False}, "cannot have attention_bias = False"),
        ("qwen3", {"query_key_norm": "width"}, "cannot have query_key_norm = 'width'"),
        ("qwen2", {"window": None, "layer_pattern": ("full", "full_nope")}, "layers of kind 'full_nope'"),
        ("gemma", {"scale_embeddings": False}, "cannot have scale_embeddings = False"),
        ("gemma2", {"attention_scale": 0.3}, "cannot have attention_scale = 0.3"),
        ("olmo2", {"norm_placement": "pre"}, "cannot have norm_placement = 'pre'"),
        ("phi3", {"rope_theta": 10.0, "query_key_norm": "head"}, "cannot have query_key_norm = 'head'"),
        ("deepseek_v3", {"latent": None}, "cannot have latent = None"),
        ("deepseek_v3", {"attention_scale": 0.5}, "cannot have attention_scale = 0.5"),
        ("gpt_oss", {"activations": ("silu", "linear")}, "cannot have activations"),
    ],
)
def test_models_of_another_form_are_not_saved_as_these(kind, changes, message, tmp_path):
    fields, weights, *_ = golden(kind)
    config, params = load_huggingface(write(tmp_path / "m", fields, weights))
    with pytest.raises(UserError, match=message):
        save_huggingface(tmp_path / "x", config.replace(**changes), params, family=MODELS[kind][0])
    assert not (tmp_path / "x").exists()
