"""The pieces of `joint`: norms of the record functions, the mixture, the views, and the fit. The whole is in test_contract.

B records, K classes, d pixel dims, N views, D feature dims, J components.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dpdistill.errors import ConfigError
from dpdistill.methods.base import Public
from dpdistill.methods.joint import Config, _public_images, plan, teaching, views
from dpdistill.methods.joint.matching import match, packed
from dpdistill.methods.joint.teaching import lesson_of, lessons, teach
from dpdistill.methods.shared import mixture as mix
from dpdistill.models import ConvNet, Dsa, expand
from dpdistill.workspace import FolderWorkspace

SHAPE = (1, 8, 8)


def images(n: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def extremes() -> torch.Tensor:
    """Images far from the public ones: corners, single pixels, checks, and values that no image has."""
    pixel = torch.zeros(1, *SHAPE)
    pixel[..., 3, 3] = 1
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    plain = [torch.ones(1, *SHAPE), -torch.ones(1, *SHAPE), torch.zeros(1, *SHAPE), pixel, board.view(1, *SHAPE)]
    return torch.cat([*plain, 1e-30 * images(1), 1e6 * images(1), 1e15 * images(1)])


@pytest.fixture
def space() -> mix.PixelSpace:
    return mix.pixel_space(images(60) * 0.3, 7)


@pytest.fixture
def two(tmp_path: Path) -> list[views.View]:
    return views_of(2, SHAPE, tmp_path)


def views_of(n: int, shape: tuple[int, int, int], folder: Path, width: int = 4) -> list[views.View]:
    dsa = Dsa(strategy="crop_scale_rotate")
    return views.random_views(n, shape, width, dsa, FolderWorkspace(folder / "views", quiet=True))


def test_record_vectors_are_no_longer_than_one(space: mix.PixelSpace, two: list[views.View]) -> None:
    x = torch.cat([extremes(), images(50), space.images(torch.eye(7) * 5, SHAPE)])
    y = torch.arange(len(x)) % 3
    centres = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0))
    z = views.coordinates(two, views.seen(two, images(40, 1)), 7)
    for vectors, dim in (
        (mix.moments(space, x), mix.n_moments(7)),
        (mix.local_means(space, centres, x, y), 4 * 8),
        (z(x), 8),
    ):
        assert vectors.shape == (len(x), dim)
        assert (vectors.double().norm(dim=1) <= 1 + 1e-6).all()
        assert vectors.isfinite().all()
        # Long records come to the bound: the shares of the unit vector are all used.
        assert vectors.norm(dim=1).max() > 0.999


def test_moments_are_those_of_the_coordinates(space: mix.PixelSpace) -> None:
    x = images(500)
    z = space.coordinates(x)
    total = mix.moments(space, x).sum(dim=0, keepdim=True)
    count, mean, covariance = mix.read_moments(total, 7, 1e-9)
    assert count.item() == pytest.approx(500, rel=1e-4)
    assert torch.allclose(mean[0], z.mean(dim=0), atol=1e-4)
    assert torch.allclose(covariance[0], torch.cov(z.T, correction=0), atol=1e-4)


def test_local_means_fill_the_block_of_the_nearest_centre(space: mix.PixelSpace) -> None:
    x, y = images(30), torch.arange(30) % 2
    centres = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) * 0.3
    blocks = mix.local_means(space, centres, x, y).view(30, 3, 8)
    z = space.coordinates(x)
    for i in range(30):
        nearest = (z[i] - centres[y[i]]).norm(dim=1).argmin()
        assert (blocks[i].norm(dim=1) > 0).nonzero().flatten().tolist() == [nearest]
        assert torch.allclose(blocks[i, nearest, :7], math.sqrt(1 - 0.3**2) * z[i], atol=1e-6)


@pytest.mark.parametrize("noise", [1e-6, 1.0, 1e6])
def test_noise_alone_makes_a_mixture_that_can_be_sampled(noise: float) -> None:
    """An empty class: all sums are noise, small, usual, or huge."""
    k, d, j = 3, 6, 4
    g = torch.Generator().manual_seed(0)
    total = torch.randn(k, mix.n_moments(d), generator=g) * noise
    count, mean, covariance = mix.read_moments(total, d, noise)
    assert (count >= 4 * noise + 1).all()
    centres = mix.first_centres(mean, covariance, j, g)
    assert centres.shape == (k, j, d)
    for _ in range(2):
        local = torch.randn(k, j * (d + 1), generator=g) * noise
        centres, weights = mix.refine_centres(local, centres, mean, noise)
        assert (weights > 0).all()
    fitted = mix.mixture(count, mean, covariance, centres, weights)
    assert torch.allclose(fitted.weights.sum(dim=1), torch.ones(k))
    z = fitted.sample(11, g)
    assert z.shape == (k, 11, d)
    assert z.isfinite().all()
    shown = mix.pixel_space(images(30), d).images(z.flatten(0, 1), SHAPE)
    assert shown.shape == (33, *SHAPE)
    assert shown.abs().max() <= 1


def test_centres_stay_where_noise_is_all_there_is() -> None:
    centres = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    few = torch.zeros(2, 3 * 6)  # a count of 0: nothing to move to
    moved, _ = mix.refine_centres(few, centres, centres.mean(dim=1), 1.0)
    assert torch.equal(moved, centres)
    exact = torch.cat([math.sqrt(1 - 0.3**2) * 100 * (centres + 1), torch.full((2, 3, 1), 30.0)], dim=2)
    moved, weights = mix.refine_centres(exact.flatten(1), centres, centres.mean(dim=1), 1e-6)
    assert torch.allclose(moved, centres + 1, atol=1e-3)
    assert torch.allclose(weights, torch.full((2, 3), 100.0))


def test_a_mixture_sampled_has_its_moments() -> None:
    d = 3
    mean = torch.tensor([[0.1, -0.2, 0.3]])
    centres = mean[:, None] + torch.tensor([[[0.3, 0, 0], [-0.3, 0, 0]]])
    covariance = torch.diag(torch.tensor([0.13, 0.05, 0.02]))[None]
    fitted = mix.mixture(torch.tensor([9.0]), mean, covariance, centres, torch.ones(1, 2))
    z = fitted.sample(40_000, torch.Generator().manual_seed(0))[0]
    assert z.shape == (40_000, d)
    assert torch.allclose(z.mean(dim=0), mean[0], atol=0.01)
    assert torch.allclose(torch.cov(z.T), covariance[0], atol=0.01)


def test_noisy_sums_are_read_as_means_counts_and_the_noise_in_them(two: list[views.View]) -> None:
    z = views.coordinates(two, views.seen(two, images(40, 1)), 5)
    x = images(30, 2)
    vectors = z(x)
    means, noise = views.read(torch.stack([vectors.sum(dim=0), vectors[:3].sum(dim=0)]), 1e-3)
    of_all = z.of(views.seen(two, x))
    assert torch.allclose(means, torch.stack([of_all.mean(dim=0), of_all[:3].mean(dim=0)]), atol=1e-5)
    assert float(noise[1] / noise[0]) == pytest.approx(10, rel=1e-4)  # of thirty records, and of three
    # Of sums with noise of 1 the means have noise of so much.
    g = torch.Generator().manual_seed(0)
    noisy = vectors.sum(dim=0) + torch.randn(4000, 6, generator=g) * 0.1
    found, noise = views.read(noisy, 0.1)
    assert float((found - means[:1]).std()) == pytest.approx(float(noise.mean()), rel=0.1)
    _, empty = views.read(torch.zeros(1, 6), 2.0)
    # No class has fewer records than noise alone might look like.
    assert float(empty) == pytest.approx(2 / 9 / views.UNIT)


def test_coordinates_say_all_of_what_their_axes_hold(two: list[views.View]) -> None:
    """Of images near the centre, which are not cut: lifted, they are the features again."""
    seen = views.seen(two, images(12, 1))
    z = views.coordinates(two, seen, 16)  # eleven axes hold twelve images
    near = z.centre + 0.1 * (seen - z.centre)
    assert torch.allclose(z.centre + z.lifted(z.of(near)), near, atol=1e-5)
    one = torch.nn.functional.one_hot(torch.tensor([2]), 16).float()
    assert torch.allclose(z.lifted(one)[0], z.axes[:, 2] / z.scale[2])
    # Along weaker axes images are told apart better than by their features, by the fourth root of the variance.
    spread = ((seen - z.centre) @ z.axes).square().mean(dim=0)[:8]
    assert torch.allclose(z.scale[:8] / z.scale[0], (spread / spread[0]).pow(-0.25), rtol=1e-3)


def test_trust_is_all_or_nothing_where_noise_is_nothing_or_all() -> None:
    away = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(views.trusted(away, torch.full((5,), 1e-4)), away, atol=1e-5)
    assert views.trusted(away, torch.full((5,), 1e4)).abs().max() == 0
    assert views.trusted(torch.zeros(5, 7), torch.ones(5)).abs().max() == 0


def test_trust_comes_nearer_to_the_truth_than_the_noisy_means_and_than_none() -> None:
    """Along each axis as far as it deserves, and in rows of little noise further than in others."""
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor([2.0, 0.5, 0.1, 0.0])
    noise = torch.tensor([0.1, 1.0]).repeat(500)
    truth = torch.randn(1000, 4, generator=g) * spread
    noisy = truth + torch.randn(1000, 4, generator=g) * noise[:, None]
    found = views.trusted(noisy, noise)
    for row in (0, 1):
        error = (found - truth)[row::2].square().mean(dim=0)
        best = spread**2 * noise[row] ** 2 / (spread**2 + noise[row] ** 2)
        assert torch.allclose(error, best, rtol=0.25, atol=2e-4)
        assert (error <= 1.05 * (noisy - truth)[row::2].square().mean(dim=0)).all()


def test_coordinates_keep_what_the_plan_promised(two: list[views.View]) -> None:
    """Fewer directions than coordinates, and none at all: zeros, never NaN."""
    for reference in (images(5), images(1).expand(20, -1, -1, -1), torch.zeros(20, *SHAPE)):
        z = views.coordinates(two, views.seen(two, reference), 30)
        vectors = z(images(6, 2))
        assert vectors.shape == (6, 31)
        assert vectors.isfinite().all()
        assert (vectors.norm(dim=1) <= 1 + 1e-6).all()
        assert z.lifted(torch.ones(1, 30)).isfinite().all()


def test_a_view_is_the_network_under_its_own_augmentation_and_treats_records_alone() -> None:
    x, dsa = images(6, 1, (1, 16, 16)), Dsa(strategy="crop")
    net = ConvNet((1, 16, 16), 1, width=8).requires_grad_(False)
    draw = dsa.draw(torch.Generator().manual_seed(3))
    view = views.View(net, dsa, draw)
    assert torch.equal(view(x), net.embed(dsa.apply(x, draw)))
    assert not torch.allclose(view(x), net.embed(x), atol=1e-3)
    torch.testing.assert_close(torch.cat([view(row) for row in x.split(1)]), view(x))


def test_views_differ_take_every_operation_in_turn_and_repeat_themselves(tmp_path: Path) -> None:
    first, again = views_of(5, SHAPE, tmp_path), views_of(5, SHAPE, tmp_path)
    assert [int(view.draw[0, 0]) for view in first] == [0, 1, 2, 0, 1]
    x = images(4)
    assert torch.equal(views.seen(first, x), views.seen(again, x))
    weights = [view.network.features[0].weight for view in first]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert torch.equal(views.seen(first, x), torch.cat([view(x) for view in first], dim=1))


def test_evened_views_differ_alike_and_say_what_they_did(tmp_path: Path) -> None:
    three, x = views_of(3, SHAPE, tmp_path), images(40)
    with torch.no_grad():
        three[1].network.features[-3].weight.mul_(7)  # as a taught network's features grow
    before = views.seen(three, x)
    features = views.evened(three, before)
    parts = features.view(40, 3, -1)
    assert torch.allclose((parts - parts.mean(dim=0)).square().sum(dim=2).mean(dim=0), torch.ones(3), atol=1e-4)
    torch.testing.assert_close(views.seen(three, x), features)  # records and fitted images are in these units, too
    assert three[1].unit > 3 * three[0].unit
    torch.testing.assert_close(features[:, : before.shape[1] // 3] * three[0].unit, before[:, : before.shape[1] // 3])
    views.evened(three, torch.ones_like(before))  # images that are all alike
    assert views.seen(three, x).isfinite().all()


def test_lessons_are_shared_out_over_operations() -> None:
    assert lessons(16, 6, 800) == [0] * 6 + [200] * 6 + [800] * 4
    assert lessons(5, 1, 8) == [0, 2, 8, 0, 2]
    assert lessons(3, 0, 8) == [0, 2, 8]
    assert lessons(16, 6, 0) == [0] * 16


def test_lessons_are_on_a_persons_labels_or_on_single_images() -> None:
    own, labels = images(9), torch.arange(9) % 3
    plain = Public(image_shape=SHAPE, class_names=("a", "b"), auxiliary=own)
    assert all(
        a is b
        for a, b in zip(lesson_of(dataclasses.replace(plain, auxiliary_labels=labels), own), (own, labels), strict=True)
    )
    for n, taken in ((9, 9), (3000, 1000)):
        pool = images(n, 1)
        shown, exemplars = lesson_of(plain, pool)
        assert torch.equal(shown, pool[:taken])
        assert exemplars.tolist() == list(range(taken))


def two_kinds(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Upright and lying bars in noise, somewhere."""
    g, labels = torch.Generator().manual_seed(seed), torch.arange(n) % 2
    x = torch.randn(n, *SHAPE, generator=g) * 0.5
    for image, lying, place in zip(x, labels.tolist(), torch.randint(8, (n,), generator=g).tolist(), strict=True):
        image[0].select(1 - lying, place).fill_(1.0)
    return x.clamp(-1, 1), labels


