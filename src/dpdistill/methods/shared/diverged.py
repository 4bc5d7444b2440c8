"""A fit that diverged: what is no number becomes one, so that a release that is paid for can be written. Post-processing.

M images, S parts² of them, K classes.
"""

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..base import Sampler, Student, Synthetic

LARGEST = float(torch.finfo(torch.float32).max)


def mended(made: Synthetic | Student | Sampler) -> Synthetic | Student | Sampler:
    """Returns what a method made, every image in it within [-1, 1] and every weight and soft label a number. What is whole stays as it is.

    Grey, 0 and equal chances stand for what is no number, and a warning says so.
    """
    images = made if isinstance(made, Synthetic) else made.images
    networks: list[nn.Module] = []
    if isinstance(made, Student):
        networks = [made.model, made.generator]
    elif isinstance(made, Sampler):
        networks = [made.model]
    weights = [weight for network in networks for weight in network.state_dict().values()]
    broken = [weight for weight in weights if not torch.isfinite(weight).all()]
    for weight in broken:
        weight.nan_to_num_(0.0, LARGEST, -LARGEST)
    fine = bool((images.images.abs() <= 1).all()) and (images.soft_labels is None or _likely(images.soft_labels).all())
    if fine and not broken:
        return made
    warnings.warn(
        "the fit diverged: grey and 0 stand in this release for what is no number; a smaller learning rate would have been better",
        RuntimeWarning,
        stacklevel=2,
    )
    images = replace(
        images,
        images=images.images.nan_to_num(0.0).clamp(-1, 1),
        soft_labels=None if images.soft_labels is None else _chances(images.soft_labels),
    )
    return images if isinstance(made, Synthetic) else replace(made, images=images)


def _likely(soft_MSxK: Tensor) -> Tensor:
    """Which rows are probabilities."""
    return (soft_MSxK >= 0).all(dim=1) & ((soft_MSxK.sum(dim=1) - 1).abs() <= 1e-4)


def _chances(soft_MSxK: Tensor) -> Tensor:
    """The rows that are probabilities, and equal chances for the others."""
    equal = torch.full_like(soft_MSxK, 1 / soft_MSxK.shape[1])
    return torch.where(_likely(soft_MSxK)[:, None], soft_MSxK, equal)
