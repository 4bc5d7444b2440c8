"""Hostile IDX, Parquet and Arrow files: every one is refused in one line that quotes no record."""

import gzip
import json
import os
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpdistill.data import Limits, load_images
from dpdistill.errors import InputError

SECRET = 87_654_321


def refused(path, **options):
    """Checks that a path is refused, in one short printable line without the secret."""
    with pytest.raises(InputError) as caught:
        load_images(path, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    assert str(SECRET) not in message
    return message


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


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", IDX)
def test_idx(tmp_path, write, name):
    root = write.idx(tmp_path / "m")
    IDX[name](root)
    assert "119" not in refused(root, n_classes=3).replace(str(tmp_path), "")


def metadata(text):
    """Returns a table transform that replaces the Hugging Face metadata."""
    return lambda write: write.table().replace_schema_metadata({"huggingface": text})


def label_feature(feature):
    """Returns a table transform with another feature of the label column."""
    return metadata(json.dumps({"info": {"features": {"label": feature}}}))


def images(cells, **options):
    """Returns a table transform that replaces the image column."""
    return lambda write: write.table().set_column(0, "image", pa.array(cells, **options))


def labels(values, **options):
    """Returns a table transform that replaces the label column."""
    return lambda write: write.table().set_column(1, "label", pa.array(values, **options))


BYTES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TABLES = {
    "no image column": lambda write: write.table().drop_columns(["image"]),
    "no label column": lambda write: write.table().drop_columns(["label"]),
    "two image columns": lambda write: write.table(nested=False).append_column("image", write.table()["label"]),
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
    "no rows": lambda write: write.table().slice(0, 0),
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


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_table(tmp_path, write, name, kind):
    made = TABLES[name](write)
    path = tmp_path / f"x.{kind}"
    if kind == "parquet" and name == "two image columns":
        with pq.ParquetWriter(path, made.schema) as writer:
            writer.write_table(made)
    else:
        getattr(write, kind)(path, made)
    assert "passwd" not in refused(path)


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


@pytest.mark.parametrize(("kind", "name"), DAMAGED)
def test_damaged(tmp_path, write, kind, name):
    path = tmp_path / f"x.{kind}"
    path.write_bytes((DAMAGES | FOOTERS)[name](getattr(write, kind)(path).read_bytes()))
    refused(path)


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_arrow_is_refused_before_it_is_unpacked(tmp_path, write, compression):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    assert "compressed" in refused(write.arrow(tmp_path / "x.arrow", options=options))


def test_dictionary_coded_arrow(tmp_path, write):
    made = write.table()
    coded = made.append_column("extra", pa.array(["a"] * 6).dictionary_encode())
    refused(write.arrow(tmp_path / "x.arrow", coded))


def test_table_that_expands(tmp_path, write):
    path = write.parquet(tmp_path / "x.parquet", pa.concat_tables([write.table()] * 200), use_dictionary=False)
    assert "expands" in refused(path, limits=Limits(max_ratio=2, free_bytes=1000))
    assert "too large" in refused(path, limits=Limits(max_array_bytes=1000))
    refused(path, limits=Limits(max_images=100))
    refused(path, limits=Limits(max_file_bytes=1000))


def test_one_image_that_expands(tmp_path, write):
    made = write.table(nested=False).set_column(0, "image", pa.array([bytes(2**20)] * 6))
    refused(write.parquet(tmp_path / "x.parquet", made), limits=Limits(max_image_bytes=2**19))


def test_shards_that_do_not_fit(tmp_path, write):
    one, other = write.table(), label_feature({"_type": "ClassLabel", "names": ["a", "b", "c"]})(write)
    write.parquet(tmp_path / "train-00000-of-00002.parquet", one)
    assert "missing" in refused(tmp_path)
    write.parquet(tmp_path / "train-00001-of-00002.parquet", other)
    assert "other classes" in refused(tmp_path)
    write.parquet(tmp_path / "train-00001-of-00002.parquet", write.table(channels=3))
    assert "mixes grey and colour" in refused(tmp_path)
    write.parquet(tmp_path / "train-00001-of-00002.parquet", one)
    write.parquet(tmp_path / "notes.parquet", one)
    assert "mixes files" in refused(tmp_path)
    os.unlink(tmp_path / "notes.parquet")
    (tmp_path / "link.parquet").symlink_to("/etc/passwd")
    assert "symbolic link" in refused(tmp_path)
