"""Takes documents, and what is nearly the same, out of a finished corpus: shards, index, examples and cards.

Used by the job data/erase.py. Nothing that says what was erased stays behind but salted hashes, by which a
corpus that extends this one knows a document that must not come back.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus import dedup, plan
from t5style.corpus.deal import TABLES, count_in
from t5style.corpus.document import (
    Document,
    document_files,
    open_lines,
    read_documents,
    read_ids,
    save_array,
    write_documents,
)
from t5style.corpus.engines import Engine
from t5style.corpus.normalize import normalize
from t5style.run_dir import MANIFEST, UserError, atomic_write, fingerprint

REASON = "erased on request"
_PENDING = ".erasing.json"
_STAGING, _READY = ".erasing", "ready"
_PIECE = re.compile(r"#(?:copy\d+|tail)$")  # what Prepare adds to the ids of copies and cut documents


@dataclasses.dataclass(frozen=True)
class Requests:
    """Documents to be erased: by id, or by text."""

    ids: frozenset[str]
    texts: tuple[str, ...]


def read_requests(path: epath.PathLike) -> Requests:
    """Requests from JSON lines of {"id": ...} or {"text": ...} (.gz, .zst too).

    Raises:
      UserError: a line is something else, or there is none.
    """
    ids: list[str] = []
    texts: list[str] = []
    with open_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                (kind, value), *more = record.items()
            except (ValueError, AttributeError):
                kind, value, more = "", "", []
            if kind not in ("id", "text") or more or not isinstance(value, str) or not value.strip():
                raise UserError(
                    f'{path}, line {number}: each line must be {{"id": "..."}} or {{"text": "..."}}, '
                    f"not {line[:80]!r}"
                )
            (ids if kind == "id" else texts).append(value)
    if not ids and not texts:
        raise UserError(f"{path} holds no requests: give one JSON object per line")
    return Requests(frozenset(map(base_id, ids)), tuple(texts))


def base_id(id: str) -> str:
    """The id that a document had before it was copied or cut in two."""
    return _PIECE.sub("", id)


def find(corpus: epath.Path, requests: Requests, similarity: float, engine: Engine) -> list[Document]:
    """The documents to be erased: those asked for, their copies, and their near-duplicates.

    Args:
      corpus: run folder of Prepare.
      similarity: least Jaccard similarity of word 5-grams of a near-duplicate; candidates share a MinHash
        band.

    Raises:
      UserError: an id is not in the corpus.
    """
    files = [os.fspath(file) for file in _files(corpus)]
    asked = _scan(files, _Wanted(requests.ids, (), similarity), engine, "looking for ids")
    found = {base_id(document.id) for document in asked}
    if missing := sorted(requests.ids - found - _shown(corpus)):
        raise UserError(
            f"{len(missing)} of the ids are not in {corpus}, for example {missing[0]!r}; nothing was erased"
        )
    texts = tuple(dict.fromkeys([*(d.text for d in asked), *(normalize(text) for text in requests.texts)]))
    return _scan(files, _Wanted(frozenset(found), texts, similarity), engine, "looking for near-duplicates")


def _shown(corpus: epath.Path) -> set[str]:
    """Ids of the documents that are shown as examples; those that a stage dropped are nowhere else."""
    ids: set[str] = set()
    for path in (corpus / "dropped.jsonl", corpus / "clusters.jsonl"):
        for line in path.read_bytes().splitlines() if path.exists() else []:
            ids |= _mentioned(json.loads(line))
    return ids


def _files(corpus: epath.Path) -> list[epath.Path]:
    """Every file with documents: the splits' shards and the index."""
    folders = [path for path in corpus.iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = [
        file
        for folder in sorted(folders)
        if folder.name != plan.INDEX and any(folder.glob("*.parquet"))
        for file in document_files(folder)
    ]
    if not found:
        raise UserError(f"{corpus} is no prepared corpus: there are no shards in it")
    index = corpus / plan.INDEX / "0"
    return [*found, *(sorted(index.glob("*.parquet")) if index.exists() else [])]


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Tells the documents to be erased."""

    ids: frozenset[str]
    texts: tuple[str, ...]
    similarity: float

    def holds(self, document: Document) -> bool:
        if base_id(document.id) in self.ids:
            return True
        keys, minhash = _bands(self.texts)
        if not keys:
            return False
        candidates = {
            number for key in minhash.band_keys(document.text).tolist() for number in keys.get(key, ())
        }
        return any(
            document.text == self.texts[number]
            or dedup.jaccard(document.text, self.texts[number]) >= self.similarity
            for number in candidates
        )


@functools.cache
def _bands(texts: tuple[str, ...]) -> tuple[Mapping[int, Sequence[int]], dedup.MinHash]:
    keys: dict[int, list[int]] = {}
    minhash = dedup.MinHash()
    for number, text in enumerate(texts):
        for key in minhash.band_keys(text).tolist():
            keys.setdefault(key, []).append(number)
    return keys, minhash


def _scan(files: Sequence[str], wanted: _Wanted, engine: Engine, label: str) -> list[Document]:
    found: list[Document] = []
    with console.progress(label, len(files)) as progress:
        for _, documents in engine.each(_scan_file, [(file, wanted) for file in files]):
            found += documents
            progress.advance()
    return found


def _scan_file(task: tuple[str, _Wanted]) -> list[Document]:
    path, wanted = task
    return [document for document in read_documents(path) if wanted.holds(document)]


def pending(corpus: epath.Path) -> frozenset[str]:
    """Ids, as they are in the files, that an interrupted erasure has still to take out."""
    path = corpus / _PENDING
    return frozenset(json.loads(path.read_text())) if path.exists() else frozenset()


def begin(corpus: epath.Path, ids: Iterable[str]) -> None:
    """Notes what is to be erased until it is done, so that a second start finishes it."""
    atomic_write(corpus / _PENDING, json.dumps(sorted(ids)))


def remember(corpus: epath.Path, ids: frozenset[str], texts: Sequence[str]) -> None:
    """Keeps salted hashes of ids and texts, by which a corpus that extends this one leaves them out."""
    index = corpus / plan.INDEX
    if (known := plan.Plan.load(index)) is not None:
        new = {plan.tombstone(known.salt, value) for value in (*ids, *texts)}
        known.erased = sorted({*known.erased, *new})
        known.save(index)


def erase(corpus: epath.Path, ids: frozenset[str], texts: Sequence[str]) -> dict[str, int]:
    """Takes the documents with these ids out of all files of the corpus; after an interruption, the rest.

    Args:
      corpus: run folder of Prepare.
      ids: of the documents as they were before copying and cutting.
      texts: theirs.

    Returns:
      How many documents left the shards and the index, and how many examples left the account.
    """
    index, staging = corpus / plan.INDEX / "0", corpus / _STAGING
    _replay(staging, index)
    counts = {"documents": 0, "index": 0, "examples": 0}
    _erase_order(corpus / "train", ids)
    for file in _files(corpus):
        gone = np.array([base_id(id) in ids for id in read_ids(file)], bool)
        if not gone.any():
            continue
        if file.parent == index:
            counts["index"] += int(gone.sum())
            _stage_chunk(file, gone, staging)
            _replay(staging, index)
        else:
            counts["documents"] += int(gone.sum())
            write_documents(file, _those(file, ~gone))
    shown = (corpus / "dropped.jsonl", corpus / "clusters.jsonl", *sorted(index.glob("*.dropped")))
    counts["examples"] = sum(_erase_lines(path, ids) for path in shown)
    card = json.loads((corpus / "data_card.json").read_text())
    before = card["documents"]
    _recount(corpus, card)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    card.setdefault("erased", []).append({"time": now, "documents": before - card["documents"]})
    card["ngrams"] = _without(card.get("ngrams", {}), texts)
    atomic_write(corpus / "data_card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    _update_manifest(corpus, card)
    (corpus / _PENDING).unlink(missing_ok=True)
    return counts


def _update_manifest(corpus: epath.Path, card: Mapping[str, Any]) -> None:
    """Gives the finished run another fingerprint, so that what is built on it knows of the change."""
    path = corpus / MANIFEST
    if path.exists():
        run = json.loads(path.read_text())
        figures = run.get("figures", {}) | {name: card[name] for name in ("documents", "splits", "dropped")}
        run |= {"figures": figures, "fingerprint": fingerprint([run.get("fingerprint", ""), card["erased"]])}
        atomic_write(path, json.dumps(run, indent=1, ensure_ascii=False) + "\n")


def _erase_order(folder: epath.Path, ids: frozenset[str]) -> None:
    """Takes documents out of a split's curriculum, before they leave its shards."""
    paths = [folder / "order.npy", folder / "difficulty.npy"]
    if not paths[0].exists():
        return
    gone = np.array([base_id(id) in ids for file in document_files(folder) for id in read_ids(file)], bool)
    places = np.cumsum(~gone) - 1
    for path in paths:
        values = np.load(path)
        if len(values) == len(gone):  # else an interrupted erasure has done it
            left = places[values[~gone[values]]] if path.name == "order.npy" else values[~gone]
            save_array(path, left)


def _those(file: epath.Path, wanted: np.ndarray) -> Iterator[Document]:
    return (document for document, keep in zip(read_documents(file), wanted, strict=True) if keep)


def _stage_chunk(file: epath.Path, gone: np.ndarray, staging: epath.Path) -> None:
    """Writes an index chunk without these documents beside the index; `_replay` puts it into its place."""
    if staging.exists():
        staging.rmtree()
    staging.mkdir()
    name = file.name.removesuffix(".parquet")
    numbers = file.parent / f"{name}.numbers.npy"
    for path in sorted(file.parent.glob(f"{name}.*.npy")):
        array = np.load(path)
        rows = np.repeat(~gone, np.load(numbers)) if path.name == f"{name}.units.npy" else ~gone
        save_array(staging / path.name, array[..., rows])
    record = json.loads((file.parent / f"{name}.json").read_text())
    opening = record["rows"][0]
    opening["dropped"][REASON] = opening["dropped"].get(REASON, 0) + int(gone.sum())
    opening["kept"] -= int(gone.sum())
    atomic_write(staging / f"{name}.json", json.dumps(record))
    write_documents(staging / file.name, _those(file, ~gone))
    atomic_write(staging / _READY, "")


def _replay(staging: epath.Path, index: epath.Path) -> None:
    """Puts a chunk that is wholly written into its place; half of one is thrown away."""
    if not staging.exists():
        return
    if (staging / _READY).exists():
        for path in sorted(staging.iterdir()):
            if path.name != _READY:
                path.replace(index / path.name)
    staging.rmtree()


def _recount(corpus: epath.Path, card: dict[str, Any]) -> None:
    """Counts what is left in the splits anew."""
    tables: dict[str, dict[str, dict[str, int]]] = {name: {} for name in TABLES}
    for split in card["splits"]:
        for document in read_documents(corpus / split):
            count_in(tables, {}, split, document)
    left = sum(row["documents"] for row in tables["splits"].values())
    card["dropped"][REASON] = card["dropped"].get(REASON, 0) + card["documents"] - left
    card |= tables | {"documents": left}


def _erase_lines(path: epath.Path, ids: frozenset[str]) -> int:
    """Takes out the lines of a file of examples that show one of the documents."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not _mentioned(json.loads(line)) & ids]
    if len(kept) < len(lines):
        atomic_write(path, b"".join(kept).decode())
    return len(lines) - len(kept)


def _mentioned(record: Mapping[str, Any]) -> set[str]:
    if "dropped" in record:
        return {base_id(item["id"]) for item in (record["kept"], *record["dropped"])}
    return {base_id(record["id"]), base_id(record.get("detail", "").removeprefix("of "))}


def _without(ngrams: dict[str, list[Any]], texts: Sequence[str]) -> dict[str, list[Any]]:
    """Frequent n-grams but for those that owe half of their count or more to these texts."""
    words = [" ".join(text.split()) for text in texts]
    return {
        order: [[ngram, n] for ngram, n in pairs if 2 * sum(text.count(ngram) for text in words) < n]
        for order, pairs in ngrams.items()
    }
