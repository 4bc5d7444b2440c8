"""Refuse a function that mixes records: its sensitivity is unknown, and every ε that rests on it false.

Run on made-up images, so the check itself is public. It catches batch statistics, losses over the batch, and per-record gradients that
are silently wrong (a widely used engine returns zeros for channels-last convolutions).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import RecordwiseError

RecordFunction = Callable[[Tensor, Tensor], Tensor]
TOLERANCE = 1e-4


def probe(image_shape: tuple[int, int, int], n_classes: int, n: int = 5) -> tuple[Tensor, Tensor]:
    """Returns public images [n, C, H, W] in [-1, 1], smooth and rough ones, and labels [n]."""
    generator = torch.Generator().manual_seed(20261122)
    images = torch.rand(n, *image_shape, generator=generator) * 2 - 1
    images[::2] = torch.nn.functional.avg_pool2d(images[::2], 3, 1, 1) * 2
    return images.clamp(-1, 1), torch.arange(n) % n_classes


def check_recordwise(fn: RecordFunction, image_shape: tuple[int, int, int], n_classes: int, dim: int) -> float:
    """Returns the largest relative difference between `fn` of a batch and of one record at a time.

    Args:
      fn: maps images [B, C, H, W] and labels [B] to vectors [B, dim].

    Raises:
      RecordwiseError: the rows differ by more than 1e-4 of their norm, depend on the other rows, or have another shape.
    """
    x, y = probe(image_shape, n_classes)
    batch = fn(x, y).detach().double().cpu()
    if batch.shape != (len(x), dim):
        raise RecordwiseError(f"a record function returned shape {tuple(batch.shape)} for {len(x)} records, wanted {(len(x), dim)}")
    single = torch.cat([fn(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]).detach().double().cpu()
    others = torch.cat([x[:1], x[1:].flip(0) * 0.5]), torch.cat([y[:1], y[1:].flip(0)])
    mixed = fn(*others).detach().double().cpu()[0]
    scale = single.norm(dim=1).clamp_min(1e-12)
    worst = max(float(((batch - single).norm(dim=1) / scale).max()), float((mixed - single[0]).norm() / scale[0]))
    if not (worst <= TOLERANCE):
        raise RecordwiseError(
            f"a record function gives other rows in a batch than one record at a time (relative difference {worst:.1e}, at most "
            f"{TOLERANCE:.0e} is rounding); batch statistics and cross-record terms have no bounded sensitivity"
        )
    return worst
