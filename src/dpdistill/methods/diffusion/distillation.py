"""Free stochastic adversarial distillation: a private diffusion teacher becomes a small student that draws in one to four steps.

Source: the losses of DP-SAD (ECCV 2024): one random noise level for each sample, L_dis + λ·L_adv. There the student's inputs are noisy
private images, and the noise that is meant to protect them does not. Here inputs derive from noise and from the teacher's own samples.
Private: nothing. Everything is post-processing of a private teacher; the student is as private as the teacher is, not more.
Symbols: x_r input at a level r, x_ψ the teacher's answer, x_θ the student's, λ `adversarial`.
B images, C channels, H, W size, S side of the student's canvas, K classes, P pool images, D features.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...models.few_step import LEVELS, SIGMA, canvas, clean, cropped, encoded, noisy, padded, student
from ...models.precision import autocast
from ..base import Denoising, Public, Synthetic, Workspace
from ..shared.bounds import DIMS, RATES, WEIGHTS, check_bounds
from ..shared.checkpoints import restore, saved

RHO = 7.0  # of the teacher's steps
SIGMA_MIN = 0.002  # where they end
SIGMA_MOST = 1e6  # where they may begin
REACH = 0.05  # black and white are clipped from answers beyond: an answer that aims at the bound itself is grey half of the time
PUSH = 0.2  # of L_dis's gradient, the length of L_adv's at λ = 1; five times as long, it costs points of accuracy
CLASS_GAP = 20.0  # between two classes, in units of pixels: images of 28×28 lie 10 to 20 apart
TRIES = 1.5  # answers to pure noise for one that is kept, where a guide chooses
SMALL = 16  # side up to which a student is narrower and is done sooner
CHUNK = 512  # pool images that the teacher denoises at once


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A private diffusion model: what a student learns from, all of it released or derived from what was.

    Attributes:
      denoise: answers noise, and its own noisy samples.
      guide: maps images to logits; says which samples look like their class.
      tone: maps images to what is shown of them.
    """

    denoise: Denoising
    guide: Callable[[Tensor], Tensor] | None = None
    tone: Callable[[Tensor], Tensor] | None = None

    def shown(self, images: Tensor) -> Tensor:
        """Returns images [B, C, H, W] as they are shown."""
        return images if self.tone is None else self.tone(images)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Public settings.

    Attributes:
      student_width: of a token, see `models.few_step`; "auto" is 96 for sides up to 16, else 192.
      student_steps, student_batch: of its training; "auto" is 1,000 steps for sides up to 16, else 2,000;
        `dpsad` takes 8,000 where its mixture is fine.
      student_lr: of AdamW; warms up over `student_warmup` steps, then falls to 0 by a cosine.
      student_ema: decay of the average of the weights that is returned.
      from_noise: share of samples that start from pure noise; the others from noisy samples of the teacher, for more steps than one.
      answer_steps: DDIM steps of the teacher from a sample's level to the clean image.
      sigma_max, guidance: of the teacher's own samples. From a higher level, the teacher starts at sigma_max with the same noise.
      pool, reuse: the teacher answers `pool` inputs at a time, and each is used `reuse` times.
      adversarial: λ. At 1 the gradient of L_adv in the student's images is a fifth as long as that of L_dis; 0 leaves L_adv out.
      spread: length of the energy distance's gradient in the student's images, in that of L_dis; 0 leaves it out.
      critic_width, critic_lr: channels of the discriminator's first layer, and Adam's rate.
      bf16: train the student in bfloat16 where the device is quick in it.
      checkpoint_steps: steps between checkpoints; does not change the result.
    """

    student_width: int | Literal["auto"] = "auto"
    student_steps: int | Literal["auto"] = "auto"
    student_batch: int = 128
    student_lr: float = 2e-3
    student_warmup: int = 100
    student_ema: float = 0.99
    from_noise: float = 0.9
    answer_steps: int = 12
    sigma_max: float = 80.0
    guidance: float = 1.0
    pool: int = 4096
    reuse: int = 8
    adversarial: float = 0.5
    spread: float = 0.25
    critic_width: int = 8
    critic_lr: float = 1e-3
    bf16: bool = False
    checkpoint_steps: int = 200

    def __post_init__(self) -> None:
        for name in ("student_batch", "answer_steps", "pool", "reuse", "critic_width", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        for name in ("student_width", "student_steps"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ConfigError(f"Expected {name} of auto or at least 1, got {value}.")
        if self.pool < self.student_batch:
            raise ConfigError(f"Expected a pool of at least student_batch={self.student_batch}, got {self.pool}.")
        if self.spread > 0 and self.student_batch < 2:
            raise ConfigError(
                "Expected student_batch of at least 2: answers are kept apart from one another (spread=0 leaves that out)."
            )
        for name in ("student_ema", "from_noise"):
            if not (0 <= getattr(self, name) <= 1):
                raise ConfigError(f"Expected {name} in [0, 1], got {getattr(self, name)}.")
        check_bounds(self, RATES, "student_lr", "critic_lr")
        check_bounds(self, DIMS, "critic_width")
        check_bounds(self, WEIGHTS, "adversarial", "spread", "student_warmup", "guidance")
        if not SIGMA_MIN < self.sigma_max <= SIGMA_MOST:
            raise ConfigError(f"Expected sigma_max above {SIGMA_MIN} and at most {SIGMA_MOST:g}, got {self.sigma_max}.")

    def token_width(self, image_shape: tuple[int, int, int]) -> int:
        """Of the student for these images: `student_width`, or what "auto" is."""
        return (96 if max(image_shape) <= SMALL else 192) if self.student_width == "auto" else self.student_width


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Inputs and the teacher's answers on the student's canvas: x_r and x_ψ [P, C, S, S], levels r and classes int64 [P]."""

    noisy: Tensor
    level: Tensor
    classes: Tensor
    targets: Tensor


