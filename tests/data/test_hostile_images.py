"""Bounds on image files and folders. The hostile ones themselves are in helpers/hostile_data.py."""

import os

import pytest
from PIL import Image

from dpdistill.data import Limits, load_images
from dpdistill.errors import InputError
from hostile_data import GREY, folder_with


def refused(path, **options):
    """Returns the message, after checking its form."""
    with pytest.raises(InputError) as caught:
        load_images(path, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < len(os.fspath(path)) + 300
    return message


def test_the_plain_png_is_valid(tmp_path):
    assert load_images(folder_with(tmp_path)).image_shape == (1, 8, 8)


def test_unreadable(tmp_path, monkeypatch):
    root = folder_with(tmp_path)

    def deny(*_, **__):
        raise PermissionError("denied")

    monkeypatch.setattr(os, "open", deny)  # file modes do not stop root, as whom tests may run
    assert "permission denied" in refused(root)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, OSError, SystemError, OverflowError])
def test_whatever_a_decoder_raises(tmp_path, monkeypatch, error):
    root = folder_with(tmp_path)

    def fail(*_, **__):
        raise error("pixel of Anna")

    monkeypatch.setattr(Image, "open", fail)
    assert "Anna" not in refused(root)


@pytest.mark.parametrize("limit", ["max_files", "max_image_bytes", "max_pixels", "max_side", "max_array_bytes"])
def test_every_cap_holds(tmp_path, limit):
    root = folder_with(tmp_path)
    (root / "cat" / "b.png").write_bytes(GREY)
    refused(root, limits=Limits(**{limit: 1}))


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("", {}),
        ("a\0b.npz", {}),
        ("x" * 5000 + ".npz", {}),
        ("\ud800.npz", {}),
        ("digits", {"resize": 7}),
        ("digits", {"resize": 65}),
        ("digits", {"channels": 2}),
        ("digits", {"value_range": (1, 0)}),
        ("digits", {"value_range": ("a", "b")}),
        ("digits", {"n_classes": 9}),
        ("digits", {"class_names": "0123456789"}),
        ("/folder/x.mat", {}),
        ("/dev/null", {}),
    ],
)
def test_arguments(spec, options):
    refused(spec, **options)
