"""One encoded image (PNG, JPEG, BMP or WebP) to pixels, through Pillow with everything else switched off.

What is converted, each record by itself:
  1-bit → grey; palette → colour; an alpha channel or transparent colour → laid over white; the EXIF orientation of
  a camera → applied.
What is refused by name: animations, 16-bit and float pixels, CMYK, more pixels than the caps, other formats, a file
whose extension says another format, and everything that makes the decoder warn. Bytes after the image are ignored:
they are never interpreted.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from dpdistill.data.limits import Limits
from dpdistill.errors import InputError, MisfitError

EXTENSIONS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
# The only decoders in use; naming them keeps Pillow from importing its fifty others to recognise a file.
DECODERS = (PngImagePlugin, JpegImagePlugin, BmpImagePlugin, WebPImagePlugin)
RESIZE_HINT = "make all images one size, or let dpdistill do it with --resize H"


def decode_image(data: bytes, path: object, limits: Limits, resize: int | None = None) -> np.ndarray:
    """Returns uint8 pixels [C, H, W], C = 1 for grey and 3 for colour.

    Args:
      data: the encoded image.
      path: for messages; its extension, if there is one, must agree with the content.
      resize: side of the square result, or None to keep the size.

    Raises:
      InputError: one of the refusals above.
      Exception: whatever Pillow raises on damaged data. The caller converts it (`files.one_error_type`).
    """
    if not 0 < len(data) <= limits.max_image_bytes:
        raise InputError(
            path, f"is not an image of 1 to {limits.max_image_bytes:,} bytes", "leave it out, or store it smaller"
        )
    extension = os.path.splitext(str(path))[1].lower()
    expected = EXTENSIONS.get(extension)
    found = sniff(data)
    if found is None:
        raise InputError(path, "is not a PNG, JPEG, BMP or WebP image", "convert it to PNG")
    if expected is not None and found != expected:
        raise InputError(path, f"is named {extension} but holds {found}", "rename or convert it")
    if found == "PNG" and data[24:25] == b"\x10":  # Pillow would silently drop the low bytes of 16-bit colour
        raise InputError(path, "has 16 bits per channel", "convert it to 8 bits")
    if found == "PNG" and b"IEND\xaeB`\x82" not in data:  # Pillow stops at the last pixel and would not miss it
        raise InputError(path, "is cut short", "copy or download it again")
    too_large = InputError(path, f"is larger than {limits.max_side} pixels a side", "shrink it first")
    try:
        opened = Image.open(io.BytesIO(data), formats=[found])
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise too_large from None
    with opened as image:
        w, h = image.size
        if max(w, h) > limits.max_side or w * h > limits.max_pixels:
            raise too_large
        if image.format != found or getattr(image, "n_frames", 1) != 1:
            raise InputError(path, "holds more than one frame", "save each frame as a file of its own")
        return to_pixels(resize_square(flatten(image, path), resize), path, limits)


def sniff(data: bytes) -> str | None:
    """Returns the format that the first bytes show."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return "BMP" if data[:2] == b"BM" else None


def flatten(image: Image.Image, path: object) -> Image.Image:
    """Returns an upright image of mode L or RGB."""
    if image.mode not in ("1", "L", "P", "RGB", "LA", "PA", "RGBA"):
        raise InputError(path, f"has pixels of the kind {image.mode}", "convert it to 8-bit grey or RGB")
    if image.mode in ("P", "PA") and image.palette is None:
        raise InputError(path, "has palette pixels but no palette", "save it again as RGB")
    grey = image.mode in ("1", "L", "LA")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("L" if grey else "RGB")


def resize_square(image: Image.Image, side: int | None) -> Image.Image:
    """Returns the central square scaled to `side`: area average to shrink, Lanczos to enlarge."""
    w, h = image.size
    if side is None or (w, h) == (side, side):
        return image
    short = min(w, h)
    left, top = (w - short) // 2, (h - short) // 2
    method = Image.Resampling.BOX if short >= side else Image.Resampling.LANCZOS
    return image.resize((side, side), method, box=(left, top, left + short, top + short))


def to_pixels(image: Image.Image, path: object, limits: Limits) -> np.ndarray:
    """Returns [C, H, W] of an L or RGB image whose size the models take."""
    w, h = image.size
    check_size(path, h, w, limits)
    pixels = np.asarray(image, np.uint8)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def check_size(path: object, h: int, w: int, limits: Limits) -> None:
    """Refuses images outside the sizes that the models take."""
    low, high = limits.min_size, limits.max_size
    if not (low <= h <= high and low <= w <= high):
        raise MisfitError(path, f"has images of {h}x{w} pixels; each side must be {low} to {high}", RESIZE_HINT)


def check_resize(path: object, resize: int | None, limits: Limits) -> None:
    """Refuses a target side outside the sizes that the models take."""
    if resize is not None and not (isinstance(resize, int) and limits.min_size <= resize <= limits.max_size):
        raise InputError(
            path, f"resize must be a whole number in {limits.min_size}..{limits.max_size}", "choose another --resize"
        )


def resize_arrays(images: np.ndarray, side: int) -> np.ndarray:
    """Returns images [N, C, side, side] of the same dtype (uint8 or float32), each channel resized by itself.

    Float pixels that are not finite spread over their neighbours, within their own record.
    """
    n, c, h, w = images.shape
    if (h, w) == (side, side):
        return images
    out = np.empty((n, c, side, side), images.dtype)
    for i in range(n):
        for channel in range(c):
            out[i, channel] = np.asarray(resize_square(Image.fromarray(images[i, channel]), side))
    return out
