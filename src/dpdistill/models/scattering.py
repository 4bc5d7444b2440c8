"""Scattering features: a deep-looking feature map without a single learned number, hence nothing private in it.

Source: Bruna & Mallat (2013); Oyallon & Mallat (2015); filters as in kymatio (Andreux et al. 2020). A linear classifier on top is the
strong small-budget baseline of Tramèr & Boneh (2021). Every record is treated by itself.
B images, C channels, H, W size; J scales, L angles; P padded side, G = P / 2^j side of a map at scale j; D features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, FREQUENCY = (
    0.8,
    0.75 * math.pi,
)  # of the finest wavelet: standard deviation in pixels, centre in radians per pixel


def _map_shape(image_shape: tuple[int, int, int], scales: int) -> tuple[int, int]:
    _, height, width = image_shape
    return max(1, round(height / 2**scales)), max(1, round(width / 2**scales))


def _n_paths(scales: int, angles: int) -> int:
    return 1 + scales * angles + angles**2 * scales * (scales - 1) // 2


def n_features(image_shape: tuple[int, int, int], *, scales: int = 2, angles: int = 8) -> int:
    """Returns `Scattering(…).out_dim` without making the filters."""
    return image_shape[0] * _n_paths(scales, angles) * math.prod(_map_shape(image_shape, scales))


class Scattering(nn.Module):
    """Low-passed image, low-passed moduli of Morlet wavelets, and of wavelets of those moduli: orders 0, 1 and 2.

    A map is kept at the rate its band needs: at scale j a window of the spectrum, P / 2^j wide and centred on the wavelet, is transformed
    back. Moving a spectrum does not change the modulus, so this is the plain definition up to the tails that the window leaves out.

    Args:
      image_shape: (C, H, W), sides of 8 to 64.
      scales: J. The features are averages over about 2^J pixels, one per 2^J pixels.
      angles: L orientations in half a turn.

    Attributes:
      n_paths: 1 + J L + L² J (J - 1) / 2 maps for each channel: 81 at the default.
      map_shape: (H', W') of each, sides rounded from H / 2^J.
      out_dim: D = C · n_paths · H' · W', in this order: 3,969 for 1x28x28, 15,552 for 3x32x32.
    """

    def __init__(self, image_shape: tuple[int, int, int], *, scales: int = 2, angles: int = 8) -> None:
        super().__init__()
        channels, height, width = image_shape
        if channels < 1 or not (8 <= height <= 64 and 8 <= width <= 64):
            raise ValueError(f"Expected {image_shape=} of at least one channel and sides in 8..64.")
        if angles < 1 or scales < 1 or 2**scales > min(height, width):
            raise ValueError(f"Expected {angles=} >= 1 and {scales=} >= 1 with 2**scales <= {min(height, width)}.")
        self.image_shape, self.scales, self.angles = image_shape, scales, angles
        self.map_shape = _map_shape(image_shape, scales)
        self.n_paths = _n_paths(scales, angles)
        self.out_dim: int = n_features(image_shape, scales=scales, angles=angles)
        padded = [_padded(side, scales) for side in (height, width)]
        before = [(p - side) // 2 for p, side in zip(padded, (height, width), strict=True)]
        self._padding = [before[1], padded[1] - width - before[1], before[0], padded[0] - height - before[0]]
        for j in range(scales):
            for i in range(max(1, j)):  # on maps of scale i: the image itself (0) and moduli of finer scales
                found = [_wavelet(padded, i, j, math.pi * k / angles, min(1.0, 4 / angles)) for k in range(angles)]
                self.register_buffer(f"filters_{i}_{j}", torch.stack([f for f, _ in found]).float(), persistent=False)
                self.register_buffer(f"windows_{i}_{j}", torch.stack([w for _, w in found]), persistent=False)
            for axis, side in enumerate((height, width)):
                centres = (torch.arange(self.map_shape[axis]).double() + 0.5) * side / self.map_shape[axis] - 0.5
                rows = _low_pass(centres + before[axis], padded[axis], j, WIDTH * 2 ** (scales - 1))
                self.register_buffer(f"average_{j}_{axis}", rows.float(), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns features [B, D], float32."""
        if tuple(x_BCHW.shape[1:]) != self.image_shape:
            raise ValueError(f"Expected images of shape {self.image_shape}, got {tuple(x_BCHW.shape)}.")
        if not len(x_BCHW):
            return x_BCHW.new_zeros(0, self.out_dim, dtype=torch.float32)
        x = F.pad(x_BCHW.float(), self._padding, mode="reflect").flatten(0, 1)[:, None]  # [BC, 1, P, P]
        paths, spectrum = [self._average(x, 0)], torch.fft.fft2(x)
        second: list[Tensor] = []
        for j in range(self.scales):
            first = self._modulus(spectrum, 0, j)  # [BC, L, G, G]
            paths.append(self._average(first, j))
            if j + 1 == self.scales:
                break
            # One angle at a time: the L² maps of a pair of scales do not fit a processor's cache.
            for angle in first.split(1, dim=1):
                inner = torch.fft.fft2(angle)
                second += [self._average(self._modulus(inner, j, k), k) for k in range(j + 1, self.scales)]
        return torch.cat(paths + second, dim=1).view(len(x_BCHW), -1)

    def _modulus(self, spectrum: Tensor, i: int, j: int) -> Tensor:
        """Moduli of the wavelets of scale j on a map of scale i, given by its spectrum [BC, 1, G, G]: [BC, L, G', G']."""
        filters, windows = getattr(self, f"filters_{i}_{j}"), getattr(self, f"windows_{i}_{j}")
        picked = spectrum.flatten(1).index_select(1, windows.flatten()).view(len(spectrum), *filters.shape)
        return torch.fft.ifft2(picked * filters).abs()

    def _average(self, maps: Tensor, j: int) -> Tensor:
        """Gaussian averages of maps of scale j around the H' x W' sampling points."""
        over_width = maps @ getattr(self, f"average_{j}_1").T
        return getattr(self, f"average_{j}_0") @ over_width


