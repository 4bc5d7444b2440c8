r"""`dpsad`, ours: DP-SAD done right. One budget, a few kinds of release, and everything after them is free.

1. Warm start (private), in one of two ways that both have a denoiser in closed form: there is nothing to train.
   `mixture`: three releases give a mixture of Gaussians for each class; one more its tones, since samples of a mixture are pale; and
   a guide, a linear classifier on fixed features, says which samples look like their class, where there is more than
   one and the mixture is coarse.
   `embedding`, where records are few for the noise: one release and a generator fitted to it, to whose images a finer mixture is fitted.
2. Teacher (private): a network that corrects that denoiser, trained on the records by DP-SGD with noise multiplicity, after public images
   if there are some and a person asks for it.
3. Student (free): stochastic adversarial distillation of the teacher, on inputs that derive from noise and released values only.

Source: Liu et al. (2024), DP-SAD, for 3; Dockhorn et al. (2023) for 2; Harder et al. (2021) for the embedding; Gong et al. (2025),
DP-FETA, for the order. Proof: docs/privacy/dpsad.md.
σ noise_multiplier, q sampling rate, T DP-SGD steps, K classes, M images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...models import edm, few_step
from ...models.mixture_denoiser import MixtureDenoiser
from ...privacy import Planned, gaussian_multiplier
from ..base import Denoising, Public, Sampler, Workspace
from ..shared import embedding, linear, tones
from ..shared import mixture as mix
from ..shared.bounds import PIXEL_DIMS, check_bounds
from ..shared.embedding import EmbeddingConfig
from . import pretraining, private_denoiser
from .distillation import DistillationConfig, Teacher
from .expected import figures
from .private_denoiser import DenoiserConfig
from .student import finish

GUIDE = linear.Training(teacher_steps=25, teacher_dims=500)
EMBEDDING = EmbeddingConfig(at_once=1000, bf16=True)
N_GENERATED = 2000  # images of each class that the finer mixture is fitted to; of many classes, fewer of each
MOST_GENERATED, MOST_AT_ONCE = 50_000, 5_000  # of all classes: that, and images for one step of the generator
FINER = 5  # its components, in those of the noisy one
FINE_STEPS = 8_000  # of a student whose teacher has a fine mixture
N_DRAWN = 3000  # samples of the teacher that show what tones it has
MANY = 50_000  # records for each unit of a sum's noise: below, DP-SGD was not worth its budget
FEW = 6_000  # below, a mixture was behind an embedding (digits: 390 and 2,900); above, ahead of it (letters: 16,000)
DELTA = 1e-5  # for these rules of thumb


@dataclass(frozen=True, kw_only=True)
class Config(DenoiserConfig, DistillationConfig):
    """Public settings: those of `DenoiserConfig` for the teacher, of `DistillationConfig` for the student, and how they come together.

    Attributes:
      per_class: samples that are released beside the model.
      target_epsilon: the asked ε, for "auto" alone; what a run costs is calibrated elsewhere.
      warm_start: "auto" is "embedding" where the expected records are few for a sum's noise (below about 22,000 at ε = 1), else "mixture".
      share_denoiser: of Σ 1/σ², for DP-SGD; where it is 0 there is none. "auto" is 0 for ordinary sets, of 16×16 and larger and up to
        ten classes: their teacher is the released warm start, which DP-SGD was measured to make worse (docs/decisions/diffusion.md). It
        is a half for smaller images, or more classes, of many records (60,000 at ε = 4 and more), as long as the mixture is not fine.
      share_tones: of the rest, for the tones. The embedding needs none, nor a guide: it has all of the rest.
      share_guide: of the rest of that, for the guide where there is one (`guided`); what then remains is the mixture's.
      pixel_dims: of the mixture; "auto" is 64, or 256 where each class has many records for a sum's noise (6,000 at ε = 10).
      components: of the mixture; the one that is fitted to a generator's images has five times as many.
      embedding_batch: images of each class and step that the generator of an embedding is fitted by.
      seed_images: samples of the teacher that the student starts from, in all.
      sampling_steps, sigma_max: of the teacher's own samples.
      label_dropout, guidance: 0 and 1: the mixture knows no "any" class, and the guide chooses samples afterwards.
    """

    per_class: int = 10
    target_epsilon: float = 1.0
    warm_start: Literal["auto", "mixture", "embedding"] = "auto"
    share_denoiser: float | Literal["auto"] = "auto"
    share_tones: float = 0.03
    share_guide: float = 0.4
    pixel_dims: int | Literal["auto"] = "auto"
    components: int = 20
    embedding_batch: int = 50
    seed_images: int = 5000
    sampling_steps: int = 18
    sigma_max: float = 10.0
    label_dropout: float = 0.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        DenoiserConfig.__post_init__(self)
        DistillationConfig.__post_init__(self)
        counts = ("per_class", "components", "embedding_batch", "seed_images", "sampling_steps")
        for name in counts:
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        if self.pixel_dims != "auto":
            check_bounds(self, PIXEL_DIMS, "pixel_dims")
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
    def weight(self) -> float:
        """Expected records for each unit of a sum's noise."""
        return self.expected_records / gaussian_multiplier(self.target_epsilon, DELTA)

    def share(self, public: Public) -> float:
        """What DP-SGD has of Σ 1/σ²."""
        if self.share_denoiser != "auto":
            return self.share_denoiser
        return 0.5 if self.weight >= MANY and not self.fine(public) else 0.0

    def dims(self, public: Public) -> int:
        """Coordinates of the mixture: at most one for each pixel."""
        dims = mix.dims_for(self.weight, public.n_classes) if self.pixel_dims == "auto" else self.pixel_dims
        return min(dims, math.prod(public.image_shape))

    def distilling(self, public: Public) -> "Config":
        """These settings, with the student's steps where they are left open: what a fine mixture shows takes four times as many."""
        longer = self.student_steps == "auto" and self.fine(public)
        return replace(self, student_steps=FINE_STEPS) if longer else self

    def guided(self, public: Public) -> bool:
        """Whether a guide chooses samples: of one class each fits, and those of a fine mixture are no better for it."""
        return public.n_classes > 1 and not self.fine(public)

    def fine(self, public: Public) -> bool:
        """Whether the warm start is a mixture in fine coordinates."""
        return self.start == "mixture" and self.dims(public) >= mix.FINE_DIMS

    @property
    def start(self) -> Literal["mixture", "embedding"]:
        """How the warm start is made."""
        return ("embedding" if self.weight < FEW else "mixture") if self.warm_start == "auto" else self.warm_start


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """The warm start's releases, and T Poisson-sampled sums of the denoiser's gradients.

    Full-batch releases share Σ 1/σ² exactly. DP-SGD's noise is what the central limit (Bu et al. 2020) gives for its share: T q² (e^{1/z²}
    - 1) = share / σ². Calibration counts what it really costs; this only divides.
    """
    few_step.check(public.image_shape)
    pretraining.check(config, public)
    sigma, share = noise_multiplier, config.share(public)
    if config.pretrain_steps and not share:
        raise ConfigError(
            "pretrain_steps is of the network that DP-SGD trains, and here is none: add --set share_denoiser=0.5"
        )
    rest = 1 - share
    if config.start == "embedding":
        releases = [embedding.planned("dpsad", EMBEDDING, public, sigma / math.sqrt(rest))]
    else:
        guided = config.guided(public)
        guide = rest * (1 - config.share_tones) * config.share_guide * guided
        each = (rest * (1 - config.share_tones) - guide) / 3
        dims, rows = config.dims(public), public.n_classes
        releases = mix.planned("dpsad", rows, dims, config.components, sigma, each, each)
        releases.append(tones.planned("dpsad", public, sigma, rest * config.share_tones))
        releases += linear.plan(GUIDE, public, sigma / math.sqrt(guide)) if guided else []
    if share:
        z = math.log1p(share / (sigma**2 * config.steps * config.rate**2)) ** -0.5
        releases.append(private_denoiser.planned(config, public, z))
    return releases


