"""What a diffusion model learns and how it is sampled from: noise levels, weighted loss, deterministic sampler. Nothing private.

Source: Karras et al. (2022): Eq. 2 and 5, Table 1. The sampler is its Algorithm 1 without the second-order correction, that is DDIM
(Song et al. 2021): extrapolation of a noisily learnt denoiser makes samples worse.
B images, C channels, H, W size, K classes.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

BATCH = 1000  # images that are sampled at once

DenoisingFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def noise_levels(uniform: Tensor, mean: float, std: float) -> Tensor:
    """Returns float32 σ of any shape, ln σ ~ N(mean, std²), from uniform float64 numbers inside (0, 1)."""
    return (mean + std * torch.special.ndtri(uniform)).exp().float()


def loss(
    denoise: DenoisingFunction, clean: Tensor, noise: Tensor, sigma: Tensor, y: Tensor, sigma_data: float
) -> Tensor:
    """Returns [B]: squared errors of the denoised images, averaged over pixels, weighted by 1 / c_out² so that all levels count alike.

    Args:
      denoise: as `methods.base.Denoising`.
      clean: [B, C, H, W].
      noise: [B, C, H, W], standard normal.
      sigma: [B].
      y: int64 [B], K for "any".
    """
    error = denoise(clean + sigma.view(-1, 1, 1, 1) * noise, sigma, y) - clean
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    return weight * error.square().flatten(1).mean(dim=1)


def schedule(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Returns noise levels [steps + 1], falling from sigma_max to sigma_min and then to 0; Eq. 5. One step goes from sigma_max to 0."""
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.cat([(high + share * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)]).float()


@torch.no_grad()
def sample(
    denoise: DenoisingFunction,
    labels: Tensor,
    image_shape: tuple[int, int, int],
    *,
    steps: int,
    generator: torch.Generator,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    guidance: float = 1.0,
    n_classes: int | None = None,
) -> Tensor:
    """Returns images [B, C, H, W] in [-1, 1], one for each label: the deterministic path from noise of the generator.

    Args:
      denoise: as `methods.base.Denoising`.
      labels: int64 [B], on the device to sample on.
      steps: calls of the denoiser (twice as many with guidance).
      generator: a CPU generator.
      guidance: g in D_any + g·(D_class - D_any); 1 is none.
      n_classes: K; needed for guidance only.
    """
    if guidance != 1 and n_classes is None:
        raise ValueError(f"Expected n_classes with {guidance=}.")
    start = torch.randn(len(labels), *image_shape, generator=generator).to(labels.device)
    levels = schedule(steps, sigma_min, sigma_max, rho).tolist()
    images = []
    for x, y in zip((start * sigma_max).split(BATCH), labels.split(BATCH), strict=True):
        for sigma, following in pairwise(levels):
            level = x.new_full((len(x),), sigma)
            clean = denoise(x, level, y)
            if guidance != 1:
                anything = denoise(x, level, torch.full_like(y, n_classes or 0))
                clean = anything + guidance * (clean - anything)
            x = clean + following / sigma * (x - clean)  # Euler: x + (σ' - σ)·(x - D)/σ
        images.append(x.nan_to_num(0.0).clamp(-1, 1))  # numbers, whatever a denoiser has become
    return torch.cat(images) if images else start
