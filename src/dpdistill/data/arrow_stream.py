"""Arrow IPC streams, as `datasets.save_to_disk` writes them: only the columns needed, in pure Python.

Not through pyarrow: its C++ reader crashed the process on mutated streams (tests/data/test_fuzz.py). What `datasets`
never writes is refused: compressed bodies, dictionaries, other byte orders.

Format: https://arrow.apache.org/docs/format/Columnar.html#ipc-streaming-format, Schema.fbs and Message.fbs; the numbers
below are slots and enums from there.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

import numpy as np

from dpdistill.data.columns import (
    Batch,
    Columns,
    Values,
    check_column_names,
    check_nulls,
    no_images,
    no_labels,
    only_images,
)
from dpdistill.data.files import read_exactly
from dpdistill.data.flatbuffer import Table
from dpdistill.data.limits import Limits
from dpdistill.errors import InputError

MAX_METADATA_BYTES = 2**22
MAX_FIELDS = 1000
BATCH_ROWS = 256
SCHEMA, RECORD_BATCH = 1, 3
INT, BINARY, UTF8, STRUCT, LARGE_BINARY, LARGE_UTF8 = 2, 4, 5, 13, 19, 20
# Number of buffers of its own that each type stores: to step over columns that are not needed.
N_BUFFERS = dict.fromkeys((2, 3, 6, 7, 8, 9, 10, 11, 12, 15, 17, 18, 21), 2) | {1: 0, 13: 1, 16: 1}
N_BUFFERS |= dict.fromkeys((BINARY, UTF8, LARGE_BINARY, LARGE_UTF8), 3)
HINT = "save it with datasets, or as Parquet"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A column or a part of one. `node` and `buffer` are where its description starts in a record batch."""

    name: str
    kind: int
    dtype: str
    children: tuple[Field, ...]
    node: int
    buffer: int


class ArrowStream:
    """An open stream. `n_rows` and `metadata` come from a first pass over the message headers."""

    def __init__(self, file: IO[bytes], size: int, path: str, columns: Columns, limits: Limits) -> None:
        self.file, self.size, self.path = file, size, path
        header, _, _ = self.message(0, SCHEMA)
        self.fields = self.read_fields(header)
        self.image, self.encoded, self.label = self.choose(columns)
        self.metadata = {pair.text(0): pair.text(1) for pair in header.tables(2)}
        self.n_rows = 0
        for batch, _, _ in self.messages():
            self.n_rows += natural(batch.number(0, "<q"))
            if self.n_rows > limits.max_images:
                raise InputError(path, f"holds more than {limits.max_images:,} images", "use a part of it")

    def message(self, at: int, *kinds: int) -> tuple[Table, int, int]:
        """Returns the header of the message at a position, and the start and size of its body.

        Raises:
          EOFError: the stream ends here.
          InputError: damaged, or a message of another kind.
        """
        self.file.seek(at)
        head = self.file.read(8)
        if head in (b"", b"\xff\xff\xff\xff\0\0\0\0"):
            raise EOFError
        marker, n_bytes = struct.unpack("<Ii", head) if len(head) == 8 else (0, 0)
        if marker != 2**32 - 1 or not 0 < n_bytes <= min(MAX_METADATA_BYTES, self.size):
            raise InputError(self.path, "is not an Arrow stream, or is damaged", HINT)
        message = Table.root(read_exactly(self.file, n_bytes, self.path))
        header, body_bytes = message.table(2), message.number(3, "<q")
        if message.number(1, "<B") not in kinds or header is None:
            raise InputError(self.path, "holds dictionaries, or messages of an unknown kind", HINT)
        start = at + 8 + n_bytes
        if not 0 <= body_bytes <= self.size - start:
            raise InputError(self.path, "is cut short", "copy or download it again")
        return header, start, body_bytes

    def messages(self) -> Iterator[tuple[Table, int, int]]:
        """Yields the record batches: header, start and size of the body."""
        _, start, n_bytes = self.message(0, SCHEMA)
        while True:
            try:
                header, start, n_bytes = self.message(start + n_bytes, RECORD_BATCH)
            except EOFError:
                return
            if header.place(3):
                raise InputError(self.path, "is compressed", HINT)
            yield header, start, n_bytes

    def read_fields(self, schema: Table) -> list[Field]:
        """Returns the columns, each with its place among the nodes and buffers of a record batch."""
        node = buffer = 0

        def read(table: Table, depth: int) -> Field:
            """Returns one field; nodes and buffers are numbered depth first."""
            nonlocal node, buffer
            here = (node, buffer)
            kind = table.number(2, "<B")
            if kind not in N_BUFFERS or table.place(4) or depth > 8 or node > MAX_FIELDS:
                raise InputError(self.path, "has a dictionary-coded column, or one of a rare type", HINT)
            node, buffer = node + 1, buffer + N_BUFFERS[kind]
            children = tuple(read(child, depth + 1) for child in table.tables(5))
            name = table.text(0).decode()
            return Field(name=name, kind=kind, dtype=int_dtype(table), children=children, node=here[0], buffer=here[1])

        if schema.number(0, "<h"):
            raise InputError(self.path, "is big-endian", HINT)
        return [read(table, 0) for table in schema.tables(1)]

    def choose(self, columns: Columns) -> tuple[Field, Field, Field | None]:
        """Returns the image field, its part that holds the encoded bytes (or itself), and the label field, if it is to be read."""
        names = [field.name for field in self.fields]
        if columns.image is None:
            found = [field.name for field in self.fields if encoded_part(field) is not None]
            columns = columns._replace(image=only_images(self.path, found))
        check_column_names(self.path, names, columns)
        image = self.fields[names.index(str(columns.image))]
        encoded = encoded_part(image)
        if encoded is None:
            raise no_images(self.path, names, image.name)
        label = None if columns.label is None else self.fields[names.index(columns.label)]
        if label is not None and label.kind not in (INT, UTF8, LARGE_UTF8):
            raise no_labels(self.path, names, label.name)
        return image, encoded, label

    def batches(self) -> Iterator[Batch]:
        """Yields some rows at a time: images as bytes, labels as an array of integers or a list of text."""
        for header, start, n_bytes in self.messages():
            n_rows = natural(header.number(0, "<q"))
            nodes, buffers = header.longs(1, 2), header.longs(2, 2)
            fields = (self.image, self.encoded, self.label)
            check_nulls(self.path, any(nodes[field.node] != (n_rows, 0) for field in fields if field is not None))
            values = Body(self.file, start, n_bytes, buffers, self.path)
            labels: np.ndarray | list[bytes] | None = None
            if self.label is not None and self.label.kind == INT:
                labels = values.numbers(self.label.buffer + 1, self.label.dtype, n_rows)
            elif self.label is not None:
                labels = list(values.chunks(self.label, n_rows))
            chunks = values.chunks(self.encoded, n_rows)
            for at in range(0, n_rows, BATCH_ROWS):
                rows = min(BATCH_ROWS, n_rows - at)
                part = None if labels is None else labels[at : at + rows]
                found: Values | None = decoded(part) if isinstance(part, list) else part
                yield [next(chunks) for _ in range(rows)], found, None


