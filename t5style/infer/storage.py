"""Where models come from and go to: run folders, checkpoints, Hugging Face directories."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from t5style.corpus import vocabulary as vocabulary_lib
from t5style.corpus.vocabulary import SentencePieceVocabulary, TokenizerVocabulary, Vocabulary
from t5style.infer import embedding, gguf_vocabulary
from t5style.infer.embedding import Embedding
from t5style.infer.ids import TokenIds, token_ids
from t5style.models import adapters, convert, peft, t5x
from t5style.models.adapters import Adapter
from t5style.models.adapters_quantized import QLora
from t5style.models.config import DTYPES, TransformerConfig
from t5style.models.gguf import GgufFile
from t5style.models.gguf_tables import gguf_config, load_gguf
from t5style.models.params import abstract_params
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import param_shardings
from t5style.run_dir import PathLike, UserError, atomic_write
from t5style.train import checkpoint
from t5style.train import state as state_lib
from t5style.train.state import Trained

MODEL_FILE, VOCABULARY_FOLDER, CHECKPOINTS, IDS = "model.json", "vocabulary", "checkpoints", "token_ids.json"
# In the order they are looked for. A SentencePiece model comes first: reading it needs no optional library.
TOKENIZER_FILES = ("vocabulary.json", "spiece.model", "tokenizer.model", "tokenizer.json")
T5_EXTRA_IDS = 100  # transformers' default; spiece.model does not hold the sentinels


@dataclasses.dataclass(frozen=True)
class Held:
    """An adapter in memory: its settings, its own parameters, and where it comes from."""

    adapter: Adapter
    own: Any
    path: str


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a model is made of, as it lies on disk; `ids` None: those of the vocabulary; `family`: the
    model_type of the Hugging Face directory it comes from, None for others; `embedding`: what that directory
    says about making embeddings, None for nothing; `held`: the adapter that is in `params`, and `base` then
    what these are without it.
    """

    config: TransformerConfig
    params: Any
    vocabulary: Vocabulary | None
    ids: TokenIds | None = None
    mesh: Mesh | None = None
    path: str = ""
    family: str | None = None
    embedding: Embedding | None = None
    base: Any = None
    held: Held | None = None

    @property
    def encoder_decoder(self) -> bool:
        """Whether there is an encoder."""
        return self.config.architecture == "encoder_decoder"


def load(path: PathLike, dtype: Any = None, mesh: Mesh | MeshConfig | None = None) -> Stored:
    """See model.load."""
    folder = epath.Path(path)
    if not folder.exists():
        raise UserError(
            f"there is no model at {os.fspath(path)!r}: no such file or folder (looked from {os.getcwd()})"
        )
    name = _dtype_name(dtype)
    if isinstance(mesh, MeshConfig):
        mesh = mesh.build(jax.local_devices())
    if folder.suffix == ".gguf":
        return _load_gguf(folder, name or "float32", mesh)
    if not folder.is_dir():
        raise UserError(
            f"{folder} is a file: give a .gguf file, or the folder it lies in (a run folder or a Hugging "
            "Face directory)"
        )
    if (run := _run_folder(folder)) is not None:
        return _load_run(folder, run, name, mesh)
    if t5x.is_t5x(folder):
        config, params = t5x.load_t5x(folder, name or "float32", mesh=mesh)
        return Stored(config, params, _tokenizer(folder, config), mesh=mesh, path=os.fspath(folder))
    if (folder / "config.json").exists():
        return _load_huggingface(folder, name or "float32", mesh)
    if peft.is_adapter(folder):
        below = peft.base_name(folder)
        if below is None or not epath.Path(below).exists():
            raise UserError(
                f"{folder} is an adapter of PEFT's for the model {below!r}, which is not here: give that "
                "model, and adapter=..."
            )
        return with_adapter(load(below, dtype, mesh), folder, below)
    holds = sorted(
        entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir() if entry.name[0] != "."
    )
    shown = ", ".join(holds[:12]) + (", …" if len(holds) > 12 else "") if holds else "nothing"
    inner = [entry.rstrip("/") for entry in holds if (folder / entry / MODEL_FILE).exists()]
    raise UserError(
        f"{folder} is no model: it holds {shown}; looked for {MODEL_FILE} (a run folder), "
        "state/ (a checkpoint in one), config.json with safetensors (a Hugging Face directory), or a T5X "
        "checkpoint" + (f". It holds the run folders {', '.join(inner)}: name one of them" if inner else "")
    )


