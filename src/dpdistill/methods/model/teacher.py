r"""A private teacher, trained through the door at the asked ε, then converted: the default way to a student model.

The teacher is the linear classifier of `methods.shared.linear`. A part of the budget buys a mixture of Gaussians for each class as well:
most of the images that the student is taught with are drawn from it, since they look more like the teacher's own than made-up ones do,
most so once they have the records' tones, where images are grey.
Proof: docs/privacy/teacher.md. The features are fixed and public; conversion is post-processing.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...privacy import Planned
from ..base import Public, Student, Workspace
from ..shared import linear, tones
from ..shared import mixture as mix
from ..shared.bounds import PIXEL_DIMS, check_bounds
from .conversion import Conversion, convert
from .gallery import finish

N_DRAWN = 8000  # images of the mixture
SHARE_TONES = 0.03  # of the mixture's share, for its tones; in colour they brought nothing (docs/decisions/model.md)


@dataclass(frozen=True, kw_only=True)
class Config(linear.Training, Conversion):
    """Public settings: those of `linear.Training` for the teacher, and of `Conversion` for the student.

    Attributes:
      per_class: images of the generator that are released with the student.
      share_prior: of Σ 1/σ², for the mixture and its tones; 0 is without them.
      pixel_dims, components: of the mixture.
    """

    per_class: int = 10
    share_prior: float = 0.3
    pixel_dims: int = 64
    components: int = 20

    def __post_init__(self) -> None:
        linear.Training.__post_init__(self)
        Conversion.__post_init__(self)
        if not (0 <= self.share_prior < 1):
            raise ConfigError(f"Expected share_prior in [0, 1), got {self.share_prior}.")
        check_bounds(self, PIXEL_DIMS, "pixel_dims")
        check_bounds(self, (1, mix.N_SAMPLES), "components")


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """The teacher's releases, then the mixture's; together they cost what one release of `noise_multiplier` does, where q = 1."""
    releases = linear.plan(config, public, noise_multiplier / math.sqrt(1 - config.share_prior))
    if config.share_prior:
        dims = min(config.pixel_dims, math.prod(public.image_shape))
        toned = config.share_prior * SHARE_TONES if public.image_shape[0] == 1 else 0.0
        each = (config.share_prior - toned) / 3
        releases += mix.planned("prior", public.n_classes, dims, config.components, noise_multiplier, each, each)
        if toned:
            releases.append(tones.planned("prior", public, noise_multiplier, toned))
    return releases


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Student:
    """Trains the teacher behind the door, and converts it outside."""
    teacher = linear.train(config, public, private, plan[:2], workspace)
    asked = with_mixture(config, public, private, plan[2:], workspace) if config.share_prior else public
    made = convert(teacher, asked, config, workspace, differentiable=False)
    return finish(made.student, made.generator, public, workspace, config.per_class, teacher)


def with_mixture(
    config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace
) -> Public:
    """Returns the public facts with images of a released mixture among those that the student is taught with."""
    space = mix.pixel_space(linear.public_images(public), min(config.pixel_dims, math.prod(public.image_shape)))
    queries: list[Any] = [planned.query for planned in plan]
    fitted = mix.fit(space, config.components, private, queries[:3], workspace)
    wanted = tones.fit(queries[3], private, workspace) if queries[3:] else None
    drawn = fitted.sample(N_DRAWN // public.n_classes + 1, workspace.generator("prior-images")).flatten(0, 1)
    images = space.images(drawn, public.image_shape)
    if wanted is not None:
        images = tones.Curve.between(images, wanted)(images)
    if public.procedural is None:  # then what is called auxiliary is made up
        return dataclasses.replace(public, auxiliary=images, procedural=public.auxiliary)
    given = torch.cat([images, public.auxiliary[:N_DRAWN]])
    return dataclasses.replace(public, auxiliary=given, auxiliary_labels=None)
