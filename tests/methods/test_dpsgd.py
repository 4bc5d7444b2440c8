"""DP-SGD behind the door on made-up images of 8x8."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from behind_the_door import Stop, Stopping, made_up_public, made_up_records, run_method
from dpdistill.data.images import LabelledImages
from dpdistill.errors import ConfigError
from dpdistill.evaluation import accuracy
from dpdistill.methods import dpsgd
from dpdistill.methods.base import Public
from dpdistill.models import ConvNet

CONFIG = dpsgd.Config(expected_records=60, expected_batch=30, steps=6, width=4, groups=2, checkpoint_steps=2)


@pytest.fixture
def records() -> LabelledImages:
    return made_up_records(1, 8)


@pytest.fixture
def public() -> Public:
    return made_up_public(1, 8)


def go(*args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    return run_method(dpsgd, *args, **kwargs)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_end_to_end(tmp_path: Path, records: LabelledImages, public: Public, optimizer: str) -> None:
    before = torch.random.get_rng_state()
    model, parts = go(tmp_path, records, public, replace(CONFIG, optimizer=optimizer))
    assert isinstance(model, ConvNet)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert parts == [(0.5, 1.0, 6)]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("n", [1, 5])
def test_resume_gives_the_same_bytes(tmp_path: Path, records: LabelledImages, public: Public, n: int) -> None:
    whole, _ = go(tmp_path / "whole", records, public, CONFIG)
    with pytest.raises(Stop):
        go(tmp_path / "cut", records, public, CONFIG, Stopping(tmp_path / "cut" / "w", n))
    resumed, _ = go(tmp_path / "cut", records, public, CONFIG)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_learns_with_little_noise(tmp_path: Path, records: LabelledImages, public: Public) -> None:
    config = replace(CONFIG, expected_batch=60, steps=20, lr=0.03, depth=2)
    model, _ = go(tmp_path, records, public, config, sigma=0.01)
    assert accuracy(model, records.images, records.labels) > 0.9


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_update_is_that_of_torch(optimizer: str) -> None:
    config = replace(CONFIG, optimizer=optimizer, lr=0.1)
    oracle = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    theirs = (
        torch.optim.Adam([oracle], lr=0.1) if optimizer == "adam" else torch.optim.SGD([oracle], lr=0.1, momentum=0.9)
    )
    zero = torch.zeros(5, dtype=torch.float64)
    state = {"flat": zero, "first": zero, "second": zero}
    for step in range(4):
        oracle.grad = torch.arange(5.0, dtype=torch.float64) - step
        state = dpsgd._update(config, state, oracle.grad, step)
        theirs.step()
    torch.testing.assert_close(state["flat"], oracle.detach(), rtol=1e-6, atol=1e-9)


def test_settings() -> None:
    assert replace(CONFIG, expected_batch=600).rate == 1
    with pytest.raises(ConfigError, match="groups"):
        replace(CONFIG, groups=3)
