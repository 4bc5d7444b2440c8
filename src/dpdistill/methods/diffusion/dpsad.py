r"""`dpsad`, ours: DP-SAD done right. One budget, four kinds of release, and everything after them is free.

1. Warm start (private, three releases): a mixture of Gaussians for each class. Its denoiser has a closed form: there is nothing to train.
   Tones (private, one release): how often a pixel is how light, since samples of the mixture are pale.
2. Guide (private): a linear classifier on fixed features, which says which samples look like their class.
3. Teacher (private): a network that corrects the mixture's denoiser, trained on the records by DP-SGD with noise multiplicity.
4. Student (free): stochastic adversarial distillation of the teacher, on inputs that derive from noise and released values only.

Source: Liu et al. (2024), DP-SAD, for 4; Dockhorn et al. (2023) for 3; Gong et al. (2025), DP-FETA, for the order.
Proof: docs/privacy/dpsad.md.
σ noise_multiplier, q sampling rate, T DP-SGD steps, K classes, M images.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...models import edm, few_step
from ...models.mixture_denoiser import MixtureDenoiser
from ...privacy import Planned, gaussian_multiplier
from ..base import Denoising, Public, Sampler, Workspace
from ..shared import linear, tones
from ..shared import mixture as mix
from . import private_denoiser
from .distillation import DistillationConfig, Teacher
from .private_denoiser import DenoiserConfig
from .student import finish

GUIDE = linear.Training()
N_DRAWN = 3000  # samples of the teacher that show what tones it has
MANY = 50_000  # records for each unit of a sum's noise: below, DP-SGD was not worth its budget
DELTA = 1e-5  # for that rule of thumb


@dataclass(frozen=True, kw_only=True)
class Config(DenoiserConfig, DistillationConfig):
    """Public settings: those of `DenoiserConfig` for the teacher, of `DistillationConfig` for the student, and how they come together.

    Attributes:
      per_class: samples that are released beside the model.
      target_epsilon: the asked ε, for "auto" alone; what a run costs is calibrated elsewhere.
      share_denoiser: of Σ 1/σ², for DP-SGD; where it is 0 there is none. "auto" is a half where a sum's noise
        weighs little against the expected records (60,000 at ε = 4 and more), else 0.
      share_tones: of the rest, for the tones.
      share_guide: of the rest of that, for the guide; what then remains is the mixture's.
      pixel_dims, components: of the mixture.
      seed_images: samples of the teacher that the student starts from, in all.
      sampling_steps, sigma_max: of the teacher's own samples.
      label_dropout, guidance: 0 and 1: the mixture knows no "any" class, and the guide chooses samples afterwards.
    """

    per_class: int = 10
    target_epsilon: float = 1.0
    share_denoiser: float | Literal["auto"] = "auto"
    share_tones: float = 0.03
    share_guide: float = 0.4
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
        if self.share_denoiser != "auto" and not (0 <= self.share_denoiser < 1):
            raise ConfigError(f"Expected share_denoiser of auto or in [0, 1), got {self.share_denoiser}.")
        if not (1e-3 <= self.target_epsilon < math.inf):
            raise ConfigError(f"Expected a finite target_epsilon of at least 0.001, got {self.target_epsilon}.")
        for name in ("share_tones", "share_guide"):
            if not (0 < getattr(self, name) < 1):
                raise ConfigError(f"Expected {name} in (0, 1), got {getattr(self, name)}.")
        if self.sigma_max <= 0.002:
            raise ConfigError(f"Expected sigma_max above 0.002, got {self.sigma_max}.")
        if (self.label_dropout, self.guidance) != (0.0, 1.0):
            raise ConfigError("This method has no unconditional denoiser: leave label_dropout and guidance out.")

    @property
    def share(self) -> float:
        """What DP-SGD has of Σ 1/σ²."""
        if self.share_denoiser == "auto":
            return 0.5 if self.expected_records >= MANY * gaussian_multiplier(self.target_epsilon, DELTA) else 0.0
        return self.share_denoiser


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """The mixture's three sums, the tones, the guide's count and gradients, and T Poisson-sampled sums of the denoiser's gradients.

    Full-batch releases share Σ 1/σ² exactly. DP-SGD's noise is what the central limit (Bu et al. 2020) gives for its share: T q² (e^{1/z²}
    - 1) = share / σ². Calibration counts what it really costs; this only divides.
    """
    few_step.check(public.image_shape)
    sigma, dims, rows = noise_multiplier, min(config.pixel_dims, math.prod(public.image_shape)), public.n_classes
    rest = 1 - config.share
    guide = rest * (1 - config.share_tones) * config.share_guide
    each = (rest * (1 - config.share_tones) - guide) / 3
    releases = mix.planned("dpsad", rows, dims, config.components, sigma, each, each)
    releases.append(tones.planned("dpsad", public, sigma, rest * config.share_tones))
    releases += linear.plan(GUIDE, public, sigma / math.sqrt(guide))
    if config.share:
        z = math.log1p(config.share / (sigma**2 * config.steps * config.rate**2)) ** -0.5
        releases.append(private_denoiser.planned(config, public, z))
    return releases


def advice(config: Config, public: Public, epsilon: float, delta: float) -> list[str]:
    """What to expect, before anything is spent."""
    per_class, noise = config.expected_records / public.n_classes, gaussian_multiplier(epsilon, delta)
    lines = [f"about {per_class:.0f} records a class; the noise of one sum weighs like {noise:.1f} of them"]
    if config.share:
        lines.append(
            f"DP-SGD has {config.share:.0%} of the budget: {config.steps} steps of {config.expected_batch} records"
        )
    else:
        lines.append(
            "no DP-SGD: with so few records, one-shot statistics are worth more (--set share_denoiser=0.5 to have it)"
        )
    if per_class < 40 * noise:
        lines.append(
            "few records for this ε: expect samples that show a class only roughly; ask for more ε, or merge classes"
        )
    return lines


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Sampler:
    """Asks the door, trains the teacher, and distils it."""
    return finish(train(config, public, private, plan, workspace), public, config, workspace)


def train(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Teacher:
    """Returns the private teacher."""
    queries: list[Any] = [planned.query for planned in plan]
    # 1. The warm start.
    seen = linear.public_images(public)
    space = mix.pixel_space(seen, min(config.pixel_dims, math.prod(public.image_shape)))
    fitted = mix.fit(space, config.components, private, queries[:3], workspace)
    wanted = tones.fit(queries[3], private, workspace)
    # 2. The guide.
    guide = linear.train(GUIDE, public, private, plan[4:6], workspace)

    # 3. The teacher: DP-SGD learns what the mixture does not know.
    denoise: Denoising = MixtureDenoiser(
        space.centre,
        space.basis,
        fitted.centres * space.radius,
        fitted.weights,
        fitted.within * space.radius**2,
    ).to(workspace.device)
    if config.share:
        network = private_denoiser.network(config, public, workspace.generator("denoiser-model"), denoise)
        denoise = private_denoiser.train(network.to(workspace.device), config, public, private, plan[6], workspace)
    if wanted is None:
        return Teacher(denoise=denoise, guide=guide)
    # What its samples lack of the tones.
    labels = torch.arange(public.n_classes).repeat_interleave(-(-N_DRAWN // public.n_classes))
    drawn = edm.sample(
        denoise,
        labels.to(workspace.device),
        public.image_shape,
        steps=config.sampling_steps,
        generator=workspace.generator("tones"),
        sigma_max=config.sigma_max,
    ).cpu()
    return Teacher(denoise=denoise, guide=guide, tone=tones.Curve.between(drawn, wanted))
