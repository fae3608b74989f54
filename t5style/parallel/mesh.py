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
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES: tuple[str, ...] = ("data", "stage", "fsdp", "expert", "sequence", "tensor")
# The axes over which a batch is divided: each of their positions works on rows of its own.
BATCH_AXES: tuple[str, ...] = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; -1 (at most once) takes the devices that the other axes leave.

    Attributes:
      data: copies of the model, each on rows of its own; gradients are summed. Also spans slices.
      fsdp: rows of its own too, and parameters, gradients and optimiser state are divided (ZeRO-3).
      sequence: positions within a sequence are divided.
      tensor: heads, hidden units and vocabulary are divided (Megatron-style).
      expert: experts of a mixture are divided.
      stage: layers are divided into pipeline stages.
      devices: use only the first so many devices of a single process; None uses all. A mesh that leaves
        devices idle has to say so here.
    """

    data: int = -1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1
    stage: int = 1
    devices: int | None = None

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
