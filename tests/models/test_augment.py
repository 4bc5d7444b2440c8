"""Multi-formation decoding and Siamese augmentation."""

import pytest
import torch

from dpdistill.models import Dsa, expand
from dpdistill.models.augment import FULL_STRATEGY, OPERATIONS


def draw_of(dsa: Dsa, name: str, seed: int = 0, n: int = 1) -> torch.Tensor:
    draws = dsa.draw(torch.Generator().manual_seed(seed), n)
    draws[:, 0] = dsa.operations.index(name)
    return draws


def test_expand_cuts_quadrants_in_label_order() -> None:
    images = torch.zeros(2, 1, 8, 8)
    for m in range(2):
        for quadrant in range(4):
            row, column = divmod(quadrant, 2)
            images[m, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 10 * m + quadrant
    tiles = expand(images, 2)
    assert tiles.shape == (8, 1, 8, 8)
    assert tiles.mean(dim=(1, 2, 3)).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert torch.equal(torch.tensor([0, 1]).repeat_interleave(4), (tiles[:, 0, 0, 0] >= 10).long())


@pytest.mark.parametrize("side", [9, 28])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_expand_keeps_size_and_uses_every_pixel(side: int, parts: int) -> None:
    images = torch.randn(2, 3, side, side, requires_grad=True)
    tiles = expand(images, parts)
    assert tiles.shape == (2 * parts**2, 3, side, side)
    tiles.sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_gain_multiplies_what_is_enlarged_and_cuts_it(parts: int) -> None:
    images = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(expand(images, parts, 4), (4 * expand(images, parts)).clamp(-1, 1))
    assert torch.equal(expand(images, 1), images)


def test_expand_refuses_more_parts_than_pixels() -> None:
    with pytest.raises(ValueError, match="parts"):
        expand(torch.zeros(1, 1, 8, 8), 9)


def test_strategy() -> None:
    assert Dsa().operations == OPERATIONS
    assert Dsa(strategy="none").operations == ()
    assert "flip" not in Dsa(strategy=FULL_STRATEGY.replace("_flip", "")).operations
    with pytest.raises(ValueError, match="blur"):
        Dsa(strategy="color_blur")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(Dsa(strategy="none").apply(x, Dsa(strategy="none").draw(torch.Generator())), x)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_siamese_and_differentiable(name: str, channels: int) -> None:
    """One draw does the same to equal images, and gradients are those of finite differences."""
    dsa = Dsa()
    image = torch.randn(1, channels, 8, 8, dtype=torch.float64).clamp(-1, 1)
    result = dsa.apply(image.repeat(3, 1, 1, 1), draw_of(dsa, name, 1))
    assert torch.equal(result[0], result[1])
    assert torch.equal(result[0], result[2])
    changed = [not torch.equal(dsa.apply(image, draw_of(dsa, name, seed)), image) for seed in range(8)]
    assert any(changed)
    draws = draw_of(dsa, name, 2).double()
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: dsa.apply(z, draws), (image,))


@pytest.mark.parametrize("size", [(8, 8), (9, 12)])
def test_rows_depend_on_their_own_draw_only(size: tuple[int, int]) -> None:
    dsa = Dsa()
    draws = dsa.draw(torch.Generator().manual_seed(3), 24)
    assert len(set(draws[:, 0].tolist())) > 3
    x = torch.randn(24, 3, *size)
    together = dsa.apply(x, draws)
    alone = torch.cat([dsa.apply(x[i : i + 1], draws[i : i + 1]) for i in range(24)])
    assert together.shape == x.shape
    assert torch.equal(together, alone)


def test_one_operation_for_a_batch_with_parameters_for_each_image() -> None:
    draws = Dsa().draw_batch(torch.Generator().manual_seed(0), 16)
    assert len(draws[:, 0].unique()) == 1
    assert len(draws[:, 1].unique()) > 8


def test_numbers_come_from_the_generator_alone() -> None:
    dsa, x = Dsa(), torch.randn(4, 1, 8, 8)
    before = torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(7)
    results = [dsa.apply(x, dsa.draw(generator, 4)) for _ in range(6)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert generator.initial_seed() == 7  # and nobody reseeded the one that was passed
    generator = torch.Generator().manual_seed(7)
    for result in results:
        assert torch.equal(dsa.apply(x, dsa.draw(generator, 4)), result)


def test_known_transformations() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8) / 32 - 1
    half = torch.tensor([[0.0, 0.5, 0.5, 0.5]])
    low = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(Dsa(strategy="flip").apply(x, low), x.flip(3))
    assert torch.equal(Dsa(strategy="flip").apply(x, half), x)
    assert torch.equal(Dsa(strategy="crop").apply(x, half), x)
    shifted = Dsa(strategy="crop", fill=9.0).apply(x, low)  # by one pixel, down and right
    assert torch.equal(shifted[..., 1:, 1:], x[..., :-1, :-1])
    assert (shifted[..., 0, :] == 9).all()
    assert (shifted[..., :, 0] == 9).all()
    assert int((Dsa(strategy="cutout", fill=9.0).apply(x, half) == 9).sum()) == 16
    torch.testing.assert_close(Dsa(strategy="rotate").apply(x, half), x)
    gentle = Dsa(strategy="color", saturation=2.0)
    torch.testing.assert_close(gentle.apply(x, half), x)
