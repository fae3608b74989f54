"""T5's relatives, GPT-2, GPT-NeoX and BERT: the same as transformers', both ways."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from t5style.models.cache import init_cache
from t5style.models.convert import load_huggingface, save_huggingface
from t5style.run_dir import UserError
from tests.models.classic_models import (
    MODELS,
    golden,
    inputs,
    make_model,
    run_model,
    unscaled,
)
from tests.models.test_convert import loss_of, write
from tests.models.tiny import runner

KINDS = list(MODELS)
BERT = [kind for kind in KINDS if kind.startswith("bert")]
OTHERS = [kind for kind in KINDS if kind not in BERT]
# With a cache, those that compute as T5 and GPT-2 do need no compilation of their own.
CACHED = [kind for kind in OTHERS if kind not in ("mt5", "byt5", "ul2", "gpt2_untied")]


def load(folder):
    """Layers scanned, which compiles faster."""
    config, params = load_huggingface(folder)
    return config.replace(scan_layers=True), params


def positions_of(mask):
    return np.maximum(mask.cumsum(1) - 1, 0).astype(np.int32)


def ours(config, params, arrays):
    """What our model gives, under transformers' names."""
    mask = arrays["mask"].astype(np.int32)
    tokens = arrays["tokens"].astype(np.int32)
    if not config.decoder_layers:
        out = runner(config, "encoder_outputs")(
            params,
            tokens,
            segment_ids=mask,
            positions=positions_of(mask),
            token_types=arrays["types"].astype(np.int32),
        )
        return {name: np.asarray(value) for name, value in out.items()}
    given = {
        "decoder_input_tokens": tokens,
        "decoder_segment_ids": mask,
        "decoder_positions": positions_of(mask),
    }
    if "encoder_tokens" in arrays:
        given["encoder_input_tokens"] = arrays["encoder_tokens"].astype(np.int32)
        given["encoder_segment_ids"] = arrays["encoder_mask"].astype(np.int32)
    return {"logits": np.asarray(runner(config)(params, **given))}


def close(got, want, where=None):
    """Within 1e-4 of the scale of what is wanted; where: which are real."""
    off = np.abs(got - want)
    assert (off if where is None else off[where]).max() <= 1e-4 * max(1.0, np.abs(want).max())


def check(kind, config, params, arrays, outputs):
    """Everything that transformers gave."""
    got = ours(config, params, arrays)
    real = arrays["mask"] > 0
    for name, want in outputs.items():
        if name == "loss":
            logits = got.get("logits", got.get("classes"))
            decoder_only = bool(config.decoder_layers and not config.encoder_layers)
            assert abs(loss_of(logits, arrays["labels"], decoder_only) - want) <= 1e-4
        elif name == "pooled":  # of the row's first token, so of rows that begin with a real one
            close(got[name], want, real[:, 0])
        else:
            close(got[name], want, real if want.ndim == 3 else None)


@pytest.fixture(params=KINDS)
def stored(request, tmp_path):
    """(kind, folder, inputs, outputs) of a golden model."""
    fields, weights, arrays, outputs = golden(request.param)
    return request.param, write(tmp_path / "theirs", fields, weights), arrays, outputs


def test_outputs_and_loss_equal_the_stored_ones_of_transformers(stored):
    kind, folder, arrays, outputs = stored
    check(kind, *load(folder), arrays, outputs)


def test_what_we_save_is_what_we_loaded(stored, tmp_path):
    kind, folder, *_ = stored
    config, params = load_huggingface(folder)
    save_huggingface(tmp_path / "ours", config, params, family=MODELS[kind]["model_type"])
    again = load_huggingface(tmp_path / "ours")[0]
    # A config.json may leave these out; we write them.
    for name in ("num_kv_heads", "head_dim"):
        again = again.replace(**{name: getattr(config, name)})
    assert again == config
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    names = {name if name in after else f"bert.{name}": name for name in before}
    assert set(names) == set(after)
    for name, old in names.items():
        np.testing.assert_array_equal(after[name], before[old])


