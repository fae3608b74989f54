"""Which mesh, remat policy, batch, accumulation and attention blocks train fastest on a slice.

An analytic model drops what cannot fit and orders the rest; the best of these are compiled, and what the
compiler says of them decides. The model is coarse: it only has to keep the good ones among those compiled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from t5style import console, run_dir
from t5style.models import params as model_params
from t5style.models.config import TransformerConfig
from t5style.nn import remat
from t5style.nn.settings import AttentionBlocks
from t5style.parallel import identity
from t5style.parallel.explain import format_bytes
from t5style.parallel.mesh import AXES, MeshConfig
from t5style.parallel.topologies import Slice
from t5style.train.estimate import Estimate, estimate
from t5style.train.program import TrainingProgram

FRONT_FILE = "front.json"
BEST_FILE = "best.gin"
# What a large matrix product reaches of the peak, and a collective of its links (both found with libtpu).
_PRODUCT_SHARE, _LINK_SHARE = 0.8, 0.85


@dataclasses.dataclass(frozen=True)
class Search:
    """What to try. None takes what the plan itself gives.

    Attributes:
      meshes: None tries every division of a slice's devices into fsdp and tensor (up to 8), with data for
        slices.
      remats: policies (see TransformerConfig.remat).
      batch_sizes: rows of the global batch.
      accumulations: microbatches per step.
      attention_blocks: tiles of the attention kernel.
      compiler_options: sets of XLA options.
      memory_limit: bytes of a device that may be used; None for what the device has.
      compiled: how many of the candidates to compile; each takes a minute or some.
    """

    meshes: Sequence[MeshConfig] | None = None
    remats: Sequence[str] | None = None
    batch_sizes: Sequence[int] | None = None
    accumulations: Sequence[int] | None = None
    attention_blocks: Sequence[AttentionBlocks] | None = None
    compiler_options: Sequence[Mapping[str, Any]] | None = None
    memory_limit: int | None = None
    compiled: int = 6

    def __post_init__(self) -> None:
        if self.compiled < 1:
            raise ValueError(f"Search.compiled = {self.compiled}; at least one must be compiled.")

    def candidates(self, program: TrainingProgram, where: Slice) -> Iterator[TrainingProgram]:
        """All combinations whose sizes divide."""
        meshes = self.meshes or list(divisions(where))
        options = self.compiler_options or [program.mesh.compiler_options]
        for mesh, option, policy, rows, accumulation, blocks in itertools.product(
            meshes,
            options,
            self.remats or [program.model.remat],
            self.batch_sizes or [program.batch_size],
            self.accumulations or [program.accumulation],
            self.attention_blocks or [program.model.attention_blocks],
        ):
            sizes = mesh.sizes(where.num_devices)
            model = program.model.replace(remat=policy, attention_blocks=blocks)
            if rows % (sizes["data"] * sizes["fsdp"] * accumulation) or not _divides(model, sizes):
                continue
            yield dataclasses.replace(
                program,
                model=model,
                batch_size=rows,
                accumulation=accumulation,
                mesh=dataclasses.replace(mesh, compiler_options=option),
            )


def divisions(where: Slice) -> Iterator[MeshConfig]:
    """Meshes of fsdp and tensor within a slice, and data over slices."""
    inner = where.num_devices // where.num_slices
    for tensor in (1, 2, 4, 8):
        if inner % tensor == 0:
            yield MeshConfig(data=where.num_slices, fsdp=inner // tensor, tensor=tensor)


def _divides(model: TransformerConfig, sizes: Mapping[str, int]) -> bool:
    tensor, fsdp = sizes["tensor"], sizes["fsdp"]
    parts = (model.num_heads, model.kv_heads, model.d_ff, model.vocab_size)
    experts = model.moe.experts if model.moe else sizes["expert"]
    return (
        all(part % tensor == 0 for part in parts)
        and model.d_model % fsdp == 0
        and experts % sizes["expert"] == 0
    )


@dataclasses.dataclass(frozen=True)
class Guess:
    """The analytic model's figures of one device: bytes and seconds."""

    memory: float
    seconds: float


