"""One Parquet or Arrow IPC file, row batch by row batch, with what it declares checked first.

pyarrow is C++ that parses hostile bytes; so sizes are capped before it allocates, Arrow batches are validated in full
before they are used, compressed or dictionary-coded Arrow bodies (which `datasets` never writes) are refused, and
every column but the two needed stays unread.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpdistill.data.files import one_error_type, open_regular
from dpdistill.data.limits import Limits, check_unpacked
from dpdistill.errors import InputError

BATCH_ROWS = 256
MAX_THRIFT = 2**20  # elements of one list, and half the bytes of one string, in Parquet's own metadata
Batch = tuple[list[bytes], np.ndarray | list[str]]


class TableFile(ABC):
    """An open table: `n_rows`, `metadata` of its schema, and its batches of (encoded images, labels)."""

    n_rows: int
    metadata: Mapping[bytes, bytes] | None

    @staticmethod
    @contextmanager
    def open(path: str, columns: tuple[str, str], limits: Limits) -> Iterator[TableFile]:
        """Opens a file by its extension and checks that it has an image column and a label column.

        Raises:
          InputError: not such a table. Also for anything that pyarrow raises while the file is open.
        """
        with open_regular(path, limits) as (file, size), one_error_type(path):
            kind = ArrowFile if path.endswith(".arrow") else ParquetFile
            yield kind(file, size, path, columns, limits)

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """Yields images as bytes, and labels as an array of integers or a list of text."""


class ParquetFile(TableFile):
    """A Parquet file."""

    def __init__(self, file: BinaryIO, size: int, path: str, columns: tuple[str, str], limits: Limits) -> None:
        if file.read(4) != b"PAR1":
            raise InputError(path, "is not a Parquet file", "write it again")
        file.seek(0)
        self.file = pq.ParquetFile(
            file,
            pre_buffer=False,
            page_checksum_verification=True,
            thrift_string_size_limit=16 * MAX_THRIFT,
            thrift_container_size_limit=MAX_THRIFT,
        )
        schema = self.file.schema_arrow
        check_columns(path, schema, columns)
        self.path, self.columns, self.metadata = path, columns, schema.metadata
        self.n_rows = self.file.metadata.num_rows
        check_unpacked(path, self.unpacked_bytes(), size, limits)

    def unpacked_bytes(self) -> int:
        """Returns the declared size of the two columns once decompressed."""
        total = 0
        for i in range(self.file.metadata.num_row_groups):
            group = self.file.metadata.row_group(i)
            for j in range(group.num_columns):
                chunk = group.column(j)
                if chunk.path_in_schema.split(".")[0] in self.columns:
                    total += max(0, chunk.total_uncompressed_size)
        return total

    def batches(self) -> Iterator[Batch]:
        """Yields `BATCH_ROWS` rows at a time, on this thread."""
        for batch in self.file.iter_batches(batch_size=BATCH_ROWS, columns=list(self.columns), use_threads=False):
            yield to_batch(self.path, batch, self.columns)


class ArrowFile(TableFile):
    """An Arrow IPC stream, as `datasets.save_to_disk` writes it."""

    def __init__(self, file: BinaryIO, size: int, path: str, columns: tuple[str, str], limits: Limits) -> None:
        if file.read(6) == b"ARROW1":
            raise InputError(path, "is an Arrow file, not an Arrow stream", "save it with datasets, or as Parquet")
        self.path, self.columns, self.size, self.raw = path, columns, size, file
        self.n_rows = sum(batch.num_rows for batch in self.messages())
        self.metadata = self.schema.metadata

    def messages(self) -> Iterator[pa.RecordBatch]:
        """Yields validated record batches from the start of the file."""
        self.raw.seek(0)
        stream = pa.ipc.MessageReader.open_stream(self.raw)
        self.schema = pa.ipc.read_schema(stream.read_next_message())
        check_columns(self.path, self.schema, self.columns)
        while True:
            try:
                message = stream.read_next_message()
            except StopIteration:
                return
            if message.type != "record batch" or is_compressed(message.metadata.to_pybytes()):
                hint = "save it with datasets, or as Parquet"
                raise InputError(self.path, "is an Arrow stream with compressed or dictionary-coded parts", hint)
            batch = pa.ipc.read_record_batch(message, self.schema)
            batch.validate(full=True)
            yield batch

    def batches(self) -> Iterator[Batch]:
        """Yields the record batches as they are stored."""
        for batch in self.messages():
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield to_batch(self.path, batch.slice(start, BATCH_ROWS), self.columns)


def is_compressed(flatbuffer: bytes) -> bool:
    """Says whether the header of a record batch declares compression (Arrow's Message.fbs, slot 3 of RecordBatch)."""

    def field(table: int, slot: int) -> int:
        """Returns the position of a table's field, or 0 if it is absent."""
        vtable = table - struct.unpack_from("<i", flatbuffer, table)[0]
        (vtable_bytes,) = struct.unpack_from("<H", flatbuffer, vtable)
        if 4 + 2 * slot >= vtable_bytes:
            return 0
        (offset,) = struct.unpack_from("<H", flatbuffer, vtable + 4 + 2 * slot)
        return table + offset if offset else 0

    def follow(position: int) -> int:
        """Returns the position that an offset points to."""
        return position + int(struct.unpack_from("<I", flatbuffer, position)[0])

    record_batch = follow(field(follow(0), 2))  # slot 2 of a Message is its header
    return field(record_batch, 3) != 0


def check_columns(path: str, schema: pa.Schema, columns: tuple[str, str]) -> None:
    """Refuses a table without both columns, or with other types in them."""
    known = ", ".join(name[:40] for name in schema.names[:12] if name.isprintable())
    for name, argument in zip(columns, ("image_column", "label_column"), strict=True):
        if schema.names.count(name) != 1:
            raise InputError(path, f"has not one column {name!r}", f"columns: {known}; pass {argument}=")
    image, label = schema.field(columns[0]).type, schema.field(columns[1]).type
    if pa.types.is_struct(image):
        image = image.field("bytes").type if image.get_field_index("bytes") >= 0 else pa.null()
    if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
        reason = f"column {columns[0]!r} does not hold encoded images, as bytes or struct<bytes, path>"
        raise InputError(path, reason, f"columns: {known}; pass image_column=")
    if not (pa.types.is_integer(label) or pa.types.is_string(label) or pa.types.is_large_string(label)):
        raise InputError(
            path, f"column {columns[1]!r} holds no integers or text", f"columns: {known}; pass label_column="
        )


def to_batch(path: str, batch: pa.RecordBatch, columns: tuple[str, str]) -> Batch:
    """Returns one batch as Python bytes and a numpy array, or a list for text."""
    images: Any = batch.column(columns[0])
    labels: Any = batch.column(columns[1])
    if pa.types.is_struct(images.type) and images.null_count == 0:
        images = images.field("bytes")
    if images.null_count or labels.null_count:
        hint = "embed the images (datasets.Image(decode=False) shows which) and fill in the labels"
        raise InputError(path, "has an image or a label that is missing, or only the path of an image", hint)
    if pa.types.is_integer(labels.type):
        return images.to_pylist(), labels.to_numpy(zero_copy_only=False)
    return images.to_pylist(), labels.to_pylist()
