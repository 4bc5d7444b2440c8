"""Many decoded images to one array. All must agree in size and channels, since models take one shape.

Shapes: N records, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dpdistill.data.decode import RESIZE_HINT
from dpdistill.data.limits import Limits
from dpdistill.data.stored import Images, room
from dpdistill.errors import InputError, MisfitError

CHANNELS_HINT = "--set channels=1 or --set channels=3 converts all"


def with_channels(image_CHW: np.ndarray, channels: int | None) -> np.ndarray:
    """Returns a uint8 or float image with 1 channel (ITU-R 601 luma) or 3 (grey repeated), or as it is for None."""
    if channels is None or len(image_CHW) == channels:
        return image_CHW
    if channels == 3:
        return np.repeat(image_CHW, 3, axis=0)
    with np.errstate(invalid="ignore", over="ignore"):  # of pixels that are no numbers: that record counts zero
        luma = np.tensordot(np.array([0.299, 0.587, 0.114]), image_CHW.astype(np.float64), axes=1)
        return (np.rint(luma) if image_CHW.dtype == np.uint8 else luma).astype(image_CHW.dtype)[None]


def stack_images(
    source: object,
    images: Iterable[tuple[object, np.ndarray]],
    n_images: int,
    limits: Limits,
    channels: int | None = None,
) -> Images:
    """Returns uint8 [N, C, H, W], in a file where it does not fit in memory.

    Args:
      source: the whole data set, for messages.
      images: pairs of a path for messages and pixels [C, H, W]. Consumed one at a time.
      n_images: N, to reserve the memory once.
      channels: 1 or 3 to convert all images, or None to require that they agree.

    Raises:
      InputError: sizes or channels differ, no image at all, or more bytes than the cap.
    """
    stacked: Images | None = None
    n_seen = 0
    for path, pixels in images:
        image_CHW = with_channels(pixels, channels)
        if stacked is None:
            if n_images > limits.max_images or n_images * image_CHW.size > limits.max_array_bytes:
                raise InputError(
                    path, "belongs to a data set that is too large to load", "use a part of it, or raise --max-gib"
                )
            stacked = room((n_images, *image_CHW.shape), np.dtype(np.uint8), limits.scratch)
        if image_CHW.shape[1:] != stacked.shape[2:]:
            raise MisfitError(path, "differs in size from the images before it", RESIZE_HINT)
        if image_CHW.shape[0] != stacked.shape[1]:
            raise MisfitError(path, "mixes grey and colour with the images before it", CHANNELS_HINT)
        if n_seen == n_images:
            raise InputError(path, "comes after the declared number of images", "write the file again")
        stacked[n_seen] = image_CHW
        n_seen += 1
    if stacked is None or n_seen != n_images:
        raise InputError(source, "holds no images, or fewer than declared", "at least one image is needed")
    return stacked
