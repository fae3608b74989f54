"""The device mesh: six named axes, always present, most of them usually of size 1.

A mesh is a grid of devices. Which tensor dimension is split over which axis is decided in `rules`; this file
only lays the devices out. All six axes exist in every mesh, so that nothing downstream asks whether an axis
is there.

Order, slowest to fastest varying: data, stage, fsdp, expert, sequence, tensor. Neighbouring devices (same
host, same ring) differ in the last axes, so the axes that communicate most per step come last: tensor
parallelism exchanges activations in every layer, pipeline stages only pass their boundary on, and data
parallelism sums gradients once. The same order is what lets `data` alone span slices that are joined by the
slower data-centre network.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES: tuple[str, ...] = ("data", "stage", "fsdp", "expert", "sequence", "tensor")
# The axes over which a batch is divided: each of their positions works on rows of its own.
BATCH_AXES: tuple[str, ...] = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 (at most once) takes the devices that the other axes leave.

    Attributes:
      data: copies of the model, each on rows of its own; gradients are summed. Also spans slices.
      fsdp: rows of its own too, and parameters, gradients and optimiser state are divided (ZeRO-3).
      sequence: positions within a sequence are divided.
      tensor: heads, hidden units and vocabulary are divided (Megatron-style).
      expert: rows of its own too, and experts of a mixture are divided, to which tokens are sent
        (nn/moe_dispatch.py); the other parameters as over fsdp.
      stage: layers are divided into pipeline stages.
      devices: use only the first so many devices of a single process; None uses all. A mesh that leaves
        devices idle has to say so here.
      compiler_options: XLA options with which the training step is compiled for these devices, by name
        without dashes: `{'xla_tpu_scoped_vmem_limit_kib': 65536}`. gin/mesh/xla_*.gin have sets of them for
        each generation. They change how fast a step is and not what it computes, so a run may go on with
        others.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1
    stage: int = 1
    devices: int | None = None
    compiler_options: Mapping[str, str | bool | int | float] = dataclasses.field(
        default_factory=dict, hash=False, metadata={"affects_result": False}
    )

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
                raise ValueError(
                    f"Mesh axis {axis}={size!r} must be a whole number from 1, or -1 for the rest."
                )
        rest = [axis for axis, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise ValueError(
                f"Mesh axes {' and '.join(rest)} are -1, but only one axis can take the rest: give the "
                "others a size (data is -1 unless you set it)."
            )
        if self.devices is not None and (not isinstance(self.devices, int) or self.devices < 1):
            raise ValueError(
                f"MeshConfig.devices={self.devices!r} must be a whole number from 1, or None for all."
            )
        _check_options(self.compiler_options)

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Sizes by axis, in mesh order, for this many devices.

        Raises:
          ValueError: the sizes do not multiply to `num_devices`.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        said = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1)) or "data 1"
        fixed = math.prod(size for size in sizes.values() if size != -1)
        rest = [axis for axis, size in sizes.items() if size == -1]
        if rest and num_devices % fixed == 0:
            return {**sizes, rest[0]: num_devices // fixed}
        if rest:
            raise ValueError(
                f"The mesh {said} does not divide the {num_devices} devices, so nothing is left for "
                f"{rest[0]}=-1: choose sizes whose product divides {num_devices}."
            )
        if fixed != num_devices:
            idle = f", or leave devices idle with MeshConfig.devices={fixed}" if fixed < num_devices else ""
            raise ValueError(
                f"The mesh {said} needs {fixed} devices but there are {num_devices}: choose sizes that "
                f"multiply to {num_devices}, or set one axis to -1{idle}."
            )
        return sizes

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """Mesh over `devices` (default: all of every process), laid out for the hardware's topology.

        `devices` may be the described devices of `jax.experimental.topologies`, for compiling ahead of time.

        Raises:
          ValueError: the sizes do not fit the number of devices, or `data` cannot span the slices.
        """
        devices = list(jax.devices() if devices is None else devices)
        if self.devices is not None:
            shared = any(device.process_index != jax.process_index() for device in devices)
            if jax.process_count() > 1 and shared and self.devices != len(devices):
                raise ValueError(
                    f"MeshConfig.devices={self.devices} of {len(devices)} works in a single process only: "
                    f"with {jax.process_count()} processes every device must be in the mesh."
                )
            if self.devices > len(devices):
                raise ValueError(
                    f"MeshConfig.devices={self.devices} but there are only {len(devices)} devices: lower it, "
                    "or set it to None to use them all."
                )
            devices = devices[: self.devices]
        sizes = self.sizes(len(devices))
        return Mesh(_layout(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """The lowered program, compiled with `compiler_options`.

        Raises:
          ValueError: the compiler of these devices knows no such option, or takes no such value for it.
        """
        options = {
            name: value if isinstance(value, str | bool) else str(value)
            for name, value in self.compiler_options.items()
        }
        try:
            return lowered.compile(compiler_options=options or None)
        except jax.errors.JaxRuntimeError as error:
            if unknown := re.search(r"No such compile option: '(\w+)'", str(error)):
                raise ValueError(
                    f"The compiler knows no option {unknown[1]!r}, which MeshConfig.compiler_options sets: "
                    "leave it out, and take the set in gin/mesh/ that is for these devices (options named "
                    "xla_tpu_* exist for TPUs only)."
                ) from error
            if wrong := re.search(r"While setting option \w+, .*", str(error)):
                raise ValueError(
                    f"The compiler refuses MeshConfig.compiler_options: {wrong[0].lower()}"
                ) from error
            raise


def _check_options(options: Any) -> None:
    """Raises ValueError for what cannot be XLA options; whether they exist only the compiler knows."""
    if not isinstance(options, Mapping):
        raise ValueError(f"MeshConfig.compiler_options={options!r} must be a dictionary of XLA options.")
    for name, value in options.items():
        if not isinstance(name, str) or not name.startswith("xla_"):
            hint = (
                f": write {name.lstrip('-')!r}" if isinstance(name, str) and name.startswith("--xla_") else ""
            )
            raise ValueError(
                f"MeshConfig.compiler_options names {name!r}, but XLA options start with 'xla_'{hint}."
            )
        if not isinstance(value, str | bool | int | float):
            raise ValueError(
                f"MeshConfig.compiler_options[{name!r}]={value!r} must be a string, number or bool."
            )


def _layout(sizes: dict[str, int], devices: list[Any]) -> np.ndarray:
    """Devices as an array of shape `[data, stage, fsdp, expert, sequence, tensor]`."""
    shape = tuple(sizes.values())
    if devices[0].platform != "tpu":
        # CPUs and GPUs number their devices host by host already, which is the order wanted here.
        return np.asarray(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1:
        if sizes["data"] % slices:
            raise ValueError(
                f"There are {slices} TPU slices, and only the data axis may span slices, but "
                f"data={sizes['data']} is not a multiple of {slices}: set data to a multiple of {slices}."
            )
        inner = (sizes["data"] // slices, *shape[1:])
        outer = (slices,) + (1,) * (len(shape) - 1)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def describe(mesh: Mesh) -> str:
    """The mesh in words: `8 devices (cpu): data 2 × fsdp 4`."""
    parts = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    device = mesh.devices.flat[0]
    return f"{mesh.size} device{'s' if mesh.size > 1 else ''} ({device.device_kind}): {parts}"


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
