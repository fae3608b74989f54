"""PEFT's directories: the same logits as PEFT on transformers' models, both ways."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5style.models import peft
from t5style.models.adapters_vectors import BitFit
from t5style.models.adapters_virtual import PrefixTuning, PromptTuning, virtual_ids
from t5style.models.convert import load_huggingface
from t5style.run_dir import UserError
from tests.models.make_golden_peft import ADAPTERS, golden, inputs, make_adapter, make_base, run
from tests.models.test_convert import write
from tests.models.tiny import runner


def stored(name, folder):
    """(config, base's parameters, folder of the adapter, logits) of a golden adapter."""
    config, described, base, weights, logits = golden(name)
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / peft.CONFIG).write_text(json.dumps(described))
    save_file(weights, folder / "adapter" / peft.WEIGHTS)
    return *load_huggingface(write(folder / "base", config, base)), folder / "adapter", logits


def logits_of(config, adapter, base, own, arrays):
    tree = adapter.apply(config, base, own)
    arrays = {name: with_virtual(config, adapter, name, value) for name, value in arrays.items()}
    given = [arrays[name].astype(np.int32) for name in ("tokens", "encoder_tokens") if name in arrays]
    return np.asarray(runner(config.replace(scan_layers=True))(tree, *given))[:, -7:]


def with_virtual(config, adapter, name, tokens):
    """The tokens behind a prompt, which is the encoder's, or a prefix, the decoder's."""
    first = "encoder_tokens" if config.encoder_layers and isinstance(adapter, PromptTuning) else "tokens"
    if name != first or not isinstance(adapter, PromptTuning | PrefixTuning):
        return tokens
    ids = virtual_ids(config, adapter.length)
    return np.concatenate([np.tile(ids, (len(tokens), 1)), tokens], axis=1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_equal_the_stored_ones_of_peft_and_what_we_save_is_what_we_loaded(name, tmp_path):
    config, base, folder, logits = stored(name, tmp_path)
    adapter, own = peft.load(folder, config)
    got = logits_of(config, adapter, base, own, inputs(ADAPTERS[name][0]))
    np.testing.assert_allclose(got, logits, atol=2e-5 * max(1.0, np.abs(logits).max()))
    # Its own parameters are those that training would make, in names and shapes.
    fresh = adapter.init(config, jax.random.key(0), base)
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, own)
    peft.save(tmp_path / "ours", adapter, config, own, base="org/name")
    assert peft.is_adapter(tmp_path / "ours")
    assert peft.base_name(tmp_path / "ours") == "org/name"
    before, after = (load_file(f / peft.WEIGHTS) for f in (folder, tmp_path / "ours"))
    assert before.keys() == after.keys()
    for key, value in before.items() if name != "t5_prefix" else ():  # there PEFT leaves values unused
        # Of a prompt for both sides they use the encoder's half.
        np.testing.assert_array_equal(after[key], value[: len(after[key])])
    assert peft.load(tmp_path / "ours", config)[0] == adapter


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_computes_the_same_with_what_we_save(name, tmp_path):
    pytest.importorskip("torch")
    library = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    fields = ADAPTERS[name][0]
    make_base(fields).save_pretrained(tmp_path / "base")
    model, arrays = make_adapter(name, make_base(fields)), inputs(fields)
    model.save_pretrained(tmp_path / "theirs")
    config, base = load_huggingface(tmp_path / "base")
    adapter, own = peft.load(tmp_path / "theirs", config, fields["model_type"])
    want = run(model, arrays)
    np.testing.assert_allclose(
        logits_of(config, adapter, base, own, arrays), want, atol=2e-5 * max(1.0, np.abs(want).max())
    )
    peft.save(tmp_path / "ours", adapter, config, own, str(tmp_path / "base"))
    again = library.PeftModel.from_pretrained(make_base(fields), tmp_path / "ours").eval()
    np.testing.assert_array_equal(run(again, arrays), want)


def test_what_is_not_honoured_or_damaged_is_named(tmp_path):
    config, _, folder, _ = stored("llama_lora", tmp_path)
    described = json.loads((folder / peft.CONFIG).read_text())
    weights = load_file(folder / peft.WEIGHTS)

    def refused(because, other=config, tensors=None, **fields):
        (folder / peft.CONFIG).write_text(json.dumps(described | fields))
        save_file(weights if tensors is None else tensors, folder / peft.WEIGHTS)
        with pytest.raises(UserError, match=because):
            peft.load(folder, other)

    refused("peft_type = 'VERA'", peft_type="VERA")
    refused("modules_to_save", modules_to_save=["lm_head"])
    refused("rank_pattern", rank_pattern={"q_proj": 4})
    refused("layers_to_transform", layers_to_transform=[0])
    refused("lora_bias", lora_bias=True)
    refused("bias = 'all'", bias="all")
    refused("init_lora_weights = 'pissa'", init_lora_weights="pissa")
    refused("a_field_of_tomorrow", a_field_of_tomorrow=1)
    refused("rank = 'three'", r="three")
    refused("regular expression", target_modules="(")
    refused("lm_head, which is no projection", target_modules=["lm_head"])
    refused("the same module of other layers is", target_modules=r".*0\.self_attn\.q_proj")
    refused("lacks .*k_proj", target_modules=["q_proj", "o_proj", "k_proj", "down_proj"])
    refused("with no place here", target_modules=["q_proj", "o_proj"])
    refused("for another model", config.replace(d_model=24, head_dim=4))
    (folder / peft.CONFIG).write_text(json.dumps(described))
    (folder / peft.WEIGHTS).write_bytes((folder / peft.WEIGHTS).read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged"):
        peft.load(folder, config)
    (folder / peft.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        peft.load(folder, config)
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        peft.load(tmp_path / "base", config)
    with pytest.raises(UserError, match="BitFit is not a kind"):
        peft.save(tmp_path / "x", BitFit(), config, {})
