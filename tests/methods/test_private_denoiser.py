"""The private diffusion teacher behind the door, on made-up images.

B records, K multiplicity.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from behind_the_door import Stop, Stopping, made_up_public, made_up_records, run_method
from dpdistill.data.images import LabelledImages
from dpdistill.errors import ConfigError, RecordwiseError
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods.base import Public
from dpdistill.methods.diffusion import dpdm, dpsad, pretraining, private_denoiser
from dpdistill.methods.shared import linear
from dpdistill.models import edm
from dpdistill.privacy import Ledger
from dpdistill.workspace import FolderWorkspace

CONFIG = dpdm.Config(
    expected_records=60,
    expected_batch=30,
    steps=6,
    multiplicity=2,
    width=16,
    depth=1,
    checkpoint_steps=2,
    chunk=16,
    per_class=2,
    sampling_steps=3,
    seed_images=30,
    student_width=8,
    student_steps=2,
    student_batch=8,
    critic_width=4,
    pool=8,
    answer_steps=2,
)


@pytest.fixture
def records() -> LabelledImages:
    return made_up_records(1, 8)


@pytest.fixture
def public() -> Public:
    return made_up_public(1, 8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def go(*args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
    return run_method(dpdm, *args, **kwargs)


def some(shape: tuple[int, int, int] = (1, 8, 8), n: int = 40) -> tuple[Tensor, Tensor]:
    return torch.rand(n, *shape, generator=seeded(3)) * 2 - 1, torch.arange(n) % 3


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 20, 12)])
def test_every_shape_passes_the_door(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    public = replace(made_up_public(1, 8), image_shape=shape)
    config = replace(CONFIG, chunk=2)
    model = private_denoiser.network(config, public, seeded(0))
    assert model.image_shape == shape
    query = private_denoiser.planned(config, public, 1.0).query
    records = made_up_records(*shape[:2])
    images = torch.zeros(len(records.labels), *shape).byte().numpy()
    records = replace(records, images=images)
    with Ledger.open(tmp_path / "l", cap=(1.0, 1e-5), data="toy") as ledger:
        private = PrivateData(records, ledger, Vault.open(tmp_path / "v", insecure_seed=1))
        private.check(query, private_denoiser.record_gradient(model, config, seeded(1)))
        assert private.checks["denoiser-gradient"] < 1e-4


def test_end_to_end(tmp_path: Path, records: LabelledImages, public: Public) -> None:
    before = torch.random.get_rng_state()
    made, parts = go(tmp_path, records, public, CONFIG)
    synthetic = made.images
    assert parts == [(0.5, 1.0, 6)]
    assert synthetic.images.shape == (6, 1, 8, 8)
    assert synthetic.images.abs().max() <= 1
    assert synthetic.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(torch.random.get_rng_state(), before)


def given_by_a_person(public: Public) -> Public:
    return replace(public, procedural=public.auxiliary)


def test_public_images_pretrain_the_denoiser_and_cost_nothing(
    tmp_path: Path, records: LabelledImages, public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DP-SGD begins where pretraining ended, which is nearer to the public images, of every class alike."""
    stripes = torch.ones(40, 1, 8, 8)
    stripes[:, :, :, ::2] = -1
    public = given_by_a_person(replace(public, auxiliary=stripes))
    begun: list[Tensor] = []
    train = private_denoiser.train

    def noted(model: Any, *rest: Any) -> Any:
        with torch.no_grad():
            y = torch.arange(4)
            begun.append(model(stripes[:4] + torch.randn(4, 1, 8, 8, generator=seeded(1)), torch.ones(4), y))
        return train(model, *rest)

    monkeypatch.setattr(private_denoiser, "train", noted)
    plain, parts = go(tmp_path / "plain", records, public, CONFIG)
    made, same_parts = go(tmp_path / "pre", records, public, replace(CONFIG, pretrain_steps=60))
    assert parts == same_parts
    assert not torch.equal(plain.images.images, made.images.images)
    far, near = ((answer - stripes[:4]).square().mean(dim=(1, 2, 3)) for answer in begun)
    assert bool((near < far / 2).all())