def describe(path: PathLike) -> Stored:
    """What `load` finds beside the parameters, which are None here and not read.

    Raises:
      UserError: there is no run folder, checkpoint, Hugging Face directory or .gguf file.
    """
    folder = epath.Path(path)
    place = os.fspath(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        file = GgufFile(place)
        own = gguf_vocabulary.vocabulary(file.metadata, place)
        ids = gguf_vocabulary.token_ids(file.metadata, own) if own is not None else None
        return Stored(gguf_config(file), None, own, ids, path=place)
    if (run := _run_folder(folder)) is not None:
        config = TransformerConfig.from_json((run / MODEL_FILE).read_text())
        held = run / VOCABULARY_FOLDER
        words = vocabulary_lib.load(held) if held.exists() else None
        ids = _run_ids(run) or (token_ids(words) if words is not None else None)
        return Stored(config, None, words, ids, path=place)
    if not (folder / "config.json").exists():
        raise UserError(
            f"there is no model at {place!r}: give a run folder, a checkpoint, a Hugging Face directory"
        )
    described, other = _read_json(folder / "config.json"), folder / "generation_config.json"
    config = convert.huggingface_config(place)
    words = _tokenizer(folder, config)
    fields = {**(_read_json(other) if other.exists() else {}), **_without_none(described)}
    ids = _huggingface_ids(folder, config, fields, words)
    return Stored(config, None, words, ids, path=place, family=described["model_type"])


def _dtype_name(dtype: Any) -> str | None:
    if dtype is None:
        return None
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}: give one of {', '.join(DTYPES)}")
    return name


# ------------------------------------------------------------------------------------------------ run folders


def _run_folder(folder: epath.Path) -> epath.Path | None:
    """The run folder of a run folder, its checkpoints folder, or one of its checkpoints; None for anything
    else.
    """
    if (folder / MODEL_FILE).exists():
        return folder
    for parent in (folder.parent, folder.parent.parent):
        if parent.name != folder.name and (parent / MODEL_FILE).exists() and (parent / CHECKPOINTS).is_dir():
            inside = folder.name == CHECKPOINTS or folder.parent.name == CHECKPOINTS
            return parent if inside else None
    return None


def _run_ids(run: epath.Path) -> TokenIds | None:
    """Special ids that a tuned run has from its parent; None for the vocabulary's."""
    if not (run / IDS).exists():
        return None
    fields = _read_json(run / IDS)
    return TokenIds(**{**fields, "eos": tuple(fields["eos"])})


def _load_run(folder: epath.Path, run: epath.Path, dtype: str | None, mesh: Mesh | None) -> Stored:
    try:
        config = TransformerConfig.from_json((run / MODEL_FILE).read_text())
    except ValueError as error:
        raise UserError(f"{run / MODEL_FILE}: {error}") from None
    if dtype is not None:
        config = config.replace(dtype=dtype, param_dtype=dtype)
    vocabulary = None
    if (run / VOCABULARY_FOLDER).exists():
        vocabulary = vocabulary_lib.load(run / VOCABULARY_FOLDER)
    stored = Stored(config, None, vocabulary, _run_ids(run), mesh, os.fspath(folder))
    if not (run / adapters.FILE).exists():
        return dataclasses.replace(stored, params=_trained(folder, config, None, dtype, mesh))
    path = adapter_base(run)
    if not epath.Path(path).exists():
        raise UserError(
            f"{run} is an adapter for the model {path}, which is not there any more: put it back, or correct "
            f"'base' in {run / adapters.FILE}"
        )
    below = load(path, dtype or config.param_dtype, mesh)
    if abstract_params(below.config) != abstract_params(config):
        raise UserError(
            f"{run} is an adapter for another model than {path}: its parameters have other shapes"
        )
    # The adapter's run may have changed fields that are not of the parameters.
    return with_adapter(dataclasses.replace(stored, params=below.params, family=below.family), folder, path)


def _trained(
    folder: epath.Path,
    config: TransformerConfig,
    adapter: Adapter | None,
    dtype: str | None,
    mesh: Mesh | None,
) -> Any:
    """What a run has trained: the model's parameters or its adapter's. Heads beside them are left out."""
    heads = tuple(checkpoint.read_metadata(checkpoint.find(folder)).get("heads", ()))
    trained = Trained(config, adapter, heads)
    abstract = state_lib.abstract_params(trained)
    axes, shardings = state_lib.logical_axes(trained), None
    if mesh is not None:
        shardings = param_shardings(axes, abstract, mesh, part=adapter is not None)
    own = checkpoint.restore_params(folder, shardings, dtype, abstract)
    return {name: value for name, value in own.items() if name not in heads}


# --------------------------------------------------------------------------------------------------- adapters


def adapter_base(run: epath.Path) -> str:
    """Where the base of the adapter in a run folder is, as its adapter.json says."""
    return str(_description(run)["base"])


def _description(run: epath.Path) -> dict[str, Any]:
    described = _read_json(run / adapters.FILE)
    if lacking := [name for name in ("type", "settings", "base", "probes") if name not in described]:
        raise UserError(f"{run / adapters.FILE} lacks {lacking[0]!r}: it is damaged")
    return described


