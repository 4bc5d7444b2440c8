"""The synthetic set as a Parquet table of PNG images that `datasets` loads with its class names.

Columns: `image` struct{bytes, path}, `label` int64 (ClassLabel), and where there are soft labels a list with one vector
per training image (parts² of them). Stored uncompressed and without dictionaries, so that a checker inflates nothing.
"""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..data.limits import DEFAULT_LIMITS
from ..data.parquet_check import check_parquet
from ..errors import InputError, ReleaseError
from . import png

_LAYOUT = {
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": False,
    "version": "2.6",
    "data_page_version": "1.0",
}


def _schema(class_names: tuple[str, ...], soft: bool) -> pa.Schema:
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": list(class_names), "_type": "ClassLabel"},
    }
    fields = [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())]
    if soft:
        # "Sequence" is read by every version of `datasets`; its later name "List" only by version 4 and up.
        vector = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
        features["soft_labels"] = {"feature": vector, "_type": "Sequence"}
        vectors = pa.list_(pa.field("element", pa.list_(pa.field("element", pa.float32()))))
        fields.append(("soft_labels", vectors))
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}}, sort_keys=True)})


def _columns(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64], soft: NDArray[np.float32] | None
) -> dict[str, list[Any]]:
    digits = len(str(max(0, len(labels) - 1)))
    images = [{"bytes": png.encode(image), "path": f"{index:0{digits}d}.png"} for index, image in enumerate(pixels)]
    columns = {"image": images, "label": labels.tolist()}
    if soft is not None:
        columns["soft_labels"] = soft.reshape(len(labels), -1, soft.shape[-1]).tolist()
    return columns


def write(
    pixels: NDArray[np.uint8], labels: NDArray[np.int64], soft: NDArray[np.float32] | None, class_names: tuple[str, ...]
) -> bytes:
    """Returns the Parquet file of images [M, H, W, C], labels [M] and soft labels [M·parts², K]."""
    table = pa.table(_columns(pixels, labels, soft), schema=_schema(class_names, soft is not None))
    sink = io.BytesIO()
    pq.write_table(table, sink, **_LAYOUT)
    return sink.getvalue()


def check(
    raw: bytes,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    soft: NDArray[np.float32] | None,
    class_names: tuple[str, ...],
) -> None:
    """Raises ReleaseError unless `raw` is an uncompressed Parquet file of exactly these rows and names."""
    try:
        # pyarrow is C++ and trusts what a file declares: nothing reaches it that contradicts itself.
        check_parquet(
            io.BytesIO(raw), len(raw), "dataset/train.parquet", ("image", "label", "soft_labels"), DEFAULT_LIMITS
        )
        file = pq.ParquetFile(io.BytesIO(raw), thrift_string_size_limit=2**24, thrift_container_size_limit=2**20)
        meta = file.metadata
        plain = all(
            meta.row_group(group).column(column).compression == "UNCOMPRESSED"
            for group in range(meta.num_row_groups)
            for column in range(meta.num_columns)
        )
        wanted = _schema(class_names, soft is not None)
        if meta.num_rows != len(labels) or not plain or not file.schema_arrow.equals(wanted, check_metadata=True):
            raise ReleaseError("other columns, class names, rows or compression than the certificate's")
        table = file.read()
        same = table.num_rows == len(labels) and table.equals(pa.table(_columns(pixels, labels, soft), schema=wanted))
    except ReleaseError:
        raise
    except InputError as error:
        raise ReleaseError(f"not a readable table ({error.reason})") from None
    except Exception as error:  # pyarrow raises many kinds; a table that it cannot read is not a release
        raise ReleaseError(f"not a readable table ({type(error).__name__})") from None
    if not same:
        raise ReleaseError("its rows are not the images and labels of the tensors")
