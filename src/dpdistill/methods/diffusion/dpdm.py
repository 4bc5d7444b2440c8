"""DPDM, the baseline: a denoiser trained by DP-SGD from scratch, and labelled images sampled from it.

Source: Dockhorn, Cao, Vahdat & Kreis (2023), "Differentially Private Diffusion Models". Proof: docs/privacy/gaussian_sum.md, composed
`steps` times. Private: see `private_denoiser`. Pretraining comes before any record; sampling is post-processing.

Otherwise than the paper: a small transformer on patches in place of a U-Net of 1.8 million parameters, and fewer, smaller steps, so
that it runs on a processor; noise levels in strata.
"""

from dataclasses import dataclass

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...models import few_step
from ...privacy import Planned, gaussian_multiplier
from ..base import Public, Sampler, Workspace
from . import pretraining, private_denoiser
from .distillation import DistillationConfig, Teacher
from .dpsad import MANY
from .expected import figures
from .private_denoiser import DenoiserConfig
from .student import finish

FAR = 4.0  # ε up to which it was far behind: 15 points on digits and 67 on MNIST at ε = 1, 3 on digits at ε = 10


@dataclass(frozen=True, kw_only=True)
class Config(DenoiserConfig, DistillationConfig):
    """Public settings, beside the denoiser's and the student's.

    Attributes:
      per_class: samples that are released beside the model.
      seed_images: samples of the teacher that the student starts from, in all.
      sampling_steps: calls of the denoiser for an image.
      sigma_max: noise level that sampling starts from.
      guidance: strength of classifier-free guidance; 1 is none.
      lr: larger than after a warm start.
    """

    per_class: int = 10
    seed_images: int = 5000
    sampling_steps: int = 18
    lr: float = 1e-2
    sigma_max: float = 10.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        DenoiserConfig.__post_init__(self)
        DistillationConfig.__post_init__(self)
        if min(self.per_class, self.sampling_steps, self.seed_images) < 1:
            raise ConfigError("Expected per_class, sampling_steps and seed_images of at least 1.")
        if not (self.sigma_max > 0.002 and self.guidance >= 0):
            raise ConfigError("Expected sigma_max above 0.002 and guidance of at least 0.")
        if self.guidance != 1 and self.label_dropout == 0:
            raise ConfigError('Expected label_dropout above 0 with guidance: else no class of "any" is trained.')


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """T sums of clipped gradients."""
    few_step.check(public.image_shape)
    pretraining.check(config, public)
    return [private_denoiser.planned(config, public, noise_multiplier)]


def advice(config: Config, public: Public, epsilon: float, delta: float) -> list[str]:
    """What to expect, before anything is spent."""
    if config.expected_records / gaussian_multiplier(epsilon, delta) >= MANY:
        return []
    far = " by far" if epsilon <= FAR else ""
    lines = [f"few images for this ε: one-shot statistics (the default, --method dpsad) beat DP-SGD diffusion{far}"]
    lines += [
        f"measured on {figure.images}, {figure.records:,} images, ε = {figure.epsilon:g}, by a small network trained on samples alone: "
        f"about {figure.default} % with the default, {figure.dpdm} % with dpdm; other images may be harder"
        for figure in figures(public, config.expected_records, epsilon)
        if figure.dpdm is not None
    ]
    return lines


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Sampler:
    """DP-SGD, from public weights where they are asked for, then a student of it: the paper samples the denoiser itself."""
    model = private_denoiser.network(config, public, workspace.generator("denoiser-model")).to(workspace.device)
    pretraining.pretrain(model, config, public, workspace)
    model = private_denoiser.train(model, config, public, private, plan[0], workspace)
    return finish(Teacher(denoise=model), public, config, workspace)
