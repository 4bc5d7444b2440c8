"""The exact denoiser of Gaussian mixtures on a plane of images, in closed form: a diffusion model that needs no training.

For clean images x = centre + basis·u with u ~ Σ_j w_j N(m_j, S) of each class, E[x | x + σn] is the mean, over the components by their
posterior chances, of each one's linear estimate. Nothing here is private: it is a function of what was released.
B images, P pixels, d dims of the plane, K classes, J components.
"""

import torch
from torch import Tensor, nn

FEW = 16  # classes up to which an image goes through all of them: a copy of one's axes for each image is 256 KiB at 256 dims


class MixtureDenoiser(nn.Module):
    """Maps noisy images [B, C, H, W], noise levels [B] and classes [B] to expected clean images. Class K is answered as class K - 1.

    Args:
      centre: [P]; basis: [P, d], orthonormal columns; both in pixels.
      means: [K, J, d], weights: [K, J] (each class's add up to 1), covariance: [K, d, d], of one component; all in pixels.
    """

    def __init__(self, centre: Tensor, basis: Tensor, means: Tensor, weights: Tensor, covariance: Tensor) -> None:
        super().__init__()
        variances, axes = torch.linalg.eigh(covariance)
        for name, value in {
            "centre": centre,
            "basis": basis,
            "axes": axes,  # [K, d, d]
            "variances": variances.clamp_min(0),  # [K, d]
            "means": means @ axes,  # along the axes of its class
            "log_weights": weights.clamp_min(1e-9).log(),
        }.items():
            self.register_buffer(name, value.clone(), persistent=False)
        self.centre: Tensor
        self.basis: Tensor
        self.axes: Tensor
        self.variances: Tensor
        self.means: Tensor
        self.log_weights: Tensor

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        y = y.clamp_max(len(self.means) - 1)
        own_BD, means_BJD = self.variances[y], self.means[y]
        u_BD = _by_class((x.flatten(1) - self.centre) @ self.basis, self.axes, y)
        total_BD = own_BD + sigma.square()[:, None]
        distance_BJ = ((u_BD[:, None] - means_BJD).square() / total_BD[:, None]).sum(dim=2)
        chances_BJ = (self.log_weights[y] - distance_BJ / 2).softmax(dim=1)
        mean_BD = (chances_BJ[:, None] @ means_BJD)[:, 0]
        clean_BD = mean_BD + own_BD / total_BD * (u_BD - mean_BD)
        pixels = _by_class(clean_BD, self.axes.transpose(1, 2), y) @ self.basis.T + self.centre
        return pixels.view(x.shape)


def _by_class(u_BD: Tensor, maps_KDD: Tensor, y_B: Tensor) -> Tensor:
    """Returns each row times the matrix of its class: [B, D]."""
    k, d, _ = maps_KDD.shape
    if k > FEW:
        return (u_BD[:, None] @ maps_KDD[y_B])[:, 0]
    every_BKD = (u_BD @ maps_KDD.transpose(0, 1).reshape(d, k * d)).view(-1, k, d)
    return every_BKD.gather(1, y_B[:, None, None].expand(-1, 1, d))[:, 0]
