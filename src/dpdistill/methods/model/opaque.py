r"""The paper's way with one opaque teacher (DPDFD): faithful to its text, and without a guarantee for any training record.

Source: DPDFD (IJCAI 2023): normalise the gradient with respect to the student's outputs, add noise in output space, update a pseudo-label,
train the student on it by the chain rule; the generator is trained against the student as its fixed discriminator. Its published code
departs from this in ways that would leave nothing learnt (docs/privacy/opaque.md).
Private: the teacher's answers, by the paper's count only. One training record can change every answer.
T steps, B batch, K classes, γ step in output space, σ noise multiplier of the paper.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...mechanisms import Vault, noisy_rows
from ...models.muon import Muon
from ...models.precision import autocast
from ...models.student_generator import StudentGenerator
from ...models.wavelet_net import WaveletNet
from ...privacy import gaussian_multiplier
from ..base import Public, Student, Workspace
from ..shared.bounds import NORMS, check_bounds
from ..shared.checkpoints import restore, saved
from .conversion import Networks, Teacher
from .gallery import finish
from .prior import Prior, vary


@dataclass(frozen=True, kw_only=True)
class Config(Networks):
    """Public settings: those of `Networks`, and the paper's.

    Attributes:
      per_class: images of the generator that are released with the student.
      steps, batch: T and B. Every batch is a fresh set of B queries.
      gamma: γ, length of a row's step in output space.
      noise: False is the paper's method without noise; its nominal ε is then infinite.
      stability: added to a row's norm before dividing by it.
    """

    per_class: int = 10
    steps: int = 1500
    batch: int = 512
    gamma: float = 1.0
    noise: bool = True
    stability: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self, NORMS, "gamma")
        if not (0 < self.stability < 1):
            raise ConfigError(f"Expected stability in (0, 1), got {self.stability}.")

    def sigma(self, epsilon: float, delta: float) -> float:
        """σ for which the paper's count gives ε: T sums of rows, of which one may move by 2."""
        return 2 * math.sqrt(self.steps) * gaussian_multiplier(epsilon, delta) if self.noise else 0.0


def normalised(gradient_BK: Tensor, stability: float) -> Tensor:
    """Rows divided by their L2 norm: at most 1."""
    return gradient_BK / (gradient_BK.norm(dim=1, keepdim=True) + stability)


def pseudo_labels(
    outputs_BK: Tensor, answers_BK: Tensor, config: Config, sigma: float, vault: Vault, name: str
) -> Tensor:
    """The paper's update in output space: a step of length γ against the normalised, noisy gradient of KL(teacher ‖ student).

    Args:
      outputs_BK, answers_BK: logits of the student and of the teacher.
      sigma: the noise in a row has standard deviation σ / B, as the published code adds it.
      name: of these rows' noise.
    """
    gradient = normalised(outputs_BK.softmax(dim=1) - answers_BK.softmax(dim=1), config.stability)
    return outputs_BK - config.gamma * noisy_rows(gradient, sigma / len(outputs_BK), vault, name)


def run(config: Config, public: Public, teacher: Teacher, sigma: float, vault: Vault, workspace: Workspace) -> Student:
    """Returns the student. The teacher is asked for its answers and nothing flows back into it."""
    device = workspace.device
    student = WaveletNet(
        public.image_shape,
        public.n_classes,
        width=config.width,
        depth=config.depth,
        groups=config.groups,
        generator=workspace.generator("opaque-student"),
    ).to(device)
    images = StudentGenerator(
        public.image_shape,
        public.n_classes,
        latent=config.latent,
        width=config.generator_width,
        generator=workspace.generator("opaque-generator"),
    ).to(device)
    optimizer = Muon(student.parameters(), matrix_lr=config.matrix_lr, lr=config.lr, weight_decay=config.weight_decay)
    image_optimizer = torch.optim.Adam(images.parameters(), lr=config.generator_lr, betas=(0.5, 0.999))
    parts = {"student": student, "images": images}
    optimizers = {"student": optimizer, "images": image_optimizer}
    prior = Prior(config, public, workspace)

    def answer(x: Tensor) -> Tensor:
        with autocast(x.device, config.bf16):
            outputs: Tensor = student(x)
        return outputs.float()

    start = restore(workspace.load("opaque"), parts, optimizers)
    for step in workspace.track(range(start, config.steps), "asking the teacher"):
        g = workspace.generator("opaque-step", step)

        # The generator's step: the student is a fixed discriminator, and no gradient comes from the teacher.
        if config.n_generated and step % config.generator_every == 0:
            z, classes = images.draw(config.n_generated, g)
            student.requires_grad_(False)
            outputs = answer(images(z, classes))
            mean = outputs.softmax(dim=1).mean(dim=0)
            loss = config.one_hot * F.cross_entropy(outputs, classes)
            loss = loss + config.entropy * (mean * mean.clamp_min(1e-9).log()).sum()
            image_optimizer.zero_grad()
            loss.backward()
            image_optimizer.step()
            student.requires_grad_(True)

        # Queries: fresh ones, from the prior and the generator.
        with torch.no_grad():
            x = prior.batch(step, config.batch - config.n_generated).to(device)
            if config.n_generated:
                x = torch.cat([x, images.sample(config.n_generated, g)[0]])
            x = vary(x, config.vary, g)
            answers = teacher(x).detach()

        # A step in output space, and the chain rule.
        outputs = answer(x)
        with torch.no_grad():
            pseudo = pseudo_labels(outputs, answers, config, sigma, vault, f"step-{step}")
        optimizer.scale = (1 + math.cos(math.pi * step / config.steps)) / 2
        loss = F.mse_loss(outputs, pseudo)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % config.checkpoint_steps == 0 or step + 1 == config.steps:
            workspace.save("opaque", saved(step + 1, parts, optimizers))
    return finish(student, images, public, workspace, config.per_class)
