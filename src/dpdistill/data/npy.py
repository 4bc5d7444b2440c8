"""The npy array format, parsed by hand: no pickle, no eval, sizes checked before anything is allocated.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, versions 1 to 3. The header is a
Python literal; a strict pattern reads it, since whatever does not look like numpy's own output is refused anyway.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import IO

import numpy as np

from dpdistill.data.files import pieces, read_exactly
from dpdistill.data.limits import Limits, check_unpacked
from dpdistill.data.stored import filled
from dpdistill.errors import InputError

MAX_HEADER_BYTES = 4096
MAX_DIMS = 8
HEADER = re.compile(
    r"\{'descr': '([<>|=]?[a-zA-Z][0-9]{0,9})', 'fortran_order': (True|False), "
    r"'shape': \(((?:[0-9]{1,19}, ?)*(?:[0-9]{1,19},?)?)\), ?\}[ \n]*",
    re.ASCII,
)
NUMERIC = frozenset({"u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"})


@dataclass(frozen=True, kw_only=True)
class NpyHeader:
    """What an npy header declares. `n_header_bytes` counts magic and padding too."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    n_header_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the array, in exact integers: a product of int64 could wrap around."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: IO[bytes], path: object) -> NpyHeader:
    """Reads the header of an npy stream.

    Raises:
      InputError: not npy, an object or structured dtype, a dtype that no image or label has, too many dimensions.
    """
    magic = read_exactly(file, 8, path)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise InputError(path, "is not an npy array", "write it with numpy.savez")
    size_bytes = 2 if magic[6] == 1 else 4
    length = int.from_bytes(read_exactly(file, size_bytes, path), "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(path, "has an oversized header", "write it with numpy.savez")
    text = read_exactly(file, length, path).decode("latin1")
    if re.search(r"'descr': '\|?O'", text):
        raise InputError(path, "holds Python objects, which only pickle can read", "store numbers, or str as dtype U")
    match = HEADER.fullmatch(text)
    if match is None:
        raise InputError(path, "has a header that is damaged, or a structured dtype", "write it with numpy.savez")
    descr, fortran, dims = match.groups()
    kind = descr.lstrip("<>|=")
    if kind not in NUMERIC and not re.fullmatch(r"U[0-9]{1,3}", kind):
        raise InputError(path, f"has the unsupported dtype {descr}", "use uint8 or float32 images, int64 labels")
    shape = tuple(int(dim) for dim in dims.replace(" ", "").split(",") if dim)
    if len(shape) > MAX_DIMS:
        raise InputError(path, f"has more than {MAX_DIMS} dimensions", "save images as [N, H, W, C], labels as [N]")
    header_bytes = 8 + size_bytes + length
    return NpyHeader(dtype=np.dtype(descr), shape=shape, fortran_order=fortran == "True", n_header_bytes=header_bytes)


def read_array(file: IO[bytes], path: object, *, stored_bytes: int, packed_bytes: int, limits: Limits) -> np.ndarray:
    """Reads one npy stream to its end.

    Args:
      stored_bytes: length of the stream as its container declares it; must match the header.
      packed_bytes: what the stream takes on disk.

    Returns:
      The array, in C order and native byte order.

    Raises:
      InputError: header and length differ, the array is too large, or the stream ends early or late.
    """
    header = checked_header(file, path, stored_bytes=stored_bytes, packed_bytes=packed_bytes, limits=limits)
    return read_rest(file, path, header)


def checked_header(file: IO[bytes], path: object, *, stored_bytes: int, packed_bytes: int, limits: Limits) -> NpyHeader:
    """Returns the header of an npy stream, if its size is that of the stream and under the caps. Arguments: see `read_array`."""
    check_unpacked(path, stored_bytes, packed_bytes, limits)
    header = read_header(file, path)
    if header.n_bytes + header.n_header_bytes != stored_bytes:
        raise InputError(path, "has a header that does not fit its size", "write it with numpy.savez")
    return header


def read_rest(file: IO[bytes], path: object, header: NpyHeader) -> np.ndarray:
    """Returns the array after its header, in memory."""
    flat = np.empty(header.n_bytes, np.uint8)
    filled(flat, pieces(file, header.n_bytes, path))
    if header.dtype.itemsize == 0:
        return np.zeros(header.shape, header.dtype)
    array = flat.view(header.dtype).reshape(header.shape, order="F" if header.fortran_order else "C")
    return np.ascontiguousarray(array, header.dtype.newbyteorder("="))
