r"""Clip vectors onto an integer grid, with the norm checked in exact arithmetic.

C is 2^k grid steps. A row is scaled so that rounding each coordinate cannot push its norm past C, rounded, and then *checked*:
the sum of squares of integers up to 2^k is exact in float64 below 2⁵³, and above it can only round to more than 4^k. A row that
fails, or holds NaN or infinity, becomes zero. A row's own arithmetic is the same wherever it stands in a batch. So sums of rows
are integers: the same bytes in any order. Proof: docs/privacy/gaussian_sum.md.
"""

import torch
from torch import Tensor

MAX_BITS = 24
CACHED = 2**18  # numbers, in all rows that are clipped at once
UNIT_BITS = 14  # of a unit vector: its entries fit int16


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
    if grid_bits > MAX_BITS:
        raise ValueError(f"Expected {grid_bits=} of at most {MAX_BITS}: above, the norm is not checked exactly.")
    # A few rows at a time: temporaries that fit a processor's caches make this six times as fast.
    few = max(1, CACHED // v_BD.shape[1] if v_BD.device.type == "cpu" else len(v_BD))
    grid = v_BD.new_empty(v_BD.shape, dtype=torch.int64)
    for start in range(0, len(v_BD), few):
        grid[start : start + few] = _clip_rows(v_BD[start : start + few], clip_norm, grid_bits)
    return grid


def _clip_rows(v_BD: Tensor, clip_norm: float, grid_bits: int) -> Tensor:
    """As `clip_to_grid`, all rows at once, as float64."""
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
    return torch.where(fits, grid, torch.zeros_like(grid))


def unit_grid(v_BD: Tensor) -> Tensor:
    """Returns the rows scaled to norm 1, in steps of 2**-14, as int16 [B, D]. Rows with NaN, infinity or no length become zero."""
    v = v_BD.detach().to(torch.float64)
    finite = torch.isfinite(v).all(dim=1, keepdim=True)
    v = torch.where(finite, v, torch.zeros_like(v))
    unit = v / v.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    norm = _sum_rows(unit * unit).sqrt().clamp_min(1e-300)
    return torch.round(unit / norm * 2**UNIT_BITS).to(torch.int16)


def clip_left(v_BK: Tensor, right_BD: Tensor, clip_norm: float, grid_bits: int) -> Tensor:
    """Returns rows of whole numbers l such that l ⊗ right has norm at most 2**grid_bits, checked in exact integers.

    One step of l ⊗ right is clip_norm / 2**grid_bits, and one of `right` 2**-14: l is v in steps of clip_norm / 2**(grid_bits - 14).

    Args:
      v_BK: left factors, any float type. Rows that hold NaN or infinity count as zero.
      right_BD: right factors: whole numbers of `unit_grid`, as float64.

    Returns:
      [B, K] float64, whole numbers.
    """
    limit = 2**grid_bits
    v = v_BK.detach().to(torch.float64)
    finite = torch.isfinite(v).all(dim=1, keepdim=True)
    v = torch.where(finite, v, torch.zeros_like(v))
    squares = (right_BD * right_BD).sum(dim=1, keepdim=True)  # whole, below 2**53: exact in any order
    largest = v.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    unit = v / largest  # at most 1, so that squares cannot overflow
    norm = _sum_rows(unit * unit).sqrt().clamp_min(1e-300)
    reach = (
        limit / squares.sqrt().clamp_min(1.0) - v.shape[1] ** 0.5 / 2 - 1
    )  # rounding moves a row by at most sqrt(K)/2 steps
    steps = torch.minimum(largest * (2.0 ** (grid_bits - UNIT_BITS) / clip_norm), reach / norm).clamp_min(0.0)
    grid = torch.round(unit * steps)
    whole, wide = grid.to(torch.int64), squares.to(torch.int64)
    own = (whole * whole).sum(dim=1, keepdim=True)
    # Exact: |grid| <= 2**17 keeps `own` from wrapping, and a product that wraps is one that float64 sees beyond 2**62.
    fits = (grid.abs() <= 2.0 ** (grid_bits - UNIT_BITS) * 2).all(dim=1, keepdim=True)
    fits &= (own * squares < 2.0**62) & (own * wide <= limit * limit)
    return torch.where(fits, grid, torch.zeros_like(grid))
