"""TPU slices by name: what their chips can do, how they are joined, and described devices to compile for.

`parse_slice('v5e-256')` takes the names by which Google Cloud rents slices, `parse_slice('v5p:4x4x4')` the
layout itself, and `2xv5e-256` is two slices joined by the data-centre network. `devices(slice)` are devices
that libtpu describes: a program compiles for them on any Linux machine, but cannot run.

Figures of the chips are those of Google's pages https://docs.cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e,
tpu7x), read in 2026, where not said otherwise. Bandwidths between chips there are the sum of both directions
of all links; here they are of one direction. In practice about 90 % of them is reached (Austin et al. 2025,
How To Scale Your Model, part 2: 4.5e10 of 5e10 bytes/s for a link of v5e, 9e10 of 1e11 of v5p).

This module imports jax only in `devices`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from t5style.run_dir import UserError

GiB = 1 << 30
MiB = 1 << 20
# What a machine with libtpu and without TPUs has to be told, or it asks Google Cloud's metadata server for
# minutes, refuses a second process, and complains that it does not know where it is.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip of a generation. FLOP/s are dense peaks of the whole chip, bytes/s of one direction.

    Attributes:
      name: generation, as in the names of slices.
      torus_dimensions: the chips of a pod are joined in a torus of so many dimensions, two links for each.
      devices: jax devices on a chip. The two cores of v4 and v5p work as one device (megacore), those of
        tpu7x are two.
      cores: TensorCores, which the names of slices of v4, v5p and tpu7x count.
      clock: Hz, which makes seconds of the compiler's estimated cycles: those at which the peak divides by
        the multiplications a cycle of the matrix units, and a large matrix product reaches 70 to 90 % of the
        peak in the compiler's own estimate.
      bf16_flops, int8_flops, fp8_flops: a type that the matrix units do not know runs at the speed of bf16.
      hbm_bytes: memory as Google states it.
      usable_hbm_bytes: what the compiler lets the programs of all devices of a chip use (what libtpu 0.0.52
        says when it runs out).
      hbm_bytes_per_second: memory bandwidth.
      vmem_bytes: on-chip vector memory of all cores (jax's table for Pallas, jax 0.10.2).
      ici_link_bytes_per_second: one link between chips, one direction.
      chips_per_host: of a slice of several hosts.
      dcn_bytes_per_second: data-centre network of a host, one direction. Google states none for v4: taken
        as v5p's.
      max_chips: of the largest slice.
    """

    name: str
    torus_dimensions: int
    devices: int
    cores: int
    clock: float
    bf16_flops: float
    int8_flops: float
    fp8_flops: float
    hbm_bytes: int
    usable_hbm_bytes: int
    hbm_bytes_per_second: float
    vmem_bytes: int
    ici_link_bytes_per_second: float
    dcn_bytes_per_second: float
    max_chips: int
    chips_per_host: int = 4

    @property
    def ici_bytes_per_second(self) -> float:
        """All links of a chip together, one direction."""
        return 2 * self.torus_dimensions * self.ici_link_bytes_per_second

    @property
    def counted(self) -> int:
        """By how much a chip counts in the names of slices: their cores, or 1."""
        return self.cores if self.torus_dimensions == 3 else 1


