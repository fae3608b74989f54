"""What the compiler says of a training step: memory, time, communication.

The step that training runs (program.TrainingProgram) is compiled for described devices by the compiler that
the real ones have, and what the compiler says is read: memory from its buffer assignment, time from its own
cycle estimates (hlo_cost.py), communication from the program's collectives. Nothing is run; the report says
so. Without a slice's name the same is done for this machine's devices, whose compilers estimate no time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from t5style.models import params as model_params
from t5style.parallel import mesh as mesh_lib
from t5style.parallel import topologies
from t5style.parallel.topologies import Slice
from t5style.train import hlo, hlo_cost
from t5style.train import state as state_lib
from t5style.train.program import TrainingProgram, save_executable
from t5style.train.resharding import Resharding, resharding

# What a collective reaches of all links (How To Scale Your Model, part 2: 0.9 on one link).
_LINK_SHARE = 0.9
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      parameters, optimizer, gradients: by their shapes and shardings.
      activations: what the loops over layers keep for the backward pass.
      temporaries: the rest of the peak; negative where gradients and activations do not live together.
      peak: what the compiler says; limit: what the device has, None where that is unknown.
      offloaded: what loops keep in the host's memory; no part of the peak.
    """

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    temporaries: int
    peak: int
    limit: int | None
    offloaded: int = 0

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit."""
        return self.limit is None or self.peak <= self.limit


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What the compiler says of one training step on some devices.

    Attributes:
      mesh: in words.
      devices, parameters: how many.
      tokens: positions of one step, padding included.
      model_flops: of one step on all devices (models/params.flops_per_example: causal attention counts half
        of its scores, recomputation nothing).
      memory: of one device.
      cost: time and collectives; None where the program did not compile for want of memory.
      peak_flops: of one device; None where that is unknown.
      lower_seconds, compile_seconds: of this machine.
      reshardings: collectives of activations in the loop over layers for which no rule asks.
      hlo: the optimised program's text.
    """

    mesh: str
    devices: int
    parameters: int
    tokens: int
    model_flops: float
    memory: Memory
    cost: hlo_cost.Cost | None
    peak_flops: float | None
    lower_seconds: float
    compile_seconds: float
    reshardings: Sequence[Resharding] = ()
    hlo: str = dataclasses.field(repr=False, default="")

    @property
    def step_seconds(self) -> float | None:
        """Estimated time of a step with the communication that nothing covers; None: no estimate."""
        return None if self.cost is None else self.cost.step_seconds

    @property
    def compute_seconds(self) -> float | None:
        """The same were all communication hidden."""
        return None if self.cost is None else self.cost.seconds

    def mfu(self, seconds: float | None) -> float | None:
        """Model FLOPs utilisation at so many seconds a step (Chowdhery et al. 2022, appendix B)."""
        if not seconds or not self.peak_flops:
            return None
        return self.model_flops / (seconds * self.devices * self.peak_flops)

    def to_json(self) -> dict[str, Any]:
        """Figures without the program's text."""
        skipped = {"hlo", "memory", "cost", "reshardings"}
        figures = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in skipped
        }
        return figures | {
            "memory": dataclasses.asdict(self.memory),
            "fits": self.memory.fits,
            "reshardings": [str(one) for one in self.reshardings],
            "step_seconds": self.step_seconds,
            "compute_seconds": self.compute_seconds,
            "mfu": self.mfu(self.step_seconds),
            "mfu_communication_hidden": self.mfu(self.compute_seconds),
            "tokens_per_second": self.tokens / self.step_seconds if self.step_seconds else None,
            "cost": None if self.cost is None else self.cost.to_json(),
        }


