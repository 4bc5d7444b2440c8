"""The arrays of a distilled data set, checked, and their file. numpy only, so that a checker needs no torch.

M images, C channels, H, W size, K classes; each image holds parts × parts training images.
"""

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ReleaseError
from . import png, tensors

MAX_PARTS, MAX_GAIN = 16, 64


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is released. Construction refuses what no method may return.

    Attributes:
      images: float32 [M, C, H, W] in [-1, 1], C 1 or 3.
      labels: int64 [M] below K.
      soft_labels: float32 [M·parts², K], rows that are probabilities; or None.
      gain: contrast of a training image against its part of a stored one.
      class_names: K names, printable and different.

    Raises:
      ReleaseError: anything else.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    soft_labels: NDArray[np.float32] | None
    parts: int
    gain: int
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if (
            self.images.dtype != np.float32
            or self.images.ndim != 4
            or self.images.shape[1] not in (1, 3)
            or not self.images.size
        ):
            raise ReleaseError(f"images are {self.images.dtype} {self.images.shape}, wanted float32 [M, 1 or 3, H, W]")
        if not (np.abs(self.images) <= 1).all():  # also refuses NaN
            raise ReleaseError("images hold values outside [-1, 1]")
        m, k = len(self.images), len(self.class_names)
        if (
            self.labels.dtype != np.int64
            or self.labels.shape != (m,)
            or not ((self.labels >= 0) & (self.labels < k)).all()
        ):
            raise ReleaseError(f"labels are not {m} class numbers below {k}")
        if not (1 <= self.parts <= min(MAX_PARTS, *self.images.shape[2:])):
            raise ReleaseError(f"an image cannot hold {self.parts} × {self.parts} training images")
        if not (1 <= self.gain <= MAX_GAIN):
            raise ReleaseError(f"a training image cannot have {self.gain} times the contrast of its stored one")
        if self.class_names != printable_names(self.class_names):
            raise ReleaseError("class names are not different printable names")
        soft = self.soft_labels
        if soft is not None:
            if soft.dtype != np.float32 or soft.shape != (m * self.parts**2, k):
                raise ReleaseError(
                    f"soft labels are {soft.dtype} {soft.shape}, wanted float32 {(m * self.parts**2, k)}"
                )
            if not ((soft >= 0).all() and (np.abs(soft.sum(axis=1, dtype=np.float64) - 1) <= 1e-3).all()):
                raise ReleaseError("soft labels are not probabilities")

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The images as 8-bit pixels [M, H, W, C]."""
        return png.to_pixels(self.images)

    @property
    def shown(self) -> NDArray[np.uint8]:
        """The images as 8-bit pixels with the contrast of training images, for eyes."""
        return png.to_pixels(np.clip(self.gain * self.images, -1, 1))

    def pack(self) -> bytes:
        """Returns the safetensors file."""
        arrays: dict[str, tensors.Array] = {"images": self.images, "labels": self.labels}
        if self.soft_labels is not None:
            arrays["soft_labels"] = self.soft_labels
        return tensors.pack(arrays, metadata(self.class_names, self.parts, self.gain))


def metadata(class_names: tuple[str, ...], parts: int, gain: int) -> dict[str, str]:
    """What the header of the safetensors file says."""
    numbers = {"parts": str(parts), "gain": str(gain), "range": "-1 to 1"}
    return {"format": "pt", "class_names": json.dumps(list(class_names)), **numbers}


def unpack(raw: bytes) -> Contents:
    """Returns what `Contents.pack` wrote. Raises ReleaseError on anything else."""
    arrays, metadata = tensors.unpack(raw, "dataset/synthetic.safetensors")
    try:
        names = tensors.parse_json(metadata["class_names"].encode())
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError("class names")
        result = Contents(
            images=arrays["images"],
            labels=arrays["labels"],
            soft_labels=arrays.get("soft_labels"),
            parts=int(metadata["parts"][:4]),
            gain=int(metadata["gain"][:4]),
            class_names=tuple(names),
        )
    except ReleaseError as error:
        raise ReleaseError(f"dataset/synthetic.safetensors: {error}") from None
    except (KeyError, ValueError, TypeError):
        raise ReleaseError(
            "dataset/synthetic.safetensors: images, labels, parts, gain or class names are missing"
        ) from None
    if result.pack() != raw:
        raise ReleaseError("dataset/synthetic.safetensors: something beside the images and labels, or in another order")
    return result


def printable_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Class names as they may be shown: no control or direction characters, 1 to 100 long, all different."""
    cleaned = [one_line(name, 100).strip() or f"class {index}" for index, name in enumerate(names)]
    times = Counter(cleaned)

    def numbered(name: str, number: int) -> str:
        while times[f"{name[:80]} ({number})"]:  # the name of another class
            number += len(names)
        return f"{name[:80]} ({number})"

    return tuple(name if times[name] == 1 else numbered(name, index) for index, name in enumerate(cleaned))


def one_line(text: str, limit: int = 300) -> str:
    """Any text as one printable line, cut where it is long."""
    return "".join(character if character.isprintable() else "�" for character in text)[:limit]
