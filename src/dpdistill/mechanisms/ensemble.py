r"""Votes of models trained on disjoint shards, and sums of their vectors. What belongs to one unit reaches one model, so it moves one
vote a query, or one vector.

A record goes to shard HMAC(key, id) mod K, with a key of the run and a stable id: adding, removing or changing everything under one id
leaves the other shards as they were, bit for bit. Models, votes and vectors stay behind the door; noisy sums of them come out.
Proofs: docs/privacy/votes.md, docs/privacy/shard_sum.md.

N records (never told), K shards, Q queries, C classes, D coordinates of an answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.images import LabelledImages, to_unit
from ..data.stored import chunks
from ..errors import ConfigError, TeacherError
from ..privacy.ledger import Ledger
from ..privacy.queries import VOTE_BITS, NoisyVotes, Query, ShardSum
from .clipping import clip_to_grid
from .noise import derive
from .private import Door, Progress, Reservation
from .ranks import ALONE, Ranks
from .recordwise import probe
from .vault import Vault

PROBE = 12  # made-up images that a trainer is tried on, and public queries that its models are asked
ROUNDING_GPU = 1e-4

Model = Callable[
    [Tensor], Tensor
]  # images [B, C, H, W] -> scores [B, classes]; for a sum of vectors, queries -> answers [B, D]


class Trainer(Protocol):
    """Trains one model from one shard and its own seed, and from nothing else that is private."""

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator, /) -> Model: ...


class Ensemble(Door):
    """A handle on models that vote, or whose vectors are summed. Each depends on one shard only: `shards` sees to that, or K owners do.

    Args:
      models: makes them, when they are first asked for. Where a run has several processes: those of this process, each model on one.
      check: tries out what trains them, on made-up images.
    """

    def __init__(
        self,
        n_models: int,
        n_classes: int,
        models: Callable[[Progress | None], Sequence[Model]],
        ledger: Ledger,
        vault: Vault,
        unit: str,
        check: Callable[..., float] = lambda *_: 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(ledger, vault, unit, ranks)
        self.n_models, self.n_classes, self.unit_moves = n_models, n_classes, 2 if unit == "record" else 1
        self._make, self._check = models, check
        self._models: Sequence[Model] | None = None

    @classmethod
    def of_models(
        cls, models: Sequence[Model], n_classes: int, ledger: Ledger, vault: Vault, *, ranks: Ranks = ALONE
    ) -> "Ensemble":
        """Models of K owners: the guarantee is about everything of one owner."""
        mine = [models[k] for k in ranks.mine(range(len(models)))]
        return cls(len(models), n_classes, lambda _: mine, ledger, vault, "owner", ranks=ranks)

    @classmethod
    def of_shards(
        cls,
        records: LabelledImages,
        n_shards: int,
        train: Trainer,
        ledger: Ledger,
        vault: Vault,
        *,
        device: str = "cpu",
        ranks: Ranks = ALONE,
    ) -> "Ensemble":
        """Models trained on K disjoint shards of the records, when they are first asked for.

        Args:
          records: with `ids`, the guarantee is about everything under one id; without, about one record.
          n_shards: K, frozen before the data is looked at.
          train: called once for each shard with its images [n, C, H, W] (float32 in [-1, 1]), labels [n] and a generator of its own.
            A shard without a record gets no call: its votes go round the classes, and its vector is zero.
        """
        if n_shards < 1:
            raise ConfigError(f"Expected at least one shard, got {n_shards}.")

        def models(progress: Progress | None) -> Sequence[Model]:
            shard_N = ranks.lead(lambda: assign(records, n_shards, derive(vault._key, "shards", vault.run)))  # private
            order = np.argsort(shard_N)
            shards = np.split(order, np.searchsorted(shard_N[order], np.arange(1, n_shards)))
            made: list[Model] = []
            for k in ranks.mine(range(n_shards)):
                made.append(_train_one(records, _canonical(records, shards[k]), train, k, device))
                if progress:
                    progress((k + 1) / n_shards)
            return made

        def check(queries: Tensor, n_columns: int = records.n_classes) -> float:
            return check_trainer(train, queries, records.image_shape, records.n_classes, device, n_columns)

        unit = "record" if records.ids is None else "id"
        return cls(n_shards, records.n_classes, models, ledger, vault, unit, check, ranks)

    def _fits(self, query: Query) -> None:
        if isinstance(query, ShardSum):
            if (query.n_models, query.unit_moves) != (self.n_models, self.unit_moves):
                raise ConfigError(f"query {query.name!r} is about other models or units than these")
            return
        if not isinstance(query, NoisyVotes):
            raise ConfigError(f"query {query.name!r} is not a vote, nor a sum over models")
        facts = (query.n_classes, query.n_models, query.unit_moves)
        if facts != (self.n_classes, self.n_models, self.unit_moves):
            raise ConfigError(f"query {query.name!r} is about other classes, models or units than these")

    def check(self, query: Query, queries: Tensor) -> None:
        """Raises unless the query is about these images, and `train` treats shards alone. Reads no record, charges nothing.

        Raises:
          TeacherError: on made-up images, what `train` returns depends on what else was trained.
        """
        self._fits(query)
        if isinstance(query, ShardSum):
            fits, n_columns = len(queries) > 0 and query.dim % len(queries) == 0, query.dim // max(1, len(queries))
        else:
            fits, n_columns = isinstance(query, NoisyVotes) and query.n_queries == len(queries), self.n_classes
        if not fits:
            raise ConfigError(f"query {query.name!r} is about other queries than these {len(queries)}")
        worst = self._check(queries[:PROBE], n_columns)
        self.checks[query.name] = max(worst, self.checks.get(query.name, 0.0))
        self._ranks.agree(lambda: queries.detach().double().cpu().numpy().tobytes())

    def release_reserved(
        self, held: Reservation, index: int, queries: Tensor, *, progress: Progress | None = None
    ) -> Tensor:
        r"""Returns noisy votes on public images, H + N(0, σ²·2Q I), where H[q, c] counts the models whose highest score is class c.

        Source: Papernot et al. (2018), GNMax without its threshold; the bound is data-independent. Proof: docs/privacy/votes.md.

        Args:
          held: of a `NoisyVotes` query of these models; `index` of its releases.
          queries: images [Q, C, H, W] in [-1, 1] that derive from public data and released values only.
          progress: told the fraction of the models trained.

        Returns:
          [Q, classes] float32.

        Raises:
          TeacherError: on made-up images, what `train` returns depends on what else was trained. Nothing was read.
        """
        query = held.query
        if not isinstance(query, NoisyVotes):
            raise ConfigError(f"query {query.name!r} is not a vote")
        self._check_charged(held, index)
        self.check(query, queries)
        return self._noisy(held, index, lambda _: self._count(query, queries, progress))

    def release_vectors(
        self, held: Reservation, index: int, queries: Tensor, *, progress: Progress | None = None
    ) -> Tensor:
        r"""Returns a noisy sum over the models, S + N(0, σ²·(2C)² I) with S = Σ_k min(1, C/‖v_k‖)·v_k, and v_k all answers of model k.

        Source: the idea is G-PATE's (Long et al. 2021); the release is one plain Gaussian sum. One unit's change moves one v_k, from
        anywhere to anywhere in the ball of radius C: by 2C. Proof: docs/privacy/shard_sum.md.

        Args:
          held: of a `ShardSum` query of these models; `index` of its releases.
          queries: [Q, ...] that derive from public data and released values only. A model maps them to answers [Q, D], dim = Q·D.
          progress: told the fraction of the models trained.

        Returns:
          [Q, D] float32: a sum, not a mean. Divide by the public number of models.

        Raises:
          TeacherError: on made-up images, what `train` returns depends on what else was trained. Nothing was read.
        """
        query = held.query
        if not isinstance(query, ShardSum):
            raise ConfigError(f"query {query.name!r} is not a sum over models")
        self._check_charged(held, index)
        self.check(query, queries)
        return self._noisy(held, index, lambda _: self._sum(query, queries, progress)).reshape(len(queries), -1)

    def _sum(self, query: ShardSum, queries: Tensor, progress: Progress | None) -> NDArray[np.int64]:
        total = torch.zeros(query.dim, dtype=torch.int64)
        for model in self._trained(progress):
            total += one_vector(model, queries, query)
        return total.numpy()

    def _trained(self, progress: Progress | None) -> Sequence[Model]:
        if self._models is None:
            self._models = self._make(progress)
        elif progress:
            progress(1.0)  # trained before
        return self._models

    def _count(self, query: NoisyVotes, queries: Tensor, progress: Progress | None) -> NDArray[np.int64]:
        total = torch.zeros(query.n_queries, query.n_classes, dtype=torch.int64)
        for model in self._trained(progress):
            total += one_vote(model, queries, query.n_classes)
        return total.numpy() << VOTE_BITS


def answers_of(model: Model, queries: Tensor, n_columns: int) -> Tensor:
    """Returns what a model makes of the queries: [Q, n_columns], float64."""
    with torch.no_grad():
        answers = model(queries.detach().clone()).detach().double().cpu()
    if answers.shape != (len(queries), n_columns):
        raise TeacherError(
            f"a model returned answers of shape {tuple(answers.shape)}, wanted {(len(queries), n_columns)}"
        )
    return answers


def scores_of(model: Model, queries: Tensor, n_classes: int) -> Tensor:
    """Returns a model's answers [Q, C], all of them numbers."""
    return torch.nan_to_num(answers_of(model, queries, n_classes), nan=-1e300)


