"""What `store.json` of a token store says of its files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts

from t5style.run_dir import is_local

MANIFEST = "store.json"
# Names that no feature can have, for those are made of letters, digits and underscores.
DOCUMENT_KEYS = "document-keys"
CURRICULUM = "curriculum-order"


def document_keys(ids: Iterable[str]) -> np.ndarray:
    """A 64-bit hash of each document's id (BLAKE2b): uint64 [documents]. Among 10⁹ documents, one that is
    looked for meets another's by chance once in 2 · 10¹⁰ times.
    """
    keys = [hashlib.blake2b(i.encode("utf-8", "surrogatepass"), digest_size=8).digest() for i in ids]
    return np.frombuffer(b"".join(keys), "<u8").astype(np.uint64)


def file_facts(files: ts.KvStore, folders: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in these folders of a store."""
    facts = {}
    wanted = set(folders)
    for key in sorted(key.decode() for key in files.list().result()):
        if key.split("/")[0] in wanted:
            content = files[key]
            facts[key] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return facts


def write_manifest(files: ts.KvStore, manifest: Mapping[str, Any]) -> None:
    """Writes `store.json`, whole or not at all (locally: a temporary name, fsync, rename)."""
    files.write(MANIFEST, json.dumps(manifest, indent=1).encode()).result()


def delete_folder(files: ts.KvStore, store: str, name: str) -> None:
    """Deletes the folder of that name in the store."""
    files.delete_range(ts.KvStore.KeyRange(f"{name}/", f"{name}0")).result()  # "0" follows "/"
    if is_local(store):
        shutil.rmtree(os.path.join(store, name), ignore_errors=True)  # by now empty folders


def identity(manifest: Mapping[str, Any]) -> str:
    """The fingerprint of a manifest: of what is read for training, wherever it lies in the store."""
    splits, files = {}, {}
    for split, counts in manifest["splits"].items():
        splits[split] = {key: counts[key] for key in ("examples", "features")}
        place = counts.get("folder", split) + "/"
        for name, facts in manifest["files"].items():
            if name.startswith(place) and not name.startswith(place + DOCUMENT_KEYS):
                files[f"{split}/{name.removeprefix(place)}"] = facts
    keys = ("format", "features", "dtype", "vocabulary")
    tree = {key: manifest[key] for key in keys} | {"splits": splits, "files": files}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