def test_the_correction_of_a_warm_start_is_pretrained_as_well(
    tmp_path: Path, records: LabelledImages, public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a denoiser from scratch is: from where the released warm start stands, at no cost; and refused where there is no DP-SGD."""
    monkeypatch.setattr(dpsad, "GUIDE", linear.Training(teacher_steps=2, teacher_dims=4))
    dark = given_by_a_person(replace(public, auxiliary=-torch.ones(40, 1, 8, 8)))
    small = {
        name: getattr(CONFIG, name) for name in dpdm.Config.__dataclass_fields__ if name not in ("lr", "label_dropout")
    }
    config = dpsad.Config(
        **small | {"pretrain_steps": 40}, warm_start="mixture", share_denoiser=0.5, pixel_dims=6, components=2
    )
    seen: list[float] = []
    pretrain = pretraining.pretrain

    def noted(model: Any, *rest: Any) -> None:
        def error() -> float:
            noise = torch.randn(12, 1, 8, 8, generator=seeded(1))
            with torch.no_grad():
                return float((model(noise - 1, torch.ones(12), torch.arange(12) % 4) + 1).square().mean())

        seen.append(error())
        pretrain(model, *rest)
        seen.append(error())

    monkeypatch.setattr(pretraining, "pretrain", noted)
    made, parts = run_method(dpsad, tmp_path / "pre", records, dark, config)
    plain, same_parts = run_method(dpsad, tmp_path / "plain", records, dark, replace(config, pretrain_steps=0))
    assert parts == same_parts
    assert not torch.equal(plain.images.images, made.images.images)
    first, then, *untouched = seen
    assert then < first / 2
    assert untouched == [first, first]
    with pytest.raises(ConfigError, match=r"share_denoiser=0\.5"):
        dpsad.plan(replace(config, share_denoiser=0.0), dark, 1.0)
    with pytest.raises(ConfigError, match="give --auxiliary"):
        dpsad.plan(config, public, 1.0)


@pytest.mark.parametrize("n", [0, 3])
def test_stopped_in_pretraining_it_goes_on_with_the_same_bytes(
    tmp_path: Path, records: LabelledImages, public: Public, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "EVERY", 2)
    config, public = replace(CONFIG, pretrain_steps=5), given_by_a_person(public)
    whole, _ = go(tmp_path / "whole", records, public, config)
    with pytest.raises(Stop):
        go(tmp_path / "cut", records, public, config, Stopping(tmp_path / "cut" / "w", n))
    assert (tmp_path / "cut" / "w" / "pretraining.safetensors").exists() == (n > 0)
    assert not (tmp_path / "cut" / "w" / "denoiser.safetensors").exists()
    resumed, _ = go(tmp_path / "cut", records, public, config)
    assert torch.equal(resumed.images.images, whole.images.images)


def test_pretraining_needs_images_that_a_person_gave(public: Public) -> None:
    config = replace(CONFIG, pretrain_steps=5)
    with pytest.raises(ConfigError, match="give --auxiliary"):
        dpdm.plan(config, public, 1.0)
    assert dpdm.plan(config, given_by_a_person(public), 1.0) == dpdm.plan(CONFIG, public, 1.0)
    with pytest.raises(ConfigError, match="pretrain_steps of at least 0"):
        replace(CONFIG, pretrain_steps=-1)


@pytest.mark.parametrize("n", [1, 5])
def test_resume_gives_the_same_bytes(tmp_path: Path, records: LabelledImages, public: Public, n: int) -> None:
    whole, _ = go(tmp_path / "whole", records, public, CONFIG)
    with pytest.raises(Stop):
        go(tmp_path / "cut", records, public, CONFIG, Stopping(tmp_path / "cut" / "w", n))
    resumed, _ = go(tmp_path / "cut", records, public, CONFIG)
    assert torch.equal(resumed.images.images, whole.images.images)


def test_learns_with_little_noise(
    tmp_path: Path, records: LabelledImages, public: Public, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, expected_batch=60, steps=40, lr=0.01, clip_norm=1.0, ema=0.5, width=32)
    drawn: list[Tensor] = []

    def kept(teacher: Any, *_: Any) -> None:  # of the teacher itself: a student of a few steps is tested elsewhere
        y = torch.arange(3).repeat_interleave(20)
        drawn.append(edm.sample(teacher.denoise, y, (1, 8, 8), steps=10, generator=seeded(4), sigma_max=10.0))

    monkeypatch.setattr(dpdm, "finish", kept)
    go(tmp_path, records, public, config, sigma=0.01)
    top, bottom = drawn[0][:20], drawn[0][20:40]
    assert float((top[:, :, :4] - top[:, :, 4:]).mean()) > 0.8  # in the records, 150/127.5 = 1.2
    assert float((bottom[:, :, :4] - bottom[:, :, 4:]).mean()) < -0.8


def test_loss_falls(tmp_path: Path, records: LabelledImages, public: Public) -> None:
    config = replace(CONFIG, expected_batch=60, steps=15, lr=0.02, clip_norm=10.0, ema=0.5)
    model = private_denoiser.network(config, public, seeded(0))
    x, y = torch.from_numpy(records.to_unit()), torch.from_numpy(records.labels)
    noise, sigma = torch.randn(x.shape, generator=seeded(1)), torch.full((len(x),), 0.4)

    def loss() -> float:
        with torch.no_grad():
            return float(edm.loss(model, x, noise, sigma, y, model.sigma_data).mean())

    values = [loss()]
    planned = private_denoiser.planned(config, public, 0.01)
    with Ledger.open(tmp_path / "l", cap=(1e7, 1e-5), data="toy") as ledger:
        private = PrivateData(records, ledger, Vault.open(tmp_path / "v", insecure_seed=1), micro_batch=64)
        workspace = FolderWorkspace(tmp_path / "w", quiet=True)
        private_denoiser.train(model, config, public, private, planned, workspace)
    values.append(loss())
    assert values[0] > 1.1 * values[1]


def test_multiplicity_is_free_and_lessens_the_noise(public: Public) -> None:
    x, y = some(n=1)
    parts, spread = [], []
    model = private_denoiser.network(CONFIG, public, seeded(0))
    for k in (1, 16):
        config = replace(CONFIG, multiplicity=k)
        parts.append(private_denoiser.planned(config, public, 1.0).part)
        rows = torch.cat([private_denoiser.record_gradient(model, config, seeded(s))(x, y) for s in range(30)])
        spread.append(float((rows - rows.mean(dim=0)).square().sum(dim=1).mean()))
    assert parts[0] == parts[1]
    assert spread[1] < spread[0] / 8  # by 16, and by more where strata help


def test_the_gradient_is_autograd_of_the_mean_loss(public: Public) -> None:
    config = replace(CONFIG, multiplicity=3, label_dropout=0.4)
    model = private_denoiser.network(config, public, seeded(0))
    x, y = some(n=5)
    rows = private_denoiser.record_gradient(model, replace(config, chunk=2), seeded(1))(x, y)
    classes, noise, sigma = private_denoiser._draws(config, model, seeded(1))(x, y)
    for i in range(5):
        value = edm.loss(model, x[i].expand(3, 1, 8, 8), noise[i], sigma[i], classes[i], model.sigma_data).mean()
        wanted = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
        torch.testing.assert_close(rows[i], wanted, rtol=1e-3, atol=1e-5)


def test_small_images_go_through_together_and_long_gradients_apart(public: Public) -> None:
    """Of 8x8 images, 16 at a time took three times as long; of 5 million weights, 256 gradients are 5 GB."""
    config = replace(CONFIG, chunk="auto")
    model = private_denoiser.network(config, public, seeded(0))
    x, y = some(n=20)
    rows = private_denoiser.record_gradient(model, config, seeded(1))(x, y)
    torch.testing.assert_close(rows, private_denoiser.record_gradient(model, CONFIG, seeded(1))(x, y))
    for shape, parameters, wanted in (
        ((1, 8, 8), 10**5, 256),
        ((1, 16, 16), 10**5, 64),
        ((1, 28, 28), 158_897, 16),
        ((3, 64, 64), 10**6, 16),
        ((1, 8, 8), 10**6, 128),
        ((1, 28, 28), 10**7, 8),
        ((1, 28, 28), 10**9, 1),
    ):
        model.image_shape = shape
        assert private_denoiser._chunk(model, parameters) == wanted
    with pytest.raises(ConfigError, match="chunk"):
        replace(CONFIG, chunk=0)


def test_draws_belong_to_the_record(public: Public) -> None:
    """The same wherever it stands; another pixel, label or step, and they are others; on the whole as they should be spread."""
    config = replace(CONFIG, multiplicity=4, label_dropout=0.25)
    model = private_denoiser.network(config, public, seeded(0))
    draws = private_denoiser._draws(config, model, seeded(1))
    x, y = some(n=1000)
    x, order = (x * 127.5).round() / 127.5, torch.randperm(1000, generator=seeded(2))
    found, shuffled = draws(x, y), draws(x[order], y[order])
    for a, b in zip(found, shuffled, strict=True):
        assert torch.equal(a[order], b)
    other = x.clone()
    other[:, 0, 3, 3] += 1 / 127.5
    changed = (
        draws(other, y)[1:],
        draws(x, (y + 1) % 3)[1:],
        private_denoiser._draws(config, model, seeded(2))(x, y)[1:],
    )
    for noise, sigma in changed:
        assert (noise != found[1]).flatten(2).any(dim=2).all()
        assert (sigma != found[2]).float().mean() > 0.99
    classes, noise, sigma = found
    assert 0.2 < float((classes == 3).float().mean()) < 0.3
    assert ((classes == 3) | (classes == y[:, None])).all()
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.std()) - 1) < 0.01
    levels = sigma.double().log().sub(config.p_mean).div(config.p_std)
    assert abs(float(levels.mean())) < 0.03
    assert abs(float(levels.std()) - 1) < 0.03
    uniform = torch.special.ndtr(levels)
    assert torch.equal((uniform * 4).long(), torch.arange(4).expand(1000, 4))  # one in each stratum


@pytest.mark.parametrize("plant", ["by place", "shared and by the batch"])
def test_the_door_refuses_draws_that_are_not_the_records(
    tmp_path: Path, records: LabelledImages, public: Public, plant: str
) -> None:
    model = private_denoiser.network(CONFIG, public, seeded(0))
    sound = private_denoiser.record_gradient(model, CONFIG, seeded(1))

    def planted(x: Tensor, y: Tensor) -> Tensor:
        if plant == "by place":
            noise = torch.randn(x.shape, generator=seeded(4))
        else:
            noise = torch.randn(x.shape[1:], generator=seeded(int(x.abs().sum() * 1000))).expand_as(x)
        return sound(x + noise, y)

    query = private_denoiser.planned(CONFIG, public, 1.0).query
    with Ledger.open(tmp_path / "l", cap=(1e7, 1e-5), data="toy") as ledger:
        private = PrivateData(records, ledger, Vault.open(tmp_path / "v", insecure_seed=1))
        private.check(query, sound)
        with pytest.raises(RecordwiseError):
            private.check(query, planted)
        assert [line["type"] for line in ledger.lines] == ["open"]  # nothing was charged


def test_optimiser_is_that_of_torch() -> None:
    oracle = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    theirs = torch.optim.Adam([oracle], lr=0.1)
    zero = torch.zeros(5, dtype=torch.float64)
    state = {"flat": zero, "first": zero, "second": zero}
    for step in range(4):
        oracle.grad = torch.arange(5.0, dtype=torch.float64) - step
        state = private_denoiser._adam(state, oracle.grad, 0.1, step)
        theirs.step()
    torch.testing.assert_close(state["flat"], oracle.detach(), rtol=1e-6, atol=1e-9)
    assert private_denoiser._falling(0.2, 0, 10) == 0.2
    assert math.isclose(private_denoiser._falling(0.2, 5, 10), 0.1)


def test_settings() -> None:
    assert replace(CONFIG, expected_batch=600).rate == 1
    for change in ({"steps": 0}, {"width": 18}, {"ema": 1.0}, {"lr": math.nan}, {"patch": 0}):
        with pytest.raises(ConfigError):
            replace(CONFIG, **change)
    query = private_denoiser.planned(CONFIG, made_up_public(3, 32), 1.0).query
    assert query.grid_bits <= 24
