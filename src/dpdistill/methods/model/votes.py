r"""Votes of many teachers on images that nobody took: the guarantee is per id (a person's, an owner's), and no teacher has to be private.

Source: PATE's noisy histogram (Papernot et al. 2018), without its data-dependent bound; that the paper's noisy gradient is a vote in
disguise: docs/privacy/votes.md. Votes are released once and used for every epoch.
Private: `rounds` releases of noisy votes. What the votes become, and the student, is post-processing.
K models, Q queries of a round, R rounds, D features, C classes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError
from ...mechanisms import Ensemble, PrivateData
from ...mechanisms.ensemble import Model, round_robin
from ...models.linear import LinearTeacher
from ...privacy import NoisyVotes, Planned, gaussian_multiplier
from ..base import Public, Student, Workspace
from ..shared.bounds import NORMS, check_bounds
from ..shared.linear import public_images, untrained
from .conversion import Conversion, Converted, convert
from .gallery import finish
from .prior import Prior, vary


@dataclass(frozen=True, kw_only=True)
class Config(Conversion):
    """Public settings: those of `Conversion` for the student, and of the votes.

    Attributes:
      per_class: images of the generator that are released with the student.
      models: K, how many vote.
      unit_moves: shards that exchanging one unit touches; see `NoisyVotes`.
      rounds: R. From the second on, a part of the queries comes from the generator of the student so far.
      queries: Q of a round.
      ridge: of a shard's classifier, in units of its features' norm.
      teacher_dims: features kept: leading public principal components.
      expected_records: public guess of how many records the shards have together; only the advice asks.
    """

    models: int
    per_class: int = 10
    unit_moves: int = 1
    rounds: int = 1
    queries: int = 8000
    ridge: float = 0.01
    teacher_dims: int = 500
    expected_records: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expected_records is not None and self.expected_records < 1:
            raise ConfigError(f"Expected expected_records of at least 1, got {self.expected_records}.")
        if min(self.models, self.rounds, self.queries, self.teacher_dims) < 1:
            raise ConfigError("Expected models, rounds, queries and teacher_dims of at least 1.")
        check_bounds(self, NORMS, "ridge")


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """R releases of votes on Q images."""
    votes = NoisyVotes(
        name="votes",
        n_queries=config.queries,
        n_classes=public.n_classes,
        n_models=config.models,
        noise_multiplier=noise_multiplier * math.sqrt(config.rounds),
        unit_moves=config.unit_moves,
    )
    return [Planned(votes, config.rounds)]


def best_shards(expected_records: int, epsilon: float, delta: float) -> int:
    """K for so many records: 60 a shard, or up to 120 where that many models are not needed against the noise."""
    enough = 1000 * gaussian_multiplier(epsilon, delta)
    return max(2, round(max(expected_records / (2 * GOOD_SHARD), min(expected_records / GOOD_SHARD, enough))))


def needed_models(epsilon: float, delta: float) -> int:
    """How many have to vote lest the noise hide them: s·√(2·FREEDOM), s the Gaussian multiplier of (ε, δ)."""
    return math.ceil(gaussian_multiplier(epsilon, delta) * math.sqrt(2 * FREEDOM))


def advice(config: Config, public: Public, epsilon: float, delta: float) -> list[str]:
    """Whether K is enough, and what to expect, before anything is spent: from public numbers only.

    All R·Q vote vectors together carry K² / (2 s²) units of signal over noise, s the Gaussian multiplier of (ε, δ), however they are cut.
    """
    s = gaussian_multiplier(epsilon, delta)
    information = config.models**2 / (2 * s * s)
    std = math.sqrt(2 * config.rounds * config.queries) * s / config.models
    needed, good = needed_models(epsilon, delta), max(GOOD_SHARD, GOOD_SHARD // 10 * public.n_classes)
    chance = 1 / public.n_classes
    low, high = (100 * (chance + share * (0.9 - chance)) for share in expected_shares(information))
    lines = [
        f"{config.models} models vote on {config.rounds} × {config.queries} images; noise of {std:.3g} votes per model on every count, "
        f"{information:.3g} units of information in all"
    ]
    measured = information >= EXPECTED[2][0]
    known = (
        "so far apart were our sets, of ten classes"
        if measured
        else "a guess: so few votes were measured on one set only"
    )
    told = (
        f"where a private teacher of the same ε has 90 %, of {public.n_classes} classes, expect {low:.0f} to {high:.0f} % ({known}); "
        "smaller shards lose more"
    )
    if config.models >= needed:
        lines.append(told)
    records = config.expected_records
    small = records is not None and records / config.models < good / 2
    if records is None:
        lines.append("how many records a shard has is not known: give --expected-records to have that judged, too")
    if small and max(2, round(records / good)) < needed:
        lines.append(
            f"too few records: votes need about {needed} models at ε = {epsilon:g}, of {good} records each. Raise ε, or train a private "
            "teacher (leave --shards out)"
        )
    elif small:
        lines.append(
            f"too small: about {records / config.models:.0f} records a shard teach a classifier little. Choose --shards of at most "
            f"{max(2, round(records / good))}, or train a private teacher (leave --shards out)"
        )
    elif config.models < needed:
        lines.append(
            f"too few: below about {needed} models the noise at ε = {epsilon:g} hides the votes; expect little better than chance. "
            "Have more of them vote, raise ε, or, of records of your own, train a private teacher (leave --shards out)"
        )
    elif config.models < 4 * needed:
        lines.append(f"enough to learn from, with a loss: {4 * needed} models or more would hardly feel the noise")
    else:
        lines.append(
            "enough: the noise will hardly be felt; what limits the student is how good a single shard's model is"
        )
    return lines


GOOD_SHARD = 60  # records of a shard, of ten classes
FREEDOM = 650  # numbers that a linear classifier of small images has to learn

# Units of information, and the least and the largest share of what a private teacher has above chance that the student of the votes had:
# of `letters` (docs/decisions/model.md), MNIST, Fashion-MNIST and CIFAR-10, which is the hardest (docs/benchmarks/model.md): 1,000 models
# at ε = 1, 3 and 10. At 1,600 cells by patient had 0.8; the least there is a guess.
EXPECTED = ((0.0, 0.0, 0.0), (1.6e3, 0.2, 0.8), (35e3, 0.51, 0.93), (258e3, 0.63, 0.97), (2e6, 0.72, 0.98))


def expected_shares(information: float) -> tuple[float, float]:
    """Interpolates EXPECTED, in the logarithm."""
    known = np.log1p([at for at, _, _ in EXPECTED])
    low, high = (np.interp(math.log1p(information), known, shares) for shares in list(zip(*EXPECTED, strict=True))[1:])
    return float(low), float(high)


def run(
    config: Config, public: Public, handle: PrivateData | Ensemble, plan: list[Planned], workspace: Workspace
) -> Student:
    """Collects noisy votes, fits one classifier to all of them, and converts that."""
    aggregate = untrained(config.teacher_dims, public).to(workspace.device)
    aggregate.fit_public(public_images(public), workspace.generator("teacher-features"))
    by_shards = isinstance(handle, PrivateData)
    if isinstance(handle, PrivateData):
        handle = handle.shards(config.models, ShardTrainer(aggregate, config.ridge, public.n_classes))
    prior = Prior(config, public, workspace)
    seen: list[Tensor] = []
    votes: list[Tensor] = []
    made: Converted | None = None
    for index in range(config.rounds):
        x = queries(config, prior, made, workspace, index)
        phi = embed(aggregate, x, workspace.device)
        asked = phi if by_shards else x
        if index == 0:
            handle.check(plan[0].query, asked)
            held = handle.reserve(plan[0].query, plan[0].count)
        with workspace.passing("teachers") as progress:
            votes.append(handle.release_reserved(held, index, asked, progress=progress))  # private
        seen.append(phi)
        aggregate.head.weight.data.copy_(fit_votes(torch.cat(seen), torch.cat(votes) / config.models))
        if index + 1 < config.rounds:
            made = convert(aggregate, public, config, Renamed(workspace, f"round-{index}"), differentiable=False)
    made = convert(aggregate, public, config, workspace, differentiable=False)
    return finish(made.student, made.generator, public, workspace, config.per_class, aggregate)


def queries(config: Config, prior: Prior, made: Converted | None, workspace: Workspace, index: int) -> Tensor:
    """Q images for a round, on the CPU: of the prior, and half from the generator where there is one."""
    g = workspace.generator("queries", index)
    n_made = config.queries // 2 if made else 0
    chunks = [
        prior.batch(10**6 * (index + 1) + i, min(512, config.queries - n_made - i))
        for i in range(0, config.queries - n_made, 512)
    ]
    if made and n_made:
        with torch.no_grad():
            chunks.append(made.generator.sample(n_made, g)[0].cpu().nan_to_num(0.0))  # also of one that diverged
    return torch.cat([vary(x, config.vary, g) for x in chunks])


def embed(model: LinearTeacher, x: Tensor, device: str) -> Tensor:
    """Features of public images [Q, D], on the CPU."""
    with torch.no_grad():
        return torch.cat([model.features(part.to(device)).cpu() for part in x.split(256)])


class ShardTrainer:
    """Ridge regression on fixed public features: a classifier from a handful of records, in closed form.

    A person's records are often mostly of one class, and a classifier that fits them votes for that class whatever it is shown. So each
    class's score is shifted until its mean over the shard's classes is about 0, each record scored by the others alone (leave-one-out).
    A shard of one class knows of no border: its votes go round the classes. One that lacks a class does not vote for it.

    A model maps features [Q, D] (not images: they are computed once for all models) to scores [Q, C].
    """

    def __init__(self, features: LinearTeacher, ridge: float, n_classes: int) -> None:
        self.features, self.ridge, self.n_classes = features, ridge, n_classes

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        with torch.no_grad():
            phi = torch.cat([self.features.features(part) for part in images.split(256)]).double().cpu()
        member_NC = torch.nn.functional.one_hot(labels.cpu(), self.n_classes).double()
        present = member_NC.any(dim=0)
        if present.sum() < min(2, self.n_classes):
            first = int(torch.randint(self.n_classes, (), generator=generator))
            return lambda queries: round_robin(len(queries), self.n_classes, first)
        targets = member_NC - 1 / self.n_classes
        if len(phi) <= phi.shape[1]:
            dual = _ridged(phi @ phi.T, self.ridge)
            weights = phi.T @ (dual @ targets)
            own = 1 - self.ridge * dual.diagonal()[:, None]  # how much of its own target each record's score is
        else:  # the same, where records outnumber features
            primal = _ridged(phi.T @ phi, self.ridge)
            weights = primal @ (phi.T @ targets)
            own = ((phi @ primal) * phi).sum(dim=1, keepdim=True)
        left_out = (phi @ weights - own * targets) / (1 - own)  # each record's scores by a fit to the others
        shift = torch.zeros(self.n_classes, dtype=torch.float64)
        shift[present] = _shift(left_out[:, present], member_NC[:, present])
        return _Shifted(weights.float(), shift.float(), ~present)


@dataclass(frozen=True)
class _Shifted:
    """Scores of a shard's classes, and lower ones of those that it lacks. Weights [D, C], shift [C], lacking bool [C]."""

    weights: Tensor
    shift: Tensor
    lacking: Tensor

    def __call__(self, queries: Tensor) -> Tensor:
        scores = queries @ self.weights + self.shift
        return torch.where(self.lacking, scores.amin(dim=1, keepdim=True) - 1, scores)


