"""LabelledImages shows nothing private, and pixels become numbers in [-1, 1] record by record."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dpdistill.data import LabelledImages, public_range, to_unit
from dpdistill.errors import InputError

FLOATS = arrays(np.float32, (3, 1, 2, 2), elements=st.floats(width=32))


def make(**changes):
    facts = {"images": np.zeros((2, 1, 8, 8), np.uint8), "labels": np.array([0, 1]), "class_names": ("a", "b")}
    return LabelledImages(**(facts | {"source": "toy"} | changes))


def test_uint8_maps_its_ends_to_minus_one_and_one():
    unit = to_unit(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16))
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit.ravel(), np.arange(256) / 127.5 - 1, atol=1e-7)
    assert unit.min() == -1
    assert unit.max() == 1


@given(FLOATS, st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-3e38, 3e38), (0.0, 1e-30)]))
def test_floats_are_clamped_and_a_bad_pixel_spoils_only_its_own_record(images, value_range):
    unit = to_unit(images, value_range)
    good = np.isfinite(images).all(axis=(1, 2, 3))
    assert np.isnan(unit[~good]).all()
    assert (np.abs(unit[good]) <= 1).all()
    alone = np.concatenate([to_unit(images[i : i + 1], value_range) for i in range(len(images))])
    np.testing.assert_array_equal(alone, unit)


@given(st.floats(-5, 5), st.floats(0.1, 5))
def test_float_ends_of_the_declared_range(low, width):
    low, high = float(np.float32(low)), float(np.float32(low + width))
    unit = to_unit(np.array([low, high], np.float32).reshape(1, 1, 1, 2), (low, high))
    np.testing.assert_allclose(unit.ravel(), [-1, 1], atol=1e-6)


def test_method_uses_the_declared_range():
    images = np.full((2, 1, 8, 8), 3, np.float32)
    assert (make(images=images, value_range=(1, 3)).to_unit() == 1).all()


def test_no_records_convert_to_no_records():
    assert to_unit(np.zeros((0, 1, 8, 8), np.float32)).shape == (0, 1, 8, 8)


def test_repr_shows_public_facts_only():
    text = repr(make(images=np.full((2, 1, 8, 8), 77, np.uint8)))
    assert "1x8x8" in text
    assert "77" not in text
    assert "array" not in text


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((2, 1, 8, 8), np.float64)},
        {"images": np.zeros((2, 2, 8, 8), np.uint8)},
        {"images": np.zeros((2, 8, 8), np.uint8)},
        {"labels": np.array([0, 1], np.int32)},
        {"labels": np.array([0])},
        {"labels": np.array([0, 2])},
        {"labels": np.array([0, -1])},
        {"class_names": ()},
        {"class_names": ("a", "a")},
        {"value_range": (1.0, 0.0)},
        {"value_range": (0.0, float("nan"))},
    ],
)
def test_facts_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="Expected"):
        make(**changes)


def test_integers_other_than_uint8_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        to_unit(np.zeros((1, 1, 8, 8), np.int64))


def test_the_range_of_public_floats_is_told_by_their_pixels():
    def told(*pixels):
        return public_range(make(images=np.resize(np.array(pixels, np.float32), (2, 1, 8, 8))))

    assert told(0, 0.5, 1) == told(np.nan) == (0.0, 1.0)
    assert told(-1, 1) == told(-0.6, np.nan) == (-1.0, 1.0)
    assert public_range(make()) == (0.0, 1.0)
    for unclear in ((-0.1, 1), (0, 1.1), (-1, 1.1), (0, 255), (0, np.inf)):
        with pytest.raises(InputError, match="uint8"):
            told(*unclear)
