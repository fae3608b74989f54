"""Directories of Hugging Face's PEFT library (adapter_config.json, adapter_model.safetensors) <-> adapters.

LoRA with rsLoRA and DoRA, (IA)^3, prompt tuning and prefix tuning. Which module of theirs is which projection
of ours is read off the family's table of rows (convert_rows.py). A field of adapter_config.json that changes
what is computed and that we do not honour is an error that names it, as is a tensor without a place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5style import run_dir
from t5style.models import adapters, convert_stream, peft_virtual
from t5style.models.adapters import Adapter, Kernel, Lora, Tree
from t5style.models.adapters_vectors import Ia3
from t5style.models.adapters_virtual import PrefixTuning, PromptTuning
from t5style.models.config import TransformerConfig
from t5style.models.convert import family_of
from t5style.models.convert_stream import Placed
from t5style.models.families.registry import FAMILIES
from t5style.models.peft_virtual import CONFIG, WEIGHTS
from t5style.models.safetensors_files import Planned, Tensor, read_header, read_json, some, write_file
from t5style.run_dir import PathLike, UserError

_PREFIX = "base_model.model."
_KINDS = ("LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING")
# What says nothing about the function that is computed from the tensors in the file.
_INERT = (
    *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
    *("inference_mode", "megatron_core", "qalora_group_size", "runtime_config", "target_modules"),
    *("exclude_modules", "fan_in_fan_out", "init_ia3_weights"),
)
_READ = {
    "LORA": ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "init_lora_weights"),
    "IA3": ("feedforward_modules",),
    "PROMPT_TUNING": (
        *(
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_attention_heads",
            "num_layers",
        ),
        *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
    ),
    # Of a prefix that a network made, its output is in the file.
    "PREFIX_TUNING": (
        *(
            "num_virtual_tokens",
            "token_dim",
            "num_transformer_submodules",
            "num_attention_heads",
            "num_layers",
        ),
        *("encoder_hidden_size", "prefix_projection", "init_weights"),
    ),
}
# Initialisations that leave the base as it is; others (PiSSA, OLoRA, ...) train beside a changed one.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class _Module(NamedTuple):
    """A torch.nn.Linear for each layer, and the projection of ours that it is."""

    kernel: Kernel
    placed: Placed

    def name(self, layer: int) -> str:
        """Its name in the layer of this index in the stack."""
        return self.placed.names(layer, 0)[0].removesuffix(".weight")

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.placed.layers or (0,))

    @property
    def names(self) -> list[str]:
        """Of all layers."""
        return [self.name(layer) for layer in range(self.layers)]

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Our dimensions that are summed over, and those made."""
        _, inner, outer = self.kernel.split(self.kernel.shape)
        return inner, outer

    @property
    def conv1d(self) -> bool:
        """Whether theirs is `[input, output]`: transformers' Conv1D."""
        return self._outer_to_theirs(np.zeros((1, *self.sizes[1]), np.bool_), plain=False).shape[0] == 1

    def _thin(self, rows: int) -> tuple[int, ...]:
        """The shape of a kernel that has `rows` inputs: their transform orders its outputs."""
        return (rows, *[1] * (self.kernel.sums - 1), *self.sizes[1])

    def _outer_to_theirs(self, value: np.ndarray, plain: bool = True) -> np.ndarray:
        """`[n, *outer]` -> `[outputs, n]`."""
        made = self.placed.row.transform.to_theirs([value.reshape(self._thin(len(value)))])[0]
        return made.T if plain and self.conv1d else made

    def _outer_to_ours(self, value: np.ndarray) -> np.ndarray:
        """`[outputs, n]` -> `[n, *outer]`."""
        thin = self._thin(value.shape[1])
        value = value.T if self.conv1d else value
        return self.placed.row.transform.to_ours([value], [thin])[0].reshape(thin[0], *self.sizes[1])

    def codec(self, leaf: str, rank: int) -> _Codec:
        """How the parameter of this name is stored."""
        inner, outer = self.sizes
        inputs, outputs = math.prod(inner), math.prod(outer)
        return {
            "lora_a": _Codec(
                "lora_A.weight",
                (rank, inputs),
                lambda ours: ours.reshape(inputs, rank).T,
                lambda theirs: theirs.T.reshape(*inner, rank),
            ),
            "lora_b": _Codec("lora_B.weight", (outputs, rank), self._outer_to_theirs, self._outer_to_ours),
            "lora_magnitude": _Codec(
                "lora_magnitude_vector",
                (outputs,),
                lambda ours: self._outer_to_theirs(ours[None])[:, 0],
                lambda theirs: self._outer_to_ours(theirs[:, None])[0],
            ),
            "ia3_output": _Codec(
                "ia3_l",
                (outputs, 1),
                lambda ours: self._outer_to_theirs(ours[None]),
                lambda theirs: self._outer_to_ours(theirs)[0],
            ),
            "ia3_input": _Codec(
                "ia3_l",
                (1, inputs),
                lambda ours: ours.reshape(1, inputs),
                lambda theirs: theirs.reshape(inner),
            ),
        }[leaf]