def advice(config: Config, public: Public, epsilon: float, delta: float) -> list[str]:
    """What to expect, before anything is spent."""
    per_class, noise = config.expected_records / public.n_classes, gaussian_multiplier(epsilon, delta)
    of_class = " a class" if public.n_classes > 1 else ""
    lines = [f"about {per_class:.0f} records{of_class}; the noise of one sum weighs like {noise:.1f} of them"]
    if share := config.share(public):
        lines.append(f"DP-SGD has {share:.0%} of the budget: {config.steps} steps of {config.expected_batch} records")
    elif config.share_denoiser == "auto" and config.fine(public):
        lines.append("no DP-SGD: a mixture as fine as this was better without (--set share_denoiser=0.5 to have it)")
    elif config.weight < MANY:
        lines.append(
            "no DP-SGD: with so few records for this noise, one-shot statistics are worth more (--set share_denoiser=0.5 to have it)"
        )
    else:
        lines.append("no DP-SGD, as share_denoiser=0 asks")
    if config.start == "embedding":
        why = "few records for this noise" if config.weight < FEW else "as warm_start=embedding asks"
        lines.append(
            f"{why}: the whole warm start is one embedding of each class (--set warm_start=mixture for the other way)"
        )
    if per_class < 40 * noise:
        lines.append(
            "few records for this ε: expect samples that show a class only roughly; ask for more ε"
            + (", or merge classes" if public.n_classes > 1 else "")
        )
    if near := figures(public, config.expected_records, epsilon):
        found = ", ".join(f"about {figure.default} % on {figure.images}" for figure in near)
        lines.append(
            f"measured with the defaults at {near[0].records:,} images and ε = {near[0].epsilon:g}, by a small network trained on "
            f"samples alone: {found}; other images may be harder"
        )
    return lines


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Sampler:
    """Asks the door, trains the teacher, and distils it."""
    return finish(train(config, public, private, plan, workspace), public, config.distilling(public), workspace)