def guess(program: TrainingProgram, where: Slice) -> Guess:
    """What a candidate would need, from its shapes.

    Time: products of forward, backward and recomputation at a share of the peak, or the weights' gathering
    and the gradients' scattering over the links, whichever is longer. Memory: state and gradients, what the
    policy keeps of each layer, and one layer's activations or the logits in float32 with their gradient.
    """
    model, sizes = program.model, program.mesh.sizes(where.num_devices)
    chip = where.chip
    length = sum(program.sides().values())
    ways = sizes["data"] * sizes["fsdp"]
    rows = program.batch_size / ways / program.accumulation
    tokens = rows * length / sizes["sequence"]  # of one device at a time
    parameters = model_params.count_params(model)
    shards = math.prod(sizes[axis] for axis in ("fsdp", "tensor", "expert", "stage"))
    width, heads = model.d_model, model.num_heads * model.heads_width
    hidden = model.moe.per_token * model.moe.d_ff if model.moe else model.d_ff
    sizes_of = {
        "layer_input": width,
        "query": heads,
        "key": model.kv_heads * model.heads_width,
        "value": model.kv_heads * model.heads_width,
        "attention_context": heads,
        "attention_output": width,
        "mlp_output": width,
    } | {f"mlp_input_{i}": hidden for i in range(len(model.activations))}
    layer = width * 8 + 4 * heads + 3 * hidden * len(model.activations)
    policy = remat.parse(model.remat)
    saved = set(sizes_of) if policy is None else {"layer_input", *policy.saved} - set(policy.offloaded)
    known = saved if policy is None else saved | set(policy.offloaded)  # not computed again
    stored = sum(size for name, size in sizes_of.items() if name in saved)
    layers = model.encoder_layers + model.decoder_layers
    itemsize = 2 if model.dtype == "bfloat16" else 4
    optimizer = 8 if program.optimizer.name == "adamw" else 1
    memory = parameters * (4 + optimizer + 4) / shards
    memory += tokens * itemsize * layers * stored / sizes["tensor"] / sizes["stage"]
    memory += tokens * max(itemsize * layer, 6 * model.vocab_size) / sizes["tensor"]
    flops = program.flops_per_token() * program.batch_size * length / where.num_devices
    made = {name: size for name, size in sizes_of.items() if name != "layer_input"}
    again = 1 - sum(size for name, size in made.items() if name in known) / sum(made.values())
    compute = flops * (1 + again / 3) / (chip.bf16_flops / chip.devices) / _PRODUCT_SHARE
    gathered = 3 * 2 * parameters / sizes["tensor"] / sizes["expert"] * program.accumulation
    moved = gathered if sizes["fsdp"] > 1 else 0.0
    if sizes["tensor"] > 1:
        moved += 3 * 4 * layers * tokens * program.accumulation * width * itemsize
    return Guess(memory, max(compute, moved / (chip.ici_bytes_per_second * _LINK_SHARE)))


def search(
    knobs: Search, program: TrainingProgram, where: Slice | None, run: run_dir.RunDir
) -> tuple[TrainingProgram, Estimate | None, list[dict[str, Any]]]:
    """The best program found, what the compiler says of it, and figures of all that were compiled, the
    fastest first; those on the front, than which none other is both faster and smaller, are marked.

    Writes front.json (these figures, after each candidate) and best.gin, which a training configuration
    includes. What a search that was interrupted has compiled is not compiled again by the same code and
    libraries; if the best one is among that, its estimate is None.

    Raises:
      UserError: no candidate divides or fits.
    """
    if where is None:
        raise run_dir.UserError("a search needs a slice to plan for: set slice, 'v5e-256' say.")
    limit = knobs.memory_limit or where.chip.usable_hbm_bytes // where.chip.devices
    guessed = [(guess(each, where), each) for each in knobs.candidates(program, where)]
    if not guessed:
        raise run_dir.UserError(
            f"no mesh divides this model on {where}: heads {program.model.num_heads}, width "
            f"{program.model.d_model}, rows {program.batch_size}."
        )
    # The model of memory is coarse: what exceeds the limit by a quarter may still fit.
    able = [pair for pair in guessed if pair[0].memory <= 1.25 * limit]
    able = able or [min(guessed, key=lambda pair: pair[0].memory)]
    able.sort(key=lambda pair: pair[0].seconds / pair[1].batch_size)
    chosen = [each for _, each in able[: knobs.compiled]]
    console.say(
        f"{len(guessed)} candidates, of which {len(able)} may fit {format_bytes(limit)}: compiling "
        f"{len(chosen)}"
    )
    before = _compiled_before(run)
    rows: list[dict[str, Any]] = []
    best: tuple[dict[str, Any], TrainingProgram, Estimate | None] | None = None
    with console.progress("compiling", len(chosen), "programs") as bar:
        for number, each in enumerate(chosen):
            key, made = _key(each, where), None
            if (row := before.get(key)) is None:
                made = estimate(each, where)
                row = _row(key, each, made, where)
            row["fits"] = bool(row["step_seconds"]) and row["peak_bytes"] <= limit
            rows.append(row)
            if row["fits"] and (best is None or _per_token(row) < _per_token(best[0])):
                best = row, each, made
            bar.advance()
            console.say(f"{number + 1}: {describe(each, where)}: {_figures(row)}")
            for one in rows:
                one["front"] = one["fits"] and not any(_dominates(other, one) for other in rows)
            rows.sort(key=_per_token)
            # Written each time: a search that is interrupted has told what it found.
            run_dir.atomic_write(run.path / FRONT_FILE, json.dumps(rows, indent=1))
    if best is None:
        least = min(rows, key=lambda row: row["peak_bytes"])
        raise run_dir.UserError(
            f"nothing that was compiled fits {format_bytes(limit)} of {where}: the smallest, "
            f"{least['words']}, needs {format_bytes(least['peak_bytes'])}. Search smaller "
            "batch_sizes, larger accumulations, remats=['full'], or a larger slice."
        )
    _, found, made = best
    run_dir.atomic_write(run.path / BEST_FILE, gin_file(found, where))
    return found, made, rows


