r"""One run with canaries: noise images that are made here, each put among the records or not by a coin, and guessed from the noisy sums.

The attacker is the one that differential privacy is defined against: it knows every other record, which is why the data have to be public,
and takes what they add to a sum off the noisy answer. What is left depends on the canaries, their coins and the noise.

m canaries, b ∈ {0, 1}^m the coins, S such a rest, u_i a canary's clipped vector. With S = Σ b_i u_i + noise of σC, the best linear guess
of b is ridge regression: b̂ = ½ + (G + 4I)⁻¹ (t - G·½), G = Σ U Uᵀ/(σC)² and t = Σ U S/(σC)² over all releases (¼ is the variance of
a coin; a record that is sampled with probability q counts q).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.images import LabelledImages
from ..mechanisms import Ensemble, PrivateData, Vault
from ..mechanisms.ensemble import Trainer
from ..mechanisms.features import FeatureFunction, LeftFunction, PrivateFeatures
from ..mechanisms.private import Progress, Reservation
from ..mechanisms.recordwise import RecordFunction
from ..privacy import GaussianSum, Ledger
from . import bounds
from .result import BINS, OneRun

MOST_CANARIES = 500
NULL_TRIALS = 200


class Enough(Exception):
    """All planned releases were made: what comes now is post-processing, which no score depends on."""


def canaries(records: LabelledImages, m: int, coins: np.random.Generator) -> LabelledImages:
    """m images of uniform noise, whose labels go round the classes: nothing in them is anyone's."""
    shape = (m, *records.image_shape)
    images: NDArray[np.uint8] = coins.integers(0, 256, shape, dtype=np.uint8)
    return LabelledImages(
        images=images, labels=np.arange(m) % records.n_classes, class_names=records.class_names, source="canaries"
    )


def joined(records: LabelledImages, more: LabelledImages, chosen: NDArray[np.bool_]) -> LabelledImages:
    """The records and the chosen canaries, as 8-bit images."""
    pixels = records.images
    if pixels.dtype != np.uint8:
        pixels = np.rint((records.to_unit() + 1) * 127.5).astype(np.uint8)
    return LabelledImages(
        images=np.concatenate([pixels, more.images[chosen]]),
        labels=np.concatenate([records.labels, more.labels[chosen]]),
        class_names=records.class_names,
        source=records.source,
    )


class Witness(PrivateData):
    """A handle like any other that also scores canaries by each noisy sum that it hands out. A method cannot tell it from another.

    Args:
      records: public ones.
      canaries: made by `canaries`; those that are `included` join the records.
      stop_after: releases, after which `Enough` is raised; None runs to the end.
    """

    def __init__(
        self,
        records: LabelledImages,
        canaries: LabelledImages,
        included: NDArray[np.bool_],
        ledger: Ledger,
        vault: Vault,
        *,
        device: str = "cpu",
        stop_after: int | None = None,
    ) -> None:
        super().__init__(joined(records, canaries, included), ledger, vault, device=device)
        self.told = Told(joined(canaries, records, np.ones(len(records.labels), bool)), len(canaries.labels), device)
        self._left = stop_after

    def release_reserved(
        self, held: Reservation, index: int, fn: RecordFunction, *, progress: Progress | None = None
    ) -> Tensor:
        noisy = super().release_reserved(held, index, fn, progress=progress)
        self.heard(held, noisy, lambda some: fn(self.told.x[some].clone(), self.told.y[some].clone()))
        return noisy

    def features(self, fn: FeatureFunction, dim: int, *, progress: Progress | None = None) -> "WitnessFeatures":
        return WitnessFeatures(self, fn, dim, progress=progress)

    def shards(self, n_shards: int, train: Trainer) -> Ensemble:
        """Models that vote: no canary's own vector is in their answers, so nothing is scored."""
        self.told.blind = True
        return super().shards(n_shards, train)

    def heard(self, held: Reservation, noisy: Tensor, vectors: Callable[[slice], Tensor]) -> None:
        """Scores a noisy sum, and stops where it was the last."""
        if isinstance(held.query, GaussianSum):
            self.told.hear(held.query, noisy, vectors)
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                raise Enough


class WitnessFeatures(PrivateFeatures):
    """As `PrivateFeatures`, under a `Witness`."""

    def __init__(self, private: Witness, fn: FeatureFunction, dim: int, *, progress: Progress | None = None) -> None:
        super().__init__(private, fn, dim, progress=progress)
        self._witness, self._of = private, fn
        self._phi: Tensor | None = None

    def release_reserved(self, held: Reservation, index: int, left: LeftFunction) -> Tensor:
        noisy, told = super().release_reserved(held, index, left), self._witness.told
        if self._phi is None:
            with torch.no_grad():
                found = [self._of(told.x[some]) for some in told.batches()]
            self._phi = torch.nn.functional.normalize(torch.cat(found), dim=1)
        phi = self._phi

        def outer(some: slice) -> Tensor:
            return (left(phi[some].clone(), told.y[some])[:, :, None] * phi[some][:, None, :]).flatten(1)

        self._witness.heard(held, noisy.reshape(1, -1), outer)
        return noisy


