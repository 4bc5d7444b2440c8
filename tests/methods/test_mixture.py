"""The mixture in fine coordinates: when it is taken, what it asks, and that it finds structure between weak directions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from behind_the_door import made_up_public, made_up_records
from dpdistill.errors import ConfigError
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.mechanisms.recordwise import check_recordwise, probe
from dpdistill.methods.diffusion import dpsad
from dpdistill.methods.shared import mixture as mix
from dpdistill.privacy import Ledger
from dpdistill.workspace import FolderWorkspace

K, J, D, N = 2, 3, 12, 4


@pytest.mark.parametrize(
    ("records", "epsilon", "classes", "dims"),
    [
        (60_000, 1.0, 10, mix.DIMS),
        (60_000, 10.0, 10, mix.FINE_DIMS),
        (60_000, 10.0, 100, mix.DIMS),  # few of each
        (10**9, 10.0, 1000, mix.DIMS),  # many, and too many classes to hold the moments of
        (10**6, 1.0, 10, mix.FINE_DIMS),
    ],
)
def test_fine_coordinates_where_classes_are_clear(records: int, epsilon: float, classes: int, dims: int) -> None:
    config = dpsad.Config(expected_records=records, target_epsilon=epsilon)
    assert mix.dims_for(config.weight, classes) == dims


def test_what_is_asked_of_small_and_large_images() -> None:
    config = dpsad.Config(expected_records=10**6, warm_start="mixture", components=J)
    for side, dims, sought in ((8, 64, 64), (12, 144, 144), (28, mix.FINE_DIMS, mix.LEADING)):
        first, second = (planned.query.dim for planned in dpsad.plan(config, made_up_public(1, side), 1.0)[:2])
        assert (first, second) == (mix.n_moments(dims), J * (sought + 1))
    assert dpsad.Config(expected_records=10, pixel_dims=5).dims(made_up_public(1, 8)) == 5
    with pytest.raises(ConfigError, match="pixel_dims"):
        dpsad.Config(expected_records=10, pixel_dims=0)


def test_weak_directions_go_with_the_centre_as_they_do_in_the_class() -> None:
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(D, D, generator=g))[0]
    root = torch.randn(K, D, D, generator=g) * torch.tensor([3.0] * N + [0.5] * (D - N))
    covariance, mean = axes @ root @ root.transpose(1, 2) @ axes.T, torch.randn(K, D, generator=g)
    leading = axes[:, :N].contiguous()
    x = torch.stack(
        [
            m + torch.linalg.cholesky(c + 1e-4 * torch.eye(D)) @ torch.randn(D, generator=g)
            for m, c in zip(mean, covariance, strict=True)
        ]
    )
    found = mix.lifted((x @ leading)[:, None], mean, covariance, leading)[:, 0]
    torch.testing.assert_close(found @ leading, x @ leading, atol=1e-3, rtol=1e-3)

    def off(a: Tensor) -> Tensor:  # of what was drawn
        return (a - x).norm(dim=1)

    still = mean + (x - mean) @ leading @ leading.T
    assert (off(found) < off(still)).all()


def test_rounding_does_not_choose_between_centres_that_coincide() -> None:
    """Noise that drowns the spread of a class leaves its centres in one place but for their last bits; a run was refused for it."""
    space = mix.pixel_space(made_up_public(1, 12).auxiliary, 6)
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        centres = mix.first_centres(torch.randn(3, 6, generator=g) * 0.03, torch.zeros(3, 6, 6), 2, g)

        def nearest(x: Tensor, y: Tensor, centres: Tensor = centres) -> Tensor:
            return mix.local_means(space, centres, x, y)

        assert check_recordwise(nearest, (1, 12, 12), 3, 14, 1.0) < 1e-5


def test_each_record_counts_for_the_nearest_centre() -> None:
    space = mix.pixel_space(made_up_public(1, 12).auxiliary, 6)
    x, y = probe((1, 12, 12), 3)
    z = space.coordinates(x)
    taken = mix.local_means(space, torch.eye(6)[:2].repeat(3, 1, 1), x, y).view(len(x), 2, -1).abs().sum(dim=2) > 0
    assert taken[:, 0].equal(z[:, 0] >= z[:, 1])
    assert taken[:, 1].equal(z[:, 0] < z[:, 1])


def test_with_little_noise_a_fine_mixture_has_the_moments_of_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mix, "FINE_DIMS", D)
    monkeypatch.setattr(mix, "LEADING", N)
    public, records = made_up_public(1, 8), made_up_records(1, 8)
    space = mix.pixel_space(public.auxiliary, D)
    planned = mix.planned("made-up", public.n_classes, D, J, 1e-3, 0.4, 0.3)
    assert [one.query.dim for one in planned] == [mix.n_moments(D), J * (N + 1), J * (N + 1)]  # type: ignore[union-attr]
    queries = [one.query for one in planned]
    with Ledger.open(tmp_path / "ledger", cap=(1e15, 1e-5)) as ledger:
        private = PrivateData(records, ledger, Vault.open(tmp_path / "vault"))
        fitted = mix.fit(space, J, private, queries, FolderWorkspace(tmp_path / "w", seed=0, quiet=True))  # type: ignore[arg-type]
    z = space.coordinates(torch.from_numpy(records.to_unit()))[torch.from_numpy(records.labels) == 0]
    drawn = fitted.sample(20_000, torch.Generator().manual_seed(0))[0]
    assert fitted.centres.shape == (public.n_classes, J, D)
    assert (drawn.mean(dim=0) - z.mean(dim=0)).norm() < 0.1 * z.mean(dim=0).norm()
    real, found = torch.cov(z.T, correction=0), torch.cov(drawn.T)
    assert (found - real).norm() < 0.35 * real.norm()
