"""Leading principal axes of rows that are public or derive from released values. Nothing here is private.

N rows, D dims, n axes.
"""

import torch
from torch import Tensor

# Dims up to which all axes are computed: that grows with the cube, eleven seconds at 3,072 dims.
EXACT = 1024
OVERSAMPLED, ROUNDS = 20, 2


def principal_axes(rows_ND: Tensor, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Returns axes [D, n'] of unit length and the rows' variances along them [n'], the largest first; n' = min(n, D).

    Args:
      rows_ND: already centred.
      generator: a CPU generator for the start of the iteration; None is one of seed 0.
    """
    count, d = rows_ND.shape
    n = min(n, d)
    if d <= EXACT:
        values, vectors = torch.linalg.eigh((rows_ND.T @ rows_ND).double())
    else:
        basis = _subspace(rows_ND, min(n + OVERSAMPLED, d), generator or torch.Generator().manual_seed(0))
        inside = rows_ND @ basis
        values, rotation = torch.linalg.eigh((inside.T @ inside).double())
        vectors = basis @ rotation.to(basis)
    # In double precision: what no row has must not look like a little of it.
    return vectors.flip(1)[:, :n].to(rows_ND).contiguous(), (values.flip(0)[:n].clamp_min(0) / count).to(rows_ND)


def _subspace(rows_ND: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """An orthonormal basis [D, rank] near the leading axes, by subspace iteration (Halko et al. 2011, Alg. 4.4)."""
    sketch = torch.randn(len(rows_ND), rank, generator=generator).to(rows_ND)
    basis = torch.linalg.qr(rows_ND.T @ sketch)[0]
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(rows_ND.T @ (rows_ND @ basis))[0]
    return basis
