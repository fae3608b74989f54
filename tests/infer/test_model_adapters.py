"""Adapters of a loaded model: read with their base, switched by request, merged; virtual tokens."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest

import t5style
from t5style.infer import virtual
from t5style.models import peft
from t5style.models.adapters import Lora
from t5style.models.adapters_vectors import Ia3
from t5style.models.adapters_virtual import Counts, PrefixTuning, PromptTuning
from t5style.run_dir import UserError
from t5style.train import likelihood
from tests.infer.conftest import tiny

PROMPTS = ["abc"] * 3
TOKENS = np.random.default_rng(0).integers(3, 260, (2, 9)).astype(np.int32)


def random(config, adapter, base, scale):
    """An adapter's parameters, all random."""
    own = jax.jit(functools.partial(adapter.init, config))(jax.random.key(1), base)
    rng = np.random.default_rng(9)
    return jax.tree.map(lambda x: np.asarray(x + scale * rng.normal(size=x.shape), np.float32), own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face directory, and PEFT directories of two adapters for it."""
    root = tmp_path_factory.mktemp("adapters")
    model = tiny("decoder_only")
    model.save(root / "base")
    base = t5style.load(root / "base")
    for name, adapter in (("lora", Lora(rank=2, dora=True)), ("ia3", Ia3())):
        own = random(base.config, adapter, base.params, 0.3)
        peft.save(root / name, adapter, base.config, own, str(root / "base"))
    return root


def test_adapters_are_switched_by_row_and_merged(folder, tmp_path):
    model = t5style.load(folder / "base", adapter=folder / "lora")
    ia3 = model.add_adapter("ia3", folder / "ia3")
    plain = t5style.load(folder / "base")
    each = {name: m.generate(["abc"], 6) for name, m in (("base", plain), ("default", model), ("ia3", ia3))}
    assert len({tuple(answers) for answers in each.values()}) == 3
    names = ["ia3", "base", "default"]
    assert model.generate(PROMPTS, 6, adapter=names) == [each[name][0] for name in names]
    # The base's layers are in memory once.
    shared = [m.engine.variables["params"]["decoder"]["layers"][0]["mlp"]["output"]["kernel"]
              for m in (model, ia3, model.with_adapter("base"))]  # fmt: skip
    assert shared[0] is shared[1] is shared[2]
    # Merged: the same, without the adapter; it can be saved.
    for m in (model, ia3):
        dense = m.merge()
        np.testing.assert_allclose(dense.logits(TOKENS), m.logits(TOKENS), atol=1e-4)
    dense.save(tmp_path / "dense")
    np.testing.assert_allclose(t5style.load(tmp_path / "dense").logits(TOKENS), ia3.logits(TOKENS), atol=1e-4)
    # A PEFT directory that knows its base; and merged as it is loaded.
    again = t5style.load(folder / "ia3", merge=True)
    np.testing.assert_allclose(again.logits(TOKENS), ia3.logits(TOKENS), atol=1e-4)
    # On rounded weights an adapter works, and cannot be merged.
    rounded = t5style.load(folder / "base", quantize="int8", adapter=folder / "lora")
    assert np.abs(np.asarray(rounded.logits(TOKENS) - model.logits(TOKENS))).mean() < 0.2
    with pytest.raises(UserError, match="is quantised, so an adapter cannot be merged"):
        rounded.merge()


def test_what_is_no_adapter_for_a_model_is_refused(folder, tmp_path):
    model = t5style.load(folder / "base")
    with pytest.raises(ValueError, match="no adapter 'lara', only base, lora: did you mean 'lora'"):
        model.add_adapter("lora", folder / "lora").generate(PROMPTS, 2, adapter="lara")
    with pytest.raises(ValueError, match="2 names for 3 prompts"):
        model.generate(PROMPTS, 2, adapter=["lora", "base"])
    with pytest.raises(ValueError, match="name 'base'"):
        model.add_adapter("base", folder / "lora")
    with pytest.raises(UserError, match="there is no adapter at"):
        model.add_adapter("x", folder / "base")
    described = json.loads((folder / "lora" / peft.CONFIG).read_text())
    (tmp_path / peft.CONFIG).write_text(json.dumps({**described, "base_model_name_or_path": "org/name"}))
    with pytest.raises(UserError, match="'org/name', which is not here"):
        t5style.load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("decoder_only", PrefixTuning(length=3)),
        ("encoder_decoder", PromptTuning(length=3)),
        ("encoder_decoder", PrefixTuning(length=2)),
    ],
)
def test_virtual_tokens_stand_before_prompts(kind, adapter):
    plain = tiny(kind)
    own = random(plain.config, adapter, plain.params, 0.5)
    model = type(plain)(plain.config, adapter.apply(plain.config, plain.params, own), plain.vocabulary)
    encoder = {"encoder_tokens": TOKENS[:, :7]} if model.encoder_decoder else {}
    logits = np.asarray(model.logits(TOKENS, **encoder))
    assert np.abs(logits - plain.logits(TOKENS, **encoder)).max() > 0.1
    # Decoding step by step says what the whole sequence says.
    new = model.generate_tokens(TOKENS[:, :7], max_new_tokens=5, stop_tokens=[])
    start = np.full((2, 1), model.ids.start) if model.encoder_decoder else TOKENS[:, :7]
    whole = np.asarray(model.logits(np.concatenate([start, new], axis=1), **encoder))
    first = start.shape[1] - 1
    np.testing.assert_array_equal(whole[:, first:-1].argmax(axis=-1), new)
    with pytest.raises(UserError, match="cannot be merged"):
        model.merge()
    # Examples in one row are as they are alone.
    if kind == "decoder_only":
        segments, positions = np.array([[1] * 4 + [2] * 5]), np.array([[*range(4), *range(5)]])
        batch = {"decoder_input_tokens": TOKENS[:1], "decoder_target_tokens": TOKENS[1:],
                 "decoder_segment_ids": segments, "decoder_positions": positions}  # fmt: skip
        packed, _ = model.token_scores(batch)
        alone, _ = model.token_scores(
            {name: array[:, 4:] for name, array in (batch | {"decoder_segment_ids": segments - 1}).items()}
        )
        np.testing.assert_allclose(packed[:, 4:], alone, atol=1e-4)
        # And as in training.
        row = {
            **batch,
            "decoder_segment_ids": np.ones((1, 9), np.int32),
            "decoder_positions": np.arange(9)[None],
        }
        row["decoder_loss_weights"] = np.ones((1, 9), np.int32)
        learnt = likelihood.log_likelihoods(model.config, model.params, row)
        np.testing.assert_allclose(learnt, model.token_scores(row)[0], atol=1e-4)


def test_virtual_tokens_are_put_before_every_example_of_a_row():
    config = tiny("decoder_only").config
    batch = {
        "decoder_input_tokens": np.array([[5, 6, 7, 0]]),
        "decoder_segment_ids": np.array([[1, 2, 2, 0]]),
    }
    made, places = virtual.insert(config, batch, Counts(0, 2))
    assert made["decoder_input_tokens"].tolist() == [[264, 265, 5, 264, 265, 6, 7, 0]]
    assert made["decoder_segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2, 2, 0]]
    assert places.tolist() == [[2, 5, 6, 7]]
