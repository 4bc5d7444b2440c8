"""Readers for labelled images: npz, folders, IDX, Parquet and Arrow, the bundled digits; and a public procedural set.

Everything a reader refuses is an InputError of one line. Faults of a file (it cannot be decoded, a label outside the
class list) are found here, before any budget is spent, and are outside the guarantee; faults of a value (NaN, infinite)
load, and the door counts such a record as zero. Never pickle, never a link inside a folder, never a value in a message.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpdistill.data.decode import check_resize, check_size, resize_arrays
from dpdistill.data.digits import NAMES, read_digits
from dpdistill.data.files import check_name, list_folder, one_error_type
from dpdistill.data.folder import read_folder
from dpdistill.data.idx import IMAGES_NAME, first_file, read_idx
from dpdistill.data.images import (
    LabelledImages,
    check_public_range,
    check_value_range,
    public_range,
    to_unit,
    valid_ids,
)
from dpdistill.data.labels import ONE_CLASS, check_labels, resolve_classes
from dpdistill.data.limits import DEFAULT_LIMITS, Limits
from dpdistill.data.npz import read_npz, to_nchw, write_npz
from dpdistill.data.procedural import procedural_images
from dpdistill.data.stack import with_channels
from dpdistill.data.stored import Images, StoredArray, chunks, mapped
from dpdistill.data.tables import find_tables, holds_tables, read_tables
from dpdistill.errors import InputError

__all__ = [
    "LabelledImages",
    "Limits",
    "StoredArray",
    "check_public_range",
    "chunks",
    "load_images",
    "procedural_images",
    "public_range",
    "to_unit",
    "write_npz",
]

KINDS = "an .npz, a folder of class folders, IDX files, .parquet, a Hugging Face folder, or digits"


def load_images(
    spec: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    n_classes: int | None = None,
    image_column: str | None = "image",
    label_column: str = "label",
    id_column: str | None = None,
    split: str | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    resize: int | None = None,
    channels: int | None = None,
    unlabelled: bool = False,
    public_labels: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> LabelledImages:
    """Reads labelled images from whatever `spec` is.

    | spec | what it holds |
    |---|---|
    | x.npz | arrays `images` [N, H, W], [N, H, W, C] or [N, C, H, W], `labels` [N], `classes` [K] of str if it can |
    | folder/class/*.png | PNG, JPEG, BMP or WebP; the class list is the sorted folder names |
    | IDX folder, file or prefix | *-images-idx3-ubyte and *-labels-idx1-ubyte, plain or .gz |
    | x.parquet, folder of Parquet | images as encoded bytes; class names from Hugging Face's metadata |
    | folder of save_to_disk | Arrow streams of the same columns |
    | digits, digits:train, digits:test | scikit-learn's bundled 8x8 digits |

    Args:
      class_names: the class list, where the file has none; else it must be equal (a folder's may be reordered).
      n_classes: the number of classes, named '0', '1', …, where the file has no list.
      image_column: of a table; None for the only one of images.
      label_column: of a table.
      id_column: array of an npz, or column of Parquet, that says whose record each is, as whole numbers or text.
      split: which part, where there are several. Default: `train`, or the only one.
      value_range: of float images. Public; never inferred from the pixels.
      resize: side of the square that every image is cropped and scaled to. Default: sizes stay, and must agree.
      channels: 1 or 3, to convert all to grey or all to colour. Default: they must agree.
      unlabelled: all are of one class, `image`: labels are not read, if there are any, and class folders not needed.
      public_labels: which labels are present is no secret, so that a file need not list its classes.
      limits: caps on what a file may ask for.

    Images of more than 256 MiB are not kept in memory: they stay in their file if it holds them as they are (IDX, npz without
    compression), or are unpacked or decoded, one after another, to a file without a name in `limits.scratch`.

    Returns:
      At least one image, height and width within `limits.min_size` and `limits.max_size` (8 and 64).

    Raises:
      InputError: for every content of every file. One line: path, reason, way out.
    """
    source = os.fspath(spec)
    with one_error_type(source):
        check_arguments(source, value_range, resize, channels, limits)
        kind = kind_of(spec, limits)
        images: Images
        labels: np.ndarray | None
        in_file: Sequence[object] | None = None
        ids: np.ndarray | None = None
        if id_column is not None and kind not in ("npz", "tables"):
            raise InputError(
                source, "cannot hold a column of ids", "write images, labels and ids to an .npz or to Parquet"
            )
        others = ("images", "labels", "classes") if kind == "npz" else (image_column, label_column)
        if id_column is not None and id_column in others:
            raise InputError(source, f"'{id_column}' says nothing of whose record each is", "name the ids")
        if kind == "digits":
            images, labels = read_digits(source, split)
            in_file = NAMES
        elif kind == "npz":
            images, labels, in_file, ids = read_npz(spec, limits, id_column, unlabelled)
            images = to_nchw(source, images, limits.scratch)
        elif kind == "idx":
            images, labels = read_idx(spec, split, limits, unlabelled)
        elif kind == "tables":
            images, labels, in_file, ids = read_tables(
                find_tables(spec, split, limits),
                image_column=image_column,
                label_column=None if unlabelled else label_column,
                id_column=id_column,
                class_names=class_names,
                resize=resize,
                channels=channels,
                limits=limits,
            )
        else:
            images, labels, in_file = read_folder(
                spec,
                split=split,
                class_names=class_names,
                resize=resize,
                channels=channels,
                limits=limits,
                unlabelled=unlabelled,
            )
        if unlabelled or labels is None:
            labels, in_file = np.zeros(len(images), np.int64), ONE_CLASS
        if public_labels and in_file is None and labels.dtype.kind in "iu" and len(labels):
            n_classes = int(labels.max()) + 1
        names = resolve_classes(source, in_file, class_names, n_classes, limits)
        labels = check_labels(source, labels, len(images), len(names))
        images = check_images(source, images, resize, channels, limits)
        if ids is not None and not (valid_ids(ids) and ids.shape == (len(images),)):
            raise InputError(
                source, f"{id_column!r} is not one whole number or text for each image", "write one id for each"
            )
        low, high = value_range
        return LabelledImages(
            images=images,
            labels=labels,
            class_names=names,
            value_range=(float(low), float(high)),
            source=source,
            ids=ids,
        )


def kind_of(spec: str | Path, limits: Limits) -> str:
    """Returns which reader fits: digits, npz, tables, idx or folder. A folder is told by what it holds."""
    path = os.fspath(spec)
    if isinstance(spec, str) and spec.partition(":")[0] == "digits":
        return "digits"
    name = check_name(path)
    if os.path.isdir(path):
        entries = list_folder(path, limits)
        if any(entry.name.endswith((".parquet", ".arrow")) for entry in entries):
            return "tables"
        if any(IMAGES_NAME.fullmatch(entry.name) for entry in entries):
            return "idx"
        if any(entry.name.endswith(".npz") for entry in entries):
            raise InputError(path, "holds npz files", "name one of them, for example train.npz")
        return "tables" if holds_tables(path, limits) else "folder"
    for suffix, kind in ((".npz", "npz"), (".parquet", "tables"), (".arrow", "tables")):
        if name.endswith(suffix):
            return kind
    if IMAGES_NAME.fullmatch(name) or first_file(os.path.dirname(path), name, "images", "idx3"):
        return "idx"
    if not os.path.lexists(path):
        raise InputError(path, "does not exist", "check the spelling")
    raise InputError(path, "is of no known kind", f"expected {KINDS}")


def check_arguments(
    source: str, value_range: tuple[float, float], resize: int | None, channels: int | None, limits: Limits
) -> None:
    """Refuses settings that no file could fit."""
    check_resize(source, resize, limits)
    if channels not in (None, 1, 3):
        raise InputError(source, "channels must be 1 or 3", "--set channels=1, --set channels=3, or leave it out")
    try:
        check_value_range(value_range)
    except (TypeError, ValueError):
        raise InputError(source, "value_range must be two finite numbers, low before high", "(0, 1) is usual") from None


def check_images(source: str, images: Images, resize: int | None, channels: int | None, limits: Limits) -> Images:
    """Returns images [N, C, H, W] that fit the caps: at least one, of a size that the models take."""
    n, c, h, w = images.shape
    if n == 0:
        raise InputError(source, "holds no images", "at least one is needed")
    if n > limits.max_images:
        raise InputError(
            source, f"holds more than {limits.max_images:,} images", "use a part of it, or raise --max-gib"
        )
    if resize is not None and max(h, w) <= limits.max_side and min(h, w) > 0 and (h, w) != (resize, resize):
        images = mapped(images, lambda part: resize_arrays(part, resize), limits.scratch)
    if channels not in (None, c):
        images = mapped(images, lambda part: np.stack([with_channels(x, channels) for x in part]), limits.scratch)
    check_size(source, images.shape[2], images.shape[3], limits)
    return images
