"""A linear classifier on scattering features: what a small budget teaches best, because noise meets few and even directions.

Sources: Tramèr & Boneh (2021) for the idea; log-scattering as in Andén & Mallat (2014). Everything before the head is a public map,
fitted to public images only; each record is then a vector of norm 1, so that its gradient is an outer product (p - y) ⊗ φ of norm |p - y|.
B records, C channels, J paths, P positions, S scattering features, D features of the head, K classes, N public images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .axes import principal_axes
from .scattering import Scattering

CONSTANT = 0.1  # the last feature of every record: its weights are the bias, learned and clipped like all others

OPPONENT = (
    (0.299, 0.587, 0.114),
    (-0.169, -0.331, 0.5),
    (0.5, -0.419, -0.081),
)  # brightness and two colour differences


class LinearTeacher(nn.Module):
    """Opponent colours, scattering, logarithm, projection on public principal components, unit norm, linear head.

    Before `fit_public`, or loading a state, features are zero but for the constant.

    Args:
      image_shape: (C, H, W), sides of 8 to 64.
      n_classes: K.
      dim: principal components at most.
      scales, angles: of the scattering.
      whitening: power of the variance a component is divided by, halved: 0 leaves them, 1 makes public variances equal.
      floor: added to the variances before that, relative to their mean over the components.
      offset: of the logarithm, relative to a path's public mean; small is closer to a pure logarithm.

    Attributes:
      n_features: D, components plus the constant.
      head: D -> K. Its bias is the weight of the constant feature.
    """

    level: Tensor
    centre: Tensor
    projection: Tensor

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_classes: int,
        *,
        dim: int = 500,
        scales: int = 2,
        angles: int = 8,
        whitening: float = 0.5,
        floor: float = 0.01,
        offset: float = 0.1,
    ) -> None:
        super().__init__()
        if n_classes < 1 or dim < 1 or not 0 <= whitening <= 1 or floor <= 0 or offset <= 0:
            raise ValueError(
                f"Expected {n_classes=} and {dim=} >= 1, {whitening=} in [0, 1], {floor=} and {offset=} > 0."
            )
        self.scattering = Scattering(image_shape, scales=scales, angles=angles)
        self.image_shape, self.n_classes, self.dim = image_shape, n_classes, min(dim, self.scattering.out_dim)
        self.whitening, self.floor, self.offset = whitening, floor, offset
        self._paths = (image_shape[0], self.scattering.n_paths)
        self.register_buffer("level", torch.ones(*self._paths, 1))  # mean of a path in public images
        self.register_buffer("centre", torch.zeros(self.scattering.out_dim))
        self.register_buffer("projection", torch.zeros(self.scattering.out_dim, self.dim))
        self.n_features = self.dim + 1
        self.head = nn.utils.skip_init(nn.Linear, self.n_features, n_classes, bias=False)
        nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def fit_public(self, public_NCHW: Tensor, generator: torch.Generator) -> "LinearTeacher":
        """Fits the map to public images, and returns the model. Never pass private images.

        Principal components of features with one scale per path.

        Args:
          public_NCHW: float32 in [-1, 1]; a few thousand, and more than `dim`: fewer leave components without content.
          generator: a CPU generator, for the start of the iteration.
        """
        if len(public_NCHW) < 2:
            raise ValueError(f"Expected two or more public images, got {len(public_NCHW)}.")
        device = self.level.device
        z_NS = torch.cat([self._scatter(batch.to(device)) for batch in public_NCHW.split(100)])
        self.level.copy_(z_NS.view(-1, *self._paths, self._positions).mean(dim=(0, 3)).clamp_min(1e-6)[..., None])
        for rows in z_NS.split(500):
            rows.copy_(self._logarithm(rows))
        self.centre.copy_(z_NS.mean(dim=0))
        z_NS -= self.centre
        paths = z_NS.view(-1, *self._paths, self._positions)
        scale_CJ1 = paths.square().mean(dim=(0, 3)).sqrt().clamp_min(1e-6)[..., None]
        paths /= scale_CJ1
        basis, variances = principal_axes(z_NS, self.dim, generator)
        gains = (variances + self.floor * variances.mean()).clamp_min(1e-12).pow(-self.whitening / 2)
        gains *= variances > 1e-6 * variances[0]  # directions that no public image has
        self.projection.copy_(basis * gains)
        self.projection.view(*self._paths, self._positions, -1).div_(scale_CJ1[..., None])
        return self

    def narrow(self, dim: int) -> None:
        """Leaves out all components but the first `dim`: they are 0 from now on, and the rest is of norm 1."""
        self.projection[:, dim:] = 0

    @property
    def _positions(self) -> int:
        return self.scattering.map_shape[0] * self.scattering.map_shape[1]

    def _scatter(self, x_BCHW: Tensor) -> Tensor:
        """Scattering, of opponent colours where there are three channels."""
        if x_BCHW.shape[1] == 3:
            red, green, blue = x_BCHW.float().unbind(1)
            x_BCHW = torch.stack([r * red + g * green + b * blue for r, g, b in OPPONENT], dim=1)
        return self.scattering(x_BCHW)

    def _logarithm(self, z_BS: Tensor) -> Tensor:
        """log(1 + z / (offset · level)) of the moduli; the low-passed image, which has a sign, as it is."""
        z = z_BS.view(-1, *self._paths, self._positions)
        moduli = (z[:, :, 1:] / (self.offset * self.level[:, 1:])).log1p()
        return torch.cat([z[:, :, :1], moduli], dim=2).flatten(1)

    @torch.no_grad()
    def features(self, x_BCHW: Tensor) -> Tensor:
        """Returns public features [B, D], float32: each row by itself, of norm 1 once fitted; the last is CONSTANT."""
        z_BD = (self._logarithm(self._scatter(x_BCHW)) - self.centre) @ self.projection
        unit_BD = F.normalize(z_BD) * (1 - CONSTANT**2) ** 0.5
        return F.pad(unit_BD, (0, 1), value=CONSTANT)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns logits [B, K]."""
        return self.head(self.features(x_BCHW))