def test_taught_networks_tell_public_images_apart_and_the_others_stay(tmp_path: Path) -> None:
    dsa, (x, labels) = Dsa(strategy="crop"), two_kinds(400)
    three, untaught = views_of(3, SHAPE, tmp_path, width=16), views_of(3, SHAPE, tmp_path, width=16)
    fresh, of_fresh = two_kinds(400, 1)

    def apart(view: views.View) -> float:
        """How far apart the means of the two kinds are, in spreads of one kind."""
        a, b = (view.network.embed(fresh[of_fresh == kind]) for kind in (0, 1))
        return float((a.mean(dim=0) - b.mean(dim=0)).norm() / a.var(dim=0).sum().sqrt())

    teach(three, x, labels, [0, 60, 0], dsa, FolderWorkspace(tmp_path / "a", quiet=True))
    assert apart(three[1]) > 1.5 * apart(untaught[1])
    assert not any(weight.requires_grad for view in three for weight in view.parameters())
    for i in (0, 2):
        assert torch.equal(views.seen(three[i : i + 1], x), views.seen(untaught[i : i + 1], x))
    assert [path.name for path in (tmp_path / "a").glob("network-*")] == ["network-1.safetensors"]


def test_a_stopped_school_goes_on_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = two_kinds(40)

    def taught(folder: Path) -> torch.Tensor:
        three = views_of(3, SHAPE, tmp_path)
        teach(three, x, labels, [3, 0, 2], Dsa(strategy="crop"), FolderWorkspace(folder, quiet=True))
        return views.seen(three, x)

    whole = taught(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(teaching, "_train", stop_after(1, teaching._train))
        with pytest.raises(KeyboardInterrupt):
            taught(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(teaching, "_train", stop_after(1, teaching._train))  # one is left
        assert torch.equal(taught(tmp_path / "stopped"), whole)
    monkeypatch.setattr(teaching, "_train", stop_after(0, teaching._train))
    assert torch.equal(taught(tmp_path / "stopped"), whole)


def stop_after(n: int, inner: Callable[..., None]) -> Callable[..., None]:
    """The function, which may be called n times."""
    calls = iter(range(n))

    def counted(*args: object) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        inner(*args)

    return counted


@pytest.mark.parametrize("gain", [1, 8])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 24), (1, 17, 18)])
def test_packed_is_undone_by_expand(shape: tuple[int, int, int], gain: int) -> None:
    rows, columns = torch.linspace(-1, 1, shape[1])[:, None], torch.linspace(-1, 1, shape[2])
    g = torch.Generator().manual_seed(0)
    a, b, c = torch.rand(3, 12, shape[0], 1, 1, generator=g)
    smooth = 0.6 * ((a - 0.5) * rows + (b - 0.5) * columns + (c - 0.5))  # what survives being made smaller
    stored = packed(smooth, 2, gain)
    assert stored.shape == (3, *shape)
    back = expand(stored, 2, gain)
    assert back.shape == smooth.shape
    assert (back - smooth)[:, :, 2:-2, 2:-2].abs().max() < (
        0.03 if shape[1] % 2 == 0 else 0.4
    )  # odd sides: parts share a row
    assert torch.equal(packed(smooth, 1, 1), smooth)


