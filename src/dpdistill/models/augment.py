"""Two public, differentiable maps of images: multi-formation decoding, and Siamese augmentation.

Sources: `expand` is IDC (Kim et al. 2022), called PEA in Dosser; `Dsa` is DSA (Zhao & Bilen 2021). Nothing here is
private. All random numbers come from a generator that is passed in: Dosser's augmentation reseeds the global one, and
with it the privacy noise that is drawn next.
B images, C channels, H, W size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")
FULL_STRATEGY = "_".join(OPERATIONS)
_UNIFORMS = 3  # the most numbers an operation needs


def expand(images_MCHW: Tensor, parts: int, gain: int = 1) -> Tensor:
    """Cuts each image into parts x parts tiles and upsamples each to the full size, bilinearly.

    Tiles of one image follow each other, row by row, so that labels become `labels.repeat_interleave(parts**2)`. Where
    the size is not a multiple of `parts`, neighbouring tiles share a row or column.

    Args:
      gain: factor on the result, which is then cut to [-1, 1]. With 1 a tile is as blurred as its enlargement; with more
        its edges may be sharp, and lie between pixels (ours: docs/decisions/joint.md).

    Returns:
      [M·parts², C, H, W]; the very images where parts = 1 and gain = 1.
    """
    if gain != 1:
        return (gain * expand(images_MCHW, parts)).clamp(-1, 1)
    if parts == 1:
        return images_MCHW
    m, c, h, w = images_MCHW.shape
    if not (1 < parts <= min(h, w)):
        raise ValueError(f"Expected {parts=} between 1 and the image size, {min(h, w)}.")
    tile_h, tile_w = -(-h // parts), -(-w // parts)
    tops = [round(i * (h - tile_h) / (parts - 1)) for i in range(parts)]
    lefts = [round(i * (w - tile_w) / (parts - 1)) for i in range(parts)]
    tiles = [images_MCHW[:, :, top : top + tile_h, left : left + tile_w] for top in tops for left in lefts]
    stacked = torch.stack(tiles, dim=1).reshape(m * parts**2, c, tile_h, tile_w)
    return F.interpolate(stacked, size=(h, w), mode="bilinear", align_corners=False)


@dataclass(frozen=True, kw_only=True)
class Dsa:
    """Differentiable Siamese augmentation: one operation per draw, out of those named in `strategy`.

    A draw is a row of 1 + 3 numbers: the operation, and three uniforms that stand for its parameters. Draws are public
    and small, so they are kept instead of seeds; equal draws give equal transformations ("Siamese").

    Attributes:
      strategy: names of `OPERATIONS` joined by "_"; leave out "flip" for digits and letters. "" or "none" is the
        identity.
      brightness: added to all pixels, uniform in ± half of it.
      saturation: factor on the difference from the pixel's grey value, uniform in [0, saturation].
      contrast: factor on the difference from the image's mean, uniform in [contrast, 1 + contrast].
      crop: largest shift, as a share of the side.
      cutout: side of the square that is blanked, as a share of the side.
      flip: probability of a mirror image.
      scale: largest stretch or shrink factor of either side.
      rotate: largest angle in degrees.
      fill: pixel value of what is cut out or moves in from outside; 0 is mid-grey, as in the papers.
    """

    strategy: str = FULL_STRATEGY
    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    crop: float = 0.125
    cutout: float = 0.5
    flip: float = 0.5
    scale: float = 1.2
    rotate: float = 15.0
    fill: float = 0.0

    def __post_init__(self) -> None:
        for name in self.operations:
            if name not in OPERATIONS:
                raise ValueError(f"Unknown augmentation {name!r} in {self.strategy!r}; choose from {FULL_STRATEGY}.")

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations of the strategy, in its order."""
        return () if self.strategy in ("", "none") else tuple(self.strategy.split("_"))

    def draw(self, generator: torch.Generator, n: int = 1) -> Tensor:
        """Returns n independent draws, [n, 4]: index into `operations`, and three uniforms in [0, 1)."""
        which = torch.randint(max(1, len(self.operations)), (n, 1), generator=generator)
        return torch.cat([which.float(), torch.rand(n, _UNIFORMS, generator=generator)], dim=1)

    def draw_batch(self, generator: torch.Generator, n: int) -> Tensor:
        """Returns draws for the n images of one training batch, [n, 4]: one operation, parameters of each image's
        own."""
        draws = self.draw(generator, n)
        draws[:, 0] = draws[:1, 0]
        return draws

    def apply(self, x_BCHW: Tensor, draws: Tensor) -> Tensor:
        """Returns the images, each transformed by its own draw, or all by the same; differentiable in the images.

        Args:
          draws: [B, 4] or [1, 4], from `draw` or `draw_batch`. Each row of the result depends on its own row only.
        """
        draws = draws.expand(len(x_BCHW), -1).to(x_BCHW.device)
        result = x_BCHW
        for index, name in enumerate(self.operations):
            chosen_B = draws[:, 0] == index
            if bool(chosen_B.any()):
                # The whole batch, then a choice: a row's arithmetic must not depend on the other rows' operations.
                changed = self._operation(name)(x_BCHW, draws[:, 1:])
                result = torch.where(chosen_B[:, None, None, None], changed, result)
        return result

    def _operation(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return {
            "color": self._color,
            "crop": self._crop,
            "cutout": self._cutout,
            "flip": self._flip,
            "scale": self._scale,
            "rotate": self._rotate,
        }[name]

    def _color(self, x: Tensor, u: Tensor) -> Tensor:
        bright, saturate, contrast = u[:, :, None, None, None].unbind(1)
        x = x + (bright - 0.5) * self.brightness
        grey = x.mean(dim=1, keepdim=True)
        x = (x - grey) * (saturate * self.saturation) + grey
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        return (x - mean) * (contrast + self.contrast) + mean

    def _crop(self, x: Tensor, u: Tensor) -> Tensor:
        for dim, column in ((2, 0), (3, 1)):
            side = x.shape[dim]
            reach = int(side * self.crop + 0.5)
            shift = (u[:, column] * (2 * reach + 1)).floor().long() - reach
            source = torch.arange(side, device=x.device) + shift[:, None]
            shape = (-1, 1, side, 1) if dim == 2 else (-1, 1, 1, side)
            inside = ((source >= 0) & (source < side)).view(shape)
            moved = x.gather(dim, source.clamp(0, side - 1).view(shape).expand_as(x))
            x = torch.where(inside, moved, moved.new_tensor(self.fill))
        return x

    def _cutout(self, x: Tensor, u: Tensor) -> Tensor:
        blank = torch.ones((), dtype=torch.bool, device=x.device)
        for dim, column in ((2, 0), (3, 1)):
            side = x.shape[dim]
            length = int(side * self.cutout + 0.5)
            middle = (u[:, column] * (side + 1 - length % 2)).floor()
            first = (middle - length // 2)[:, None]
            position = torch.arange(side, device=x.device)
            covered = (position >= first) & (position < first + length)
            blank = blank & covered.view((-1, 1, side, 1) if dim == 2 else (-1, 1, 1, side))
        return torch.where(blank, x.new_tensor(self.fill), x)

    def _flip(self, x: Tensor, u: Tensor) -> Tensor:
        return torch.where((u[:, 0] < self.flip)[:, None, None, None], x.flip(3), x)

    def _scale(self, x: Tensor, u: Tensor) -> Tensor:
        low = 1 / self.scale
        factor = u[:, :2] * (self.scale - low) + low
        zero = torch.zeros_like(factor[:, 0])
        return self._warp(x, torch.stack([factor[:, 0], zero, zero, factor[:, 1]], dim=1))

    def _rotate(self, x: Tensor, u: Tensor) -> Tensor:
        angle = (u[:, 0] * 2 - 1) * (self.rotate * math.pi / 180)
        cos, sin = angle.cos(), angle.sin()
        return self._warp(x, torch.stack([cos, sin, -sin, cos], dim=1))

    def _warp(self, x: Tensor, matrix_B4: Tensor) -> Tensor:
        """Samples x at matrix · (column, row), bilinearly, in coordinates from -1 to 1."""
        h, w = x.shape[2:]
        row = ((torch.arange(h, device=x.device) * 2 + 1) / h - 1)[None, :, None]
        column = ((torch.arange(w, device=x.device) * 2 + 1) / w - 1)[None, None, :]
        a, b, c, d = matrix_B4[:, :, None, None].unbind(1)
        grid = torch.stack([a * column + b * row, c * column + d * row], dim=3)
        moved = F.grid_sample(
            x - self.fill, grid.to(x.dtype), mode="bilinear", padding_mode="zeros", align_corners=False
        )
        return moved + self.fill