def test_bert_as_google_published_it(tmp_path):
    """A norm's parameters under TensorFlow's names, copies, and heads beyond the named class's."""
    fields, weights, arrays, outputs = golden("bert_words")
    weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in weights.items()
    }
    _, others, *_ = golden("bert")
    weights |= {f"bert.{name}": value for name, value in others.items() if name.startswith("pooler.")}
    weights["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    weights["cls.seq_relationship.weight"] = np.ones((2, 16), np.float32)
    weights["bert.embeddings.position_ids"] = np.arange(24)[None]
    config, params = load(write(tmp_path / "m", fields | {"architectures": ["BertForMaskedLM"]}, weights))
    assert (config.pooler, config.masked_head, config.classes) == (True, True, 0)
    check("bert_words", config, params, arrays, outputs)
    save_huggingface(tmp_path / "ours", config, params)
    assert load(tmp_path / "ours")[0] == config
    weights["cls.predictions.decoder.weight"] = weights["cls.predictions.decoder.weight"] + 1
    with pytest.raises(UserError, match=r"cls.predictions.decoder.weight differs from bert.embeddings.word"):
        load(write(tmp_path / "m", fields, weights))


def test_gpt2_as_openai_published_it(tmp_path):
    """Without the prefix, and with the causal mask."""
    fields, weights, arrays, outputs = golden("gpt2")
    weights = {name.removeprefix("transformer."): value for name, value in weights.items()}
    weights["h.0.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.float32))
    config, params = load(write(tmp_path / "m", fields, weights))
    check("gpt2", config, params, arrays, outputs)
    both = weights | {"transformer.wte.weight": weights["wte.weight"]}
    with pytest.raises(UserError, match=r"transformer.wte.weight under two names"):
        load(write(tmp_path / "m", fields, both))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_we_agree_on_what_either_saved(kind, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model, arrays = make_model(kind, seed=1), inputs(kind)
    outputs = run_model(model, arrays)
    model.save_pretrained(tmp_path / "theirs")
    config, params = load(tmp_path / "theirs")
    check(kind, config, params, arrays, outputs)
    save_huggingface(tmp_path / "ours", config, params, family=MODELS[kind]["model_type"])
    again, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    again_outputs = run_model(unscaled(again).eval(), arrays)
    for name, want in outputs.items():
        np.testing.assert_allclose(again_outputs[name], want, atol=1e-5)
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [
        type(model).__name__
    ]


def test_tokens_that_find_their_expert_full_pass_it_by(tmp_path):
    """An expert takes the first tokens of a row, as many as its capacity; padding is on the right."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model, arrays = make_model("switch", seed=2), inputs("switch")
    arrays["mask"][1] = arrays["mask"][1][::-1]
    roomy = run_model(model, arrays)["logits"]
    for module in [model.config, *model.modules()]:
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 3
    outputs = run_model(model, arrays)
    model.save_pretrained(tmp_path / "m")
    config, params = load(tmp_path / "m")
    assert config.moe.capacity == 3
    assert np.abs(outputs["logits"] - roomy).max() > 0.1
    close(ours(config, params, arrays)["logits"], outputs["logits"], arrays["mask"] > 0)


@pytest.mark.parametrize("kind", OTHERS)
def test_packed_rows_are_those_apart(kind, tmp_path):
    """Rows of 5 and 4 tokens apart, and one row that holds both."""
    fields, weights, arrays, _ = golden(kind)
    config, params = load(write(tmp_path / "m", fields, weights))

    def batch(whole, split):
        """Two rows padded on the right, and them packed; segments and positions."""
        first, second = whole[:split], whole[split:]
        rows = [np.r_[part, np.zeros(len(whole) - len(part), int)] for part in (first, second)]
        segments = [np.arange(len(whole)) < len(part) for part in (first, second)]
        places = np.r_[np.arange(split), np.arange(len(whole) - split)]
        counted = np.arange(len(whole))
        return [
            np.stack(parts).astype(np.int32)
            for parts in (
                [*rows, whole],
                [*segments, np.r_[np.full(split, 1), np.full(len(whole) - split, 2)]],
                [counted, counted, places],
            )
        ]

    given = dict(
        zip(
            ("decoder_input_tokens", "decoder_segment_ids", "decoder_positions"),
            batch(arrays["tokens"][0], 5),
            strict=True,
        )
    )
    if "encoder_tokens" in arrays:
        tokens, segments, _ = batch(arrays["encoder_tokens"][1], 14)
        given |= {"encoder_input_tokens": tokens, "encoder_segment_ids": segments}
    one, two, packed = np.asarray(runner(config)(params, **given))
    close(packed, np.concatenate([one[:5], two[:4]]))


def test_packed_rows_of_an_encoder_are_those_apart(tmp_path):
    fields, weights, arrays, _ = golden("bert")
    config, params = load(write(tmp_path / "m", fields, weights))
    whole, types = arrays["tokens"][0], arrays["types"][0]
    run = runner(config, "encoder_outputs")
    packed = run(
        params,
        np.stack([whole] * 3),
        segment_ids=np.int32([[1] * 5 + [2] * 4, [1] * 5 + [0] * 4, [0] * 5 + [1] * 4]),
        positions=np.int32([[0, 1, 2, 3, 4, 0, 1, 2, 3]] * 3),
        token_types=np.stack([types] * 3),
    )["encoded"]
    close(np.asarray(packed[0]), np.concatenate([packed[1, :5], packed[2, 5:]]))
    assert np.abs(packed[1, 5:] - packed[0, 5:]).max() > 0.1  # padding is no token


@pytest.mark.parametrize("kind", CACHED)
def test_decoding_in_pieces_is_the_whole(kind, tmp_path):
    """Three pieces of three tokens, with padding on either side."""
    fields, weights, arrays, outputs = golden(kind)
    config, params = load(write(tmp_path / "m", fields, weights))
    mask = arrays["mask"].astype(np.int32)
    more = {}
    if "encoder_tokens" in arrays:
        real = arrays["encoder_mask"].astype(np.int32)
        encoded = runner(config, "encode")(params, arrays["encoder_tokens"], segment_ids=real)
        more = {"params": params, "encoded": encoded, "encoder_segment_ids": real}
    cache = init_cache(config, len(mask), mask.shape[1], **more)
    pieces = []
    for start in range(0, 9, 3):
        part = slice(start, start + 3)
        logits, cache = runner(config, "decode")(
            params, arrays["tokens"][:, part], cache, valid=jnp.asarray(mask[:, part])
        )
        pieces.append(logits)
    close(np.concatenate(pieces, 1), outputs["logits"], mask > 0)


# --- bad input ---


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_unknown_tensors_are_errors_naming_them(kind, tmp_path):
    fields, weights, *_ = golden(kind)
    missing = sorted(name for name in weights if ".1." in name or ".0." in name)[-1]
    fewer = {name: value for name, value in weights.items() if name != missing}
    with pytest.raises(UserError, match=rf"lacks 1 tensors .*{missing}"):
        load_huggingface(write(tmp_path / "a", fields, fewer))
    unknown = missing.replace("weight", "lora_A.weight").replace("bias", "lora_A.weight")
    with pytest.raises(UserError, match=f"1 tensors with no place in this model: .*{unknown}"):
        load_huggingface(write(tmp_path / "b", fields, weights | {unknown: np.ones(2, np.float32)}))


@pytest.mark.parametrize("kind", KINDS)
def test_fields_nobody_honours_are_errors_naming_them(kind, tmp_path):
    fields, weights, *_ = golden(kind)
    with pytest.raises(UserError, match="the field flux_capacity = 3 is not one we honour"):
        load_huggingface(write(tmp_path / "m", fields | {"flux_capacity": 3}, weights))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function = 'tanh'"),
        ("gpt2", {"attn_pdrop": 0.5}, "embd_pdrop = 0.1; attn_pdrop = 0.5: we have one rate"),
        ("gpt2", {"n_positions": 20}, r"wpe.weight has shape \[24, 16\].* makes it \[20, 16\]"),
        ("gpt_neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters.factor"),
        ("gpt_neox", {"rotary_pct": 0.4}, "rope_fraction leaves 3.* must be even"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder = True is not supported"),
        ("mt5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj = 'gated-tanh'"),
        ("switch", {"router_bias": True}, "router_bias = True is not supported"),
        ("switch", {"num_experts": 4}, r"classifier.weight has shape \[3, 12\].* \[4, 12\]"),
        ("switch", {"router_dtype": "bfloat16"}, "router_dtype = 'bfloat16' is not supported"),
    ],
)
def test_configs_we_cannot_honour_are_errors_naming_the_field(kind, fields, message, tmp_path):
    theirs, weights, *_ = golden(kind)
    with pytest.raises(UserError, match=message):
        load_huggingface(write(tmp_path / "m", theirs | fields, weights))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"activations": ("silu", "linear")}, "GPT-2 cannot have activations"),
        ("gpt2", {"norm_placement": "both"}, "cannot have norm_placement = 'both'"),
        ("gpt_neox", {"norm_bias": False}, "cannot have norm_bias = False"),
        ("bert", {"final_norm": True}, "encoder/final_norm/bias has no place in a Hugging Face BertModel"),
        ("bert", {"norm": "rms", "norm_bias": False}, "cannot have norm = 'rms'"),
        ("umt5", {"relative_bias_per_layer": False}, "cannot have relative_bias_per_layer = False"),
        ("switch", {"moe_layers": (0,)}, "cannot have layers? .*of the decoder"),
    ],
)
def test_models_of_another_form_are_not_saved_as_these(kind, changes, message, tmp_path):
    fields, weights, *_ = golden(kind)
    config, params = load(write(tmp_path / "m", fields, weights))
    family = MODELS[kind]["model_type"]
    with pytest.raises(UserError, match=message):
        save_huggingface(tmp_path / "x", config.replace(**changes), params, family=family)
    assert not (tmp_path / "x").exists()
