"""Means of each class in a few fixed public networks: what is asked of the records, and how the noisy answer is read.

A view is a network, random or taught on public images (`teaching`), that sees every image under one augmentation of its own. Images
whose means agree with the records' in many views teach what the records teach (distribution matching); what one release told of the
views can be asked again without end.
What is asked are coordinates on the leading axes of all views together: the views tell much the same of an image, so a few axes hold it.
N views, F features of each, D axes, K classes, n records of a class (known only through a noisy count).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import ConvNet, Dsa
from ...models.axes import principal_axes
from ...models.convnet import quick_pooling
from ..base import Workspace

CONSTANT = 0.3  # share of a record's unit vector that its constant coordinate takes: gives the count
UNIT = math.sqrt(1 - CONSTANT**2)
CHUNK = 64  # images at once: what a processor's cache holds; 200 take half as long again


class View(nn.Module):
    """A network under one augmentation: [B, C, H, W] -> [B, F]. Each row depends on its own image only."""

    def __init__(self, network: ConvNet, dsa: Dsa, draw: Tensor) -> None:
        super().__init__()
        self.network, self.dsa, self.draw, self.unit = quick_pooling(network), dsa, draw, 1.0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.network.embed(self.dsa.apply(x_BCHW, self.draw)) / self.unit


def random_views(n: int, image_shape: tuple[int, int, int], width: int, dsa: Dsa, workspace: Workspace) -> list[View]:
    """N views, the same for the same run; each operation of the augmentation as often as the others."""
    result = []
    for i in range(n):
        network = ConvNet(image_shape, 1, width=width, generator=workspace.generator("network", i))
        draw = dsa.draw(workspace.generator("view", i))
        draw[:, 0] = i % max(1, len(dsa.operations))
        result.append(View(network, dsa, draw).requires_grad_(False).to(workspace.device))
    return result


@torch.no_grad()
def seen(views: Sequence[View], x_BCHW: Tensor) -> Tensor:
    """Features of all views side by side, on the CPU: [B, N·F]."""
    device = next(views[0].parameters()).device
    return torch.cat([torch.cat([view(x.to(device)).cpu() for view in views], dim=1) for x in x_BCHW.split(CHUNK)])


def evened(views: Sequence[View], features_AF: Tensor) -> Tensor:
    """Sets the unit of each view so that images differ as much in one as in another, and returns the features in these units."""
    parts = features_AF.view(len(features_AF), len(views), -1)
    spread = (parts - parts.mean(dim=0)).square().sum(dim=2).mean(dim=0).sqrt().clamp_min(1e-6)
    for view, unit in zip(views, spread.tolist(), strict=True):
        view.unit = unit
    return (parts / spread[:, None]).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Leading axes of what all views see: centre [N·F], axes [N·F, D] of unit length, their scale [D]."""

    views: Sequence[View]
    centre: Tensor
    axes: Tensor
    scale: Tensor

    def of(self, features_BF: Tensor) -> Tensor:
        """Coordinates of norm at most 1, [B, D]."""
        z = (features_BF - self.centre.to(features_BF.device)) @ (self.axes * self.scale).to(features_BF.device)
        return z / z.norm(dim=1, keepdim=True).clamp_min(1.0)

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Record function: [B, C, H, W] -> [B, D + 1], of norm at most 1: coordinates and a constant."""
        z = self.of(torch.cat([torch.cat([view(x) for view in self.views], dim=1) for x in x_BCHW.split(CHUNK)]))
        return torch.cat([UNIT * z, z.new_full((len(z), 1), CONSTANT)], dim=1)

    def lifted(self, z_KD: Tensor) -> Tensor:
        """Features that differ by these coordinates and in nothing else: [K, N·F]."""
        return torch.where(self.scale > 0, z_KD / self.scale.clamp_min(1e-12), 0.0) @ self.axes.T


def coordinates(views: Sequence[View], features_AF: Tensor, dims: int) -> Coordinates:
    """Learns centre and axes from what the views see of images that are public or derive from released values.

    The scale λ^(-1/4) of each axis evens out the noise; a fifth of the images has a norm above 1.
    """
    centre = features_AF.mean(dim=0)
    axes, variance = principal_axes(features_AF - centre, dims)
    there = variance > 1e-8 * variance[0]
    scale = torch.where(there, (variance / variance[0]).clamp_min(1e-12).pow(-0.25), 0.0)
    radius = (((features_AF - centre) @ axes) * scale).norm(dim=1).quantile(0.8).clamp_min(1e-6)
    missing = dims - axes.shape[1]  # the plan promised `dims` coordinates
    axes, scale = F.pad(axes, (0, missing)), F.pad(scale / radius, (0, missing))
    return Coordinates(views=views, centre=centre, axes=axes.contiguous(), scale=scale)


def read(sums_KD: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Returns means [K, D] and the standard deviation of the noise in them [K], from noisy sums of `Coordinates`.

    Args:
      noise: standard deviation of each coordinate of the sums (public).
    """
    counts = (sums_KD[:, -1] / CONSTANT).clamp_min(4 * noise + 1)  # noise alone must not look like a class
    return sums_KD[:, :-1] / UNIT / counts[:, None], noise / UNIT / counts


def trusted(away_KD: Tensor, noise_K: Tensor) -> Tensor:
    """Returns what means differ by from what was expected, less what of it is likely to be noise, [K, D].

    Wiener's filter, axis by axis: how far expectations are out along an axis is judged over all classes, each by its precision.
    """
    noise = noise_K.square()[:, None]
    wrong = ((away_KD.square() - noise) / noise).mean(dim=0).clamp_min(0) / (1 / noise).mean()
    return away_KD * wrong / (wrong + noise)
