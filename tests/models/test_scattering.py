"""Scattering features and the linear teacher: the definition, rows alone, and a map that is fitted to public images only."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpdistill.data import procedural_images, to_unit
from dpdistill.models.linear import CONSTANT, LinearTeacher
from dpdistill.models.scattering import FREQUENCY, WIDTH, Scattering


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(to_unit(procedural_images(n, *shape, seed)))


@pytest.mark.parametrize(
    ("shape", "scales", "map_shape"),
    [
        ((1, 8, 8), 2, (2, 2)),
        ((1, 8, 8), 3, (1, 1)),
        ((3, 9, 13), 2, (2, 3)),
        ((1, 28, 28), 2, (7, 7)),
        ((3, 32, 32), 2, (8, 8)),
        ((1, 64, 40), 3, (8, 5)),
        ((1, 31, 64), 1, (16, 32)),
    ],
)
def test_sizes(shape: tuple[int, int, int], scales: int, map_shape: tuple[int, int]) -> None:
    model = Scattering(shape, scales=scales, angles=4)
    assert model.map_shape == map_shape
    assert model.n_paths == 1 + 4 * scales + 16 * scales * (scales - 1) // 2
    out = model(images(3, *shape))
    assert out.shape == (3, model.out_dim) == (3, shape[0] * model.n_paths * math.prod(map_shape))
    assert out.dtype == torch.float32
    assert torch.isfinite(out).all()
    assert model(torch.zeros(0, *shape)).shape == (0, model.out_dim)


def test_sizes_of_the_papers() -> None:
    assert Scattering((1, 28, 28)).out_dim == 3969
    assert Scattering((3, 32, 32)).out_dim == 15552


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="image_shape"):
        Scattering((1, 4, 28))
    with pytest.raises(ValueError, match="scales"):
        Scattering((1, 8, 8), scales=4)
    with pytest.raises(ValueError, match="shape"):
        Scattering((1, 8, 8))(torch.zeros(1, 1, 8, 9))


@pytest.mark.parametrize("angle", [0, 1, 3])
def test_first_order_of_a_wave_is_the_modulus_of_a_sampled_morlet_wavelet(angle: int) -> None:
    """Oracle: direct convolution with the wavelet in space, away from the border."""
    model, turn = Scattering((1, 64, 64), scales=2, angles=4), angle * math.pi / 4
    sigma, centre = WIDTH * 2, FREQUENCY / 2  # of scale 1; the slant is 1 for four angles
    grid = torch.arange(-16, 17).double()
    along = grid[:, None] * math.sin(turn) + grid[None] * math.cos(turn)
    across = grid[:, None] * math.cos(turn) - grid[None] * math.sin(turn)
    envelope = torch.exp(-(along**2 + across**2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
    wave = torch.polar(torch.ones_like(along), centre * along) * envelope
    wavelet = wave - wave.sum() / envelope.sum() * envelope
    x = images(4, 1, 64, 64, seed=3).double()
    parts = [F.conv2d(x, part[None, None]) for part in (wavelet.real.contiguous(), wavelet.imag.contiguous())]
    modulus = (parts[0].square() + parts[1].square()).sqrt()  # of pixels 16 .. 47
    first = model(x.float()).view(4, model.n_paths, 16, 16)[:, 1 + 4 + angle]
    centres = (torch.arange(16) + 0.5) * 4 - 0.5
    weights = torch.exp(-0.5 * ((torch.arange(16, 48) - centres[7:9, None]) / (WIDTH * 2)) ** 2).double()
    weights /= weights.sum(dim=1, keepdim=True)
    wanted = weights @ modulus[:, 0] @ weights.T
    assert (first[:, 7:9, 7:9] - wanted).norm() < 0.05 * wanted.norm()


def test_a_constant_has_order_zero_only() -> None:
    model = Scattering((1, 16, 16))
    out = model(torch.full((1, 1, 16, 16), 0.5)).view(model.n_paths, -1)
    torch.testing.assert_close(out[0], torch.full_like(out[0], 0.5))
    assert out[1:].abs().max() < 1e-5


def test_a_grating_answers_in_its_own_direction() -> None:
    model = Scattering((1, 32, 32))
    wave = torch.cos(torch.arange(32) * FREQUENCY / 2)
    for image, angle in ((wave.expand(32, 32), 0), (wave[:, None].expand(32, 32), 4)):
        first = model(image[None, None]).view(model.n_paths, -1)[1:17].mean(dim=1)
        assert int(first.argmax()) == 8 + angle


def test_features_move_less_than_pixels_when_the_image_moves() -> None:
    model, x = Scattering((1, 32, 32)), images(40, 1, 32, 32)
    moved = x.roll(1, dims=3)[..., 4:-4]
    kept = [F.pad(v, (4, 4, 0, 0), mode="replicate") for v in (x[..., 4:-4], moved)]

    def change(a: Tensor, b: Tensor) -> float:
        a, b = (v.flatten(1) - v.flatten(1).mean(dim=0) for v in (a, b))
        return float((a - b).norm() / a.norm())

    assert change(*(model(v) for v in kept)) < 0.6 * change(*kept)


def test_a_mirror_image_has_mirrored_maps() -> None:
    model, x = Scattering((1, 24, 24), angles=4), images(5, 1, 24, 24)
    maps = model(x).view(5, model.n_paths, *model.map_shape)
    mirrored = model(x.flip(3)).view(5, model.n_paths, *model.map_shape).flip(3)
    for scale in range(2):
        first = slice(1 + 4 * scale, 5 + 4 * scale)
        wanted = maps[:, first][:, [0, 3, 2, 1]]
        assert (mirrored[:, first] - wanted).norm() < 0.03 * wanted.norm()  # coarse maps keep every other pixel


def test_energy_is_below_the_images() -> None:
    """Moduli and averages lose energy, and the filters here nearly tile the spectrum once: order 2 is below order 1."""
    model, x = Scattering((1, 32, 32)), images(50, 1, 32, 32)
    out = model(x).view(50, model.n_paths, -1)
    energy = [float(out[:, part].square().sum()) * 16 for part in (slice(0, 1), slice(1, 17), slice(17, None))]
    assert energy[0] <= float(x.square().sum()) * 1.05
    assert 0 < energy[2] < energy[1] < energy[0]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 10), (1, 28, 28)])
def test_rows_are_independent(shape: tuple[int, int, int]) -> None:
    model = LinearTeacher(shape, 3, dim=20).fit_public(images(40, *shape), torch.Generator().manual_seed(0))
    x, other = images(6, *shape, seed=1), images(6, *shape, seed=2)
    for fn in (model.scattering, model.features):
        for row in range(6):
            mixed = other.clone()
            mixed[row] = x[row]
            assert torch.equal(fn(mixed)[row], fn(x)[row])
        assert torch.equal(fn(x), fn(x))
        torch.testing.assert_close(torch.cat([fn(one[None]) for one in x]), fn(x), rtol=1e-3, atol=1e-4)


def test_a_teacher_has_unit_features_and_starts_undecided() -> None:
    x = images(60, 1, 16, 16)
    model = LinearTeacher((1, 16, 16), 4, dim=30).fit_public(x, torch.Generator().manual_seed(0))
    features = model.features(x)
    assert features.shape == (60, 31) == (60, model.n_features)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(60))
    assert (features[:, -1] == CONSTANT).all()
    assert (model(x) == 0).all()
    assert not features.requires_grad


def test_a_teacher_is_reproducible_and_its_state_is_enough() -> None:
    x = images(50, 3, 8, 8)
    one, two = (LinearTeacher((3, 8, 8), 2, dim=16).fit_public(x, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one.features(x), two.features(x))
    loaded = LinearTeacher((3, 8, 8), 2, dim=16)
    state = one.state_dict()
    assert set(state) == {"level", "centre", "projection", "head.weight"}
    assert all(value.dtype == torch.float32 for value in state.values())
    loaded.load_state_dict(state)
    assert torch.equal(loaded.features(x), one.features(x))


def test_a_narrowed_teacher_has_the_features_of_a_smaller_one() -> None:
    x = images(60, 1, 8, 8)
    wide, small = (
        LinearTeacher((1, 8, 8), 2, dim=dim, whitening=0.0).fit_public(x, torch.Generator().manual_seed(0))
        for dim in (30, 10)
    )
    wide.narrow(10)
    features = wide.features(x)
    assert (features[:, 10:30] == 0).all()
    assert (features[:, 30] == CONSTANT).all()
    torch.testing.assert_close(features[:, :10].abs(), small.features(x)[:, :10].abs(), atol=1e-3, rtol=0)
    before = features.clone()
    wide.narrow(500)  # more than there are
    assert torch.equal(wide.features(x), before)


def test_few_or_equal_public_images_give_finite_features() -> None:
    model = LinearTeacher((1, 8, 8), 2, dim=500).fit_public(images(5, 1, 8, 8), torch.Generator().manual_seed(0))
    assert model.dim == 324
    assert torch.isfinite(model.features(images(4, 1, 8, 8, seed=5))).all()
    model.fit_public(torch.zeros(3, 1, 8, 8), torch.Generator().manual_seed(0))
    assert torch.isfinite(model.features(images(4, 1, 8, 8))).all()
    with pytest.raises(ValueError, match="two or more"):
        model.fit_public(images(1, 1, 8, 8), torch.Generator().manual_seed(0))
