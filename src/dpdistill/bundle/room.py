"""How large a release will be, so that one too large to be checked is refused before anything is charged for it.

Files are counted to the byte where that is easy, and from above where it is not. M images, C channels, H, W size, K classes.
"""

import math
from collections.abc import Mapping

from ..errors import ConfigError
from ..privacy import ledger as ledgers
from . import tensors
from .contents import metadata, printable_names
from .reading import MAX_RELEASE, SIZES
from .tensors import MAX_ARRAYS, MAX_HEADER

NAMES = 2**12  # bytes of a header beside the class names
PAGES = 2**25  # bytes of README.md, report.html and samples.png: they show so many images and no more
ROW = 256  # bytes of a row in the table, beside its pixels and soft labels
Size = tuple[int, str]  # bytes, and what to choose smaller


def check_names(class_names: tuple[str, ...]) -> None:
    """Raises ConfigError where the class names, as a release writes them, are more than a file's header may hold."""
    names = printable_names(class_names)
    header = len(tensors.pack({}, metadata(names, parts=1, gain=1)))
    marks = sum(name.count(mark) for name in names for mark in "<>&'")  # each in six bytes on a card
    # In a model's config each name has a line of its own, with eight bytes around it.
    if header + 8 * len(names) + NAMES > MAX_HEADER or 6 * marks > SIZES["README.md"] - 2 * MAX_HEADER:
        raise ConfigError(
            f"{len(class_names):,} class names of {header:,} bytes in all, as a release writes them, are more than the "
            f"{MAX_HEADER >> 20} MiB that it may hold; choose shorter ones (--set class_names=A,B,…)"
        )


def dataset(n_images: int, image_shape: tuple[int, int, int], n_classes: int, soft: bool) -> dict[str, Size]:
    """The files of M labelled images, with soft labels or without."""
    pixels, labels = n_images * math.prod(image_shape), n_images * n_classes * soft
    fewer = "--per-class or --resize"
    return {
        "dataset/synthetic.safetensors": (4 * (pixels + labels) + 8 * n_images + MAX_HEADER, fewer),
        "dataset/train.parquet": (pixels + ROW * n_images + 9 * labels // 2 + 4 * MAX_HEADER, fewer),
    }


def weights(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of a file of such arrays, its header too."""
    return 4 * sum(math.prod(shape) for shape in shapes.values()) + MAX_HEADER


def check_files(files: Mapping[str, Size]) -> None:
    """Raises ConfigError where a file, or all together, are more than a release may hold beside its pages and a ledger."""
    for name, (size, smaller) in files.items():
        if size > MAX_ARRAYS:
            raise ConfigError(
                f"{name} would have {-(-size >> 20):,} MiB, more than the {MAX_ARRAYS >> 20} MiB that a release may hold in one file; "
                f"choose a smaller {smaller}"
            )
    most = MAX_RELEASE - ledgers.MAX_BYTES - PAGES
    total = sum(size for size, _ in files.values())
    if total > most:
        smaller = " or ".join(dict.fromkeys(smaller for _, smaller in files.values()))
        raise ConfigError(
            f"all files together would have {-(-total >> 20):,} MiB, more than the {most >> 20} MiB that a release may hold; "
            f"choose a smaller {smaller}"
        )
