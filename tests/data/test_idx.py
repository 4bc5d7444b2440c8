"""IDX pairs by folder, file and prefix."""

import os

import numpy as np
import pytest

from dpdistill.data import load_images
from dpdistill.errors import InputError


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("spec", ["", "train", "images"])
def test_round_trip(tmp_path, write, zipped, spec):
    root = write.idx(tmp_path / "mnist", zipped=zipped)
    path = root / f"train-images-idx3-ubyte{'.gz' if zipped else ''}" if spec == "images" else root / spec
    data = load_images(path, n_classes=3)
    images, labels = write.toy()
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, labels)


def test_kaggle_spelling_and_one_half_zipped(tmp_path, write):
    root = write.idx(tmp_path / "mnist")
    os.rename(root / "train-images-idx3-ubyte", root / "train-images.idx3-ubyte")
    assert load_images(root, n_classes=3).n_classes == 3
    assert load_images(root / "train", n_classes=3).n_classes == 3


def test_splits(tmp_path, write):
    root = write.idx(write.idx(tmp_path / "mnist"), prefix="t10k", zipped=True)
    assert len(load_images(root, n_classes=3, split="test").labels) == 6
    assert len(load_images(root, n_classes=3).labels) == 6
    with pytest.raises(InputError, match="splits found: t10k, train"):
        load_images(root, n_classes=3, split="val")


def test_class_list_is_needed(tmp_path, write):
    with pytest.raises(InputError, match="give --classes K, or --set class_names="):
        load_images(write.idx(tmp_path / "mnist"))


def test_resize(tmp_path, write):
    assert load_images(write.idx(tmp_path / "m"), n_classes=3, resize=16).image_shape == (1, 16, 16)


@pytest.mark.parametrize("spec", ["", "train", "train-images-idx3-ubyte"])
def test_no_labels_are_needed_where_none_are_read(tmp_path, write, spec):
    root = write.idx(tmp_path / "mnist")
    (root / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="--unlabelled"):
        load_images(root / spec, n_classes=3)
    data = load_images(root / spec, unlabelled=True)
    np.testing.assert_array_equal(data.images, write.toy()[0])
    assert (data.labels.tolist(), data.class_names) == ([0] * 6, ("image",))
