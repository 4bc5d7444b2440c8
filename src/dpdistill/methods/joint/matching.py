"""Fit a few images to released means: those of their features in the same views agree with them. All post-processing.

Source: distribution matching (Zhao & Bilen 2023), with a fixed set of networks in place of a new one at each step.
K classes, M images per class, N views, D features of each.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import expand
from ...models.precision import autocast
from ..base import Workspace
from .views import CHUNK, View


def match(
    views: Sequence[View],
    target_KND: Tensor,
    start_KMCHW: Tensor,
    *,
    parts: int,
    gain: int,
    steps: int,
    lr: float,
    workspace: Workspace,
    save_every: int = 50,
) -> Tensor:
    """Returns images [K, M, C, H, W] whose means in the views agree, class by class, with the target.

    Args:
      views: one is looked at in each step, each as often as the others.
      start_KMCHW: where the images begin.
      gain: contrast of training images against stored ones.
      lr: of Adam, in units of training images.
    """
    device = workspace.device
    target = target_KND.to(device)
    k, m = start_KMCHW.shape[:2]
    images = start_KMCHW.clone().to(device).requires_grad_()
    lr = lr / gain
    optimizer = torch.optim.Adam([images], lr=lr, betas=(0.9, 0.99))
    saved, first = workspace.load("matching"), 0
    if saved is not None:
        first = int(saved["step"])
        with torch.no_grad():
            images.copy_(saved["images"])
        moments = {name: saved[name].to(device) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[images] = {"step": saved["adam_step"], **moments}
    for step in workspace.track(range(first, steps), "fitting images"):
        optimizer.param_groups[0]["lr"] = lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        turn, place = divmod(step, len(views))
        chosen = int(torch.randperm(len(views), generator=workspace.generator("matching", turn))[place])
        view, wanted = views[chosen], target[:, chosen]
        with autocast(device):
            training = expand(images.flatten(0, 1), parts, gain)
            mine = torch.cat([view(part).float() for part in training.split(CHUNK)])
        loss = (mine.view(k, m * parts**2, -1).mean(dim=1) - wanted).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(-1, 1)
        if (step + 1) % save_every == 0 and step + 1 < steps:
            adam = optimizer.state[images]
            kept = {"exp_avg": adam["exp_avg"], "exp_avg_sq": adam["exp_avg_sq"]}
            counters = {"step": torch.tensor(step + 1), "adam_step": torch.as_tensor(adam["step"])}
            workspace.save("matching", {"images": images.detach(), **counters, **kept})
    return images.detach().cpu()


def packed(training_BCHW: Tensor, parts: int, gain: int, steps: int = 200, lr: float = 0.05) -> Tensor:
    """Returns stored images [B/parts², C, H, W] whose training images are as near to these as can be, in least squares.

    Made smaller and enlarged again, thin strokes would be blurred: as images to train on, 40 letters of each class lose 19 points
    by that, and half a point by this (docs/decisions/joint.md).
    """
    if parts == 1:
        return (training_BCHW / gain).clamp(-1, 1)
    b, c, h, w = training_BCHW.shape
    size = (h // parts, w // parts)
    small = F.interpolate(training_BCHW, size=size, mode="bilinear", antialias=True, align_corners=False)
    grid = small.view(b // parts**2, parts, parts, c, *size).permute(0, 3, 1, 4, 2, 5)
    sheet = grid.reshape(b // parts**2, c, size[0] * parts, size[1] * parts)
    stored = F.interpolate(sheet / gain, size=(h, w)).requires_grad_()
    optimizer = torch.optim.Adam([stored], lr=lr / gain)
    for _ in range(steps):
        loss = (expand(stored, parts, gain) - training_BCHW).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            stored.clamp_(-1, 1)
    return stored.detach()
