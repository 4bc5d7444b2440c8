"""The ConvNet: sizes from 8 to 64, no batch statistics, weights from the given generator only."""

import pytest
import torch

from dpdistill.models import ConvNet


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "map_side"), [(8, 1), (9, 1), (12, 1), (16, 2), (32, 4), (64, 8)])
def test_sizes(channels: int, side: int, map_side: int) -> None:
    model = ConvNet((channels, side, side), 5, width=4)
    x = torch.randn(3, channels, side, side)
    assert model.embed(x).shape == (3, model.embed_dim) == (3, 4 * map_side**2)
    assert model(x).shape == (3, 5)
    assert model.embed(x).std() > 0


def test_grey_28_is_padded_to_32_and_colour_is_not() -> None:
    assert ConvNet((1, 28, 28), 10).embed_dim == 2048
    assert ConvNet((3, 28, 28), 10).embed_dim == 128 * 9


def test_paper_size() -> None:
    model = ConvNet((3, 32, 32), 10)
    assert model.embed_dim == 2048
    assert sum(p.numel() for p in model.parameters()) == 320_010


def test_oblong_and_deep() -> None:
    model = ConvNet((1, 8, 20), 2, width=4, depth=9)
    assert torch.isfinite(model(torch.randn(2, 1, 8, 20))).all()
    assert (
        model.embed(torch.randn(2, 1, 8, 20)).std() > 0
    )  # never ends on a normalised 1x1 map, which would be constant


def test_rows_are_independent() -> None:
    model = ConvNet((3, 16, 16), 4, width=8, groups=2)
    x = torch.randn(6, 3, 16, 16)
    one_by_one = torch.cat([model(row[None]) for row in x])
    torch.testing.assert_close(model(x), one_by_one, rtol=1e-5, atol=1e-5)


def test_weights_come_from_the_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first = ConvNet((1, 8, 8), 3, width=8, generator=torch.Generator().manual_seed(5))
    again = ConvNet((1, 8, 8), 3, width=8).init_(torch.Generator().manual_seed(5))
    other = ConvNet((1, 8, 8), 3, width=8).init_(torch.Generator().manual_seed(6))
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_distribution_is_the_default_of_pytorch() -> None:
    ours = ConvNet((3, 32, 32), 10)
    theirs = torch.nn.Conv2d(128, 128, 3)
    conv = ours.features[4]
    assert isinstance(conv, torch.nn.Conv2d)
    for a, b in ((conv.weight, theirs.weight), (conv.bias, theirs.bias)):
        assert b is not None
        assert a is not None
        assert a.abs().max() <= 1152**-0.5
        torch.testing.assert_close(a.std(), b.std(), rtol=0.15, atol=0)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="groups"):
        ConvNet((1, 8, 8), 2, width=8, groups=3)
    with pytest.raises(ValueError, match="2x2"):
        ConvNet((1, 1, 8), 2)
