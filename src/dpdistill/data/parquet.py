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

from dpdistill.data.columns import Batch, Values, check_column_names, check_nulls, no_ids, no_images, no_labels
from dpdistill.data.limits import Limits
from dpdistill.data.parquet_check import check_parquet

BATCH_ROWS = 256
MAX_BATCH_BYTES = 2**27
READ_BYTES = 2**20
EMBEDDED_SCHEMA = b"ARROW:schema"


class ParquetTable:
    """An open Parquet file. `metadata` is what its writer put into the footer by key."""

    def __init__(self, file: IO[bytes], size: int, path: str, columns: tuple[str, ...], limits: Limits) -> None:
        facts = check_parquet(file, size, path, columns, limits)
        footer = facts.footer.replace(EMBEDDED_SCHEMA, b"-" * len(EMBEDDED_SCHEMA))
        self.file = pq.ParquetFile(
            pa.PythonFile(Overlaid(file, size, footer, size - 8 - len(footer)), "r"),
            pre_buffer=False,
            buffer_size=READ_BYTES,  # else a column of a row group is read whole
            page_checksum_verification=True,
        )
        self.path, self.columns, self.metadata, self.n_rows = path, columns, facts.metadata, facts.n_rows
        self.check_types(self.file.schema_arrow)
        # Each row of a batch may repeat the largest value of a dictionary, so large dictionaries mean small batches.
        self.batch_rows = max(1, min(BATCH_ROWS, MAX_BATCH_BYTES // (facts.dictionary_bytes + 1)))

    def check_types(self, schema: Any) -> None:
        """Refuses a table without its columns, or with other types in them."""
        check_column_names(self.path, schema.names, self.columns)
        image, label, *ids = (schema.field(name).type for name in self.columns)
        if pa.types.is_struct(image):
            image = image.field("bytes").type if image.get_field_index("bytes") >= 0 else pa.null()
        if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
            raise no_images(self.path, schema.names, self.columns[0])
        for kind, name, refusal in zip((label, *ids), self.columns[1:], (no_labels, no_ids), strict=False):
            if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise refusal(self.path, schema.names, name)

    def batches(self) -> Iterator[Batch]:
        """Yields some rows at a time, on this thread: images as bytes, labels and ids as integers or a list of text."""
        for batch in self.file.iter_batches(self.batch_rows, columns=list(self.columns), use_threads=False):
            images, *others = (batch.column(name) for name in self.columns)
            if pa.types.is_struct(images.type) and images.null_count == 0:
                images = images.field("bytes")
            check_nulls(self.path, any(column.null_count for column in (images, *others)))
            labels, *ids = (_values(column) for column in others)
            yield images.to_pylist(), labels, ids[0] if ids else None


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
