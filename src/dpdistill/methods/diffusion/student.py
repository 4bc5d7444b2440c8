"""What every way to a diffusion model ends with: samples of the teacher, a student distilled from it, and some of the student's samples.

Nothing here is private. M images, K classes, B images of a batch, C channels, H, W size.
"""

from typing import Any, Protocol

import torch

from ...models import edm, few_step
from ..base import Public, Sampler, Synthetic, Workspace
from .distillation import Teacher, distil

CHUNK = 1000
OVERSAMPLE = 3  # images drawn for one that is kept, where a guide chooses
STEPS = 2  # of the student, for the samples that are shown: one is twice as fast and a little worse, four are no better


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


def samples(teacher: Teacher, public: Public, config: Finishing, workspace: Workspace, total: int) -> Synthetic:
    """Returns about `total` samples of the teacher as they are shown, as many of each class."""
    return _chosen(teacher, public, config, workspace, total)[1]


def _chosen(
    teacher: Teacher, public: Public, config: Finishing, workspace: Workspace, total: int
) -> tuple[Synthetic, Synthetic]:
    """Returns samples as the denoiser drew them, and the same as they are shown: of those drawn, the first that the guide takes for
    their class. Where it takes too few for it, those follow that it holds likeliest. Without a guide, nothing is left out.
    """
    k, m = public.n_classes, -(-total // public.n_classes)
    drawn = m if teacher.guide is None else m * OVERSAMPLE
    labels = torch.arange(k).repeat_interleave(drawn)
    raw = edm.sample(
        teacher.denoise,
        labels.to(workspace.device),
        public.image_shape,
        steps=config.sampling_steps,
        generator=workspace.generator("teacher-samples"),
        sigma_max=config.sigma_max,
        guidance=config.guidance,
        n_classes=k,
    ).cpu()
    shown = teacher.shown(raw)
    if teacher.guide is None:
        return Synthetic(images=raw, labels=labels), Synthetic(images=shown, labels=labels)
    with torch.no_grad():
        parts = [teacher.guide(x.to(workspace.device)).log_softmax(dim=1).cpu() for x in shown.split(CHUNK)]
    kept = []
    for row, p in enumerate(torch.cat(parts).split(drawn)):
        fits = p.argmax(dim=1) == row
        rank = torch.where(fits, torch.ones(drawn), p[:, row])  # a log-probability is at most 0
        kept.append(rank.argsort(descending=True, stable=True)[:m] + row * drawn)
    rows = torch.cat(kept)
    return Synthetic(images=raw[rows], labels=labels[rows]), Synthetic(images=shown[rows], labels=labels[rows])


def finish(teacher: Teacher, public: Public, config: Any, workspace: Workspace) -> Sampler:
    """Distils the teacher and draws what is shown.

    Args:
      config: a method's Config: `Finishing` and `DistillationConfig` in one.
    """
    seeds, _ = _chosen(teacher, public, config, workspace, config.seed_images)
    student = distil(teacher, seeds, public, config, workspace)
    labels = torch.arange(public.n_classes).repeat_interleave(config.per_class)
    student = student.cpu().eval()
    drawn = few_step.draw(few_step.pipeline(student), labels, STEPS, workspace.generator("shown"))
    shown = few_step.cropped(drawn, public.image_shape).contiguous()
    return Sampler(model=student, images=Synthetic(images=shown, labels=labels), figures={})
