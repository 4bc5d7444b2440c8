"""Bounds on what an npz makes the reader do. The hostile files themselves are in helpers/hostile_data.py."""

import tracemalloc

import pytest

from dpdistill.data import Limits, load_images
from dpdistill.errors import InputError
from hostile_data import NPZ, pack


@pytest.mark.parametrize("name", ["decompression bomb", "bomb in labels", "shape of 10^12", "declared size of 4 GiB"])
def test_nothing_is_unpacked_before_it_is_refused(tmp_path, name):
    path = tmp_path / "x.npz"
    path.write_bytes(NPZ[name]())
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
