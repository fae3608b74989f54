import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5style.models import safetensors_files
from t5style.models.convert import huggingface_config, load_huggingface, save_huggingface
from t5style.run_dir import UserError
from tests.models.make_golden import GOLDEN, MODELS, inputs, make_model, run_model
from tests.models.tiny import LLAMA, T5, params_of, runner

KINDS = list(MODELS)


def golden(kind):
    """config.json's fields, tensors by name, inputs, logits, loss."""
    with np.load(GOLDEN / f"{kind}.npz") as file:
        arrays = {name: file[name] for name in file.files}
    weights = {name.split(":")[1]: arrays.pop(name) for name in list(arrays) if ":" in name}
    config = json.loads(str(arrays.pop("config")))
    return config, weights, arrays, arrays.pop("logits"), float(arrays.pop("loss"))


def write(folder, config, weights):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.ascontiguousarray(value) for name, value in weights.items()}, folder / "model.safetensors"
    )
    return folder


def logits_of(config, params, arrays):
    mask = arrays["mask"].astype(np.int32)
    given = {
        "decoder_input_tokens": arrays["tokens"].astype(np.int32),
        "decoder_segment_ids": mask,
        "decoder_positions": np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32),
    }
    if "encoder_tokens" in arrays:
        given["encoder_input_tokens"] = arrays["encoder_tokens"].astype(np.int32)
        given["encoder_segment_ids"] = arrays["encoder_mask"].astype(np.int32)
    return np.asarray(runner(config)(params, **given))


def loss_of(logits, labels, shift):
    """Mean cross-entropy of the labels that are not -100, as transformers' models compute it."""
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(scores, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return -picked[labels != -100].mean()


def check(config, params, arrays, logits, loss):
    got = logits_of(config, params, arrays)
    real = arrays["mask"] > 0
    assert np.abs(got - logits)[real].max() <= 1e-4 * max(1.0, np.abs(logits).max())
    assert abs(loss_of(got, arrays["labels"], not config.encoder_layers) - loss) <= 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_equal_the_stored_ones_of_transformers(kind, tmp_path):
    theirs, weights, arrays, logits, loss = golden(kind)
    config, params = load_huggingface(write(tmp_path / "m", theirs, weights))
    check(config, params, arrays, logits, loss)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_we_agree_on_what_either_saved(kind, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model, arrays = make_model(kind, seed=1), inputs(kind)
    logits, loss = run_model(model, arrays)
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_huggingface(tmp_path / "theirs")
    check(config, params, arrays, logits, loss)
    save_huggingface(tmp_path / "ours", config, params)
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    again_logits, again_loss = run_model(again, arrays)
    np.testing.assert_allclose(again_logits, logits, atol=1e-5)
    assert abs(again_loss - loss) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_save_we_load_bit_for_bit_and_their_names_are_kept(kind, tmp_path):
    theirs, weights, *_ = golden(kind)
    config, params = load_huggingface(write(tmp_path / "m", theirs, weights))
    save_huggingface(tmp_path / "again", config, params, extra={"bos_token_id": 7})
    config_again, params_again = load_huggingface(tmp_path / "again")
    # A config.json may leave these two out; we write them.
    assert config_again == config.replace(head_dim=config.heads_width, num_kv_heads=config_again.num_kv_heads)
    assert config_again.kv_heads == config.kv_heads
    jax.tree.map(np.testing.assert_array_equal, params_again, params)
    saved = load_file(tmp_path / "again" / "model.safetensors")
    assert set(saved) == set(weights)
    for name, value in weights.items():
        np.testing.assert_array_equal(saved[name], value)
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["bos_token_id"] == 7
    assert {name: written[name] for name in theirs} == theirs


def test_shards_are_written_and_read(tmp_path, monkeypatch):
    theirs, weights, *_ = golden("t5_1_1")
    config, params = load_huggingface(write(tmp_path / "m", theirs, weights))
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 10_000)
    save_huggingface(tmp_path / "shards", config, params)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(tmp_path / "shards")[1], params)
    (tmp_path / "shards" / files[1]).unlink()
    with pytest.raises(UserError, match=f"{files[1]} is missing"):
        load_huggingface(tmp_path / "shards")


def test_bfloat16_in_and_out(tmp_path):
    theirs, weights, *_ = golden("llama")
    folder = write(tmp_path / "m", theirs, weights)
    config, params = load_huggingface(folder, dtype="bfloat16")
    assert (config.dtype, config.param_dtype) == ("bfloat16", "bfloat16")
    assert huggingface_config(folder, dtype="bfloat16") == config
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    save_huggingface(tmp_path / "half", config, params)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_huggingface(tmp_path / "half", dtype="bfloat16")[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: .* needs orig"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial": 0.5}},
            "rope_parameters.partial = 0.5",
        ),
        ("llama", {"attention_bias": True}, "lacks 8 tensors .*: model.layers.0.self_attn.q_proj.bias"),
        ("llama", {"sliding_window": 128}, "the field sliding_window = 128 is not one we honour"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads = 3"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("t5_1_0", {"model_type": "longt5"}, "model_type = 'longt5' is not a family we can load"),
        ("t5_1_0", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj = 'gated-tanh'"),
        ("t5_1_0", {"dense_act_fn": "gelu_new"}, "dense_act_fn = 'gelu_new'"),
        ("t5_1_0", {"d_ff": 25}, r"wi.weight has shape \[24, 16\], and its config.json makes it \[25, 16\]"),
        (
            "t5_1_0",
            {"num_decoder_layers": 4},
            "lacks 13 tensors that its config.json calls for: decoder.block.3",
        ),
        ("t5_1_0", {"num_decoder_layers": 2}, "has 13 tensors with no place in this model: decoder.block.2"),
    ],
)
def test_configs_we_cannot_honour_are_errors_naming_the_field(kind, fields, message, tmp_path):
    theirs, weights, *_ = golden(kind)
    with pytest.raises(UserError, match=message):
        load_huggingface(write(tmp_path / "m", theirs | fields, weights))


