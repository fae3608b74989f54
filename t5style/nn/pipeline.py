"""Pipeline parallelism: layers are divided over the mesh axis `stage`, and microbatches pass through them.

Two schedules, told apart by Pipeline.repeats:

- GPipe (Huang et al. 2019): each stage holds one group of consecutive layers.
- Circular, or interleaved (Narayanan et al. 2021, section 2.2; the circular schedule of praxis and MaxText):
  it holds `repeats` groups, layer l on stage (l // layers of a group) mod stages, and a microbatch goes round
  that many times. Groups are shorter, so that a stage begins earlier.

Stages compute a group of layers at a time, all together. Group r of stage s is applied to microbatch m in
iteration r · microbatches + m + s, of microbatches · repeats + stages - 1 iterations in all. In stages - 1 of
them a stage has nothing to do: of the time, the part

    (stages - 1) / (microbatches · repeats + stages - 1)

is lost (the bubble). What a stage computes then is not used.

All is said by array operations under jit: groups are a leading dimension `[stages, ...]` that is divided over
`stage`, a stage is a function under vmap, and passing on is jnp.roll of that dimension, which XLA makes a
collective-permute. So other mesh axes work within a stage as without one.

Where things lie:

- Rows wait for stage 0, and results for the end, in one buffer `[stages, microbatches / stages, ...]`, also
  divided over `stage`. It turns by a stage as a microbatch is taken at stage 0, and the result of the last
  stage takes the place that is empty there. What follows the pipeline then has its rows divided over `stage`
  too (the logical axis `rows` of parallel/rules.py), so that the stages share the work of embedding, head and
  loss.
- With repeats, microbatches on their way back to stage 0 wait in a buffer of the same kind, which delays by
  microbatches - stages iterations.
- What a microbatch brings along and has a gradient (the encoder's output) travels with it; the rest
  (segments, rotary angles) is on every stage, which looks it up.
- Parameters are stored `[layers, ...]` in their order, of which a stage stores consecutive ones: the
  checkpoint is the same on every mesh. For GPipe these are the ones it computes. For repeats > 1 they are
  not, and each step sends groups to the stage that computes them, and their gradients back: at most parameter
  bytes / stages per device each way (in param_dtype, after division by fsdp and tensor), in `repeats`
  collective-permutes before the loop and after it, and as much memory. They are not resharded in the loop.
- With fsdp, the weights of a group are gathered in each iteration: per device iterations / (stages ·
  repeats) times the bytes that training without stages gathers, about microbatches / stages. Prefer few
  large microbatches and more repeats.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5style.nn.settings import Pipeline
from t5style.nn.stack import Layer, Output, remat, run_layers
from t5style.parallel.mesh import BATCH_AXES
from t5style.parallel.rules import activation_axes, constrain, current_mesh

AXIS = "stage"
Order = Sequence[tuple[str, Hashable]]


class Schedule(NamedTuple):
    """How many stages there are, microbatches, and groups of layers of a stage."""

    stages: int
    microbatches: int
    repeats: int

    @property
    def iterations(self) -> int:
        """Of the loop, in each of which every stage computes one group of layers."""
        return self.microbatches * self.repeats + self.stages - 1

    @property
    def bubble(self) -> float:
        """The part of the time in which a stage has nothing to do."""
        return (self.stages - 1) / self.iterations

    @property
    def groups(self) -> int:
        """Groups of layers on all stages."""
        return self.stages * self.repeats


def schedule(pipeline: Pipeline, mesh: Mesh | None) -> Schedule | None:
    """The schedule on a mesh, None where it has no stages.

    Raises:
      ValueError: microbatches are not a multiple of the stages.
    """
    if mesh is None or mesh.shape[AXIS] == 1:
        return None
    stages = mesh.shape[AXIS]
    microbatches = stages if pipeline.microbatches is None else pipeline.microbatches
    if microbatches % stages:
        raise ValueError(
            f"Pipeline.microbatches = {microbatches} is not a multiple of the mesh's stage={stages}: choose "
            f"{-(-microbatches // stages) * stages}."
        )
    return Schedule(stages, microbatches, pipeline.repeats)


def check(
    sides: Mapping[str, Sequence[Hashable]], pipeline: Pipeline, mesh: Mesh, rows: int, accumulation: int = 1
) -> None:
    """Refuses what a mesh with stages cannot train; to be called before anything is allocated.

    Args:
      sides: by what they are called in an error ('decoder layers'), what each layer is.
      pipeline: the settings.
      mesh: where.
      rows: of the batch.
      accumulation: see train/step.make_train_step.

    Raises:
      ValueError: layers do not divide into equal groups, or the batch does not into microbatches.
    """
    plan = schedule(pipeline, mesh)
    if plan is None:
        return
    for what, kinds in sides.items():
        check_layers(kinds, plan, what)
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    unit = plan.microbatches * ways * accumulation
    if rows % unit:
        parts = f"{plan.microbatches} microbatches of the pipeline × {ways} devices that divide the batch"
        parts += f" × accumulation {accumulation}" if accumulation > 1 else ""
        near = sorted({max(1, rows // unit) * unit, -(-rows // unit) * unit})
        raise ValueError(
            f"The batch of {rows} rows does not divide by {parts} = {unit}: choose "
            f"{' or '.join(map(str, near))} rows, or other Pipeline.microbatches."
        )


def check_layers(kinds: Sequence[Hashable], plan: Schedule, what: str = "layers") -> None:
    """Refuses layers that cannot be divided into equal groups.

    Raises:
      ValueError: the number does not divide, or groups are not of the same kinds of layers.
    """
    if not kinds:
        return
    said = f"stage={plan.stages}" + (f" × Pipeline.repeats={plan.repeats}" if plan.repeats > 1 else "")
    if len(kinds) % plan.groups:
        raise ValueError(
            f"The {len(kinds)} {what} do not divide into {plan.groups} equal groups ({said}): choose stages "
            f"and repeats whose product divides {len(kinds)}."
        )
    size = len(kinds) // plan.groups
    for index, kind in enumerate(kinds):
        if kind != kinds[index % size]:
            raise ValueError(
                f"Layer {index} of the {len(kinds)} {what} is {kind} and layer {index % size} is "
                f"{kinds[index % size]}, but the {plan.groups} groups of {size} layers ({said}) must be "
                "alike, because all stages run the same program: choose stages and repeats such that the "
                "pattern of layers repeats within a group."
            )


def run_stack(
    layer: Callable[..., tuple[jax.Array, Output]],
    params: Mapping[str, Any],
    x: jax.Array,
    shared: Mapping[str, Any],
    *,
    order: Order,
    keys: jax.Array | None,
    policy: str,
    scan: bool,
    pipeline: Pipeline,
    follow: Sequence[str] = ("encoded",),
) -> tuple[jax.Array, dict[str, Output]]:
    """Layers in turn (nn/stack.run_layers), by a pipeline where the mesh in force has stages.

    There layers run one after the other all the same where the batch does not divide into the microbatches,
    as it need not for decoding and evaluation (for training `check` refuses it), and where the parameters are
    given layer by layer.

    Args:
      layer: `layer(params, x, shared, key, kind)` gives (x, output).
      params, order, keys, policy, scan: see run_layers.
      x: `[batch, length, embed]`.
      shared: what all layers get, trees of arrays: of `[batch, ...]` a microbatch gets its rows, others it
      gets whole.
      pipeline: the settings.
      follow: names in shared of arrays `[batch, length, embed]` with a gradient, which travel with a
        microbatch.

    Returns:
      x, and the outputs as run_layers stacks them. Microbatches' outputs are added, so they must be sums over
      rows, such as RouterStats.

    Raises:
      ValueError: the layers do not divide into equal groups.
    """
    plan = schedule(pipeline, current_mesh())
    settings: dict[str, Any] = {"policy": policy, "scan": scan}
    if (
        plan is None
        or x.shape[0] % plan.microbatches
        or any(isinstance(group, tuple) for group in params.values())
    ):
        return run_layers(_closed(layer, shared), params, x, order=order, keys=keys, **settings)
    check_layers([kind for _, kind in order], plan)
    return _run(layer, params, x, shared, plan, order, keys, settings, pipeline.remat, follow)


def _run(
    layer: Callable[..., tuple[jax.Array, Output]],
    params: Mapping[str, Any],
    x: jax.Array,
    shared: Mapping[str, Any],
    plan: Schedule,
    order: Order,
    keys: jax.Array | None,
    settings: Mapping[str, Any],
    remat_of: str,
    follow: Sequence[str],
) -> tuple[jax.Array, dict[str, Output]]:
    stages, microbatches, repeats = plan
    slots, rows = microbatches // stages, x.shape[0]
    group = order[: len(order) // plan.groups]
    mesh = current_mesh()
    assert mesh is not None
    (divided,) = activation_axes(("batch",), (rows // microbatches,))
    ways = math.prod(mesh.shape[axis] for axis in divided)
    split = functools.partial(_split, microbatches=microbatches, ways=ways)

    is_rows = lambda leaf: leaf.ndim > 0 and leaf.shape[0] == rows  # noqa: E731
    travelling = {name: shared[name] for name in follow if shared.get(name) is not None}
    leaves, tree = jax.tree.flatten({name: value for name, value in shared.items() if name not in travelling})
    looked_up = [
        split(jnp.asarray(leaf)) if is_rows(leaf) else leaf for leaf in leaves
    ]  # [microbatches, rows of one, ...]
    per_row = [is_rows(leaf) for leaf in leaves]

    grouped = {
        name: jax.tree.map(functools.partial(_groups, plan=plan, mesh=mesh), part)
        for name, part in params.items()
    }  # [stages, repeats, layers of the group, ...]
    if keys is not None:
        keys = keys.reshape(repeats, stages, len(group)).swapaxes(0, 1)

    def stage(
        parts: Any, drawn: jax.Array | None, x: jax.Array, along: Any, index: jax.Array
    ) -> tuple[jax.Array, Any]:
        """A group of layers of one stage; `index` counts (repeat, microbatch), from 0."""
        repeat, microbatch = index // microbatches, index % microbatches
        parts, drawn = jax.tree.map(
            lambda leaf: (
                leaf[0] if repeats == 1 else jax.lax.dynamic_index_in_dim(leaf, repeat, keepdims=False)
            ),
            (parts, drawn),
        )
        if drawn is not None:
            drawn = jax.vmap(jax.random.fold_in, (0, None))(drawn, microbatch)
        mine = [
            constrain(leaf[microbatch], ("batch", *[None] * (leaf.ndim - 2))) if row else leaf
            for leaf, row in zip(looked_up, per_row, strict=True)
        ]
        everything = dict(jax.tree.unflatten(tree, mine)) | along
        inner = dict(settings) | ({"policy": "none"} if remat_of == "iteration" else {})
        return run_layers(_closed(layer, everything), parts, x, order=group, keys=drawn, **inner)

    together = jax.vmap(stage, spmd_axis_name=AXIS)
    if remat_of != "layer":
        together = remat(together, settings["policy"], scanned=True)
    number = np.arange(stages)

    def iteration(state: dict[str, Any], t: jax.Array) -> tuple[dict[str, Any], dict[str, Output]]:
        slot = t % slots
        entering = jax.tree.map(lambda leaf: leaf[:, slot], state["waiting"])
        x, along = entering["x"], entering["along"]
        if repeats > 1:
            x = jnp.where(t < microbatches, x, state["back"])
        x, along = jax.tree.map(_enter, (x, along), (state["x"], state["along"]))
        index = jnp.clip(t - number, 0, microbatches * repeats - 1)
        y, outputs = together(grouped, keys, x, along, index)
        new = {"x": _pass_on(y), "along": jax.tree.map(_pass_on, along)}
        leaving = {
            "x": _replace_last(_pass_back(entering["x"]), y),
            "along": jax.tree.map(_pass_back, entering["along"]),
        }
        new["waiting"] = jax.tree.map(
            lambda buffer, leaf: _stay(buffer.at[:, slot].set(leaf)), state["waiting"], leaving
        )
        if repeats > 1 and slots == 1:
            new["back"] = new["x"]
        elif repeats > 1:
            place = t % (slots - 1)
            new["back"] = state["delay"][:, place]
            returning = _replace_last(_pass_back(new["back"]), y)
            new["delay"] = _stay(state["delay"].at[:, place].set(returning))
        return new, outputs

    waiting = {"x": x, "along": travelling}
    waiting = jax.tree.map(
        lambda leaf: _stay(split(leaf).reshape(stages, slots, rows // microbatches, *leaf.shape[1:])), waiting
    )
    nothing = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:, 0]), waiting)
    state = {"waiting": waiting, **nothing}
    if repeats > 1:
        state["back"] = nothing["x"]
        if slots > 1:
            state["delay"] = jnp.zeros_like(waiting["x"][:, 1:])
    state, outputs = jax.lax.scan(iteration, state, jnp.arange(plan.iterations))
    # The result of the last microbatch came to the last stage in slot (iterations - 1) mod slots, and those
    # before it to the slots and stages before.
    x = jnp.roll(state["waiting"]["x"], -((stages - 1) % slots), axis=1)
    x = _join(x.reshape(microbatches, rows // microbatches, *x.shape[3:]), ways)
    return constrain(x, ("rows", "length", "embed")), jax.tree.map(
        functools.partial(_in_order, plan=plan), outputs
    )


def _closed(layer: Callable[..., tuple[jax.Array, Output]], shared: Mapping[str, Any]) -> Layer[jax.Array]:
    """A layer for run_layers. What it closes over is no part of a loop's state, so that no iteration keeps a
    copy of it for rematerialisation.
    """

    def closed(params: Any, x: jax.Array, key: jax.Array | None, kind: Hashable) -> tuple[jax.Array, Output]:
        return layer(params, x, dict(shared), key, kind)

    return closed


def _split(leaf: jax.Array, microbatches: int, ways: int) -> jax.Array:
    """`[batch, ...] -> [microbatches, batch / microbatches, ...]`; each device keeps its own rows."""
    leaf = leaf.reshape(ways, microbatches, -1, *leaf.shape[1:]).swapaxes(0, 1)
    return leaf.reshape(microbatches, -1, *leaf.shape[3:])


def _join(leaf: jax.Array, ways: int) -> jax.Array:
    """The inverse of _split."""
    leaf = leaf.reshape(leaf.shape[0], ways, -1, *leaf.shape[2:]).swapaxes(0, 1)
    return leaf.reshape(-1, *leaf.shape[3:])


def _stay(leaf: jax.Array) -> jax.Array:
    """A buffer `[stages, slots, rows, length, embed]`, each stage's part on its devices."""
    return constrain(leaf, (AXIS, None, "batch", "length", "embed"))


