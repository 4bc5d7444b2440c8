"""A class-conditional mixture of Gaussians in public pixel coordinates, fitted to noisy moments and noisy local means.

Three full-batch releases: moments of each class, then twice the means of the records nearest to each of J centres of their class. Images
can be drawn from the result without limit. Proof: docs/privacy/joint.md, where it is the first of four.
d dims, J components per class, K classes, n records of a class (known only through a noisy count), P pixels, M images.
The record functions here are what the door sees; everything that takes a released sum is post-processing.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...mechanisms import PrivateData
from ...models.axes import principal_axes
from ...models.mixture_denoiser import MixtureDenoiser
from ...privacy import GaussianSum, Planned
from ..base import Workspace

FIRST, COUNT = 0.5, 0.2  # shares of a record's unit vector that its coordinates and the constant coordinate take
_SECOND = math.sqrt(1 - FIRST**2 - COUNT**2)
_LOCAL_COUNT = 0.3
N_SAMPLES = 1500  # drawn for each class to find its first centres among
DIMS, FINE_DIMS = 64, 256  # of pixels: where a class is seen through much noise, and through little
LEADING = 64  # of the fine ones: how many, along the records' own leading axes, the centres are sought in
CLEAR = 5_000  # records of a class for each unit of a sum's noise: at 1,600 finer coordinates cost samples, at 11,000 they brought detail
TIED = 1e-5  # squared distances, of coordinates of norm at most 1, that differ by less are the same
BOUND = 2**22  # numbers in one release that finer coordinates may take: 126 classes


@dataclass(frozen=True, kw_only=True)
class PixelSpace:
    """Principal coordinates of public images, in units of `radius`: centre [P], basis [P, d]."""

    centre: Tensor
    basis: Tensor
    radius: Tensor

    def coordinates(self, x_BCHW: Tensor) -> Tensor:
        """Returns [B, d] of norm at most 1: each image by itself."""
        centre, basis, radius = (t.to(x_BCHW.device) for t in (self.centre, self.basis, self.radius))
        z = (x_BCHW.flatten(1) - centre) @ basis / radius
        return z / z.norm(dim=1, keepdim=True).clamp_min(1.0)

    def images(self, z_BD: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        return (z_BD * self.radius @ self.basis.T + self.centre).clamp(-1, 1).view(-1, *image_shape)


def pixel_space(auxiliary_ACHW: Tensor, dims: int) -> PixelSpace:
    """Learns the coordinates from public images; a fifth of them is longer than the radius."""
    flat = auxiliary_ACHW.flatten(1)
    centre = flat.mean(dim=0)
    basis, _ = principal_axes(flat - centre, dims)
    radius = ((flat - centre) @ basis).norm(dim=1).quantile(0.8)
    return PixelSpace(centre=centre, basis=basis, radius=radius.clamp_min(1e-6))


def n_moments(dims: int) -> int:
    return dims + dims * (dims + 1) // 2 + 1


def dims_for(weight: float, n_classes: int) -> int:
    """How many coordinates a mixture is fitted in, from public facts alone.

    Args:
      weight: expected records for each unit of a sum's noise, all classes together.
    """
    fine = weight / n_classes >= CLEAR and n_classes * n_moments(FINE_DIMS) <= BOUND
    return FINE_DIMS if fine else DIMS


def n_leading(dims: int) -> int:
    """Axes that centres are sought along: all, where they are few."""
    return dims if dims < FINE_DIMS else LEADING


def moments(space: PixelSpace, x_BCHW: Tensor) -> Tensor:
    """Record function: coordinates, their products, and a constant, of norm at most 1: [B, n_moments(d)]."""
    z = space.coordinates(x_BCHW)
    i, j = torch.triu_indices(z.shape[1], z.shape[1], device=z.device)
    # off the diagonal by sqrt 2, so that the norm is ‖zzᵀ‖ = ‖z‖² <= 1
    products = z[:, i] * z[:, j] * torch.where(i == j, 1.0, math.sqrt(2))
    return torch.cat([FIRST * z, _SECOND * products, z.new_full((len(z), 1), COUNT)], dim=1)


def local_means(space: PixelSpace, centres_KJD: Tensor, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
    """Record function: coordinates and a constant in the block of the nearest centre of the record's class: [B, J·(d+1)]."""
    z = space.coordinates(x_BCHW)
    j = centres_KJD.shape[1]
    away = (z[:, None] - centres_KJD.to(z.device)[y_B]).square().sum(dim=2)
    # The first of those that are as near: centres of a class whose noise drowned its spread coincide, and rounding would choose.
    nearest = (away <= away.min(dim=1, keepdim=True).values + TIED).long().argmax(dim=1)
    unit = torch.cat([math.sqrt(1 - _LOCAL_COUNT**2) * z, z.new_full((len(z), 1), _LOCAL_COUNT)], dim=1)
    return (torch.nn.functional.one_hot(nearest, j).to(unit)[:, :, None] * unit[:, None]).flatten(1)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Per class: count [K], mean [K, d], covariance [K, d, d], centres [K, J, d], their counts [K, J] and covariance within [K, d, d]."""

    count: Tensor
    mean: Tensor
    covariance: Tensor
    centres: Tensor
    weights: Tensor
    within: Tensor

    def sample(self, per_class: int, generator: torch.Generator) -> Tensor:
        """Returns coordinates [K, per_class, d]."""
        k, _, d = self.centres.shape
        which = torch.multinomial(self.weights, per_class, replacement=True, generator=generator)
        noise = torch.randn(k, per_class, d, generator=generator) @ _root(self.within).transpose(1, 2)
        return self.centres.gather(1, which[:, :, None].expand(-1, -1, d)) + noise


def _root(m: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(m)
    return vectors * values.clamp_min(0).sqrt()[..., None, :]


def _positive(m: Tensor, floor: Tensor) -> Tensor:
    """Removes what lies below the noise level from the spectrum of symmetric matrices."""
    values, vectors = torch.linalg.eigh((m + m.transpose(-1, -2)) / 2)
    return (vectors * (values - floor[..., None]).clamp_min(0)[..., None, :]) @ vectors.transpose(-1, -2)


def read_moments(total_KD: Tensor, dims: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns counts [K], means [K, d] and covariances [K, d, d] from noisy sums of `moments`.

    Args:
      noise: standard deviation of each coordinate of the sum (public).
    """
    count = (total_KD[:, -1] / COUNT).clamp_min(
        4 * noise + 1
    )  # a class may be empty; the noise alone must not look like one
    mean = total_KD[:, :dims] / FIRST / count[:, None]
    i, j = torch.triu_indices(dims, dims)
    second = torch.zeros(len(total_KD), dims, dims)
    second[:, i, j] = total_KD[:, dims:-1] / _SECOND / count[:, None] / torch.where(i == j, 1.0, math.sqrt(2))
    second = second + second.triu(1).transpose(1, 2)
    # The noise as a symmetric matrix has entries of std noise/sqrt 2 off the diagonal, so a norm of about noise·sqrt(2d) (semicircle law).
    # The floor is 0.7 of that: it removes most of the noise and leaves weak directions in.
    floor = noise / _SECOND / count * math.sqrt(dims)
    return count, mean, _positive(second - mean[:, :, None] * mean[:, None], floor)