def _ridged(gram: Tensor, ridge: float) -> Tensor:
    """Returns (gram + ridge I)⁻¹. Never an exception: whether there is one would depend on a shard's records."""
    gram.diagonal().add_(ridge)
    inverse: Tensor = torch.linalg.inv_ex(gram).inverse
    return inverse


def _shift(scores_NC: Tensor, member_NP: Tensor) -> Tensor:
    """Returns what brings the classes' mean scores to 0, [C], less what chance explains of it (positive-part James-Stein)."""
    counts = member_NP.sum(dim=0)
    means_PC = (member_NP / counts).T @ scores_NC
    wanted = means_PC.mean(dim=0)
    free = len(scores_NC) - len(counts)
    if free < 1:
        return torch.zeros_like(wanted)
    spread = (scores_NC - member_NP @ means_PC).square().sum() / free  # within a class, of all scores together
    chance = spread * (1 / counts).sum() / len(counts) ** 2
    return -wanted * (1 - chance / wanted.square().sum().clamp_min(1e-300)).clamp_min(0)


def fit_votes(phi_QD: Tensor, shares_QC: Tensor) -> Tensor:
    """Returns weights [C, D] of ridge regression on noisy shares of votes; its strength by leave-one-out error on these very votes.

    The votes are released, so any fit and any choice among fits is post-processing.
    """
    phi, y = phi_QD.double(), shares_QC.double()
    y = y - y.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(phi.T @ phi)
    values = values.clamp_min(0)
    rotated = phi @ vectors  # [Q, D]
    projected = rotated.T @ y  # [D, C]
    best, weights = math.inf, torch.zeros(y.shape[1], phi.shape[1], dtype=torch.float64)
    for strength in np.logspace(-4, 4, 33) * float(values.mean()):
        shrunk = projected / (values + strength)[:, None]
        hat = (rotated.square() / (values + strength)).sum(dim=1, keepdim=True)  # leverage of each query
        error = float((((y - rotated @ shrunk) / (1 - hat).clamp_min(1e-6)) ** 2).mean())
        if error < best:
            best, weights = error, (vectors @ shrunk).T
    return weights.float()


class Renamed:
    """A workspace whose checkpoints have names of their own."""

    def __init__(self, workspace: Workspace, prefix: str) -> None:
        self._workspace, self._prefix = workspace, prefix
        self.seed, self.device = workspace.seed, workspace.device
        self.track, self.passing = workspace.track, workspace.passing

    def generator(self, *labels: object) -> torch.Generator:
        return self._workspace.generator(self._prefix, *labels)

    def load(self, name: str) -> dict[str, Tensor] | None:
        return self._workspace.load(f"{self._prefix}-{name}")

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        self._workspace.save(f"{self._prefix}-{name}", tensors)
