"""Images that stay in files: the same rows as in memory, from every reader; what a full disk or a changed file does to them."""

import os
import resource
import stat
import struct
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dpdistill.data import LabelledImages, Limits, StoredArray, load_images, stored, write_npz
from dpdistill.errors import InputError


@pytest.fixture
def in_files(monkeypatch):
    """in_files(True) keeps nothing in memory, and passes through a few rows at a time; in_files(False) undoes that."""

    def switch(on):
        monkeypatch.setattr(stored, "MEMORY_BYTES", 0 if on else 2**28)
        monkeypatch.setattr(stored, "CHUNK_BYTES", 500 if on else 2**23)

    return switch


def npz_of(kind, path, write):
    images, labels = write.toy(n=40, channels=3 if "3" in kind else 1, h=10, w=8)
    layouts = {
        "NHW": images[:, 0],
        "NHWC": images.transpose(0, 2, 3, 1),
        "NCHW": images,
        "F": np.asfortranarray(images),
    }
    array = layouts[kind.split()[0].rstrip("13")]
    array = array.astype(kind.split()[1]) if " " in kind else array
    return array, labels, {"classes": np.array(write.names)}, path


def make(kind, folder, write):
    """Writes a data set; returns what to load, how, and whether its images can stay where they are."""
    folder.mkdir()
    save = {"stored": np.savez, "deflated": np.savez_compressed}.get(kind.split(" ", 1)[0])
    if save is not None:
        array, labels, classes, path = npz_of(kind.split(" ", 1)[1], folder / "x.npz", write)
        save(path, images=array, labels=labels, **classes)
        return path, {}
    if kind.startswith("idx"):
        return write.idx(folder / "i", zipped=kind == "idx gz"), {"n_classes": 3}
    if kind == "folder":
        return write.folder(folder / "r"), {}
    made = pa.concat_tables([write.table()] * 100).combine_chunks()
    if kind == "shards":
        for i in range(2):
            write.parquet(folder / f"train-0000{i}-of-00002.parquet", made, row_group_size=(100, 600)[i])
        return folder, {}
    return write.arrow(folder / "data-00000-of-00001.arrow", made).parent, {}


LAYOUTS = ("NHW", "NHWC3", "NHWC1", "NCHW3", "NCHW1 <f4", "NHWC3 <f8", "NHW >f4", "NHW <f2")
KINDS = [*(f"{save} {layout}" for save in ("stored", "deflated") for layout in LAYOUTS)]
KINDS += ["idx", "idx gz", "folder", "shards", "arrow"]
UNTOUCHED = ("stored NHW", "stored NCHW3", "stored NCHW1 <f4", "idx")  # as they have to be: not copied