def first_centres(mean: Tensor, covariance: Tensor, components: int, generator: torch.Generator) -> Tensor:
    """k-means centres of samples from one Gaussian per class: [K, J, d]."""
    k, d = mean.shape
    samples = mean[:, None] + torch.randn(k, N_SAMPLES, d, generator=generator) @ _root(covariance).transpose(1, 2)
    return _k_means(samples, components, 8)


def _k_means(points_KND: Tensor, components: int, rounds: int) -> Tensor:
    """Centres [K, J, d] of each class's points, from its first J on; an empty one stays where it was."""
    centres = points_KND[:, :components].clone()
    for _ in range(rounds):
        member = _nearest(points_KND, centres)
        size = member.sum(dim=1)
        moved = member.transpose(1, 2) @ points_KND / size.clamp_min(1)[:, :, None]
        centres = torch.where((size > 0)[:, :, None], moved, centres)
    return centres


def _nearest(points_KND: Tensor, centres_KJD: Tensor) -> Tensor:
    """Which centre of its class is the nearest to each point, as zeros and ones [K, N, J]."""
    nearest = torch.cdist(points_KND, centres_KJD).argmin(dim=2)
    return torch.nn.functional.one_hot(nearest, centres_KJD.shape[1]).to(points_KND)


def refine_centres(total_KD: Tensor, centres_KJD: Tensor, mean_KD: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Returns new centres and their counts [K, J] from noisy sums of `local_means`, each shrunk towards where it was.

    The shrinkage is Wiener's: prior variance a quarter of the centre's squared distance from the class mean, noise variance known.
    """
    k, j, d = centres_KJD.shape
    blocks = total_KD.view(k, j, d + 1)
    count = (blocks[:, :, -1] / _LOCAL_COUNT).clamp_min(1.0)
    unit = math.sqrt(1 - _LOCAL_COUNT**2)
    found = blocks[:, :, :d] / unit / count[:, :, None]
    prior = 0.25 * (centres_KJD - mean_KD[:, None]).square().sum(dim=2)
    trust = prior / (prior + d * (noise / unit / count).square())
    kept = torch.where(count > 5, trust, torch.zeros_like(trust))[:, :, None]
    return kept * found + (1 - kept) * centres_KJD, count


def mixture(count: Tensor, mean: Tensor, covariance: Tensor, centres: Tensor, weights: Tensor) -> Mixture:
    """Puts the pieces together: the covariance within components is what the centres do not explain."""
    share = weights / weights.sum(dim=1, keepdim=True)
    between = (centres * share[:, :, None]).transpose(1, 2) @ centres - mean[:, :, None] * mean[:, None]
    within = _positive(covariance - between, torch.zeros(len(mean)))
    return Mixture(count=count, mean=mean, covariance=covariance, centres=centres, weights=share, within=within)


def leading_axes(count: Tensor, mean: Tensor, covariance: Tensor, n: int) -> Tensor:
    """Post-processing: the n leading axes of all classes together, [d, n]."""
    share = (count / count.sum())[:, None]
    apart = mean - (share * mean).sum(dim=0)
    together = (share[:, :, None] * covariance).sum(dim=0) + (share * apart).T @ apart
    return torch.linalg.eigh(together)[1].flip(1)[:, :n].contiguous()


def lifted(centres_KJN: Tensor, mean: Tensor, covariance: Tensor, axes_DN: Tensor) -> Tensor:
    """Centres [K, J, d] whose leading coordinates are these; the others go with them as they do in the class."""
    own = mean @ axes_DN
    leading = axes_DN.T @ covariance @ axes_DN
    # A little of the mean variance: a class may lie flat along an axis that leads among others.
    ridge = 1e-3 * leading.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-12)
    leading = leading + ridge[:, None, None] * torch.eye(axes_DN.shape[1])
    slope = torch.linalg.solve(leading, axes_DN.T @ covariance)
    found = mean[:, None] + (centres_KJN - own[:, None]) @ slope
    return found + (centres_KJN - found @ axes_DN) @ axes_DN.T


def planned(
    name: str,
    n_classes: int,
    dims: int,
    components: int,
    noise_multiplier: float,
    share_moments: float,
    share_local: float,
) -> list[Planned]:
    """The three releases that `fit` asks for.

    Args:
      name: what their names begin with.
      share_moments, share_local: of Σ 1/σ², for the first and for each of the others.
    """

    def ask(what: str, dim: int, share: float) -> Planned:
        sigma = noise_multiplier / math.sqrt(share)
        return Planned(GaussianSum(name=f"{name}-{what}", dim=dim, n_classes=n_classes, noise_multiplier=sigma))

    local = components * (n_leading(dims) + 1)
    return [
        ask("moments", n_moments(dims), share_moments),
        ask("local-1", local, share_local),
        ask("local-2", local, share_local),
    ]


def fit(
    space: PixelSpace,
    components: int,
    private: PrivateData,
    queries: list[GaussianSum],
    workspace: Workspace,
) -> Mixture:
    """Fits the mixture behind the door, with the three queries of `planned`."""
    d = space.basis.shape[1]
    with workspace.passing("private pass over the records: moments") as progress:
        total = private.release(queries[0], lambda x, y: moments(space, x), progress=progress)  # private
    count, mean, covariance = read_moments(total, d, queries[0].noise_multiplier)
    inner, n = space, n_leading(d)
    axes = torch.eye(d)
    if n < d:  # weak directions are in the covariance alone
        axes = leading_axes(count, mean, covariance, n)
        inner = replace(space, basis=space.basis @ axes)
    own = mean @ axes
    centres = first_centres(own, axes.T @ covariance @ axes, components, workspace.generator("centres"))
    weights = torch.ones(centres.shape[:2])
    for query in queries[1:]:
        with workspace.passing(f"private pass over the records: {query.name}") as progress:
            fixed = centres  # the record function must not change under the loop

            def nearest(x: Tensor, y: Tensor, fixed: Tensor = fixed) -> Tensor:
                return local_means(inner, fixed, x, y)

            total = private.release(query, nearest, progress=progress)  # private
        centres, weights = refine_centres(total, centres, own, query.noise_multiplier)
    if n < d:
        centres = lifted(centres, mean, covariance, axes)
    return mixture(count, mean, covariance, centres, weights)


def denoiser(space: PixelSpace, fitted: Mixture) -> MixtureDenoiser:
    """The mixture's own denoiser, in pixels."""
    centres, within = fitted.centres * space.radius, fitted.within * space.radius**2
    return MixtureDenoiser(space.centre, space.basis, centres, fitted.weights, within)


def denoiser_of(images_KMCHW: Tensor, dims: int, components: int) -> MixtureDenoiser:
    """Post-processing: the denoiser of a mixture fitted to released images of each class, as closely as so many components can."""
    m = images_KMCHW.shape[1]
    flat = images_KMCHW.flatten(2)
    centre = flat.mean(dim=(0, 1))
    basis, _ = principal_axes((flat - centre).flatten(0, 1), min(dims, flat.shape[2]))
    points = (flat - centre) @ basis
    centres = _k_means(points, min(components, m), 15)
    member = _nearest(points, centres)
    apart = points - member @ centres
    within = apart.transpose(1, 2) @ apart / m
    return MixtureDenoiser(centre, basis, centres, member.mean(dim=1), within)