@pytest.mark.parametrize(("kind", "name"), [("t5_1_1", "d_kv"), ("llama", "rms_norm_eps")])
def test_a_missing_field_is_an_error_naming_it(kind, name, tmp_path):
    theirs, weights, *_ = golden(kind)
    del theirs[name]
    with pytest.raises(UserError, match=f"lacks the field {name}"):
        load_huggingface(write(tmp_path / "m", theirs, weights))


def test_missing_and_unknown_tensors_are_errors_naming_them(tmp_path):
    theirs, weights, *_ = golden("llama")
    fewer = {name: value for name, value in weights.items() if "layers.1.mlp.up_proj" not in name}
    with pytest.raises(UserError, match=r"lacks 1 tensors .*: model.layers.1.mlp.up_proj.weight"):
        load_huggingface(write(tmp_path / "a", theirs, fewer))
    more = weights | {"model.layers.0.self_attn.q_norm.weight": np.ones(4, np.float32)}
    with pytest.raises(UserError, match=r"no place in this model: model.layers.0.self_attn.q_norm.weight"):
        load_huggingface(write(tmp_path / "b", theirs, more))


def test_copies_of_the_embedding_are_accepted_and_others_are_not(tmp_path):
    theirs, weights, arrays, logits, loss = golden("t5_1_0")
    table = weights["shared.weight"]
    copies = {
        "encoder.embed_tokens.weight": table,
        "decoder.embed_tokens.weight": table,
        "lm_head.weight": table,
    }
    config, params = load_huggingface(write(tmp_path / "a", theirs, weights | copies))
    assert config.tie_embeddings
    check(config, params, arrays, logits, loss)
    copies["encoder.embed_tokens.weight"] = table + 1
    with pytest.raises(UserError, match=r"encoder.embed_tokens.weight differs from shared.weight"):
        load_huggingface(write(tmp_path / "b", theirs, weights | copies))


def test_damaged_and_missing_files_are_errors_naming_them(tmp_path):
    theirs, weights, *_ = golden("llama_tied")
    folder = write(tmp_path / "m", theirs, weights)
    whole = (folder / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model.safetensors is damaged or not a safetensors file"):
            load_huggingface(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"neither model.safetensors nor .* pytorch_model.bin can be converted"
    ):
        load_huggingface(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        load_huggingface(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"config.json is missing"):
        load_huggingface(folder)
    with pytest.raises(UserError, match="dtype = 'int8'"):
        load_huggingface(folder, dtype="int8")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5.replace(scale_attention=True), "cannot have scale_attention = True"),
        (T5.replace(activations=("gelu_exact", "linear")), "cannot have activations"),
        (T5.replace(scale_logits=True), "T5 with an untied head cannot have scale_logits = True"),
        (T5.replace(num_kv_heads=1), "cannot have kv_heads = 1"),
        (T5.replace(positions="rope"), "cannot have positions = 'rope'"),
        (LLAMA.replace(activations=("relu",)), "cannot have activations"),
        (LLAMA.replace(positions="relative_bias"), "cannot have positions = 'relative_bias'"),
    ],
)
def test_models_that_huggingface_has_no_class_for_are_not_saved(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        save_huggingface(tmp_path / "m", config, params_of(T5 if config.encoder_layers else LLAMA))
    assert not (tmp_path / "m").exists()


def test_the_family_to_save_as_can_be_named(tmp_path):
    save_huggingface(tmp_path / "m", LLAMA, params_of(LLAMA), family="llama")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(UserError, match=r"family = 'lama' is not one of t5, .*llama"):
        save_huggingface(tmp_path / "n", LLAMA, params_of(LLAMA), family="lama")
    with pytest.raises(UserError, match="T5ForConditionalGeneration is encoder_decoder, not decoder_only"):
        save_huggingface(tmp_path / "n", LLAMA, params_of(LLAMA), family="t5")
    other = LLAMA.replace(layer_pattern=("full_nope", "full"))
    with pytest.raises(UserError, match="LlamaForCausalLM cannot have layer 0 of the decoder = 'full_nope'"):
        save_huggingface(tmp_path / "n", other, params_of(other), family="llama")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_parameters_of_another_config_are_not_saved(tmp_path):
    params = params_of(LLAMA)
    with pytest.raises(UserError, match="embedding has shape \\[61, 16\\]; the config makes it \\[64, 16\\]"):
        save_huggingface(tmp_path / "m", LLAMA.replace(vocab_size=64), params)
    with pytest.raises(UserError, match="the parameter adapter has no place"):
        save_huggingface(tmp_path / "m", LLAMA, params | {"adapter": params["embedding"]})
    with pytest.raises(UserError, match="extra names vocab_size"):
        save_huggingface(tmp_path / "m", LLAMA, params, extra={"vocab_size": 3})
    assert not (tmp_path / "m").exists()
