"""Hostile folders, image files and special files: every one is refused in one line."""

import io
import os
import struct
import zlib

import pytest
from PIL import Image

from dpdistill.data import Limits, load_images
from dpdistill.errors import InputError


def chunk(kind, data):
    """Returns one PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(w, h, rows, depth=8, colour=0, extra=b""):
    """Returns a PNG of any declared size."""
    head = chunk(b"IHDR", struct.pack(">2I5B", w, h, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image, kind, **options):
    """Returns an encoded Pillow image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GREY = png(8, 8, bytes(72))
FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
ITXT_BOMB = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27)))

# Each case: the name of the one file in the class folder, and its bytes.
FILES = {
    "pixel bomb": ("a.png", png(12800, 12800, bytes(10**6))),
    "declared 2^31 pixels wide": ("a.png", png(2**31 - 1, 1, b"")),
    "declared width 0": ("a.png", png(0, 8, b"")),
    "text chunk bomb": ("a.png", png(8, 8, bytes(72), extra=ITXT_BOMB)),
    "16-bit grey": ("a.png", png(8, 8, bytes(136), depth=16)),
    "16-bit colour": ("a.png", png(8, 8, bytes(8 * 49), depth=16, colour=2)),
    "no palette": ("a.png", png(8, 8, bytes(72), colour=3)),
    "impossible depth": ("a.png", png(8, 8, bytes(72), depth=7)),
    "PNG cut short": ("a.png", GREY[:50]),
    "PNG header only": ("a.png", GREY[:8]),
    "too few rows": ("a.png", png(8, 8, bytes(20))),
    "wrong checksum": ("a.png", GREY[:30] + b"\0" + GREY[31:]),
    "JPEG cut short": ("a.jpg", saved(FRAMES[0], "JPEG")[:300]),
    "CMYK": ("a.jpg", saved(Image.new("CMYK", (8, 8)), "JPEG")),
    "animated PNG": ("a.png", saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:])),
    "animated WebP": ("a.webp", saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:])),
    "two pictures in one JPEG": ("a.jpg", saved(FRAMES[0], "MPO", save_all=True, append_images=FRAMES[1:])),
    "JPEG named png": ("a.png", saved(FRAMES[0], "JPEG")),
    "TIFF named png": ("a.png", saved(FRAMES[0], "TIFF")),
    "GIF named png": ("a.png", saved(FRAMES[0], "GIF")),
    "EPS named png": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
    "SVG": ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "GIF": ("a.gif", saved(FRAMES[0], "GIF")),
    "text named png": ("a.png", b"hello"),
    "zip named png": ("a.png", b"PK\x03\x04" + bytes(50)),
    "empty image": ("a.png", b""),
    "no extension": ("a", GREY),
    "double extension": ("a.png.exe", GREY),
    "name with a newline": ("a\nb.png", GREY),
    "name with right-to-left": ("a\u202egnp.png", GREY),
    "name with an escape code": ("a\x1b[2Jb.png", GREY),
    "name that is not UTF-8": (os.fsdecode(b"a\xffb.png"), GREY),
    "too small": ("a.png", png(7, 8, bytes(64))),
    "too large": ("a.png", png(65, 8, bytes(66 * 8))),
    "BMP of 2^31 rows": ("a.bmp", saved(FRAMES[0], "BMP")[:22] + struct.pack("<i", 2**31 - 1) + bytes(200)),
}


def folder_with(tmp_path, name="ok.png", data=GREY):
    """Returns root/cat/name with these bytes."""
    (tmp_path / "r" / "cat").mkdir(parents=True)
    (tmp_path / "r" / "cat" / name).write_bytes(data)
    return tmp_path / "r"


def refused(path, **options):
    """Returns the message, after checking its form."""
    with pytest.raises(InputError) as caught:
        load_images(path, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < len(os.fspath(path)) + 300
    return message


@pytest.mark.parametrize("name", FILES)
def test_file(tmp_path, name):
    message = refused(folder_with(tmp_path, *FILES[name]))
    assert "cat/" in message


def test_the_plain_png_is_valid(tmp_path):
    assert load_images(folder_with(tmp_path)).image_shape == (1, 8, 8)


def loop(root):
    (root / "dog").symlink_to(root)


def link_out(root):
    (root / "cat" / "b.png").symlink_to("/etc/passwd")


def link_within(root):
    (root / "cat" / "b.png").symlink_to(root / "cat" / "ok.png")


def dangling(root):
    (root / "cat" / "b.png").symlink_to("nowhere.png")


def device(root):
    (root / "cat" / "b.png").symlink_to("/dev/zero")


def pipe(root):
    os.mkfifo(root / "cat" / "b.png")


def pipe_as_class(root):
    os.mkfifo(root / "dog")


def stray(root):
    (root / "labels.csv").write_text("=cmd|' /C calc'!A0")


def nested(root):
    (root / "cat" / "inner").mkdir()


def class_with_newline(root):
    (root / "d\nog").mkdir()


def other_size(root):
    (root / "cat" / "z.png").write_bytes(png(9, 8, bytes(80)))


def mixed_channels(root):
    (root / "cat" / "z.png").write_bytes(png(8, 8, bytes(8 * 25), colour=2))


def no_images(root):
    os.unlink(root / "cat" / "ok.png")


def nothing(root):
    no_images(root)
    os.rmdir(root / "cat")


def npz_inside(root):
    (root / "train.npz").write_bytes(b"PK")


LAYOUTS = (
    loop,
    link_out,
    link_within,
    dangling,
    device,
    pipe,
    pipe_as_class,
    stray,
    nested,
    class_with_newline,
    other_size,
    mixed_channels,
    no_images,
    nothing,
    npz_inside,
)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("spoil", LAYOUTS, ids=lambda spoil: spoil.__name__)
def test_layout(tmp_path, spoil):
    root = folder_with(tmp_path)
    spoil(root)
    assert "passwd" not in refused(root)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("extension", [".npz", ".parquet", ".arrow", "-images-idx3-ubyte"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "missing", "empty"])
def test_special_files(tmp_path, extension, kind):
    path = tmp_path / f"x{extension}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    (tmp_path / "x-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 0))
    refused(path, n_classes=3)


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
        raise error("secret 42")

    monkeypatch.setattr(Image, "open", fail)
    assert "42" not in refused(root)


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
        ("digits", {"channels": 3}),
        ("/folder/x.mat", {}),
        ("/dev/null", {}),
    ],
)
def test_arguments(spec, options):
    refused(spec, **options)
