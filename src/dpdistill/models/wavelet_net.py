"""The student: moduli of fixed wavelets, then a few learned convolutions. Nothing here is private.

Source: a scattering layer in front of a convolutional network (Oyallon, Belilovsky & Zagoruyko 2017); wavelets as in `models.scattering`.
What private teachers here are linear on begins with the same moduli, and a learned network of this size spends most of its training on
finding them again. No batch statistics: each image by itself.
B images, C channels, H, W size, J scales, L angles, K classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convnet import HalfSize
from .default_weights import draw_weights
from .linear import OPPONENT
from .scattering import FREQUENCY, WIDTH

SCALES, ANGLES, REACH = 2, 8, 5  # J, L, and the half width of a wavelet in pixels
GAIN, FLOOR = 3.0, 1e-4  # log(1 + GAIN · sqrt(|x * ψ|² + FLOOR))
MIN_SIDE = REACH + 1  # what can be mirrored
ROOM, LEAST = 12, 8  # of a map that is halved: the least longer and shorter side


class WaveletNet(nn.Module):
    """Wavelet moduli at half size, a convolution, half of that size again, then more convolutions, and a linear head.

    Maps that are small already are not halved: 8x8 images keep their size. A convolution is 3x3,
    GroupNorm, ReLU. The first has `width` channels, the others twice as many.

    Args:
      image_shape: (C, H, W) of 1 or 3 channels, sides of at least 6; three channels are made brightness and two colour differences first.
      n_classes: K.
      depth: convolutions, at least 1.
      groups: of GroupNorm; divides `width`.
      generator: for the weights; None is one of seed 0. The global random state is left alone.

    Attributes:
      config: what it was made with, for a file.
      embed_dim: length of what the head reads.
    """

    colours: Tensor
    real: Tensor
    imaginary: Tensor

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_classes: int,
        *,
        width: int = 64,
        depth: int = 3,
        groups: int = 4,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        channels, *size = image_shape
        if channels not in (1, 3) or min(size) < MIN_SIDE or min(width, depth, groups, n_classes) < 1 or width % groups:
            raise ValueError(
                f"Expected {image_shape=} of 1 or 3 channels and sides of at least {MIN_SIDE}, {width=}, {depth=}, {n_classes=} of at "
                f"least 1, and {groups=} to divide the width."
            )
        self.config = {
            "image_shape": list(image_shape),
            "n_classes": n_classes,
            "width": width,
            "depth": depth,
            "groups": groups,
        }
        self.image_shape, self.n_classes = image_shape, n_classes
        if channels == 3:
            self.register_buffer("colours", torch.tensor(OPPONENT)[:, :, None, None])
        real, imaginary = wavelets()
        self.register_buffer("real", real.repeat(channels, 1, 1, 1))
        self.register_buffer("imaginary", imaginary.repeat(channels, 1, 1, 1))
        self.pool, size = _halved(size)
        layers: list[nn.Module] = []
        n_in = channels * (1 + SCALES * ANGLES)
        for layer in range(depth):
            n_out = width if layer == 0 else 2 * width
            layers += [nn.utils.skip_init(nn.Conv2d, n_in, n_out, 3, padding=1), nn.GroupNorm(groups, n_out), nn.ReLU()]
            if layer == 0:
                pool, size = _halved(size)
                layers.append(pool)
            n_in = n_out
        self.features = nn.Sequential(*layers)
        self.embed_dim: int = n_in * math.prod(size)
        self.head = nn.utils.skip_init(nn.Linear, self.embed_dim, n_classes)
        draw_weights(self, generator or torch.Generator().manual_seed(0))

    def moduli(self, x_BCHW: Tensor) -> Tensor:
        """Returns the image and logarithms of its wavelet moduli, [B, C · (1 + J L), H / 2, W / 2], where there is room to halve."""
        x = x_BCHW if self.image_shape[0] == 1 else F.conv2d(x_BCHW, self.colours)
        mirrored = F.pad(x, [REACH] * 4, mode="reflect")
        real, imaginary = (F.conv2d(mirrored, w, groups=x.shape[1]) for w in (self.real, self.imaginary))
        moduli = (real.float().square() + imaginary.float().square() + FLOOR).sqrt()
        return self.pool(torch.cat([x.float(), (GAIN * moduli).log1p()], dim=1))

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Returns what the head reads, [B, embed_dim]."""
        return self.features(self.moduli(x_BCHW)).flatten(1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns logits [B, K]."""
        return self.head(self.embed(x_BCHW))


def _halved(size: list[int]) -> tuple[nn.Module, list[int]]:
    """Returns a layer that halves maps of a size, and what it leaves."""
    if min(size) < LEAST or max(size) < ROOM:
        return nn.Identity(), size
    return HalfSize(), [side // 2 for side in size]


def wavelets() -> tuple[Tensor, Tensor]:
    """Returns the real and imaginary parts of Morlet wavelets, [J L, 1, 11, 11] each: no mean, and of norm 1 as complex ones.

    Those of `models.scattering`, cut to a window.
    """
    at = torch.arange(-REACH, REACH + 1, dtype=torch.float64)
    y_RC, x_RC = torch.meshgrid(at, at, indexing="ij")
    found = []
    for j in range(SCALES):
        for k in range(ANGLES):
            angle = math.pi * k / ANGLES
            along = x_RC * math.cos(angle) + y_RC * math.sin(angle)
            across = y_RC * math.cos(angle) - x_RC * math.sin(angle)
            envelope = torch.exp(-0.5 * (along**2 + (across * min(1.0, 4 / ANGLES)) ** 2) / (WIDTH * 2**j) ** 2)
            wave = torch.polar(envelope, FREQUENCY / 2**j * along)
            wave = wave - envelope * (wave.sum() / envelope.sum())
            found.append(wave / wave.abs().square().sum().sqrt())
    both = torch.stack(found)[:, None]
    return both.real.float().contiguous(), both.imag.float().contiguous()
