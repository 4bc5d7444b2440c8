"""Clipping to the grid: an exact integer norm for every row there is, little change below C, and bit-equal sums in any order.

B rows, D coordinates, C clip_norm, k grid_bits.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dpdistill.mechanisms.clipping import clip_to_grid

WILD = [math.nan, math.inf, -math.inf, 1e38, -3e38, 1e-45, -1e-45, 0.0, -0.0, 1e-38, 1.0, 1e300, 5e-324]


def exact_norms(grid_BD: torch.Tensor) -> list[int]:
    """Squared norms in Python's own integers."""
    return [sum(int(value) ** 2 for value in row) for row in grid_BD.tolist()]


_values = st.one_of(st.sampled_from(WILD), st.floats(-10, 10), st.floats(allow_nan=True, allow_infinity=True))


@settings(max_examples=300)
@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=_values),
    st.sampled_from([1e-30, 0.01, 1.0, 3.7, 1e30]),
    st.integers(8, 24),
)
def test_every_row_is_within_the_norm_exactly(rows: np.ndarray, clip_norm: float, k: int) -> None:
    for dtype in (np.float64, np.float32):
        with np.errstate(over="ignore"):
            given_BD = torch.from_numpy(rows.astype(dtype))
        grid = clip_to_grid(given_BD, clip_norm, k)
        assert grid.dtype == torch.int64
        assert max(exact_norms(grid)) <= 4**k
        broken = ~torch.isfinite(given_BD).all(dim=1)
        assert not grid[broken].any()


@pytest.mark.parametrize("dim", [1, 2, 3, 255, 4096, 60_000, 100_000])
@pytest.mark.parametrize("k", [12, 20, 24])
def test_any_width(dim: int, k: int) -> None:
    if dim > 4 ** (k - 4):
        pytest.skip("refused by the query")
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(4, dim, generator=generator, dtype=torch.float64)
    rows[0] *= 10 / rows[0].norm()
    rows[1] = 1.0  # all coordinates alike
    rows[2] = 0.0
    rows[2, dim // 2] = 1.0  # one-hot at the limit
    rows[3] = 1e38
    grid = clip_to_grid(rows, 1.0, k)
    norms = np.array(exact_norms(grid), float)
    assert norms.max() <= 4**k
    # Long rows keep their direction and lose at most the room that rounding needs.
    assert norms.min() >= (2**k - math.sqrt(dim) - 2) ** 2


@settings(max_examples=100)
@given(st.integers(1, 300), st.floats(1e-3, 0.95), st.sampled_from([0.1, 1.0, 42.0]), st.integers(0, 10**6))
def test_a_row_below_the_norm_moves_by_rounding_only(dim: int, length: float, clip_norm: float, seed: int) -> None:
    row = torch.randn(1, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    row *= length * clip_norm / row.norm()
    grid = clip_to_grid(row, clip_norm, 20).double() * clip_norm / 2**20
    assert float((grid - row).abs().max()) <= clip_norm / 2**20 * 0.5001


def test_a_long_row_keeps_its_direction() -> None:
    row = torch.tensor([[3e30, -4e30, 0.0]])
    grid = clip_to_grid(row, 2.0, 20).double() * 2.0 / 2**20
    assert torch.allclose(grid, torch.tensor([[1.2, -1.6, 0.0]], dtype=torch.float64), atol=1e-4)


@pytest.mark.parametrize("dim", [1, 7, 64, 1000, 9999])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_in_any_order_and_batch(dim: int, threads: int) -> None:
    """Not only the sums: each row by itself, whatever stands beside it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(1)
        rows = torch.randn(33, dim, generator=generator) * torch.logspace(-3, 3, 33)[:, None]
        rows[5], rows[6, 0] = math.nan, math.inf
        whole = clip_to_grid(rows, 1.0, 20)
        order = torch.randperm(33, generator=generator)
        assert torch.equal(clip_to_grid(rows[order], 1.0, 20), whole[order])
        for size in (1, 2, 5, 32):
            assert torch.equal(torch.cat([clip_to_grid(part, 1.0, 20) for part in rows.split(size)]), whole)
        strided = torch.empty(dim, 33).t()
        strided.copy_(rows)
        assert torch.equal(clip_to_grid(strided, 1.0, 20), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_any_number_type(dtype: torch.dtype) -> None:
    """Half precision overflows in a norm of its own; here it is widened first."""
    rows = torch.full((2, 900), 200).to(dtype)
    norms = exact_norms(clip_to_grid(rows, 1.0, 20))
    assert 0.99 * 4**20 < norms[0] <= 4**20


def test_no_rows_and_no_gradient() -> None:
    assert clip_to_grid(torch.zeros(0, 5), 1.0, 20).shape == (0, 5)
    row = torch.ones(1, 5, requires_grad=True)
    assert not clip_to_grid(row, 1.0, 20).requires_grad
