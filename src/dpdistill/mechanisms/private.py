"""The door. Private records live behind it; a method holds a handle and asks for a release.

B micro-batch, N records (never told), D coordinates, K classes. The order is the guarantee: check `fn` on made-up images → charge
the ledger, on disk → read, clip, sum as integers → bind the sum → add noise → keep the noisy sum. Proof: docs/privacy/gaussian_sum.md.
Where a run has several processes, each reads and clips its share; all the rest is the first's alone (`ranks`, docs/scale.md).
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.images import LabelledImages, to_unit
from ..errors import ConfigError, LedgerError, RecordwiseError
from ..privacy.faults import point
from ..privacy.ledger import Ledger
from ..privacy.queries import GaussianSum, Query
from .clipping import MAX_BITS, clip_to_grid
from .noise import rounded_gaussian
from .ranks import ALONE, Ranks
from .recordwise import RecordFunction, check_recordwise, probed
from .vault import Vault

if TYPE_CHECKING:
    from .ensemble import Ensemble, Trainer
    from .features import PrivateFeatures


MAX_BATCH = 2**20  # records: so many products of 2**30 are summed exactly in float64
FEW_COINS = 2**20  # a multiple of 8
MEMORY = 2**31  # bytes of the vectors of a micro-batch, as they are (float32) and in whole numbers: 12 a coordinate
N_COMPARED = 4096  # records, of all, by which several processes see whether they were given the same


class Progress(Protocol):
    """Told how far a pass over the records is, as a fraction: never a count, which is private."""

    def __call__(self, fraction: float, /) -> None: ...


PARTS = 100  # that a pass is told in


class Passing:
    """Tells of a pass in PARTS equal steps, each of them once: the same calls for any number of records, none included."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._told = progress, 0

    def __call__(self, fraction: float) -> None:
        """Tells what is new at this fraction; 1 at the end of the pass."""
        while self._progress and self._told < math.floor(min(1.0, fraction) * PARTS):
            self._told += 1
            self._progress(self._told / PARTS)


@dataclass(frozen=True)
class Reservation:
    """Releases already charged: `count` of `query`, on ledger line `line`."""

    query: Query
    count: int
    line: int


