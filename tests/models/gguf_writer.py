"""Writes GGUF files for tests: metadata, and tensors given as NumPy arrays or as raw blocks."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_FLOATS = {"float32": 0, "float16": 1, "bfloat16": 30}


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any, tagged: bool = True) -> bytes:
    if isinstance(value, bool):
        kind, data = 7, struct.pack("<?", value)
    elif isinstance(value, int):
        kind, data = (4, struct.pack("<I", value)) if value >= 0 else (5, struct.pack("<i", value))
    elif isinstance(value, float):
        kind, data = 6, struct.pack("<f", value)
    elif isinstance(value, str):
        kind, data = 8, _text(value)
    else:
        first = value[0]
        inner = 7 if isinstance(first, bool) else 5 if isinstance(first, int) else 6
        inner = 8 if isinstance(first, str) else inner
        form = {7: "?", 5: "i", 6: "f"}
        items = (_text(v) if inner == 8 else struct.pack(f"<{form[inner]}", v) for v in value)
        kind, data = 9, struct.pack("<IQ", inner, len(value)) + b"".join(items)
    return (struct.pack("<I", kind) if tagged else b"") + data


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray | tuple[tuple[int, ...], int, bytes]],
    version: int = 3,
) -> Path:
    """Writes a file.

    Args:
      path: where.
      metadata: keys and values.
      tensors: arrays, or (row-major shape, number of the type, bytes).
      version: as written into the header.
    """
    header = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    header += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            tensor = (tensor.shape, _FLOATS[str(tensor.dtype)], np.ascontiguousarray(tensor).tobytes())
        shape, kind, data = tensor
        header += _text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, len(body))
        body += data + bytes(-len(data) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + body)
    return path
