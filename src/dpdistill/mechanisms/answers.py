"""Noise on a teacher's answers, for the paper's way with one opaque teacher. It protects one answer, and no training record.

B queries, K classes.
"""

import torch
from torch import Tensor

from .noise import rounded_gaussian
from .vault import Vault

_STEPS_PER_UNIT = 2.0**16


def noisy_rows(rows_BK: Tensor, std: float, vault: Vault, name: str) -> Tensor:
    """Returns the rows, rounded to a grid of 2**-16, plus exact Gaussian noise of standard deviation `std` in every entry.

    A `std` of exactly 0 asks for no noise; one below 0, or NaN, raises ValueError.
    The noise comes from the run's secret key and is bound to the rows, so a resumed run gives the same and nobody can subtract it.
    """
    if std == 0:
        return rows_BK
    rows = rows_BK.detach().double().cpu()
    rows = torch.where(torch.isfinite(rows).all(dim=1, keepdim=True), rows, 0.0)  # a row with NaN says nothing
    grid = (rows * _STEPS_PER_UNIT).round().to(torch.int64).numpy()
    stream = vault.noise_stream(
        name, f"answers {float(std)!r}".encode(), grid
    )  # another std is another noise, not the same one scaled
    noise = rounded_gaussian(grid.size, std * _STEPS_PER_UNIT, stream)
    noisy = torch.from_numpy((grid + noise.reshape(grid.shape)) / _STEPS_PER_UNIT)
    return noisy.to(rows_BK)
