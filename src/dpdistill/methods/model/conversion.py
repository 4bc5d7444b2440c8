"""Data-free distillation: a student network that answers as a teacher does, trained on no private image.

Source: knowledge distillation (Hinton et al. 2015) on logits (Ba & Caruana 2014); procedural images as transfer set; the generator's
losses after DAFL (Chen et al. 2019: one-hot and information entropy) and DFAD (Fang et al. 2019: disagreement).
Private: nothing here. The teacher is asked about images made up here, and every use of its answers is post-processing
of the teacher: the student is as private as the teacher's release (or its answers) is, not more.
B images, C channels, H, W size, K classes, P pool images.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...models.muon import Muon
from ...models.precision import autocast
from ...models.student_generator import StudentGenerator
from ...models.wavelet_net import WaveletNet
from ..base import Public, Workspace
from ..shared.bounds import NORMS, RATES, WEIGHTS, check_bounds
from ..shared.checkpoints import restore, saved
from .prior import Prior, vary

Teacher = Callable[[Tensor], Tensor]

N_PROBE = 1024  # prior images that set the unit of the logits


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Public settings of every way to a student: the two networks, and the images that they learn from.

    Attributes:
      width, depth, groups: of the student, see `WaveletNet`.
      steps, batch: of the student's training.
      matrix_lr, lr, weight_decay: of Muon on the convolutions, and of AdamW on the rest.
      generated: share of a batch that the generator makes; 0 leaves it out.
      prior: "procedural", "noise", or "none": what the rest of the batch is made of.
      given: share of a procedural prior that is images from outside, where there are some: public ones, or drawn from a released
        mixture; "auto" is three quarters for grey images and a half for colour.
      figures: share of the procedural images that are strokes and silhouettes only, beside those in the usual mix; "auto" is a
        half for grey images and 0 for colour.
      vary: share of images that are moved, mixed or recoloured at random.
      pool, reuse: prior images are drawn `pool` at a time, and each is used `reuse` times.
      generator_every, generator_lr, latent, generator_width: one generator step every so many steps, Adam; its size.
      one_hot, entropy: weights of the generator's losses.
      bf16: train the student in bfloat16 where the device is quick in it.
      checkpoint_steps: steps between checkpoints; does not change the result.
    """

    width: int = 64
    depth: int = 3
    groups: int = 4
    steps: int = 6000
    batch: int = 64
    matrix_lr: float = 0.05
    lr: float = 5e-3
    weight_decay: float = 1e-3
    generated: float = 0.125
    prior: Literal["procedural", "noise", "none"] = "procedural"
    given: float | Literal["auto"] = "auto"
    figures: float | Literal["auto"] = "auto"
    vary: float = 0.7
    pool: int = 4096
    reuse: int = 4
    generator_every: int = 4
    generator_lr: float = 1e-3
    latent: int = 64
    generator_width: int = 32
    one_hot: float = 1.0
    entropy: float = 1.0
    bf16: bool = True
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        sizes = ("width", "depth", "groups", "steps", "batch", "pool", "reuse", "generator_every", "latent")
        for name in (*sizes, "generator_width", "checkpoint_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        for name in ("generated", "vary"):
            if not (0 <= getattr(self, name) <= 1):
                raise ConfigError(f"Expected {name} in [0, 1], got {getattr(self, name)}.")
        check_bounds(self, RATES, "matrix_lr", "lr", "generator_lr")
        check_bounds(self, WEIGHTS, "weight_decay", "one_hot", "entropy")
        for name in ("given", "figures"):
            share = getattr(self, name)
            if share != "auto" and not (0 <= share <= 1):
                raise ConfigError(f"Expected {name} of auto or in [0, 1], got {share}.")
        if self.prior == "none" and round(self.generated * self.batch) < self.batch:
            raise ConfigError(f"Expected generated of 1 where there is no prior, got {self.generated}.")

    @property
    def n_generated(self) -> int:
        """Generated images in a batch."""
        return round(self.generated * self.batch)


@dataclass(frozen=True, kw_only=True)
class Conversion(Networks):
    """Public settings of a conversion: those of `Networks`, and how a teacher's answers are learnt.

    Attributes:
      warmup: steps over which the rates rise, before they fall to 0 by a cosine.
      ema: decay of the average of the student's weights that is returned; 0 returns the last weights.
      loss: between centred logits in units of their spread over prior images ("l1", "l2", "smooth"), or "kl" at `temperature`.
      temperature: of softmax in the generator's losses and in "kl", in the same unit.
      bank: generated images that are kept, the oldest replaced first.
      adversarial: weight of the disagreement among the generator's losses.
      past_every: steps between copies of the student that the generator is set against (no differentiable teacher).
    """

    warmup: int = 100
    ema: float = 0.995
    loss: Literal["l1", "l2", "smooth", "kl"] = "l2"
    temperature: float = 0.5
    bank: int = 2048
    adversarial: float = 1.0
    past_every: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bank", "past_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {getattr(self, name)}.")
        if not (0 <= self.ema <= 1):
            raise ConfigError(f"Expected ema in [0, 1], got {self.ema}.")
        check_bounds(self, NORMS, "temperature")
        check_bounds(self, WEIGHTS, "adversarial")


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A student, and the generator that was trained against it. Both derive from the teacher's answers alone."""

    student: WaveletNet
    generator: StudentGenerator


def convert(
    teacher: Teacher, public: Public, config: Conversion, workspace: Workspace, *, differentiable: bool = False
) -> Converted:
    """Trains a student to give the teacher's centred logits, on images that no one has taken.

    Args:
      teacher: maps images [B, C, H, W] (float32 in [-1, 1]) to logits [B, K], each row by itself.
      differentiable: the generator may look for disagreement through the teacher's gradient.

    Returns:
      The student (its weights averaged; its logits are centred) and the generator.
    """
    device, k = workspace.device, public.n_classes
    student = WaveletNet(
        public.image_shape,
        k,
        width=config.width,
        depth=config.depth,
        groups=config.groups,
        generator=workspace.generator("conversion-student"),
    ).to(device)
    average = _copy(student)
    past = _copy(student)
    images = StudentGenerator(
        public.image_shape,
        k,
        latent=config.latent,
        width=config.generator_width,
        generator=workspace.generator("conversion-generator"),
    ).to(device)
    optimizer = Muon(student.parameters(), matrix_lr=config.matrix_lr, lr=config.lr, weight_decay=config.weight_decay)
    image_optimizer = torch.optim.Adam(images.parameters(), lr=config.generator_lr, betas=(0.5, 0.999))
    parts = {"student": student, "average": average, "past": past, "images": images}
    optimizers = {"student": optimizer, "images": image_optimizer}
    prior = Prior(config, public, workspace)

    # The unit: one standard deviation of a centred logit over prior images.
    with torch.no_grad():
        probe = prior.first(N_PROBE).to(device)
        unit = torch.cat([_centred(teacher(x)) for x in probe.split(config.batch)]).std().clamp_min(1e-12)

    def answers(x: Tensor) -> Tensor:
        return _centred(teacher(x)) / unit

    def outputs(model: nn.Module, x: Tensor) -> Tensor:
        with autocast(x.device, config.bf16):
            return model(x).float()

    state = workspace.load("conversion")
    start = restore(state, parts, optimizers)
    # Generated images are kept for a while: cheaper than new ones for each step, and the generator's last whim is not all.
    bank = state["bank"].to(device) if state else images.sample(config.bank, workspace.generator("conversion-bank"))[0]
    for step in workspace.track(range(start, config.steps), "training the student"):
        g = workspace.generator("conversion-step", step)
        x = prior.batch(step, config.batch - config.n_generated).to(device)

        # The generator's step: images that the critic is sure of, all classes alike, on which two networks disagree.
        if config.n_generated:
            if step % config.generator_every == 0:
                z, classes = images.draw(config.n_generated, g)
                made = images(z, classes)
                student.requires_grad_(False)
                seen = outputs(student, made)
                other = answers(made) if differentiable else outputs(past, made)
                student.requires_grad_(True)
                critic = (other if differentiable else seen) / config.temperature
                mean = critic.softmax(dim=1).mean(dim=0)
                loss = config.one_hot * F.cross_entropy(critic, classes)
                loss = loss + config.entropy * (mean * mean.clamp_min(1e-9).log()).sum()
                loss = loss - config.adversarial * (_centred(seen) - _centred(other)).abs().mean().clamp_max(1.0)
                # Only the generator's gradient: a teacher's weights, if it has any, are left alone.
                weights = list(images.parameters())
                for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                    weight.grad = gradient
                image_optimizer.step()
                first = step // config.generator_every * config.n_generated
                bank[torch.arange(first, first + config.n_generated) % config.bank] = made.detach()
            x = torch.cat([x, bank[torch.randint(config.bank, (config.n_generated,), generator=g)]])
        x = vary(x, config.vary, g)

        # The student's step.
        with torch.no_grad():
            target = answers(x)
        optimizer.scale = _rate(config, step)
        loss = distance(outputs(student, x), target, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(config.ema, (step + 1) / (step + 10)) if config.ema else 0.0
        with torch.no_grad():
            for mine, new in zip(average.parameters(), student.parameters(), strict=True):
                mine.lerp_(new, 1 - decay)
        if (step + 1) % config.past_every == 0:
            past.load_state_dict(student.state_dict())
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            workspace.save("conversion", {**saved(step + 1, parts, optimizers), "bank": bank})
    with torch.no_grad():  # back to the teacher's own unit
        average.head.weight.mul_(unit)
        average.head.bias.mul_(unit)
    return Converted(student=average.eval(), generator=images.eval())


def distance(outputs_BK: Tensor, targets_BK: Tensor, config: Conversion) -> Tensor:
    """Returns the mean distance between centred logits, or the KL divergence of softmaxes, as `config.loss` says."""
    outputs = _centred(outputs_BK)
    if config.loss == "l1":
        return F.l1_loss(outputs, targets_BK)
    if config.loss == "l2":
        return F.mse_loss(outputs, targets_BK)
    if config.loss == "smooth":
        return F.smooth_l1_loss(outputs, targets_BK, beta=0.3)
    t = config.temperature
    log_p, log_q = (targets_BK / t).log_softmax(dim=1), (outputs / t).log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * t * t


def _centred(logits_BK: Tensor) -> Tensor:
    return logits_BK - logits_BK.mean(dim=1, keepdim=True)


def _rate(config: Conversion, step: int) -> float:
    """Share of the learning rates: linear warm-up, then a cosine to 0."""
    return min(1.0, (step + 1) / max(1, config.warmup)) * (1 + math.cos(math.pi * step / config.steps)) / 2


def _copy(model: WaveletNet) -> WaveletNet:
    return copy.deepcopy(model).requires_grad_(False)
