"""The bundled digits: a fixed public split."""

import numpy as np
import pytest

from dpdistill.data import load_images
from dpdistill.errors import InputError


def test_split_is_fixed_and_complete():
    train, test = load_images("digits"), load_images("digits:test")
    assert len(train.images) == 1437
    assert len(test.images) == 360
    assert train.class_names == tuple("0123456789")
    assert train.image_shape == (1, 8, 8)
    assert train.images.min() == 0
    assert train.images.max() == 255
    np.testing.assert_array_equal(train.images, load_images("digits:train").images)
    np.testing.assert_array_equal(test.labels, load_images("digits", split="test").labels)
    assert (np.bincount(test.labels) >= 25).all()  # public data: its counts may be looked at


@pytest.mark.parametrize(("spec", "split"), [("digits:val", None), ("digits:train", "test"), ("digits", "val")])
def test_unknown_split(spec, split):
    with pytest.raises(InputError, match="split"):
        load_images(spec, split=split)


def test_their_labels_can_be_left_out():
    data = load_images("digits:test", unlabelled=True)
    np.testing.assert_array_equal(data.images, load_images("digits:test").images)
    assert (set(data.labels.tolist()), data.class_names) == ({0}, ("image",))
