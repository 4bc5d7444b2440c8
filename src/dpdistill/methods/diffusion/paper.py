r"""DP-SAD as published: faithful to its text, and without a guarantee for any training record. Three breaks: docs/privacy/dp-sad-paper.md.

Source: "Learning Differentially Private Diffusion Models via Stochastic Adversarial Distillation" (ECCV 2024, arXiv 2408.14738), as we
read it: no code is published, and where its text leaves a choice the note says so.
Private: everything, and nothing is protected. `run` takes the records themselves, so no method of this package that keeps a promise can be
mistaken for it. The teacher is trained on them without noise; every input of the student is a noisy private image. The checkpoints of both
show as much of the records as the teacher does; they go with the run's state.

Otherwise than the paper: denoisers predict x_0, and x_r = x_0 + σ_r·n on T levels from σ_max down to σ_min (Karras et al. 2022, Eq. 5) in
place of √ᾱ_r·x_0 + √(1-ᾱ_r)·n: the same images on another scale. Small transformers in place of U-Nets.

Symbols: T dilution, B batch, C clip_norm, σ sigma, S steps, λ adversarial, ψ teacher, θ student, φ critic, q sampling rate.
D pixels of an image, K classes, N records.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...mechanisms import Vault, noisy_rows
from ...models import edm
from ...models.denoiser import Denoiser, check_sizes
from ...privacy import GaussianSum, Planned, calibrate, epsilon
from ..base import Public, Sampler, Workspace
from ..shared.bounds import NORMS, RATES, SCALES, check_bounds
from ..shared.checkpoints import restore, saved
from .distillation import Critic, DistillationConfig, Teacher
from .student import finish

TINY_MU = 12  # above, ε of a Gaussian is out of reach of the closed form's arithmetic


@dataclass(frozen=True, kw_only=True)
class Config(DistillationConfig):
    """Public settings.

    Attributes:
      expected_records: N that the paper's count divides by.
      per_class: samples that are released beside the model.
      seed_images, sampling_steps: samples of the paper's student, and its steps for each: what the few-step model is distilled from.
      dilution: T, time steps, and what the paper divides the noise by.
      steps, batch: S and B.
      clip_norm: C of a row: the gradient of one sample's loss with respect to the student's image.
      adversarial: λ.
      noise: False is the method without noise; its nominal ε is then infinite.
      lr, critic_lr, ema: of Adam on the student, of Adam on the discriminator, and decay of the student's averaged weights.
      critic_width: channels of the discriminator's first layer.
      teacher_steps, teacher_batch, teacher_lr: of the teacher's ordinary training.
      patch, width, depth, heads, sigma_data: of both denoisers.
      sigma_min, sigma_max, rho: of the T noise levels.
    """

    expected_records: int = 1
    per_class: int = 10
    seed_images: int = 5000
    sampling_steps: int = 18
    dilution: int = 500
    steps: int = 1000
    batch: int = 64
    clip_norm: float = 1.0
    adversarial: float = 1.0
    noise: bool = True
    lr: float = 1e-3
    critic_lr: float = 1e-3
    ema: float = 0.99
    critic_width: int = 16
    teacher_steps: int = 2000
    teacher_batch: int = 128
    teacher_lr: float = 2e-3
    patch: int = 8
    width: int = 128
    depth: int = 3
    heads: int = 4
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance != 1:
            raise ConfigError("This method has no unconditional denoiser: leave guidance out.")
        whole = ("expected_records", "dilution", "steps", "batch", "critic_width", "teacher_steps", "teacher_batch")
        for name in (*whole, "patch", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        check_sizes(width=self.width, depth=self.depth, heads=self.heads)
        check_bounds(self, NORMS, "clip_norm")
        check_bounds(self, RATES, "lr", "teacher_lr")
        check_bounds(self, SCALES, "sigma_data", "rho")
        if not (0 < self.sigma_min < self.sigma_max and 0 <= self.ema < 1):
            raise ConfigError("Expected 0 < sigma_min < sigma_max and ema in [0, 1).")

    @property
    def rate(self) -> float:
        """q of the paper's count."""
        return min(1.0, self.batch / self.expected_records)

    def sigma(self, epsilon: float, delta: float) -> float:
        """σ for which the paper's count gives ε."""
        return calibrate(self._counted, epsilon, delta) if self.noise else 0.0

    def _counted(self, sigma: float) -> list[Planned]:
        """What the paper counts: S sampled Gaussians of noise multiplier σ. Never charged anywhere: no such release is made."""
        return [Planned(GaussianSum(name="paper", dim=1, noise_multiplier=sigma, sampling_prob=self.rate), self.steps)]


