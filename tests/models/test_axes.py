import torch

from dpdistill.models import axes
from dpdistill.models.axes import principal_axes


def rows(n: int, d: int) -> torch.Tensor:
    """Rows whose variance falls by 0.8 from one axis to the next, on axes that are not the coordinates."""
    g = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    x = torch.randn(n, d, generator=g) * 0.8 ** (torch.arange(d) / 2) @ rotation
    return x - x.mean(dim=0)


def test_many_dims_give_the_axes_that_few_would(monkeypatch) -> None:
    x = rows(500, 60)
    exact, exact_variances = principal_axes(x, 8)
    monkeypatch.setattr(axes, "EXACT", 10)
    found, variances = principal_axes(x, 8)
    assert found.shape == exact.shape == (60, 8)
    assert torch.allclose((found * exact).sum(dim=0).abs(), torch.ones(8), atol=1e-3)
    assert torch.allclose(variances, exact_variances, rtol=1e-3)
    assert torch.allclose(variances, (x @ found).square().mean(dim=0), rtol=1e-3)


def test_no_more_axes_than_dims_and_none_of_negative_variance() -> None:
    x = rows(3, 12)  # two axes have all the variance
    found, variances = principal_axes(x, 40)
    assert found.shape == (12, 12)
    assert variances.shape == (12,)
    assert bool((variances >= 0).all())
    assert bool((variances[2:] < 1e-5 * variances[0]).all())


def test_equal_rows_give_equal_axes_whatever_was_drawn_before(monkeypatch) -> None:
    monkeypatch.setattr(axes, "EXACT", 10)
    x = rows(100, 30)
    first = principal_axes(x, 4)[0]
    torch.rand(7)
    assert torch.equal(first, principal_axes(x, 4)[0])
