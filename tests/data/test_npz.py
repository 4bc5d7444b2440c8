"""npz round trips in every layout, byte order and compression."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpdistill.data import LabelledImages, load_images, write_npz
from dpdistill.errors import InputError

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(
    st.integers(1, 5),
    st.sampled_from([1, 3]),
    st.integers(8, 20),
    st.integers(8, 20),
    st.booleans(),
    st.integers(0, 99),
)
def test_write_then_load_is_equal(tmp_path, n, c, h, w, floats, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, c, h, w)).astype(np.float32 if floats else np.uint8)
    data = LabelledImages(
        images=images, labels=rng.integers(0, 2, n), class_names=("ä b", "c"), value_range=(0, 255), source="x"
    )
    write_npz(tmp_path / "x.npz", data)
    back = load_images(tmp_path / "x.npz", value_range=(0, 255))
    np.testing.assert_array_equal(back.images, images)
    np.testing.assert_array_equal(back.labels, data.labels)
    assert back.images.dtype == images.dtype
    assert back.class_names == ("ä b", "c")
    assert back.value_range == (0, 255)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", ["NHW", "NHWC1", "NCHW1", "NHWC3", "NCHW3", "fortran"])
def test_layouts(tmp_path, write, save, layout):
    images, labels = write.toy(channels=3 if "3" in layout else 1, h=8, w=10)
    stored = images
    if layout == "NHW":
        stored = images[:, 0]
    elif "NHWC" in layout:
        stored = images.transpose(0, 2, 3, 1)
    elif layout == "fortran":
        stored = np.asfortranarray(images)
    save(tmp_path / "x.npz", images=stored, labels=labels, classes=np.array(write.names))
    np.testing.assert_array_equal(load_images(tmp_path / "x.npz").images, images)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", ">f8"])
def test_floats_become_native_float32(tmp_path, write, dtype):
    images = np.linspace(0, 1, 6 * 64).reshape(6, 8, 8).astype(dtype)
    data = load_images(write.npz(tmp_path / "x.npz", images=images))
    assert data.images.dtype == np.dtype(np.float32)
    assert data.images.dtype.isnative
    np.testing.assert_array_equal(data.images[:, 0], images.astype(np.float32))


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i4", "<u8", "<f4"])
def test_whole_labels_of_any_dtype_load(tmp_path, write, dtype):
    data = load_images(write.npz(tmp_path / "x.npz", labels=np.array([0, 1, 2, 0, 1, 2], dtype)))
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_bad_values_load_because_refusing_them_would_tell(tmp_path, write):
    images = np.zeros((6, 8, 8))
    images[0, 0, 0], images[1, 0, 0], images[2, 0, 0] = np.nan, np.inf, 1e300
    unit = load_images(write.npz(tmp_path / "x.npz", images=images)).to_unit()
    assert np.isnan(unit[:3]).all()
    assert np.isfinite(unit[3:]).all()


def test_class_list_can_be_declared(tmp_path, write):
    path = write.npz(tmp_path / "x.npz", classes=None)
    assert load_images(path, n_classes=3).class_names == ("0", "1", "2")
    assert load_images(path, class_names=["a", "b", "c", "d"]).class_names == ("a", "b", "c", "d")
    with pytest.raises(InputError, match="set of labels present is private"):
        load_images(path)
    with pytest.raises(InputError, match="outside the class list"):
        load_images(path, n_classes=2)


def test_declarations_must_not_contradict_the_file(tmp_path, write):
    path = write.npz(tmp_path / "x.npz")
    assert load_images(path, class_names=write.names, n_classes=3).n_classes == 3
    with pytest.raises(InputError, match="other classes"):
        load_images(path, class_names=["dog", "cat", "eel"])
    with pytest.raises(InputError, match="leave --classes out"):
        load_images(path, n_classes=4)


def test_other_members_stay_unread(tmp_path, write):
    path = write.npz(tmp_path / "x.npz", groups=np.array([object()] * 6))
    assert load_images(path).n_classes == 3


def test_a_link_that_the_user_names_is_followed(tmp_path, write):
    (tmp_path / "link.npz").symlink_to(write.npz(tmp_path / "x.npz"))
    assert load_images(tmp_path / "link.npz").n_classes == 3


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_resize_of_arrays(tmp_path, write, dtype):
    images = np.full((6, 96, 80, 3), 200, dtype)
    data = load_images(write.npz(tmp_path / "x.npz", images=images), resize=32)
    assert data.images.shape == (6, 3, 32, 32)
    np.testing.assert_allclose(data.images, 200, rtol=1e-5)


IDS = {
    "numbers": np.array([7, 7, 2**40, -1]),
    "small": np.array([1, 2, 3, 3], np.uint8),
    "text": np.array(["anna", "ben", "", "\u00e9"]),
}
BAD_IDS = {
    "fractions": np.array([1.0, 2.0, 3.0, 4.0]),
    "one short": np.arange(3),
    "a table": np.zeros((4, 1), np.int64),
    "one for all": np.array(5),
}


def _save(path: Path, **arrays: np.ndarray) -> None:
    images = np.zeros((4, 8, 8), np.uint8)
    np.savez(path, images=images, labels=np.arange(4) % 2, classes=np.array(["a", "b"]), **arrays)


@pytest.mark.parametrize("name", IDS)
def test_ids_come_as_they_are_and_go_back(name: str, tmp_path: Path) -> None:
    _save(tmp_path / "x.npz", patient=IDS[name])
    data = load_images(tmp_path / "x.npz", id_column="patient")
    assert data.ids is not None
    assert data.ids.tolist() == IDS[name].tolist()
    assert load_images(tmp_path / "x.npz").ids is None
    write_npz(tmp_path / "y.npz", data)
    again = load_images(tmp_path / "y.npz", id_column="ids")
    assert again.ids is not None
    assert again.ids.tolist() == IDS[name].tolist()
    assert "anna" not in repr(data)


@pytest.mark.parametrize("name", BAD_IDS)
def test_ids_of_another_kind_or_number_are_refused(name: str, tmp_path: Path) -> None:
    _save(tmp_path / "x.npz", patient=BAD_IDS[name])
    with pytest.raises(InputError, match="not one whole number or text for each image"):
        load_images(tmp_path / "x.npz", id_column="patient")


def test_ids_that_are_no_text_are_refused_without_being_quoted(tmp_path: Path) -> None:
    broken = np.array(["anna"] * 4)
    broken.view(np.uint32)[5] = 0x110000
    _save(tmp_path / "x.npz", patient=broken)
    with pytest.raises(InputError) as raised:
        load_images(tmp_path / "x.npz", id_column="patient")
    assert "anna" not in str(raised.value)
    assert "110000" not in str(raised.value)


@pytest.mark.parametrize("column", ["images", "labels", "classes", "", "nobody"])
def test_a_column_that_holds_no_ids_is_refused(column: str, tmp_path: Path) -> None:
    _save(tmp_path / "x.npz")
    with pytest.raises(InputError):
        load_images(tmp_path / "x.npz", id_column=column)


def test_only_an_npz_has_ids(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot hold a column of ids"):
        load_images("digits", id_column="patient")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_are_made_grey_or_colour(tmp_path, write, dtype):
    """As image files are. A bad value spoils its own record alone, and raises nothing."""
    images = write.toy(channels=3)[0].astype(dtype)
    images[:, 1] //= 2
    if dtype != np.uint8:
        images[0, :2, 0, 0] = np.inf, -np.inf
    path = write.npz(tmp_path / "x.npz", images=images)
    grey = load_images(path, channels=1)
    assert (grey.images.dtype, grey.image_shape) == (dtype, (1, 8, 8))
    luma = 0.299 * images[1:, 0].astype(float) + 0.587 * images[1:, 1] + 0.114 * images[1:, 2]
    np.testing.assert_allclose(grey.images[1:, 0], luma, atol=0.501 if dtype == np.uint8 else 1e-4)
    assert np.isnan(grey.to_unit()[0]).all() == (dtype != np.uint8)
    np.testing.assert_array_equal(load_images(path, channels=3).images, images)
    back = load_images(write.npz(tmp_path / "y.npz", images=grey.images), channels=3)
    np.testing.assert_array_equal(back.images, np.repeat(grey.images, 3, axis=1))
