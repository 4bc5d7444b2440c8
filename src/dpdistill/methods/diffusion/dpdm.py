"""DPDM, the baseline: a denoiser trained by DP-SGD from scratch, and labelled images sampled from it.

Source: Dockhorn, Cao, Vahdat & Kreis (2023), "Differentially Private Diffusion Models". Proof: docs/privacy/gaussian_sum.md, composed
`steps` times. Private: see `private_denoiser`. Sampling is post-processing.

Otherwise than the paper: a small transformer on patches in place of a U-Net of 1.8 million parameters, and fewer, smaller steps, so
that it runs on a processor; noise levels in strata.
"""

from dataclasses import dataclass

from ...errors import ConfigError
from ...mechanisms import PrivateData
from ...models import few_step
from ...privacy import Planned
from ..base import Public, Sampler, Workspace
from . import private_denoiser
from .distillation import DistillationConfig, Teacher
from .private_denoiser import DenoiserConfig
from .student import finish


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
    return [private_denoiser.planned(config, public, noise_multiplier)]


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Sampler:
    """DP-SGD, then a student of it: the paper samples the denoiser itself."""
    model = private_denoiser.network(config, public, workspace.generator("denoiser-model")).to(workspace.device)
    model = private_denoiser.train(model, config, public, private, plan[0], workspace)
    return finish(Teacher(denoise=model), public, config, workspace)
