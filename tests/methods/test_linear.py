"""The private linear teacher: how many components it uses follows from the released count and the noise, within what was planned."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpdistill.data.images import LabelledImages
from dpdistill.errors import ConfigError
from dpdistill.methods.base import Public
from dpdistill.methods.shared import linear
from dpdistill.workspace import FolderWorkspace

SHAPE = (1, 8, 8)


def public(channels: int = 1) -> Public:
    x = torch.rand(80, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Public(image_shape=(channels, 8, 8), class_names=("a", "b"), auxiliary=x)


def records(n: int = 40) -> LabelledImages:
    """Two classes, light above or below."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    images = rng.integers(0, 100, (n, *SHAPE)).astype(np.uint8)
    images[labels == 0, :, :4] += 150
    return LabelledImages(images=images, labels=labels.astype(np.int64), class_names=("a", "b"), source="toy")


@pytest.mark.parametrize(("above", "used"), [(0.0, 20), (1e9, 5)], ids=["much is known", "little is known"])
def test_the_teacher_is_wide_where_records_outweigh_the_noise(
    above: float, used: int, tmp_path: Path, open_door: Callable[..., Any]
) -> None:
    config = linear.Training(teacher_steps=6, teacher_dims=20, narrow_dims=5, wide_above=above)
    asked = linear.plan(config, public(), 0.05)
    assert asked[1].query.dim == 2 * 21  # planned before the count is known
    workspace = FolderWorkspace(tmp_path / "work", quiet=True)
    model = linear.train(config, public(), open_door(records(), micro_batch=8), asked, workspace)
    assert int(model.projection.any(dim=0).sum()) == used
    x, y = torch.from_numpy(records().to_unit()), torch.from_numpy(records().labels)
    torch.testing.assert_close(model.features(x).norm(dim=1), torch.ones(len(x)))
    assert float((model(x).argmax(dim=1) == y).float().mean()) > 0.9


def test_components_asked_for() -> None:
    auto = linear.Training()
    assert (auto.dims(public()), auto.dims(public(3))) == (2000, 500)
    assert linear.Training(teacher_dims=7).dims(public(3)) == 7
    for wrong in ({"teacher_dims": 0}, {"narrow_dims": 0}):
        with pytest.raises(ConfigError, match="dims"):
            linear.Training(**wrong)
