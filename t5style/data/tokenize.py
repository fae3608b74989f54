"""The job that turns documents into a token store."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus import vocabulary as vocabulary_lib
from t5style.corpus.document import Document, document_files, read_documents
from t5style.data.curriculum import order_of_kept, read_order
from t5style.data.store_manifest import document_keys
from t5style.data.token_store import MANIFEST, TokenStoreWriter
from t5style.run_dir import RunDir, UserError

# A piece of work for one process: at most this many documents, and about this many characters.
_CHUNK_DOCUMENTS = 512
_CHUNK_CHARACTERS = 1 << 20
# Starting a process costs about a second, and one process encodes ten megabytes in that time.
_BYTES_WORTH_A_PROCESS = 32 << 20

# Beside the documents of a split, int64 [documents]: their places, counted from 0, from easy to hard.
ORDER_FILE = "order.npy"

_FIELDS = tuple(field.name for field in dataclasses.fields(Document))


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """Documents → token store, in the run's folder.

    The store also keeps a hash of the id of each example's document (so that examples can be found again when
    a document is to be erased), and, where a split of the corpus has an `order.npy`, that order of its
    examples.

    Attributes:
      corpus: a prepared corpus (a folder with a folder of documents for each split), or one folder or file of
        documents, which becomes the split `train`.
      vocabulary: folder or file of the vocabulary.
      features: name → template over a document's fields, as in `str.format`: `{text}`, `{source}`,
        `{meta[title]}`. A document that lacks a field of a template, or has nothing to say in one, is skipped
        and counted.
      splits: which of the corpus's splits; None for all.
      sources: only documents of these sources; None for all.
      max_tokens: feature → longest example in tokens, longer ones are cut (None: nothing is cut).
      append_eos: end every example with the end-of-sequence token (as T5's inputs and targets do).
      workers: processes; None for as many as there are cores, if the corpus is large enough to be worth it.
    """

    corpus: str = "run:corpus"
    vocabulary: str = "run:vocabulary"
    features: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"text": "{text}"})
    splits: Sequence[str] | None = None
    sources: Sequence[str] | None = None
    max_tokens: Mapping[str, int] | None = None
    append_eos: bool = True
    workers: int | None = dataclasses.field(default=None, metadata={"affects_result": False})

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("features is empty; give at least one, such as {'text': '{text}'}.")
        for feature, template in self.features.items():
            if not feature.isidentifier():
                raise ValueError(f"Feature name {feature!r} must be made of letters, digits and underscores.")
            for name in template_fields(template):
                if name not in _FIELDS:
                    raise ValueError(
                        f"The template of feature {feature!r}, {template!r}, names the field {name!r}; a "
                        f"document "
                        f"has {', '.join(_FIELDS)}."
                    )
        for feature, limit in (self.max_tokens or {}).items():
            if feature not in self.features or limit < 1:
                raise ValueError(
                    f"max_tokens has {feature!r}: {limit}; it takes lengths of at least 1 for "
                    f"{', '.join(self.features)}."
                )
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1.")

    def inputs(self) -> Sequence[str]:
        return [self.corpus, self.vocabulary]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        vocabulary = vocabulary_lib.load(self.vocabulary)
        folders = split_folders(self.corpus, self.splits)
        # A store that is still here was finished, but the run was not recorded as done: make it anew.
        (epath.Path(run.path) / MANIFEST).unlink(missing_ok=True)
        figures: dict[str, Any] = {}
        sources: collections.Counter[str] = collections.Counter()
        description: dict[str, Any] = {"features": dict(self.features), "sources": sources}
        writer = TokenStoreWriter(os.fspath(run.path), tuple(self.features), vocabulary, description)
        with writer:
            for split, folder in folders.items():
                writer.add_split(split)
                figures[split] = self._tokenize_split(split, folder, writer, sources)
        manifest = writer.manifest
        for split, counts in figures.items():
            stored = manifest["splits"][split]["features"]
            counts |= {f"{feature}_tokens": stored[feature]["tokens"] for feature in self.features}
        if not any(counts["examples"] for counts in figures.values()):
            (epath.Path(run.path) / MANIFEST).unlink(missing_ok=True)
            raise UserError(
                f"None of the documents in {self.corpus} gave an example ({figures}); "
                "check the templates in features, and sources."
            )
        rows = [
            [split, counts["documents"], counts["examples"], sum(counts["skipped"].values())]
            + [counts[f"{feature}_tokens"] for feature in self.features]
            for split, counts in figures.items()
        ]
        console.table(
            f"Token store {run.path}",
            [
                "split",
                "documents",
                "examples",
                "skipped",
                *(f"{feature} tokens" for feature in self.features),
            ],
            rows,
        )
        return {
            "splits": figures,
            "fingerprint": manifest["fingerprint"],
            "vocab_size": vocabulary.vocab_size,
        }

    def _tokenize_split(
        self, split: str, folder: epath.Path, writer: TokenStoreWriter, sources: collections.Counter[str]
    ) -> dict[str, Any]:
        documents = examples = 0
        skipped: collections.Counter[str] = collections.Counter()
        num_bytes = dict.fromkeys(self.features, 0)
        wanted = None if self.sources is None else set(self.sources)
        chunks = _chunks(read_documents(folder))
        kept: list[np.ndarray] = []
        with console.progress(f"tokenize {split}", None, unit="docs") as bar:
            for encoded in self._encoded(folder, chunks, wanted):
                writer.add_many(split, encoded.tokens, encoded.lengths, encoded.keys)
                kept.append(encoded.kept)
                documents += encoded.documents
                examples += encoded.sources.total()
                skipped += encoded.skipped
                num_bytes = {feature: n + encoded.num_bytes[feature] for feature, n in num_bytes.items()}
                sources += encoded.sources
                bar.advance(encoded.documents)
        if folder.is_dir() and (folder / ORDER_FILE).exists():
            order = read_order(folder / ORDER_FILE, documents)
            writer.set_curriculum(split, order_of_kept(order, np.concatenate(kept)))
        figures = {"documents": documents, "examples": examples, "skipped": dict(skipped)}
        return figures | {f"{feature}_bytes": n for feature, n in num_bytes.items()}

    def _encoded(
        self, folder: epath.Path, chunks: Iterator[list[Document]], wanted: set[str] | None
    ) -> Iterator[_Encoded]:
        """The chunks' examples, in order, however many processes make them."""
        work = functools.partial(
            _encode_chunk,
            vocabulary=self.vocabulary,
            features=dict(self.features),
            max_tokens=dict(self.max_tokens or {}),
            append_eos=self.append_eos,
            sources=wanted,
        )
        workers = self.workers
        if workers is None:
            size = sum(file.stat().length for file in document_files(folder))
            workers = max(1, min(os.cpu_count() or 1, size // _BYTES_WORTH_A_PROCESS))
        if workers == 1:
            yield from map(work, chunks)
            return
        # Spawned, not forked: a fork of a process with threads (TensorStore's) may hang.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            pending: collections.deque[concurrent.futures.Future[_Encoded]] = collections.deque()
            for chunk in chunks:
                pending.append(pool.submit(work, chunk))
                if len(pending) > 2 * workers:  # bounds what is in memory
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A chunk's examples: for each feature its tokens, flat int32, the examples' lengths, and the bytes of
    the text that they say; the keys of their documents (uint64) and which of the chunk's documents those are
    (bool); and how many examples each source gave, and documents each reason cost.
    """

    tokens: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    num_bytes: dict[str, int]
    keys: np.ndarray
    kept: np.ndarray
    sources: collections.Counter[str]
    skipped: collections.Counter[str]
    documents: int


def split_folders(path: str, splits: Sequence[str] | None = None) -> dict[str, epath.Path]:
    """The folders of documents of a corpus's splits (all of them, or these); one folder or file of documents
    is the split `train`.

    Raises: UserError where there is no corpus, or no such split.
    """
    corpus = epath.Path(path)
    if not corpus.exists():
        raise UserError(f"There is no corpus at {path}; prepare one, or correct the path.")
    found: dict[str, epath.Path] = {}
    if corpus.is_dir():
        for child in sorted(corpus.iterdir()):
            if child.is_dir() and child.name[0] != "." and any(child.glob("documents-*")):
                found[child.name] = child
    if not found:
        document_files(path)  # raises where there are none
        found = {"train": corpus}
    if splits is None:
        return found
    for split in splits:
        if split not in found:
            raise UserError(f"Corpus {path} has no split {split!r}, only {', '.join(found)}.")
    return {split: found[split] for split in splits}


def template_fields(template: str) -> list[str]:
    """The document fields a template names. Raises ValueError for a template that is not one."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"Template {template!r}: {error}; write a literal brace twice, '{{{{'.") from error
    return [name.partition("[")[0].partition(".")[0] for name in names]


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if len(chunk) >= _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@functools.lru_cache(maxsize=1)
def _vocabulary(path: str) -> vocabulary_lib.Vocabulary:
    return vocabulary_lib.load(path)


def _encode_chunk(
    documents: list[Document],
    vocabulary: str,
    features: Mapping[str, str],
    max_tokens: Mapping[str, int],
    append_eos: bool,
    sources: set[str] | None,
) -> _Encoded:
    """One chunk's examples; runs in a worker process, which loads the vocabulary once."""
    loaded = _vocabulary(vocabulary)
    kept: collections.Counter[str] = collections.Counter()
    skipped: collections.Counter[str] = collections.Counter()
    columns: list[list[str]] = []
    is_kept = np.zeros(len(documents), bool)
    for number, document in enumerate(documents):
        if sources is not None and document.source not in sources:
            skipped["source not asked for"] += 1
            continue
        rendered = _render(document, features)
        if isinstance(rendered, str):
            skipped[rendered] += 1
        else:
            kept[document.source] += 1
            is_kept[number] = True
            columns.append(rendered)
    end = np.array([loaded.eos_id] if append_eos else [], np.int32)
    tokens, lengths, num_bytes = {}, {}, {}
    for feature, texts in zip(
        features, zip(*columns, strict=True) if columns else [()] * len(features), strict=True
    ):
        limit = max_tokens.get(feature)
        whole = loaded.encode_batch(texts)
        encoded = whole if limit is None else [ids[: limit - len(end)] for ids in whole]
        pieces = [part for ids in encoded for part in (ids, end)]
        tokens[feature] = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        lengths[feature] = np.array([len(ids) + len(end) for ids in encoded], np.int64)
        num_bytes[feature] = sum(
            len((text if len(part) == len(ids) else loaded.decode(part)).encode("utf-8", "replace"))
            for text, ids, part in zip(texts, whole, encoded, strict=True)
        )
    keys = document_keys(documents[number].id for number in np.flatnonzero(is_kept))
    return _Encoded(tokens, lengths, num_bytes, keys, is_kept, kept, skipped, len(documents))


class _Template(string.Formatter):
    """`str.format`, but a field that is None, JSON's null, is a missing one."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        if value is None:
            raise KeyError(field_name.rpartition("[")[2].rstrip("]"))
        return value, first


_TEMPLATE = _Template()


def _render(document: Document, features: Mapping[str, str]) -> list[str] | str:
    """The features' texts, or the reason why the document has none."""
    fields = {name: getattr(document, name) for name in _FIELDS}
    texts = []
    for feature, template in features.items():
        try:
            text = _TEMPLATE.vformat(template, (), fields)
        except KeyError as error:
            return f"no {error.args[0]} for {feature}"
        except (IndexError, AttributeError, TypeError, ValueError) as error:
            return f"{feature}: {error}"
        if not text.strip():
            return f"empty {feature}"
        texts.append(text)
    return texts
