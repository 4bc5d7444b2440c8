"""A small class-conditional denoiser of linear layers, layer norms and attention: per-record gradients of it are cheap.

Source: preconditioning of Karras et al. (2022), Table 1; transformer on patches after Peebles & Xie (2023), without gates.
B images, C channels, H, W size, K classes, T patches, D numbers in a patch, E width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError

FREQUENCIES = 16  # of the noise level's features: half as many octaves of log σ
MLP_RATIO = 2
MOST = 2**22  # depth · width²: 50 million weights; the gradients of a few records have to fit in memory


def check_sizes(*, width: int | None, depth: int, heads: int) -> None:
    """Raises ConfigError on sizes, all of at least 1, that no denoiser has. A width of None is one that fits."""
    if width is not None and width % heads:
        raise ConfigError(f"Expected heads={heads} to divide width={width}.")
    if depth * max(width or 1, heads) ** 2 > MOST:
        raise ConfigError(f"Expected depth · width² of at most {MOST:,}, got {depth=}, {width=} and {heads=}.")


def check_patch(patch: int | None, image_shape: tuple[int, int, int]) -> None:
    """Raises ConfigError on a patch larger than the images. A patch of None is one that fits."""
    side = max(image_shape[1:])
    if patch is not None and patch > side:
        raise ConfigError(f"Expected patch of at most {side}, the side of the images, got {patch}.")


class Denoiser(nn.Module):
    """Maps noisy images [B, C, H, W], noise levels [B] and classes [B] to expected clean images [B, C, H, W]; class K is "any".

    One patch that covers the image makes it a residual MLP, which is both better and cheaper on tiny images.

    Args:
      patch: side of the square patches; images that it does not divide are padded inside.
      width: E, a multiple of `heads`.
      sigma_data: standard deviation of clean pixels about 0: a public guess.
      generator: of the weights, a CPU one. The global random state is left alone.
      base: a denoiser without parameters that this one corrects; without one, it corrects a multiple of the noisy image.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_classes: int,
        *,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        sigma_data: float = 0.5,
        generator: torch.Generator,
        base: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if min(n_classes, patch, width, depth, heads) < 1 or width % heads:
            raise ValueError(f"Expected {heads=} to divide {width=}, and all of {n_classes=}, {patch=}, {depth=} >= 1.")
        if not 0 < sigma_data < math.inf:
            raise ValueError(f"Expected a finite {sigma_data=} above 0.")
        self.image_shape, self.n_classes, self.patch, self.sigma_data = image_shape, n_classes, patch, sigma_data
        self.config = {
            "image_shape": list(image_shape),
            "n_classes": n_classes,
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads,
            "sigma_data": sigma_data,
        }
        channels, height, width_px = image_shape
        self.grid = (-(-height // patch), -(-width_px // patch))
        n_tokens, n_numbers = self.grid[0] * self.grid[1], channels * patch**2
        self.first = _linear(n_numbers, width, generator)
        self.place = nn.Parameter(torch.randn(n_tokens, width, generator=generator) * 0.1)
        self.level = _linear(FREQUENCIES, width, generator)
        self.classes = nn.Parameter(torch.randn(n_classes + 1, width, generator=generator))
        self.blocks = nn.ModuleList(_Block(width, heads if n_tokens > 1 else 0, generator) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        # Starts near what it corrects, and not at a dead zero.
        self.last = _linear(width, n_numbers, generator, scale=0.1 if base is None else 0.02)
        self.base = base
        octaves = math.pi / 4 * 2.0 ** (torch.arange(FREQUENCIES // 2) / 2)
        self.register_buffer("octaves", octaves, persistent=False)
        self.octaves: Tensor

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
        s, data = sigma.view(-1, 1, 1, 1), self.sigma_data
        total = (s.square() + data**2).sqrt()
        # Eq. 7 and Table 1: D = c_skip·x + c_out·F(c_in·x; ln σ / 4), or a better guess in place of c_skip·x.
        guess = (data / total).square() * x if self.base is None else self.base(x, sigma, y)
        return guess + s * data / total * self._network(x / total, sigma.log() / 4, y)

    def _network(self, x: Tensor, level_B: Tensor, y: Tensor) -> Tensor:
        """F: everything here is of order 1."""
        phase = level_B[:, None] * self.octaves
        condition = self.level(torch.cat([phase.cos(), phase.sin()], dim=1))
        # A product with 0 and 1 in place of an index: it maps over records as it is.
        one_hot = (y[:, None] == torch.arange(self.n_classes + 1, device=y.device)).to(x.dtype)
        condition = condition + one_hot @ self.classes
        tokens = self.first(self._patches(x)) + self.place + condition[:, None]
        condition = F.silu(condition)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self._image(self.last(self.norm(tokens)))

    def _patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, D], padded with zeros below and at the right."""
        (channels, height, width), (rows, columns), p = self.image_shape, self.grid, self.patch
        x = F.pad(x, (0, columns * p - width, 0, rows * p - height))
        x = x.reshape(-1, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(len(x), rows * columns, -1)

    def _image(self, tokens_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, C, H, W]: the inverse of `_patches`."""
        (channels, height, width), (rows, columns), p = self.image_shape, self.grid, self.patch
        x = tokens_BTD.reshape(-1, rows, columns, channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(-1, channels, rows * p, columns * p)[:, :, :height, :width]


class _Block(nn.Module):
    """Attention (where heads > 0) and an MLP, each on tokens that are normalised, then scaled and shifted by the condition."""

    def __init__(self, width: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.modulation = _linear(width, (4 if heads else 2) * width, generator, scale=0.5)
        if heads:
            self.qkv = _linear(width, 3 * width, generator)
            self.mixed = _linear(width, width, generator)
        self.up = _linear(width, MLP_RATIO * width, generator)
        self.down = _linear(MLP_RATIO * width, width, generator)

    def forward(self, x_BTE: Tensor, condition_BE: Tensor) -> Tensor:
        scale, shift, *rest = self.modulation(condition_BE)[:, None].chunk(4 if self.heads else 2, dim=2)
        if self.heads:
            x_BTE = x_BTE + self._attention(self._normal(x_BTE) * (1 + scale) + shift)
            scale, shift = rest
        return x_BTE + self.down(F.silu(self.up(self._normal(x_BTE) * (1 + scale) + shift)))

    def _normal(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,))

    def _attention(self, x_BTE: Tensor) -> Tensor:
        b, t, e = x_BTE.shape
        q, k, v = self.qkv(x_BTE).reshape(b, t, 3, self.heads, e // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * (e // self.heads) ** -0.5).softmax(dim=3)
        return self.mixed((weights @ v).transpose(1, 2).reshape(b, t, e))


def _linear(n_in: int, n_out: int, generator: torch.Generator, scale: float = 1.0) -> nn.Linear:
    """A linear layer with uniform weights of variance scale²/(3·n_in), PyTorch's own at scale 1, and no bias to start with."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
    with torch.no_grad():
        layer.weight.copy_((torch.rand(n_out, n_in, generator=generator) * 2 - 1) * scale * n_in**-0.5)
        layer.bias.zero_()
    return layer
