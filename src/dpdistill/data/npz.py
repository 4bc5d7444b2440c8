"""npz files: a zip archive of npy arrays `images`, `labels` and, if it can, `classes`.

Hostile archives are the point of this file. Before a byte is unpacked: few members, plain names, no repeats, nothing
around the archive, known compression, declared sizes under the caps. While unpacking: never more than was declared.
"""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from dpdistill.data.files import one_error_type, open_regular
from dpdistill.data.images import LabelledImages
from dpdistill.data.limits import Limits
from dpdistill.data.npy import read_array
from dpdistill.errors import InputError

MAX_MEMBERS = 64
MAX_DIRECTORY_BYTES = 2**16
END_RECORD = struct.Struct("<4s4H2LH")  # the zip format's "end of central directory"


def check_archive(file: IO[bytes], size: int, path: object) -> None:
    """Refuses a zip whose directory is large, or that has anything before, after or between archive and directory."""
    tail_start = max(0, size - END_RECORD.size - 2**16)
    file.seek(0)
    starts_well = file.read(4) == b"PK\x03\x04"
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if not starts_well or at < 0 or len(tail) - at < END_RECORD.size:
        raise InputError(path, "is not a zip archive, or is cut short", "write it with numpy.savez")
    _, disk, first_disk, here, total, directory_bytes, offset, comment = END_RECORD.unpack_from(tail, at)
    if disk or first_disk or here != total or b"PK\x06\x07" in tail:
        raise InputError(path, "is a split or 64-bit archive", "write it with numpy.savez, below 4 GiB")
    if total > MAX_MEMBERS or directory_bytes > MAX_DIRECTORY_BYTES:
        raise InputError(path, f"has more than {MAX_MEMBERS} members", "keep images, labels and classes")
    if at + END_RECORD.size + comment != len(tail) or offset + directory_bytes != tail_start + at:
        raise InputError(path, "has data before, between or after the archive", "write it with numpy.savez")


def check_members(archive: zipfile.ZipFile, path: object) -> dict[str, zipfile.ZipInfo]:
    """Returns the members by array name. Repeats, paths, encryption and rare compressions are refused."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.npy", info.filename, re.ASCII):
            raise InputError(path, "has a member that is not a plainly named npy array", "write it with numpy.savez")
        name = info.filename.removesuffix(".npy")
        if name in members:
            raise InputError(path, "has two members of the same name", "write it with numpy.savez")
        if info.flag_bits & 1:
            raise InputError(path, "is encrypted", "decrypt it first")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(path, "uses a compression other than deflate", "write it with numpy.savez_compressed")
        members[name] = info
    return members


def read_npz(
    path: str | Path, limits: Limits, id_column: str | None = None
) -> tuple[np.ndarray, np.ndarray, list[str] | None, np.ndarray | None]:
    """Reads `images`, `labels`, `classes` (None if absent) and, if it is named, the array of ids. Other members are not unpacked.

    Raises:
      InputError: anything wrong with the archive or with an array in it.
    """
    with open_regular(path, limits) as (file, size), one_error_type(path):
        check_archive(file, size, path)
        with zipfile.ZipFile(file) as archive:
            members = check_members(archive, path)
            wanted = {"images", "labels"} | ({id_column} if id_column is not None else set())
            for name in sorted(wanted):
                if name not in members:
                    raise InputError(path, f"has no array '{name}'", "save it with numpy.savez(path, images=, labels=)")
            arrays = {}
            for name in sorted((wanted | {"classes"}) & set(members)):
                info = members[name]
                if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
                    raise InputError(path, "declares two sizes for one member", "write it with numpy.savez")
                with archive.open(info) as stream:
                    packed = min(info.compress_size, size)
                    arrays[name] = read_array(
                        stream, f"{path}:{name}", stored_bytes=info.file_size, packed_bytes=packed, limits=limits
                    )
    ids = arrays[id_column] if id_column is not None else None
    return arrays["images"], arrays["labels"], as_names(path, arrays.get("classes")), ids


def as_names(path: object, classes: np.ndarray | None) -> list[str] | None:
    """Returns the array of class names as a list of str."""
    if classes is None:
        return None
    if classes.dtype.kind != "U" or classes.ndim != 1:
        raise InputError(path, "'classes' must be an array [K] of str", "for example numpy.array(['cat', 'dog'])")
    with one_error_type(path):
        return [str(name) for name in classes.tolist()]


def to_nchw(path: object, images: np.ndarray) -> np.ndarray:
    """Returns images as [N, C, H, W] from [N, H, W], [N, H, W, C] or [N, C, H, W], uint8 or float32.

    The axis of size 1 or 3 is the channels. If both candidates are, the order is ambiguous and an error.
    """
    if images.dtype.kind not in "uf" or (images.dtype.kind == "u" and images.dtype != np.uint8):
        raise InputError(
            path, f"has images of dtype {images.dtype}", "use uint8 in 0..255, or float32 with value_range"
        )
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first and last:
            raise InputError(path, "has images whose channel axis is ambiguous", "save grey images as [N, H, W]")
        if not first and not last:
            raise InputError(path, "has images with neither 1 nor 3 channels", "save grey as [N, H, W], colour as RGB")
        images = images if first else images.transpose(0, 3, 1, 2)
    else:
        raise InputError(path, "has images that are not [N, H, W], [N, H, W, C] or [N, C, H, W]")
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    with np.errstate(over="ignore", invalid="ignore"):  # a float64 beyond float32 becomes inf: that record counts zero
        return np.ascontiguousarray(images, np.float32)


def write_npz(path: str | Path, data: LabelledImages) -> None:
    """Writes images, labels, class names and, where there are any, `ids` so that `load_images` reads them back equal.

    The declared range of float images is not in the file: pass `value_range` again when loading.
    """
    with open(path, "wb") as file:
        arrays = {"images": data.images, "labels": data.labels, "classes": np.array(data.class_names, "U")}
        np.savez_compressed(file, **arrays, **({} if data.ids is None else {"ids": data.ids}))