class _Codec(NamedTuple):
    """One parameter of one layer: the end of their name, their shape, and the arrays both ways."""

    suffix: str
    shape: tuple[int, ...]
    to_theirs: Callable[[np.ndarray], np.ndarray]
    to_ours: Callable[[np.ndarray], np.ndarray]


# --- loading ---


def is_adapter(folder: PathLike) -> bool:
    """Whether a directory is one of PEFT's."""
    return (Path(folder) / CONFIG).is_file()


def base_name(folder: PathLike) -> str | None:
    """The directory or the name on the hub of the model that an adapter of PEFT's belongs to, if it says."""
    name = read_json(Path(folder) / CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def load(folder: PathLike, config: TransformerConfig, family: str | None = None) -> tuple[Adapter, Tree]:
    """An adapter of PEFT's, and its own parameters in float32.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      config: of the base.
      family: the base's model_type; None: the first that computes what the config says.

    Raises:
      UserError: a file is missing or damaged, a kind of adapter, a field or a tensor is not one we honour, or
        the adapter belongs to another model. The sentence names it.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG} is missing: a PEFT directory has it and {WEIGHTS}")
    theirs, where = read_json(folder / CONFIG), str(folder / CONFIG)
    _check_fields(theirs, where)
    tensors = _tensors(folder)
    if theirs["peft_type"] in ("PROMPT_TUNING", "PREFIX_TUNING"):
        return peft_virtual.read(folder, theirs, config, tensors)
    modules, every = _modules(config, family)
    wanted = _matched(theirs, "target_modules", every, where)
    known = {name for module in modules for name in module.names}
    if strange := sorted(wanted - known):
        raise UserError(
            f"{where}: target_modules has {strange[0]}, which is no projection of this model's layers that "
            f"an adapter can change; those are {some(sorted({name.rsplit('.', 1)[-1] for name in known}))}"
        )
    chosen = [module for module in modules if set(module.names) & wanted]
    if not chosen:
        raise UserError(f"{where}: target_modules = {theirs.get('target_modules')!r} names nothing here")
    for module in chosen:
        if left := sorted(set(module.names) - wanted):
            raise UserError(
                f"{where}: {left[0]} is not adapted and the same module of other layers is; we adapt a "
                "projection in all layers or in none"
            )
    if theirs["peft_type"] == "IA3":
        inside = _matched(theirs, "feedforward_modules", every, where)
        parts: dict[tuple[str, ...], tuple[str, ...]] = {}
        parts = {m.kernel.path: ("ia3_input" if m.name(0) in inside else "ia3_output",) for m in chosen}
        adapter: Adapter = Ia3(
            outputs=_exactly(path for path, leaves in parts.items() if leaves == ("ia3_output",)),
            inputs=_exactly(path for path, leaves in parts.items() if leaves == ("ia3_input",)),
        )
        rank = 1
    else:
        adapter = _lora(theirs, where, _exactly(module.kernel.path for module in chosen))
        leaves = ("lora_a", "lora_b", *(["lora_magnitude"] if adapter.dora else []))
        parts, rank = {module.kernel.path: leaves for module in chosen}, adapter.rank
    return adapter, _read(folder, tensors, chosen, parts, rank)


def _check_fields(theirs: Mapping[str, Any], where: str) -> None:
    kind = theirs.get("peft_type")
    if kind not in _KINDS:
        raise UserError(f"{where}: peft_type = {kind!r} is not one we load; {', '.join(_KINDS)} are")
    for name, value in theirs.items():
        if name not in (*_INERT, *_READ[kind]) and value not in (None, False, [], {}, ""):
            raise UserError(f"{where}: {name} = {value!r} is not supported; adapters without it are")
    if theirs.get("bias", "none") != "none":
        raise UserError(f"{where}: bias = {theirs['bias']!r} is not supported; only 'none' is")
    if (start := theirs.get("init_lora_weights", True)) not in _PLAIN_STARTS:
        raise UserError(
            f"{where}: init_lora_weights = {start!r} changes the base's weights, which we do not: save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion"
        )


def _lora(theirs: Mapping[str, Any], where: str, targets: Sequence[str]) -> Lora:
    values = {
        "rank": theirs.get("r", 8),
        "alpha": theirs.get("lora_alpha", 8),
        "dropout": theirs.get("lora_dropout", 0.0),
    }
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: {name} = {value!r} is not a number")
    flags = {"rslora": theirs.get("use_rslora"), "dora": theirs.get("use_dora")}
    try:
        return Lora(**values, **{name: bool(flag) for name, flag in flags.items()}, targets=targets)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _exactly(paths: Any) -> tuple[str, ...]:
    """Targets that are found in these paths of projections and in no others."""
    return tuple(f"^{'/'.join(path)}$" for path in paths)


def _modules(config: TransformerConfig, family: str | None) -> tuple[list[_Module], set[str]]:
    """The modules of the layers that are one projection of ours, and the names of all with a weight."""
    chosen = FAMILIES[family_of(config, family)[0]]
    placed = convert_stream.place(config, chosen.rows(config), chosen.architecture)
    kernels = {"/".join((*kernel.path, "kernel")): kernel for kernel in adapters.kernels(config)}
    modules = [
        _Module(kernels[one.paths[0]], one)
        for one in placed
        if len(one.paths) == len(one.row.names) == 1 and one.paths[0] in kernels
    ]
    names = {name for one in placed for name, _ in one.tensors() if name.endswith(".weight")}
    return modules, {name.removesuffix(".weight") for name in names}


def _matched(theirs: Mapping[str, Any], field: str, every: set[str], where: str) -> set[str]:
    """The names that a field of adapter_config.json chooses, as PEFT does: a list of names or ends of names,
    or a regular expression of whole names; less the excluded.
    """

    def find(field: str) -> set[str]:
        value = theirs.get(field)
        if isinstance(value, str):
            try:
                return {name for name in every if re.fullmatch(value, name)}
            except re.error as error:
                raise UserError(f"{where}: {field} = {value!r} is no regular expression ({error})") from None
        if value is not None and not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            raise UserError(f"{where}: {field} = {value!r} is neither a list of names nor a pattern")
        return {name for name in every if any(f".{name}".endswith(f".{end}") for end in value or ())}

    return find(field) - find("exclude_modules")


def _tensors(folder: Path) -> dict[str, Tensor]:
    if not (folder / WEIGHTS).is_file():
        hint = (
            "; adapter_model.bin can be saved again by PEFT"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise UserError(f"{folder / WEIGHTS} is missing{hint}")
    found = read_header(folder / WEIGHTS)
    # Some versions name the magnitude as the module that holds it in memory.
    return {name.replace("_magnitude_vector.weight", "_magnitude_vector"): t for name, t in found.items()}


def _read(
    folder: Path,
    tensors: Mapping[str, Tensor],
    modules: Sequence[_Module],
    parts: Mapping[tuple[str, ...], Sequence[str]],
    rank: int,
) -> Tree:
    """Our tree of what the file holds, once every tensor is seen to have its place and shape."""
    names: dict[tuple[_Module, str], list[str]] = {}
    for module in modules:
        for leaf in parts[module.kernel.path]:
            codec = module.codec(leaf, rank)
            names[module, leaf] = [f"{_PREFIX}{name}.{codec.suffix}" for name in module.names]
            for name in names[module, leaf]:
                if name not in tensors:
                    raise UserError(
                        f"{folder / WEIGHTS} lacks {name}, which {CONFIG} and this model call for"
                    )
                if tensors[name].shape != codec.shape:
                    raise UserError(
                        f"{folder / WEIGHTS}: the tensor {name} has shape {list(tensors[name].shape)}, and "
                        f"{CONFIG} and this model make it {list(codec.shape)}: is it for another model?"
                    )
    if left := sorted(set(tensors) - {name for each in names.values() for name in each}):
        raise UserError(f"{folder / WEIGHTS} has {len(left)} tensors with no place here: {some(left)}")
    leaves = {}
    for (module, leaf), each in names.items():
        codec = module.codec(leaf, rank)
        made = [codec.to_ours(tensors[name].read().astype(np.float32)) for name in each]
        leaves[(*module.kernel.path, leaf)] = jnp.asarray(
            np.stack(made) if module.kernel.stacked else made[0]
        )
    return adapters.nested(leaves)


# --- saving ---


def save(
    folder: PathLike,
    adapter: Adapter,
    config: TransformerConfig,
    own: Tree,
    base: str | None = None,
    family: str | None = None,
) -> None:
    """Writes a directory that PEFT loads on a transformers model of the base. Every process calls it.

    Args:
      folder: to be written; an existing one is replaced once the new one is complete.
      adapter, config, own: the adapter, its base's config, and the adapter's parameters.
      base: where the base is: the directory or the name on the hub of its transformers model.
      family: as for load.

    Raises:
      UserError: PEFT has no such adapter, or not for this model.
    """
    if isinstance(adapter, PromptTuning | PrefixTuning):
        _write(folder, *peft_virtual.planned(adapter, config, own, base))
        return
    if not isinstance(adapter, Lora | Ia3):
        raise UserError(f"a {type(adapter).__name__} is not a kind of adapter that we save for PEFT")
    modules, every = _modules(config, family)
    found = {module.kernel.path: module for module in modules}
    planned: list[Planned] = []
    inside, adapted = set(), set()
    conv1d = False
    for path, leaf in jax.tree_util.tree_leaves_with_path(own):
        *parts, name = (str(key.key) for key in path)
        if (module := found.get(tuple(parts))) is None:
            raise UserError(
                f"{'/'.join(parts)} is not a module of its own in transformers' model, so its {name} cannot "
                "be saved for PEFT"
            )
        conv1d |= module.conv1d
        adapted |= set(module.names)
        inside |= set(module.names) if name == "ia3_input" else set()
        codec = module.codec(name, adapter.rank if isinstance(adapter, Lora) else 1)
        value = peft_virtual.whole(leaf)
        layers = value if module.kernel.stacked else value[None]
        for name, layer in zip(module.names, layers, strict=True):
            key, made = f"{_PREFIX}{name}.{codec.suffix}", codec.to_theirs(layer)
            planned.append(Planned(key, made.shape, made.dtype, lambda made=made: made))  # type: ignore[misc]
    if conv1d and isinstance(adapter, Ia3):
        raise UserError("(IA)^3 of a model with Conv1D modules (GPT-2) cannot be saved for PEFT")
    theirs: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": "SEQ_2_SEQ_LM" if config.encoder_layers else "CAUSAL_LM",
        "inference_mode": True,
        "fan_in_fan_out": conv1d,
        "target_modules": _named(adapted, every),
    }
    if isinstance(adapter, Lora):
        theirs |= {"peft_type": "LORA", "r": adapter.rank, "lora_alpha": adapter.alpha, "bias": "none"}
        theirs |= {"lora_dropout": adapter.dropout, "use_rslora": adapter.rslora, "use_dora": adapter.dora}
    else:
        theirs |= {"peft_type": "IA3", "feedforward_modules": _named(inside, every)}
    _write(folder, theirs, planned)


def _write(folder: PathLike, theirs: Mapping[str, Any], planned: Sequence[Planned]) -> None:
    if jax.process_index() == 0:
        with run_dir.atomic_folder(folder) as made:
            write_file(Path(made) / WEIGHTS, planned)
            (Path(made) / CONFIG).write_text(json.dumps(theirs, indent=2, sort_keys=True) + "\n")
    run_dir.barrier("save_peft")


def _named(chosen: set[str], every: set[str]) -> list[str]:
    """Names for target_modules: the last parts of the modules', if they choose no others, else whole ones."""
    ends = {name.rsplit(".", 1)[-1] for name in chosen}
    return sorted(ends if {name for name in every if name.rsplit(".", 1)[-1] in ends} == chosen else chosen)
