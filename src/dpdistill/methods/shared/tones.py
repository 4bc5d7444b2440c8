"""How often a pixel is how light, from one cheap release; and images given those tones.

A mixture of Gaussians draws pale, blurred images: right in their leading coordinates, wrong in how often a pixel is black. A curve over
pixel values, the same for all images, puts that right, as the first step of texture synthesis does (Heeger & Bergen 1995).
Private: one full-batch sum. A record's vector is the histogram of its own pixels; its shares add up to 1, so its norm is at most 1.
B images, C channels, H, W size, V values of a histogram, Q knots of a curve.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...mechanisms import PrivateData
from ...privacy import GaussianSum, Planned
from ..base import Public, Workspace

VALUES = 16
KNOTS = 256
CLEAR = (
    30.0  # records over the noise of all values: at 13 (digits, ε = 1) tones cost samples accuracy, at 80 they do not
)


def planned(name: str, public: Public, noise_multiplier: float, share: float) -> Planned:
    """The one release that `fit` asks for, at `share` of Σ 1/σ²."""
    sigma = noise_multiplier / math.sqrt(share)
    return Planned(GaussianSum(name=f"{name}-tones", dim=VALUES * public.image_shape[0], noise_multiplier=sigma))


def histograms(x_BCHW: Tensor) -> Tensor:
    """Record function: the share of pixels nearest to each of V values from -1 to 1, of all channels together 1: [B, C·V]."""
    b, c = x_BCHW.shape[:2]
    nearest = ((x_BCHW + 1) / 2 * (VALUES - 1)).round().long().clamp(0, VALUES - 1).flatten(2)
    counts = torch.zeros(b, c, VALUES, device=x_BCHW.device).scatter_add_(
        2, nearest, torch.ones_like(nearest, dtype=torch.float32)
    )
    return counts.flatten(1) / x_BCHW[0].numel()


def fit(query: GaussianSum, private: PrivateData, workspace: Workspace) -> Tensor | None:
    """Returns how often pixels have each of V values: [C, V], rows that add up to 1; None where the noise leaves too little of that."""
    with workspace.passing("private pass over the records: tones") as progress:
        total = private.release(query, lambda x, y: histograms(x), progress=progress)[0]  # private
    if total.sum() < CLEAR * query.noise_multiplier * math.sqrt(len(total)):
        return None
    found = total.view(-1, VALUES)
    # What the noise alone could be is no tone.
    kept = torch.where(found > query.noise_multiplier, found, 0.0)
    kept = torch.where(kept.sum(dim=1, keepdim=True) > 0, kept, torch.ones_like(kept))
    return kept / kept.sum(dim=1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A rising function of pixel values for each channel: knots [C, Q] to values [C, Q], straight between them."""

    knots: Tensor
    values: Tensor

    @classmethod
    def between(cls, images_NCHW: Tensor, tones_CV: Tensor) -> "Curve":
        """The curve that gives these images those tones. Equal pixels stay equal."""
        share = torch.linspace(0, 1, KNOTS)
        pixels = images_NCHW.transpose(0, 1).flatten(1)
        pixels = pixels[:, :: max(1, pixels.shape[1] // 500_000)].sort(dim=1).values
        knots = pixels[:, (share * (pixels.shape[1] - 1)).long()]
        # The first and the last value are points, those between are spread as far as half way to the next.
        edges = torch.linspace(-1, 1, VALUES)
        edges = torch.cat([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])
        reached = torch.cat([torch.zeros(len(tones_CV), 1), tones_CV.cumsum(dim=1)], dim=1)
        values = []
        for row in reached:
            bin_ = torch.searchsorted(row[1:].contiguous(), share.clamp_max(1 - 1e-6)).clamp_max(VALUES - 1)
            inside = ((share - row[bin_]) / (row[bin_ + 1] - row[bin_]).clamp_min(1e-9)).clamp(0, 1)
            value = edges[bin_] + inside * (edges[bin_ + 1] - edges[bin_])
            value = torch.where(bin_ == 0, edges[0], torch.where(bin_ == VALUES - 1, edges[-1], value))
            values.append(value)
        return cls(knots=knots.contiguous(), values=torch.stack(values))

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        planes = x_BCHW.transpose(0, 1)
        out = []
        for x, knots, values in zip(planes, self.knots.to(x_BCHW.device), self.values.to(x_BCHW.device), strict=True):
            # Of equal knots the middle: a value that many pixels share goes to the middle of where they belong.
            low = torch.searchsorted(knots, x.contiguous())
            high = torch.searchsorted(knots, x.contiguous(), right=True)
            tied, middle = high > low, ((low + high - 1) // 2).clamp(0, KNOTS - 1)
            right = low.clamp(1, KNOTS - 1)
            left = right - 1
            inside = ((x - knots[left]) / (knots[right] - knots[left]).clamp_min(1e-9)).clamp(0, 1)
            between = values[left] + inside * (values[right] - values[left])
            out.append(torch.where(tied, values[middle], between))
        return torch.stack(out).transpose(0, 1).contiguous()