def with_adapter(stored: Stored, path: PathLike, place: str) -> Stored:
    """A model with an adapter in its parameters, which were loaded from `place`."""
    held = load_adapter(path, stored, stored.params, place)
    base = stored.params
    if isinstance(held.adapter, QLora):  # as it was trained
        base = jax.jit(functools.partial(held.adapter.prepare, stored.config))(base)
    params = held.adapter.apply(stored.config, base, held.own)
    return dataclasses.replace(stored, params=params, base=base, held=held)


def load_adapter(path: PathLike, model: Any, base: Any, place: str) -> Held:
    """An adapter for a model.

    Args:
      path: a run folder or checkpoint in which it was trained, or a directory of PEFT's.
      model: the model (a Stored, or infer.model.Model): its config, family and mesh.
      base: its parameters without an adapter.
      place: where these come from.

    Raises:
      UserError: there is none, it is damaged, or it belongs to another model.
    """
    folder, mesh = epath.Path(path), model.mesh
    if peft.is_adapter(folder):
        adapter, own = peft.load(folder, model.config, model.family)
        if mesh is not None:
            own = jax.device_put(own, param_shardings(adapter.axes(model.config), own, mesh, part=True))
        return Held(adapter, own, os.fspath(folder))
    run = _run_folder(folder) if folder.exists() else None
    if run is None or not (run / adapters.FILE).exists():
        raise UserError(
            f"there is no adapter at {os.fspath(path)!r}: give a run folder in which one was trained "
            f"({adapters.FILE}), or a PEFT directory ({peft.CONFIG})"
        )
    described = _description(run)
    try:
        adapter = adapters.described(described)
    except ValueError as error:
        raise UserError(f"{run}: {error}") from None
    if not adapters.belongs(described, base):
        theirs = described["base"]
        found = "another one is there now" if place == theirs else f"this is the one at {place}"
        raise UserError(
            f"{run} is an adapter for the model that was at {theirs}, but {found} (its parameters differ): "
            "load the model that it was trained on, or train the adapter on this one"
        )
    own = _trained(folder, model.config, adapter, None, mesh)
    return Held(adapter, own, os.fspath(folder))


# ----------------------------------------------------------------------------------- Hugging Face directories


def _load_gguf(path: epath.Path, dtype: str, mesh: Mesh | None) -> Stored:
    file = GgufFile(os.fspath(path))
    config, params = load_gguf(file, dtype, mesh=mesh)
    vocabulary = gguf_vocabulary.vocabulary(file.metadata, str(path))
    ids = gguf_vocabulary.token_ids(file.metadata, vocabulary) if vocabulary is not None else None
    return Stored(config, params, vocabulary, ids, mesh, path=os.fspath(path))


def _load_huggingface(folder: epath.Path, dtype: str, mesh: Mesh | None) -> Stored:
    described = _read_json(folder / "config.json")
    generation = (
        _read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    )
    config, params = convert.load_huggingface(os.fspath(folder), dtype, mesh=mesh)
    vocabulary = _tokenizer(folder, config)
    ids = _huggingface_ids(folder, config, {**generation, **_without_none(described)}, vocabulary)
    how = embedding.read(folder) if config.encoder_layers else None
    return Stored(config, params, vocabulary, ids, mesh, os.fspath(folder), described["model_type"], how)


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _tokenizer(folder: epath.Path, config: TransformerConfig) -> Vocabulary | None:
    """The directory's vocabulary, or None if it has no tokenizer file."""
    name = next((name for name in TOKENIZER_FILES if (folder / name).exists()), None)
    if name is None:
        return None
    if name.endswith(".model") and config.encoder_layers:
        settings = folder / "tokenizer_config.json"
        described = _read_json(settings) if settings.exists() else {}
        if described.get("extra_ids") is None:
            return vocabulary_lib.load(folder / name, extra_ids=T5_EXTRA_IDS)
    return vocabulary_lib.load(folder / name)


def _huggingface_ids(
    folder: epath.Path, config: TransformerConfig, described: Mapping[str, Any], vocabulary: Vocabulary | None
) -> TokenIds:
    """Special ids: what config.json says, then generation_config.json, then the tokenizer."""
    own = token_ids(vocabulary) if vocabulary is not None else TokenIds(eos=())
    eos = described.get("eos_token_id")
    ends = own.eos if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),)
    pad = described.get("pad_token_id")
    pad = own.pad if pad is None or not 0 <= pad < config.vocab_size else pad
    start = described.get("decoder_start_token_id")
    return TokenIds(
        pad=int(pad),
        eos=ends,
        start=int(pad if start is None else start),
        prefix=None if config.architecture == "encoder_decoder" else _prefix(folder, described, vocabulary),
    )


