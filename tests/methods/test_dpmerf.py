"""DP-MERF, end to end behind the door on made-up images of 12x12."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from behind_the_door import Stop, Stopping, made_up_public, made_up_records, run_method
from dpdistill.data.images import LabelledImages
from dpdistill.errors import ConfigError
from dpdistill.methods import dpmerf
from dpdistill.methods.base import Public
from dpdistill.methods.shared import embedding
from dpdistill.models.generator import Generator

CONFIG = dpmerf.Config(per_class=3, n_frequencies=200, steps=9, batch=8, width=8, checkpoint_steps=2)


@pytest.fixture
def records() -> LabelledImages:
    return made_up_records(1, 12)


@pytest.fixture
def public() -> Public:
    return made_up_public(1, 12)


def go(*args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    return run_method(dpmerf, *args, **kwargs)


def test_end_to_end(tmp_path: Path, records: LabelledImages, public: Public) -> None:
    before = torch.random.get_rng_state()
    result, parts = go(tmp_path, records, public, CONFIG)
    assert result.images.shape == (9, 1, 12, 12)
    assert result.images.abs().max() <= 1
    assert result.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert parts == [(1.0, 1.0, 1)]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, at_once=60, bf16=True)], ids=["whole", "parts"])
@pytest.mark.parametrize("n", [0, 3])
def test_resume_gives_the_same_bytes(
    tmp_path: Path, records: LabelledImages, public: Public, n: int, config: dpmerf.Config
) -> None:
    whole, _ = go(tmp_path / "whole", records, public, config)
    with pytest.raises(Stop):
        go(tmp_path / "cut", records, public, config, Stopping(tmp_path / "cut" / "w", n))
    resumed, _ = go(tmp_path / "cut", records, public, config)
    assert torch.equal(resumed.images, whole.images)


def test_classes_are_told_apart_with_little_noise(tmp_path: Path, records: LabelledImages, public: Public) -> None:
    result, _ = go(tmp_path, records, public, replace(CONFIG, steps=150, lr=5e-3), sigma=0.01)
    top, bottom = result.images[:3].mean(dim=(0, 1)), result.images[3:6].mean(dim=(0, 1))
    assert top[:6].mean() - top[6:].mean() > 0.3
    assert bottom[6:].mean() - bottom[:6].mean() > 0.3


@pytest.mark.parametrize("at_once", [60, 200])
def test_classes_are_told_apart_by_a_part_of_the_frequencies_a_step(
    tmp_path: Path, records: LabelledImages, public: Public, at_once: int
) -> None:
    config = replace(CONFIG, steps=150, lr=5e-3, at_once=at_once, bf16=True)
    result, _ = go(tmp_path, records, public, config, sigma=0.01)
    top, bottom = result.images[:3].mean(dim=(0, 1)), result.images[3:6].mean(dim=(0, 1))
    assert top[:6].mean() - top[6:].mean() > 0.3
    assert bottom[6:].mean() - bottom[:6].mean() > 0.3


def test_all_frequencies_at_once_is_the_same_said_twice(
    tmp_path: Path, records: LabelledImages, public: Public
) -> None:
    whole, _ = go(tmp_path / "whole", records, public, CONFIG)
    named, _ = go(tmp_path / "named", records, public, replace(CONFIG, at_once=1000))  # more than there are
    part, _ = go(tmp_path / "part", records, public, replace(CONFIG, at_once=60))
    assert torch.equal(named.images, whole.images)
    assert not torch.equal(part.images, whole.images)


def test_a_part_of_an_embedding_is_an_embedding_by_those_frequencies() -> None:
    generator = torch.Generator().manual_seed(0)
    x, frequencies = torch.rand(3, 1, 3, 3, generator=generator), torch.randn(9, 10, generator=generator)
    parts = embedding.parted(embedding.embedding(x, frequencies), frequencies, 4)
    assert [some.shape[1] for _, some in parts] == [4, 4, 2]
    for wanted, some in parts:
        torch.testing.assert_close(wanted, embedding.embedding(x, some))
    assert torch.equal(torch.cat([some for _, some in parts], dim=1), frequencies)


def test_a_negative_part_is_refused() -> None:
    with pytest.raises(ConfigError, match="at_once"):
        replace(CONFIG, at_once=-1)


def test_embedding_has_norm_one_and_approximates_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 3, 3, generator=generator)
    features = embedding.embedding(x, torch.randn(9, 20_000, generator=generator))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
    kernel = torch.exp(-(x[0] - x[1]).square().sum() / 2)
    torch.testing.assert_close(features[0] @ features[1], kernel, atol=0.02, rtol=0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 9), (1, 28, 28), (3, 64, 64)], ids=str)
def test_generator_sizes(shape: tuple[int, int, int]) -> None:
    model = Generator(shape, 4, width=8, generator=torch.Generator().manual_seed(0))
    assert model(torch.randn(5, 10), torch.eye(4)[[0, 1, 2, 3, 0]]).shape == (5, *shape)