def test_a_gain_keeps_thin_strokes() -> None:
    strokes = torch.full((8, 1, 16, 16), -1.0)
    for row, image in enumerate(strokes):
        image[0, :, 3 + row : 5 + row] = 1

    def lost(gain: int) -> float:
        return float((expand(packed(strokes, 2, gain), 2, gain) - strokes).square().mean())

    assert lost(8) < 0.2 * lost(1)


def fit(folder: Path, steps: int = 9, parts: int = 1, save_every: int = 50, **changes) -> torch.Tensor:
    three = views_of(3, SHAPE, folder)
    return match(
        three,
        changes.get("target", views.seen(three, images(2, 1)).view(2, 3, -1)),
        images(4, 3).view(2, 2, *SHAPE),
        parts=parts,
        gain=changes.get("gain", 1),
        steps=steps,
        lr=0.05,
        workspace=FolderWorkspace(folder, quiet=True),
        save_every=save_every,
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_the_fit_stays_in_range_and_repeats_itself(tmp_path: Path, parts: int) -> None:
    first = fit(tmp_path / "a", parts=parts)
    assert first.shape == (2, 2, *SHAPE)
    assert first.abs().max() <= 1
    assert torch.equal(fit(tmp_path / "b", parts=parts), first)
    assert not torch.equal(first, images(4, 3).view(2, 2, *SHAPE))


@pytest.mark.parametrize("save_every", range(1, 9))
def test_the_fit_goes_on_from_any_step(tmp_path: Path, save_every: int) -> None:
    """Also from the middle of a turn through the views."""
    whole = fit(tmp_path / "a")
    assert torch.equal(fit(tmp_path / "b", save_every=save_every), whole)
    assert FolderWorkspace(tmp_path / "b").load("matching") is not None
    assert torch.equal(fit(tmp_path / "b", save_every=save_every), whole)  # from the last checkpoint


@pytest.mark.parametrize("classes", [1, 3])
def test_the_fit_comes_nearer_to_the_means_of_the_classes(classes: int, tmp_path: Path) -> None:
    """From noise to bars, in a network that took no part."""
    shape = (1, 16, 16)
    bars = torch.full((classes, *shape), -1.0)
    for row in range(classes):
        bars[row, :, 4 * row : 4 * row + 3] = 1
    net = ConvNet(shape, 1, width=64, generator=torch.Generator().manual_seed(9)).requires_grad_(False)
    start = images(2 * classes, 3, shape).view(classes, 2, *shape)

    def away(made: torch.Tensor) -> float:
        return float((net.embed(made.flatten(0, 1)).view(classes, 2, -1).mean(dim=1) - net.embed(bars)).square().sum())

    eight = views_of(8, shape, tmp_path, width=16)
    target = views.seen(eight, bars).view(classes, 8, -1)
    workspace = FolderWorkspace(tmp_path, quiet=True)
    made = match(eight, target, start, parts=1, gain=1, steps=100, lr=0.1, workspace=workspace)
    assert away(made) < 0.7 * away(start)


def test_equal_images_and_a_target_of_nothing_give_no_nan(tmp_path: Path) -> None:
    assert fit(tmp_path, target=torch.zeros(2, 3, 4)).isfinite().all()


def test_the_shares_are_of_one_budget() -> None:
    public = Public(image_shape=SHAPE, class_names=("a", "b"), auxiliary=images(4))
    asked = plan(Config(pixel_dims=999), public, 3.0)
    assert sum(1 / planned.query.noise_multiplier**2 for planned in asked) == pytest.approx(1 / 9)
    assert [(p.query.sampling_prob, p.query.n_classes, p.count) for p in asked] == [
        (1.0, rows, 1) for rows in (2, 2, 2, 1, 2)
    ]
    assert asked[0].query.dim == mix.n_moments(64)  # no more coordinates than pixels
    assert asked[4].query.dim == 16 * 32 + 1  # nor more axes than the views have features
    coloured = Public(image_shape=(3, 8, 8), class_names=("a", "b"), auxiliary=images(4, shape=(3, 8, 8)))
    assert plan(Config(), coloured, 3.0)[3].query.dim == 513  # without tones
    assert sum(p.query.noise_multiplier**-2 for p in plan(Config(), coloured, 3.0)) == pytest.approx(1 / 9)
    for wrong in (
        {"share_means": 0.5},
        {"share_local": 0.0, "share_means": 0.8},
        {"share_moments": -0.2, "share_means": 0.8},
        {"share_means": float("nan")},
    ):
        with pytest.raises(ConfigError, match="shares"):
            Config(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"parts": 3},
        {"parts": -1},
        {"gain": 0},
        {"gain": 65},
        {"share_tones": 1.0},
        {"share_tones": -0.1},
        {"procedural": float("nan")},
        {"components": 1501},
        {"components": 0},
        {"networks": 0},
        {"feature_dims": 0},
        {"width": 0},
        {"steps": -1},
        {"lessons": -1},
        {"lr": 0.0},
        {"lr": float("nan")},
    ],
    ids=str,
)
def test_settings_that_would_fail_after_the_charge(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=r"Expected .*got"):
        Config(**wrong)