def _usable(gib: float) -> int:
    return int(gib * GiB)


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            torus_dimensions=3,
            devices=1,
            cores=2,
            clock=1.05e9,
            bf16_flops=275e12,
            int8_flops=275e12,
            fp8_flops=275e12,
            hbm_bytes=32 * GiB,
            usable_hbm_bytes=_usable(30.75),
            hbm_bytes_per_second=1.2e12,
            vmem_bytes=2 * 16 * MiB,
            ici_link_bytes_per_second=5e10,
            dcn_bytes_per_second=25e9,
            max_chips=4096,
        ),
        Chip(
            name="v5e",
            torus_dimensions=2,
            devices=1,
            cores=1,
            clock=1.5e9,
            bf16_flops=197e12,
            int8_flops=393e12,
            fp8_flops=197e12,
            hbm_bytes=16 * GiB,
            usable_hbm_bytes=_usable(15.75),
            hbm_bytes_per_second=8.19e11,
            vmem_bytes=128 * MiB,
            ici_link_bytes_per_second=5e10,
            dcn_bytes_per_second=12.5e9,
            max_chips=256,
        ),
        Chip(
            name="v5p",
            torus_dimensions=3,
            devices=1,
            cores=2,
            clock=1.75e9,
            bf16_flops=459e12,
            int8_flops=918e12,
            fp8_flops=459e12,
            hbm_bytes=95 * GiB,
            usable_hbm_bytes=_usable(95.73),
            hbm_bytes_per_second=2.765e12,
            vmem_bytes=2 * 64 * MiB,
            ici_link_bytes_per_second=1e11,
            dcn_bytes_per_second=25e9,
            max_chips=8960,
        ),
        Chip(
            name="v6e",
            torus_dimensions=2,
            devices=1,
            cores=1,
            clock=1.75e9,
            bf16_flops=918e12,
            int8_flops=1836e12,
            fp8_flops=918e12,
            hbm_bytes=32 * GiB,
            usable_hbm_bytes=_usable(31.24),
            hbm_bytes_per_second=1.638e12,
            vmem_bytes=128 * MiB,
            ici_link_bytes_per_second=1e11,
            dcn_bytes_per_second=50e9,
            max_chips=256,
        ),
        Chip(
            name="tpu7x",
            torus_dimensions=3,
            devices=2,
            cores=2,
            clock=2.2e9,
            bf16_flops=2307e12,
            int8_flops=2307e12,
            fp8_flops=4614e12,
            hbm_bytes=192 * GiB,
            usable_hbm_bytes=_usable(2 * 94.74),
            hbm_bytes_per_second=7.38e12,
            vmem_bytes=2 * 64 * MiB,
            ici_link_bytes_per_second=1e11,
            dcn_bytes_per_second=50e9,
            max_chips=9216,
        ),
    )
}
# Other names of the generations in use.
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "ironwood": "tpu7x", "trillium": "v6e"}
# Slices of a plane of 16 × 16 chips that Cloud rents.
_PLANES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Slices smaller than one cube of 4 × 4 × 4 chips.
_PARTS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
# Slices of cubes: every number up to the first that has a layout no longer than 64 cubes, and the others.
_MOST_CUBES = {"v4": (64, ()), "v5p": (96, (108, 140)), "tpu7x": (96, (108, 128, 140, 144))}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice of a pod, or several equal ones joined by the data-centre network.

    Attributes:
      chip: its generation.
      topology: chips along each dimension of the torus, two or three.
      num_slices: how many such slices.
    """

    chip: Chip
    topology: tuple[int, ...]
    num_slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.topology) * self.num_slices

    @property
    def num_devices(self) -> int:
        """jax devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Machines of all slices, each of which is one process."""
        chips = math.prod(self.topology)
        return self.num_slices * max(1, chips // math.prod(self.host_topology))

    @property
    def host_topology(self) -> tuple[int, ...]:
        """Chips of one host along each dimension."""
        if self.topology == (2, 4):  # the one slice of eight chips on one machine
            return self.topology
        return tuple(min(size, most) for size, most in zip(self.topology, (2, 2, 1), strict=False))

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Along which dimensions the last chip is joined to the first: those of 16 chips in a plane, all of a
        slice made of whole cubes.
        """
        if self.chip.torus_dimensions == 2:
            return tuple(size == 16 for size in self.topology)
        return (all(size % 4 == 0 for size in self.topology),) * 3

    @property
    def layout(self) -> str:
        """As libtpu names it: `v5e:16x16`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.topology))}"

    @property
    def name(self) -> str:
        """As Cloud names it, or the layout where that is not what Cloud gives for the size; `parse_slice`
        reads either.
        """
        size = math.prod(self.topology)
        cloud = f"{self.chip.name}-{size * self.chip.counted}"
        name = cloud if _topologies(self.chip.name).get(size) == self.topology else self.layout
        return name if self.num_slices == 1 else f"{self.num_slices}x{name}"

    def __str__(self) -> str:
        return self.name


def _compact(cubes: int) -> tuple[int, ...] | None:
    """Whole cubes as three factors as near to each other as can be, or None if the longest exceeds 64."""
    layouts = [
        (a, b, cubes // (a * b))
        for a in range(1, round(cubes ** (1 / 3)) + 1)
        if cubes % a == 0
        for b in range(a, math.isqrt(cubes // a) + 1)
        if (cubes // a) % b == 0
    ]
    best = min(layouts, key=sum)
    return best if max(best) <= 64 else None


@functools.cache
def _topologies(generation: str) -> dict[int, tuple[int, ...]]:
    """The layout that Cloud gives for a number of chips.

    That of whole cubes is the most compact; the sizes are those in the tables of MaxText
    (accelerator_to_spec_map.py) and of xpk (system_characteristics.py), with which the tests compare.
    """
    if CHIPS[generation].torus_dimensions == 2:
        return {math.prod(plane): plane for plane in _PLANES}
    most, more = _MOST_CUBES[generation]
    found: dict[int, tuple[int, ...]] = {math.prod(part): part for part in _PARTS}
    if generation == "tpu7x":
        found = {1: (1, 1, 1)} | found
    for cubes in (*range(1, most + 1), *more):
        if layout := _compact(cubes):
            found[64 * cubes] = tuple(4 * size for size in layout)
    return found


def slice_names(generation: str) -> list[str]:
    """Names of all slices of a generation, smallest first: `v5e-1`, `v5e-4`, ..."""
    chip = CHIPS[generation]
    return [f"{generation}-{chips * chip.counted}" for chips in _topologies(generation)]


def parse_slice(name: str) -> Slice:
    """The slice of this name.

    Args:
      name: `v5e-256` or `v5litepod-256` (chips), `v4-128`, `v5p-128` or `tpu7x-128` (TensorCores, two a chip,
        as Cloud counts them), `v5p:4x4x4` (chips along each dimension); before it `2x` for two slices.

    Raises:
      UserError: there is no such slice; it names the nearest ones.
    """
    text = str(name).strip().lower()
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*?)(?:-(\d+)|:(\d+(?:x\d+)+))", text)
    if match is None:
        raise UserError(
            f"{name!r} is not the name of a TPU slice{_nearest(text)}: write a generation "
            f"({', '.join(CHIPS)}) and a size, as in 'v5e-256' or 'v5p-128', or its layout, as in "
            "'v5p:4x4x4', and '2xv5e-256' for two slices."
        )
    count, generation, size, layout = match.groups()
    generation = _ALIASES.get(generation, generation)
    if generation not in CHIPS:
        near = difflib.get_close_matches(generation, [*CHIPS, *_ALIASES], 1, 0.5)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"There is no TPU generation {generation!r}{hint}: {', '.join(CHIPS)} are known. For "
            "GPUs and CPUs plan on a machine that has them, with slice None."
        )
    chip = CHIPS[generation]
    num_slices = int(count or 1)
    if num_slices < 1:
        raise UserError(f"{name!r} has {num_slices} slices: write 1 or more, or leave '{count}x' out.")
    if layout:
        return Slice(chip, _checked_layout(name, chip, layout), num_slices)
    chips, rest = divmod(int(size), chip.counted)
    topology = None if rest else _topologies(generation).get(chips)
    if topology is None:
        raise UserError(_no_such_size(generation, int(size)))
    return Slice(chip, topology, num_slices)


def _nearest(text: str) -> str:
    """The name of a slice that is spelt most like `text`, as a question."""
    for alias, generation in _ALIASES.items():
        text = text.replace(alias, generation)
    names = [name for generation in CHIPS for name in slice_names(generation)]
    near = difflib.get_close_matches(text, names, 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _checked_layout(name: str, chip: Chip, layout: str) -> tuple[int, ...]:
    topology = tuple(int(size) for size in layout.split("x"))
    if len(topology) != chip.torus_dimensions:
        raise UserError(
            f"{name!r} has {len(topology)} dimensions, but {chip.name} chips are joined in "
            f"{chip.torus_dimensions}, as in '{chip.name}:{'x'.join('4' * chip.torus_dimensions)}'."
        )
    if min(topology) < 1:
        raise UserError(f"{name!r}: every dimension needs at least 1 chip.")
    if (chips := math.prod(topology)) > chip.max_chips:
        raise UserError(f"{name!r} has {chips} chips, but a {chip.name} pod has {chip.max_chips}.")
    return topology


def _no_such_size(generation: str, size: int) -> str:
    """There is no slice of this size: the nearest ones and, as far as they are few, all."""
    chip, names = CHIPS[generation], slice_names(generation)
    sizes = [chips * chip.counted for chips in _topologies(generation)]
    below, above = [s for s in sizes if s < size][-1:], [s for s in sizes if s > size][:1]
    near = [f"{generation}-{s}" for s in below + above]
    counts = "TensorCores, two a chip" if chip.counted == 2 else "chips"
    most = 16
    rest = f", ... {names[-1]} ({len(names)} in all)" if len(names) > most else ""
    return (
        f"There is no slice {generation}-{size}; the nearest {'are' if len(near) > 1 else 'is'} "
        f"{' and '.join(near)}. The number counts {counts}: {', '.join(names[:most])}{rest}. Another "
        f"layout is written as in '{generation}:{'x'.join('4' * chip.torus_dimensions)}'."
    )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The variables that libtpu reads when it is loaded. What is already set counts, and what is added here
    is taken away again: on a machine with TPUs it would mislead this process and its children.
    """
    added = {name: value for name, value in _NO_TPU_HERE.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@functools.cache
def devices(where: Slice) -> tuple[Any, ...]:
    """Described devices of a slice, for `MeshConfig.build` and then `jax.jit(...).lower(...).compile()`.

    Works whatever backend this process uses, and needs no TPU. The result is cached: describing the largest
    slice takes half a second.

    Raises:
      UserError: libtpu is not installed, or refuses the topology.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            f"Compiling for {where} needs the TPU compiler, the package libtpu, which is not installed: "
            "pip install 'jax[tpu]' (no TPU is needed)."
        )
    from jax.experimental import topologies

    dimensions = where.host_topology + (1,) * (3 - len(where.topology))
    wraps = where.wraps + (False,) * (3 - len(where.topology))
    try:
        with _environment():
            described = topologies.get_topology_desc(
                platform="tpu",
                topology_name=where.layout,
                num_slices=where.num_slices,
                chips_per_host_bounds=dimensions,
                wrap=wraps,
                **({"chip_config_name": "megacore"} if where.chip.name == "v4" else {}),
            ).devices
    except Exception as error:  # libtpu's errors have no class of their own
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"The TPU compiler refuses the slice {where} ({where.layout}): {reason}") from error
    if len(described) != where.num_devices:
        raise UserError(
            f"The TPU compiler describes {len(described)} devices for {where}, not {where.num_devices}: this "
            "version of libtpu divides its chips otherwise."
        )
    return tuple(described)
