"""Images larger than memory: rows that stay in a file, and are read when they are asked for.

By position (`pread`), not through a memory map: the pages of a map count as memory of the process, and if somebody cuts the file short
under a map, the process dies by SIGBUS where a read says so in one line.

What has to be unpacked or decoded first goes to a file without a name (mode 0600): when the process ends, by kill -9 too, the file is gone.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import numpy as np

from dpdistill.errors import InputError

MEMORY_BYTES = 2**28  # arrays up to this size are kept in memory
CHUNK_BYTES = 2**23  # read at once, where a whole array is passed through
NO_ROOM = "point TMPDIR at a disk with more free space"


class StoredArray:
    """An array in C order whose rows (its first axis) lie one after another in a file. Indexing reads, and returns a copy.

    Attributes:
      shape, dtype: as of a numpy array.
    """

    def __init__(self, descriptor: int, offset: int, shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
        """Takes a duplicate of an open file's descriptor, and closes that when it is no longer used.

        Args:
          offset: bytes in the file before the first row.
          name: of the file, for messages.
        """
        self.shape, self.dtype = shape, dtype
        self._descriptor, self._offset, self._name = os.dup(descriptor), offset, name
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Returns the row of a number, or the rows of a slice, of numbers (in any order) or of a mask."""
        if isinstance(rows, (int, np.integer)):
            single: np.ndarray = self[np.array([rows])][0]
            return single
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows)
        if rows.dtype == np.bool_ and rows.shape == self.shape[:1]:
            rows = np.flatnonzero(rows)
        if rows.ndim != 1 or (rows.size and (rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(self))):
            raise IndexError("Expected one list of row numbers that are there.")
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        if not found.size:
            return found
        view = found.reshape(-1).view(np.uint8).data
        starts = np.flatnonzero(np.diff(rows.astype(np.int64), prepend=-2) != 1)  # neighbours are read at once
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(rows)], strict=True):
            part = view[start * self._row_bytes : end * self._row_bytes]
            self._read(int(rows[start]) * self._row_bytes, part)
        return found

    def __setitem__(self, rows: int | slice, values: np.ndarray) -> None:
        """Writes one row, or the rows of a slice without a step."""
        start, stop, step = (
            slice(rows, rows + 1).indices(len(self)) if isinstance(rows, int) else rows.indices(len(self))
        )
        wanted = self.shape[1:] if isinstance(rows, int) else (stop - start, *self.shape[1:])
        if step != 1 or values.shape != wanted:
            raise IndexError(f"Expected {wanted} values, got {values.shape}.")
        self.write(start * self._row_bytes, np.ascontiguousarray(values, self.dtype).tobytes())

    def __iter__(self) -> Iterator[np.ndarray]:
        for part in chunks(self):
            yield from part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, in memory."""
        return self[:] if dtype is None else self[:].astype(dtype)

    def reshaped(self, shape: tuple[int, ...]) -> StoredArray:
        """The same rows in another shape."""
        return StoredArray(self._descriptor, self._offset, shape, self.dtype, self._name)

    def write(self, at: int, data: bytes) -> None:
        """Puts bytes at a position within the array."""
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._descriptor, data[done:], self._offset + at + done)
        except OSError as error:
            raise InputError(self._name, f"cannot be written to ({error.strerror})", NO_ROOM) from None

    def _read(self, at: int, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                piece = os.pread(self._descriptor, min(CHUNK_BYTES, len(view) - done), self._offset + at + done)
                if not piece:
                    raise InputError(
                        self._name, "was cut short while it was in use", "leave the data as they are during a run"
                    )
                view[done : done + len(piece)] = piece
                done += len(piece)
        except OSError as error:
            raise InputError(self._name, f"cannot be read any more ({error.strerror})", "check its disk") from None


Images = np.ndarray | StoredArray


def filled(array: Images, pieces: Iterable[tuple[int, bytes]]) -> Images:
    """Returns the array with bytes put into it, each piece at its position."""
    view = (
        memoryview(b"") if isinstance(array, StoredArray) or not array.nbytes else array.reshape(-1).view(np.uint8).data
    )
    for at, piece in pieces:
        if isinstance(array, StoredArray):
            array.write(at, piece)
        else:
            view[at : at + len(piece)] = piece
    return array


def with_channel(images: Images) -> Images:
    """Returns [N, 1, H, W] of [N, H, W]."""
    shape = (images.shape[0], 1, *images.shape[1:])
    return images.reshaped(shape) if isinstance(images, StoredArray) else images.reshape(shape)


def chunks(images: Images) -> Iterator[np.ndarray]:
    """Yields all rows in order, some at a time."""
    row_bytes = math.prod(images.shape[1:]) * images.dtype.itemsize
    rows = max(1, CHUNK_BYTES // max(1, row_bytes))
    for start in range(0, len(images), rows):
        yield images[start : start + rows]


def too_large(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether an array is one to be kept in a file."""
    return math.prod(shape) * dtype.itemsize > MEMORY_BYTES


def room(shape: tuple[int, ...], dtype: np.dtype, folder: str | None = None) -> Images:
    """Returns an array to be filled: in memory up to MEMORY_BYTES, else in a file without a name, whose disk space is taken now.

    Args:
      folder: for the file; None is the system's folder for temporary files.

    Raises:
      InputError: there is not so much free space. It does not say how much is needed: that tells the number of records.
    """
    if not too_large(shape, dtype):
        return np.empty(shape, dtype)
    folder, n_bytes = folder or tempfile.gettempdir(), math.prod(shape) * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if shutil.disk_usage(folder).free >= n_bytes:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                return StoredArray(file.fileno(), 0, shape, dtype, folder)
            reason = "disk too full"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    raise InputError(folder, f"has no room for data that do not fit in memory ({reason})", NO_ROOM)


def mapped(images: Images, fn: Callable[[np.ndarray], np.ndarray], folder: str | None) -> Images:
    """Returns `fn` of all images, where it treats each by itself: what lies in a file is passed through in pieces.

    Args:
      fn: maps [B, ...] to [B, ...]; the same shape and dtype of a row for every piece.
    """
    if isinstance(images, np.ndarray):
        return fn(images)
    result: Images | None = None
    at = 0
    for part in chunks(images):
        done = fn(part)
        if result is None:
            result = room((len(images), *done.shape[1:]), done.dtype, folder)
        result[at : at + len(done)] = done
        at += len(done)
    return images if result is None else result


def in_place(file: IO[bytes], offset: int, shape: tuple[int, ...], dtype: np.dtype, path: object) -> StoredArray:
    """Returns an array that lies in an open file as it is. The file may be closed afterwards."""
    return StoredArray(file.fileno(), offset, shape, dtype, str(path))
