"""The training step as a program: what training runs and what planning compiles, from the same arguments."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from t5style import run_dir
from t5style.data.pipeline import empty_batch
from t5style.models import params as model_params
from t5style.models.adapters import Adapter
from t5style.models.config import TransformerConfig
from t5style.nn import pipeline
from t5style.parallel import mesh as mesh_lib
from t5style.parallel import rules as rules_lib
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import Rules
from t5style.train import state as state_lib
from t5style.train.optimizer import Optimizer
from t5style.train.state import Trained, TrainState
from t5style.train.step import LanguageModelLoss, Loss, make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class TrainingProgram:
    """All that the compiled training step depends on. Attributes are those of pretrain.Pretrain, and:

    Attributes:
      adapter: what is trained in place of the model's parameters, which then are an argument of the step.
      heads: see state.Trained.
      custom_loss: what is learnt; None: the language model's cross-entropy.
      with_reference: the loss also gets the parameters of a reference model: with an adapter those of its
        base, else an argument of the step.
      reference_model: the reference's config, where it is another model; None: `model`.
      example: one row of a batch, for the shapes and dtypes; None: a batch of tokens (data.pipeline).
    """

    model: TransformerConfig
    lengths: Mapping[str, int]
    batch_size: int
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    rules: Rules = dataclasses.field(default_factory=Rules)
    steps: int = 1000
    accumulation: int = 1
    skip_nonfinite: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    adapter: Adapter | None = None
    heads: tuple[str, ...] = ()
    custom_loss: Loss | None = None
    with_reference: bool = False
    reference_model: TransformerConfig | None = None
    example: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size is {self.batch_size} and accumulation {self.accumulation}: the batch cannot be "
                "cut into that many equal microbatches. Make batch_size a multiple of accumulation."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1).")
        if self.z_loss < 0:
            raise ValueError(f"z_loss is {self.z_loss}; it must be 0 or more.")
        self.sides()

    def sides(self) -> dict[str, int]:
        """The lengths that the model reads, by side.

        Raises:
          ValueError: one is missing, or is no whole number from 1.
        """
        if not isinstance(self.lengths, Mapping):
            raise ValueError(
                f"lengths is {self.lengths!r}; it must be as {{'encoder': 512, 'decoder': 114}}."
            )
        sides = ("encoder", "decoder") if self.model.architecture == "encoder_decoder" else ("decoder",)
        missing = [side for side in sides if side not in self.lengths]
        if missing:
            raise ValueError(
                f"lengths is {dict(self.lengths)}; a {self.model.architecture} model also needs "
                f"{missing[0]!r}."
            )
        for side in sides:
            if not isinstance(self.lengths[side], int) or self.lengths[side] < 1:
                raise ValueError(
                    f"lengths[{side!r}] is {self.lengths[side]!r}; it must be a whole number from 1."
                )
        return {side: self.lengths[side] for side in sides}

    @functools.cached_property
    def loss(self) -> Loss:
        """What is learnt."""
        return self.custom_loss or LanguageModelLoss(self.model, self.label_smoothing, self.z_loss)

    @functools.cached_property
    def transform(self) -> optax.GradientTransformation:
        """The optimiser, as optax has it."""
        return self.optimizer.build(state_lib.logical_axes(self.trained), self.steps)

    @functools.cached_property
    def trained(self) -> Trained:
        """Which parameters are trained."""
        return Trained(self.model, self.adapter, tuple(self.heads))

    # --- what is not trained ---

    @functools.cached_property
    def frozen_models(self) -> dict[str, TransformerConfig]:
        """Models whose parameters are arguments of the step, by name: 'base', 'reference'."""
        models: dict[str, TransformerConfig] = {} if self.adapter is None else {"base": self.model}
        if self.with_reference and (self.adapter is None or self.reference_model is not None):
            models["reference"] = self.reference_model or self.model
        return models

    def merged(self, params: Any, frozen: Any = None) -> Any:
        """All of the model's parameters: what is trained, merged into what is `frozen` (see `freeze`)."""
        return self.trained.merged(params, (frozen or {}).get("base"))

    def reference(self, frozen: Any) -> Any:
        """The reference model's parameters: its own, or the base of the adapter."""
        return frozen["reference" if "reference" in self.frozen_models else "base"]

    def _prepared(self, name: str, params: Any) -> Any:
        prepare = getattr(self.adapter, "prepare", None)
        return params if name != "base" or prepare is None else prepare(self.model, params)

    def abstract_frozen(self, mesh: Mesh) -> tuple[Any, Any]:
        """Shapes and shardings of what the step is given beside the state: `{}`, or parameters by name."""
        abstract, shardings = {}, {}
        for name, config in self.frozen_models.items():
            with rules_lib.no_mesh():
                whole = state_lib.abstract_params(config)
                abstract[name] = jax.eval_shape(functools.partial(self._prepared, name), whole)
                axes = state_lib.logical_axes(config)
                prepared = getattr(self.adapter, "prepared_axes", None)
                if name == "base" and prepared is not None:
                    axes = prepared(self.model)
            shardings[name] = rules_lib.param_shardings(axes, abstract[name], mesh, self.rules)
        return abstract, shardings

    def freeze(self, mesh: Mesh, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What the step is given beside the state, of the parameters of the base or the reference model.

        Args:
          mesh: where they lie.
          parameters: by name those that `frozen_models` asks for, on the mesh; they are not copied.
        """
        _, shardings = self.abstract_frozen(mesh)
        frozen = {}
        for name in self.frozen_models:
            frozen[name] = parameters[name]
            if name == "base" and hasattr(self.adapter, "prepare"):
                prepare = functools.partial(self._prepared, name)
                frozen[name] = jax.jit(prepare, out_shardings=shardings[name])(parameters[name])
        return frozen

    # --- shapes ---

    def abstract(self, mesh: Mesh) -> tuple[TrainState, TrainState]:
        """Shapes and shardings of the state; nothing is allocated.

        Raises:
          ValueError: a parameter does not divide by the mesh, or layers and batch do not into its stages.
        """
        sides = {f"{side} layers": self.model.layers_of(side) for side in ("encoder", "decoder")}
        pipeline.check(sides, self.model.pipeline, mesh, self.batch_size, self.accumulation)
        abstract = state_lib.abstract_state(self.trained, self.transform)
        return abstract, state_lib.state_shardings(abstract, self.trained, mesh, self.rules)

    def flops_per_token(self) -> float:
        """Training FLOPs per position (models/params.flops_per_example has the convention)."""
        lengths = self.sides()
        return model_params.flops_per_token(self.model, lengths["decoder"], lengths.get("encoder", 0))

    def step(self, mesh: Mesh) -> Any:
        """The jitted step(state, batch, key[, frozen]) -> (state, metrics); its state is donated."""
        return jax.jit(
            make_train_step(
                self.loss,
                self.transform,
                self.optimizer.learning_rate.build(self.steps),
                accumulation=self.accumulation,
                skip_nonfinite=self.skip_nonfinite,
                **self._functions(),
            ),
            out_shardings=(self.abstract(mesh)[1], None),
            donate_argnums=0,
        )

    def eval_step(self) -> Any:
        """The jitted step(params, batch[, frozen]) -> metrics, of the trained parameters."""
        return jax.jit(make_eval_step(self.loss, **self._functions()))

    def _functions(self) -> dict[str, Any]:
        return {
            "merge": None if self.adapter is None else self.merged,
            "reference": self.reference if self.with_reference else None,
        }

    def begin(self, mesh: Mesh, seed: int, parent: Any = None) -> TrainState:
        """The state at step 0; parent: the model's parameters to start from, which the state may share; None:
        random ones.
        """
        if parent is None:
            return state_lib.init_state(self.trained, self.transform, mesh, self.rules, seed)
        if self.adapter is not None or self.heads:
            shardings = self.abstract(mesh)[1].params
            make = jax.jit(self.trained.init, out_shardings=shardings)
            parent = make(jax.random.key(seed), parent)
        elif "reference" in self.frozen_models and self.reference_model is None:
            parent = jax.tree.map(jnp.copy, parent)  # the step's own is overwritten
        return state_lib.init_state(self.trained, self.transform, mesh, self.rules, seed, parent)

    def arguments(self, mesh: Mesh) -> tuple[Any, ...]:
        """State, batch, key, and what is frozen if anything is, as shapes with shardings, on real or
        described devices.
        """
        rows = rules_lib.batch_sharding(mesh)
        example = empty_batch(1, self.sides()) if self.example is None else self.example
        batch = {
            name: jax.ShapeDtypeStruct((self.batch_size, *array.shape[1:]), array.dtype, sharding=rows)
            for name, array in example.items()
        }
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=mesh_lib.replicated(mesh))
        frozen = [state_lib.with_shardings(*self.abstract_frozen(mesh))] if self.frozen_models else []
        return state_lib.with_shardings(*self.abstract(mesh)), batch, key, *frozen

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """The step, traced and lowered for the mesh's devices.

        Raises:
          ValueError: the batch or a parameter does not divide by the mesh.
        """
        rules_lib.check_batch(self.batch_size, mesh, self.accumulation)
        with rules_lib.use_mesh(mesh, self.rules):
            return self.step(mesh).lower(*self.arguments(mesh))

    def compile(self, mesh: Mesh) -> jax.stages.Compiled:
        """The step compiled for the mesh's devices, with the mesh's compiler options."""
        return self.mesh.compile(self.lower(mesh))


def save_executable(compiled: jax.stages.Compiled, lowered: jax.stages.Lowered, path: epath.PathLike) -> None:
    """Writes a compiled step, with what tells for which program and compiler it was made."""
    payload, _, _ = serialize_executable.serialize(compiled)
    head = json.dumps(_identity(lowered)).encode()
    run_dir.atomic_write(epath.Path(path), len(head).to_bytes(8, "little") + head + payload)


def load_executable(path: epath.PathLike, lowered: jax.stages.Lowered, mesh: Mesh) -> Any:
    """The compiled step that `save_executable` wrote for this program.

    Like any program, it is to be loaded from places that one trusts only.

    Raises:
      UserError: there is none, or it was made from another program or by another jax.
    """
    place = epath.Path(path)
    if not place.exists():
        raise run_dir.UserError(
            f"there is no executable {place}: a plan with keep_executable=True writes one."
        )
    data = place.read_bytes()
    size = int.from_bytes(data[:8], "little")
    try:
        made = json.loads(data[8 : 8 + size])
    except ValueError:
        raise run_dir.UserError(
            f"{place} is no executable that a plan has written, or it is damaged."
        ) from None
    here = _identity(lowered)
    if different := [name for name in here if here[name] != made.get(name)]:
        which = different[0]
        raise run_dir.UserError(
            f"{place} was made for another {which}: {made.get(which)}, not {here[which]}. Plan again with "
            "this configuration, or leave the executable out and compile."
        )
    return serialize_executable.deserialize_and_load(
        data[8 + size :], lowered.in_tree, lowered.out_tree, execution_devices=list(mesh.devices.flat)
    )


def _identity(lowered: jax.stages.Lowered) -> dict[str, str]:
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
    return {"jax version": jax.__version__, "program": text}