class Door(ABC):
    """What every handle shares: charge first, bind the sum, add noise, keep what was released.

    Attributes:
      checks: for each query name the largest relative difference the record-wise check saw.
      unit: whose presence the handle's releases hide; the ledger's unit is the same, or its ε would be about something else.
    """

    def __init__(self, ledger: Ledger, vault: Vault, unit: str, ranks: Ranks = ALONE) -> None:
        if ledger.lines and ledger.lines[0]["unit"] != unit:
            raise LedgerError(
                f"this ledger counts by {ledger.lines[0]['unit']!r}, and these releases would protect one {unit}; name another ledger"
            )
        self.checks: dict[str, float] = {}
        self.unit, self._ledger, self._vault, self._ranks = unit, ledger, vault, ranks
        self._pending = [
            (index, line)
            for index, line in enumerate(ledger.lines)
            if line["type"] == "intent" and line["run"] == vault.run and not line["again"]
        ]

    @abstractmethod
    def _fits(self, query: Query) -> None:
        """Raises ConfigError unless this handle can answer the query. Reads no record."""

    def reserve(self, query: Query, count: int = 1) -> Reservation:
        """Charges `count` releases of `query` at once; a resumed run finds what it charged before. Call the handle's `check` first: what
        a release refuses later has been paid for.

        Raises:
          ConfigError: this handle does not answer such queries. Nothing was charged.
          BudgetError: the cap would be passed. Nothing was charged or read.
          LedgerError: the resumed run asks for another release than it did the first time.
        """
        self._fits(query)
        return Reservation(query, count, self._ranks.lead(lambda: self._charge(query, count)))

    def _charge(self, query: Query, count: int) -> int:
        """The ledger's line that charges these releases, once it is on disk."""
        if self._pending:
            index, line = self._pending.pop(0)
            if line["query"] != query.describe() or line["count"] != count:
                raise LedgerError(
                    "this run asked for other releases before it stopped; remove its state folder to begin anew"
                )
            return index
        return self._ledger.reserve(self._vault.run, query, count)

    def _noisy(self, held: Reservation, index: int, exact_sum: Callable[[str], NDArray[np.int64]]) -> Tensor:
        """The noisy sum of release number `index` of a charged reservation, in the query's units; from the vault if it is there."""
        attempts = self._attempts(held, index)
        noisy = self._ranks.lead(lambda: self._vault.load(self._name(held.line, index)))
        while noisy is None:
            noisy = self._one_attempt(held, index, attempts, exact_sum)
        return torch.from_numpy(noisy / held.query.unit_steps).float()

    def _one_attempt(
        self, held: Reservation, index: int, attempts: Iterator[str], exact_sum: Callable[[str], NDArray[np.int64]]
    ) -> NDArray[np.int64] | None:
        # All processes wait here until the first has the charge on disk.
        attempt = self._ranks.lead(lambda: next(attempts))
        total = self._ranks.total(exact_sum(attempt))
        point("door: summed")
        return self._ranks.lead(lambda: self._add_noise(held, index, attempt, total))

    def _add_noise(
        self, held: Reservation, index: int, attempt: str, total: NDArray[np.int64]
    ) -> NDArray[np.int64] | None:
        """The noisy sum, kept; None if another sum was bound before. On the first process alone: there is one noise, and one key."""
        # Another sum than before a crash (other data, or arithmetic that does not repeat) is another release: charged anew.
        if not self._vault.binds(attempt, total):
            return None
        query = held.query
        stream = self._vault.noise_stream(attempt, json.dumps(query.describe(), sort_keys=True).encode(), total)
        sigma = query.sigma_steps
        noisy = total + rounded_gaussian(total.size, sigma, stream).reshape(total.shape)
        self._vault.save(self._name(held.line, index), noisy)
        return noisy

    def _coins(self, attempt: str, n: int, prob: float) -> NDArray[np.uint8]:
        """The coins [n] of a release's Poisson sample: 1 for a record that is in. The first process tosses them for all."""
        return np.unpackbits(self._ranks.lead(lambda: self._toss(attempt, n, prob)), count=n)

    def _toss(self, attempt: str, n: int, prob: float) -> NDArray[np.uint8]:
        """The coins as bits, eight to a byte. A few at a time: 10⁹ at once would take 30 GB on their way."""
        stream = self._vault.sampling_stream(attempt)
        some = [  # asked once even for no records: nothing that is done tells whether there are any
            np.packbits(stream.bernoulli(min(FEW_COINS, n - done), prob)) for done in range(0, max(1, n), FEW_COINS)
        ]
        return np.concatenate([np.empty(0, np.uint8), *some])

    def _check_charged(self, held: Reservation, index: int) -> None:
        """Raises LedgerError unless the reservation is on the ledger, word for word: a made-up one buys nothing."""
        if not (0 <= index < held.count):
            raise ValueError(f"Expected {index=} below the {held.count} releases that were charged.")
        self._ranks.lead(lambda: self._check_line(held))

    def _check_line(self, held: Reservation) -> None:
        line = self._ledger.lines[held.line] if held.line in range(len(self._ledger.lines)) else {}
        facts = {
            "type": "intent",
            "run": self._vault.run,
            "query": held.query.describe(),
            "count": held.count,
            "again": "",
        }
        if {key: line.get(key) for key in facts} != facts:
            raise LedgerError("this reservation is not on the ledger; ask reserve() for one; nothing was read")

    def _name(self, line: int, index: int) -> str:
        """A release's name in the vault. The line's hash covers all lines before it: nothing is mistaken for another ledger's."""
        return f"release-{self._ledger.lines[line]['hash'][:32]}-{index}"

    def _attempts(self, held: Reservation, index: int) -> Iterator[str]:
        """Names of a release: the one that was charged, then one more charged line for each time the sum came out differently."""
        again = f"{held.line}-{index}"
        yield self._name(held.line, index)
        for line_index, line in enumerate(list(self._ledger.lines)):
            if line["type"] == "intent" and line["run"] == self._vault.run and line["again"] == again:
                yield self._name(line_index, 0)
        while True:
            yield self._name(self._ledger.reserve(self._vault.run, held.query, again=again), 0)


