"""npz files: a zip archive of npy arrays `images`, `labels` and, if it can, `classes`.

Hostile archives are the point of this file. Before a byte is unpacked: few members, plain names, no repeats, nothing
around the archive, known compression, declared sizes under the caps. While unpacking: never more than was declared.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from dpdistill.data.files import one_error_type, open_regular, pieces
from dpdistill.data.images import LabelledImages
from dpdistill.data.labels import UNLABELLED_HINT
from dpdistill.data.limits import Limits
from dpdistill.data.npy import checked_header, read_array, read_rest
from dpdistill.data.stored import Images, StoredArray, filled, in_place, mapped, room, too_large, with_channel
from dpdistill.errors import InputError

MAX_MEMBERS = 64
MAX_DIRECTORY_BYTES = 2**16
END_RECORD = struct.Struct("<4s4H2LH")  # the zip format's "end of central directory"
END_RECORD_64 = struct.Struct("<4sQ2H2L4Q")  # before it, in an archive of more than 2 GiB; then:
LOCATOR = struct.Struct("<4sLQL")
LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a member, before its name


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
    end, before = at + END_RECORD.size + comment, at - LOCATOR.size
    if before >= 0 and tail.startswith(
        b"PK\x06\x07", before
    ):  # more than 2 GiB: the true numbers are in a longer record
        at = before - END_RECORD_64.size
        if at < 0 or LOCATOR.unpack_from(tail, before)[1:] != (0, tail_start + at, 1):
            raise InputError(path, "is a split or damaged archive", "write it with numpy.savez")
        kind, length, _, _, disk, first_disk, here, total, directory_bytes, offset = END_RECORD_64.unpack_from(tail, at)
        if (kind, length) != (b"PK\x06\x06", END_RECORD_64.size - 12):
            raise InputError(path, "is a split or damaged archive", "write it with numpy.savez")
    if disk or first_disk or here != total:
        raise InputError(path, "is a split archive", "write it with numpy.savez")
    if total > MAX_MEMBERS or directory_bytes > MAX_DIRECTORY_BYTES:
        raise InputError(path, f"has more than {MAX_MEMBERS} members", "keep images, labels and classes")
    if end != len(tail) or offset + directory_bytes != tail_start + at:
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
    path: str | Path, limits: Limits, id_column: str | None = None, unlabelled: bool = False
) -> tuple[Images, np.ndarray | None, list[str] | None, np.ndarray | None]:
    """Reads `images`, `labels`, `classes` (None if absent) and, if it is named, the array of ids. Other members are not unpacked.

    Args:
      unlabelled: reads neither labels nor classes; both are None.

    Raises:
      InputError: anything wrong with the archive or with an array in it.
    """
    with open_regular(path, limits) as (file, size), one_error_type(path):
        check_archive(file, size, path)
        with zipfile.ZipFile(file) as archive:
            members = check_members(archive, path)
            wanted = ({"images"} if unlabelled else {"images", "labels"}) | (
                {id_column} if id_column is not None else set()
            )
            for name in sorted(wanted):
                if name not in members:
                    hint = "save it with numpy.savez(path, images=, labels=)"
                    hint += f"; {UNLABELLED_HINT}" if name == "labels" else ""
                    raise InputError(path, f"has no array '{name}'", hint)
            images: Images | None = None
            arrays: dict[str, np.ndarray] = {}
            for name in sorted((wanted | (set() if unlabelled else {"classes"})) & set(members)):
                info = members[name]
                if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
                    raise InputError(path, "declares two sizes for one member", "write it with numpy.savez")
                packed = min(info.compress_size, size)
                with archive.open(info) as stream:
                    if name == "images":
                        images = read_images(stream, file, info, f"{path}:{name}", packed, limits)
                    else:
                        arrays[name] = read_array(
                            stream, f"{path}:{name}", stored_bytes=info.file_size, packed_bytes=packed, limits=limits
                        )
    assert images is not None
    ids = arrays[id_column] if id_column is not None else None
    return images, arrays.get("labels"), as_names(path, arrays.get("classes")), ids


def read_images(
    stream: IO[bytes], file: IO[bytes], info: zipfile.ZipInfo, path: str, packed: int, limits: Limits
) -> Images:
    """Reads the member of images. What does not fit in memory is unpacked to a file, or stays where it is if it is not packed.

    Args:
      stream: the member, unpacked.
      file: the archive.
      packed: bytes of the member on disk.
    """
    header = checked_header(stream, path, stored_bytes=info.file_size, packed_bytes=packed, limits=limits)
    if header.fortran_order or not too_large(
        header.shape, header.dtype
    ):  # a record of Fortran order is all over the file
        return read_rest(stream, path, header)
    content = pieces(stream, header.n_bytes, path)
    if info.compress_type != zipfile.ZIP_STORED:
        return filled(room(header.shape, header.dtype, limits.scratch), content)
    for _ in content:  # to its end: there zipfile compares the check sum
        pass
    local = LOCAL_HEADER.unpack(os.pread(file.fileno(), LOCAL_HEADER.size, info.header_offset))
    start = info.header_offset + LOCAL_HEADER.size + local[-2] + local[-1] + header.n_header_bytes
    return in_place(file, start, header.shape, header.dtype, path)


def as_names(path: object, classes: np.ndarray | None) -> list[str] | None:
    """Returns the array of class names as a list of str."""
    if classes is None:
        return None
    if classes.dtype.kind != "U" or classes.ndim != 1:
        raise InputError(path, "'classes' must be an array [K] of str", "for example numpy.array(['cat', 'dog'])")
    with one_error_type(path):
        return [str(name) for name in classes.tolist()]


def to_nchw(path: object, images: Images, scratch: str | None = None) -> Images:
    """Returns images as [N, C, H, W] from [N, H, W], [N, H, W, C] or [N, C, H, W], uint8 or float32 in C order.

    The axis of size 1 or 3 is the channels. If both candidates are, the order is ambiguous and an error.
    """
    if images.dtype.kind not in "uf" or (images.dtype.kind == "u" and images.dtype != np.uint8):
        raise InputError(
            path,
            f"has images of dtype {images.dtype}",
            "use uint8 in 0..255, or float32 (of --data with --set value_low=… and --set value_high=…)",
        )
    if images.ndim == 3:
        images, first = with_channel(images), True
    elif images.ndim == 4:
        first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
        if first and last:
            raise InputError(path, "has images whose channel axis is ambiguous", "save grey images as [N, H, W]")
        if not first and not last:
            raise InputError(path, "has images with neither 1 nor 3 channels", "save grey as [N, H, W], colour as RGB")
    else:
        raise InputError(
            path, "has images that are not [N, H, W], [N, H, W, C] or [N, C, H, W]", "reshape them, and save them again"
        )
    dtype = np.dtype(np.uint8 if images.dtype == np.uint8 else np.float32)
    if isinstance(images, StoredArray) and first and images.dtype == dtype:
        return images

    def arranged(part: np.ndarray) -> np.ndarray:
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # a float64 beyond float32 becomes inf: that record counts zero
            return np.ascontiguousarray(part if first else part.transpose(0, 3, 1, 2), dtype)

    return mapped(images, arranged, scratch)


def write_npz(path: str | Path, data: LabelledImages) -> None:
    """Writes images, labels, class names and, where there are any, `ids` so that `load_images` reads them back equal.

    The declared range of float images is not in the file: pass `value_range` again when loading.
    """
    with open(path, "wb") as file:
        arrays = {"images": data.images[:], "labels": data.labels, "classes": np.array(data.class_names, "U")}
        np.savez_compressed(file, **arrays, **({} if data.ids is None else {"ids": data.ids}))
