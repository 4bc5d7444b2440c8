"""Hostile data sets: image files, folders, npz, IDX, Parquet and Arrow. What is hostile in each, and how to make it.

Each case is a function that writes into an empty folder and returns what `--data` names. `SECRET` stands for what a record says:
no message may quote it.
"""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import small_files

SECRET = 87_654_321


# --- image files, one in a class folder


def chunk(kind, data):
    """Returns one PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(w, h, rows, depth=8, colour=0, extra=b""):
    """Returns a PNG of any declared size."""
    head = chunk(b"IHDR", struct.pack(">2I5B", w, h, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image, kind, **options):
    """Returns an encoded Pillow image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GREY = png(8, 8, bytes(72))
FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
ITXT_BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27)))

# Each case: the name of the one file in the class folder, and its bytes.
FILES = {
    "pixel bomb": ("a.png", png(12800, 12800, bytes(10**6))),
    "declared 2^31 pixels wide": ("a.png", png(2**31 - 1, 1, b"")),
    "declared width 0": ("a.png", png(0, 8, b"")),
    "text chunk bomb": ("a.png", png(8, 8, bytes(72), extra=ITXT_BOMB)),
    "16-bit grey": ("a.png", png(8, 8, bytes(136), depth=16)),
    "16-bit colour": ("a.png", png(8, 8, bytes(8 * 49), depth=16, colour=2)),
    "no palette": ("a.png", png(8, 8, bytes(72), colour=3)),
    "impossible depth": ("a.png", png(8, 8, bytes(72), depth=7)),
    "PNG cut short": ("a.png", GREY[:50]),
    "PNG header only": ("a.png", GREY[:8]),
    "too few rows": ("a.png", png(8, 8, bytes(20))),
    "wrong checksum": ("a.png", GREY[:30] + b"\0" + GREY[31:]),
    "JPEG cut short": ("a.jpg", saved(FRAMES[0], "JPEG")[:300]),
    "CMYK": ("a.jpg", saved(Image.new("CMYK", (8, 8)), "JPEG")),
    "animated PNG": ("a.png", saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:])),
    "animated WebP": ("a.webp", saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:])),
    "two pictures in one JPEG": ("a.jpg", saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:])),
    "JPEG named png": ("a.png", saved(FRAMES[0], "JPEG")),
    "TIFF named png": ("a.png", saved(FRAMES[0], "TIFF")),
    "GIF named png": ("a.png", saved(FRAMES[0], "GIF")),
    "EPS named png": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
    "SVG": ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "GIF": ("a.gif", saved(FRAMES[0], "GIF")),
    "text named png": ("a.png", b"hello"),
    "zip named png": ("a.png", b"PK\x03\x04" + bytes(50)),
    "empty image": ("a.png", b""),
    "no extension": ("a", GREY),
    "double extension": ("a.png.exe", GREY),
    "name with a newline": ("a\nb.png", GREY),
    "name with right-to-left": ("a\u202egnp.png", GREY),
    "name with an escape code": ("a\x1b[2Jb.png", GREY),
    "name that is not UTF-8": (os.fsdecode(b"a\xffb.png"), GREY),
    "too small": ("a.png", png(7, 8, bytes(64))),
    "too large": ("a.png", png(65, 8, bytes(66 * 8))),
    "BMP of 2^31 rows": ("a.bmp", saved(FRAMES[0], "BMP")[:22] + struct.pack("<i", 2**31 - 1) + bytes(200)),
}


def folder_with(tmp_path, name="ok.png", data=GREY):
    """Returns root/cat/name with these bytes."""
    (tmp_path / "r" / "cat").mkdir(parents=True)
    (tmp_path / "r" / "cat" / name).write_bytes(data)
    return tmp_path / "r"


# --- folders


def loop(root):
    (root / "dog").symlink_to(root)


def link_out(root):
    (root / "cat" / "b.png").symlink_to("/etc/passwd")


def link_within(root):
    (root / "cat" / "b.png").symlink_to(root / "cat" / "ok.png")


def dangling(root):
    (root / "cat" / "b.png").symlink_to("nowhere.png")


def device(root):
    (root / "cat" / "b.png").symlink_to("/dev/zero")


