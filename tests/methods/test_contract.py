"""What every method in METHODS and DIFFUSION_METHODS must keep that asks the door: on made-up records of several sizes and shares. A new
method is picked up.

N records, C channels, H, W size, K classes.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpdistill.config_files import build
from dpdistill.data.images import LabelledImages
from dpdistill.errors import ConfigError, DpdistillError
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods import DIFFUSION_METHODS, METHODS, Public, Sampler, Synthetic
from dpdistill.methods.diffusion import dpsad
from dpdistill.methods.shared import linear
from dpdistill.methods.shared.embedding import EmbeddingConfig
from dpdistill.privacy import Ledger, Planned, accounting
from dpdistill.privacy import ledger as ledgers
from dpdistill.workspace import FolderWorkspace
from small_sampler import NETWORK, SAMPLER

TINY: dict[str, dict[str, Any]] = {  # a method of another name runs with its defaults: add a line for it
    "joint": {
        "steps": 5,
        "networks": 2,
        "pool": 12,
        "feature_dims": 8,
        "pixel_dims": 6,
        "components": 2,
        "width": 4,
    },
    "dosser": {
        "sampling_steps": 3,
        "optimisation_steps": 5,
        "sampling_prob": 0.5,
        "group_size": 10,
        "subspace_dim": 4,
        "auxiliary_images": 20,
        "width": 4,
        "checkpoint_steps": 2,
    },
    "ndpdc": {"steps": 4, "sampling_prob": 0.5, "group_size": 10, "width": 4, "checkpoint_steps": 2},
    "dpmerf": {"n_frequencies": 20, "steps": 5, "batch": 4, "latent": 2, "width": 4, "checkpoint_steps": 2},
}
STUDENT = SAMPLER | {"checkpoint_steps": 2}
DENOISER = NETWORK | STUDENT | {"expected_records": 60, "expected_batch": 20, "steps": 3, "multiplicity": 2}
TINY["dpsad"] = DENOISER | {"warm_start": "mixture", "pixel_dims": 6, "components": 2, "share_denoiser": 0.5}
TINY["dpsad by embedding"] = DENOISER | {
    "warm_start": "embedding",
    "embedding_batch": 4,
    "pixel_dims": 6,
    "components": 2,
}
TINY["dpdm"] = DENOISER
TINY["shards"] = NETWORK | STUDENT | {"models": 3, "teacher_steps": 2, "fit_steps": 2, "queries": 4, "batch": 4}
TINY["shards"]["unit_moves"] = 2  # records without ids
EXCLUDED = {
    "paper": "is handed the records, plans nothing and asks no door: test_dpsad_breaks.py says what that breaks"
}
METHODS_OF_THE_DOOR = {
    name: method for name, method in {**METHODS, **DIFFUSION_METHODS}.items() if name not in EXCLUDED
}
ALL = {**METHODS_OF_THE_DOOR, "dpsad by embedding": METHODS_OF_THE_DOOR["dpsad"]}
NAMES = ("top", "left", "none")
SIGMA = 4.0
SHAPES = {"8x8 grey": (1, 8, 8), "16x16 colour": (3, 16, 16), "12x20 grey": (1, 12, 20)}

pytestmark = pytest.mark.parametrize("method", ALL)


@pytest.fixture(autouse=True)
def _no_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan costs is tested elsewhere, and takes longer than these runs."""
    monkeypatch.setattr(Ledger, "check_affordable", lambda *_: None)


class Stop(Exception):
    pass


class Stopping(FolderWorkspace):
    """Stops at the n-th step of all that `track` yields."""

    def __init__(self, folder: Path, n: int, checks: dict[str, float] | None = None) -> None:
        super().__init__(folder, quiet=True, checks=checks)
        self.left = n

    def track(self, steps: Sequence[int], description: str) -> Iterator[int]:
        for step in steps:
            if self.left == 0:
                raise Stop
            self.left -= 1
            yield step


