"""Caps on what a file may make a reader do. Checked on what the file declares, and again on what it really holds."""

from __future__ import annotations

from dataclasses import dataclass

from dpdistill.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds, all inclusive. The defaults fit every benchmark of this field on a laptop.

    Args:
      max_file_bytes: size of one file on disk.
      max_array_bytes: bytes of one array, or of all images together, once unpacked.
      max_ratio: unpacked bytes per packed byte, for arrays above `free_bytes`. Real images stay below 50.
      free_bytes: unpacked size below which no ratio is checked, so that small blank images load.
      max_images: records in one data set.
      max_files: entries in one folder.
      max_classes: length of the class list.
      max_side: pixels along one side of an image file before resizing.
      max_pixels: pixels of an image file before resizing.
      max_image_bytes: encoded bytes of one image.
      min_size: smallest height and width that the models take.
      max_size: largest height and width that the models take.
      scratch: folder for unpacked images that do not fit in memory (`stored.MEMORY_BYTES`); None is the system's.
    """

    max_file_bytes: int = 2**32
    max_array_bytes: int = 2**32
    max_ratio: int = 200
    free_bytes: int = 2**26
    max_images: int = 2_000_000
    max_files: int = 2_000_000
    max_classes: int = 10_000
    max_side: int = 4096
    max_pixels: int = 2**26 - 1
    max_image_bytes: int = 2**26
    min_size: int = 8
    max_size: int = 64
    scratch: str | None = None

    @classmethod
    def of_gib(cls, max_gib: int, scratch: str | None = None) -> Limits:
        """The limits of somebody who expects up to so many GiB of images. What a packed byte may become stays capped."""
        default, n_bytes = cls(), max_gib * 2**30
        return cls(
            max_file_bytes=max(n_bytes, default.max_file_bytes),
            max_array_bytes=n_bytes,
            max_images=max(default.max_images, default.max_images * n_bytes // default.max_array_bytes),
            scratch=scratch,
        )

    def hint(self, n_bytes: int) -> str:
        """The way out where a cap in bytes is passed."""
        return f"at most {n_bytes:,} bytes are read; --max-gib raises that"


DEFAULT_LIMITS = Limits()


def check_unpacked(path: object, unpacked: int, packed: int, limits: Limits) -> None:
    """Refuses an array that is too large once unpacked, before anything is allocated.

    Args:
      path: for the message.
      unpacked: bytes that the file declares, or that have been read so far.
      packed: bytes on disk that they come from.

    Raises:
      InputError: above `max_array_bytes`, or above `max_ratio` per packed byte.
    """
    if unpacked > limits.max_array_bytes:
        raise InputError(path, "is too large once unpacked", limits.hint(limits.max_array_bytes))
    if unpacked > limits.free_bytes and unpacked > limits.max_ratio * packed:
        reason = f"expands to more than {limits.max_ratio} times its size, like a decompression bomb"
        raise InputError(path, reason, "store it with less compression if it is genuine")
