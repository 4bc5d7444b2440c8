"""Dosser, end to end behind the door on made-up 8x8 images: releases, ablations, resuming, the matching loss."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dpdistill.data.images import LabelledImages
from dpdistill.errors import ConfigError
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods import dosser
from dpdistill.methods.base import Public, Synthetic
from dpdistill.models import Dsa
from dpdistill.models.matching import (
    FeatureMap,
    class_feature,
    clip_rows,
    fitting_depth,
    leading_subspace,
    momentum_step,
    random_network,
)
from dpdistill.privacy import Ledger
from dpdistill.privacy import ledger as ledgers
from dpdistill.workspace import FolderWorkspace

CONFIG = dosser.Config(
    per_class=2,
    sampling_steps=5,
    optimisation_steps=12,
    sampling_prob=0.5,
    group_size=10,
    subspace_dim=6,
    auxiliary_images=30,
    width=8,
    depth=2,
    checkpoint_steps=4,
)


class Stop(Exception):
    pass


class Stopping(FolderWorkspace):
    """Stops in the middle of the stage `description`, after n steps."""

    def __init__(self, folder: Path, description: str, n: int) -> None:
        super().__init__(folder, quiet=True)
        self.description, self.n = description, n

    def track(self, steps: Sequence[int], description: str) -> Iterator[int]:
        for done, step in enumerate(steps):
            if description == self.description and done == self.n:
                raise Stop
            yield step


@pytest.fixture
def records() -> LabelledImages:
    """Three classes: one large, one small, one with no records."""
    rng = np.random.default_rng(0)
    labels = np.array([0] * 24 + [1] * 7, np.int64)
    images = rng.integers(0, 90, (31, 1, 8, 8), dtype=np.uint8)
    images[labels == 0, :, :4] += 150
    images[labels == 1, :, :, :4] += 150
    return LabelledImages(images=images, labels=labels, class_names=("top", "left", "none"), source="made up")


@pytest.fixture
def public() -> Public:
    auxiliary = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Public(image_shape=(1, 8, 8), class_names=("top", "left", "none"), auxiliary=auxiliary)


def go(
    folder: Path,
    records: LabelledImages,
    public: Public,
    config: dosser.Config,
    workspace: FolderWorkspace | None = None,
    sigma: float = 1.0,
) -> tuple[Synthetic, list[tuple[float, float, int]], PrivateData]:
    plan = dosser.plan(config, public, sigma)
    with Ledger.open(folder / "l.jsonl", cap=(1e6, 1e-5), data="toy") as ledger:
        private = PrivateData(records, ledger, Vault.open(folder / "v", insecure_seed=1), micro_batch=32)
        result = dosser.run(config, public, private, plan, workspace or FolderWorkspace(folder / "w", quiet=True))
        parts = ledgers.parts(ledger.lines)
    assert parts == [planned.part for planned in plan]
    return result, parts, private


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"separate": False},
        {"subspace": False},
        {"parts": 2},
        {"class_steps": False},
        {"per_class": 1},
        {"cache_gib": 0.0},
    ],
    ids=str,
)
def test_end_to_end(tmp_path: Path, records: LabelledImages, public: Public, changes: dict) -> None:
    config = replace(CONFIG, **changes)
    result, parts, private = go(tmp_path, records, public, config)
    assert result.images.shape == (3 * config.per_class, 1, 8, 8)
    assert result.images.dtype == torch.float32
    assert result.images.abs().max() <= 1
    assert result.labels.tolist() == [k for k in range(3) for _ in range(config.per_class)]
    assert result.parts == config.parts
    assert parts == [(0.5, 1.0, 5)]
    assert private.checks["dosser-signal"] < 1e-4


@pytest.mark.parametrize(("stage", "n"), [("drawing signals", 3), ("optimising images", 7)])
def test_resume_gives_the_same_bytes(
    tmp_path: Path, records: LabelledImages, public: Public, stage: str, n: int
) -> None:
    whole, _, _ = go(tmp_path / "whole", records, public, CONFIG)
    with pytest.raises(Stop):
        go(tmp_path / "cut", records, public, CONFIG, Stopping(tmp_path / "cut" / "w", stage, n))
    resumed, parts, _ = go(tmp_path / "cut", records, public, CONFIG)
    assert torch.equal(resumed.images, whole.images)
    assert len(parts) == 1  # nothing was charged twice


def test_neither_cache_nor_checkpoints_change_the_result(
    tmp_path: Path, records: LabelledImages, public: Public
) -> None:
    first, _, _ = go(tmp_path / "a", records, public, CONFIG)
    other, _, _ = go(tmp_path / "b", records, public, replace(CONFIG, cache_gib=0.0, checkpoint_steps=100))
    assert torch.equal(first.images, other.images)


def test_global_random_state_is_left_alone(tmp_path: Path, records: LabelledImages, public: Public) -> None:
    before = torch.random.get_rng_state()
    go(tmp_path, records, public, CONFIG)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_classes_are_told_apart_with_little_noise(tmp_path: Path, records: LabelledImages, public: Public) -> None:
    config = replace(CONFIG, optimisation_steps=200, sampling_prob=1.0, augment="none")
    result, _, _ = go(tmp_path, records, public, config, sigma=0.01)
    top, left = result.images[:2].mean(dim=(0, 1)), result.images[2:4].mean(dim=(0, 1))
    assert top[:4].mean() - top[4:].mean() > 0.1
    assert left[:, :4].mean() - left[:, 4:].mean() > 0.1


def test_plan_knows_the_dimension(public: Public) -> None:
    assert dosser.plan(CONFIG, public, 1.0)[0].query.dim == 6
    assert dosser.plan(replace(CONFIG, subspace=False), public, 1.0)[0].query.dim == 8 * 4
    assert dosser.plan(replace(CONFIG, subspace_dim=99), public, 1.0)[0].query.dim == 29
    assert dosser.Config.quick(expected_records_per_class=100).rate == 0.5
    with pytest.raises(ConfigError, match="expected_records_per_class"):
        dosser.plan(replace(CONFIG, sampling_prob=None), public, 1.0)
    for count in (0, -100):
        with pytest.raises(ConfigError, match="expected_records_per_class of at least 1"):
            dosser.Config.quick(expected_records_per_class=count)
    with pytest.raises(ConfigError, match="two auxiliary images"):
        dosser.plan(CONFIG, replace(public, auxiliary=public.auxiliary[:1]), 1.0)
    with pytest.raises(ConfigError, match="blur"):
        replace(CONFIG, augment="blur")


@pytest.mark.parametrize("n", [20, 200])
def test_subspace_is_that_of_an_svd(n: int) -> None:
    network = random_network((1, 8, 8), 8, 2, torch.Generator().manual_seed(0), "cpu")
    images = torch.randn(n, 1, 8, 8)
    mean, basis = leading_subspace(network, images, 5)
    centred = network.embed(images) - mean
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close((basis.float().T @ right[:5].T).abs(), torch.eye(5), atol=5e-3, rtol=0)
    projected = FeatureMap(network=network, mean=mean, basis=basis)(images)
    torch.testing.assert_close(projected, centred @ basis.float())


@pytest.mark.parametrize(
    ("shape", "depth"), [((1, 8, 8), 2), ((3, 12, 12), 2), ((1, 16, 16), 3), ((1, 28, 28), 3), ((3, 64, 64), 3)]
)
def test_fitting_depth_leaves_a_map(shape: tuple[int, int, int], depth: int) -> None:
    assert fitting_depth(shape) == depth
    assert random_network(shape, 2, None).embed_dim >= 2 * 4


def test_clip_rows_holds_the_scale_constant() -> None:
    v = torch.tensor([[3.0, 4.0], [0.3, 0.4]], requires_grad=True)
    clipped = clip_rows(v, 1.0)
    torch.testing.assert_close(clipped.detach().norm(dim=1), torch.tensor([1.0, 0.5]))
    clipped.sum().backward()
    torch.testing.assert_close(v.grad, torch.tensor([[0.2, 0.2], [1.0, 1.0]]))


def test_class_steps_in_closed_form_are_those_of_sgd() -> None:
    """Against torch.optim.SGD with one step per class, the other classes' gradients being zero."""
    k, lr, momentum = 4, 0.3, 0.5
    start = torch.randn(k, 2, 1, 3, 3, dtype=torch.float64)
    ours, velocity = start.clone(), torch.zeros_like(start)
    oracle = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([oracle], lr=lr, momentum=momentum)
    for _ in range(3):
        ours, velocity = momentum_step(
            ours, velocity, lambda z: 2 * z.sin(), lr=lr, momentum=momentum, class_steps=True
        )
        for c in range(k):
            oracle.grad = torch.zeros_like(oracle)
            oracle.grad[c] = 2 * oracle.detach()[c].sin()
            optimizer.step()
    torch.testing.assert_close(ours, oracle.detach())


def test_augmentation_is_by_class_and_equal_for_its_records(public: Public) -> None:
    network = random_network((1, 8, 8), 8, 2, torch.Generator().manual_seed(0), "cpu")
    dsa = Dsa()
    draws = dsa.draw(torch.Generator().manual_seed(3), 3)
    fn = class_feature(FeatureMap(network=network), dsa, draws)
    x = public.auxiliary[:1].repeat(6, 1, 1, 1)
    rows = fn(x, torch.tensor([0, 1, 2, 0, 1, 2]))
    torch.testing.assert_close(rows[:3], rows[3:])
    for k in range(3):
        torch.testing.assert_close(rows[k : k + 1], network.embed(dsa.apply(x[:1], draws[k : k + 1])))
