import json

import pytest

from t5style.models import presets
from t5style.models.config import LatentAttention, LayerKind, TransformerConfig
from t5style.nn.settings import MoE

SMALL = {"vocab_size": 32, "d_model": 16, "d_ff": 32, "num_heads": 4, "decoder_layers": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads = 4 is not a multiple of num_kv_heads = 3"),
        ({"d_model": 18}, "d_model = 18 is not a multiple of num_heads = 4: set head_dim"),
        ({"encoder_layers": -1}, "encoder_layers = -1 must be a whole number of at least 0"),
        ({"decoder_layers": 0}, "encoder_layers and decoder_layers are both 0"),
        ({"decoder_layers": -1}, "decoder_layers = -1 must be a whole number of at least 0"),
        ({"window": 4}, "window = 4 and layer_pattern = .* contradict"),
        ({"layer_pattern": ("window",)}, "window = None and layer_pattern = .* contradict"),
        ({"layer_pattern": ("half",)}, "layer_pattern = 'half' is not one of full, window, chunk, full_nope"),
        ({"layer_pattern": ()}, "layer_pattern is empty"),
        ({"layer_pattern": "full_nope"}, "positions must be 'rope'"),
        ({"moe_layers": (0,)}, "moe_layers = .0,. needs moe"),
        ({"moe": MoE(4, 2, 8), "moe_layers": (1, 0)}, "moe_layers = .1, 0. must be ascending"),
        ({"norm_bias": True}, "norm_bias = True needs norm = 'layer'"),
        ({"parallel_layers": True, "norm_placement": "both"}, "parallel_layers = True is for"),
        ({"positions": "learned"}, "positions = 'learned' needs context_length"),
        ({"positions": "rope", "rope_fraction": 0.0}, "rope_fraction = 0.0 must be above 0"),
        ({"logits_softcap": 0.0}, "logits_softcap = 0.0 must be positive"),
        ({"latent": LatentAttention(8, 4, 4, 4)}, "positions = 'relative_bias' does not go with latent"),
        ({"vocab_size": 32.5}, "vocab_size = 32.5 must be a whole number"),
        ({"num_heads": True}, "num_heads = True must be a whole number"),
        ({"context_length": 0}, "context_length = 0 must be"),
        ({"activations": ("gelu", "linear", "relu")}, "must name one activation, or two"),
        ({"activations": ("tanh",)}, "activations = 'tanh' is not one of relu"),
        ({"positions": "absolute"}, "positions = 'absolute' is not one of relative_bias, rope"),
        ({"remat": "some"}, "remat = 'some' is not one of full, input_offloaded"),
        ({"dtype": "int8"}, "dtype = 'int8' is not one of"),
        ({"positions": "rope", "head_dim": 3}, "head_dim = 3 must be even"),
        ({"positions": "rope", "rope_theta": 1.0}, "rope_theta = 1.0 must be greater than 1"),
        ({"relative_buckets": 6}, "relative_buckets = 6 must be a multiple of 4"),
        ({"relative_max_distance": 16}, "relative_max_distance = 16 must exceed"),
        ({"dropout": 1.0}, "dropout = 1.0 must be at least 0 and less than 1"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0 must be positive"),
        ({"dropout": 0.1, "attention": "dot_product"}, "cannot drop attention weights"),
    ],
)
def test_inconsistent_fields_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**SMALL | changes)


def test_defaults_and_properties():
    config = TransformerConfig(**SMALL, activations=["silu", "linear"])
    assert (config.architecture, config.kv_heads, config.heads_width, config.gated) == (
        "decoder_only",
        4,
        4,
        True,
    )
    assert config.replace(encoder_layers=1).architecture == "encoder_decoder"
    assert config.replace(num_kv_heads=2, head_dim=8).kv_heads == 2
    assert hash(config) == hash(
        TransformerConfig(**SMALL, activations=("silu", "linear"))
    )  # a list came from gin
    assert TransformerConfig(**SMALL, activations="relu").activations == ("relu",)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_json_round_trip(name):
    config = presets.PRESETS[name]()
    assert TransformerConfig.from_json(config.to_json()) == config
    assert TransformerConfig.from_json(json.loads(config.to_json())) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object is expected, this is list"),
        (json.dumps(SMALL | {"heads": 3}), "does not know: heads"),
        (json.dumps({"vocab_size": 3}), "lacks d_model, d_ff, num_heads"),
        (json.dumps(SMALL | {"d_model": 0}), "d_model = 0"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig.from_json(text)


def test_preset_changes_are_applied_and_checked():
    assert presets.t5_1_1_small(dropout=0.1, vocab_size=100).vocab_size == 100
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        presets.t5_1_1_small(drop_out=0.1)


def test_nested_settings_survive_json():
    moe = SMALL | {"positions": "rope", "moe": MoE(4, 2, 8), "moe_layers": [1]}
    config = TransformerConfig(**moe, latent=LatentAttention(8, 4, 4, 4, query_rank=6))
    again = TransformerConfig.from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.moe.per_token == 2
    with pytest.raises(ValueError, match=r"moe: .*unexpected keyword"):
        TransformerConfig.from_json(json.dumps(SMALL | {"moe": {"expert": 3}}))


def test_layers_say_what_they_are():
    config = TransformerConfig(
        **SMALL | {"decoder_layers": 5},
        layer_pattern=("window", "full"),
        window=3,
        moe=MoE(4, 2, 8),
        moe_layers=(1, 4),
    )
    kinds = config.layers_of("decoder")
    assert [kind.attention for kind in kinds] == ["window", "full", "window", "full", "window"]
    assert [kind.experts for kind in kinds] == [False, True, False, False, True]
    assert config.layers_of("encoder") == ()
    assert TransformerConfig(**SMALL).layers_of("decoder") == (LayerKind("full", False),) * 2
