"""GGUF, the file format of llama.cpp: metadata and tensors, of which many are quantised in blocks.

Written after the format's description (ggml's docs/gguf.md, versions 2 and 3) and ggml's block layouts
(ggml-common.h). The PyPI package gguf reads these files too, but trusts them (a count that lies sends it into
a loop of 2**60 rounds) and takes seconds to open one with a large vocabulary; the tests compare with it.

The header is checked as a whole when a file is opened: every count, size and offset against the bytes that
are there, before anything is allocated. The data stay in the file, mapped, until `read`.
"""

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from t5style.run_dir import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_CHUNK = 1 << 18  # numbers that are dequantised at a time: 1 MiB of float32 stays in a core's cache

# Types of metadata: number -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _BOOL = 8, 9, 7

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


# --- blocks: a record array of n blocks, a float32 array [n, numbers of a block] to be filled ---


def _plain(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = blocks["x"]


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(blocks["q"], _column(blocks["d"]), out=out)


def _nibbles(packed: np.ndarray, out: np.ndarray) -> None:
    """Low halves of the bytes `[..., k]` to the first k of `out`, high halves to the last k."""
    width = packed.shape[-1]
    out[..., :width] = packed & 15
    out[..., width:] = packed >> 4


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks["q"], out)
    out -= 8
    out *= _column(blocks["d"])


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks["q"], out)
    out *= _column(blocks["d"])
    out += _column(blocks["m"])


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    # 8 sub-blocks of 32, each with a scale and a minimum of 6 bits: 12 bytes hold the 16 of them.
    low, middle, high = np.split(blocks["s"], 3, axis=-1)  # [n, 4] each
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], -1)
    minima = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], -1)
    _nibbles(blocks["q"].reshape(-1, 4, 32), out.reshape(-1, 4, 64))
    parts = out.reshape(-1, 8, 32)
    parts *= (_column(blocks["d"]) * scales)[..., None]
    parts -= (_column(blocks["m"]) * minima)[..., None]


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    # Two halves of 128: 4 low bits each in 64 bytes, 2 high bits each in 32; a scale for every 16.
    low = blocks["l"].reshape(-1, 2, 2, 32)
    high = blocks["h"].reshape(-1, 2, 1, 32)
    halves = out.reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2], np.uint8)[:, None]
    halves[:, :, :2] = (low & 15) | ((high >> shifts & 3) << 4)
    halves[:, :, 2:] = (low >> 4) | ((high >> (shifts + np.uint8(4)) & 3) << 4)
    out -= 32
    parts = out.reshape(-1, 16, 16)
    parts *= (_column(blocks["d"]) * blocks["s"])[..., None]


def _column(halves: np.ndarray) -> np.ndarray:
    return halves.astype(np.float32)[:, None]


class _Type(NamedTuple):
    """How numbers lie in blocks."""

    name: str
    numbers: int
    layout: np.dtype
    fill: Callable[[np.ndarray, np.ndarray], None]


