"""What every way to a diffusion model ends with: samples of the teacher, a student distilled from it, and some of the student's samples.

Nothing here is private. M images, K classes, B images of a batch, C channels, H, W size.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ...models import edm, unet
from ..base import Denoising, Public, Sampler, Synthetic, Workspace
from .distillation import distil

CHUNK = 1000
OVERSAMPLE = 3  # images drawn for one that is kept, where a guide chooses
STEPS = 1  # of the student, for the samples that are shown


class Finishing(Protocol):
    """What of a method's `Config` is about its end, beside `DistillationConfig`."""

    @property
    def per_class(self) -> int: ...
    @property
    def seed_images(self) -> int: ...
    @property
    def sampling_steps(self) -> int: ...
    @property
    def sigma_max(self) -> float: ...
    @property
    def guidance(self) -> float: ...


def surest(
    draw: Callable[[Tensor, torch.Generator], Tensor],
    guide: Callable[[Tensor], Tensor] | None,
    total: int,
    public: Public,
    workspace: Workspace,
    purpose: str,
) -> Synthetic:
    """Returns about `total` images, as many of each class: of those drawn, the first that the guide takes for their class.

    Where it takes too few for it, those follow that it holds likeliest. Without a guide, nothing is left out.

    Args:
      draw: labels [B], as many of each class and in their order, and a generator, to images [B, C, H, W].
    """
    k, m = public.n_classes, -(-total // public.n_classes)
    drawn = m if guide is None else m * OVERSAMPLE
    labels = torch.arange(k).repeat_interleave(drawn)
    images = draw(labels, workspace.generator(purpose)).cpu()
    if guide is None:
        return Synthetic(images=images, labels=labels)
    with torch.no_grad():
        likely = torch.cat([guide(x.to(workspace.device)).log_softmax(dim=1).cpu() for x in images.split(CHUNK)])
    kept = []
    for row, p in enumerate(likely.split(drawn)):
        fits = p.argmax(dim=1) == row
        rank = torch.where(fits, torch.ones(drawn), p[:, row])  # a log-probability is at most 0
        kept.append(rank.argsort(descending=True, stable=True)[:m] + row * drawn)
    rows = torch.cat(kept)
    return Synthetic(images=images[rows], labels=labels[rows])


def samples(
    teacher: Denoising,
    guide: Callable[[Tensor], Tensor] | None,
    public: Public,
    config: Finishing,
    workspace: Workspace,
    total: int,
) -> Synthetic:
    """Returns samples of the teacher, chosen by the guide where there is one."""

    def draw(labels: Tensor, g: torch.Generator) -> Tensor:
        return edm.sample(
            teacher,
            labels.to(workspace.device),
            public.image_shape,
            steps=config.sampling_steps,
            generator=g,
            sigma_max=config.sigma_max,
            guidance=config.guidance,
            n_classes=public.n_classes,
        )

    return surest(draw, guide, total, public, workspace, "teacher-samples")


def finish(
    teacher: Denoising,
    guide: Callable[[Tensor], Tensor] | None,
    public: Public,
    config: Any,
    workspace: Workspace,
) -> Sampler:
    """Distils the teacher and draws what is shown.

    Args:
      config: a method's Config: `Finishing` and `DistillationConfig` in one.
    """
    seeds = samples(teacher, guide, public, config, workspace, config.seed_images)
    student = distil(teacher, seeds, public, config, workspace, guide)
    labels = torch.arange(public.n_classes).repeat_interleave(config.per_class)
    student = student.cpu().eval()
    shown = unet.draw(unet.pipeline(student), labels, STEPS, workspace.generator("shown"))
    return Sampler(unet=student, images=Synthetic(images=shown, labels=labels), figures={})