class Told:
    """What the noisy sums say about canaries.

    Attributes:
      x, y: images [m + N', C, H, W] and labels: the canaries, then the other records, which the attacker knows.
      releases: how many were heard.
      blind: whether the method also asked something that says nothing about a canary.
    """

    def __init__(self, images: LabelledImages, m: int, device: str, batch: int = 64) -> None:
        self.x, self.y = torch.from_numpy(images.to_unit()).to(device), torch.from_numpy(images.labels).to(device)
        self.m, self.releases, self.blind, self._batch = m, 0, False, batch
        self.gram, self.sums = torch.zeros(m, m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)

    def batches(self) -> list[slice]:
        """Slices of the images: none holds canaries and other records."""
        n, step = len(self.y), self._batch
        return [
            slice(i, min(i + step, end)) for first, end in ((0, self.m), (self.m, n)) for i in range(first, end, step)
        ]

    def hear(self, query: GaussianSum, noisy: Tensor, vectors: Callable[[slice], Tensor]) -> None:
        """Adds one noisy sum [K, D].

        Args:
          vectors: the query's vectors [b, D] of images `x[some]`, before clipping.
        """
        m, q, std = self.m, query.sampling_prob, query.noise_multiplier * query.clip_norm
        rows = self.y.cpu() if query.n_classes > 1 else torch.zeros(len(self.y), dtype=torch.int64)
        mine, rest = torch.empty(m, query.dim), noisy.cpu().float().clone()
        for some in self.batches():
            with torch.no_grad():
                v = torch.nan_to_num(vectors(some).cpu().float(), 0.0, 0.0, 0.0)
            v *= (query.clip_norm / v.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1.0)
            if some.start < m:
                mine[some] = v
            else:
                rest.index_add_(0, rows[some], v, alpha=-q)
        for row in rows[:m].unique().tolist():
            these = torch.nonzero(rows[:m] == row).ravel()
            u = mine[these]
            self.gram[these[:, None], these] += (u @ u.T).double() * (q / std) ** 2
            self.sums[these] += (u @ rest[row]).double() * q / std**2
        self.releases += 1

    def scores(self) -> NDArray[np.float64]:
        """[m], higher where a canary looks as if it had been in."""
        centred = self.sums - self.gram.sum(dim=1) / 2
        ridge = self.gram + 4 * torch.eye(self.m, dtype=torch.float64)
        found: NDArray[np.float64] = torch.linalg.solve(ridge, centred).numpy()
        return found


def judge(
    scores: NDArray[np.float64],
    included: NDArray[np.bool_],
    releases: int,
    epsilon: float,
    delta: float,
    coins: np.random.Generator,
) -> OneRun:
    """Turns scores and coins into bounds, with what to expect beside them, and the null control."""
    m, found = len(scores), bounds.one_run(scores, included, delta)
    low, high = bounds.expected(bounds.mu_of(epsilon, delta), m, delta)
    most = bounds.most(m, delta)
    alarms = 0
    for _ in range(NULL_TRIALS):
        drawn = bounds.one_run(scores, coins.random(m) < 0.5, delta)
        alarms += drawn.steinke > 0 or drawn.fdp > 0
    edges = np.linspace(scores.min(), scores.max() + 1e-12, BINS + 1)
    return OneRun(
        canaries=m,
        included=int(included.sum()),
        releases=releases,
        steinke=found.steinke,
        fdp=found.fdp,
        expected_steinke=(low.steinke, high.steinke),
        expected_fdp=(low.fdp, high.fdp),
        most_steinke=most.steinke,
        most_fdp=most.fdp,
        score_low=float(edges[0]),
        score_high=float(edges[-1]),
        scores_in=tuple(np.histogram(scores[included], edges)[0].tolist()),
        scores_out=tuple(np.histogram(scores[~included], edges)[0].tolist()),
        null_trials=NULL_TRIALS,
        null_alarms=alarms,
    )


def with_broken(judged: OneRun, found: bounds.OneRunBounds) -> OneRun:
    """The same, with what the run with a tenth of its noise gave."""
    return dataclasses.replace(judged, broken_steinke=found.steinke, broken_fdp=found.fdp)