def _key(program: TrainingProgram, where: Slice) -> str:
    """12 hex digits of all that an estimate depends on: the candidate, the slice, the code, the libraries."""
    text = repr((program, str(where), sorted(identity.program().items())))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _compiled_before(run: run_dir.RunDir) -> dict[str, dict[str, Any]]:
    """By key, the rows that an interrupted search has left; none if they cannot be read."""
    try:
        return {row["key"]: row for row in json.loads((run.path / FRONT_FILE).read_text())}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _per_token(row: Mapping[str, Any]) -> float:
    return (row["step_seconds"] or math.inf) / row["tokens"]


def _dominates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    ours, theirs = ((_per_token(row), row["peak_bytes"]) for row in (one, other))
    return all(a <= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs


def _figures(row: Mapping[str, Any]) -> str:
    needs = format_bytes(row["peak_bytes"])
    if row["step_seconds"] is None:
        return f"needs {needs}"
    return f"{row['step_seconds']:.3f} s, MFU {row['mfu']:.1%}, {needs}"


def describe(program: TrainingProgram, where: Slice) -> str:
    """A candidate in words."""
    sizes = program.mesh.sizes(where.num_devices)
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"
    parts = [mesh, f"remat {program.model.remat}", f"{program.batch_size} rows"]
    if program.accumulation > 1:
        parts.append(f"accumulation {program.accumulation}")
    blocks = changed(program.model.attention_blocks)
    return ", ".join([*parts, *(f"{name} {value}" for name, value in blocks.items())])


def changed(record: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as its defaults."""
    return {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if getattr(record, field.name) != field.default
    }


def _row(key: str, program: TrainingProgram, made: Estimate, where: Slice) -> dict[str, Any]:
    return {
        "key": key,
        "words": describe(program, where),
        "mesh": program.mesh.sizes(where.num_devices),
        "remat": program.model.remat,
        "batch_size": program.batch_size,
        "accumulation": program.accumulation,
        "attention_blocks": changed(program.model.attention_blocks),
        "compiler_options": dict(program.mesh.compiler_options),
        "tokens": made.tokens,
        "step_seconds": made.step_seconds,
        "compute_seconds": made.compute_seconds,
        "mfu": made.mfu(made.step_seconds),
        "peak_bytes": made.memory.peak,
    }


def gin_file(program: TrainingProgram, where: Slice) -> str:
    """The choice as a gin file, which trains in place of gin/runs/pretrain.gin and of one of gin/mesh/.

    It includes the former, because a file may override only what it includes.
    """
    sizes = program.mesh.sizes(where.num_devices)
    lines = [
        f"# Found by a plan for {where}: {describe(program, where)}.",
        "# Use it in place of gin/runs/pretrain.gin and of a file of gin/mesh/.",
        "from __gin__ import dynamic_registration",
        "",
        "from t5style.models import config",
        "from t5style.nn import settings",
        "from t5style.parallel import mesh",
        "",
        "include 'gin/runs/pretrain.gin'",
        "",
        f"BATCH_SIZE = {program.batch_size}",
        f"ACCUMULATION = {program.accumulation}",
        "",
        f"config.TransformerConfig.remat = {program.model.remat!r}",
        f"config.TransformerConfig.attention = {program.model.attention!r}",
    ]
    if blocks := changed(program.model.attention_blocks):
        lines += ["config.TransformerConfig.attention_blocks = @settings.AttentionBlocks()"]
        lines += [f"settings.AttentionBlocks.{name} = {value!r}" for name, value in blocks.items()]
    lines += [f"mesh.MeshConfig.{axis} = {sizes[axis]}" for axis in AXES]
    if program.mesh.compiler_options:
        lines.append(f"mesh.MeshConfig.compiler_options = {dict(program.mesh.compiler_options)!r}")
    return "\n".join(lines) + "\n"