def test_a_pool_that_no_memory_holds_is_refused_before_anything_is_charged() -> None:
    public = Public(image_shape=(3, 64, 64), class_names=("a", "b"), auxiliary=images(4, shape=(3, 64, 64)))
    assert plan(Config(), public, 1.0)
    with pytest.raises(ConfigError, match=r"614,400 features of 4,000 images .* fewer networks"):
        plan(Config(networks=300), public, 1.0)


def test_public_images_are_mixed_by_their_share(tmp_path: Path) -> None:
    workspace = FolderWorkspace(tmp_path, quiet=True)
    own, made_up = torch.full((50, *SHAPE), 0.5), torch.full((9000, *SHAPE), -0.5)

    def shares(shape: tuple[int, int, int], **settings: object) -> tuple[int, int]:
        own_images, others = (x.expand(-1, shape[0], -1, -1) for x in (own, made_up))
        public = Public(image_shape=shape, class_names=("a",), auxiliary=own_images, procedural=others)
        mixed = _public_images(Config(**settings), public, workspace)
        return int((mixed[:, 0, 0, 0] > 0).sum()), int((mixed[:, 0, 0, 0] < 0).sum())

    assert shares((1, 8, 8)) == (50, 3000)
    assert shares((3, 8, 8)) == (50, 0)
    assert shares((3, 8, 8), procedural=1.0) == (0, 6000)
    alone = _public_images(Config(), Public(image_shape=SHAPE, class_names=("a",), auxiliary=made_up), workspace)
    assert len(alone) == 6000
    assert np.isclose(float(alone.mean()), -0.5)
