"""The denoiser's shapes and preconditioning; noise levels; the sampler against data whose denoiser is known."""

import pytest
import torch
from torch import Tensor

from dpdistill.models import edm
from dpdistill.models.denoiser import Denoiser

SHAPES = [((1, 8, 8), 8), ((1, 8, 8), 2), ((1, 28, 28), 7), ((3, 32, 32), 8), ((1, 20, 12), 5), ((3, 9, 13), 4)]


def small(shape: tuple[int, int, int], patch: int, seed: int = 0) -> Denoiser:
    return Denoiser(
        shape, 3, patch=patch, width=16, depth=2, heads=2, generator=torch.Generator().manual_seed(seed)
    ).eval()


def noisy(shape: tuple[int, int, int], n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, *shape, generator=g), torch.rand(n, generator=g) * 2 + 0.01, torch.arange(n) % 4


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_shapes_and_determinism(shape: tuple[int, int, int], patch: int) -> None:
    before = torch.random.get_rng_state()
    model, again = small(shape, patch), small(shape, patch)
    x, sigma, y = noisy(shape)
    out = model(x, sigma, y)
    assert out.shape == x.shape
    assert torch.equal(out, again(x, sigma, y))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(out, small(shape, patch, seed=1)(x, sigma, y))
    assert not torch.equal(model(x, sigma, (y + 1) % 4), out)  # every class, and "any", counts


@pytest.mark.parametrize(("shape", "patch"), SHAPES)
def test_patches_and_back(shape: tuple[int, int, int], patch: int) -> None:
    x, _, _ = noisy(shape)
    model = small(shape, patch)
    assert torch.equal(model._image(model._patches(x)), x)


def test_rows_alone() -> None:
    model = small((1, 8, 8), 4)
    x, sigma, y = noisy((1, 8, 8))
    single = torch.cat([model(x[i : i + 1], sigma[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(model(x, sigma, y), single, rtol=1e-4, atol=1e-5)


def test_preconditioning() -> None:
    model = small((1, 8, 8), 4)
    x, _, y = noisy((1, 8, 8))
    tiny, huge = torch.full((4,), 1e-4), torch.full((4,), 1e4)
    torch.testing.assert_close(model(x, tiny, y), x, rtol=0, atol=1e-3)  # c_skip goes to 1, c_out to 0
    assert model(x * 1e4, huge, y).abs().max() < 5  # c_skip goes to 0, c_out to sigma_data
    # Table 1: the target of F, and so an ideal weighted loss of F = 0, has variance 1 at every level where the data have sigma_data.
    for level in (0.05, 1.0, 20.0):
        g = torch.Generator().manual_seed(0)
        clean, noise = (torch.randn(500, 1, 8, 8, generator=g) for _ in range(2))
        skip = 0.25 / (level**2 + 0.25)
        value = edm.loss(lambda x, s, y, k=skip: k * x, clean / 2, noise, torch.full((500,), level), y, 0.5).mean()
        assert abs(float(value) - 1) < 0.05


def test_rebuilt_from_its_config() -> None:
    model = small((3, 9, 13), 4)
    config = {**model.config, "image_shape": tuple(model.config["image_shape"])}
    other = Denoiser(**config, generator=torch.Generator().manual_seed(9))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*noisy((3, 9, 13))), model(*noisy((3, 9, 13))))


def test_refuses_what_does_not_fit() -> None:
    g = torch.Generator()
    with pytest.raises(ValueError, match="heads"):
        Denoiser((1, 8, 8), 3, patch=2, width=10, depth=1, heads=4, generator=g)
    with pytest.raises(ValueError, match="sigma_data"):
        Denoiser((1, 8, 8), 3, patch=2, width=8, depth=1, heads=4, sigma_data=0.0, generator=g)


def test_noise_levels() -> None:
    uniform = (torch.arange(10001, dtype=torch.float64) + 0.5) / 10001
    logarithm = edm.noise_levels(uniform, -1.2, 0.8).log()
    assert abs(float(logarithm.mean()) + 1.2) < 1e-3
    assert abs(float(logarithm.std()) - 0.8) < 1e-3


def test_schedule() -> None:
    levels = edm.schedule(8, 0.002, 80.0, 7.0)
    assert levels[0] == pytest.approx(80)
    assert levels[-2] == pytest.approx(0.002)
    assert levels[-1] == 0
    assert (levels.diff() < 0).all()
    assert edm.schedule(1, 0.002, 80.0, 7.0).tolist() == [pytest.approx(80), 0]


def gaussian(x: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """The exact denoiser of pixels N(m, 0.2²), m = -0.5, 0, 0.5 by class, and N(0, 0.2²) for "any"."""
    mean = torch.tensor([-0.5, 0.0, 0.5, 0.0])[y].view(-1, 1, 1, 1)
    s = sigma.view(-1, 1, 1, 1).square()
    return (0.04 * x + s * mean) / (0.04 + s)


def test_sampler_finds_the_distribution() -> None:
    labels = torch.arange(3).repeat_interleave(500)
    kwargs = {"steps": 40, "sigma_max": 80.0}
    out = edm.sample(gaussian, labels, (1, 4, 4), generator=torch.Generator().manual_seed(0), **kwargs)
    assert out.shape == (1500, 1, 4, 4)
    assert out.abs().max() <= 1
    for k, mean in enumerate((-0.5, 0.0, 0.5)):
        assert abs(float(out[labels == k].mean()) - mean) < 0.02
        assert abs(float(out[labels == k].std()) - 0.2) < 0.03
    again = edm.sample(gaussian, labels, (1, 4, 4), generator=torch.Generator().manual_seed(0), **kwargs)
    assert torch.equal(out, again)
    assert edm.sample(gaussian, labels[:0], (1, 4, 4), generator=torch.Generator(), **kwargs).shape == (0, 1, 4, 4)


def test_guidance_leads_away_from_the_rest() -> None:
    labels = torch.full((300,), 2)
    g = torch.Generator()
    far = edm.sample(gaussian, labels, (1, 4, 4), steps=20, generator=g, guidance=1.5, n_classes=3)
    assert 0.65 < float(far.mean()) < 0.8  # 1.5 times the distance, less what is clamped
    with pytest.raises(ValueError, match="n_classes"):
        edm.sample(gaussian, labels, (1, 4, 4), steps=2, generator=g, guidance=1.5)
