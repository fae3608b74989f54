import jax
import pytest

from t5style import run_dir
from t5style.parallel.mesh import AXES, MeshConfig, describe


def test_all_axes_are_always_there_in_order():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    assert mesh.axis_names == AXES == ("data", "stage", "fsdp", "expert", "sequence", "tensor")
    assert dict(mesh.shape) == {"data": 2, "stage": 1, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 2}
    # Neighbours differ in the last axis: tensor parallelism stays on the shortest links.
    assert [device.id for device in mesh.devices[0, 0, 0, 0, 0]] == [0, 1]
    assert describe(mesh) == "8 devices (cpu): data 2 × fsdp 2 × tensor 2"


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), {"data": 8}),
        (MeshConfig(tensor=4), {"data": 2, "tensor": 4}),
        (MeshConfig(data=2, fsdp=-1), {"data": 2, "fsdp": 4}),
        (MeshConfig(data=1, fsdp=8), {"fsdp": 8}),
        (MeshConfig(devices=1), {}),
        (MeshConfig(fsdp=2, devices=4), {"data": 2, "fsdp": 2}),
    ],
)
def test_rest_of_the_devices(config, sizes):
    mesh = config.build()
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == sizes


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data": 3}, "data 3 needs 3 devices but there are 8.*MeshConfig.devices=3"),
        ({"data": 4, "tensor": 4}, "data 4 × tensor 4 needs 16 devices but there are 8: choose"),
        ({"tensor": 3}, "tensor 3 does not divide the 8 devices, so nothing is left for data=-1"),
        ({"fsdp": -1}, "data and fsdp are -1, but only one axis can take the rest"),
        ({"data": 0}, "data=0 must be a whole number from 1"),
        ({"tensor": 2.0}, "tensor=2.0 must be a whole number"),
        ({"devices": 9}, "devices=9 but there are only 8 devices"),
        ({"devices": 0}, "devices=0 must be a whole number from 1"),
        ({"compiler_options": "xla_a"}, "compiler_options='xla_a' must be a dictionary"),
        (
            {"compiler_options": {"--xla_a": 1}},
            "names '--xla_a', but XLA options start with 'xla_': write 'xla_a'",
        ),
        ({"compiler_options": {1: 1}}, "names 1, but XLA options start with 'xla_'.$"),
        ({"compiler_options": {"xla_a": None}}, r"compiler_options\['xla_a'\]=None must be a string, number"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_clear_sentence(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        MeshConfig(**fields).build()
    assert "\n" not in str(error.value)


class _Chip:
    """What the layout reads of a TPU device, for a slice of 2 × 4 chips."""

    platform, device_kind = "tpu", "TPU v5 lite"

    def __init__(self, number: int) -> None:
        self.id, self.slice_index, in_slice = number, number // 8, number % 8
        self.process_index = number // 4
        self.coords, self.core_on_chip = (in_slice % 2, in_slice // 2, 0), 0


def test_data_alone_spans_slices():
    chips = [_Chip(number) for number in range(16)]
    # [data, stage, fsdp, expert, sequence, tensor] -> [data, fsdp, tensor]
    devices = MeshConfig(data=4, fsdp=2, tensor=2).build(chips).devices.squeeze(axis=(1, 3, 4))
    for index in range(4):
        assert {chip.slice_index for chip in devices[index].flat} == {index // 2}
    with pytest.raises(ValueError, match=r"2 TPU slices.*only the data axis may span slices, but data=1"):
        MeshConfig(data=1, fsdp=16).build(chips)


def test_devices_may_be_given():
    mesh = MeshConfig().build(jax.devices()[2:4])
    assert [device.id for device in mesh.devices.flat] == [2, 3]


def test_compiler_options_reach_the_compiler_and_are_no_part_of_the_fingerprint():
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    known = MeshConfig(compiler_options={"xla_gpu_enable_latency_hiding_scheduler": True})
    assert known.compile(lowered)(1.0) == 2.0
    assert MeshConfig().compile(lowered)(1.0) == 2.0
    assert known != MeshConfig()
    assert isinstance(hash(known), int)
    assert run_dir.fingerprint(known) == run_dir.fingerprint(MeshConfig())
    with pytest.raises(ValueError, match=r"no option 'xla_tpu_nothing'.*gin/mesh/"):
        MeshConfig(compiler_options={"xla_tpu_nothing": 1}).compile(lowered)
    with pytest.raises(ValueError, match=r"compiler_options: while setting option .* not a valid bool"):
        MeshConfig(compiler_options={"xla_gpu_enable_latency_hiding_scheduler": "often"}).compile(lowered)
