"""The student: sizes from 6 to 64, wavelets that see edges and nothing else, weights from the given generator only."""

import pytest
import torch

from dpdistill.bundle import onnx_file
from dpdistill.models import wavelet_net
from dpdistill.models.wavelet_net import ANGLES, SCALES, WaveletNet, wavelets


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "map_side"), [(6, 6), (8, 8), (11, 11), (12, 6), (15, 7), (28, 7), (32, 8), (64, 16)])
def test_sizes(channels: int, side: int, map_side: int) -> None:
    model = WaveletNet((channels, side, side), 5, width=4)
    x = torch.randn(3, channels, side, side)
    assert model.embed(x).shape == (3, model.embed_dim) == (3, 8 * map_side**2)
    assert model(x).shape == (3, 5)
    assert model.embed(x).std() > 0


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_oblong_and_any_depth(depth: int) -> None:
    model = WaveletNet((1, 8, 20), 2, width=4, depth=depth)
    assert model(torch.randn(2, 1, 8, 20)).isfinite().all()
    assert model.embed_dim == (4 if depth == 1 else 8) * 4 * 10


def test_the_onnx_twin_has_the_same_constants() -> None:
    for name in ("REACH", "ROOM", "LEAST", "GAIN", "FLOOR"):
        assert getattr(onnx_file, name) == getattr(wavelet_net, name)
    assert onnx_file.WAVELETS == SCALES * ANGLES


def test_wavelets_have_no_mean_and_norm_one() -> None:
    real, imaginary = wavelets()
    assert real.shape == imaginary.shape == (SCALES * ANGLES, 1, 11, 11)
    for part in (real, imaginary):
        torch.testing.assert_close(part.sum(dim=(1, 2, 3)), torch.zeros(len(part)), atol=1e-5, rtol=0)
    torch.testing.assert_close((real.square() + imaginary.square()).sum(dim=(1, 2, 3)), torch.ones(len(real)))


def test_moduli_answer_to_the_stripes_of_their_own_angle_wherever_they_begin() -> None:
    model = WaveletNet((1, 32, 32), 2)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    for k in range(ANGLES):
        angle = torch.tensor(torch.pi * k / ANGLES)
        for j in range(SCALES):
            phase = 0.75 * torch.pi / 2**j * (x * angle.cos() + y * angle.sin())
            waves = [(phase + start).cos()[None, None] for start in (0.0, 1.0)]
            seen = torch.stack([model.moduli(wave)[0, 1:, 4:12, 4:12] for wave in waves])
            assert seen.mean(dim=(0, 2, 3)).argmax() == j * ANGLES + k
            torch.testing.assert_close(seen[0, j * ANGLES + k], seen[1, j * ANGLES + k], rtol=0.05, atol=0.05)


def test_flat_images_move_nothing_but_their_own_map() -> None:
    model = WaveletNet((3, 16, 16), 2)
    dark, light = (model.moduli(torch.full((1, 3, 16, 16), value)) for value in (-1.0, 1.0))
    moved = (dark - light).abs().amax(dim=(0, 2, 3))
    assert moved[0] > 1
    assert moved[1:].max() < 1e-3


def test_rows_are_independent() -> None:
    model = WaveletNet((3, 16, 16), 4, width=8, groups=2)
    x = torch.randn(6, 3, 16, 16)
    one_by_one = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), one_by_one, rtol=1e-5, atol=1e-5)


def test_weights_come_from_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first = WaveletNet((1, 8, 8), 3, width=8, generator=torch.Generator().manual_seed(5))
    again = WaveletNet((1, 8, 8), 3, width=8, generator=torch.Generator().manual_seed(5))
    other = WaveletNet((1, 8, 8), 3, width=8, generator=torch.Generator().manual_seed(6))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("shape", "changes"), [((2, 8, 8), {}), ((1, 5, 8), {}), ((1, 8, 8), {"groups": 3}), ((1, 8, 8), {"depth": 0})]
)
def test_refuses_what_does_not_fit(shape: tuple[int, int, int], changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        WaveletNet(shape, 2, **changes)
