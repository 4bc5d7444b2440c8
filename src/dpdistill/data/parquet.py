"""Parquet files through pyarrow, after `parquet_check` has checked what they declare.

pyarrow is C++ and trusts metadata: so it never sees an unchecked footer, nor the Arrow schema that writers embed in it
(a flatbuffer; on a mutated one the C++ reader can crash), and it reads no column but those needed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpdistill.data.columns import (
    Batch,
    Columns,
    Values,
    check_column_names,
    check_nulls,
    no_ids,
    no_images,
    no_labels,
    only_images,
)
from dpdistill.data.limits import Limits
from dpdistill.data.parquet_check import check_parquet

BATCH_ROWS = 256
MAX_BATCH_BYTES = 2**27
READ_BYTES = 2**20
EMBEDDED_SCHEMA = b"ARROW:schema"


class ParquetTable:
    """An open Parquet file. `metadata` is what its writer put into the footer by key."""

    def __init__(self, file: IO[bytes], size: int, path: str, columns: Columns, limits: Limits) -> None:
        if columns.image is None:  # the footer tells, and is checked before: then the pages of what it told
            schema = opened(file, size, check_parquet(file, size, path, (), limits).footer).schema_arrow
            found = [field.name for field in schema if holds_images(field.type)]
            columns = columns._replace(image=only_images(path, found))
        facts = check_parquet(file, size, path, columns.named(), limits)
        self.file = opened(file, size, facts.footer)
        self.path, self.columns, self.metadata, self.n_rows = path, columns, facts.metadata, facts.n_rows
        self.check_types(self.file.schema_arrow)
        # Each row of a batch may repeat the largest value of a dictionary, so large dictionaries mean small batches.
        self.batch_rows = max(1, min(BATCH_ROWS, MAX_BATCH_BYTES // (facts.dictionary_bytes + 1)))

    def check_types(self, schema: Any) -> None:
        """Refuses a table without its columns, or with other types in them."""
        check_column_names(self.path, schema.names, self.columns)
        image, *others = self.columns
        if not holds_images(schema.field(image).type):
            raise no_images(self.path, schema.names, str(image))
        for name, refusal in zip(others, (no_labels, no_ids), strict=True):
            kind = pa.string() if name is None else schema.field(name).type
            if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise refusal(self.path, schema.names, str(name))

    def batches(self) -> Iterator[Batch]:
        """Yields some rows at a time, on this thread: images as bytes, labels and ids as integers or a list of text."""
        for batch in self.file.iter_batches(self.batch_rows, columns=list(self.columns.named()), use_threads=False):
            images = batch.column(self.columns.image)
            others = [None if name is None else batch.column(name) for name in self.columns[1:]]
            if pa.types.is_struct(images.type) and images.null_count == 0:
                images = images.field("bytes")
            check_nulls(self.path, any(column.null_count for column in (images, *others) if column is not None))
            labels, ids = (None if column is None else _values(column) for column in others)
            yield images.to_pylist(), labels, ids


def opened(file: IO[bytes], size: int, footer: bytes) -> pq.ParquetFile:
    """Returns pyarrow's reader of a file whose footer was checked, without the schema that its writer embedded."""
    footer = footer.replace(EMBEDDED_SCHEMA, b"-" * len(EMBEDDED_SCHEMA))
    return pq.ParquetFile(
        pa.PythonFile(Overlaid(file, size, footer, size - 8 - len(footer)), "r"),
        pre_buffer=False,
        buffer_size=READ_BYTES,  # else a column of a row group is read whole
        page_checksum_verification=True,
    )


def holds_images(kind: Any) -> bool:
    """Whether a column of this type is one of encoded images."""
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else pa.null()
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _values(column: Any) -> Values:
    whole = pa.types.is_integer(column.type)
    return np.asarray(column.to_numpy(zero_copy_only=False)) if whole else column.to_pylist()


class Overlaid(io.RawIOBase):
    """A file that reads as another one, with some of its bytes replaced by as many others."""

    def __init__(self, file: IO[bytes], size: int, patch: bytes, patch_at: int) -> None:
        self.file, self.size, self.patch, self.patch_at, self.at = file, size, patch, patch_at, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Returns the position."""
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a position within the file."""
        base = (0, self.at, self.size)[whence]
        self.at = min(max(0, base + offset), self.size)
        return self.at

    def read(self, n_bytes: int | None = -1) -> bytes:
        """Returns the next bytes, and no more than there are."""
        left = self.size - self.at
        n_bytes = left if n_bytes is None or n_bytes < 0 else min(n_bytes, left)
        self.file.seek(self.at)
        data = self.file.read(n_bytes)
        first, last = max(self.at, self.patch_at), min(self.at + len(data), self.patch_at + len(self.patch))
        if first < last:
            start = self.at
            patch = self.patch[first - self.patch_at : last - self.patch_at]
            data = data[: first - start] + patch + data[last - start :]
        self.at += len(data)
        return data