def distil(
    teacher: Teacher,
    seeds: Synthetic,
    public: Public,
    config: DistillationConfig,
    workspace: Workspace,
) -> Any:
    """Trains a student to answer in one step what the teacher answers in many. A stopped run goes on with the same bytes.

    Args:
      teacher: asked about noise, and about its own noisy samples. Of answers to pure noise, those come first that its guide takes for
        their class.
      seeds: what its denoiser drew, not yet as it is shown; or anything else that is released.

    Returns:
      A DiTTransformer2DModel that answers as `models.few_step.clean` says, its weights averaged.

    Raises:
      ConfigError: a shape that the student cannot have, or diffusers is missing.
    """
    device, small = workspace.device, max(public.image_shape) <= SMALL
    steps = (1000 if small else 2000) if config.student_steps == "auto" else config.student_steps
    model = student(
        public.image_shape,
        public.n_classes,
        width=config.token_width(public.image_shape),
        images=encoded(padded(teacher.shown(seeds.images))),
        generator=workspace.generator("distillation-student"),
    ).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    critic = Critic(
        public.image_shape,
        public.n_classes,
        width=config.critic_width,
        generator=workspace.generator("distillation-critic"),
    ).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.student_lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.critic_lr, betas=(0.5, 0.99))
    modules: dict[str, nn.Module] = {"student": model, "average": average, "critic": critic}
    optimizers: dict[str, torch.optim.Optimizer] = {"student": optimizer, "critic": critic_optimizer}

    start = restore(workspace.load("distillation"), modules, optimizers)
    pools = Pools(teacher, seeds, public, config, workspace)
    for step in workspace.track(range(start, steps), "distilling the teacher"):
        pool, share = pools.batch(step), _rate(config, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = config.student_lr * share

        # The student: L_dis + λ·L_adv, joined where they meet, at its image.
        with autocast(device, config.bf16):
            answer = clean(model, pool.noisy, pool.level, pool.classes)
        shown, inside = (
            answer.detach().nan_to_num(0.0).clamp(-1, 1),
            answer.detach().abs() <= 1 + REACH,
        )  # beyond, nothing that is shown changes
        gradient = missing(answer.detach(), pool.targets)
        length = gradient.norm()
        if config.adversarial:
            # The critic: hinge loss, teacher's images above 1 and student's below -1.
            for group in critic_optimizer.param_groups:
                group["lr"] = config.critic_lr * share
            scores = critic(torch.cat([pool.targets, shown]), pool.classes.repeat(2))
            loss = F.relu(1 - scores[: len(shown)]).mean() + F.relu(1 + scores[len(shown) :]).mean()
            critic_optimizer.zero_grad()
            loss.backward()
            critic_optimizer.step()
            fake = shown.clone().requires_grad_()
            push = torch.autograd.grad(-critic(fake, pool.classes).sum(), fake)[0] * inside
            gradient = gradient + config.adversarial * PUSH * length / (push.norm() + 1e-12) * push
        if config.spread:
            apart = energy_gradient(shown, pool.targets, pool.classes) * inside
            gradient = gradient + config.spread * length / (apart.norm() + 1e-12) * apart
        optimizer.zero_grad()
        answer.backward(gradient / len(answer))
        optimizer.step()

        decay = min(config.student_ema, (step + 1) / (step + 10))
        with torch.no_grad():
            for mine, new in zip(average.parameters(), model.parameters(), strict=True):
                mine.lerp_(new, 1 - decay)
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == steps:
            workspace.save("distillation", saved(step + 1, modules, optimizers))
    return average.cpu().eval()


class Pools:
    """What the student learns from, made `pool` at a time; the same for a step after a resume, from the step's number alone."""

    _pool: Pool

    def __init__(
        self,
        teacher: Teacher,
        seeds: Synthetic,
        public: Public,
        config: DistillationConfig,
        workspace: Workspace,
    ) -> None:
        self._teacher, self._seeds, self._public = teacher, seeds, public
        self._config, self._workspace = config, workspace
        self._number = -1

    def batch(self, step: int) -> Pool:
        """The samples of one step: a pool is gone through `reuse` times, in another order each."""
        config = self._config
        per_pass = max(1, config.pool // config.student_batch)
        turn, place = divmod(step, per_pass)
        if turn // config.reuse != self._number:
            self._number = turn // config.reuse
            self._pool = self._make(self._number)
        order = torch.randperm(config.pool, generator=self._workspace.generator("distillation-order", turn))
        rows = order[place * config.student_batch : (place + 1) * config.student_batch]
        return Pool(**{name: value[rows].to(self._workspace.device) for name, value in vars(self._pool).items()})

    def _make(self, number: int) -> Pool:
        config, g = self._config, self._workspace.generator("distillation-pool", number)
        wanted = round(config.from_noise * config.pool)
        n_noise = round(wanted * (1 if self._teacher.guide is None else TRIES))
        drawn = config.pool - wanted + n_noise
        image_shape = self._public.image_shape
        picked = torch.randint(len(self._seeds.images), (drawn,), generator=g)
        x, classes = self._seeds.images[picked], self._seeds.labels[picked]
        t = torch.randint(LEVELS - 1, (drawn,), generator=g)
        t[:n_noise] = LEVELS - 1
        classes[:n_noise] = torch.randint(self._public.n_classes, (n_noise,), generator=g)
        normal = torch.randn((drawn, *canvas(image_shape)), generator=g)
        from_sample = (t < LEVELS - 1).view(-1, 1, 1, 1)
        sigma = torch.tensor(SIGMA, dtype=torch.float64)[t].clamp_max(config.sigma_max)  # levels that the teacher knows
        asked = x * from_sample + sigma.float().view(-1, 1, 1, 1) * cropped(normal, image_shape)
        device = self._workspace.device
        parts = [
            self._answers(*(value.to(device) for value in part)).cpu()
            for part in zip(asked.split(CHUNK), sigma.split(CHUNK), classes.split(CHUNK), strict=True)
        ]
        targets = self._teacher.shown(torch.cat(parts))
        kept = torch.cat([self._best(targets[:n_noise], classes[:n_noise])[:wanted], torch.arange(n_noise, drawn)])
        # The teacher was asked about its own sample, the student is asked about what is shown of it: its own first answer looks so.
        own = encoded(padded(self._teacher.shown(x[kept]))) * from_sample[kept]
        return Pool(
            noisy=noisy(own, t[kept], normal[kept]),
            level=t[kept],
            classes=classes[kept],
            targets=encoded(padded(targets[kept])),
        )

    @torch.no_grad()
    def _best(self, x: Tensor, classes: Tensor) -> Tensor:
        """Rows of x, those first that the guide takes for their class; all in their order without one."""
        guide = self._teacher.guide
        if guide is None:
            return torch.arange(len(x))
        found = [guide(part.to(self._workspace.device)).argmax(dim=1).cpu() for part in x.split(CHUNK)]
        wrong = torch.cat([*found, classes[:0]]) != classes
        return wrong.to(torch.int8).argsort(stable=True)

    def _answers(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        """x_ψ, by the teacher's guided path."""
        config, anything = self._config, torch.full_like(y, self._public.n_classes)

        def guided(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
            estimate = self._teacher.denoise(x, sigma, y)
            if config.guidance == 1:
                return estimate
            free = self._teacher.denoise(x, sigma, anything)
            return free + config.guidance * (estimate - free)

        return denoised(guided, x, sigma, y, steps=config.answer_steps)


def missing(answer: Tensor, target: Tensor) -> Tensor:
    """Gradient of L_dis, ½ of the squared distance: where the target is black or white, answers beyond it are as good."""
    found = torch.where(target <= -0.99, (answer + 1 + REACH).clamp_min(0), answer - target)
    return torch.where(target >= 0.99, (answer - 1 - REACH).clamp_max(0), found)


@torch.no_grad()
def denoised(teacher: Denoising, x: Tensor, sigma: Tensor, y: Tensor, *, steps: int) -> Tensor:
    """Returns where the teacher's deterministic path leads from x: `steps` DDIM steps from each image's own level, in [-1, 1].

    Source: Karras et al. (2022), Eq. 5, for the levels between; the last step goes to 0.
    """
    high = sigma.double() ** (1 / RHO)
    low = SIGMA_MIN ** (1 / RHO)
    for step in range(steps):
        here = (high + step / steps * (low - high)) ** RHO
        after = (high + (step + 1) / steps * (low - high)) ** RHO * (step + 1 < steps)
        estimate = teacher(x, here.float(), y)
        x = estimate + (after / here).float().view(-1, 1, 1, 1) * (x - estimate)
    return x.nan_to_num(0.0).clamp(-1, 1)


def energy_gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Gradient in x of the energy distance between images x and t [B, C, H, W] with classes y [B], but for a factor.

    An answer that is unsure is drawn to the middle of what it may be; the distance between a batch and its targets, which is 0 only where
    both are spread alike, pushes such answers apart again.
    Source: Székely & Rizzo (2013); as a generator's loss, Bellemare et al. (2017).
    """
    joint = F.one_hot(y).to(x.dtype) * CLASS_GAP
    a, b = torch.cat([x.flatten(1), joint], dim=1), torch.cat([t.flatten(1), joint], dim=1)

    def pulls(other: Tensor) -> Tensor:
        weight = 1 / torch.cdist(a, other).clamp_min(1e-3)
        weight = weight * (torch.cdist(a, other) > 1e-3)
        return a * weight.sum(dim=1, keepdim=True) - weight @ other

    n = len(x)
    return ((pulls(b) / n - pulls(a) / (n - 1))[:, : x[0].numel()]).view_as(x)


class Critic(nn.Module):
    """Scores images [B, C, H, W] of classes [B]: three convolutions, two of which halve the sides, and a projection on the class.

    Source: spectral normalisation and projection discriminator (Miyato et al. 2018; Miyato & Koyama 2018). No batch statistics: the
    largest singular value is computed from the weights alone, every time.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], n_classes: int, *, width: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        channels = image_shape[0]
        sizes = (channels, width, 2 * width, 2 * width)
        self.layers = nn.ModuleList(
            nn.utils.skip_init(nn.Conv2d, sizes[i], sizes[i + 1], 4 if i else 3, stride=2 if i else 1, padding=1)
            for i in range(3)
        )
        self.classes = nn.Parameter(torch.randn(n_classes + 1, 2 * width, generator=generator) * (2 * width) ** -0.5)
        with torch.no_grad():
            for name, weight in self.layers.named_parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) * name.endswith("weight"))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
            norm = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
            # Half of what comes out of a rectifier is small: times 2, activations keep their size.
            x = F.leaky_relu(F.conv2d(x, 2 / norm * weight, bias, stride=2 if i else 1, padding=1), 0.2)
        features_BD = x.mean(dim=(2, 3))
        return (features_BD * (self.classes[-1] + self.classes[y])).sum(dim=1)


def _rate(config: DistillationConfig, step: int, steps: int) -> float:
    """Share of the learning rates: linear warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / max(1, config.student_warmup)) * (1 + math.cos(math.pi * step / steps)) / 2
