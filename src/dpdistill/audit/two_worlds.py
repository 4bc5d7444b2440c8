"""The whole run, again and again, on a tiny worst-case set: with one record and without. What comes out is told apart as well as can be.

The worst case for one record is a class that is otherwise empty. Settings are the release's own but for sizes, so that a run takes a
fraction of a second; ε and δ are the claimed ones. Half of the runs choose the attack and its threshold, the other half are counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import RunConfig
from ..data import LabelledImages
from ..methods import Synthetic
from ..planning import Plan, make_plan, with_way
from . import bounds
from .result import TwoWorlds
from .twin import Twin

SIDE, FEW = 8, 6
ALL = {"sampling_prob": 1.0, "expected_records_per_class": None}  # of a baseline's rounds: each reads the few there are
CHEAP: dict[str, dict[str, Any]] = {  # by method: settings that only make it small
    "joint": {
        "steps": 2,
        "networks": 2,
        "pool": 40,
        "feature_dims": 8,
        "pixel_dims": 8,
        "components": 1,
        "width": 4,
    },
    "teacher": {
        "steps": 2,
        "batch": 8,
        "width": 4,
        "generator_width": 4,
        "latent": 2,
        "pool": 16,
        "teacher_dims": 20,
        "teacher_steps": 4,
        "pixel_dims": 6,
        "components": 2,
        "groups": 1,
    },
    "dosser": {
        "sampling_steps": 8,
        "optimisation_steps": 8,
        "subspace_dim": 4,
        "auxiliary_images": 40,
        "width": 8,
        **ALL,
    },
    "ndpdc": {"steps": 8, "width": 8, **ALL},
}
CONFIDENCE = 0.95


def worst_set() -> tuple[LabelledImages, LabelledImages]:
    """A few dark images of one class, and the one record: a bright chequered one, alone in the other class."""
    rng = np.random.default_rng(0)
    dark = rng.integers(0, 60, (FEW, 1, SIDE, SIDE), dtype=np.uint8)
    bright = (np.indices((SIDE, SIDE)).sum(axis=0) % 2 * 255).astype(np.uint8)[None, None]
    names = ("dark", "bright")
    base = LabelledImages(images=dark, labels=np.zeros(FEW, np.int64), class_names=names, source="worst case")
    one = LabelledImages(images=bright, labels=np.ones(1, np.int64), class_names=names, source="worst case")
    return base, one


def possible(config: RunConfig) -> bool:
    """Whether a run of this method can be made small enough to be made thousands of times."""
    return with_way(config).method in CHEAP


def prepare(config: RunConfig) -> tuple[RunConfig, Plan]:
    """The tiny run and its plan. Its images are grey, whatever the release's are, so public ones are made up."""
    config = with_way(config)
    settings = {**config.settings, **CHEAP[config.method]}
    config = dataclasses.replace(config, settings=settings, per_class=1, auxiliary="none")
    base, _ = worst_set()
    return config, make_plan(config, base.image_shape, base.class_names)


def audit(
    config: RunConfig, runs: int, *, progress: Callable[[float], None] | None = None, seed: int | None = None
) -> tuple[TwoWorlds, ...]:
    """Makes `runs` runs in each world, and returns what half of them prove.

    Args:
      config: of the twin.
      seed: for tests only.
    """
    config, plan = prepare(config)
    base, one = worst_set()
    sums, images = np.empty((2, runs)), []
    for index in range(2 * runs):
        world, number = index % 2, index // 2
        twin = Twin(config=config, plan=plan, records=base, others=base, canaries=one, included=np.array([bool(world)]))
        told, made = twin.run(quiet=True, seed=None if seed is None else seed + index)
        sums[world, number] = told.scores()[0]
        shown = made if isinstance(made, Synthetic) or made is None else made.images
        if shown is not None:
            images.append(shown.images.flatten().numpy())
        if progress:
            progress((index + 1) / (2 * runs))
    found = [_told_apart("noisy sums", sums, config.delta)]
    if images:
        pixels = np.stack(images).reshape(runs, 2, -1).transpose(1, 0, 2)
        found.append(_told_apart("released images", _projected(pixels), config.delta))
    return tuple(found)


def _projected(pixels_WRD: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each release as one number [2, R]: along the direction in which the worlds differ most, found on the first half of the runs."""
    half = pixels_WRD.shape[1] // 2
    first = torch.from_numpy(pixels_WRD[:, :half]).double()
    apart = first[1].mean(dim=0) - first[0].mean(dim=0)
    rest = (first - first.mean(dim=1, keepdim=True)).flatten(0, 1)
    spread = rest.T @ rest / len(rest)
    spread.diagonal().add_(0.1 * spread.diagonal().mean() + 1e-9)
    direction = torch.linalg.solve(spread, apart).numpy()
    result: NDArray[np.float64] = pixels_WRD @ direction
    return result


def _told_apart(seen: str, scores_WR: NDArray[np.float64], delta: float) -> TwoWorlds:
    """The bounds of the second half, at thresholds that the first half chose."""
    half = scores_WR.shape[1] // 2
    (chosen_out, chosen_in), (out, inside) = scores_WR[:, :half], scores_WR[:, half:]
    thresholds = np.quantile(scores_WR[:, :half], np.linspace(0.01, 0.99, 99))

    def counts(
        threshold: float, with_record: NDArray[np.float64], without: NDArray[np.float64]
    ) -> tuple[int, int, int, int]:
        return int((with_record > threshold).sum()), len(with_record), int((without > threshold).sum()), len(without)

    def gdp(threshold: float, with_record: NDArray[np.float64], without: NDArray[np.float64]) -> float:
        mu = bounds.two_world_mu(*counts(threshold, with_record, without), CONFIDENCE)
        return bounds.epsilon_of(mu, delta)

    def plain(threshold: float, with_record: NDArray[np.float64], without: NDArray[np.float64]) -> float:
        return bounds.two_world_epsilon(*counts(threshold, with_record, without), delta, CONFIDENCE)

    lower = {
        name: bound(max(thresholds, key=lambda at, bound=bound: bound(at, chosen_in, chosen_out)), inside, out)  # type: ignore[misc]
        for name, bound in (("lower_gdp", gdp), ("lower", plain))
    }
    return TwoWorlds(seen=seen, runs=len(inside), **lower)
