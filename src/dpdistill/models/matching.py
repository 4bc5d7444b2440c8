"""Matching of feature sums: what `dosser` and `ndpdc` share. Public maps, and post-processing of released sums.

Source: Zheng & Li (NDPDC, 2023) and Dosser (ICCV 2025).
M per_class, L group_size, C clip_norm, p subspace dim; K classes, D features, A auxiliary images, S = parts² tiles.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .augment import Dsa, expand
from .convnet import ConvNet

CHUNK = 512  # training images per pass through a network: about 1.5 GiB at width 128 and 32x32


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """A frozen public network, with an optional centred projection onto p directions.

    Attributes:
      mean: [D] float32, public centre.
      basis: [D, p], any float type; None is no projection and no centring.
    """

    network: ConvNet
    mean: Tensor | None = None
    basis: Tensor | None = None

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Returns features [B, p], or [B, D] without a projection."""
        features = self.network.embed(x_BCHW)
        if self.mean is None or self.basis is None:
            return features
        return (features - self.mean) @ self.basis.float()


def fitting_depth(image_shape: tuple[int, int, int]) -> int:
    """Returns 3, or as many blocks as leave a map of 2x2: on 8x8 images, the 1x1 map of a third block tells little."""
    side = 32 if image_shape == (1, 28, 28) else min(image_shape[1:])
    return max(1, min(3, side.bit_length() - 2))


def random_network(
    image_shape: tuple[int, int, int],
    width: int,
    depth: int | None,
    generator: torch.Generator | None = None,
    device: str = "cpu",
) -> ConvNet:
    """Returns a frozen ConvNet with weights from a public generator (its head, of one class, is not used).

    Args:
      depth: None is `fitting_depth`.
    """
    network = ConvNet(image_shape, 1, width=width, depth=depth or fitting_depth(image_shape), generator=generator)
    return network.to(device).requires_grad_(False).eval()


@torch.no_grad()
def leading_subspace(network: ConvNet, auxiliary_ACHW: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Returns mean [D] and the leading `dim` principal directions [D, dim] of the auxiliary features: SER's projection.

    From the eigenvectors of the smaller of the two Gram matrices, in float64, so that no random sketch is involved. The
    basis is rounded to float16 (halving what a cache of it takes); both stages of a method see the rounded one.
    """
    features = torch.cat([network.embed(x) for x in auxiliary_ACHW.split(CHUNK)])
    mean = features.mean(dim=0)
    centred = (features - mean).double()
    a, d = centred.shape
    if not (1 <= dim <= min(a, d)):
        raise ValueError(f"Expected a subspace {dim=} of at most {min(a, d)}: {a} auxiliary images, {d} features.")
    gram = centred @ centred.T if a < d else centred.T @ centred
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :dim]
    basis = centred.T @ vectors if a < d else vectors
    basis = basis / basis.norm(dim=0).clamp_min(1e-12)
    return mean, basis.half()


def class_feature(features: FeatureMap, dsa: Dsa, draws_K4: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns fn(x [B, C, H, W], y [B]) -> [B, p]: features of each record under the one public draw of its class."""

    def fn(x: Tensor, y: Tensor) -> Tensor:
        return features(dsa.apply(x, draws_K4.to(x.device)[y]))

    return fn


def clip_rows(v_BD: Tensor, clip_norm: float) -> Tensor:
    """Scales rows down to norm `clip_norm`, the scale held constant in the gradient, as the papers do."""
    norm = v_BD.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
    return v_BD * (clip_norm / norm).clamp(max=1)


def matching_gradient(
    images_KMCHW: Tensor,
    target_KD: Tensor,
    features: FeatureMap,
    dsa: Dsa,
    draws_K4: Tensor,
    *,
    parts: int,
    group_size: float,
    clip_norm: float,
) -> Tensor:
    """Returns the gradient of Σ_k ‖target_k - L·mean_m u_km‖² / C², u the clipped features of the training images of
    class k.

    Args:
      images_KMCHW: stored images; each holds parts² training images.
      target_KD: noisy sums over groups of about L = `group_size` records.
      draws_K4: the augmentation that the records of each class went through.

    Returns:
      [K, M, C, H, W].
    """
    k, m = images_KMCHW.shape[:2]
    per_class = m * parts**2
    gradients = []
    step = max(1, CHUNK // per_class)
    for first in range(0, k, step):  # classes are independent, so this is exact
        z = images_KMCHW[first : first + step].detach().requires_grad_()
        draws = draws_K4[first : first + step].repeat_interleave(per_class, dim=0)
        u = clip_rows(features(dsa.apply(expand(z.flatten(0, 1), parts), draws)), clip_norm)
        mean = u.view(len(z), per_class, -1).mean(dim=1)
        loss = (target_KD[first : first + step] - group_size * mean).square().sum() / clip_norm**2
        gradients.append(torch.autograd.grad(loss, z)[0])
    return torch.cat(gradients)


def momentum_step(
    images_KMCHW: Tensor,
    velocity_KMCHW: Tensor,
    gradient: Callable[[Tensor], Tensor],
    *,
    lr: float,
    momentum: float,
    class_steps: bool,
) -> tuple[Tensor, Tensor]:
    """One iteration of gradient descent with momentum; returns new images and velocity.

    With `class_steps`, as the papers' code: one optimiser step for each class in turn, at which the images of the other
    classes only coast on their momentum. The classes are independent, so the coasting is summed in closed form and all
    gradients are taken in one pass: the same numbers for a K-th of the passes.
    """
    images, velocity = images_KMCHW, velocity_KMCHW
    k = len(images)
    turn = torch.arange(k, device=images.device, dtype=images.dtype).view(-1, 1, 1, 1, 1)
    if class_steps:
        images, velocity = _coast(images, velocity, turn, lr, momentum)
    velocity = momentum * velocity + gradient(images)
    images = images - lr * velocity
    if class_steps:
        images, velocity = _coast(images, velocity, k - 1 - turn, lr, momentum)
    return images, velocity


def _coast(images: Tensor, velocity: Tensor, n: Tensor, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
    """n momentum steps without a gradient: Σ_{j=1..n} m^j = m·(1 - m^n)/(1 - m)."""
    left = momentum**n
    return images - (lr * momentum / (1 - momentum)) * (1 - left) * velocity, left * velocity


def start_images(k: int, m: int, image_shape: tuple[int, int, int], generator: torch.Generator, device: str) -> Tensor:
    """Returns normal pixels, clamped to [-1, 1]: [K, M, C, H, W]."""
    return torch.randn(k, m, *image_shape, generator=generator).clamp(-1, 1).to(device)