def pipe(root):
    os.mkfifo(root / "cat" / "b.png")


def pipe_as_class(root):
    os.mkfifo(root / "dog")


def stray(root):
    (root / "labels.csv").write_text("=cmd|' /C calc'!A0")


def nested(root):
    (root / "cat" / "inner").mkdir()


def class_with_newline(root):
    (root / "d\nog").mkdir()


def other_size(root):
    (root / "cat" / "z.png").write_bytes(png(9, 8, bytes(80)))


def mixed_channels(root):
    (root / "cat" / "z.png").write_bytes(png(8, 8, bytes(8 * 25), colour=2))


def no_images(root):
    os.unlink(root / "cat" / "ok.png")


def nothing(root):
    no_images(root)
    os.rmdir(root / "cat")


def npz_inside(root):
    (root / "train.npz").write_bytes(b"PK")


LAYOUTS = (
    loop,
    link_out,
    link_within,
    dangling,
    device,
    pipe,
    pipe_as_class,
    stray,
    nested,
    class_with_newline,
    other_size,
    mixed_channels,
    no_images,
    nothing,
    npz_inside,
)


# --- npz


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


NPZ = {
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


# --- IDX


def spoil_idx(name, data):
    """Returns a case that replaces one file of a pair; `data` is bytes, or a function of the old bytes."""

    def spoil(root):
        path = root / f"train-{name}"
        new = data(path.read_bytes()) if callable(data) else data
        path.write_bytes(new)

    return spoil


IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
HEAD = struct.pack(">4B", 0, 0, 8, 3)
IDX = {
    "images and labels swapped": lambda root: (
        os.rename(root / f"train-{IMAGES}", root / "t"),
        os.rename(root / f"train-{LABELS}", root / f"train-{IMAGES}"),
        os.rename(root / "t", root / f"train-{LABELS}"),
    ),
    "float IDX": spoil_idx(IMAGES, lambda old: b"\0\0\x0d\x03" + old[4:]),
    "four dimensions": spoil_idx(IMAGES, lambda old: b"\0\0\x08\x04" + old[4:]),
    "sizes that multiply to 2^96": spoil_idx(IMAGES, HEAD + b"\xff" * 12 + bytes(100)),
    "header only": spoil_idx(IMAGES, HEAD),
    "pixels cut short": spoil_idx(IMAGES, lambda old: old[:-1]),
    "pixels too many": spoil_idx(IMAGES, lambda old: old + b"\0"),
    "gzip bomb": spoil_idx(IMAGES, lambda old: gzip.compress(HEAD + struct.pack(">3I", 2**21, 8, 8) + bytes(2**27))),
    "gzip with more than declared": spoil_idx(IMAGES, lambda old: gzip.compress(old + bytes(2**20))),
    "gzip cut short": spoil_idx(IMAGES, lambda old: gzip.compress(old)[:-12]),
    "gzip with a wrong checksum": spoil_idx(IMAGES, lambda old: gzip.compress(old)[:-8] + bytes(8)),
    "gzip in gzip": spoil_idx(IMAGES, lambda old: gzip.compress(gzip.compress(old))),
    "text": spoil_idx(IMAGES, b"hello, hello, hello"),
    "another number of labels": spoil_idx(LABELS, struct.pack(">4BI", 0, 0, 8, 1, 2) + b"\0\1"),
    "label outside the classes": spoil_idx(LABELS, lambda old: old[:-1] + b"\x77"),
    "no label file": lambda root: os.unlink(root / f"train-{LABELS}"),
    "label file is a link": lambda root: (
        os.unlink(root / f"train-{LABELS}"),
        (root / f"train-{LABELS}").symlink_to("/dev/zero"),
    ),
    "zero images": lambda root: (
        spoil_idx(IMAGES, HEAD + struct.pack(">3I", 0, 8, 8))(root),
        spoil_idx(LABELS, struct.pack(">4BI", 0, 0, 8, 1, 0))(root),
    ),
}


# --- tables


def metadata(text):
    """Returns a table transform that replaces the Hugging Face metadata."""
    return lambda: small_files.table().replace_schema_metadata({"huggingface": text})


def label_feature(feature):
    """Returns a table transform with another feature of the label column."""
    return metadata(json.dumps({"info": {"features": {"label": feature}}}))


def images(cells, **options):
    """Returns a table transform that replaces the image column."""
    return lambda: small_files.table().set_column(0, "image", pa.array(cells, **options))


def labels(values, **options):
    """Returns a table transform that replaces the label column."""
    return lambda: small_files.table().set_column(1, "label", pa.array(values, **options))


BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TABLES = {
    "no image column": lambda: small_files.table().drop_columns(["image"]),
    "no label column": lambda: small_files.table().drop_columns(["label"]),
    "two image columns": lambda: small_files.table(nested=False).append_column("image", small_files.table()["label"]),
    "images as numbers": images([1] * 6),
    "images as nested lists": images([[[1, 2]]] * 6),
    "images as text": images(["x.png"] * 6),
    "struct without bytes": images([{"path": "x"}] * 6),
    "images as links to files": images([{"bytes": None, "path": "/etc/passwd"}] * 6, type=BYTES),
    "missing image": images([None] * 6, type=BYTES),
    "one missing image": images([None, *[{"bytes": b"x", "path": None}] * 5], type=BYTES),
    "image of no bytes": images([b""] * 6),
    "image of junk": images([b"junk"] * 6),
    "image is a Parquet file": images([b"PAR1" + bytes(50)] * 6),
    "missing label": labels([0, 1, None, 0, 1, 2]),
    "float labels": labels([0.0] * 6),
    "list labels": labels([[0]] * 6),
    "boolean labels": labels([True] * 6),
    "label outside": labels([0, 1, SECRET, 0, 1, 2]),
    "label -1": labels([-1] * 6),
    "label of 2^63": labels([2**63] * 6, type=pa.uint64()),
    "text labels": labels([str(SECRET)] * 6),
    "no rows": lambda: small_files.table().slice(0, 0),
    "metadata is no JSON": metadata(b"{"),
    "metadata is no UTF-8": metadata(b"\xff\xfe"),
    "metadata nested 100,000 deep": metadata("[" * 100_000 + "]" * 100_000),
    "metadata of a megabyte": metadata('"' + " " * 2**20 + '"'),
    "metadata with a repeated key": metadata('{"info": 1, "info": 2}'),
    "metadata with NaN": metadata('{"info": NaN}'),
    "metadata with 10,000 digits": metadata('{"info": ' + "9" * 10_000 + "}"),
    "metadata is a list": metadata("[]"),
    "metadata of another shape": metadata('{"info": {"features": [1]}}'),
    "class names missing": label_feature({"_type": "ClassLabel"}),
    "class names are numbers": label_feature({"_type": "ClassLabel", "names": [1, 2, 3]}),
    "class names repeat": label_feature({"_type": "ClassLabel", "names": ["a", "a", "b"]}),
    "class name right-to-left": label_feature({"_type": "ClassLabel", "names": ["a", "b", "\u202ec"]}),
    "class list empty": label_feature({"_type": "ClassLabel", "names": []}),
    "too few classes": label_feature({"_type": "ClassLabel", "names": ["a"]}),
}


DAMAGES = {
    "half": lambda old: old[: len(old) // 2],
    "start": lambda old: old[:20],
    "text": lambda old: b"hello",
    "zeros": lambda old: b"\0" * len(old),
    "ones": lambda old: b"\xff" * len(old),
    "long head": lambda old: old[:4] + struct.pack("<i", 2**31 - 1) + old[8:],
    "Arrow file": lambda old: b"ARROW1\0\0" + old,
    "zip before it": lambda old: b"PK\x03\x04" + old,
}
FOOTERS = {  # only Parquet ends with one
    "long footer": lambda old: old[:-8] + struct.pack("<i", 2**31 - 1) + b"PAR1",
    "negative footer": lambda old: old[:-8] + struct.pack("<i", -1) + b"PAR1",
    "footer cut short": lambda old: old[:-8] + struct.pack("<i", 9) + b"PAR1",
}
DAMAGED = [(kind, name) for kind in ("parquet", "arrow") for name in DAMAGES] + [("parquet", name) for name in FOOTERS]
SPECIAL = ("pipe", "device", "folder", "missing", "empty")
EXTENSIONS = (".npz", ".parquet", ".arrow", "-images-idx3-ubyte")


def special(path: Path, kind: str) -> Path:
    """Puts what is no regular file, or an empty one, at a path."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    return path


def write_table(path: Path, made: pa.Table) -> Path:
    """Writes a table by the extension; pyarrow writes two columns of one name only with care."""
    if path.suffix == ".parquet" and made.column_names.count("image") == 2:
        with pq.ParquetWriter(path, made.schema) as writer:
            writer.write_table(made)
        return path
    return small_files.parquet(path, made) if path.suffix == ".parquet" else small_files.arrow(path, made)


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def spoiled_folder(root: Path, spoil: Callable[[Path], object]) -> Path:
    folder = folder_with(root)
    spoil(folder)
    return folder


def spoiled_idx(root: Path, spoil: Callable[[Path], object]) -> Path:
    folder = small_files.idx(root / "m")
    spoil(folder)
    return folder


def damaged(path: Path, damage: Callable[[bytes], bytes]) -> Path:
    return write_bytes(path, damage(write_table(path, small_files.table()).read_bytes()))


Make = Callable[[Path], Path]
CASES: dict[str, Make] = {
    **{f"image: {name}": lambda root, case=case: folder_with(root, *case) for name, case in FILES.items()},
    **{f"folder: {spoil.__name__}": lambda root, spoil=spoil: spoiled_folder(root, spoil) for spoil in LAYOUTS},
    **{f"npz: {name}": lambda root, make=make: write_bytes(root / "x.npz", make()) for name, make in NPZ.items()},
    **{f"idx: {name}": lambda root, spoil=spoil: spoiled_idx(root, spoil) for name, spoil in IDX.items()},
    **{
        f"{kind}: {name}": lambda root, make=make, kind=kind: write_table(root / f"x.{kind}", make())
        for kind in ("parquet", "arrow")
        for name, make in TABLES.items()
    },
    **{
        f"{kind}: {name}": lambda root, name=name, kind=kind: damaged(root / f"x.{kind}", (DAMAGES | FOOTERS)[name])
        for kind, name in DAMAGED
    },
    **{
        f"{extension}: {kind}": lambda root, kind=kind, extension=extension: special(root / f"x{extension}", kind)
        for extension in EXTENSIONS
        for kind in SPECIAL
    },
}


# --- what looks odd and is a data set: it loads, and the run is as promised


def legal(**arrays: np.ndarray) -> Make:
    """Returns a case of an npz with these arrays beside the plain ones."""
    plain = {"images": np.arange(13 * 64).reshape(13, 8, 8).astype(np.uint8), "labels": np.arange(13) % 2}

    def make(root: Path) -> Path:
        chosen = {**plain, "classes": np.array(["a", "b"]), **arrays}
        n = min(len(chosen["images"]), len(chosen["labels"]))
        np.savez(root / "x.npz", **chosen | {name: chosen[name][:n] for name in ("images", "labels")})
        return root / "x.npz"

    return make


FLOATS = np.random.default_rng(0).random((13, 8, 8)).astype(np.float32)
NAN, WILD = FLOATS.copy(), FLOATS.copy()
NAN[3, 2, 2], NAN[4], WILD[2:5] = np.nan, np.inf, 1e30
MARKUP = np.array(["<script>alert(1)</script>", "=cmd|' /C calc'!A0"])
LEGAL: dict[str, Make] = {
    "NaN and infinite pixels, which count zero, and markup in class names": legal(images=NAN, classes=MARKUP),
    "float pixels out of range: they are clamped": legal(images=WILD),
    "float64 pixels beyond float32": legal(images=FLOATS.astype(np.float64) * 1e300),
    "all images identical": legal(images=np.full((13, 8, 8), 7, np.uint8)),
    "one class": legal(labels=np.zeros(13, int), classes=np.array(["only"])),
    "one record": legal(images=np.zeros((1, 8, 8), np.uint8)),
    "a class without a record": legal(classes=np.array(["a", "b", "nobody"])),
}
