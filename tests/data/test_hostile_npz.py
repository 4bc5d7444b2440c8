"""Hostile npz files: every one is refused in one line that quotes no record."""

import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from dpdistill.data import Limits, load_images
from dpdistill.errors import InputError

SECRET = 87_654_321
ARRAYS = {"images": np.zeros((3, 8, 8), np.uint8), "labels": np.array([0, 1, SECRET])}


def npy(header="", shape="(3, 8, 8)", descr="|u1", body=b"\0" * 192, version=1):
    """Returns an npy stream with any header."""
    header = header or f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes((version, 0)) + size + header.encode() + body


def stream(array, **options):
    """Returns numpy's own npy stream."""
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


LABELS = stream(np.array([0, 1, 2]))
CLASSES = stream(np.array(["a", "b", "c"]))
GOOD = {"images.npy": npy(), "labels.npy": LABELS, "classes.npy": CLASSES}


def pack(members=GOOD, compression=zipfile.ZIP_STORED):
    """Returns a zip of members, given as a dict or as pairs."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            archive.writestr(name, data)
    return buffer.getvalue()


def patched(old, new, data=None):
    """Returns a valid archive with bytes replaced wherever they occur."""
    data = pack() if data is None else data
    assert old in data
    return data.replace(old, new)


def central(offset, fmt, value):
    """Returns a valid archive with one field of the first directory entry changed."""
    data = bytearray(pack())
    struct.pack_into(fmt, data, data.find(b"PK\x01\x02") + offset, value)
    return bytes(data)


def quiet_duplicate():
    """Returns an archive with two members of one name."""
    return pack({**GOOD, "imagez.npy": npy()}).replace(b"imagez.npy", b"images.npy")


def with_arrays(**arrays):
    """Returns an archive with some arrays of the valid one replaced."""
    return pack(GOOD | {f"{name}.npy": stream(array, allow_pickle=True) for name, array in arrays.items()})


CASES = {
    "decompression bomb": lambda: pack(
        GOOD | {"images.npy": npy(shape=f"({2**21}, 8, 8)", body=bytes(2**27))}, zipfile.ZIP_DEFLATED
    ),
    "bomb in labels": lambda: pack(
        GOOD | {"labels.npy": npy(shape=f"({2**24},)", descr="<i8", body=bytes(2**27))}, zipfile.ZIP_DEFLATED
    ),
    "more data than declared": lambda: patched(struct.pack("<I", len(npy())), struct.pack("<I", 100)),
    "declared size of 4 GiB": lambda: central(24, "<I", 2**32 - 2),
    "compressed size too large": lambda: central(20, "<I", 2**31),
    "repeated member": quiet_duplicate,
    "member that climbs out": lambda: pack(GOOD | {"../../evil.npy": b"x"}),
    "member with an absolute path": lambda: pack(GOOD | {"/etc/evil.npy": b"x"}),
    "member with a Windows path": lambda: pack(GOOD | {"C:\\evil.npy": b"x"}),
    "member with a newline": lambda: pack(GOOD | {"a\nb.npy": b"x"}),
    "member that is a script": lambda: pack(GOOD | {"run.sh": b"x"}),
    "a folder as a member": lambda: pack(GOOD | {"folder/": b""}),
    "too many members": lambda: pack(GOOD | {f"m{i}.npy": b"" for i in range(100)}),
    "oversized directory": lambda: pack(GOOD | {f"{'m' * 60000}{i}.npy": b"" for i in range(2)}),
    "object images": lambda: with_arrays(images=np.array([object()] * 3)),
    "object labels": lambda: with_arrays(labels=np.array([{"a": SECRET}] * 3)),
    "object classes": lambda: with_arrays(classes=np.array(["a", "b", "c"], object)),
    "structured dtype": lambda: with_arrays(images=np.zeros(3, [("a", "u1"), ("b", "f4")])),
    "complex images": lambda: with_arrays(images=np.zeros((3, 8, 8), complex)),
    "dates as labels": lambda: with_arrays(labels=np.zeros(3, "datetime64[s]")),
    "int64 images": lambda: with_arrays(images=np.zeros((3, 8, 8), np.int64)),
    "boolean images": lambda: with_arrays(images=np.zeros((3, 8, 8), bool)),
    "text images": lambda: with_arrays(images=np.zeros((3, 8, 8), "U1")),
    "shape of 10^12": lambda: pack(GOOD | {"images.npy": npy(shape="(1000000000000, 8, 8)")}),
    "shape whose product wraps to zero": lambda: pack(GOOD | {"images.npy": npy(shape=f"({2**32}, {2**32}, 8)")}),
    "shape of 3,000 digits": lambda: pack(GOOD | {"images.npy": npy(shape=f"({'9' * 3000},)")}),
    "negative shape": lambda: pack(GOOD | {"images.npy": npy(shape="(-3, 8, 8)")}),
    "shape of floats": lambda: pack(GOOD | {"images.npy": npy(shape="(3.0, 8, 8)")}),
    "64 dimensions": lambda: pack(GOOD | {"images.npy": npy(shape="(" + "1, " * 64 + ")", body=b"\0")}),
    "header is a call": lambda: pack(GOOD | {"images.npy": npy(header="__import__('os').system('true')")}),
    "header nested 1,000 deep": lambda: pack(GOOD | {"images.npy": npy(header="(" * 1000 + ")" * 1000)}),
    "header of a megabyte": lambda: pack(GOOD | {"images.npy": npy(header=" " * 2**20, version=2)}),
    "header not closed": lambda: pack(GOOD | {"images.npy": npy(header="{'descr': '|u1'")}),
    "unknown npy version": lambda: pack(GOOD | {"images.npy": npy(version=9)}),
    "array cut short": lambda: pack(GOOD | {"images.npy": npy(body=b"\0" * 100)}),
    "array too long": lambda: pack(GOOD | {"images.npy": npy(body=b"\0" * 300)}),
    "member is no npy": lambda: pack(GOOD | {"images.npy": b"hello"}),
    "empty member": lambda: pack(GOOD | {"images.npy": b""}),
    "archive cut short": lambda: pack()[:-30],
    "archive cut in half": lambda: pack()[:300],
    "wrong checksum": lambda: patched(b"\0" * 150, b"\0" * 149 + b"\1"),
    "encrypted": lambda: central(8, "<H", 1),
    "bzip2": lambda: pack(GOOD, zipfile.ZIP_BZIP2),
    "lzma": lambda: pack(GOOD, zipfile.ZIP_LZMA),
    "data before the archive": lambda: b"#!/bin/sh\n" + pack(),
    "data after the archive": lambda: pack() + b"MZ",
    "end record in a comment": lambda: pack()[:-2] + struct.pack("<H", 22) + b"PK\x05\x06" + bytes(18),
    "64-bit directory": lambda: pack()[:-22] + b"PK\x06\x07" + bytes(16) + pack()[-22:],
    "split archive": lambda: pack()[:-18] + b"\1\0" + pack()[-16:],
    "pickle named npz": lambda: pickle.dumps(ARRAYS),
    "PNG named npz": lambda: b"\x89PNG\r\n\x1a\n" + bytes(100),
    "text named npz": lambda: b"images,labels\n=cmd|' /C calc'!A0,1\n",
    "empty file": lambda: b"",
    "no images": lambda: pack({"labels.npy": LABELS}),
    "no labels": lambda: pack({"images.npy": npy()}),
    "no class list": lambda: pack({"images.npy": npy(), "labels.npy": LABELS}),
    "zero records": lambda: with_arrays(images=np.zeros((0, 8, 8), np.uint8), labels=np.zeros(0, int)),
    "zero-sized images": lambda: with_arrays(images=np.zeros((3, 0, 8), np.uint8)),
    "labels of another length": lambda: with_arrays(labels=np.zeros(SECRET % 1000, int)),
    "one-hot labels": lambda: with_arrays(labels=np.eye(3)),
    "scalar label": lambda: with_arrays(labels=np.array(SECRET)),
    "label too large": lambda: with_arrays(labels=np.array([0, 1, SECRET])),
    "label of 2^64 - 1": lambda: with_arrays(labels=np.array([0, 1, 2**64 - 1], np.uint64)),
    "negative label": lambda: with_arrays(labels=np.array([0, 1, -SECRET])),
    "label between two classes": lambda: with_arrays(labels=np.array([0, 1, 0.5])),
    "NaN label": lambda: with_arrays(labels=np.array([0, 1, np.nan])),
    "infinite label": lambda: with_arrays(labels=np.array([0, 1, np.inf])),
    "text labels": lambda: with_arrays(labels=np.array(["a", "b", str(SECRET)])),
    "repeated class": lambda: with_arrays(classes=np.array(["a", "a", "b"])),
    "empty class name": lambda: with_arrays(classes=np.array(["a", "", "b"])),
    "class name with right-to-left": lambda: with_arrays(classes=np.array(["a", "b\u202egpj", "c"])),
    "class name with a newline": lambda: with_arrays(classes=np.array(["a", "b\nc", "d"])),
    "classes as numbers": lambda: with_arrays(classes=np.arange(3)),
    "classes beyond Unicode": lambda: pack(
        GOOD | {"classes.npy": npy(shape="(3,)", descr="<U1", body=b"\xff" * 12)}  # no such character
    ),
    "too many classes": lambda: with_arrays(classes=np.arange(20_000).astype("U5")),
    "flat images": lambda: with_arrays(images=np.zeros((3, 64), np.uint8)),
    "video": lambda: with_arrays(images=np.zeros((3, 2, 8, 8, 3), np.uint8)),
    "two channels": lambda: with_arrays(images=np.zeros((3, 2, 8, 8), np.uint8)),
    "ambiguous channel axis": lambda: with_arrays(images=np.zeros((3, 3, 8, 3), np.uint8)),
    "images too small": lambda: with_arrays(images=np.zeros((3, 8, 7), np.uint8)),
    "images too large": lambda: with_arrays(images=np.zeros((3, 65, 8), np.uint8)),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(tmp_path, name):
    path = tmp_path / "x.npz"
    path.write_bytes(CASES[name]())
    with pytest.raises(InputError) as caught:
        load_images(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < len(str(path)) + 300
    assert str(SECRET) not in message
    assert str(SECRET % 1000) not in message.replace(str(path), "")


@pytest.mark.parametrize("name", ["decompression bomb", "bomb in labels", "shape of 10^12", "declared size of 4 GiB"])
def test_nothing_is_unpacked_before_it_is_refused(tmp_path, name):
    path = tmp_path / "x.npz"
    path.write_bytes(CASES[name]())
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            load_images(path)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_the_valid_archive_is_valid(tmp_path):
    (tmp_path / "x.npz").write_bytes(pack())
    assert load_images(tmp_path / "x.npz").n_classes == 3


@pytest.mark.parametrize("limit", ["max_file_bytes", "max_array_bytes", "max_images", "max_classes", "max_size"])
def test_every_cap_holds(tmp_path, limit):
    (tmp_path / "x.npz").write_bytes(pack())
    low = {"min_size": 1} if limit == "max_size" else {}
    with pytest.raises(InputError):
        load_images(tmp_path / "x.npz", limits=Limits(**{limit: 2}, **low))
