"""Labelled images, and their conversion to what the models take.

Shapes: N records, C channels, H height, W width, K classes. Private: pixels, labels and N. Public: everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dpdistill.data.stored import Images, chunks
from dpdistill.errors import InputError

PUBLIC_FLOATS_HINT = "save them as uint8 in 0..255"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LabelledImages:
    """Images with one class each.

    Args:
      images: [N, C, H, W], uint8 in 0..255, or float32 nominally within `value_range`. C is 1 or 3. In memory, or in a file
        (`StoredArray`), where each look at a row reads it.
      labels: [N], int64 in 0..K-1.
      class_names: K names. Public: declared by a file, a folder or the user, never collected from `labels`.
      value_range: of float images. Public: declared, never inferred from the pixels.
      source: how the user named the data.
      ids: [N], integers or text, or None: whose record each is (a person, a patient), where one may have several. Private.

    Raises:
      ValueError: shapes, dtypes or facts do not fit. The message holds no value taken from a record.
    """

    images: Images
    labels: np.ndarray
    class_names: tuple[str, ...]
    value_range: tuple[float, float] = (0.0, 1.0)
    source: str
    ids: np.ndarray | None = None

    def __post_init__(self) -> None:
        dtype, shape = self.images.dtype, self.images.shape
        if dtype not in (np.dtype(np.uint8), np.dtype(np.float32)):
            raise ValueError(f"Expected images of dtype uint8 or float32, got {dtype}.")
        if len(shape) != 4 or shape[1] not in (1, 3):
            raise ValueError("Expected images of shape [N, C, H, W] with C 1 or 3.")
        if self.labels.dtype != np.int64 or self.labels.shape != shape[:1]:
            raise ValueError("Expected labels of dtype int64 and shape [N], one for each image.")
        if not self.class_names or len(set(self.class_names)) != len(self.class_names):
            raise ValueError("Expected class_names to be distinct, and at least one.")
        if self.labels.size and (self.labels.min() < 0 or self.labels.max() >= len(self.class_names)):
            raise ValueError("Expected every label in 0..K-1, where K is the number of class_names.")
        if self.ids is not None and not (valid_ids(self.ids) and self.ids.shape == shape[:1]):
            raise ValueError("Expected ids of whole numbers or text and of shape [N], one for each image.")
        check_value_range(self.value_range)

    def __repr__(self) -> str:
        """Shows public facts only, so that a log line or a traceback cannot show a record."""
        c, h, w = self.image_shape
        return f"LabelledImages({self.source!r}, images {c}x{h}x{w} {self.images.dtype}, {self.n_classes} classes)"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, c, h, w = self.images.shape
        return c, h, w

    @property
    def n_classes(self) -> int:
        """K."""
        return len(self.class_names)

    def to_unit(self) -> np.ndarray:
        """Returns the images as float32 in [-1, 1], all of them in memory; see `to_unit`."""
        return to_unit(self.images[:], self.value_range)


def valid_ids(ids: np.ndarray) -> bool:
    """Whether ids are whole numbers, or text of characters that exist: the door must not find out on one record."""
    if ids.dtype.kind != "U":
        return ids.dtype.kind in "iu"
    return ids.dtype.isnative and bool((np.ascontiguousarray(ids).view(np.uint32) < 0x110000).all())


def check_value_range(value_range: tuple[float, float]) -> None:
    """Refuses a declared range of float pixels that is not two finite numbers, low before high."""
    low, high = value_range
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"Expected {value_range=} to be two finite numbers, low before high.")


def beyond(images: Images, low: float, high: float) -> bool:
    """Whether any pixel lies outside."""
    return any(bool(((part < low) | (part > high)).any()) for part in chunks(images))


def public_range(data: LabelledImages) -> tuple[float, float]:
    """Returns the range of public float images, 0..1 or -1..1, by their pixels. Private ones are never asked.

    Raises:
      InputError: they are of neither, or only a little below 0, which could be either.
    """
    if data.images.dtype == np.uint8 or not beyond(data.images, 0, 1):
        return 0.0, 1.0
    if beyond(data.images, -1, 1) or not beyond(data.images, -0.5, np.inf):
        raise InputError(data.source, "holds float images beyond 0..1 and not plainly of -1..1", PUBLIC_FLOATS_HINT)
    return -1.0, 1.0


def check_public_range(data: LabelledImages) -> None:
    """Refuses public float images beyond their declared range: they would be clamped without a word. Private ones are never asked.

    Raises:
      InputError: some are.
    """
    low, high = data.value_range
    if data.images.dtype != np.uint8 and beyond(data.images, low, high):
        raise InputError(data.source, f"holds float images beyond {low:g}..{high:g}", PUBLIC_FLOATS_HINT)


def to_unit(images: np.ndarray, value_range: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Converts pixels to float32 in [-1, 1], each record by itself.

    uint8 maps by x / 127.5 - 1. Floats map affinely from `value_range` and are clamped. A record with any NaN or
    infinite pixel becomes NaN throughout: it must not raise, and the door counts it as zero.

    Args:
      images: [N, C, H, W], uint8 or float.
      value_range: of float images. Ignored for uint8.

    >>> to_unit(np.array([[[[0, 255]]]], np.uint8)).ravel().tolist()
    [-1.0, 1.0]
    """
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(127.5) - np.float32(1)
    if images.dtype.kind != "f":
        raise ValueError(f"Expected images of dtype uint8 or float32, got {images.dtype}.")
    check_value_range(value_range)
    low, high = value_range
    finite_N = np.isfinite(images).reshape(len(images), -1).all(axis=1) if images.size else np.ones(len(images), bool)
    clamped = np.clip(images, low, high)  # first: a huge pixel must not overflow below
    unit = ((clamped.astype(np.float64) - low) * (2 / (high - low)) - 1).clip(-1, 1).astype(np.float32)
    unit[~finite_N] = np.nan
    return unit
