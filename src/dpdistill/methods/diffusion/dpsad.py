r"""`dpsad`, ours: DP-SAD done right. One budget, three kinds of release, and everything after them is free.

1. Warm start (private, three releases): a mixture of Gaussians for each class. Its denoiser has a closed form: there is nothing to train.
2. Guide (private): a linear classifier on fixed features, which says which samples look like their class.
3. Teacher (private): a network that corrects the mixture's denoiser, trained on the records by DP-SGD with noise multiplicity.
4. Student (free): stochastic adversarial distillation of the teacher, on inputs that derive from noise and released values only.

Source: Liu et al. (2024), DP-SAD, for 4; Dockhorn et al. (2023) for 3; Gong et al. (2025), DP-FETA, for the order.
Proof: docs/privacy/dpsad.md.
σ noise_multiplier, q sampling rate, T DP-SGD steps, K classes, M images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...models.mixture_denoiser import MixtureDenoiser
from ...privacy import Planned
from ..base import Denoising, Public, Sampler, Workspace
from ..shared import linear
from ..shared import mixture as mix
from . import private_denoiser
from .distillation import DistillationConfig
from .private_denoiser import DenoiserConfig
from .student import finish

GUIDE = linear.Training()


@dataclass(frozen=True, kw_only=True)
class Config(DenoiserConfig, DistillationConfig):
    """Public settings: those of `DenoiserConfig` for the teacher, of `DistillationConfig` for the student, and how they come together.

    Attributes:
      per_class: samples that are released beside the model.
      share_warm, share_guide: of Σ 1/σ²; the rest is DP-SGD's, and where it is 0 there is none.
      pixel_dims, components: of the mixture.
      seed_images: samples of the teacher that the student starts from, in all.
      sampling_steps, sigma_max: of the teacher's own samples.
      label_dropout, guidance: 0 and 1: the mixture knows no "any" class, and the guide chooses samples afterwards.
    """

    per_class: int = 10
    share_warm: float = 0.3
    share_guide: float = 0.2
    pixel_dims: int = 64
    components: int = 20
    seed_images: int = 5000
    sampling_steps: int = 18
    sigma_max: float = 10.0
    label_dropout: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        DenoiserConfig.__post_init__(self)
        DistillationConfig.__post_init__(self)
        counts = ("per_class", "pixel_dims", "components", "seed_images", "sampling_steps")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        if self.components > mix.N_SAMPLES:
            raise ConfigError(f"Expected components of at most {mix.N_SAMPLES}, got {self.components}.")
        if not (min(self.share_warm, self.share_guide) > 0 and self.share_denoiser >= 0):
            raise ConfigError(
                f"Expected positive share_warm and share_guide of at most 1 together, got {self.share_warm} and {self.share_guide}."
            )
        if self.sigma_max <= 0.002:
            raise ConfigError(f"Expected sigma_max above 0.002, got {self.sigma_max}.")
        if (self.label_dropout, self.guidance) != (0.0, 1.0):
            raise ConfigError("This method has no unconditional denoiser: leave label_dropout and guidance out.")

    @property
    def share_denoiser(self) -> float:
        """What DP-SGD has of Σ 1/σ²; below a millionth it is rounding, and counts as nothing."""
        rest = 1 - self.share_warm - self.share_guide
        return 0.0 if abs(rest) < 1e-6 else rest


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """The mixture's three sums, the guide's count and gradients, and T Poisson-sampled sums of the denoiser's gradients.

    Full-batch releases share Σ 1/σ² exactly. DP-SGD's noise is what the central limit (Bu et al. 2020) gives for its share: T q² (e^{1/z²}
    - 1) = share / σ². Calibration counts what it really costs; this only divides.
    """
    sigma, share, dims = noise_multiplier, config.share_warm, min(config.pixel_dims, math.prod(public.image_shape))
    rows = public.n_classes
    releases = mix.planned("dpsad", rows, dims, config.components, sigma, share / 3, share / 3)
    releases += linear.plan(GUIDE, public, sigma / math.sqrt(config.share_guide))
    if config.share_denoiser:
        z = math.log1p(config.share_denoiser / (sigma**2 * config.steps * config.rate**2)) ** -0.5
        releases.append(private_denoiser.planned(config, public, z))
    return releases


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Sampler:
    """Asks the door, trains the teacher, and distils it."""
    teacher, guide = train(config, public, private, plan, workspace)
    return finish(teacher, guide, public, config, workspace)


def train(
    config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace
) -> tuple[Denoising, Callable[[Tensor], Tensor]]:
    """Returns the private teacher, and the guide, which maps images to logits."""
    # 1. The warm start.
    seen = linear.public_images(public)
    space = mix.pixel_space(seen, min(config.pixel_dims, math.prod(public.image_shape)))
    queries: list[Any] = [planned.query for planned in plan[:3]]
    fitted = mix.fit(space, config.components, private, queries, workspace)
    # 2. The guide.
    guide = linear.train(GUIDE, public, private, plan[3:5], workspace)

    # 3. The teacher: DP-SGD learns what the mixture does not know.
    base = MixtureDenoiser(
        space.centre,
        space.basis,
        fitted.centres * space.radius,
        fitted.weights,
        fitted.within * space.radius**2,
    ).to(workspace.device)
    if not config.share_denoiser:
        return base, guide
    model = private_denoiser.network(config, public, workspace.generator("denoiser-model"), base).to(workspace.device)
    return private_denoiser.train(model, config, public, private, plan[5], workspace), guide