def _prefix(folder: epath.Path, described: Mapping[str, Any], vocabulary: Vocabulary | None) -> int | None:
    """What the directory's tokenizer puts before a text, if anything."""
    settings = folder / "tokenizer_config.json"
    adds = _read_json(settings).get("add_bos_token") if settings.exists() else None
    bos = described.get("bos_token_id")
    bos = vocabulary.bos_id if bos is None and vocabulary is not None else bos
    if adds is None and isinstance(vocabulary, TokenizerVocabulary) and (folder / "tokenizer.json").exists():
        import tokenizers  # there, since a TokenizerVocabulary is

        encoded = tokenizers.Tokenizer.from_file(os.fspath(folder / "tokenizer.json")).encode("a").ids
        adds = bool(encoded) and encoded[0] == bos
    if adds is None:
        adds = (
            vocabulary is not None
        )  # SentencePiece tokenizers of this family add it, and so do models trained here
    return int(bos) if adds and bos is not None else None


def save_huggingface(model: Stored, path: PathLike) -> None:
    """See Model.save."""
    assert model.ids is not None
    extra: dict[str, Any] = {"pad_token_id": model.ids.pad, "eos_token_id": _one_or_list(model.ids.eos)}
    if model.encoder_decoder:
        extra["decoder_start_token_id"] = model.ids.start
    else:
        extra["bos_token_id"] = model.ids.prefix
    also = functools.partial(_save_beside, model)
    convert.save_huggingface(path, model.config, model.params, family=model.family, extra=extra, also=also)


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


def _save_beside(model: Stored, folder: epath.Path) -> None:
    if model.vocabulary is not None:
        _save_tokenizer(model, folder)
    if model.embedding is not None:
        embedding.write(model.embedding, model.config.d_model, folder)


def _save_tokenizer(model: Stored, folder: epath.Path) -> None:
    """Our vocabulary files, and under the names transformers looks for where it can read such a vocabulary.

    Character and byte vocabularies have no Hugging Face form that reads our ids: `load` reads
      vocabulary.json.
    """
    vocabulary = model.vocabulary
    assert vocabulary is not None
    assert model.ids is not None
    vocabulary.save(folder)
    settings: dict[str, Any] = {"extra_ids": vocabulary.extra_ids}
    if isinstance(vocabulary, SentencePieceVocabulary) and (fast := _tokenizer_json(vocabulary, model)):
        # Ours take text as it is; transformers' T5Tokenizer would put a space before it.
        atomic_write(folder / "tokenizer.json", fast)
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    elif isinstance(vocabulary, SentencePieceVocabulary):
        name = "spiece.model" if model.encoder_decoder else "tokenizer.model"
        atomic_write(folder / name, vocabulary.content)
        settings["tokenizer_class"] = "T5Tokenizer" if model.encoder_decoder else "LlamaTokenizer"
    if not model.encoder_decoder:
        settings["add_bos_token"] = model.ids.prefix is not None
    atomic_write(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def _unigram_pieces(vocabulary: SentencePieceVocabulary) -> list[tuple[str, float]] | None:
    """Pieces and scores of a unigram model that takes text as it is; None for any other model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.content)
    normalizes = processor.encode("a  \ufb01", out_type=str)[:1] == ["\u2581"] or (
        processor.normalize(" a  \ufb01 ") != "\u2581a\u2581\u2581\ufb01\u2581"
    )
    scores = [processor.get_score(i) for i in range(vocabulary.base_size)]
    # BPE numbers its merges; the scores of a unigram model are logarithms of probabilities.
    if normalizes or all(score == int(score) for score in scores):
        return None
    return [(processor.id_to_piece(i), score) for i, score in enumerate(scores)]


def _tokenizer_json(vocabulary: SentencePieceVocabulary, model: Stored) -> str | None:
    """A unigram SentencePiece model without text normalisation, as the tokenizers library reads it; None for
    any other, and where that library is not installed.
    """
    try:
        import tokenizers
        from tokenizers import decoders, models, normalizers, processors
    except ImportError:
        return None
    pieces = _unigram_pieces(vocabulary)
    if pieces is None:
        return None
    assert model.ids is not None
    size = vocabulary.vocab_size
    sentinels = [(f"<extra_id_{size - 1 - i}>", 0.0) for i in range(len(pieces), size)]
    tokenizer = tokenizers.Tokenizer(
        models.Unigram([*pieces, *sentinels], vocabulary.unk_id, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [pieces[i][0] for i in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id)]
    tokenizer.add_special_tokens([*special, *(name for name, _ in sentinels)])
    end = pieces[vocabulary.eos_id][0]
    if model.encoder_decoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, vocabulary.eos_id)]
        )
    elif model.ids.prefix is not None:
        start = pieces[model.ids.prefix][0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", pair=f"{start} $A $B", special_tokens=[(start, model.ids.prefix)]
        )
    return str(tokenizer.to_str())