def _pass_on(leaf: jax.Array) -> jax.Array:
    """Each stage's array to the next stage, the last one's to the first."""
    return constrain(jnp.roll(leaf, 1, axis=0), (AXIS, "batch", "length", "embed"))


def _pass_back(leaf: jax.Array) -> jax.Array:
    return constrain(jnp.roll(leaf, -1, axis=0), (AXIS, "batch", "length", "embed"))


def _where(leaf: jax.Array, stage: int) -> jax.Array:
    return (jnp.arange(leaf.shape[0]) == stage % leaf.shape[0]).reshape(-1, *[1] * (leaf.ndim - 1))


def _enter(first: jax.Array, others: jax.Array) -> jax.Array:
    """What stage 0 gets, from one, and what the others get, from another."""
    return jnp.where(_where(first, 0), first, others)


def _replace_last(leaf: jax.Array, last: jax.Array) -> jax.Array:
    return jnp.where(_where(leaf, -1), last, leaf)


def _in_order(output: jax.Array, plan: Schedule) -> jax.Array:
    """`[iterations, stages, layers of a group, ...] -> [layers, ...]`, the sums over microbatches."""
    stages, microbatches, repeats = plan
    repeat, stage, microbatch = np.ogrid[:repeats, :stages, :microbatches]
    output = output[
        repeat * microbatches + microbatch + stage, stage
    ]  # [repeats, stages, microbatches, layers, ...]
    return output.sum(axis=2).reshape(-1, *output.shape[4:])


