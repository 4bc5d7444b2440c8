"""Refuse a function that mixes records: its sensitivity is unknown, and every ε that rests on it false.

Run on made-up images, so the check itself is public. It catches batch statistics, losses over the batch, and per-record gradients that
are silently wrong (a widely used engine returns zeros for channels-last convolutions).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import RecordwiseError
from ..privacy.queries import RECORDWISE_TOLERANCE

RecordFunction = Callable[[Tensor, Tensor], Tensor]
# A batch against one record at a time: is it the right function? Other kernels round otherwise, and a trained network's normalisation
# of an almost constant map blows that up (1e-3 seen); wrong gradient engines are off by 0.07 and more.
TOLERANCE = RECORDWISE_TOLERANCE
# The same row among other rows: does it depend on them? That is what sensitivity rests on. In batches of one shape the arithmetic is the
# same, so a CPU gives the same bits.
MIXING_TOLERANCE = 2e-6
MIXING_TOLERANCE_GPU = 1e-4


def probe(image_shape: tuple[int, int, int], n_classes: int, n: int = 5) -> tuple[Tensor, Tensor]:
    """Returns public images [n, C, H, W] in [-1, 1], smooth and rough ones, and labels [n]."""
    generator = torch.Generator().manual_seed(20261122)
    images = torch.rand(n, *image_shape, generator=generator) * 2 - 1
    images[::2] = torch.nn.functional.avg_pool2d(images[::2], 3, 1, 1) * 2
    return images.clamp(-1, 1), torch.arange(n) % n_classes


def probed(fn: RecordFunction, image_shape: tuple[int, int, int], n_classes: int) -> bytes:
    """Returns what `fn` makes of the made-up images, bit for bit: two processes whose functions differ show it here."""
    return fn(*probe(image_shape, n_classes)).detach().double().cpu().numpy().tobytes()


def check_recordwise(
    fn: RecordFunction, image_shape: tuple[int, int, int], n_classes: int, dim: int, clip_norm: float
) -> float:
    """Returns the largest difference between `fn` of a batch and of one record at a time, relative to what a row counts for.

    That is its norm, or `clip_norm` where the norm is below it: the gradient of a record that is fitted well is small, and its rounding
    large only against itself.

    Args:
      fn: maps images [B, C, H, W] and labels [B] to vectors [B, dim].
      clip_norm: what the rows are clipped to afterwards.

    Raises:
      RecordwiseError: the rows differ by more than rounding, depend on the other rows, have another shape, or are no tensor.
    """
    x, y = probe(image_shape, n_classes)
    raw: object = fn(x.clone(), y.clone())  # clones: a function may write into its arguments
    if not isinstance(raw, Tensor):
        raise RecordwiseError(f"a record function returned {type(raw).__name__}, wanted a torch tensor")
    batch, device = raw.detach().double().cpu(), raw.device.type
    if batch.shape != (len(x), dim):
        raise RecordwiseError(
            f"a record function returned shape {tuple(batch.shape)} for {len(x)} records, wanted {(len(x), dim)}"
        )
    single = torch.cat([fn(x[i : i + 1].clone(), y[i : i + 1].clone()) for i in range(len(x))]).detach().double().cpu()
    scale = single.norm(dim=1).clamp_min(clip_norm)
    worst = float(((batch - single).norm(dim=1) / scale).max())
    apart = []
    for kept in (0, len(x) - 1):
        for y_other in ((y + 1) % n_classes, torch.zeros_like(y)):  # of two classes, exchanged ones are as many of each
            x_other = x.flip(1, 2, 3) * 0.5
            x_other[kept], y_other[kept] = x[kept], y[kept]
            apart.append((fn(x_other, y_other).detach().double().cpu()[kept] - batch[kept]).norm() / scale[kept])
    mixing = float(torch.stack(apart).max())  # NaN where one is, which Python's max() may lose
    if not (worst <= TOLERANCE and mixing <= (MIXING_TOLERANCE if device == "cpu" else MIXING_TOLERANCE_GPU)):
        raise RecordwiseError(
            f"a record function gives other rows in a batch than one record at a time (relative difference {worst:.1e}, "
            f"of which {mixing:.1e} from the other rows; rounding is at most {TOLERANCE:.0e} and {MIXING_TOLERANCE:.0e}); "
            "batch statistics and cross-record terms have no bounded sensitivity"
        )
    return worst
