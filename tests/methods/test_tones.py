"""Tones: what a record adds is bounded, and images get the tones that were released."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dpdistill.methods.base import Public
from dpdistill.methods.model import teacher
from dpdistill.methods.shared import tones
from dpdistill.privacy import GaussianSum
from dpdistill.workspace import FolderWorkspace


def images(n: int, *, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_record_adds_a_vector_of_norm_at_most_one(channels: int) -> None:
    flat = torch.full((1, channels, 8, 8), 0.3)  # all pixels alike: the longest there is
    x = torch.cat([images(5, channels=channels), flat])
    found = tones.histograms(x)
    assert found.shape == (6, channels * tones.VALUES)
    assert torch.allclose(found.sum(dim=1), torch.ones(6))
    assert (found.norm(dim=1) <= 1 + 1e-6).all()
    one_by_one = torch.cat([tones.histograms(part) for part in x.split(1)])
    assert torch.equal(found, one_by_one)
    for level in (-1.0, 1.0):
        assert tones.histograms(torch.full((1, 1, 8, 8), level)).max() == 1


class Said:
    """Stands for the door: answers with what it is told."""

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer

    def release(self, query: GaussianSum, fn: object, *, progress: object = None) -> Tensor:
        return self.answer[None]


def test_what_the_noise_alone_could_be_is_no_tone(tmp_path: object) -> None:
    query = GaussianSum(name="x-tones", dim=2 * tones.VALUES, noise_multiplier=3.0)
    answer = torch.full((2, tones.VALUES), 2.0)
    workspace = FolderWorkspace(tmp_path, quiet=True)  # type: ignore[arg-type]
    assert tones.fit(query, Said(answer.flatten()), workspace) is None  # type: ignore[arg-type]
    answer[0, 3], answer[0, 5] = 3000.0, 1000.0
    found = tones.fit(query, Said(answer.flatten()), workspace)  # type: ignore[arg-type]
    assert found is not None
    assert found[0, 3] == 0.75
    assert found[0, 5] == 0.25
    assert torch.allclose(found[1], torch.full((tones.VALUES,), 1 / tones.VALUES))  # nothing known: any tone


@pytest.mark.parametrize("seed", range(3))
def test_a_curve_gives_the_tones_and_keeps_the_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wanted = torch.tensor(rng.dirichlet(np.ones(tones.VALUES) / 2), dtype=torch.float32)[None]
    x = images(400, seed=seed)
    curve = tones.Curve.between(x, wanted)
    toned = curve(x)
    assert torch.allclose(tones.histograms(toned).mean(dim=0), wanted[0], atol=0.02)
    order = x.flatten().argsort()
    assert (toned.flatten()[order].diff() >= 0).all()
    assert torch.equal(curve(x[:3]), toned[:3])  # of each image alone
    assert curve(torch.tensor([-5.0, 5.0]).view(2, 1, 1, 1)).abs().max() <= 1


def test_equal_pixels_stay_equal() -> None:
    """A ground that is all of one grey must not become speckled."""
    x = images(50)
    x[x < 0.4] = -0.7
    wanted = torch.zeros(1, tones.VALUES)
    wanted[0, 0], wanted[0, 7], wanted[0, -1] = 0.6, 0.2, 0.2
    toned = tones.Curve.between(x, wanted)(x)
    assert toned[x == -0.7].unique().tolist() == [-1.0]


class Drawn:
    """Stands for a mixture: normal coordinates."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(2, n, 5, generator=generator) / 4


@pytest.mark.parametrize(("channels", "names"), [(1, ["prior-tones"]), (3, [])])
def test_a_student_is_taught_with_the_tones_of_grey_records(
    channels: int, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def black_or_white(query: GaussianSum, *_: object) -> Tensor:
        asked.append(query.name)
        return torch.tensor([[0.75, *[0.0] * (tones.VALUES - 2), 0.25]])

    monkeypatch.setattr(teacher.mix, "fit", lambda *_: Drawn())
    monkeypatch.setattr(teacher.tones, "fit", black_or_white)
    shape, made_up = (channels, 8, 8), images(60, channels=channels)
    public = Public(image_shape=shape, class_names=("a", "b"), auxiliary=made_up)
    config = teacher.Config(pixel_dims=5)
    releases = teacher.plan(config, public, 1.0)[2:]
    workspace = FolderWorkspace(tmp_path, seed=0)
    found = teacher.with_mixture(config, public, None, releases, workspace)  # type: ignore[arg-type]
    assert asked == names == [planned.query.name for planned in releases[3:]]
    black = float((found.auxiliary == -1).float().mean())
    assert black == pytest.approx(0.75, abs=0.05) if names else black < 0.2
    # Whatever is asked, the whole costs what was said.
    whole = sum(planned.count / planned.query.noise_multiplier**2 for planned in teacher.plan(config, public, 1.0))
    assert whole == pytest.approx(1.0)
