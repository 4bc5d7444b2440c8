"""Fit a few images to a weighted pool: class means of their features agree under fresh random networks. All post-processing.

Source: distribution matching (Zhao & Bilen 2023), with expected instead of sampled private targets: the pool holds only released
and public images, so every network and every augmentation is free.
K classes, G groups of each, M images per class, S = M·parts² training images per class, P pool images.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import ConvNet, Dsa, expand
from ...models.convnet import quick_pooling
from ...models.precision import autocast
from ..base import Workspace

CHUNK = 100  # images at once: what a processor's cache holds; 500 take half as long again


def match_pool(
    pool_PCHW: Tensor,
    weights_PKG: Tensor,
    share_KG: Tensor,
    group_KS: Tensor,
    start_KMCHW: Tensor,
    *,
    parts: int,
    gain: int,
    steps: int,
    repeats: int,
    lr: float,
    width: int,
    dsa: Dsa,
    workspace: Workspace,
    save_every: int = 50,
) -> Tensor:
    """Returns images [K, M, C, H, W] whose means of features, of each class and of each group, agree with the weighted pool's.

    Args:
      weights_PKG: signed weight of each pool image in each group of each class.
      share_KG: of a class's records in each of its groups.
      group_KS: group that each training image stands for.
      start_KMCHW: where the images begin.
      gain: contrast of training images against stored ones.
      lr: of Adam, in units of training images.
      repeats: steps taken with one network and augmentation before the next: the pool is the dearer side.
    """
    device = workspace.device
    pool, share = pool_PCHW.to(device), share_KG.to(device)
    groups = share.shape[1]
    weights = weights_PKG.flatten(1).to(device)
    member = F.one_hot(group_KS.to(device), groups).float().transpose(1, 2)  # [K, G, S]
    size = member.sum(dim=2)
    averaging = member / size.clamp_min(1)[:, :, None]
    told = share * (size > 0)  # a group may be too small for an image
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
    shape = (int(pool.shape[1]), int(pool.shape[2]), int(pool.shape[3]))
    net = quick_pooling(ConvNet(shape, 1, width=width)).requires_grad_(False).to(device)
    centre = target = whole = torch.empty(0)
    draws = dsa.draw(workspace.generator("none"))

    def embedded(x: Tensor) -> Tensor:
        with autocast(device):
            return torch.cat([net.embed(dsa.apply(part, draws)).float() for part in x.split(CHUNK)])

    for step in workspace.track(range(first, steps), "fitting images"):
        optimizer.param_groups[0]["lr"] = lr * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        if step % repeats == 0 or step == first:
            g = workspace.generator("matching", step // repeats)
            net.init_(g)
            draws = dsa.draw(g)  # one augmentation for both sides
            with torch.no_grad():
                seen = embedded(pool)
            centre = seen.mean(dim=0)  # weights sum to 1 for each class: centring changes nothing but the rounding
            target = (weights.T @ (seen - centre)).view(k, groups, -1)
            whole = (share[:, :, None] * target).sum(dim=1)
        mine = embedded(expand(images.flatten(0, 1), parts, gain))
        mine = (mine - centre).view(k, m * parts**2, -1)
        gap = (whole - mine.mean(dim=1)).square().sum()
        if groups > 1:
            gap = gap + (told * (target - averaging @ mine).square().sum(dim=2)).sum()
        loss = gap / whole.square().sum().clamp_min(1e-12)  # a pool of equal images has no target
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


def apportioned(share_KG: Tensor, n: int) -> Tensor:
    """Returns the group of each of n images of each class, in order: shares by largest remainder, [K, n]."""
    exact = share_KG * n
    size = exact.floor().long()
    for row in range(len(size)):
        missing = n - int(size[row].sum())
        size[row, (exact[row] - size[row]).argsort(descending=True, stable=True)[:missing]] += 1
    return torch.stack([torch.arange(share_KG.shape[1]).repeat_interleave(row) for row in size])
