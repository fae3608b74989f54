"""Size and CRC-32 of every file of a checkpoint, in `seal-*.json` beside them.

Orbax verifies its index but not its data (a flipped bit in an array of floats restores without complaint),
so each file is summed once it is committed and compared before it is believed.
"""

from __future__ import annotations

import json
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from t5style import run_dir

SEAL = "seal-{index}-of-{count}.json"


def seal(folder: epath.Path) -> None:
    """Writes this process's seal: size and CRC-32 of its share of the files of a committed checkpoint."""
    index, count = jax.process_index(), jax.process_count()
    share = _files(folder)[index::count]
    with ThreadPoolExecutor(4) as pool:
        sums = dict(zip(share, pool.map(lambda name: _sum(folder / name), share), strict=True))
    run_dir.atomic_write(folder / SEAL.format(index=index, count=count), json.dumps(sums, indent=1))


def check(folder: epath.Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, or None. Reads one part of them; by default, all."""
    try:
        expected = _seals(folder)
    except ValueError as error:
        return f"a seal cannot be read: {error}"
    share = sorted(expected)[part::parts]
    missing = [name for name in share if not (folder / name).exists()]
    if missing:
        return f"{missing[0]} is missing"
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(share, pool.map(lambda name: _sum(folder / name), share), strict=True):
            if found[0] != expected[name][0]:
                return f"{name} has {found[0]:,} bytes, not {expected[name][0]:,}"
            if found[1] != expected[name][1]:
                return f"the contents of {name} have changed since they were written"
    return None


def is_sealed(folder: epath.Path) -> bool:
    """Whether every file of a checkpoint has been sealed; a save that was killed may have left some out."""
    return set(_files(folder)) <= _seals(folder).keys()


def _seals(folder: epath.Path) -> dict[str, list[int]]:
    """[bytes, CRC-32] of every sealed file."""
    sealed: dict[str, list[int]] = {}
    for entry in folder.iterdir():
        if entry.name.startswith("seal-"):
            sealed |= json.loads(entry.read_text())
    return sealed


def _files(folder: epath.Path, prefix: str = "") -> list[str]:
    names: list[str] = []
    for entry in folder.iterdir():
        if entry.is_dir():
            names += _files(entry, f"{prefix}{entry.name}/")
        elif not entry.name.startswith(("seal-", ".")):
            names.append(prefix + entry.name)
    return sorted(names)


def _sum(path: epath.Path) -> list[int]:
    """[bytes, CRC-32] of a file. CRC-32 runs at 3 GB/s a core here; it guards against accidents, not
    malice.
    """
    size, crc = 0, 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return [size, crc]