def train(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Teacher:
    """Returns the private teacher."""
    start, guide, wanted = (_embedded if config.start == "embedding" else _mixed)(
        config, public, private, plan, workspace
    )
    denoise: Denoising = start
    if config.share(public):  # DP-SGD learns what the warm start does not know
        network = private_denoiser.network(config, public, workspace.generator("denoiser-model"), start)
        network = network.to(workspace.device)
        pretraining.pretrain(network, config, public, workspace)
        denoise = private_denoiser.train(network, config, public, private, plan[-1], workspace)
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


Warm = tuple[MixtureDenoiser, Callable[[Tensor], Tensor] | None, Tensor | None]  # a denoiser, its guide, and tones


def _embedded(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Warm:
    """A generator fitted to one embedding, and the denoiser of a mixture fitted to its images: they need no guide, and have the tones."""
    query: Any = plan[0].query
    k = public.n_classes
    fitting = replace(EMBEDDING, batch=max(1, min(config.embedding_batch, MOST_AT_ONCE // k)))
    model = embedding.fit("dpsad", fitting, query, public, private, workspace)
    n = max(1, min(N_GENERATED, MOST_GENERATED // k))
    made = embedding.draw(model, fitting, torch.arange(k).repeat_interleave(n), k, workspace)
    images = made.images.view(k, n, *public.image_shape)
    denoise = mix.denoiser_of(images, config.dims(public), FINER * config.components)
    return denoise.to(workspace.device), None, None


def _mixed(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Warm:
    """The denoiser of a released mixture, its guide, and the tones of the records, where the noise leaves them."""
    queries: list[Any] = [planned.query for planned in plan]
    space = mix.pixel_space(linear.public_images(public), config.dims(public))
    fitted = mix.fit(space, config.components, private, queries[:3], workspace)
    wanted = tones.fit(queries[3], private, workspace)
    guide = linear.train(GUIDE, public, private, plan[4:6], workspace) if config.guided(public) else None
    return mix.denoiser(space, fitted).to(workspace.device), guide, wanted