def _groups(leaf: jax.Array, plan: Schedule, mesh: Mesh) -> jax.Array:
    """`[layers, ...] -> [stages, repeats, layers of a group, ...]`, each stage's groups on its devices."""
    stages, _, repeats = plan
    leaf = leaf.reshape(stages, repeats, -1, *leaf.shape[1:])  # as stored: consecutive layers
    free = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
    leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(AXIS, *free)))
    return leaf if repeats == 1 else _deal(leaf, stages, repeats, mesh)


def _deal(leaf: jax.Array, stages: int, repeats: int, mesh: Mesh) -> jax.Array:
    """Groups to the stages that compute them: number j · repeats + i of stage j to stage (that) mod stages.

    In `repeats` rounds, in each of which every stage sends one group and receives one.
    """
    sends, receives, rounds = deal(stages, repeats)

    def exchange(mine: jax.Array, send: jax.Array, receive: jax.Array) -> jax.Array:
        mine = jnp.take(mine[0], send[0], axis=0)  # [rounds, layers of a group, ...]
        got = [jax.lax.ppermute(mine[i], AXIS, pairs) for i, pairs in enumerate(rounds)]
        return jnp.take(jnp.stack(got), receive[0], axis=0)[None]

    spec = PartitionSpec(AXIS)
    run = jax.shard_map(
        exchange, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, axis_names={AXIS}, check_vma=False
    )
    return run(leaf, jnp.asarray(sends), jnp.asarray(receives))


def deal(stages: int, repeats: int) -> tuple[np.ndarray, np.ndarray, list[list[tuple[int, int]]]]:
    """Rounds in which stored groups reach the stages that compute them.

    In round k stage j sends its group i = (k + j // (stages / g)) mod repeats, g the greatest common divisor
    of
    stages and repeats: j · repeats mod stages takes each multiple of g for g values of j, stages / g apart,
    and those send groups that differ mod g, so that no stage receives two.

    Returns:
      which of its groups each stage sends in each round, `[stages, rounds]`; for each stage and repeat the
      round in which its group came, `[stages, repeats]`; and by round the pairs (from, to).
    """
    apart = stages // math.gcd(stages, repeats)
    sends = (np.arange(repeats) + np.arange(stages)[:, None] // apart) % repeats
    number = np.arange(stages)[:, None] * repeats + sends  # of the group, in the order of layers
    receives = np.zeros((stages, repeats), np.int32)
    receives[number % stages, number // stages] = np.arange(repeats)
    rounds = [[(j, int(number[j, k]) % stages) for j in range(stages)] for k in range(repeats)]
    return sends.astype(np.int32), receives, rounds
