"""PNG files whose bytes do not depend on which zlib wrote them, and a strict comparison with pixels. Grey or RGB.

Written here and not with Pillow, because a resumed run must give the same bytes, and `verify` compares without decoding
a hostile file.
"""

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def to_pixels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Maps images [M, C, H, W] in [-1, 1] to pixels [M, H, W, C] in 0 … 255, rounded."""
    m, channels, height, width = images.shape
    pixels = np.empty((m, height, width, channels), np.uint8)
    for start in range(0, m, 256):  # not all at once: as float64 they take twice the memory again
        part = images[start : start + 256].clip(-1, 1).astype(np.float64)
        pixels[start : start + 256] = np.rint((part + 1) * 127.5).transpose(0, 2, 3, 1)
    return pixels


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _stored(raw: bytes) -> bytes:
    """A zlib stream that stores `raw` as it is: the same bytes on every machine."""
    blocks = [raw[start : start + 65535] for start in range(0, len(raw), 65535)]
    body = b"".join(
        struct.pack("<BHH", index == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
        for index, block in enumerate(blocks)
    )
    return b"\x78\x01" + body + struct.pack(">I", zlib.adler32(raw))


def _head_and_rows(pixels: NDArray[np.uint8]) -> tuple[bytes, bytes]:
    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = pixels.reshape(height, -1)
    return head, rows.tobytes()


def encode(pixels: NDArray[np.uint8], *, small: bool = False) -> bytes:
    """Returns the PNG of `pixels` [H, W, C], C 1 or 3: stored, or deflated where `small` (bytes depend on the zlib)."""
    head, rows = _head_and_rows(pixels)
    body = zlib.compress(rows, 9) if small else _stored(rows)
    return _SIGNATURE + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def same(raw: bytes, pixels: NDArray[np.uint8]) -> bool:
    """True if `raw` is a PNG of exactly these pixels, as `encode` lays it out. Never inflates past their size."""
    head, rows = _head_and_rows(pixels)
    start = _SIGNATURE + _chunk(b"IHDR", head)
    end = _chunk(b"IEND", b"")
    if not (raw.startswith(start) and raw.endswith(end)):
        return False
    body = raw[len(start) + 8 : -len(end) - 4]
    if raw != start + _chunk(b"IDAT", body) + end:
        return False
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(body, len(rows) + 1)
    except zlib.error:
        return False
    return plain == rows and inflater.eof and not inflater.unused_data


def sheet(pixels: NDArray[np.uint8], labels: NDArray[np.int64], n_classes: int, across: int = 10) -> NDArray[np.uint8]:
    """Returns one picture: a row per class of up to `across` images, enlarged without smoothing to about 48 pixels."""
    _, height, width, channels = pixels.shape
    shown = max((min(across, int((labels == k).sum())) for k in range(n_classes)), default=0)
    scale, gap = max(1, round(48 / max(height, width))), 4
    rows = min(n_classes, max(1, 8000 // (height * scale + gap)))  # a picture higher than that opens nowhere
    step_h, step_w = height * scale + gap, width * scale + gap
    canvas = np.full((rows * step_h + gap, shown * step_w + gap, channels), 255, np.uint8)
    for k in range(rows):
        for column, index in enumerate(np.flatnonzero(labels == k)[:shown]):
            top, left = gap + k * step_h, gap + column * step_w
            large = pixels[index].repeat(scale, axis=0).repeat(scale, axis=1)
            canvas[top : top + height * scale, left : left + width * scale] = large
    return canvas
