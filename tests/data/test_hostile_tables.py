"""Bounds on Parquet and Arrow. The hostile files themselves are in helpers/hostile_data.py."""

import os

import pyarrow as pa
import pytest

from dpdistill.data import Limits, load_images
from dpdistill.errors import InputError
from hostile_data import SECRET, label_feature


def refused(path, **options):
    """Checks that a path is refused, in one short printable line without the secret."""
    with pytest.raises(InputError) as caught:
        load_images(path, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 700
    assert str(SECRET) not in message
    return message


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
    one, other = write.table(), label_feature({"_type": "ClassLabel", "names": ["a", "b", "c"]})()
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
