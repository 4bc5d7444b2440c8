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

from dpdistill.mechanisms import clipping
from dpdistill.mechanisms.clipping import clip_left, clip_to_grid, unit_grid

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


def test_a_broken_row_costs_no_other_row_anything() -> None:
    rows = torch.tensor([[3.0, 4.0], [math.nan, 1.0], [0.0, 0.0], [1.0, math.inf], [-5e-40, 0.0]])
    unit = unit_grid(rows)
    assert unit.dtype == torch.int16
    assert unit.tolist() == [[9830, 13107], [0, 0], [0, 0], [0, 0], [-(2**14), 0]]
    right = unit_grid(torch.eye(2)[[0, 1, 0, 1, 0]]).double()
    left = clip_left(rows, right, 10.0, 24)
    assert left.dtype == torch.float64
    assert left.tolist() == [[307, 410], [0, 0], [0, 0], [0, 0], [0, 0]]  # steps of 10 / 2**10


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_factors_of_any_number_type_are_widened_first(dtype: torch.dtype) -> None:
    rows = (torch.rand(7, 50, generator=torch.Generator().manual_seed(2)) * 60_000).to(dtype)
    right = unit_grid(rows.double()).double()
    assert torch.equal(unit_grid(rows).double(), right)
    assert torch.equal(clip_left(rows, right, 3.0, 28), clip_left(rows.double(), right, 3.0, 28))


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**-300, 2.0**-30, 2.0**30, 2.0**900])
def test_only_the_ratio_to_the_clip_norm_counts(scale: float) -> None:
    """Also where squares would overflow or vanish."""
    rows = torch.randn(6, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    right = unit_grid(rows).double()
    for clip_norm in (0.5, 2.0, 50.0):
        left, whole = clip_left(rows, right, clip_norm, 28), clip_to_grid(rows, clip_norm, 20)
        assert left.count_nonzero() > 40
        assert torch.equal(clip_left(rows * scale, right, clip_norm * scale, 28), left)
        assert torch.equal(clip_to_grid(rows * scale, clip_norm * scale, 20), whole)
        assert torch.equal(unit_grid(rows * scale).double(), right)


@pytest.mark.parametrize("dim", [1, 2, 37, 400])
def test_a_left_factor_that_is_clipped_keeps_all_but_the_room_for_rounding(dim: int) -> None:
    """All entries alike: rounding moves them all the same way, which takes the most room there may be."""
    for grid_bits, extra in ((24, 0), (28, 3)):
        right = torch.randn(60, dim + extra, generator=torch.Generator().manual_seed(dim)).double()
        right = unit_grid(right).double()
        norms = (right * right).sum(1).sqrt()
        for k in range(dim, dim + 12):
            whole = clip_to_grid(torch.full((1, k), 1e9), 1.0, grid_bits - 14).double().norm()
            assert 2.0 ** (grid_bits - 14) - k**0.5 - 1.001 <= whole <= 2.0 ** (grid_bits - 14)
            left = clip_left(torch.full((60, k), 1e9), right, 1.0, grid_bits)
            length = (left * left).sum(1).sqrt()
            most = 2.0**grid_bits / norms
            assert bool((length <= most).all())
            assert bool((length >= most - k**0.5 - 1.001).all())


def exactly(rows: list[list[int]], most: int) -> list[list[int]]:
    """Rows of whole numbers as they are, or zero where the squared norm is above `most`."""
    return [row if sum(x * x for x in row) <= most else [0] * len(row) for row in rows]


@pytest.mark.parametrize("k", [8, 24])
def test_the_check_by_itself_keeps_the_norm(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the scaling wrong, a row that is too long would be lost and not be released."""
    monkeypatch.setattr(clipping, "_sum_rows", lambda s_BD: torch.full((len(s_BD), 1), 1e-200, dtype=torch.float64))
    limit = 2**k
    rows = [
        [limit, 0],
        [0, -limit],
        [limit, 1],
        [limit + 1, 0],
        [-limit - 1, -1],
        [limit // 2, limit // 2],
        [limit, limit],
    ]
    rows += [
        [limit * 2**20, 0],
        [2**40, 2**40],
        [limit * 3 // 5, limit * 4 // 5],
        [limit * 3 // 5 + 1, limit * 4 // 5 + 1],
    ]
    found = clip_to_grid(torch.tensor(rows, dtype=torch.float64) * 3, 3.0 * limit, k)
    assert found.tolist() == exactly(rows, limit**2)


@pytest.mark.parametrize("k", [18, 30])
def test_the_check_of_a_product_by_itself_keeps_the_norm(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where whole numbers of 64 bits would wrap round to small ones."""
    monkeypatch.setattr(clipping, "_sum_rows", lambda s_BD: torch.full((len(s_BD), 1), 1e-200, dtype=torch.float64))
    one = 2 ** (k - 14)
    rows = [
        [one, 0],
        [0, -one],
        [one + 1, 0],
        [one, 1],
        [one * 3 // 5, one * 4 // 5],
        [one * 2, 0],
        [-one * 2, one * 2],
    ]
    rows += [[one * 2**j, 0] for j in (4, 10, 12, 16, 20, 32)] + [[2**32 + 1, 0], [one // 2, 0]]
    many = [row[:1] * 4096 for row in rows]
    for wide in (rows, many, [[x] * n for x in (one, 2 * one, 3**16) for n in (16,)]):
        for right in ([2**14, 0], [2**13, 2**13], [9000, 9000], [16383, 0]):
            found = clip_left(
                torch.tensor(wide, dtype=torch.float64), torch.tensor([right] * len(wide)).double(), 2.0 ** (k - 14), k
            )
            assert found.tolist() == exactly(wide, 4**k // sum(x * x for x in right))
    # 64 above 2**60, which float64 does not tell from it.
    assert not clip_left(torch.tensor([[65540.0, 4.0]]), torch.tensor([[16383.0, 1.0]]).double(), 2.0**16, 30).any()


def test_a_grid_too_fine_to_be_checked_is_refused() -> None:
    assert clip_to_grid(torch.tensor([[3.0]]), 1.0, 24) >= 2**24 - 2
    with pytest.raises(ValueError, match="grid_bits"):
        clip_to_grid(torch.zeros(1, 1), 1.0, 25)


def test_a_row_wider_than_the_cache_and_others_of_any_length() -> None:
    wide = torch.ones(2, clipping.CACHED + 1)
    assert clip_to_grid(wide, 1e3, 20).unique().tolist() == [2**20 // 1000 + 1]
    rows = torch.tensor([[1.0, -2.0], [3e200, 1e200], [1e-200, 3e-200], [0.0, 0.0]], dtype=torch.float64)
    right = unit_grid(rows.flip(0)).double()
    for clip_norm in (1e-205, 1.0, 1e205):
        alone = [clip_left(rows[i : i + 1], right[i : i + 1], clip_norm, 28) for i in range(4)]
        assert torch.equal(clip_left(rows, right, clip_norm, 28), torch.cat(alone))


def test_a_long_row_keeps_all_but_the_room_that_the_proof_gives_rounding() -> None:
    """docs/privacy/gaussian_sum.md, to the step: 2**k - sqrt(D)/2 - 1. A resumed run has to find the sum that it bound."""
    for dim in (4, 16, 256):
        row = torch.zeros(1, dim)
        row[0, dim // 2] = -1e9
        for k in (8, 20, 24):
            assert clip_to_grid(row, 1.0, k).sum() == -(2**k - math.isqrt(dim) // 2 - 1)
        for k in (24, 30):
            left = clip_left(row, torch.tensor([[0.0, 2.0**14]]).double(), 1.0, k)
            assert left.sum() == -(2 ** (k - 14) - math.isqrt(dim) // 2 - 1)


def test_a_left_factor_is_bounded_by_itself_too() -> None:
    """At most 2**(k - 13), as the proof says, also beside a right factor of zeros, whose product is never too long."""
    rows = torch.tensor([[2.0, -2.0], [2 + 2**-10, 0.0], [0.0, -2.5], [-3.0, 1.0], [1.0, 1.9]])
    left = clip_left(rows, torch.zeros(5, 3).double(), 1.0, 24)
    assert left.tolist() == [[2048, -2048], [0, 0], [0, 0], [0, 0], [1024, 1946]]


def test_rows_are_clipped_a_few_at_a_time_where_caches_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor in parts of at most CACHED numbers, as few as may be. On any other device all at once, and there."""
    parts: list[int] = []
    monkeypatch.setattr(clipping, "_clip_rows", lambda v, *_: (parts.append(len(v)), v.double())[1])
    assert 2**15 <= clipping.CACHED <= 2**20  # fewer, and the calls count; more, and no cache holds them
    monkeypatch.setattr(clipping, "CACHED", 12)
    sizes = {1: [7], 2: [6, 1], 3: [4, 3], 6: [2, 2, 2, 1], 7: [1] * 7, 13: [1] * 7}
    for width, expected in sizes.items():
        parts.clear()
        rows = torch.arange(7.0 * width).view(7, width)
        assert torch.equal(clip_to_grid(rows, 1.0, 20), rows.long())
        assert parts == expected
        parts.clear()
        grid = clip_to_grid(torch.ones(7, width, device="meta"), 1.0, 20)
        assert (grid.device.type, grid.dtype, parts) == ("meta", torch.int64, [7])
    assert clip_to_grid(torch.ones(0, 3, device="meta"), 1.0, 20).shape == (0, 3)
