r"""Fixed features of private records, computed once and kept behind the door, and noisy sums of left ⊗ feature.

The gradient of a linear layer is rank one, (∂loss/∂logits) ⊗ feature: its norm is a product, and a sum over records is one matrix
product of integers, so a full pass over 60,000 records costs a second and not an hour. A feature is a record's own: computing it
releases nothing. Proof: docs/privacy/gaussian_sum.md#rank-one.

N records (never told), B micro-batch, D features, K rows of the layer.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.images import to_unit
from ..data.stored import Images, room
from ..errors import ConfigError, RecordwiseError
from ..privacy.queries import GaussianSum
from .clipping import UNIT_BITS, clip_left, unit_grid
from .private import MAX_BATCH, Passing, PrivateData, Progress, Reservation
from .recordwise import check_recordwise, probed

FeatureFunction = Callable[[Tensor], Tensor]
LeftFunction = Callable[[Tensor, Tensor], Tensor]
STEP = 2.0**-UNIT_BITS
ALIGN = 16  # floats; rows that begin anywhere else have their last bits rounded by where they begin (seen in a third of all rows)


class PrivateFeatures:
    """A handle on the unit-norm feature vectors of private records.

    Args:
      private: the records.
      fn: maps images [B, C, H, W] (float32 in [-1, 1]) to features [B, D]: fixed and public, each row of its own image alone. Rows are
        scaled to norm 1 here, and rounded to a grid of 2**-14; rows that hold NaN, infinity or only zeros become zero.
      dim: D.
      progress: told the fraction of the records passed, when they are.
    """

    # This process's records: whole blocks, each of which is one batch of a sum over all, so that every record keeps its place in it.
    _own: NDArray[np.int64]
    _labels: Tensor

    def __init__(
        self, private: PrivateData, fn: FeatureFunction, dim: int, *, progress: Progress | None = None
    ) -> None:
        self._private, self._fn, self.dim, self._progress = private, fn, dim, progress
        self._stride = -(-dim // ALIGN) * ALIGN
        self._rows: Images | None = None
        self._worst: float | None = None
        self._size = min(4, MAX_BATCH // private.micro_batch) * private.micro_batch

    def check(self, query: GaussianSum, left: LeftFunction) -> None:
        """Raises unless features and `left` treat records alone. Reads no record, charges nothing."""
        width, rest = divmod(query.dim, self.dim)
        if query.n_classes != 1 or rest:
            raise ConfigError(f"query {query.name!r} is not one row of whole feature vectors of {self.dim}")
        # Rounding costs a left factor sqrt(K)/2 + 1 of its 2**(grid_bits - 14) steps: keep it under 1/32.
        if (width**0.5 / 2 + 1) * 32 > 2.0 ** (query.grid_bits - UNIT_BITS):
            raise ConfigError(
                f"grid_bits={query.grid_bits} is too coarse for query {query.name!r}, a sum of rank-one vectors; take up to 30"
            )
        device = self._private.device

        def unit(x: Tensor, y: Tensor) -> Tensor:
            v = self._fn(x.to(device)).double()
            norm: Tensor = v.norm(dim=1, keepdim=True).clamp_min(1e-300)
            return v / norm

        def whole(x: Tensor, y: Tensor) -> Tensor:
            right = self._aligned(unit_grid(self._fn(x.to(device))))
            factor = left(right.clone(), y.to(device))
            if factor.shape != (len(x), width):  # one row for all would pass by broadcasting
                raise RecordwiseError(f"a left factor has shape {tuple(factor.shape)} for {len(x)} records")
            return (factor[:, :, None] * right[:, None, :]).flatten(1)

        shape, classes = self._private.image_shape, self._private.n_classes
        if self._worst is None:  # once, for the features by themselves: a left factor may be 0 where they mix
            self._worst = check_recordwise(unit, shape, classes, self.dim, 1.0)
        worst = max(self._worst, check_recordwise(whole, shape, classes, query.dim, query.clip_norm))
        checks = self._private.checks
        checks[query.name] = max(worst, checks.get(query.name, 0.0))
        self._private._ranks.agree(lambda: probed(whole, shape, classes))

    def release_reserved(self, held: Reservation, index: int, left: LeftFunction) -> Tensor:
        r"""Returns release number `index` of a reservation: the noisy sum over records of clipped left(φ_i, y_i) ⊗ φ_i.

        Guarantee and order of things: as `PrivateData.release`; the ledger's line is that of any other sum.

        Args:
          left: maps features [B, D] (norm at most 1) and labels [B] to [B, K].

        Returns:
          [K, D] float32, a sum.
        """
        query, door = held.query, self._private
        door._fits(query)
        if not isinstance(query, GaussianSum):
            raise ConfigError(f"query {query.name!r} is not a sum over records")
        door._check_charged(held, index)
        self.check(query, left)
        total = door._noisy(held, index, lambda attempt: self._exact_sum(query, left, attempt))
        return total.view(-1, self.dim)

    def _exact_sum(self, query: GaussianSum, left: LeftFunction, name: str) -> NDArray[np.int64]:
        rows, labels = self._features(), self._labels  # private
        chosen = np.arange(len(labels))
        if query.sampling_prob < 1:
            coins = self._private._coins(name, len(self._private._records.labels), query.sampling_prob)
            chosen = np.flatnonzero(coins[self._own])
        width, device = query.dim // self.dim, self._private.device
        size = self._size
        total = torch.zeros(width, self.dim, dtype=torch.int64, device=device)
        for start in range(0, len(chosen), size):
            here = chosen[start : start + size]
            # Always the same shape: a row's arithmetic must not depend on how many rows there are. Zero rows add zero.
            grid = torch.zeros(size, self.dim, dtype=torch.int16)
            grid[: len(here)] = torch.from_numpy(rows[here])
            y = torch.zeros(size, dtype=torch.int64)
            y[: len(here)] = labels[torch.from_numpy(here)]
            grid = grid.to(device)
            with torch.no_grad():
                v = left(self._aligned(grid), y.to(device))
            if v.shape != (size, width):
                raise RecordwiseError(f"a record function returned shape {tuple(v.shape)}, wanted {(size, width)}")
            exact = grid.double()
            # Whole numbers, each product at most 2**grid_bits <= 2**30: a sum of 2**20 of them is exact in float64, in any order.
            total += (clip_left(v, exact, query.clip_norm, query.grid_bits).T @ exact).to(torch.int64)
        return total.reshape(1, -1).cpu().numpy()

    def _aligned(self, grid_BD: Tensor) -> Tensor:
        """Features as floats, every row on a boundary of its own: its arithmetic must not depend on its place."""
        room = torch.zeros(len(grid_BD), self._stride, device=grid_BD.device)
        room[:, : self.dim] = grid_BD * STEP
        return room[:, : self.dim]

    def _features(self) -> Images:
        """Features of this process's records as int16, in steps of 2**-14, in a file where they do not fit in memory; rows of malformed
        records are zero."""
        if self._rows is None:
            private, size = self._private, self._private.micro_batch
            images, labels, told = private._records.images, private._records.labels, Passing(self._progress)
            blocks = private._ranks.mine(range(0, len(labels), self._size))
            ranges = [np.arange(start, min(start + self._size, len(labels))) for start in blocks]
            own = np.concatenate([np.empty(0, np.int64), *ranges])
            result = room((len(own), self.dim), np.dtype(np.int16), private._scratch)
            for start in range(0, len(own), size):
                rows = own[start : start + size]
                n = len(rows)
                x = np.zeros((size, *private.image_shape), np.float32)
                x[:n] = to_unit(images[rows], private._records.value_range)
                y = labels[rows]
                valid = np.isfinite(x[:n]).all(axis=(1, 2, 3)) & (y >= 0) & (y < private.n_classes)
                x[:n][~valid] = 0
                with torch.no_grad():
                    v = self._fn(
                        torch.tensor(x, device=private.device)
                    )  # a copy, where torch puts it: numpy's memory begins anywhere
                if v.shape != (size, self.dim):
                    raise RecordwiseError(
                        f"a feature function returned shape {tuple(v.shape)}, wanted {(size, self.dim)}"
                    )
                grid = unit_grid(v).cpu()[:n]
                grid[~torch.from_numpy(valid)] = 0
                result[start : start + n] = grid.numpy()
                told((start + size) / len(own))
            told(1.0)
            # A row of zeros adds nothing: of a malformed record any label will do that there is.
            self._labels = torch.from_numpy(labels[own].clip(0, private.n_classes - 1))
            self._rows, self._own = result, own
        return self._rows