def one_vote(model: Model, queries: Tensor, n_classes: int) -> Tensor:
    """Returns the votes of one model as one-hot rows [Q, C] of int64: exactly one vote a query, whatever the model returns."""
    return torch.nn.functional.one_hot(scores_of(model, queries, n_classes).argmax(dim=1), n_classes)


def one_vector(model: Model, queries: Tensor, query: ShardSum) -> Tensor:
    """Returns one model's answers as one vector [dim] of int64, clipped whole: its norm is at most C, whatever the model returns."""
    if isinstance(model, Nobody):
        return torch.zeros(query.dim, dtype=torch.int64)
    answers = answers_of(model, queries, query.dim // len(queries))
    return clip_to_grid(answers.reshape(1, -1), query.clip_norm, query.grid_bits)[0]


def check_trainer(
    train: Trainer,
    queries: Tensor,
    image_shape: tuple[int, int, int],
    n_classes: int,
    device: str,
    n_columns: int | None = None,
) -> float:
    """Returns by how much a model's answers change when another shard is trained in between, on made-up images: 0 but for a GPU's rounding.

    It catches a network that is trained again and again, statistics kept from shard to shard, and random numbers from a generator that all
    shards share: then one id would move the votes of many models. `n_columns` is the width of an answer; a vote has one for each class.

    Raises:
      TeacherError: they change, or have another shape.
    """
    x, y = (part.to(device).chunk(2) for part in probe(image_shape, n_classes, PROBE))
    width = n_columns or n_classes

    def trained(shard: int) -> Model:
        return train(x[shard].clone(), y[shard].clone(), torch.Generator().manual_seed(0))  # it may write into them

    model = trained(0)
    first = scores_of(model, queries, width)
    trained(1)
    second = scores_of(model, queries, width)  # the same model, before anything else happens
    third = scores_of(trained(0), queries, width)
    apart = torch.stack([second - first, third - first]).abs().max() / first.abs().max().clamp_min(1e-300)
    worst = float(apart)
    if not (worst <= (0.0 if device == "cpu" else ROUNDING_GPU)):
        raise TeacherError(
            f"a shard's model changes by {worst:.1e} when another shard is trained: make it anew for every shard, and take random "
            "numbers from the generator that is given"
        )
    return worst


def assign(records: LabelledImages, n_shards: int, key: bytes) -> NDArray[np.int64]:
    """Returns the shard of every record: a keyed hash of its id, or of its content where it has none. Never of its position."""
    digests: Iterator[bytes]
    if records.ids is not None:
        # By its text, not its bytes: how wide they are depends on the longest id of all.
        digests = (derive(key, "id", str(name).encode("utf-8", "surrogatepass")) for name in records.ids)
    else:
        images = (image for part in chunks(records.images) for image in part)
        content = zip(images, records.labels, strict=True)
        digests = (derive(key, "record", image.tobytes(), str(int(label))) for image, label in content)
    numbers = (int.from_bytes(digest[:16], "big") % n_shards for digest in digests)
    return np.fromiter(numbers, np.int64, len(records.labels))


def _canonical(records: LabelledImages, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of a shard in an order that only the shard's own content decides."""
    images, labels = records.images[rows], records.labels[rows]
    return rows[sorted(range(len(rows)), key=lambda index: (images[index].tobytes(), int(labels[index])))]


def _train_one(records: LabelledImages, rows: NDArray[np.int64], train: Trainer, shard: int, device: str) -> Model:
    x = to_unit(records.images[rows], records.value_range)
    y = records.labels[rows]
    valid = np.isfinite(x).all(axis=(1, 2, 3)) & (y >= 0) & (y < records.n_classes)
    if not valid.any():
        return Nobody(records.n_classes, shard)
    generator = torch.Generator().manual_seed(shard)
    return train(torch.from_numpy(x[valid]).to(device), torch.from_numpy(y[valid]).to(device), generator)


def round_robin(n_queries: int, n_classes: int, shard: int) -> Tensor:
    """The votes [Q, C] of a shard without records: public, and no class has more of them, lest empty shards drown the others."""
    return torch.nn.functional.one_hot((torch.arange(n_queries) + shard) % n_classes, n_classes)


@dataclass(frozen=True)
class Nobody:
    """The model of a shard without records: public. It votes by `round_robin`, and its vector is zero."""

    n_classes: int
    shard: int

    def __call__(self, queries: Tensor) -> Tensor:
        return round_robin(len(queries), self.n_classes, self.shard)
