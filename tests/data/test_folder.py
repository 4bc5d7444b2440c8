"""Folders of class folders, and what the decoder converts."""

import io

import numpy as np
import pytest
from PIL import Image

from dpdistill.data import load_images
from dpdistill.errors import InputError


def one_image(tmp_path, image, name="a.png", **options):
    (tmp_path / "r" / "cat").mkdir(parents=True)
    image.save(tmp_path / "r" / "cat" / name, **options)
    return tmp_path / "r"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("kind", "extension", "error"), [("PNG", ".png", 0), ("BMP", ".bmp", 0), ("JPEG", ".JPG", 6), ("WEBP", ".webp", 12)]
)
def test_formats(tmp_path, write, kind, extension, error, channels):
    data = load_images(write.folder(tmp_path / "r", kind, extension, channels), channels=channels)
    images, labels = write.toy(channels=channels)
    order = np.argsort(labels, kind="stable")
    assert data.class_names == write.names
    np.testing.assert_array_equal(data.labels, labels[order])
    assert np.abs(data.images.astype(int) - images[order]).max() <= error


def test_leftovers_are_skipped_and_an_empty_class_stays(tmp_path, write):
    root = write.folder(tmp_path / "r")
    (root / ".DS_Store").write_bytes(b"x")
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "yak").mkdir()
    data = load_images(root)
    assert data.class_names == ("cat", "dog", "eel", "yak")
    assert len(data.images) == 6


def test_declared_classes_set_the_order(tmp_path, write):
    data = load_images(write.folder(tmp_path / "r"), class_names=["eel", "yak", "dog", "cat"])
    assert data.class_names == ("eel", "yak", "dog", "cat")
    assert data.labels.tolist() == [3, 3, 2, 2, 0, 0]


def test_splits(tmp_path, write):
    write.folder(tmp_path / "r" / "train")
    write.folder(tmp_path / "r" / "test", channels=3)
    assert load_images(tmp_path / "r").image_shape == (1, 8, 8)
    assert load_images(tmp_path / "r", split="test").image_shape == (3, 8, 8)
    with pytest.raises(InputError, match="no split 'val'"):
        load_images(tmp_path / "r", split="val")


def test_mixed_channels_need_a_decision(tmp_path, write):
    root = write.folder(tmp_path / "r")
    (root / "dog" / "colour.png").write_bytes(write.encode(write.toy(channels=3)[0][0]))
    with pytest.raises(InputError, match="mixes grey and colour"):
        load_images(root)
    assert load_images(root, channels=1).image_shape == (1, 8, 8)
    assert load_images(root, channels=3).image_shape == (3, 8, 8)


def test_a_bomb_is_said_to_be_too_large(tmp_path):
    """Before Pillow's own word for it, and before a pixel is decoded."""
    with pytest.raises(InputError, match="is larger than 4096 pixels a side"):
        load_images(one_image(tmp_path, Image.new("1", (12800, 12800))))


def test_resize_crops_the_centre(tmp_path):
    image = np.zeros((16, 32), np.uint8)
    image[:, 8:24] = 255  # the central square
    data = load_images(one_image(tmp_path, Image.fromarray(image)), resize=8)
    assert data.images.shape == (1, 1, 8, 8)
    assert (data.images == 255).all()


@pytest.mark.parametrize(("side", "resize"), [(100, 64), (4, 8), (13, 32)])
def test_resize_reaches_the_supported_sizes(tmp_path, side, resize):
    root = one_image(tmp_path, Image.new("RGB", (side, side), (10, 20, 30)))
    if not 8 <= side <= 64:
        with pytest.raises(InputError, match="--resize H"):
            load_images(root)
    assert load_images(root, resize=resize).images[0, :, 0, 0].tolist() == [10, 20, 30]


def test_transparency_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    pixels = load_images(one_image(tmp_path, image)).images[0]
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert (pixels[:, 1:] == 255).all()


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)])
def test_modes(tmp_path, mode, channels):
    image = Image.new("RGB", (8, 9), "white").convert(mode)
    data = load_images(one_image(tmp_path, image))
    assert data.image_shape == (channels, 9, 8)
    assert (data.images == 255).all()


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert (load_images(one_image(tmp_path, image, transparency=0)).images == 255).all()


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(np.repeat(np.arange(8, 168, 16, dtype=np.uint8)[None], 8, axis=0))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    data = load_images(one_image(tmp_path, image, "a.png", exif=exif))
    assert data.images.shape == (1, 1, 10, 8)
    np.testing.assert_array_equal(data.images[0, 0, :, 0], np.arange(8, 168, 16))


def test_bytes_after_an_image_are_never_interpreted(tmp_path, write):
    root = write.folder(tmp_path / "r")
    buffer = io.BytesIO()
    np.savez(buffer, images=np.zeros(1))
    file = root / "cat" / "0.png"
    before = load_images(root).images
    file.write_bytes(file.read_bytes() + buffer.getvalue())  # a polyglot: also a valid zip
    np.testing.assert_array_equal(load_images(root).images, before)


def test_class_folders_are_read_without_their_classes(tmp_path, write):
    root = write.folder(tmp_path / "r")
    known = load_images(root)
    (root / "x.png").write_bytes(write.encode(write.toy()[0][0]))
    data = load_images(root, unlabelled=True)
    np.testing.assert_array_equal(data.images[:-1], known.images)  # in the same order
    assert (data.labels.tolist(), data.class_names) == ([0] * 7, ("image",))
    (root / "cat" / "deeper").mkdir()
    with pytest.raises(InputError, match="is a folder inside a class folder"):
        load_images(root, unlabelled=True)


def test_splits_without_class_folders(tmp_path, write):
    """A class may be called train: then it is no part."""
    for place, n in (("train", 1), ("test", 2)):
        (tmp_path / "r" / place).mkdir(parents=True)
        for i in range(n):
            (tmp_path / "r" / place / f"{i}.png").write_bytes(write.encode(write.toy()[0][i]))

    def count(**options):
        return len(load_images(tmp_path / "r", unlabelled=True, **options).images)

    assert (count(), count(split="test")) == (1, 2)
    (tmp_path / "r" / "bus").mkdir()
    assert (count(), count(split="test")) == (3, 2)
    with pytest.raises(InputError, match=r"has no split 'val' .*name the folder"):
        count(split="val")