@dataclass(frozen=True, kw_only=True)
class Count:
    """What the paper counts, and what one record costs where all updates of the student are seen, as the paper's own count has it.

    No row is an upper bound for the release: the third break (the Jacobian) knows no σ, and the discriminator is left out.

    Attributes:
      nominal: the paper's ε.
      diluted: break A: noise multiplier σ/T, for a record that is drawn its expected q·S times.
      contaminated: breaks A and B, noise on each row as `noised` adds it: B rows move by 2C each in every step.
      contaminated_mean: breaks A and B where noise is added once to the mean, as the displayed formula has it: larger still.
    """

    nominal: float
    diluted: float
    contaminated: float
    contaminated_mean: float


def count(config: Config, sigma: float, delta: float) -> Count:
    """Returns the paper's ε and the honest ones, for a certificate whose status is "none"; infinite without noise."""
    if not sigma:
        return Count(nominal=math.inf, diluted=math.inf, contaminated=math.inf, contaminated_mean=math.inf)
    b, s, z = config.batch, config.steps, sigma / config.dilution
    return Count(
        nominal=epsilon([planned.part for planned in config._counted(sigma)], delta),
        diluted=_gaussian(math.sqrt(config.rate * s) / z, delta),
        contaminated=_gaussian(2 * math.sqrt(b * s) / z, delta),
        contaminated_mean=_gaussian(2 * b * math.sqrt(s) / z, delta),
    )


def _gaussian(mu: float, delta: float) -> float:
    """ε of a Gaussian whose mean moves by mu standard deviations: exact, or the Rényi bound where that is out of reach."""
    if mu > TINY_MU:
        return mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    return epsilon([(1.0, 1 / mu, 1)], delta)


def run(
    config: Config, public: Public, images: Tensor, labels: Tensor, sigma: float, vault: Vault, workspace: Workspace
) -> Denoiser:
    """Returns the student. It carries NO guarantee: call this only where `--accept-no-record-guarantee` was given.

    A stopped run goes on with the same bytes.

    Args:
      images: the PRIVATE records [N, C, H, W] in [-1, 1]; no door is between.
      labels: their classes, int64 [N].
      sigma: the paper's σ, of `Config.sigma`; 0 for no noise.
      vault: of the run, for its noise key.
    """
    images, labels = images.to(workspace.device), labels.to(workspace.device)
    teacher = train_teacher(config, public, images, labels, workspace)
    student = network(config, public, workspace.generator("paper-student")).to(workspace.device)
    average = copy.deepcopy(student).requires_grad_(False)
    critic = Critic(
        public.image_shape,
        public.n_classes,
        width=config.critic_width,
        generator=workspace.generator("paper-critic"),
    ).to(workspace.device)
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.critic_lr, betas=(0.5, 0.99))
    modules: dict[str, nn.Module] = {"student": student, "average": average, "critic": critic}
    optimizers: dict[str, torch.optim.Optimizer] = {"student": optimizer, "critic": critic_optimizer}
    start = restore(workspace.load("paper-student"), modules, optimizers)
    levels = edm.schedule(config.dilution, config.sigma_min, config.sigma_max, config.rho)[:-1]
    for step in workspace.track(range(start, config.steps), "the paper's distillation"):
        g = workspace.generator("paper-step", step)
        rows = torch.randint(len(images), (config.batch,), generator=g)
        x_0, y = images[rows], labels[rows]
        level = levels[torch.randint(config.dilution, (config.batch,), generator=g)].to(x_0.device)  # one r a sample
        x_r = x_0 + level.view(-1, 1, 1, 1) * torch.randn(x_0.shape, generator=g).to(x_0.device)
        with torch.no_grad():
            x_psi = teacher(x_r, level, y)
        x_theta = student(x_r, level, y)

        # The discriminator: teacher's images 1, student's 0. Its logit is that of "the teacher's".
        logits = critic(torch.cat([x_psi, x_theta.detach()]), y.repeat(2))
        truth = torch.cat([torch.ones(config.batch), torch.zeros(config.batch)]).to(logits.device)
        critic_optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(logits, truth).backward()
        critic_optimizer.step()

        # The student: ∂L/∂x_θ of each sample, clipped and noised; then the chain rule, through a Jacobian at private x_r.
        gradient = output_gradients(x_theta.detach(), x_psi, x_0, y, critic, config.adversarial)
        noisy = noised(clipped(gradient, config.clip_norm), config, sigma, vault, f"step-{step}")
        optimizer.zero_grad()
        x_theta.backward(noisy.view_as(x_theta))
        optimizer.step()
        with torch.no_grad():
            for mine, new in zip(average.parameters(), student.parameters(), strict=True):
                mine.lerp_(new, 1 - min(config.ema, (1 + step) / (10 + step)))
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            workspace.save("paper-student", saved(step + 1, modules, optimizers))
    return average.cpu().eval()


