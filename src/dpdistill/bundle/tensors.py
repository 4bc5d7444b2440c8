"""safetensors, written byte for byte the same every time and read with suspicion. Needs numpy only.

The library's writer orders metadata by a random hash, and its reader accepts repeated keys, NaN and long headers.
Format: 8 bytes little-endian header length, a JSON header, the data without holes.
"""

import json
import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ReleaseError

MAX_ARRAYS = 2**28  # bytes of one file: a release has to be checked on a laptop
MAX_HEADER = 2**20
MAX_TENSORS = 256
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Array = NDArray[Any]


def pack(tensors: dict[str, Array], metadata: dict[str, str]) -> bytes:
    """Returns a safetensors file of float32 and int64 arrays, largest elements first (for alignment), then by name."""
    header: dict[str, Any] = {"__metadata__": metadata}
    chunks: list[bytes] = []
    end = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):
        array = np.ascontiguousarray(tensors[name])
        raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [end, end + len(raw)]}
        chunks.append(raw)
        end += len(raw)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(chunks)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a repeated key")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def parse_json(raw: bytes) -> Any:
    """Returns the JSON in `raw`. Raises ValueError on repeated keys, NaN, bad UTF-8 and depth."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def unpack(raw: bytes, name: str = "the safetensors file") -> tuple[dict[str, Array], dict[str, str]]:
    """Returns the arrays and the metadata strings in `raw`.

    Raises:
      ReleaseError: anything that `pack` would not have written: a long header, repeated keys, another dtype, a hole, an
        overlap, trailing bytes, a value that is not finite.
    """
    try:
        return _unpack(raw)
    except ReleaseError as error:
        raise ReleaseError(f"{name}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ReleaseError(f"{name}: not a readable safetensors file ({type(error).__name__})") from None


def _unpack(raw: bytes) -> tuple[dict[str, Array], dict[str, str]]:
    if len(raw) < 8:
        raise ReleaseError("shorter than its header")
    (length,) = struct.unpack_from("<Q", raw)
    if length > min(MAX_HEADER, len(raw) - 8):
        raise ReleaseError(f"claims a header of {length} bytes")
    header = parse_json(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ReleaseError("metadata that is not text")
    if len(header) > MAX_TENSORS:
        raise ReleaseError(f"{len(header)} tensors, at most {MAX_TENSORS} are ours")
    data = memoryview(raw)[8 + length :]
    arrays: dict[str, Array] = {}
    end = 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in _DTYPES:
            raise ReleaseError("a tensor of a kind that is not ours")
        dtype, shape, offsets = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not (len(shape) <= 8 and all(map(_whole, shape)) and len(offsets) == 2 and all(map(_whole, offsets))):
            raise ReleaseError("a shape or an offset that is not a whole number")
        begin, stop = offsets
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or stop > len(data):
            raise ReleaseError("data with a hole, an overlap, or past the end of the file")
        array = np.frombuffer(data[begin:stop], dtype).reshape(shape)
        if dtype.kind == "f" and not np.isfinite(array).all():
            raise ReleaseError("a value that is not finite")
        arrays[key], end = array, stop
    if end != len(data):
        raise ReleaseError("bytes after the last tensor")
    return arrays, metadata
