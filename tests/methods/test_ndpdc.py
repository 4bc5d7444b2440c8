"""NDPDC, end to end behind the door on made-up colour images of 12x12."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from behind_the_door import Stop, Stopping, made_up_public, made_up_records, run_method
from dpdistill.data.images import LabelledImages
from dpdistill.errors import ConfigError
from dpdistill.methods import ndpdc
from dpdistill.methods.base import Public

CONFIG = ndpdc.Config(per_class=2, steps=7, sampling_prob=0.5, group_size=10, width=8, checkpoint_steps=2)


@pytest.fixture
def records() -> LabelledImages:
    return made_up_records(3, 12)


@pytest.fixture
def public() -> Public:
    return made_up_public(3, 12)


def go(*args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    return run_method(ndpdc, *args, **kwargs)


@pytest.mark.parametrize("changes", [{}, {"parts": 2}, {"class_steps": True}, {"per_class": 1}], ids=str)
def test_end_to_end(tmp_path: Path, records: LabelledImages, public: Public, changes: dict) -> None:
    config = replace(CONFIG, **changes)
    before = torch.random.get_rng_state()
    result, parts = go(tmp_path, records, public, config)
    assert result.images.shape == (3 * config.per_class, 3, 12, 12)
    assert result.images.abs().max() <= 1
    assert result.labels.tolist() == [k for k in range(3) for _ in range(config.per_class)]
    assert result.parts == config.parts
    assert parts == [(0.5, 1.0, 7)]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("n", [1, 5])
def test_resume_gives_the_same_bytes(tmp_path: Path, records: LabelledImages, public: Public, n: int) -> None:
    whole, _ = go(tmp_path / "whole", records, public, CONFIG)
    with pytest.raises(Stop):
        go(tmp_path / "cut", records, public, CONFIG, Stopping(tmp_path / "cut" / "w", n))
    resumed, _ = go(tmp_path / "cut", records, public, CONFIG)
    assert torch.equal(resumed.images, whole.images)


def test_classes_are_told_apart_with_little_noise(tmp_path: Path, records: LabelledImages, public: Public) -> None:
    config = replace(CONFIG, steps=60, sampling_prob=1.0, augment="none", group_size=40, depth=2)
    result, _ = go(tmp_path, records, public, config, sigma=0.01)
    top = result.images[:2].mean(dim=(0, 1))
    assert top[:6].mean() - top[6:].mean() > 0.1


def test_rate_is_public() -> None:
    assert replace(CONFIG, sampling_prob=None, expected_records_per_class=40).rate == 0.25
    assert replace(CONFIG, sampling_prob=None, expected_records_per_class=4).rate == 1
    for wrong in ({"sampling_prob": None}, {"expected_records_per_class": 40}):
        with pytest.raises(ConfigError, match="expected_records_per_class"):
            _ = replace(CONFIG, **wrong).rate
    for count in (0, -40):
        with pytest.raises(ConfigError, match="expected_records_per_class of at least 1"):
            replace(CONFIG, sampling_prob=None, expected_records_per_class=count)
    with pytest.raises(ConfigError, match="momentum"):
        replace(CONFIG, momentum=1.0)
