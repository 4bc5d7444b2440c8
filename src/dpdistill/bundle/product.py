"""What a release may hold beside its labelled images: a classifier and the generator that it was taught with. Needs no torch.

K classes, C channels, H, W size.
"""

import json
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ReleaseError
from . import tensors
from .diffusion_product import DiffusionProduct
from .onnx_file import student_onnx

ARCHITECTURE = "wavelet-net"

Weights = dict[str, NDArray[np.float32]]


class Product(Protocol):
    """What a kind of release adds. `files` and `unpack` are inverse to each other, byte for byte."""

    KIND: ClassVar[str]
    SIZES: ClassVar[dict[str, int]]  # the files, and the most bytes each may have

    def files(self) -> dict[str, bytes]:
        """Every file by its path in the release."""

    def describe(self) -> dict[str, Any]:
        """What the certificate says about it, under `release`."""

    def fits(self, image_shape: tuple[int, ...]) -> bool:
        """Whether it is of images [C, H, W]."""


@dataclass(frozen=True, kw_only=True)
class ModelProduct:
    """A classifier, as weights and as ONNX, and its generator.

    Attributes:
      student: the arrays of `models.wavelet_net.WaveletNet`, by their names in PyTorch.
      config: image_shape, n_classes, width, depth and groups of it.
      generator: arrays of the image generator, and `generator_config` its settings.
    """

    KIND: ClassVar[str] = "model"
    SIZES: ClassVar[dict[str, int]] = {
        "model/config.json": 2**20,
        "model/student.safetensors": tensors.MAX_ARRAYS,
        "model/student.onnx": tensors.MAX_ARRAYS,
        "model/generator.safetensors": tensors.MAX_ARRAYS,
    }

    student: Weights
    config: dict[str, Any]
    generator: Weights
    generator_config: dict[str, Any]
    class_names: tuple[str, ...]

    def files(self) -> dict[str, bytes]:
        """The four files. Raises ReleaseError where weights and config do not fit each other."""
        config = {
            "architecture": ARCHITECTURE,
            **self.config,
            "class_names": list(self.class_names),
            "input": "float32 [N, C, H, W] in [-1, 1]: pixel / 127.5 - 1",
            "output": "logits [N, K]",
            "generator": self.generator_config,
        }
        try:
            graph = student_onnx(self.student, {**self.config, "class_names": list(self.class_names)})
        except (KeyError, ValueError, TypeError) as error:
            raise ReleaseError(
                f"model/student.safetensors: not the weights of its config ({type(error).__name__})"
            ) from None
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
        return {
            "model/config.json": text.encode(),
            "model/student.safetensors": tensors.pack(dict(self.student), {"format": "pt"}),
            "model/student.onnx": graph,
            "model/generator.safetensors": tensors.pack(dict(self.generator), {"format": "pt"}),
        }

    def fits(self, image_shape: tuple[int, ...]) -> bool:
        """Whether it classifies images [C, H, W]."""
        return bool(self.config["image_shape"] == list(image_shape))

    def describe(self) -> dict[str, Any]:
        """Sizes: parameters of student and generator."""
        return {
            "student_parameters": int(sum(array.size for array in self.student.values())),
            "generator_parameters": int(sum(array.size for array in self.generator.values())),
        }

    @classmethod
    def unpack(cls, files: dict[str, bytes], class_names: tuple[str, ...]) -> "ModelProduct":
        """Returns what `files` wrote. Raises ReleaseError on anything else."""
        try:
            config = tensors.parse_json(files["model/config.json"])
            if config["architecture"] != ARCHITECTURE:
                raise ReleaseError(
                    f"model/config.json: not a {ARCHITECTURE}, the one architecture that this version reads"
                )
            product = cls(
                student=tensors.unpack(files["model/student.safetensors"], "model/student.safetensors")[0],
                config={name: config[name] for name in ("image_shape", "n_classes", "width", "depth", "groups")},
                generator=tensors.unpack(files["model/generator.safetensors"], "model/generator.safetensors")[0],
                generator_config=config["generator"],
                class_names=class_names,
            )
            written = product.files()
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ReleaseError("model/config.json: not readable, or a field is missing") from None
        for name, raw in written.items():
            if raw != files[name]:
                raise ReleaseError(f"{name}: not what the weights, the config and the certificate give")
        return product


PRODUCTS: dict[str, type[ModelProduct] | type[DiffusionProduct]] = {
    kind.KIND: kind for kind in (ModelProduct, DiffusionProduct)
}
KINDS = ("dataset", *PRODUCTS)