class Body:
    """The buffers of one record batch, read from its file as they are needed: a batch may be the whole file."""

    def __init__(self, file: IO[bytes], start: int, n_bytes: int, buffers: list[tuple[int, ...]], path: str) -> None:
        self.file, self.start, self.n_bytes, self.buffers, self.path = file, start, n_bytes, buffers, path

    def size(self, index: int) -> int:
        """Returns the bytes of one buffer."""
        offset, length = self.buffers[index]
        if not 0 <= offset <= offset + length <= self.n_bytes:
            raise ValueError("a buffer lies outside the body")
        return length

    def read(self, index: int, first: int, last: int) -> bytes:
        """Returns bytes of one buffer, from `first` to before `last`."""
        if not 0 <= first <= last <= self.size(index):
            raise ValueError("values lie outside their buffer")
        self.file.seek(self.start + self.buffers[index][0] + first)
        return read_exactly(self.file, last - first, self.path)

    def numbers(self, index: int, dtype: str, n_rows: int) -> np.ndarray:
        """Returns the first values of a buffer."""
        return np.frombuffer(self.read(index, 0, n_rows * np.dtype(dtype).itemsize), dtype, n_rows)

    def chunks(self, field: Field, n_rows: int) -> Iterator[bytes]:
        """Yields the values of a column of bytes or text; their offsets must rise and stay within the buffer."""
        if n_rows == 0:
            return
        wide = field.kind in (LARGE_BINARY, LARGE_UTF8)
        offsets = self.numbers(field.buffer + 1, "<i8" if wide else "<i4", n_rows + 1).astype(np.int64)
        if offsets[0] < 0 or offsets[-1] > self.size(field.buffer + 2) or (offsets[1:] < offsets[:-1]).any():
            raise ValueError("offsets do not rise")
        for at in range(0, n_rows, BATCH_ROWS):
            ends = offsets[at : at + BATCH_ROWS + 1].tolist()
            data = self.read(field.buffer + 2, ends[0], ends[-1])
            for first, last in pairwise(ends):
                yield data[first - ends[0] : last - ends[0]]


def encoded_part(field: Field) -> Field | None:
    """Returns the part of a column that holds encoded images (`bytes`, or itself), or None."""
    within = [child for child in field.children if child.name == "bytes"] if field.kind == STRUCT else [field]
    return within[0] if len(within) == 1 and within[0].kind in (BINARY, LARGE_BINARY) else None


def int_dtype(table: Table) -> str:
    """Returns the numpy dtype of an integer field, or '' for other types."""
    kind = table.table(3)
    if table.number(2, "<B") != INT or kind is None:
        return ""
    bits = kind.number(0, "<i")
    if bits not in (8, 16, 32, 64):
        raise ValueError("unknown integer width")
    return f"<{'i' if kind.number(1, '<B') else 'u'}{bits // 8}"


def natural(value: int) -> int:
    """Returns a number of rows, which must not be negative."""
    if value < 0:
        raise ValueError("a size is negative")
    return value


def decoded(texts: list[bytes]) -> list[str]:
    """Returns text labels as str."""
    return [text.decode() for text in texts]
