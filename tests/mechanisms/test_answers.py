"""Noise on one teacher's answers: the stated one, bound to the answers, and the same again for the same answers. B rows, K classes."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from dpdistill.mechanisms import Vault, noisy_rows
from dpdistill.mechanisms.noise import Stream, derive, rounded_gaussian

ROWS = torch.randn(400, 10, generator=torch.Generator().manual_seed(0)).softmax(dim=1) - 0.1


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "key").write_bytes(b"k" * 32)
    return Vault.open(tmp_path / "v")


def noise(rows: Tensor, std: float, vault: Vault, name: str = "step-0") -> Tensor:
    return (noisy_rows(rows, std, vault, name).double() - rows.double()).flatten()


@pytest.mark.parametrize("std", [1e-3, 0.3, 70.0])
def test_the_noise_is_the_stated_one(std: float, vault: Vault) -> None:
    drawn = noise(ROWS.double(), std, vault)
    assert abs(float(drawn.std()) / std - 1) < 4.9 * math.sqrt(0.5 / len(drawn)) + 1e-3
    assert abs(float(drawn.mean()) / std) < 4.9 / math.sqrt(len(drawn))
    assert kstest(drawn.numpy() / std, "norm").pvalue > 1e-4


def test_the_same_rows_the_same_noise_and_any_others_another(vault: Vault) -> None:
    first = noise(ROWS, 1.0, vault)
    assert torch.equal(noise(ROWS, 1.0, vault), first)
    other = ROWS.clone()
    other[0, 0] += 0.01
    for drawn in (noise(other, 1.0, vault), noise(ROWS, 1.0, vault, "step-1"), noise(ROWS, 2.0, vault) / 2):
        assert abs(float(torch.corrcoef(torch.stack([first, drawn]))[0, 1])) < 4.9 / math.sqrt(len(first))


def test_another_run_has_other_noise(vault: Vault, tmp_path: Path) -> None:
    other = Vault.open(tmp_path / "other")
    both = torch.stack([noise(ROWS, 1.0, vault), noise(ROWS, 1.0, other)])
    assert abs(float(torch.corrcoef(both)[0, 1])) < 4.9 / math.sqrt(ROWS.numel())


def test_no_global_seed_reaches_the_noise(vault: Vault) -> None:
    torch.manual_seed(0)
    first = noise(ROWS, 1.0, vault)
    torch.manual_seed(1)
    assert torch.equal(noise(ROWS, 1.0, vault), first)


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, -0.1])
def test_a_bad_scale_is_refused_and_does_not_switch_noise_off(std: float, vault: Vault) -> None:
    with pytest.raises(ValueError):
        noisy_rows(ROWS, std, vault, "step-0")


def test_no_noise_only_where_it_is_asked_for(vault: Vault) -> None:
    assert torch.equal(noisy_rows(ROWS, 0.0, vault, "step-0"), ROWS)
    assert (noisy_rows(ROWS, 1.0, vault, "step-0") != ROWS).all()


def test_a_row_that_is_no_numbers_becomes_noise_alone(vault: Vault) -> None:
    rows = ROWS.clone()
    rows[3, 2], rows[5, 0] = math.nan, math.inf
    seen = noisy_rows(rows, 0.5, vault, "step-0")
    assert torch.isfinite(seen).all()
    assert float(seen[[3, 5]].abs().max()) < 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_keep_their_kind(dtype: torch.dtype, vault: Vault) -> None:
    seen = noisy_rows(ROWS.to(dtype), 0.5, vault, "step-0")
    assert seen.dtype == dtype
    assert seen.shape == ROWS.shape
    assert noisy_rows(torch.zeros(0, 10), 0.5, vault, "none").shape == (0, 10)


@pytest.mark.parametrize(("std", "label"), [(0.5, b"answers 0.5"), (3, b"answers 3.0")])
def test_the_noise_by_hand(std: float, label: bytes, vault: Vault) -> None:
    """In steps of 2**-16, from the stream of these very steps, this name and this scale: a resumed run must draw the same."""
    rows = torch.tensor(
        [[0.1, -2.0], [1.0 + 2.0**-18, 3.0 - 2.0**-17 - 2.0**-20], [math.nan, 5.0]],
        dtype=torch.float64,
        requires_grad=True,
    )
    grid = np.array(
        [[6554, -131072], [65536, 196607], [0, 0]]
    )  # a row that is no numbers says nothing, and no other row does
    key = derive(b"k" * 32, "noise", vault.run, "step-0", label, hashlib.sha256(grid.tobytes()).digest())
    noise = rounded_gaussian(6, std * 65536, Stream(key)).reshape(3, 2)
    seen = noisy_rows(rows, std, vault, "step-0")
    assert seen.numpy().tolist() == ((grid + noise) / 65536).tolist()
