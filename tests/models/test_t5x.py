"""T5X checkpoints, written here in T5X's layout from random models."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from flax import serialization, traverse_util
from safetensors.numpy import load_file

from t5style.models.config import TransformerConfig
from t5style.models.convert import save_huggingface
from t5style.models.t5x import is_t5x, load_t5x
from t5style.run_dir import UserError
from tests.models.tiny import T5, params_of, runner, tokens_of

NAMES = {
    "encoder": {"attention": "attention", "attention_norm": "pre_attention_layer_norm"},
    "decoder": {
        "attention": "self_attention",
        "attention_norm": "pre_self_attention_layer_norm",
        "cross_attention": "encoder_decoder_attention",
        "cross_attention_norm": "pre_cross_attention_layer_norm",
    },
}


def theirs(config: TransformerConfig, scanned: bool = False, heads: bool = False) -> dict[str, np.ndarray]:
    """The parameters of a random model by T5X's names, without `target.`.

    Args:
      config: the model's.
      scanned: one array [first, layers, ...] per kind of parameter.
      heads: kernels of attention keep heads and head_dim apart.
    """
    result: dict[str, np.ndarray] = {}
    for path, leaf in traverse_util.flatten_dict(params_of(config)).items():
        value = np.asarray(leaf)
        if path == ("embedding",):
            result["token_embedder.embedding"] = value
        elif path[0] == "head":
            result["decoder.logits_dense.kernel"] = value
        elif path[1] == "relative_bias":
            result[f"{path[0]}.relpos_bias.rel_embedding"] = value.T
        elif path[1] == "final_norm":
            result[f"{path[0]}.{path[0]}_norm.scale"] = value
        else:
            side, _, module, *rest = path
            name = NAMES[side].get(module, {"mlp_norm": "pre_mlp_layer_norm"}.get(module, module))
            inner = {"inputs_0": "wi_0" if config.gated else "wi", "inputs_1": "wi_1"}
            inner |= {"output": "wo" if module == "mlp" else "out"}
            tail = ".".join(inner.get(part, part) for part in rest)
            if rest[0] == "table":
                name, tail, value = "relpos_bias", "rel_embedding", value.swapaxes(1, 2)
            if "attention" in module and len(rest) == 2 and not heads:
                split = 3 if rest[0] == "output" else 2
                value = value.reshape(len(value), np.prod(value.shape[1:split]), -1)
            if scanned:
                result[f"{side}.{side}.{name}.{tail}"] = value.swapaxes(0, 1)
            else:
                result |= {f"{side}.layers_{i}.{name}.{tail}": one for i, one in enumerate(value)}
    return result


def write(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    dtype: str = "float32",
    leaf: str = "spec",
    index: bool = True,
) -> Path:
    """Writes a checkpoint: zarr arrays of gzip'd chunks, and the msgpack file that names them."""
    tree: dict[tuple[str, ...], Any] = {}
    for name, array in arrays.items():
        if leaf == "inline" and name.endswith("norm.scale"):
            tree[tuple(name.split("."))] = array
            continue
        chunks = [max(1, -(-size // 2)) for size in array.shape]
        metadata = {"shape": list(array.shape), "chunks": chunks, "compressor": {"id": "gzip", "level": 1}}
        spec = {"driver": "zarr", "dtype": dtype, "metadata": metadata}
        spec["kvstore"] = {"driver": "file", "path": f"{folder}/target.{name}"}
        store = tensorstore.open(spec, create=True).result()
        store.write(array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)).result()
        described = spec | {"kvstore": {"driver": "gcs", "bucket": "b", "path": f"models/x/target.{name}/"}}
        tree[tuple(name.split("."))] = described if leaf == "spec" else f"PLACEHOLDER://target.{name}"
    # What the optimiser has is no concern of ours: neither in the file nor beside it.
    (folder / "state.param_states.token_embedder.embedding.v_row").mkdir(parents=True)
    optimizer = {"target": traverse_util.unflatten_dict(tree), "state": {"step": np.int32(7)}}
    if index:
        content = serialization.msgpack_serialize({"version": 3, "optimizer": optimizer})
        (folder / "checkpoint").write_bytes(content)
    return folder


def logits(config: TransformerConfig, params: Any) -> np.ndarray:
    rows = [tokens_of(config, 2, 7, seed) for seed in (0, 1)]
    return np.asarray(runner(config)(params, *rows))


T5_0 = T5.replace(activations=("relu",), tie_embeddings=True, scale_logits=True)
LIKE = {"relative_max_distance": 20}


@pytest.mark.parametrize("leaf", ["spec", "placeholder", "inline", "no index"])
@pytest.mark.parametrize("config", [T5, T5_0], ids=["1.1", "1.0"])
def test_logits_are_equal(config: TransformerConfig, leaf: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint_7", theirs(config), leaf=leaf, index=leaf != "no index")
    loaded, params = load_t5x(folder, **LIKE)
    assert loaded == config
    jax.tree.map(np.testing.assert_array_equal, params, params_of(config))
    np.testing.assert_array_equal(logits(loaded, params), logits(config, params_of(config)))
    assert is_t5x(folder) == (leaf != "no index")
    assert not is_t5x(tmp_path)


# transformers' names in a layer -> T5X's, as its convert_t5x_checkpoint_to_pytorch.py has them.
PYTORCH = {
    "encoder": ("pre_attention_layer_norm", "attention", "pre_mlp_layer_norm", "mlp"),
    "decoder": (
        *("pre_self_attention_layer_norm", "self_attention"),
        *("pre_cross_attention_layer_norm", "encoder_decoder_attention"),
        *("pre_mlp_layer_norm", "mlp"),
    ),
}
ATTENTION = {"q": "query", "k": "key", "v": "value", "o": "out"}


def from_pytorch(name: str) -> str:
    """T5X's name for transformers'."""
    whole = {"shared.weight": "token_embedder.embedding", "lm_head.weight": "decoder.logits_dense.kernel"}
    if name in whole:
        return whole[name]
    side, kind, *rest = name.split(".")
    if kind == "final_layer_norm":
        return f"{side}.{side}_norm.scale"
    layer, _, number, module, *tail = rest  # block.<layer>.layer.<number>.<module>.<tail>
    if "relative_attention_bias" in tail:
        return f"{side}.relpos_bias.rel_embedding"
    if module == "layer_norm":
        return f"{side}.layers_{layer}.{PYTORCH[side][2 * int(number)]}.scale"
    inner = ATTENTION.get(tail[0], tail[0])
    return f"{side}.layers_{layer}.{PYTORCH[side][2 * int(number) + 1]}.{inner}.kernel"


def test_as_the_published_conversion_to_pytorch_has_it(tmp_path: Path) -> None:
    """It transposes every kernel and the tables of relative positions."""
    save_huggingface(tmp_path / "hf", T5, params_of(T5))
    arrays = {
        from_pytorch(name): value for name, value in load_file(tmp_path / "hf/model.safetensors").items()
    }
    arrays = {
        name: value.T if name.endswith(("kernel", "rel_embedding")) else value
        for name, value in arrays.items()
    }
    _, params = load_t5x(write(tmp_path / "checkpoint_7", arrays), **LIKE)
    jax.tree.map(np.testing.assert_array_equal, params, params_of(T5))


@pytest.mark.parametrize("heads", [False, True])
def test_scanned_layers(heads: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint_7", theirs(T5, scanned=True, heads=heads))
    loaded, params = load_t5x(folder, **LIKE)
    assert loaded == T5
    jax.tree.map(np.testing.assert_array_equal, params, params_of(T5))


def test_a_table_of_relative_positions_in_each_layer(tmp_path: Path) -> None:
    config = T5.replace(relative_bias_per_layer=True)
    for scanned in (False, True):
        folder = write(tmp_path / f"checkpoint_{scanned}", theirs(config, scanned))
        loaded, params = load_t5x(folder, **LIKE)
        assert loaded == config
        jax.tree.map(np.testing.assert_array_equal, params, params_of(config))


def test_bfloat16_arrays_and_parameters(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint_7", theirs(T5), dtype="bfloat16")
    for dtype in ("bfloat16", "float32"):
        loaded, params = load_t5x(folder, dtype, **LIKE)
        assert (loaded.dtype, loaded.param_dtype) == (dtype, dtype)
        expected = [leaf.astype("bfloat16").astype(dtype) for leaf in jax.tree.leaves(params_of(T5))]
        params = jax.tree.leaves(params)
        jax.tree.map(np.testing.assert_array_equal, params, expected)


GIN = """
from __gin__ import dynamic_registration
DROPOUT_RATE = 0.25
network.T5Config.dropout_rate = %DROPOUT_RATE
network.T5Config.dtype = 'bfloat16'
network.T5Config.emb_dim = 16
network.T5Config.mlp_activations = \\
    ('silu', 'linear')
"""


def test_gin_file_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint_7", theirs(T5))
    file = tmp_path / "config.gin"
    file.write_text(GIN)
    loaded, _ = load_t5x(folder, **LIKE)
    assert loaded == T5.replace(activations=("silu", "linear"), dropout=0.25)
    assert load_t5x(folder, dropout=0.0, **LIKE)[0].dropout == 0.0
    file.write_text(GIN.replace("emb_dim = 16", "emb_dim = 32"))
    with pytest.raises(UserError, match=r"T5Config\.emb_dim = 32, its tensors 16"):
        load_t5x(folder, **LIKE)
    file.write_text(GIN + "network.T5Config.rotary = True\n")
    with pytest.raises(UserError, match=r"T5Config\.rotary = True is not one we honour"):
        load_t5x(folder, **LIKE)


def test_a_mesh_divides_the_parameters(tmp_path: Path) -> None:
    from t5style.parallel.mesh import MeshConfig

    folder = write(tmp_path / "checkpoint_7", theirs(T5, scanned=True))
    _, params = load_t5x(folder, mesh=MeshConfig(data=1, fsdp=2).build(jax.devices()[:2]), **LIKE)
    jax.tree.map(np.testing.assert_array_equal, params, params_of(T5))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {2}


Change = Callable[[dict[str, np.ndarray]], object]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda a: a.pop("decoder.layers_1.mlp.wo.kernel"),
            r"lacks 1 tensors.*decoder\.layers_1\.mlp\.wo\.kernel",
        ),
        (lambda a: a.pop("token_embedder.embedding"), r"lacks target\.token_embedder\.embedding"),
        (
            lambda a: a.update({"decoder.layers_0.mlp.wo.kernel": np.ones((25, 16), np.float32)}),
            r"decoder\.layers_0\.mlp\.wo\.kernel has shape \[25, 16\].*\[24, 16\]",
        ),
        (
            lambda a: a.update({"encoder.layers_0.adapter.kernel": np.ones((2, 2), np.float32)}),
            r"1 tensors with no place in this model: encoder\.layers_0\.adapter\.kernel",
        ),
        (
            lambda a: a.update({"encoder.relpos_bias.rel_embedding": np.ones((5, 8), np.float32)}),
            "12 numbers cannot be those of 5 heads",
        ),
    ],
)
def test_missing_odd_and_wrong_tensors_are_named(change: Change, match: str, tmp_path: Path) -> None:
    arrays = theirs(T5)
    change(arrays)
    with pytest.raises(UserError, match=match):
        load_t5x(write(tmp_path / "checkpoint_7", arrays), **LIKE)


def test_damaged_directories(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no T5X checkpoint"):
        load_t5x(tmp_path)
    folder = write(tmp_path / "checkpoint_7", theirs(T5))
    array = folder / "target.encoder.layers_0.mlp.wo.kernel"
    chunk, about = array / "0.1", array / ".zarray"
    data, text = chunk.read_bytes(), about.read_text()

    chunk.unlink()
    with pytest.raises(UserError, match=r"mlp\.wo\.kernel has 3 of its 4 chunks"):
        load_t5x(folder, **LIKE)
    for size in (0, 5, len(data) // 2, len(data) - 9):  # the last 8 bytes only repeat what is known
        chunk.write_bytes(data[:size])
        with pytest.raises(UserError, match=r"encoder\.layers_0\.mlp\.wo\.kernel cannot be read"):
            load_t5x(folder, **LIKE)
    chunk.write_bytes(data)

    about.write_text(text[:50])
    with pytest.raises(UserError, match=r"mlp\.wo\.kernel is damaged"):
        load_t5x(folder, **LIKE)
    about.write_text(json.dumps(json.loads(text) | {"shape": [2**40, 2**20]}))
    with pytest.raises(UserError, match=re.escape("mlp.wo.kernel has 4 of its")):
        load_t5x(folder, **LIKE)
    about.write_text(json.dumps(json.loads(text) | {"dtype": "<i4"}))
    with pytest.raises(UserError, match="int32, which is no floating point"):
        load_t5x(folder, **LIKE)
    about.unlink()
    with pytest.raises(UserError, match=r"wo\.kernel"):
        load_t5x(folder, **LIKE)
    about.write_text(text)

    index = folder / "checkpoint"
    whole = index.read_bytes()
    for size in (0, 1, 100, len(whole) - 1):
        index.write_bytes(whole[:size])
        with pytest.raises(UserError, match="checkpoint is damaged or not T5X's"):
            load_t5x(folder, **LIKE)
    index.write_bytes(whole)
    load_t5x(folder, **LIKE)
    with pytest.raises(UserError, match="d_model cannot be given"):
        load_t5x(folder, d_model=8)
    with pytest.raises(UserError, match="do not go with its MLP"):
        load_t5x(folder, activations=("relu",), **LIKE)
