"""The procedural set: any size, the same for a seed, varied, fast."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpdistill.data import procedural_images


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 9), st.sampled_from([1, 3]), st.integers(8, 64), st.integers(8, 64), st.integers(0, 2**32))
def test_any_size_and_seed(n, channels, height, width, seed):
    images = procedural_images(n, channels, height, width, seed)
    assert images.shape == (n, channels, height, width)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, procedural_images(n, channels, height, width, seed))


def test_global_random_state_is_neither_used_nor_changed():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first = procedural_images(5, 1, 8, 8, 1)
    np.testing.assert_array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert not np.array_equal(first, procedural_images(5, 1, 8, 8, 2))


def test_images_are_varied():
    images = procedural_images(600, 1, 28, 28, 0).reshape(600, -1) / 255
    assert len(np.unique(images.round(2), axis=0)) > 580
    means, spreads = images.mean(1), images.std(1)
    assert np.percentile(means, 90) - np.percentile(means, 10) > 0.4
    assert np.median(spreads) > 0.12
    variances = np.linalg.svd(images - images.mean(0), compute_uv=False) ** 2
    n_components = np.searchsorted(np.cumsum(variances) / variances.sum(), 0.95)
    assert n_components > 60  # a set of ramps alone would need about 5


def test_colour_is_coloured():
    images = procedural_images(200, 3, 16, 16, 0).astype(int)
    assert (np.ptp(images, axis=1).max(axis=(1, 2)) > 30).mean() > 0.5


def test_speed():
    procedural_images(300, 1, 28, 28, 0)
    start = time.process_time()
    procedural_images(1024, 1, 28, 28, 0)
    assert 1024 / (time.process_time() - start) > 1000  # over 4,000 when nothing else runs


@pytest.mark.parametrize("arguments", [(-1, 1, 8, 8), (1, 2, 8, 8), (1, 1, 7, 8), (1, 1, 8, 65)])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match="Expected"):
        procedural_images(*arguments, seed=0)