def estimate(
    program: TrainingProgram, where: Slice | None, executable: epath.PathLike | None = None
) -> Estimate:
    """Compiles the training step for a slice, or for this machine's devices (None), and reads the result.

    executable: where to keep the compiled step.

    Raises:
      UserError: libtpu is missing or refuses the slice.
      ValueError: mesh, batch or parameters do not divide.
    """
    devices = jax.devices() if where is None else topologies.devices(where)
    mesh = program.mesh.build(devices)
    began = time.perf_counter()
    lowered = program.lower(mesh)
    lower_seconds = time.perf_counter() - began
    began = time.perf_counter()
    abstract, shardings = program.abstract(mesh)
    state = {
        "parameters": state_lib.bytes_per_device(abstract.params, shardings.params),
        "optimizer": state_lib.bytes_per_device(abstract.opt_state, shardings.opt_state),
        "gradients": state_lib.bytes_per_device(abstract.params, shardings.params),
    }
    limit = None if where is None else where.chip.usable_hbm_bytes // where.chip.devices
    text, cost, activations, offloaded, reshardings = "", None, 0, 0, []
    try:
        with _no_program_cache() if where or executable else contextlib.nullcontext():
            compiled = program.mesh.compile(lowered)
    except jax.errors.JaxRuntimeError as error:
        peak = _needed(str(error))
        if peak is None:
            raise
    else:
        if executable is not None:
            save_executable(compiled, lowered, executable)
        text = str(compiled.as_text())
        peak = _peak(compiled, where)
        read = hlo.read_program(text)
        cost = hlo_cost.cost(read, **_speeds(where, mesh))
        activations, offloaded = _kept(read, abstract, shardings)
        reshardings = resharding(cost.collectives, program, mesh)
    sides = program.sides()
    return Estimate(
        mesh=mesh_lib.describe(mesh),
        devices=mesh.size,
        parameters=model_params.count_params(abstract.params),
        tokens=program.batch_size * sum(sides.values()),
        model_flops=program.flops_per_token() * program.batch_size * sum(sides.values()),
        memory=Memory(
            **state,
            activations=activations,
            temporaries=peak - sum(state.values()) - activations,
            peak=peak,
            limit=limit,
            offloaded=offloaded,
        ),
        cost=cost,
        peak_flops=None if where is None else where.chip.bf16_flops / where.chip.devices,
        lower_seconds=lower_seconds,
        compile_seconds=time.perf_counter() - began,
        reshardings=reshardings,
        hlo=text,
    )


def _speeds(where: Slice | None, mesh: Mesh) -> dict[str, Any]:
    """What hlo_cost.cost assumes of the devices."""
    known = {"mesh_shape": dict(mesh.shape), "attention_fraction": _attended}
    if where is None:  # there are no cycles to make seconds of
        return known | {"clock_hz": 1.0, "peak_flops": 1.0}
    chip = where.chip

    def bandwidth(kind: str, axes: tuple[str, ...], group: int) -> float:
        if axes == ("slices",):
            return chip.dcn_bytes_per_second / chip.chips_per_host / chip.devices
        if kind == "collective-permute":  # to one neighbour
            return _LINK_SHARE * chip.ici_link_bytes_per_second
        return _LINK_SHARE * chip.ici_bytes_per_second / chip.devices

    return known | {
        "clock_hz": chip.clock,
        "peak_flops": chip.bf16_flops / chip.devices,
        "hbm_bytes_per_second": chip.hbm_bytes_per_second / chip.devices,
        "bandwidth": bandwidth,
    }


def _attended(op_name: str, queries: int, keys: int) -> float:
    """Which share of the pairs of queries and keys an attention kernel computes: half where it is causal."""
    return 1.0 if "/encoder/" in op_name or "cross_attention" in op_name else 0.5


def _peak(compiled: Any, where: Slice | None) -> int:
    """Peak bytes of one device. What CPU and GPU compilers call so leaves temporaries out."""
    memory = compiled.memory_analysis()
    if where is not None:
        return int(memory.peak_memory_in_bytes)
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(kept + memory.temp_size_in_bytes)


def _needed(message: str) -> int | None:
    """Bytes that a program would need of which the compiler says that they are not there; None: no such
    message.
    """
    found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message) or re.search(
        r"memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)", message
    )
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


@contextlib.contextmanager
def _no_program_cache() -> Iterator[None]:
    """Without jax's cache of programs on disk: those for described devices cannot be read back from it, and a
    CPU's program that was cannot be serialised again.
    """
    before = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009  (jax declares no types)
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or jax goes by what it found at its first compilation
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _kept(read: hlo.Program, abstract: Any, shardings: Any) -> tuple[int, int]:
    """Bytes of the arrays `[layers, ...]` that loops hand on and that are no parameters or gradients: on the
    device, and on the host.
    """
    own = {
        tuple(size for size in sharding.shard_shape(leaf.shape) if size != 1)
        for leaf, sharding in zip(
            jax.tree.leaves(abstract.params), jax.tree.leaves(shardings.params), strict=True
        )
    }
    most: collections.Counter[hlo.Shape] = collections.Counter()
    for loop in read.instructions():
        trips = read.trips(loop) if loop.opcode == "while" else None
        if not trips or trips < 2:
            continue
        stacked = collections.Counter(
            shape
            for shape in loop.shapes
            if shape.dims[:1] == (trips,) and tuple(size for size in shape.dims if size != 1) not in own
        )
        most |= stacked
    sizes = [0, 0]
    for shape, count in most.items():
        sizes[shape.on_host] += shape.bytes * count
    return sizes[False], sizes[True]