def _padded(side: int, scales: int) -> int:
    """A multiple of 2^J, about 2^J more than the side in front and behind, as far as there is something to mirror."""
    step = 2**scales
    wanted = (side // step + 2) * step
    return wanted if wanted - side <= 2 * (side - 1) else wanted - step


def _wavelet(padded: list[int], i: int, j: int, angle: float, slant: float) -> tuple[Tensor, Tensor]:
    """Morlet wavelet of scale j on maps of scale i: values [G', G'] in the window around its centre, and where that lies."""
    sigma, centre = WIDTH * 2**j, FREQUENCY / 2**j
    xi = (centre * math.sin(angle), centre * math.cos(angle))  # rows, columns
    grids, targets = [p >> i for p in padded], [p >> j for p in padded]
    bins = [
        torch.arange(g) + round(w * p / (2 * math.pi)) - g // 2 for g, w, p in zip(targets, xi, padded, strict=True)
    ]

    def bump(rows: Tensor, columns: Tensor, at: tuple[float, float]) -> Tensor:
        """Gaussian around `at` in the spectrum, summed over the copies that sampling makes."""
        total = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        for up in range(-2, 3):
            for right in range(-2, 3):
                y = (rows / padded[0] + up / 2**i)[:, None] * 2 * math.pi - at[0]
                x = (columns / padded[1] + right / 2**i)[None] * 2 * math.pi - at[1]
                along, across = y * math.sin(angle) + x * math.cos(angle), y * math.cos(angle) - x * math.sin(angle)
                total += torch.exp(-0.5 * sigma**2 * (along**2 + (across / slant) ** 2))
        return total

    zero = torch.zeros(1, dtype=torch.float64)
    share = bump(zero, zero, xi) / bump(zero, zero, (0.0, 0.0))  # no response to a constant
    rows, columns = (n.double() for n in bins)
    values = bump(rows, columns, xi) - share * bump(rows, columns, (0.0, 0.0))
    window = (bins[0] % grids[0])[:, None] * grids[1] + bins[1] % grids[1]
    return values * math.prod(targets) / math.prod(grids), window


def _low_pass(centres: Tensor, padded: int, j: int, sigma: float) -> Tensor:
    """Rows of weights [n, P / 2^j] that average a map of scale j around pixels `centres`; each sums to 1."""
    apart = (torch.arange(padded >> j).double() * 2**j - centres[:, None] + padded / 2) % padded - padded / 2
    weights = torch.exp(-0.5 * (apart / sigma) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)
