import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from t5style.models import convert_stream, safetensors_files
from t5style.models.convert import load_huggingface, save_huggingface
from t5style.models.families.registry import FAMILIES
from t5style.models.params import logical_axes
from t5style.models.safetensors_files import Planned, copy, read_folder, read_header, write_file, write_folder
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import param_shardings
from t5style.run_dir import UserError
from tests.models.tiny import LLAMA, params_of

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)


def planned(tensors):
    return [
        Planned(name, value.shape, value.dtype, lambda value=value: value) for name, value in tensors.items()
    ]


def library(path):
    """Names and arrays, as the library of that name reads them."""
    with safetensors.safe_open(str(path), framework="flax") as file:
        return {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


def parts(path):
    """The header as an object, and the bytes after it."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def join(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refusal(path):
    with pytest.raises(UserError) as caught:
        read_header(path)
    text = str(caught.value)
    assert text.startswith(f"{path} is damaged or not a safetensors file (")
    assert "\n" not in text
    return text


# --- writing ---


@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), max_size=5))
@settings(max_examples=40, deadline=None)
def test_what_is_written_the_library_and_we_read(tmp_path_factory, shapes):
    rng = np.random.default_rng(0)
    tensors = {f"t.{i}": rng.normal(size=shape).astype(dtype) for i, (shape, dtype) in enumerate(shapes)}
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    write_file(path, planned(tensors))
    with jax.enable_x64(True):
        found = library(path)
    ours = read_header(path)
    assert set(found) == set(ours) == set(tensors)
    for name, value in tensors.items():
        for read in (found[name], ours[name].read()):
            assert (read.dtype, read.shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(read, value)
        assert ours[name].offset % value.dtype.itemsize == 0
    assert parts(path)[0]["__metadata__"] == {"format": "pt"}


def test_what_the_library_writes_we_read(tmp_path):
    tensors = {name: np.arange(6, dtype=name).reshape(2, 3) for name in ("float32", "float16", "float64")}
    save_file(tensors, tmp_path / "a.safetensors")
    for name, tensor in read_header(tmp_path / "a.safetensors").items():
        np.testing.assert_array_equal(tensor.read(), tensors[name])


def test_tensors_are_made_one_by_one_and_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_CHUNK", 10_000)
    values = {f"t{i}": np.random.default_rng(i).normal(size=(7, 50, 300)).T for i in range(3)}
    path = tmp_path / "a.safetensors"
    sizes = []

    def make(name):
        sizes.append(path.stat().st_size)  # what came before is written, but for the open file's buffer
        return values[name]

    write_file(
        path, [Planned(name, v.shape, v.dtype, lambda name=name: make(name)) for name, v in values.items()]
    )
    each = values["t0"].nbytes
    assert [size // (each - 100_000) for size in sizes] == [0, 1, 2]
    for name, tensor in read_header(path).items():
        np.testing.assert_array_equal(tensor.read(), values[name])


def test_shards_hold_at_most_so_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 100)
    tensors = {f"t{i}": np.full(size, i, np.float32) for i, size in enumerate([10, 20, 5, 60, 1, 1])}
    write_folder(tmp_path, planned(tensors))
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    held = [list(read_header(tmp_path / file)) for file in files]
    assert held == [["t0"], ["t1", "t2"], ["t3"], ["t4", "t5"]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 4 * 97}
    for name, tensor in read_folder(tmp_path).items():
        assert index["weight_map"][name] == tensor.file.name
        np.testing.assert_array_equal(tensor.read(), tensors[name])


@given(
    st.permutations(range(3)),
    st.lists(st.sampled_from([0, 1, 3, 130, 257]), min_size=3, max_size=3),
    st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_a_copy_in_tiles_is_a_copy(order, shape, dtype):
    shape = [min(size, 9) if i == 1 else size for i, size in enumerate(shape)]
    value = (np.arange(np.prod(shape)) % 251).reshape(shape).astype(np.float32).transpose(order)
    made = np.empty(value.shape, dtype)
    copy(made, value if dtype is np.float32 else value.astype(dtype))
    np.testing.assert_array_equal(made, value.astype(dtype))


# --- damage ---


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    write_file(path, planned({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}))
    return path


def test_a_file_that_ends_early_or_late_is_refused_at_every_byte(path):
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        refusal(path)
    path.write_bytes(whole + b"\0")
    assert "its tensors end at byte" in refusal(path)


LIES = {
    "more bytes than the shape": (("a", "shape", [2, 2]), "the tensor a has 24 bytes, its shape .* makes 16"),
    "a wider dtype": (("b", "dtype", "F32"), "the tensor b has 8 bytes, its shape .* makes 16"),
    "an unknown dtype": (("a", "dtype", "F31"), "the dtype of the tensor a, 'F31', is unknown"),
    "a dtype that is a list": (("a", "dtype", ["F32"]), "the dtype of the tensor a"),
    "a negative size": (("a", "shape", [-2, -3]), r"the shape of the tensor a, \[-2, -3\], cannot be"),
    "a size beyond numbers": (("a", "shape", [2**64, 0]), "the shape of the tensor a"),
    "a shape of truths": (("a", "shape", [True, True]), "the shape of the tensor a"),
    "a shape that is a number": (("a", "shape", 6), "the shape of the tensor a"),
    "overlap": (("b", "data_offsets", [16, 24]), "the tensor b begins at byte 16, .* ends at 24"),
    "a gap": (("b", "data_offsets", [25, 33]), "the tensor b begins at byte 25"),
    "beyond the end": (("b", "data_offsets", [2**62, 2**62 + 8]), "the tensor b begins at byte"),
    "offsets backwards": (("b", "data_offsets", [32, 24]), "the data_offsets of the tensor b"),
    "three offsets": (("b", "data_offsets", [24, 32, 40]), "the data_offsets of the tensor b"),
    "negative offsets": (("b", "data_offsets", [-8, 0]), "the data_offsets of the tensor b"),
    "another field": (("b", "stride", 1), "its entry for the tensor b is not one of"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_naming_the_tensor(path, lie):
    (name, field, value), message = LIES[lie]
    header, data = parts(path)
    header[name][field] = value
    path.write_bytes(join(header, data))
    with pytest.raises(UserError, match=message):
        read_header(path)
    refusal(path)


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        ((2**63).to_bytes(8, "little") + b"{}", "its header would have 9223372036854775808 bytes"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "its header would have"),
        (join(b"[]", b""), "not a JSON object"),
        (join(b" {}", b""), "not a JSON object"),
        (join(b"{" * 100_000, b""), "header is not valid"),
        (join(b"[" * 100_000, b""), "header is not valid"),
        (join(b"\xff\xfe", b""), "header is not valid"),
        (join(b'{"a": 1' + b"0" * 5000 + b"}", b""), "header is not valid"),
        (join(b'{"a": null}', b""), "its entry for the tensor a"),
        (
            join(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}', b""),
            "header is not valid: it names 'a' twice",
        ),
        (b"\x80\x04\x95PK", "damaged"),
    ],
)
def test_headers_that_are_none_are_refused(path, whole, message):
    path.write_bytes(whole)
    assert message in refusal(path)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_changed_headers_are_refused_or_mean_what_the_library_takes_them_for(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    write_file(path, planned({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}))
    whole = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, end - 1))
        whole[at] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'0123456789[]{},:" F')))
    path.write_bytes(whole)
    try:
        ours = read_header(path)
    except UserError:
        return
    with safetensors.safe_open(str(path), framework="numpy") as file:
        theirs = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
            name: (tuple(one.get_shape()), one.get_dtype()) for name, one in theirs.items()
        }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m | {"a": "../model.safetensors"},
            r"names '../model.safetensors', which is not a file of",
        ),
        (lambda m: m | {"a": "/etc/passwd"}, "names '/etc/passwd', which is not a file of this directory"),
        (lambda m: m | {"a": "x\\..\\y"}, "which is not a file of this directory"),
        (lambda m: m | {"a": ".."}, "names '..', which is not a file of this directory"),
        (lambda m: m | {"a": ""}, "names '', which is not a file of this directory"),
        (lambda m: m | {"a": 7}, "names '7'|7 is missing"),
        (lambda m: m | {"a": "other.safetensors"}, "other.safetensors is missing"),
        (lambda m: m | {"c": m["a"]}, "disagree about c"),
        (lambda m: {"b": m["b"]} | {"a": m["b"]}, "disagree about a"),
        (lambda m: list(m), "has no weight_map"),
        (lambda m: None, "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 10)
    write_folder(tmp_path, planned({"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": change(index["weight_map"])})
    )
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "SHARD_BYTES", 10)
    write_folder(tmp_path, planned({"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}))
    one, two = sorted(tmp_path.glob("*.safetensors"))
    two.write_bytes(one.read_bytes())
    with pytest.raises(UserError, match=f"both {one.name} and {two.name} hold the tensor a"):
        read_folder(tmp_path)


def test_an_index_that_says_a_thing_twice_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
    )
    with pytest.raises(UserError, match=r"is not JSON \(it names 'a' twice"):
        read_folder(tmp_path)


# --- of models ---


def test_the_host_holds_a_layer_and_not_the_model(tmp_path):
    config = LLAMA.replace(d_model=128, d_ff=1024, decoder_layers=16, vocab_size=64)
    params = params_of(config)
    mesh = MeshConfig(data=1, fsdp=4, tensor=2).build(jax.local_devices())
    shardings = param_shardings(logical_axes(config), params, mesh)
    placed = convert_stream.place(config, FAMILIES["llama"].rows(config), "LLaMA")
    layer = 128 * 1024 * 4

    def peak(call):
        call()  # compiles, and Python's memory for that is not the question
        tracemalloc.start()
        result = call()
        held = tracemalloc.get_traced_memory()[1]  # NumPy's arrays among it; mapped files and jax's are not
        tracemalloc.stop()
        assert held < 3 * layer, f"{held} bytes, a layer has {layer}"
        return result

    write_folder(tmp_path, convert_stream.plan(placed, params))
    before = (tmp_path / "model.safetensors").read_bytes()
    tensors = read_folder(tmp_path)
    divided = peak(
        lambda: convert_stream.load(placed, lambda name: tensors[name].read(), "float32", shardings)
    )
    jax.tree.map(np.testing.assert_array_equal, divided, params)
    peak(lambda: write_folder(tmp_path, convert_stream.plan(placed, divided)))
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("dtype", "which"),
    [
        ("F8_E4M3", "model.layers.1.mlp.up_proj.weight"),
        ("I8", "model.layers.0.self_attn.q_proj.weight"),
        ("F8_E5M2", "model.embed_tokens.weight"),
    ],
)
def test_quantised_weights_are_refused_by_name(tmp_path, dtype, which):
    save_huggingface(tmp_path / "m", LLAMA, params_of(LLAMA))
    file = tmp_path / "m" / "model.safetensors"
    header, data = parts(file)
    entries = {n: e for n, e in header.items() if n != "__metadata__"}
    changed, end = {}, 0
    kept = b""
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        part = data[first:last]
        if name == which:
            part, entry = part[: len(part) // 4], entry | {"dtype": dtype}
        kept += part
        changed[name] = entry | {"data_offsets": [end, end + len(part)]}
        end += len(part)
    file.write_bytes(join(changed, kept))
    with pytest.raises(UserError, match=f"the tensor {which} is of dtype {dtype}"):
        load_huggingface(tmp_path / "m")


def test_a_quantised_checkpoint_is_refused_by_its_config(tmp_path):
    save_huggingface(tmp_path / "m", LLAMA, params_of(LLAMA))
    described = json.loads((tmp_path / "m" / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"quantization_config says that the weights are quantised \(fp8\)"):
        load_huggingface(tmp_path / "m")


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    params = params_of(LLAMA)
    save_huggingface(tmp_path / "m", LLAMA, params)
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}

    def fail(folder):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        save_huggingface(tmp_path / "m", LLAMA, params, also=fail)
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
