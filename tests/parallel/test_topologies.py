import dataclasses
import importlib.util
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5style.parallel import topologies
from t5style.parallel.topologies import CHIPS, parse_slice, slice_names
from t5style.run_dir import UserError


def need_compiler() -> None:
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")


@pytest.mark.parametrize(
    ("name", "layout", "chips", "devices", "hosts"),
    [
        ("v5e-256", "v5e:16x16", 256, 256, 64),
        ("v5e-8", "v5e:2x4", 8, 8, 1),
        ("v5e-1", "v5e:1x1", 1, 1, 1),
        ("v5litepod-16", "v5e:4x4", 16, 16, 4),
        (" V6E-32 ", "v6e:4x8", 32, 32, 8),
        ("v5p-8", "v5p:2x2x1", 4, 4, 1),
        ("v5p-128", "v5p:4x4x4", 64, 64, 16),
        ("v5p-384", "v5p:4x4x12", 192, 192, 48),
        ("v5p-3072", "v5p:8x12x16", 1536, 1536, 384),
        ("v5p-9216", "v5p:12x16x24", 4608, 4608, 1152),
        ("v5p-17920", "v5p:16x20x28", 8960, 8960, 2240),
        ("v4-32", "v4:2x2x4", 16, 16, 4),
        ("v4-4096", "v4:8x16x16", 2048, 2048, 512),
        ("tpu7x-2", "tpu7x:1x1x1", 1, 2, 1),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128, 16),
        ("ironwood-16384", "tpu7x:16x16x32", 8192, 16384, 2048),
        ("2xv5e-256", "v5e:16x16", 512, 512, 128),
        ("v5p:2x4x4", "v5p:2x4x4", 32, 32, 8),
        ("3xv4:2x2x2", "v4:2x2x2", 24, 24, 6),
    ],
)
def test_the_slices_that_cloud_rents(name, layout, chips, devices, hosts):
    found = parse_slice(name)
    assert (found.layout, found.chips, found.num_devices, found.hosts) == (layout, chips, devices, hosts)


@pytest.mark.parametrize("generation", CHIPS)
def test_a_name_says_how_many_chips_or_cores_there_are(generation):
    names = slice_names(generation)
    assert names == sorted(set(names), key=lambda name: int(name.rpartition("-")[2]))
    for name in names:
        found = parse_slice(name)
        assert math.prod(found.topology) * found.chip.counted == int(name.rpartition("-")[2])
        assert found.chips <= found.chip.max_chips
        assert found.name == str(found) == name
        assert dataclasses.replace(found, num_slices=4).name == f"4x{name}"
    assert len(names) == {"v4": 68, "v5e": 8, "v5p": 96, "v6e": 8, "tpu7x": 99}[generation]


@given(
    generation=st.sampled_from(sorted(CHIPS)),
    dimensions=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    slices=st.integers(1, 3),
)
def test_every_layout_is_read_as_it_is_written(generation, dimensions, slices):
    dimensions = tuple(dimensions[: CHIPS[generation].torus_dimensions])
    text = f"{slices}x{generation}:{'x'.join(map(str, dimensions))}"
    found = parse_slice(text)
    assert found.topology == dimensions
    assert found.num_slices == slices
    assert parse_slice(found.name) == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e-255", r"no slice v5e-255; the nearest are v5e-128 and v5e-256\. .* chips: v5e-1, .*v5e-256\."),
        ("v5e-512", r"the nearest is v5e-256"),
        ("v5p-64x", r"not the name of a TPU slice .*: write a generation \(v4, v5e, v5p, v6e, tpu7x\)"),
        (
            "v5p-100",
            r"nearest are v5p-64 and v5p-128\. The number counts TensorCores, two a chip: .*96 in all",
        ),
        ("v5p-9", r"nearest are v5p-8 and v5p-16"),
        ("v5-8", r"no TPU generation 'v5' \(did you mean 'v5p'\?\): v4, v5e"),
        ("a100-8", r"no TPU generation 'a100': v4.* GPUs and CPUs plan .* slice None"),
        ("v5e256", r"not the name of a TPU slice \(did you mean 'v5e-256'\?\)"),
        ("v5litepod16", r"did you mean 'v5e-16'"),
        ("0xv5e-4", r"0 slices: write 1 or more, or leave '0x' out"),
        ("v5e:4x4x4", r"3 dimensions, but v5e chips are joined in 2, as in 'v5e:4x4'"),
        ("v5p:0x4x4", r"at least 1 chip"),
        ("v5p:16x20x32", r"10240 chips, but a v5p pod has 8960"),
        ("", r"not the name"),
    ],
)
def test_a_name_that_is_none_is_one_clear_sentence(name, words):
    with pytest.raises(UserError, match=words) as error:
        parse_slice(name)
    assert "\n" not in str(error.value)


def test_figures_of_chips_agree_with_each_other():
    for chip in CHIPS.values():
        # Multiplications that the matrix units do in a cycle of the clock: a power of two, two FLOPs each.
        power = math.log2(chip.bf16_flops / chip.cores / chip.clock)
        assert abs(power - round(power)) < 0.005, chip.name
        assert chip.int8_flops >= chip.bf16_flops <= chip.fp8_flops
        assert 0.95 < chip.usable_hbm_bytes / chip.hbm_bytes < 1.01
        assert chip.cores % chip.devices == 0
    assert CHIPS["v5p"].ici_bytes_per_second == 6e11  # 1200 GB/s of both directions
    assert CHIPS["v5e"].ici_bytes_per_second == 2e11


def test_which_dimensions_are_rings():
    assert parse_slice("v5e-128").wraps == (False, True)
    assert parse_slice("v6e-256").wraps == (True, True)
    assert parse_slice("v5p-64").wraps == (False, False, False)
    assert parse_slice("v5p-128").wraps == (True, True, True)


def test_a_missing_compiler_is_named_with_what_installs_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "libtpu" else found(n, *a))
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    topologies.devices.cache_clear()
    with pytest.raises(UserError, match=r"v5e-8 needs .* libtpu, .* not installed: pip install 'jax\[tpu\]'"):
        topologies.devices(parse_slice("v5e-8"))


def test_names_are_read_without_jax():
    code = (
        "import sys; from t5style.parallel.topologies import parse_slice; parse_slice('v5p-128'); "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "name", ["v4-8", "v5e-8", "v5e-256", "v5p-128", "v6e-1", "v6e-16", "tpu7x-8", "2xv5e-16", "2xtpu7x-2"]
)
def test_devices_of_a_slice_are_described(name):
    need_compiler()
    found = parse_slice(name)
    before = dict(os.environ)
    devices = topologies.devices(found)
    assert len(devices) == found.num_devices
    assert len({device.process_index for device in devices}) == found.hosts
    slices = [getattr(device, "slice_index", 0) for device in devices]  # one slice alone has no number
    assert set(slices) == set(range(found.num_slices))
    assert len({(n, *device.coords) for n, device in zip(slices, devices, strict=True)}) == found.chips
    assert {device.num_cores for device in devices} == {found.chip.cores // found.chip.devices}
    assert topologies.devices(parse_slice(name)) is devices
    # What libtpu must be told here is not left behind for real TPUs.
    assert os.environ.get("TPU_WORKER_HOSTNAMES") == before.get("TPU_WORKER_HOSTNAMES")


@pytest.mark.tpu_aot
def test_a_layout_that_the_compiler_refuses_is_a_clear_error():
    need_compiler()
    with pytest.raises(UserError, match=r"refuses the slice v5e:3x5 .*not divisible"):
        topologies.devices(parse_slice("v5e:3x5"))
