"""Takes examples out of a token store, as when a person asks for a document to be erased.

    store = TokenStore.open(folder)
    found = {split: examples_of(store, split, ids) for split in store.splits}
    erase_examples(folder, found)

What is left has the same fingerprint as a store made without these documents. Checkpoints that were trained
on the store have learned from them all the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from t5style import run_dir
from t5style.data.curriculum import order_of_kept
from t5style.data.store_manifest import (
    CURRICULUM,
    DOCUMENT_KEYS,
    delete_folder,
    document_keys,
    file_facts,
    identity,
    write_manifest,
)
from t5style.data.token_store import CHUNK_TOKENS, FeatureWriter, TokenStore, kvstore, write_array
from t5style.run_dir import UserError

_BLOCK_TOKENS = 512 * CHUNK_TOKENS  # read and written at once


def examples_of(store: TokenStore, split: str, document_ids: Iterable[str]) -> np.ndarray:
    """The split's examples that come from documents with these ids: int64 [n], ascending.

    Raises: UserError where the store does not know which documents its examples come from.
    """
    keys = store.document_keys(split)
    if keys is None:
        if not store.num_examples(split):
            return np.zeros(0, np.int64)
        raise UserError(
            f"Token store {store.folder} does not know which documents the examples of split {split!r} come "
            "from (an earlier version made it, or the seqio bridge): tokenize again."
        )
    return np.flatnonzero(np.isin(keys, document_keys(document_ids)))


def erase_examples(
    folder: str | os.PathLike[str], examples: Mapping[str, Sequence[int] | np.ndarray]
) -> dict[str, Any]:
    """Rewrites a store without these examples, and deletes the files that held them.

    The new arrays are written beside the old ones; then the manifest is exchanged, in one step; then the old
    ones are deleted. A process that is killed leaves the old store or the new one, never a mixture, and what
    it did not delete is deleted when the function is called again, be it with no examples. A process that has
    the store open must open it again. The manifest counts what was erased, and does not say what it was. A
    run folder's `manifest.json` beside it gets the new fingerprint and counts.

    Args:
      folder: of the store.
      examples: split → indices of examples, in any order; a split that is left out stays as it is.

    Returns: `erased` (split → number of examples), and the store's new `fingerprint`.

    Raises: UserError where there is no store, or no such split; IndexError for an example that is not there.
    """
    folder = os.fspath(folder)
    store = TokenStore.open(folder)
    files = ts.KvStore.open(kvstore(folder)).result()
    manifest = dict(store.manifest)
    _sweep(files, folder, manifest)
    keep: dict[str, np.ndarray] = {}
    for split, indices in examples.items():
        count, chosen = store.num_examples(split), np.unique(np.asarray(indices, np.int64))
        if len(chosen) and (chosen[0] < 0 or chosen[-1] >= count):
            raise IndexError(
                f"Split {split!r} of store {folder} has {count} examples: not all of {chosen} are there."
            )
        if len(chosen):
            keep[split] = np.ones(count, bool)
            keep[split][chosen] = False
    erased = {split: int((~kept).sum()) for split, kept in keep.items()}
    if keep:
        manifest["splits"] = dict(manifest["splits"])
        for split, kept in keep.items():
            manifest["splits"][split] = _rewrite(store, split, kept)
        places = {counts.get("folder", split) for split, counts in manifest["splits"].items()}
        known = {name: facts for name, facts in manifest["files"].items() if name.split("/")[0] in places}
        manifest["files"] = known | file_facts(files, [manifest["splits"][split]["folder"] for split in keep])
        manifest["erased"] = [
            *manifest.get("erased", ()),
            {"time": run_dir.now(), "examples": sum(erased.values())},
        ]
        manifest["fingerprint"] = identity(manifest)
        write_manifest(files, manifest)
        _sweep(files, folder, manifest)
    _update_run(folder, manifest)
    return {"erased": erased, "fingerprint": manifest["fingerprint"]}


def _sweep(files: ts.KvStore, folder: str, manifest: Mapping[str, Any]) -> None:
    """Deletes the folders of splits, earlier or unfinished, that the manifest does not name."""
    places = {counts.get("folder", split) for split, counts in manifest["splits"].items()}
    found = {key.decode().split("/")[0] for key in files.list().result() if b"/" in key}
    for name in sorted(found - places):
        if name.split("@")[0] in manifest["splits"]:
            delete_folder(files, folder, name)


def _rewrite(store: TokenStore, split: str, kept: np.ndarray) -> dict[str, Any]:
    """Writes the kept examples (bool [examples]) into a new folder; returns the split's entry for the
    manifest.
    """
    old = store.manifest["splits"][split]
    number = int(store.place(split).partition("@")[2] or 0) + 1
    place = f"{split}@{number}"
    features = {}
    for feature in store.features:
        writer = FeatureWriter(store.folder, f"{place}/{feature}", store.manifest["dtype"])
        lengths = store.lengths(split, feature)
        starts = store.offsets(split, feature)[:-1]
        for block in _blocks(lengths, kept):
            run_starts, run_lengths = _runs(starts[block], lengths[block])
            writer.add(store.read(split, feature, run_starts, run_lengths), lengths[block])
        features[feature] = writer.finish()
    keys, curriculum = store.document_keys(split), store.curriculum(split)
    if keys is not None:
        write_array(store.folder, f"{place}/{DOCUMENT_KEYS}", keys[kept])
    if curriculum is not None:
        write_array(store.folder, f"{place}/{CURRICULUM}", order_of_kept(curriculum, kept))
    return old | {"examples": int(kept.sum()), "features": features, "folder": place}


def _blocks(lengths: np.ndarray, kept: np.ndarray) -> Iterator[np.ndarray]:
    """The kept examples' indices, in pieces of about `_BLOCK_TOKENS` tokens."""
    indices = np.flatnonzero(kept)
    piece = np.cumsum(lengths[indices]) // _BLOCK_TOKENS
    yield from np.split(indices, np.flatnonzero(np.diff(piece)) + 1)


def _runs(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges that follow one another are read as one."""
    if not len(starts):
        return starts, lengths
    first = np.flatnonzero(np.r_[True, starts[1:] != starts[:-1] + lengths[:-1]])
    return starts[first], np.add.reduceat(lengths, first)


def _update_run(folder: str, manifest: Mapping[str, Any]) -> None:
    """Tells the manifest of the run that made the store, so that what is built on it knows of the change."""
    path = epath.Path(folder) / run_dir.MANIFEST
    if not path.exists():
        return
    run = json.loads(path.read_text())
    figures = run.get("figures", {})
    if run.get("fingerprint") == manifest["fingerprint"]:
        return
    for split, counts in figures.get("splits", {}).items():
        if stored := manifest["splits"].get(split):
            counts["examples"] = stored["examples"]
            counts |= {f"{name}_tokens": facts["tokens"] for name, facts in stored["features"].items()}
    figures["fingerprint"] = run["fingerprint"] = manifest["fingerprint"]
    run_dir.atomic_write(path, json.dumps(run | {"figures": figures}, indent=1, ensure_ascii=False) + "\n")
