"""The closed form against sums over many draws, and against what has to hold at both ends of the noise."""

import pytest
import torch
from torch import Tensor

from dpdistill.models import mixture_denoiser
from dpdistill.models.mixture_denoiser import MixtureDenoiser

K, J, D, P = 2, 3, 2, 9


def parts() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(K, D, D, generator=g) * 0.5
    return {
        "centre": torch.rand(P, generator=g) - 0.5,
        "basis": torch.linalg.qr(torch.randn(P, D, generator=g))[0],
        "means": torch.randn(K, J, D, generator=g),
        "weights": torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]]),
        "covariance": root @ root.transpose(1, 2),
    }


def draw(p: dict[str, Tensor], k: int, n: int, g: torch.Generator) -> Tensor:
    j = torch.multinomial(p["weights"][k], n, replacement=True, generator=g)
    u = p["means"][k][j] + torch.randn(n, D, generator=g) @ torch.linalg.cholesky(p["covariance"][k]).T
    return u @ p["basis"].T + p["centre"]


def test_it_is_the_posterior_mean() -> None:
    p, g = parts(), torch.Generator().manual_seed(1)
    model = MixtureDenoiser(**p)
    for k in range(K):
        clean, sigma = draw(p, k, 400_000, g).double(), 0.6
        x = (draw(p, k, 1, g) + sigma * torch.randn(1, P, generator=g)).double()
        weight = (-(x - clean).square().sum(dim=1) / (2 * sigma**2)).softmax(dim=0)  # importance of every clean draw
        wanted = weight @ clean
        got = model(x.float().view(1, 1, 3, 3), torch.tensor([sigma]), torch.tensor([k])).flatten()
        assert (got - wanted).abs().max() < 0.06


def test_both_ends_of_the_noise() -> None:
    p, g = parts(), torch.Generator().manual_seed(2)
    model = MixtureDenoiser(**p)
    x = draw(p, 0, 5, g).view(5, 1, 3, 3)
    y = torch.zeros(5, dtype=torch.int64)
    torch.testing.assert_close(model(x, torch.full((5,), 1e-4), y), x, atol=1e-3, rtol=0)
    mean = (p["weights"][0] @ p["means"][0]) @ p["basis"].T + p["centre"]
    far = model(x, torch.full((5,), 1e4), y).flatten(1)
    torch.testing.assert_close(far, mean.expand(5, -1), atol=1e-2, rtol=0)


def test_rows_are_their_own_and_any_class_is_answered() -> None:
    model, g = MixtureDenoiser(**parts()), torch.Generator().manual_seed(3)
    x, sigma, y = torch.randn(4, 1, 3, 3, generator=g), torch.rand(4, generator=g) + 0.1, torch.tensor([0, 1, 2, 1])
    whole = model(x, sigma, y)
    for i in range(4):
        torch.testing.assert_close(model(x[i : i + 1], sigma[i : i + 1], y[i : i + 1])[0], whole[i])
    mapped = torch.func.vmap(lambda a, s, k: model(a[None], s[None], k[None])[0])(x, sigma, y)
    torch.testing.assert_close(mapped, whole)
    assert not list(model.parameters())


def test_many_classes_are_answered_as_few_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model, g = MixtureDenoiser(**parts()), torch.Generator().manual_seed(4)
    x, sigma, y = torch.randn(5, 1, 3, 3, generator=g), torch.rand(5, generator=g) + 0.1, torch.tensor([0, 1, 1, 0, 2])
    few = model(x, sigma, y)
    monkeypatch.setattr(mixture_denoiser, "FEW", 0)
    torch.testing.assert_close(model(x, sigma, y), few)
