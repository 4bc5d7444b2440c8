"""Parquet and Arrow tables of encoded images, as Hugging Face `datasets` writes them.

A row is an image, as struct<bytes, path> or plain bytes, and a label, if it is read, as an integer or one of the class names. The
bytes are decoded like image files (`decode.py`). Where tables lie in a folder: `find_tables`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpdistill.data.arrow_stream import ArrowStream
from dpdistill.data.columns import Columns
from dpdistill.data.decode import decode_image
from dpdistill.data.files import list_folder, no_warnings, one_error_type, open_regular
from dpdistill.data.huggingface import class_names_of
from dpdistill.data.limits import Limits
from dpdistill.data.splits import choose_split, group_shards
from dpdistill.data.stack import stack_images
from dpdistill.data.stored import Images
from dpdistill.errors import InputError

if TYPE_CHECKING:
    from dpdistill.data.parquet import ParquetTable

SUFFIXES = (".parquet", ".arrow")
MAX_ID = 200  # characters: an array of text takes as much for each as for the longest


def find_tables(path: str | Path, split: str | None, limits: Limits) -> list[str]:
    """Returns the table files of one split, in order.

    Args:
      path: a .parquet or .arrow file; a folder of Parquet shards, or with them in data/ or in a folder for each split;
        or what `save_to_disk` wrote, for one split (data-*.arrow) or for several (train/data-*.arrow, …).

    Raises:
      InputError: none found, an unclear split, or a shard is missing.
    """
    if not os.path.isdir(path):
        return [os.fspath(path)]
    entries = list_folder(path, limits)
    for suffix in SUFFIXES:
        stems = {entry.name.removesuffix(suffix): entry.path for entry in entries if entry.name.endswith(suffix)}
        if stems:
            groups = group_shards(path, stems)
            only = len(groups) == 1 and (split is None or set(groups) <= {"", "data"})
            return [stems[stem] for stem in groups[next(iter(groups)) if only else choose_split(path, groups, split)]]
    folders = {entry.name: entry.path for entry in entries if entry.is_dir(follow_symlinks=False)}
    if set(folders) == {"data"}:
        return find_tables(folders["data"], split, limits)
    holding = [name for name in folders if holds_tables(folders[name], limits)]
    return find_tables(folders[choose_split(path, holding, split)], None, limits)


def holds_tables(path: str | Path, limits: Limits, depth: int = 1) -> bool:
    """Says whether a folder holds table files, itself or one level below."""
    entries = list_folder(path, limits)
    if any(entry.name.endswith(SUFFIXES) for entry in entries):
        return True
    folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    return depth > 0 and len(folders) <= 100 and any(holds_tables(entry.path, limits, depth - 1) for entry in folders)


@contextmanager
def open_table(path: str, columns: Columns, limits: Limits) -> Iterator[ArrowStream | ParquetTable]:
    """Opens a file by its extension and checks that it has the columns.

    Raises:
      InputError: not such a table. Also for anything that a reader raises while the file is open.
    """
    with open_regular(path, limits) as (file, size), one_error_type(path):
        if path.endswith(".arrow"):
            yield ArrowStream(file, size, path, columns, limits)
        else:
            with no_warnings():
                from dpdistill.data.parquet import ParquetTable  # here: importing pyarrow takes a quarter of a second
            yield ParquetTable(file, size, path, columns, limits)


def read_tables(
    paths: Sequence[str],
    *,
    image_column: str | None,
    label_column: str | None,
    id_column: str | None,
    class_names: Sequence[str] | None,
    resize: int | None,
    channels: int | None,
    limits: Limits,
) -> tuple[Images, np.ndarray | None, list[str] | None, np.ndarray | None]:
    """Reads the tables of one split.

    Args:
      paths: from `find_tables`, at least one.
      image_column: None for the only one of images.
      label_column: None to read none.
      class_names: that the user declares, to translate a column of text labels.

    Returns:
      Images uint8 [N, C, H, W], labels [N] (integers), if they are read, the class names that the schemas declare, or None, and ids as
      text [N], if asked.

    Raises:
      InputError: a column is missing or of another type, a value is null, an image cannot be decoded, or shards differ.
    """

    columns = Columns(image_column, label_column, id_column)
    if id_column is not None and paths[0].endswith(".arrow"):
        raise InputError(paths[0], "is an Arrow stream, of which ids are not read", "save it as Parquet")
    declared: list[list[str] | None] = []
    n_rows = 0
    for path in paths:
        with open_table(path, columns, limits) as table:
            declared.append(None if label_column is None else class_names_of(path, table.metadata, label_column))
            n_rows += table.n_rows
            if declared[-1] != declared[0]:
                raise InputError(path, "lists other classes than the shards before it", "write all shards together")
            if n_rows > limits.max_images:
                reason = f"belongs to a data set of more than {limits.max_images:,} images"
                raise InputError(path, reason, "give fewer of its shards")
    labels: list[np.ndarray] = []
    ids: list[str] = []

    def rows() -> Iterator[tuple[object, np.ndarray]]:
        """Yields decoded images, and collects labels and ids on the way."""
        for path in paths:
            with open_table(path, columns, limits) as table:
                for images, labels_B, ids_B in table.batches():
                    if isinstance(labels_B, list):
                        labels_B = positions(path, labels_B, class_names)
                    if labels_B is not None:
                        labels.append(labels_B)
                    ids.extend(map(str, [] if ids_B is None else ids_B))
                    for data in images:
                        yield path, decode_image(data, image_name(path), limits, resize)

    with one_error_type(paths[0]):
        images = stack_images(paths[0], rows(), n_rows, limits, channels)
        if max(map(len, ids), default=0) > MAX_ID:
            raise InputError(paths[0], f"has ids of more than {MAX_ID} characters", "write shorter ones")
        return (
            images,
            None if label_column is None else np.concatenate(labels),
            declared[0],
            None if id_column is None else np.array(ids, np.str_),
        )


def image_name(path: str) -> str:
    """Returns how messages name an image inside a table: without its row, which is private."""
    return f"an image in {path}"


def positions(path: object, names_B: Sequence[str], class_names: Sequence[str] | None) -> np.ndarray:
    """Returns the position in the class list of each text label. One that is not in it gets -1, refused later."""
    if class_names is None:
        raise InputError(path, "has text labels", "--set class_names=A,B,…: the set of labels present is private")
    index = {name: k for k, name in enumerate(class_names)}
    return np.array([index.get(name, -1) for name in names_B], np.int64)
