"""IDX files, the format of MNIST: a big-endian header, then bytes; often gzipped.

Format: http://yann.lecun.com/exdb/mnist. Only unsigned bytes are read: [N, H, W] images and [N] labels.
"""

from __future__ import annotations

import gzip
import math
import os
import re
from pathlib import Path
from typing import IO, cast

import numpy as np

from dpdistill.data.files import check_name, list_folder, one_error_type, open_regular, pieces, read_exactly
from dpdistill.data.labels import UNLABELLED_HINT
from dpdistill.data.limits import Limits, check_unpacked
from dpdistill.data.splits import choose_split
from dpdistill.data.stored import Images, filled, in_place, room, too_large, with_channel
from dpdistill.errors import InputError

IMAGES_NAME = re.compile(r"(?P<prefix>.*?)[-_.]?images[-.]idx3-ubyte(\.gz)?", re.ASCII)
LABELS_NAME = re.compile(r"(?P<prefix>.*?)[-_.]?labels[-.]idx1-ubyte(\.gz)?", re.ASCII)
PAIR_HINT = f"expected PREFIX-images-idx3-ubyte[.gz] and PREFIX-labels-idx1-ubyte[.gz]; {UNLABELLED_HINT}"


def find_pair(path: str | Path, split: str | None, limits: Limits, unlabelled: bool = False) -> tuple[str, str | None]:
    """Returns the paths of the image file and the label file, which is None where labels are not read.

    Args:
      path: a folder that holds pairs, the image file of a pair, or a path prefix such as mnist/train.
      split: the prefix to take from a folder; `test` also finds MNIST's own `t10k`.

    Raises:
      InputError: no pair, or several and none asked for.
    """
    if os.path.isdir(path):
        return pair_in_folder(path, split, limits, unlabelled)
    folder, name = os.path.split(path)
    check_name(path)
    match = IMAGES_NAME.fullmatch(name)
    prefix = name if match is None else match["prefix"]
    images = os.fspath(path) if match is not None else first_file(folder, prefix, "images", "idx3")
    labels = None if unlabelled else first_file(folder, prefix, "labels", "idx1")
    if images is None or (labels is None and not unlabelled):
        raise InputError(path, "has no pair of image and label files", PAIR_HINT)
    return images, labels


def first_file(folder: str, prefix: str, what: str, idx: str) -> str | None:
    """Returns the first of the usual names of one half of a pair that exists: plain before gzipped."""
    names = [f"{prefix}{a}{what}{b}{idx}-ubyte{gz}" for gz in ("", ".gz") for a in ("-", "_", ".", "") for b in "-."]
    paths = [os.path.join(folder, name) for name in names]
    return next((path for path in paths if os.path.lexists(path)), None)


def pair_in_folder(folder: str | Path, split: str | None, limits: Limits, unlabelled: bool) -> tuple[str, str | None]:
    """Returns the pair of the split asked for."""
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    for entry in list_folder(folder, limits):
        for pattern, found in ((IMAGES_NAME, images), (LABELS_NAME, labels)):
            match = pattern.fullmatch(entry.name)
            if match is not None:
                found.setdefault(match["prefix"], entry.path)  # sorted order: a plain file comes before its .gz
    both = sorted(images.keys() if unlabelled else images.keys() & labels.keys())
    if not both:
        raise InputError(folder, "has no pair of image and label files", PAIR_HINT)
    chosen = choose_split(folder, both, "t10k" if split == "test" and "test" not in both else split)
    return images[chosen], None if unlabelled else labels[chosen]


def read_idx(
    path: str | Path, split: str | None, limits: Limits, unlabelled: bool = False
) -> tuple[Images, np.ndarray | None]:
    """Reads a pair. Returns uint8 [N, 1, H, W] and uint8 [N], or None where labels are not read.

    Images that do not fit in memory stay in their file, if it is not packed.

    Raises:
      InputError: wrong magic number, sizes that do not fit, too large, or damaged.
    """
    images_path, labels_path = find_pair(path, split, limits, unlabelled)
    images = with_channel(read_bytes(images_path, 3, limits))
    return images, None if labels_path is None else read_bytes(labels_path, 1, limits)[:]


def read_bytes(path: str, n_dims: int, limits: Limits) -> Images:
    """Reads one IDX file of unsigned bytes."""
    with open_regular(path, limits) as (file, size), one_error_type(path):
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file
        header = read_exactly(stream, 4 + 4 * n_dims, path)
        if header[:4] != bytes((0, 0, 8, n_dims)):
            raise InputError(path, f"is not an IDX file of bytes with {n_dims} dimensions", "download it again")
        shape = tuple(int(dim) for dim in np.frombuffer(header, ">u4", offset=4))
        n_bytes = math.prod(shape)  # exact: a product of int64 could wrap around
        if not packed and n_bytes + len(header) != size:
            raise InputError(path, "has a header that does not fit its size", "copy or download it again")
        check_unpacked(path, n_bytes, size, limits)
        dtype = np.dtype(np.uint8)
        if not packed and too_large(shape, dtype):
            return in_place(file, len(header), shape, dtype, path)
        return filled(room(shape, dtype, limits.scratch), pieces(stream, n_bytes, path))
