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
BESIDE = 8  # classes of whose first image the teacher's answer is shown, where that is free
CHUNK = 512


def finish(
    model: WaveletNet,
    generator: StudentGenerator,
    public: Public,
    workspace: Workspace,
    per_class: int,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> Student:
    """Returns the student with `per_class` images of every class: of those drawn for it, the ones that the student is surest of.

    Args:
      teacher: images to logits [B, K], where its answers are free to show, to be compared with the student's. An opaque one's are not.
    """
    figures = probe_agreement(teacher, model, public, workspace) if teacher else {}
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
    if teacher:
        figures |= answers_beside(teacher, shown.images[::per_class][:BESIDE].to(workspace.device))
    return Student(model=model.cpu().eval(), generator=generator.cpu().eval(), images=shown, figures=figures)


def answers_beside(teacher: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, float]:
    """The teacher's class and probability for each of these images: the page shows them beside the student's."""
    with torch.no_grad():
        p_BK = (
            teacher(x.nan_to_num(0)).softmax(dim=1).nan_to_num(0).cpu()
        )  # figures are numbers, also where a fit diverged
    found: dict[str, float] = {}
    for index, p in enumerate(p_BK):
        found |= {f"teacher_class_{index}": int(p.argmax()), f"teacher_probability_{index}": round(float(p.max()), 4)}
    return found


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