@pytest.mark.parametrize("resize", [None, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_gives_the_same_rows_from_a_file(kind, resize, tmp_path, write, in_files):
    spec, options = make(kind, tmp_path / "x", write)
    (tmp_path / "scratch").mkdir()
    inside = load_images(spec, resize=resize, **options)
    in_files(True)
    outside = load_images(spec, resize=resize, limits=Limits(scratch=str(tmp_path / "scratch")), **options)
    assert isinstance(inside.images, np.ndarray)
    assert isinstance(outside.images, StoredArray)
    assert (outside.images.shape, outside.images.dtype) == (inside.images.shape, inside.images.dtype)
    np.testing.assert_array_equal(outside.images[:], inside.images)
    np.testing.assert_array_equal(outside.labels, inside.labels)
    np.testing.assert_array_equal(outside.to_unit(), inside.to_unit())
    assert repr(outside) == repr(inside)
    # A copy has no name, only its owner may read it, and it ends with the process; the user's own file is not copied.
    status = os.fstat(outside.images._descriptor)
    assert (status.st_nlink == 1) == (kind in UNTOUCHED and resize is None)
    assert status.st_nlink == 1 or (status.st_nlink, stat.S_IMODE(status.st_mode)) == (0, 0o600)
    assert os.listdir(tmp_path / "scratch") == []


@pytest.mark.parametrize(("kind", "channels"), [("idx", 3), ("stored NCHW3", 1), ("deflated NHWC3 <f8", 1)])
def test_made_grey_or_colour_from_a_file(kind, channels, tmp_path, write, in_files):
    spec, options = make(kind, tmp_path / "x", write)
    inside = load_images(spec, channels=channels, **options)
    in_files(True)
    outside = load_images(spec, channels=channels, **options)
    assert isinstance(outside.images, StoredArray)
    np.testing.assert_array_equal(outside.images[:], inside.images)


def test_fortran_order_comes_through_memory(tmp_path, write, in_files):
    in_files(True)
    array, labels, classes, path = npz_of("F", tmp_path / "x.npz", write)
    np.savez(path, images=array, labels=labels, **classes)
    np.testing.assert_array_equal(load_images(path).images, array)


def test_written_again_from_a_file(tmp_path, write, in_files):
    in_files(True)
    data = load_images(write.npz(tmp_path / "x.npz"))
    write_npz(tmp_path / "y.npz", data)
    np.testing.assert_array_equal(load_images(tmp_path / "y.npz").images[:], data.images[:])


def test_rows_are_asked_for_as_of_an_array(tmp_path):
    rng = np.random.default_rng(0)
    plain = rng.integers(0, 2**15, (50, 2, 3)).astype(np.int16)
    (tmp_path / "x").write_bytes(b"head" + plain.tobytes())
    with open(tmp_path / "x", "rb") as file:
        array = stored.in_place(file, 4, plain.shape, plain.dtype, "x")
    assert len(array) == 50
    for rows in (
        slice(None), slice(3, 7), slice(-5, None), slice(0, 50, 7), slice(9, 2, -2), slice(7, 7),
        np.array([4, 5, 6, 2, 49, 0, 1, 1]), np.arange(50), np.zeros(0, np.int64), plain[:, 0, 0] % 2 == 0, np.arange(50)[::-1],
    ):  # fmt: skip
        np.testing.assert_array_equal(array[rows], plain[rows])
    assert array[7].tobytes() == plain[7].tobytes()
    np.testing.assert_array_equal(np.stack(list(array)), plain)
    np.testing.assert_array_equal(np.asarray(array), plain)
    for rows in (50, -1, np.array([0, 50]), np.array([-1]), np.array([0.5]), np.zeros((2, 2), int), np.ones(49, bool)):
        with pytest.raises(IndexError):
            array[rows]
    with pytest.raises(IndexError):
        array[0:2] = plain[:3]


def test_a_file_that_is_cut_short_under_a_run_says_so(tmp_path, write, in_files):
    """Under a memory map this would kill the process."""
    in_files(True)
    path = tmp_path / "x.npz"
    np.savez(path, images=write.toy(n=100)[0][:, 0], labels=np.arange(100) % 3, classes=np.array(write.names))
    data = load_images(path)
    os.truncate(path, 3000)
    assert data.images[0].shape == (1, 8, 8)
    with pytest.raises(InputError, match="cut short while it was in use"):
        data.images[:]


def test_a_changed_byte_of_a_stored_array_is_found(tmp_path, write, in_files):
    in_files(True)
    path = tmp_path / "x.npz"
    images, labels = write.toy(n=300)
    np.savez(path, images=images[:, 0], labels=labels, classes=np.array(write.names))
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("images.npy").header_offset + 15_000  # far behind the header, which is read anyway
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(InputError, match="damaged"):
        load_images(path)


@pytest.mark.parametrize("kind", ["stored NHW", "deflated NHWC3", "idx", "idx gz", "shards", "arrow"])
def test_what_is_refused_does_not_depend_on_where_the_images_are_kept(kind, tmp_path, write, in_files):
    spec, options = make(kind, tmp_path / "x", write)
    folder = Path(spec) if Path(spec).is_dir() else Path(spec).parent
    target = next(path for path in sorted(folder.iterdir()) if "labels" not in path.name)
    good, rng = target.read_bytes(), np.random.default_rng(5)
    refused = 0
    for _ in range(12):
        changed = bytearray(good)
        changed[int(rng.integers(len(good)))] ^= 1 << int(rng.integers(8))
        target.write_bytes(changed if rng.random() < 0.8 else changed[: int(rng.integers(1, len(good)))])
        found = []
        for on in (False, True):
            in_files(on)
            try:
                found.append(load_images(spec, **options).images[:].tobytes())
            except InputError as error:
                found.append(str(error))
                refused += 1
        assert found[0] == found[1]
    assert refused > 2


def test_a_disk_that_is_too_full(tmp_path, write, in_files, monkeypatch):
    spec = write.npz(tmp_path / "x.npz")
    in_files(True)
    limits = Limits(scratch=str(tmp_path))
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(InputError, match=r"no room .*\(disk too full\) \(point TMPDIR at a disk") as raised:
        load_images(spec, limits=limits)
    said = str(raised.value).replace(str(tmp_path), "")  # pytest counts its folders: one of them is number 384
    assert "384" not in said  # bytes needed, which would tell how many records there are


def test_a_disk_that_fills_up_or_is_not_there(tmp_path, write, in_files, monkeypatch):
    spec = write.npz(tmp_path / "x.npz")
    in_files(True)
    with pytest.raises(InputError, match="No such file"):
        load_images(spec, limits=Limits(scratch=str(tmp_path / "nowhere")))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # else Python 3.11 leaves halves of modules in its cache
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # what the system says is what a full disk says
    try:
        with pytest.raises(InputError, match=r"has no room .*File too large"):
            load_images(spec, limits=Limits(scratch=str(tmp_path)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="No space left on device"):
        load_images(spec, limits=Limits(scratch=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_an_archive_of_more_than_two_gib_has_a_longer_end(tmp_path, write, monkeypatch):
    """As zipfile writes it from there on; made small here."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    path = write.npz(tmp_path / "x.npz")
    monkeypatch.undo()
    good = path.read_bytes()
    assert good[-42:-38] == b"PK\x06\x07"
    np.testing.assert_array_equal(load_images(path).images, write.toy()[0])
    record, locator = len(good) - 98, len(good) - 42
    for at, value in (
        (record, b"PK\x06\x05"),
        (record + 4, struct.pack("<Q", 45)),
        (record + 16, struct.pack("<L", 1)),
        (record + 24, struct.pack("<Q", 2**40)),
        (record + 40, struct.pack("<Q", 2**40)),
        (record + 48, struct.pack("<Q", 2**63)),
        (locator + 4, struct.pack("<L", 1)),
        (locator + 8, struct.pack("<Q", record - 1)),
        (locator + 16, struct.pack("<L", 2)),
    ):
        path.write_bytes(good[:at] + value + good[at + len(value) :])
        with pytest.raises(InputError):
            load_images(path)


def test_limits_of_who_expects_more():
    assert Limits.of_gib(4) == Limits()
    more = Limits.of_gib(100, "/scratch")
    assert (more.max_array_bytes, more.max_file_bytes) == (100 * 2**30,) * 2
    assert (more.max_images, more.max_ratio, more.free_bytes) == (50_000_000, Limits().max_ratio, Limits().free_bytes)
    less = Limits.of_gib(1)
    assert (less.max_array_bytes, less.max_images) == (2**30, Limits().max_images)


def test_a_cap_names_its_way_out(tmp_path, write):
    with pytest.raises(InputError, match="--max-gib raises that"):
        load_images(write.npz(tmp_path / "x.npz"), limits=Limits(max_array_bytes=100))
    with pytest.raises(InputError, match="raise --max-gib"):
        load_images(write.folder(tmp_path / "r"), limits=Limits(max_images=5))


def test_a_memory_map_will_do(tmp_path):
    """From Python, any array of the right kind."""
    np.save(tmp_path / "x.npy", np.zeros((5, 1, 8, 8), np.uint8))
    images = np.load(tmp_path / "x.npy", mmap_mode="r")
    data = LabelledImages(images=images, labels=np.zeros(5, np.int64), class_names=("a",), source="x")
    assert [part.shape for part in stored.chunks(data.images)] == [(5, 1, 8, 8)]


def test_large_images_are_decoded_into_the_file_one_by_one(tmp_path, write, in_files):
    """A PNG for each record, all of one size: the first that differs is refused, as in memory."""
    spec = write.folder(tmp_path / "r")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(spec / "eel" / "z.png")
    in_files(True)
    with pytest.raises(InputError, match="differs in size"):
        load_images(spec, limits=Limits(scratch=str(tmp_path)))
