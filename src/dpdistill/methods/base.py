"""What every method takes and gives. A method is one module with `Config`, `plan` and `run`; METHODS lists them.

B images, C channels, H, W size, K classes, M synthetic images.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..mechanisms import PrivateData
from ..models.augment import expand
from ..models.student_generator import StudentGenerator
from ..models.wavelet_net import WaveletNet
from ..privacy import Planned


@dataclass(frozen=True, kw_only=True)
class Public:
    """Everything a method may know without asking the door.

    Attributes:
      image_shape: (C, H, W).
      class_names: K names.
      auxiliary: float32 [A, C, H, W] in [-1, 1], public images; procedural ones where the person has none.
      procedural: float32 [A', C, H, W] in [-1, 1], made-up images beside the person's own, or None.
      auxiliary_labels: int64 [A], what the person's own images show, of at least two classes that need not be those of the
        records; None where they do not say.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    auxiliary: Tensor
    procedural: Tensor | None = None
    auxiliary_labels: Tensor | None = None

    @property
    def n_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A distilled data set.

    Attributes:
      images: float32 [M, C, H, W] in [-1, 1]: what is stored and shown.
      labels: int64 [M].
      soft_labels: float32 [M·parts², K], or None: a probability vector for every training image.
      parts: each stored image holds parts × parts training images (multi-formation; 1 = the image itself).
      gain: contrast of training images against stored ones. `training_images` turns stored images into training images.
    """

    images: Tensor
    labels: Tensor
    soft_labels: Tensor | None = None
    parts: int = 1
    gain: int = 1

    def training_images(self) -> Tensor:
        """Returns [M·parts², C, H, W] in [-1, 1]; the label of each is `labels.repeat_interleave(parts**2)`."""
        return expand(self.images.float(), self.parts, self.gain)


@dataclass(frozen=True, kw_only=True)
class Student:
    """A converted model.

    Attributes:
      model: the student.
      generator: what drew its training images, beside the prior.
      images: some of the generator's images, labelled by the student: what is stored and shown.
      figures: numbers from public or released things only, such as how often teacher and student agree.
    """

    model: WaveletNet
    generator: StudentGenerator
    images: Synthetic
    figures: dict[str, float]


class Denoising(Protocol):
    """A denoiser: what a diffusion model is inside."""

    def __call__(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """Returns the expected clean images [B, C, H, W] of noisy ones, x = clean + sigma · normal.

        Args:
          x: float32 [B, C, H, W]; clean images lie in [-1, 1].
          sigma: float32 [B], standard deviation of the noise.
          y: int64 [B], classes; K stands for "any".
        """


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A diffusion model to sample from without limit.

    Attributes:
      model: the student: diffusers' DiTTransformer2DModel, see `models.few_step`.
      images: some of its images, labelled: what is stored and shown.
      figures: numbers from public or released things only.
    """

    model: nn.Module
    images: Synthetic
    figures: dict[str, float]


class Workspace(Protocol):
    """Where a method keeps checkpoints and says how far it is. Everything in it derives from released values and public data."""

    seed: int
    device: str

    def generator(self, *labels: object) -> torch.Generator:
        """A fresh public generator for one purpose: the same labels and run seed give the same numbers, also after a resume."""

    def track(self, steps: Sequence[int], description: str) -> Iterator[int]:
        """Yields the steps, showing progress and time left."""

    def passing(self, description: str) -> AbstractContextManager[Callable[[float], None]]:
        """Shows a pass over the records; yields a callable to be told the fraction done (`release(..., progress=it)`)."""

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors saved last under `name`, or None."""

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Saves tensors atomically, so that a stopped run goes on from here."""


class Method(Protocol):
    """The face of a method module. `Config` is a frozen keyword-only dataclass of public settings with all the defaults."""

    Config: ClassVar[type]

    @staticmethod
    def plan(config: Any, public: Public, noise_multiplier: float) -> list[Planned]:
        """The releases that `run` will ask for: from public facts only, cheaper in ε as `noise_multiplier` grows."""

    @staticmethod
    def run(config: Any, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Any:
        """Asks the door for exactly the releases of the calibrated `plan`, and turns the answers into a `Synthetic` or a `Student`."""