def records(counts: Sequence[int], shape: tuple[int, int, int] = (1, 8, 8)) -> LabelledImages:
    """counts[k] records of class k, bright at the top, at the left, or nowhere."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    images = rng.integers(0, 90, (len(labels), *shape), dtype=np.uint8)
    images[labels == 0, :, : shape[1] // 2] += 150
    images[labels == 1, :, :, : shape[2] // 2] += 150
    return LabelledImages(images=images, labels=labels, class_names=NAMES[: len(counts)], source="made up")


def public(shape: tuple[int, int, int] = (1, 8, 8), k: int = 3) -> Public:
    auxiliary = torch.rand(40, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Public(image_shape=shape, class_names=NAMES[:k], auxiliary=auxiliary)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    few = EmbeddingConfig(n_frequencies=20, steps=5, at_once=8, latent=2, width=4, bf16=True, checkpoint_steps=2)
    monkeypatch.setattr(dpsad, "EMBEDDING", few)
    monkeypatch.setattr(dpsad, "N_GENERATED", 20)
    guide = linear.Training(teacher_steps=2, teacher_dims=4)  # not of thousands of noisy numbers
    monkeypatch.setattr(dpsad, "GUIDE", guide)


def settings(method: str, **changes: Any) -> Any:
    return build(ALL[method].Config, {"per_class": 2, **TINY.get(method, {}), **changes})


class Run:
    """One run behind the door, in a folder; given the same folder, it goes on."""

    def __init__(self, folder: Path, method: str, held: LabelledImages, sigma: float = SIGMA, **changes: Any) -> None:
        self.folder, self.method, self.held, self.config = folder, ALL[method], held, settings(method, **changes)
        self.public = public(tuple(held.images.shape[1:]), held.n_classes)
        self.plan = self.method.plan(self.config, self.public, sigma)

    def __call__(self, stop_at: int = -1, plan: list[Planned] | None = None) -> Synthetic:
        with Ledger.open(self.folder / "l.jsonl", cap=(1e7, 1e-5), data="toy") as ledger:
            private = PrivateData(self.held, ledger, Vault.open(self.folder / "v", insecure_seed=1), micro_batch=64)
            workspace = Stopping(self.folder / "w", stop_at, private.checks)
            before = torch.random.get_rng_state()
            result = self.method.run(self.config, self.public, private, self.plan if plan is None else plan, workspace)
            if isinstance(result, Sampler):
                result = result.images
            assert torch.equal(torch.random.get_rng_state(), before)  # no number of ours comes from the global state
            self.checks = private.checks
            self.raw = (self.folder / "l.jsonl").read_bytes()
        self.check(result)
        return result

    def check(self, made: Synthetic) -> None:
        """What every result has to be, and the ledger to say."""
        k, m = self.held.n_classes, self.config.per_class
        assert made.images.shape == (k * m, *self.held.images.shape[1:])
        assert (made.images.dtype, made.labels.dtype) == (torch.float32, torch.int64)
        assert made.images.isfinite().all()
        assert made.images.abs().max() <= 1
        assert made.labels.tolist() == [label for label in range(k) for _ in range(m)]
        assert made.parts >= 1
        assert made.soft_labels is None or made.soft_labels.shape == (k * m * made.parts**2, k)
        for tensor in (made.images, made.labels):
            assert tensor.device.type == "cpu"
            assert not tensor.requires_grad
        charged = [line for line in ledgers.parse(self.raw) if line["type"] == "intent"]
        assert [(line["query"], line["count"]) for line in charged] == [
            (planned.query.describe(), planned.count) for planned in self.plan
        ]
        assert {planned.query.name for planned in self.plan} == set(self.checks)
        assert max(self.checks.values()) <= 1e-4


def test_the_plan_is_public_and_cheaper_with_more_noise(method: str) -> None:
    config, face = settings(method), ALL[method]
    assert dataclasses.is_dataclass(face.Config)
    assert face.Config.__dataclass_params__.frozen
    costs = []
    for sigma in (1.0, 2.0, 4.0):
        plan = face.plan(config, public(), sigma)
        assert plan == face.plan(config, public(), sigma)
        assert all(planned.query.rows in (1, 3) for planned in plan)
        costs.append(accounting.rdp_epsilon([planned.part for planned in plan], 1e-5))
    assert costs[0] > costs[1] > costs[2] > 0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape(method: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    run = Run(tmp_path, method, records([30, 9, 0], shape))
    made = run()
    raw = run.raw
    again = run()  # from what the first run left: the same numbers, and nothing charged
    assert torch.equal(again.images, made.images)
    assert run.raw == raw


@pytest.mark.parametrize("counts", [[0, 0, 0], [1, 0, 0], [400, 3, 1]], ids=["none", "one", "unbalanced"])
def test_any_share_of_records(method: str, counts: list[int], tmp_path: Path) -> None:
    Run(tmp_path, method, records(counts))()


def test_one_class_and_one_image(method: str, tmp_path: Path) -> None:
    Run(tmp_path, method, records([20]), per_class=1)()


def test_records_that_are_no_images(method: str, tmp_path: Path) -> None:
    """NaN and infinite records count as zero, and huge ones are clipped: the images stay images."""
    held = records([10, 10, 0])
    images = (held.images / 255).astype(np.float32)
    for i, value in enumerate((np.nan, np.inf, -np.inf, 1e38)):
        images[i] = value
    Run(tmp_path, method, dataclasses.replace(held, images=images))()


@pytest.mark.parametrize("sigma", [0.02, 1e4])
def test_little_and_much_noise(method: str, sigma: float, tmp_path: Path) -> None:
    Run(tmp_path, method, records([30, 9, 0]), sigma)()


def test_the_ledger_is_the_same_for_any_records(method: str, tmp_path: Path) -> None:
    raws = []
    for i, counts in enumerate(([30, 9, 0], [30, 9, 1], [0, 0, 0])):
        run = Run(tmp_path / str(i), method, records(counts))
        run()
        raws.append(run.raw)
    assert raws[0] == raws[1] == raws[2]


def test_resumed_after_a_stop_at_any_step(method: str, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", method, records([30, 9, 0]))
    expected = whole()
    cut = Run(tmp_path / "cut", method, records([30, 9, 0]))
    stops = 0
    for n in (0, 1, 3, 2, 1, 4):  # each time from what the last one left
        try:
            cut(stop_at=n)
        except Stop:
            stops += 1
    assert stops >= 2
    made = cut()
    assert torch.equal(made.images, expected.images)
    assert torch.equal(made.labels, expected.labels)
    assert made.soft_labels is None or torch.equal(made.soft_labels, expected.soft_labels)
    assert cut.raw == whole.raw
    assert cut.checks == whole.checks


def test_a_plan_that_does_not_match_is_refused(method: str, tmp_path: Path) -> None:
    """Refused, and no record read: the vault holds no answer of the release that does not fit."""
    run = Run(tmp_path / "classes", method, records([9, 9, 0]))
    of_two = run.method.plan(run.config, public(k=2), SIGMA)
    if of_two != run.plan:  # what a sum over models costs has nothing to do with classes
        with pytest.raises(DpdistillError, match=r"rows for 3 classes|returned shape"):
            run(plan=of_two)
        assert not list(run.folder.rglob("*.npy"))
    run = Run(tmp_path / "wider", method, records([9, 9, 0]))
    last = run.plan[-1]
    wider = dataclasses.replace(last, query=dataclasses.replace(last.query, dim=last.query.dim + 1))
    with pytest.raises(DpdistillError, match=r"shape|other queries"):
        run(plan=[*run.plan[:-1], wider])
    assert len(list(run.folder.rglob("*.npy"))) == sum(planned.count for planned in run.plan[:-1])
    run = Run(tmp_path / "none", method, records([9, 9, 0]))
    with pytest.raises((DpdistillError, LookupError, ValueError)):
        run(plan=[])


def test_a_run_takes_nothing_but_released_values(method: str, tmp_path: Path) -> None:
    """Two data sets with the same noisy answers give the same images: what `run` returns is post-processing."""
    first = Run(tmp_path / "a", method, records([30, 9, 0]))
    expected = first()
    second = Run(tmp_path / "a", method, records([3, 20, 11]))  # the vault knows all answers: no record is read
    assert torch.equal(second().images, expected.images)
    assert second.raw == first.raw


def test_settings_out_of_range_are_config_errors(method: str) -> None:
    for item in dataclasses.fields(ALL[method].Config):
        if type(item.default) is int and item.name not in ("steps", "parts"):
            with pytest.raises(ConfigError):
                ALL[method].plan(settings(method, **{item.name: -1}), public(), 1.0)
        if type(item.default) in (int, float):
            for text in ("nan", "inf", "x"):
                with pytest.raises(ConfigError):
                    settings(method, **{item.name: text})
    assert math.isfinite(sum(planned.query.dim for planned in ALL[method].plan(settings(method), public(), 1.0)))