class PrivateData(Door):
    """A handle on private records: their public facts, and the one way to learn anything else about them.

    Records with ids are protected by the id, which sums over records do not do: such records answer by `shards` alone.

    Attributes:
      image_shape: (C, H, W), public.
      n_classes: K, public.

    What is made of the records and does not fit in memory goes to a file without a name in the folder `scratch` (`data.stored`).
    """

    def __init__(
        self,
        records: LabelledImages,
        ledger: Ledger,
        vault: Vault,
        *,
        device: str = "cpu",
        micro_batch: int = 256,
        scratch: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(ledger, vault, "record" if records.ids is None else "id", ranks)
        if not (1 <= micro_batch <= MAX_BATCH):
            raise ValueError(f"Expected {micro_batch=} between 1 and {MAX_BATCH}.")
        channels, height, width = records.images.shape[1:]
        self.image_shape: tuple[int, int, int] = (channels, height, width)
        self.n_classes = len(records.class_names)
        self.device, self.micro_batch = device, micro_batch
        self._scratch = scratch
        self._records = records
        ranks.agree(lambda: _fingerprint(records))  # a record in one place here and another there would count twice

    def _fits(self, query: Query) -> None:
        if not isinstance(query, GaussianSum):
            raise ConfigError(f"query {query.name!r} is not a sum over records")
        if self.unit != "record":  # one id may have many records, and each moves the sum
            raise ConfigError(f"query {query.name!r} is a sum over records, and these are to be protected by their ids")

    def check(self, query: GaussianSum, fn: RecordFunction) -> None:
        """Raises RecordwiseError unless `fn` treats records alone. Reads no record, charges nothing."""
        if query.grid_bits > MAX_BITS:
            raise ConfigError(
                f"query {query.name!r} has grid_bits={query.grid_bits}; a sum of whole vectors takes {MAX_BITS}"
            )
        if query.n_classes not in (1, self.n_classes):
            raise ConfigError(f"query {query.name!r} has {query.n_classes} rows for {self.n_classes} classes")

        def placed(x: Tensor, y: Tensor) -> Tensor:
            return fn(x.to(self.device), y.to(self.device))

        worst = check_recordwise(placed, self.image_shape, self.n_classes, query.dim, query.clip_norm)
        self.checks[query.name] = max(worst, self.checks.get(query.name, 0.0))
        self._ranks.agree(lambda: probed(placed, self.image_shape, self.n_classes))

    def release(self, query: GaussianSum, fn: RecordFunction, *, progress: Progress | None = None) -> Tensor:
        r"""Returns a noisy sum of clipped per-record vectors, by class, and records it in the ledger.

        Computes S + N(0, σ²C² I), where row k of S sums min(1, C/‖v_i‖)·v_i with v_i = fn(x_i, y_i) over the records of class k in a
        Poisson sample of rate q (all records where q = 1).

        Source: Abadi et al. (2016), Alg. 1. Proof: docs/privacy/gaussian_sum.md.
        Guarantee: one release is `query.part()` under add-or-remove of one record, if `fn` treats rows alone.
        Not covered: rounding inside `fn` that depends on a record's place (docs/known-limits.md#rounding).

        Args:
          query: public parameters; `clip_norm` is in units of `fn`'s output.
          fn: maps images [B, C, H, W] (float32 in [-1, 1]) and labels [B] to vectors [B, D].
          progress: told the fraction of the records passed.

        Returns:
          [K, D] float32, K = query.n_classes: a sum, not a mean. Divide by a public constant or by a released count.

        Raises:
          BudgetError: the ledger cannot afford this release. Nothing was read.
          RecordwiseError: `fn` mixes records, or returns another shape. Nothing was read.
        """
        self.check(query, fn)
        return self.release_reserved(self.reserve(query), 0, fn, progress=progress)

    def release_reserved(
        self, held: Reservation, index: int, fn: RecordFunction, *, progress: Progress | None = None
    ) -> Tensor:
        """Release number `index` of a reservation; otherwise as `release`. Asked again, it returns the same bytes and reads nothing."""
        query = held.query
        if not isinstance(query, GaussianSum):
            raise ConfigError(f"query {query.name!r} is not a sum over records")
        self._check_charged(held, index)
        self.check(query, fn)  # also where the answer is known: a resumed run must report the same checks
        return self._noisy(held, index, lambda attempt: self._exact_sum(query, fn, attempt, progress))

    def features(
        self, fn: Callable[[Tensor], Tensor], dim: int, *, progress: Progress | None = None
    ) -> "PrivateFeatures":
        """Returns a handle on fixed features of the records, for sums of rank-one vectors; see `PrivateFeatures`."""
        from .features import PrivateFeatures

        return PrivateFeatures(self, fn, dim, progress=progress)

    def shards(self, n_shards: int, train: "Trainer") -> "Ensemble":
        """Returns a handle on the votes of models trained on disjoint shards of the records; see `Ensemble.of_shards`."""
        from .ensemble import Ensemble

        ensemble = Ensemble.of_shards(
            self._records, n_shards, train, self._ledger, self._vault, device=self.device, ranks=self._ranks
        )
        # One run: one certificate, and one list of what it charged before it stopped.
        ensemble.checks, ensemble._pending = self.checks, self._pending
        return ensemble

    def _exact_sum(
        self, query: GaussianSum, fn: RecordFunction, name: str, progress: Progress | None
    ) -> NDArray[np.int64]:
        images, labels = self._records.images, self._records.labels  # private
        chosen = np.arange(len(labels))
        if query.sampling_prob < 1:
            chosen = np.flatnonzero(self._coins(name, len(labels), query.sampling_prob))
        total = torch.zeros(query.n_classes, query.dim, dtype=torch.int64)
        # Long vectors go through fewer at a time: what was charged must not end for want of memory.
        size, told = max(1, min(self.micro_batch, MEMORY // (12 * query.dim))), Passing(progress)
        # Whole micro-batches to each process: a record keeps its place in one, and the same arithmetic, however many processes there are.
        starts = self._ranks.mine(range(0, len(chosen), size))
        for done, start in enumerate(starts, start=1):
            rows = chosen[start : start + size]
            # Always the same shape: a row's arithmetic must not depend on how many rows there are.
            x = np.zeros((size, *self.image_shape), np.float32)
            x[: len(rows)] = to_unit(images[rows], self._records.value_range)
            y = np.zeros(size, np.int64)
            y[: len(rows)] = labels[rows]
            valid = np.isfinite(x).all(axis=(1, 2, 3)) & (y >= 0) & (y < self.n_classes) & (np.arange(size) < len(rows))
            x[~valid], y[~valid] = 0, 0
            with torch.no_grad():
                # A copy of y: `fn` may write into it.
                v = fn(torch.from_numpy(x).to(self.device), torch.tensor(y, device=self.device))
            if v.shape != (size, query.dim):
                raise RecordwiseError(f"a record function returned shape {tuple(v.shape)}, wanted {(size, query.dim)}")
            grid = clip_to_grid(v, query.clip_norm, query.grid_bits).cpu()
            grid[~torch.from_numpy(valid)] = 0
            row = torch.from_numpy(y) if query.n_classes > 1 else torch.zeros(size, dtype=torch.int64)
            total.index_add_(0, row, grid)
            told(done / len(starts))
        told(1.0)
        return total.numpy()


def _fingerprint(records: LabelledImages) -> bytes:
    """What several processes compare of the records they were given: how many there are, and some of them, evenly spread."""
    rows = slice(None, None, max(1, len(records.labels) // N_COMPARED))
    digest = hashlib.sha256(repr((records.images.shape, str(records.images.dtype), records.ids is None)).encode())
    for part in (records.images[rows], records.labels[rows], *([] if records.ids is None else [records.ids[rows]])):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.digest()