def release(
    config: Config, public: Public, images: Tensor, labels: Tensor, sigma: float, vault: Vault, workspace: Workspace
) -> Sampler:
    """Returns the paper's student in the form that a release has: distilled once more, for a few steps. NO guarantee, as `run`."""
    teacher = run(config, public, images, labels, sigma, vault, workspace).to(workspace.device)
    return finish(Teacher(denoise=teacher), public, config, workspace)


def output_gradients(x_theta: Tensor, x_psi: Tensor, x_0: Tensor, y: Tensor, critic: Critic, lam: float) -> Tensor:
    """Returns rows [B, D], the gradient of L_dis + λ·L_adv of each sample with respect to the student's image.

    L_dis = MSE(x_ψ, x_θ) + MSE(x_0, x_θ), L_adv = log(1 - φ(x_θ)), φ the chance that the discriminator gives "the teacher's".
    """
    x = x_theta.clone().requires_grad_()
    squares = ((x - x_psi).square() + (x - x_0).square()).flatten(1).mean(dim=1)
    loss = squares + lam * F.logsigmoid(-critic(x, y))  # log(1 - sigmoid(s)) = logsigmoid(-s)
    return torch.autograd.grad(loss.sum(), x)[0].flatten(1)


def clipped(rows_BD: Tensor, clip_norm: float) -> Tensor:
    """CLIP(v, C) = v / max(1, ‖v‖/C), row by row."""
    return rows_BD / (rows_BD.norm(dim=1, keepdim=True) / clip_norm).clamp_min(1)


def noised(rows_BD: Tensor, config: Config, sigma: float, vault: Vault, name: str) -> Tensor:
    """Returns rows/B plus noise of standard deviation σ·C/(B·T) in every entry, as published: 1/T of what clipping to C asks for.

    The text noises what is then multiplied by each sample's own Jacobian, so the noise is added to each row.
    """
    scale = config.dilution / config.clip_norm
    return noisy_rows(rows_BD * scale, sigma, vault, name) / (scale * config.batch)


def network(config: Config, public: Public, generator: torch.Generator) -> Denoiser:
    """Teacher and student have the same form."""
    return Denoiser(
        public.image_shape,
        public.n_classes,
        patch=config.patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        sigma_data=config.sigma_data,
        generator=generator,
    )


def train_teacher(config: Config, public: Public, images: Tensor, labels: Tensor, workspace: Workspace) -> Denoiser:
    """Returns an ordinary denoiser of the private images: NOT private, and every answer of it depends on every record."""
    model = network(config, public, workspace.generator("paper-teacher")).to(images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.teacher_lr)
    start = restore(workspace.load("paper-teacher"), {"teacher": model}, {"teacher": optimizer})
    for step in workspace.track(range(start, config.teacher_steps), "a teacher without privacy"):
        g = workspace.generator("paper-teacher", step)
        for group in optimizer.param_groups:
            group["lr"] = config.teacher_lr * (1 + math.cos(math.pi * step / config.teacher_steps)) / 2
        rows = torch.randint(len(images), (config.teacher_batch,), generator=g)
        uniform = torch.rand(config.teacher_batch, generator=g, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        level = edm.noise_levels(uniform, -1.2, 1.2).to(images.device)
        noise = torch.randn(images[rows].shape, generator=g).to(images.device)
        loss = edm.loss(model, images[rows], noise, level, labels[rows], config.sigma_data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.teacher_steps:
            workspace.save("paper-teacher", saved(step + 1, {"teacher": model}, {"teacher": optimizer}))
    return model.requires_grad_(False).eval()
