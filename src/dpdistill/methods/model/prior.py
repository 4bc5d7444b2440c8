"""Images that nobody took, without end: procedural ones, moved, mixed and recoloured. What a student is asked about.

B images, C channels, H, W size.
"""

from typing import Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import procedural, procedural_images, to_unit
from ..base import Public, Workspace

Share = float | Literal["auto"]


class PriorSettings(Protocol):
    """What of `Networks` is about the prior."""

    @property
    def prior(self) -> str: ...
    @property
    def given(self) -> Share: ...
    @property
    def figures(self) -> Share: ...
    @property
    def vary(self) -> float: ...
    @property
    def pool(self) -> int: ...
    @property
    def reuse(self) -> int: ...


class Prior:
    """Made-up images without end, the same for the same step: pools of `config.pool`, each passed through `reuse` times."""

    def __init__(self, config: PriorSettings, public: Public, workspace: Workspace) -> None:
        self.config, self.shape, self.workspace = config, public.image_shape, workspace
        # Images from outside: a share of every pool. Without them `auxiliary` is made up, and so is the whole pool.
        self.given = public.auxiliary if public.procedural is not None else public.auxiliary[:0]
        self.number, self.images = -1, torch.empty(0)

    def _pool(self, number: int) -> Tensor:
        if number != self.number:
            g = self.workspace.generator("conversion-pool", number)
            if self.config.prior == "procedural":
                seed = int(torch.randint(2**31, (), generator=g))
                grey = self.shape[0] == 1
                n_given = _share(self.config.given, 0.75 if grey else 0.5, self.config.pool) if len(self.given) else 0
                n_figures = _share(self.config.figures, 0.5 if grey else 0.0, self.config.pool - n_given)
                others = procedural_images(self.config.pool - n_given - n_figures, *self.shape, seed)
                made_up = np.concatenate([to_unit(others), figures(n_figures, self.shape, seed + 1)])
                self.images = torch.from_numpy(made_up)
                if n_given:
                    chosen = torch.randint(len(self.given), (n_given,), generator=g)
                    self.images = torch.cat([self.images, self.given[chosen]])
            else:
                self.images = torch.rand(self.config.pool, *self.shape, generator=g) * 2 - 1
            self.number = number
        return self.images

    def first(self, n: int) -> Tensor:
        """Returns n images, varied as in training."""
        pool = self._pool(0)
        rows = torch.arange(n) % len(pool)
        return vary(pool[rows], self.config.vary, self.workspace.generator("conversion-probe"))

    def batch(self, step: int, n: int) -> Tensor:
        """Returns the n images of a step."""
        if not n:
            return torch.empty(0, *self.shape)
        per_pool = max(1, self.config.pool * self.config.reuse // n)
        pool = self._pool(step // per_pool)
        return pool[torch.randint(len(pool), (n,), generator=self.workspace.generator("conversion-rows", step))]


def _share(setting: Share, default: float, n: int) -> int:
    return round((default if setting == "auto" else setting) * n)


def figures(n: int, image_shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Returns pen strokes and silhouettes, half of each, light on a dark ground: float32 [n, C, H, W] in [-1, 1]."""
    channels, h, w = image_shape
    y_H = (np.arange(h, dtype=np.float32) + 0.5) / h * 2 - 1
    x_W = (np.arange(w, dtype=np.float32) + 0.5) / w * 2 - 1
    x_HW, y_HW = np.meshgrid(x_W, y_H)
    canvas = procedural.Canvas(x_HW=x_HW, y_HW=y_HW, soft=2 / min(h, w), rng=np.random.default_rng(seed))
    out = np.empty((n, *image_shape), np.float32)
    for start in range(0, n, procedural.CHUNK):
        m = min(procedural.CHUNK, n - start)
        kinds = (procedural.strokes, procedural.silhouettes)
        parts = [
            procedural.shaped(kind)(size, channels, canvas)
            for kind, size in zip(kinds, (m - m // 2, m // 2), strict=True)
        ]
        out[start : start + m] = np.concatenate(parts)
    return out.clip(0, 1) * 2 - 1


def vary(x_BCHW: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Returns images moved, mixed with another of the batch, and recoloured, each with chance `share`; in [-1, 1].

    Moves: rotation, scaling, shear and shift. Mixes: a blend, a box cut from the other, the lighter or the darker of both.
    Colours: contrast, brightness, and a little noise. What moves in from outside repeats the edge.
    """
    device, n = x_BCHW.device, len(x_BCHW)
    h, w = x_BCHW.shape[2:]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (torch.rand(n, *shape, generator=generator) * (high - low) + low).to(device)

    def chosen(chance: float) -> Tensor:
        return (torch.rand(n, 1, 1, 1, generator=generator) < chance).to(device)

    angle, sx, sy, shear = uniform(-0.5, 0.5), uniform(-0.5, 0.4).exp(), uniform(-0.5, 0.4).exp(), uniform(-0.3, 0.3)
    rows = torch.stack([angle.cos() * sx, -angle.sin() * sy + shear, uniform(-0.3, 0.3)], dim=1)
    columns = torch.stack([angle.sin() * sx, angle.cos() * sy, uniform(-0.3, 0.3)], dim=1)
    grid = F.affine_grid(torch.stack([rows, columns], dim=1), list(x_BCHW.shape), align_corners=False)
    moved = F.grid_sample(x_BCHW, grid, padding_mode="border", align_corners=False)
    x = torch.where(chosen(share), moved, x_BCHW)

    other = x[torch.randperm(n, generator=generator).to(device)]
    blend = uniform(0, 1, 1, 1, 1)
    y_H = torch.arange(h, device=device)[None, None, :, None] / h
    x_W = torch.arange(w, device=device)[None, None, None, :] / w
    box = ((y_H - uniform(0, 1, 1, 1, 1)).abs() < 0.3) & ((x_W - uniform(0, 1, 1, 1, 1)).abs() < 0.3)
    mixes = (torch.lerp(x, other, blend), torch.where(box, other, x), torch.maximum(x, other), torch.minimum(x, other))
    kind = uniform(0, 1, 1, 1, 1)
    mixed = x
    for i, mix in enumerate(mixes):
        mixed = torch.where((kind * len(mixes)).floor() == i, mix, mixed)
    x = torch.where(chosen(share * 0.6), mixed, x)

    recoloured = x * uniform(0.4, 1.5, 1, 1, 1) + uniform(-0.4, 0.4, x.shape[1], 1, 1)
    noise = torch.randn(x.shape, generator=generator).to(device) * uniform(0, 0.3, 1, 1, 1) * chosen(0.3)
    return torch.where(chosen(share * 0.6), recoloured + noise, x).clamp(-1, 1)
