"""A class as a signed measure over images that may be seen: weights whose feature means are the released ones.

Released are the class means m of z(x), features of a few random networks. Images of the pool (drawn from the mixture, public) have known
features too, so weights α with Σ_j α_j z(x_j) = m say what the class looks like to *any* network ψ under any augmentation A:
E[ψ(A(x)) | class] ≈ Σ_j α_j ψ(A(x_j)). That turns one private release into unlimited targets, free.
A class is taken in a few groups of its records, so that the images show what varies in it, too: each group is such a measure.
K classes, G groups of each, P pool images, D feature dims, n records of a class (known only through a noisy count).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...models import ConvNet, Dsa

CONSTANT = 0.3  # share of a record's unit vector that its constant coordinate takes: gives the count
_UNIT = math.sqrt(1 - CONSTANT**2)


class View(nn.Module):
    """A random network that sees every image under one and the same augmentation: a measure that agrees in several of these holds
    under augmentation, too. Each row depends on its own image only."""

    def __init__(self, network: ConvNet, dsa: Dsa, draw: Tensor) -> None:
        super().__init__()
        self.network, self.dsa, self.draw = network, dsa, draw

    def embed(self, x_BCHW: Tensor) -> Tensor:
        return self.network.embed(self.dsa.apply(x_BCHW, self.draw))


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Joint features of several networks on principal axes, partly whitened. Centre [F], basis [F, D]."""

    networks: Sequence[ConvNet | View]
    centre: Tensor
    basis: Tensor

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        """Record function: [B, C, H, W] -> [B, D + 1], of norm at most 1: coordinates and a constant."""
        features = joint_features(self.networks, x_BCHW)
        z = (features - self.centre.to(features.device)) @ self.basis.to(features.device)
        z = z / z.norm(dim=1, keepdim=True).clamp_min(1.0)
        return torch.cat([_UNIT * z, z.new_full((len(z), 1), CONSTANT)], dim=1)


def grouped(vectors_BD: Tensor, group_B: Tensor, groups: int) -> Tensor:
    """Puts each vector into the block of its group: [B, G·D], of the same norm."""
    return (torch.nn.functional.one_hot(group_B, groups).to(vectors_BD)[:, :, None] * vectors_BD[:, None]).flatten(1)


def joint_features(networks: Sequence[ConvNet | View], x_BCHW: Tensor) -> Tensor:
    return torch.cat([net.embed(x_BCHW) for net in networks], dim=1)


def coordinates(networks: Sequence[ConvNet | View], reference_ACHW: Tensor, dims: int) -> Coordinates:
    """Learns centre and axes from images that are public or derive from released values; λ^(-1/4) on each axis evens out the noise."""
    with torch.no_grad():
        device = next(networks[0].parameters()).device
        features = torch.cat([joint_features(networks, x.to(device)).cpu() for x in reference_ACHW.split(250)])
    centre = features.mean(dim=0)
    _, singular, vectors = torch.linalg.svd(features - centre, full_matrices=False)
    kept = min(dims, int((singular > 1e-4 * singular[0]).sum()))
    basis = vectors[:kept].T * (singular[:kept] / singular[0]).pow(-0.5)
    radius = ((features - centre) @ basis).norm(dim=1).quantile(0.8)
    basis = torch.nn.functional.pad(basis / radius, (0, dims - kept))  # the plan promised `dims` coordinates
    return Coordinates(networks=networks, centre=centre, basis=basis.contiguous())


def class_means(sums_KD: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Returns means [K, D+1] (the constant coordinate exactly CONSTANT) and counts [K] from noisy sums.

    Args:
      noise: standard deviation of each coordinate of the sums (public).
    """
    counts = (sums_KD[:, -1] / CONSTANT).clamp_min(4 * noise + 1)  # noise alone must not look like a class
    means = sums_KD / counts[:, None]
    means[:, -1] = CONSTANT
    return means, counts


def signed_weights(pool_PD: Tensor, prior_PK: Tensor, means_KD: Tensor, counts_K: Tensor, noise: float) -> Tensor:
    """Returns weights [P, K], nearest to the prior in L2, whose feature means differ from the released ones by no more than the noise does.

    α = α₀ + Φ(ΦᵀΦ + λI)⁻¹(m - Φᵀα₀), with λ for each class by the discrepancy principle: ‖m - Φᵀα‖² = D·(noise/n)².

    Args:
      pool_PD: coordinates of the pool images.
      prior_PK: weights to fall back on, summing to 1 for each class.
    """
    pool, prior = pool_PD.double(), prior_PK.double()
    values, vectors = torch.linalg.eigh(pool.T @ pool)
    values = values.clamp_min(0)
    gap = (means_KD.double().T - pool.T @ prior).T @ vectors  # [K, D], on the eigenvectors
    result = prior.clone()
    for k in range(prior.shape[1]):
        allowed = pool.shape[1] * (noise / float(counts_K[k])) ** 2
        low, high = 1e-9 * float(values[-1]), 1e3 * float(values[-1])
        for _ in range(60):
            ridge = math.sqrt(low * high)
            left = float((gap[k] * ridge / (values + ridge)).square().sum())
            low, high = (ridge, high) if left < allowed else (low, ridge)
        result[:, k] += pool @ (vectors @ (gap[k] / (values + math.sqrt(low * high))))
    return result.float()
