"""What every way ends with: the student, and some of the generator's images that it is surest of.

M images, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...models.student_generator import StudentGenerator
from ...models.wavelet_net import WaveletNet
from ..base import Public, Student, Synthetic, Workspace

OVERSAMPLE = 16  # images drawn for one that is kept
CHUNK = 512


def finish(
    model: WaveletNet,
    generator: StudentGenerator,
    public: Public,
    workspace: Workspace,
    per_class: int,
    figures: dict[str, float] | None = None,
) -> Student:
    """Returns the student with `per_class` images of every class: of those drawn for it, the ones that the student is surest of."""
    images, labels, soft = [], [], []
    with torch.no_grad():
        for k in range(public.n_classes):
            g = workspace.generator("gallery", k)
            z = torch.randn(OVERSAMPLE * per_class, generator.latent, generator=g).to(workspace.device)
            drawn, answers = [], []
            for part in z.split(CHUNK):
                x = generator(part, torch.full((len(part),), k, device=part.device))
                drawn.append(x.cpu())
                answers.append(model(x).softmax(dim=1).cpu())
            x, p = torch.cat(drawn), torch.cat(answers)
            best = p[:, k].argsort(descending=True, stable=True)[:per_class]
            images.append(x[best])
            soft.append(p[best])
            labels.append(torch.full((per_class,), k))
    shown = Synthetic(images=torch.cat(images).clamp(-1, 1), labels=torch.cat(labels), soft_labels=torch.cat(soft))
    return Student(model=model.cpu().eval(), generator=generator.cpu().eval(), images=shown, figures=figures or {})


def probe_agreement(
    teacher: Callable[[Tensor], Tensor], student: WaveletNet, public: Public, workspace: Workspace
) -> dict[str, float]:
    """How often teacher and student agree on public made-up images: free to show where the teacher's answers are."""
    made_up = public.procedural if public.procedural is not None else public.auxiliary
    x = made_up[:2000].to(workspace.device)
    with torch.no_grad():
        pairs = [(teacher(part).cpu(), student(part).cpu()) for part in x.split(CHUNK)]
    value = agreement(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))
    return {"agreement_with_teacher_on_made_up_images": value}


def agreement(one: Tensor, other: Tensor) -> float:
    """Share of rows in which two sets of scores [B, K] have the same highest class."""
    return float((one.argmax(dim=1) == other.argmax(dim=1)).double().mean())
