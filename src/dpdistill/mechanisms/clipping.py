r"""Clip vectors onto an integer grid, with the norm checked in exact arithmetic.

C is 2^k grid steps. A row is scaled so that rounding each coordinate cannot push its norm past C, rounded, and then *checked*:
the sum of squares of integers up to 2^k is exact in float64 below 2⁵³, and above it can only round to more than 4^k. A row that
fails, or holds NaN or infinity, becomes zero. A row's own arithmetic is the same wherever it stands in a batch. So sums of rows
are integers: the same bytes in any order. Proof: docs/privacy/gaussian_sum.md.
"""

import torch
from torch import Tensor


def _sum_rows(s_BD: Tensor) -> Tensor:
    """Row sums [B, 1], added in an order fixed by D alone: a library's own order may change with B, threads and device, in the last bit."""
    while s_BD.shape[1] > 1:
        half = (s_BD.shape[1] + 1) // 2
        folded = s_BD[:, :half].clone()
        folded[:, : s_BD.shape[1] - half] += s_BD[:, half:]
        s_BD = folded
    return s_BD


def clip_to_grid(v_BD: Tensor, clip_norm: float, grid_bits: int) -> Tensor:
    """Returns the rows, clipped to L2 norm `clip_norm`, in steps of clip_norm / 2**grid_bits.

    Args:
      v_BD: [B, D], any float type. Rows that hold NaN or infinity count as zero.
      clip_norm: C > 0, in units of `v_BD`.
      grid_bits: k; the squared norm of every returned row is at most 4**k, verified here.

    Returns:
      [B, D] int64.
    """
    limit = float(2**grid_bits)
    v = v_BD.detach().to(torch.float64)
    finite = torch.isfinite(v).all(dim=1, keepdim=True)
    v = torch.where(finite, v, torch.zeros_like(v))
    largest = v.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    unit = v / largest  # scaled to at most 1, so that squares cannot overflow
    norm = _sum_rows(unit * unit).sqrt()
    reach = limit - v.shape[1] ** 0.5 / 2 - 1  # rounding moves a row by at most sqrt(D)/2 steps
    # v·(limit/C), shrunk to `reach` where it is longer: min(largest·limit/C, reach/norm) steps per unit of v/largest.
    steps = torch.minimum(largest * (limit / clip_norm), reach / norm.clamp_min(1e-300))
    grid = torch.round(unit * steps)
    fits = (grid.abs() <= limit).all(dim=1, keepdim=True) & ((grid * grid).sum(dim=1, keepdim=True) <= limit * limit)
    return torch.where(finite & fits, grid, torch.zeros_like(grid)).to(torch.int64)