_F2 = ("d", "<f2")
_TYPES = {
    0: _Type("F32", 1, np.dtype([("x", "<f4", 1)]), _plain),
    1: _Type("F16", 1, np.dtype([("x", "<f2", 1)]), _plain),
    2: _Type("Q4_0", 32, np.dtype([_F2, ("q", "u1", 16)]), _q4_0),
    3: _Type("Q4_1", 32, np.dtype([_F2, ("m", "<f2"), ("q", "u1", 16)]), _q4_1),
    8: _Type("Q8_0", 32, np.dtype([_F2, ("q", "i1", 32)]), _q8_0),
    12: _Type("Q4_K", 256, np.dtype([_F2, ("m", "<f2"), ("s", "u1", 12), ("q", "u1", 128)]), _q4_k),
    14: _Type("Q6_K", 256, np.dtype([("l", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), _F2]), _q6_k),
    30: _Type("BF16", 1, np.dtype([("x", ml_dtypes.bfloat16, 1)]), _plain),
}
# Names of the others, for the error.
_OTHERS = {
    **{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS"},
    **{17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"},
    **{39: "MXFP4"},
}


# --- files ---


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in the file.

    Attributes:
      shape: row-major, as NumPy has it (the file lists dimensions the other way round).
      type: number of its type in ggml.
      start: first byte in the file.
      bytes: how many there are.
    """

    shape: tuple[int, ...]
    type: int
    start: int
    bytes: int


class GgufFile:
    """A GGUF file, opened: its header is read and found to fit the file.

    Attributes:
      path: where it is.
      metadata: values by key; arrays are lists.
      tensors: by llama.cpp's names.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a file.

        Raises:
          UserError: it is missing, not GGUF, of another version, cut off or damaged; the sentence says where.
        """
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                if not os.fstat(file.fileno()).st_size:
                    raise UserError(f"{self.path} is empty: copy it again")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        self.metadata, self.tensors = _Header(self.path, self._data).read()

    def read(self, name: str, dtype: str = "float32", index: int | None = None) -> np.ndarray:
        """A tensor, dequantised.

        Args:
          name: llama.cpp's.
          dtype: 'float32', 'bfloat16' or 'float16'.
          index: only this part of its first dimension.

        Returns:
          An array of the tensor's shape, of `dtype`; where the file holds just this, a read-only view of it.

        Raises:
          UserError: its type is not one we know.
        """
        tensor = self.tensors[name]
        kind = _TYPES.get(tensor.type)
        if kind is None:
            raise UserError(
                f"{self.path}: the tensor {name} has type {_OTHERS.get(tensor.type, tensor.type)}, which is "
                f"not supported ({', '.join(kind.name for kind in _TYPES.values())} are): "
                "quantise the model to one of these"
            )
        shape, start, size = tensor.shape, tensor.start, tensor.bytes
        if index is not None:
            size //= shape[0]
            shape, start = shape[1:], start + index * size
        blocks = np.frombuffer(self._data, kind.layout, size // kind.layout.itemsize, start)
        wanted = np.dtype(DTYPES[dtype])
        if kind.fill is _plain and blocks["x"].dtype == wanted:
            return blocks["x"].reshape(shape)
        result = np.empty((len(blocks), kind.numbers), wanted)
        step = _CHUNK // kind.numbers
        scratch = np.empty((min(step, len(blocks)), kind.numbers), np.float32)
        for at in range(0, len(blocks), step):
            rows = result[at : at + step]
            target = rows if wanted == np.float32 else scratch[: len(rows)]
            kind.fill(blocks[at : at + step], target)
            if target is not rows:
                rows[...] = target
        return result.reshape(shape)


class _Header:
    """Reads a header from its beginning; each error says what was being read and at which byte."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if (magic := self._take(4, "the magic number")) != _MAGIC:
            raise UserError(f"{self._path} is not a GGUF file: it begins with {magic!r}, not with {_MAGIC!r}")
        version = self._number("I", "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            more = " (it is big-endian)" if swapped in _VERSIONS else ""
            raise UserError(
                f"{self._path} is GGUF of version {version}{more}; "
                f"{' and '.join(map(str, _VERSIONS))} are supported, little-endian: convert it again"
            )
        tensors = self._count("the number of tensors", 24)
        entries = self._count("the number of metadata entries", 13)
        metadata: dict[str, Any] = {}
        for number in range(entries):
            key = self._string(f"the key of metadata entry {number}")
            if key in metadata:
                raise self._damaged(f"the metadata key {key} is there twice")
            metadata[key] = self._value(self._number("I", f"the type of {key}"), key)
        return metadata, self._tensors(tensors, metadata)

    def _tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, Tensor]:
        listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for number in range(count):
            name = self._string(f"the name of tensor {number}")
            if name in listed:
                raise self._damaged(f"the tensor {name} is there twice")
            dimensions = self._number("I", f"the number of dimensions of {name}")
            if dimensions > _MAX_DIMENSIONS:
                raise self._damaged(f"the tensor {name} has {dimensions} dimensions, at most 4 are possible")
            sizes = [self._number("Q", f"the sizes of {name}") for _ in range(dimensions)]
            if 0 in sizes:
                raise self._damaged(f"the tensor {name} has a dimension of size 0")
            kind = self._number("I", f"the type of {name}")
            listed[name] = tuple(reversed(sizes)), kind, self._number("Q", f"the offset of {name}")
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment = {alignment!r} is not a power of two")
        begin = _up(self._at, alignment)
        tensors, end = {}, 0
        for name, (shape, number, offset) in listed.items():
            if number not in _TYPES:
                # Its size is not known; what follows it may lie anywhere behind.
                if number not in _OTHERS:
                    raise self._damaged(f"the tensor {name} has the unknown type {number}")
                tensors[name], end = Tensor(shape, number, begin + offset, 0), -1
                continue
            kind = _TYPES[number]
            if (shape or (1,))[-1] % kind.numbers:
                raise self._damaged(
                    f"the tensor {name} of type {kind.name} has rows of {shape[-1:]} numbers, which must "
                    f"be a multiple of {kind.numbers}"
                )
            size = math.prod(shape) // kind.numbers * kind.layout.itemsize
            if offset != end if end >= 0 else offset % alignment:
                raise self._damaged(f"the tensor {name} has the offset {offset}, {max(end, 0)} is expected")
            if begin + offset + size > len(self._data):
                raise UserError(
                    f"{self._path} is cut off: the tensor {name} ends at byte {begin + offset + size}, the "
                    f"file at {len(self._data)}; copy it again"
                )
            tensors[name] = Tensor(shape, number, begin + offset, size)
            end = _up(offset + size, alignment)
        return tensors

    def _value(self, kind: int, key: str, nested: bool = False) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._number(_SCALARS[kind], key)
        if kind != _ARRAY or nested:
            raise self._damaged(f"{key} has the unknown type {kind}" + " in an array" * nested)
        inner = self._number("I", f"the type of {key}")
        if inner in _SCALARS:
            form = _SCALARS[inner]
            count = self._count(f"the length of {key}", struct.calcsize(form))
            return list(struct.unpack(f"<{count}{form}", self._take(count * struct.calcsize(form), key)))
        count = self._count(f"the length of {key}", 8)
        return [self._value(inner, key, nested=True) for _ in range(count)]

    def _take(self, size: int, what: str) -> bytes:
        if size > len(self._data) - self._at:
            raise UserError(
                f"{self._path} is cut off or damaged: {what} needs {size} bytes at byte {self._at}, and the "
                f"file has {len(self._data)}; copy it again"
            )
        self._at += size
        return self._data[self._at - size : self._at]

    def _number(self, form: str, what: str) -> Any:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(form), what))[0]

    def _count(self, what: str, least: int) -> int:
        """A count of things of at least so many bytes each, which must fit into the rest of the file."""
        count = self._number("Q", what)
        if count * least > len(self._data) - self._at:
            raise UserError(
                f"{self._path} is cut off or damaged: {what}, at byte {self._at - 8}, is {count}, for which "
                f"the file of {len(self._data)} bytes is too small; copy it again"
            )
        return int(count)

    def _string(self, what: str) -> str:
        text = self._take(self._count(f"the length of {what}", 1), what)
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8") from error

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._path} is damaged: {what} (before byte {self._at}); copy it again")


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
