"""Votes of models on disjoint shards: what is done to one id changes one model and one vote a query, whatever is done.

N records, I ids, K shards, Q queries, C classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor, nn

from dpdistill.data.images import LabelledImages
from dpdistill.errors import BudgetError, ConfigError, LedgerError, TeacherError
from dpdistill.mechanisms import Ensemble, PrivateData, Vault, ensemble, private
from dpdistill.mechanisms.ensemble import PROBE, Model, Nobody, assign, check_trainer, one_vote
from dpdistill.mechanisms.private import Reservation
from dpdistill.mechanisms.recordwise import probe
from dpdistill.privacy import GaussianSum, Ledger, NoisyVotes, accounting
from dpdistill.privacy import ledger as ledgers
from dpdistill.privacy.queries import ShardSum
from several import OneOfTwo

C, K, Q = 3, 7, 20
NAMES = ("a", "b", "c")
QUERIES = torch.rand(Q, 1, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
Place = Callable[..., Any]


def votes(**change: Any) -> NoisyVotes:
    facts = {"name": "votes", "n_queries": Q, "n_classes": C, "n_models": K, "noise_multiplier": 5.0}
    return NoisyVotes(**facts | change)


def data(n: int = 60, n_ids: int | None = 15, *, seed: int = 0, text: bool = False) -> LabelledImages:
    """n made-up images; with ids, several to an id."""
    rng = np.random.default_rng(seed)
    ids = None if n_ids is None else np.arange(n) % n_ids
    return LabelledImages(
        images=rng.integers(0, 256, (n, 1, 4, 4)).astype(np.uint8),
        labels=rng.integers(0, C, n),
        class_names=NAMES,
        source="toy",
        ids=ids if ids is None or not text else np.array([f"person {i}" for i in ids]),
    )


def chosen(records: LabelledImages, rows: Any, **change: Any) -> LabelledImages:
    """Some of the records, in a given order."""
    ids = None if records.ids is None else records.ids[rows]
    facts = {"images": records.images[rows], "labels": records.labels[rows], "ids": ids}
    return LabelledImages(**facts | change, class_names=NAMES, source="toy")


class Training:
    """A trainer that notes what it was given: the weights are the mean of the images by class, and chance of its own."""

    def __init__(self) -> None:
        self.shards: dict[int, bytes] = {}

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        weights = torch.randn(C, 16, generator=generator) * 0.1
        weights.index_add_(0, labels, images.flatten(1) / (len(images) + 1))
        seed = generator.initial_seed()
        self.shards[seed] = images.numpy().tobytes() + labels.numpy().tobytes() + weights.numpy().tobytes()
        return lambda x: x.flatten(1) @ weights.T


@pytest.fixture
def place(tmp_path: Path) -> Any:
    """place(records or models, train, where=..., cap=..., key=...) -> an Ensemble; the same place again resumes the run."""
    held: dict[str, Ledger] = {}

    def build(
        source: LabelledImages | Sequence[Model],
        train: Any = None,
        where: str = "a",
        *,
        n_shards: int = K,
        unit: str | None = None,
        key: bytes = b"k" * 32,
        cap: tuple[float, float] = (1e6, 1e-5),
    ) -> Ensemble:
        if where in held:
            held.pop(where).close()
        if not (tmp_path / where / "vault").exists():
            (tmp_path / where / "vault").mkdir(parents=True)
            (tmp_path / where / "vault" / "key").write_bytes(key)
        own = not isinstance(source, LabelledImages)
        unit = unit or ("owner" if own else "record" if source.ids is None else "id")  # type: ignore[union-attr]
        held[where] = ledger = Ledger.open(tmp_path / where / "ledger.jsonl", cap=cap, data="toy", unit=unit)
        vault = Vault.open(tmp_path / where / "vault")
        if own:
            return Ensemble.of_models(source, C, ledger, vault)  # type: ignore[arg-type]
        return PrivateData(source, ledger, vault).shards(n_shards, train or Training())  # type: ignore[arg-type]

    yield build
    for ledger in held.values():
        ledger.close()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "rounded_gaussian", lambda n, sigma, stream: np.zeros(n, np.int64))


class NoLedger:
    lines: list[Any] = []  # noqa: RUF012


def on_shards(records: LabelledImages, n_shards: int, train: Any, **facts: Any) -> Ensemble:
    """Without a ledger: nothing can be released."""
    vault = Vault(Path("/nowhere"), "run", b"k" * 32, False)
    return Ensemble.of_shards(records, n_shards, train, NoLedger(), vault, **facts)  # type: ignore[arg-type]


def clean(records: LabelledImages, n_shards: int = K, train: Any = None) -> tuple[np.ndarray, dict[int, bytes]]:
    """The exact votes in grid steps, and what each shard's trainer was given and drew."""
    train = train or Training()
    total = on_shards(records, n_shards, train)._count(votes(n_models=n_shards), QUERIES, None).astype(object)
    return total, getattr(train, "shards", {})


def moved_shards(before: dict[int, bytes], after: dict[int, bytes]) -> int:
    return sum(before.get(k) != after.get(k) for k in before.keys() | after.keys())


def check_neighbours(first: LabelledImages, second: LabelledImages, n_models: int = 1) -> None:
    """At most so many models differ, and each moves one vote a query."""
    (before, given), (after, again) = clean(first), clean(second)
    assert moved_shards(given, again) <= n_models
    rows = ((after - before) ** 2).sum(axis=1)
    vote = 2**ensemble.VOTE_BITS
    assert rows.max() <= n_models**2 * 2 * vote**2
    assert rows.sum() <= votes(unit_moves=n_models).n_queries * n_models**2 * 2 * vote**2
    assert (before.sum(axis=1) == K * vote).all()
    assert (after.sum(axis=1) == K * vote).all()


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("which", range(15))
def test_changing_all_of_one_id_changes_one_teacher(which: int, text: bool) -> None:
    base = data(text=text)
    mine = base.ids == (f"person {which}" if text else which)
    images, labels = base.images.copy(), base.labels.copy()
    images[mine], labels[mine] = 255 - images[mine], (labels[mine] + 1) % C
    other = chosen(base, slice(None), images=images, labels=labels)
    (_, before), (_, after) = clean(base), clean(other)
    assert moved_shards(before, after) == 1
    check_neighbours(base, other)


@pytest.mark.parametrize("which", range(15))
def test_an_id_more_or_less_changes_one_teacher(which: int) -> None:
    base = data()
    assert moved_shards(clean(base)[1], clean(chosen(base, base.ids != which))[1]) == 1  # type: ignore[arg-type]
    check_neighbours(base, chosen(base, base.ids != which))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 12),
    text=st.booleans(),
    extreme=st.sampled_from(["", "nan", "-1", "K"]),
)
def test_any_change_under_one_id(seed: int, n: int, text: bool, extreme: str) -> None:
    """Any number of any records under one id for any others, anywhere in the file, of float images."""
    rng = np.random.default_rng(seed)
    base = data(30, 10, seed=seed, text=text)
    base = chosen(base, slice(None), images=(base.images / 255).astype(np.float32))
    name = np.array(["person 3"]) if text else np.array([3])
    rest = chosen(base, base.ids != name[0])
    order = rng.permutation(len(rest.labels) + n)
    fresh = rng.random((n, 1, 4, 4)).astype(np.float32)
    fresh[: n // 2] = math.nan if extreme == "nan" else 0.5
    other = LabelledImages(
        images=np.concatenate([rest.images, fresh])[order],
        labels=np.concatenate([rest.labels, rng.integers(0, C, n)])[order],
        ids=np.concatenate([rest.ids, np.repeat(name, n)])[order],  # type: ignore[list-item]
        class_names=NAMES,
        source="toy",
    )
    if extreme in ("-1", "K") and n:
        other.labels[other.ids == name[0]] = {"-1": -1, "K": C}[extreme]
    check_neighbours(base, other)
    check_neighbours(rest, other)


def test_a_longer_id_or_another_kind_of_number_moves_nobody_else() -> None:
    """A text array is as wide as its longest id, and an integer one as its largest: neither may reach the others' shards."""
    base = data(text=True)
    longer = chosen(base, np.append(np.arange(60), 0), ids=np.append(base.ids, "x" * 40))  # type: ignore[arg-type]
    check_neighbours(base, longer)
    numbers = data()
    for kind in (np.int8, np.uint16, np.uint64):
        same = chosen(numbers, slice(None), ids=numbers.ids.astype(kind))  # type: ignore[union-attr]
        assert clean(same)[1] == clean(numbers)[1]


def test_odd_ids_are_ids_too() -> None:
    odd = np.array(["", " ", "\ud800", "é", "e\u0301", "\U0010ffff", "a" * 99, "0", "00", "-1"])
    records = chosen(data(10), slice(None), ids=odd)
    assert clean(records)[0].sum() == K * Q * 2**ensemble.VOTE_BITS
    for bad in (
        np.array([1.0] * 10),
        np.array([True] * 10),
        np.arange(9),
        np.array([b"x"] * 10),
        np.zeros((10, 1), int),
    ):
        with pytest.raises(ValueError, match="ids"):
            chosen(data(10), slice(None), ids=bad)
    broken = np.array(["a"] * 10)
    broken.view(np.uint32)[3] = 0x110000
    with pytest.raises(ValueError, match="ids") as raised:
        chosen(data(10), slice(None), ids=broken)
    assert "110000" not in str(raised.value)


@pytest.mark.parametrize("n_ids", [15, None])
def test_the_order_of_records_is_irrelevant(n_ids: int | None) -> None:
    base = data(n_ids=n_ids)
    before, given = clean(base)
    for seed in range(5):
        after, again = clean(chosen(base, np.random.default_rng(seed).permutation(60)))
        assert (after == before).all()
        assert again == given


@pytest.mark.parametrize("which", [0, 17, 59])
def test_without_ids_a_record_goes_by_its_content(which: int) -> None:
    base = data(n_ids=None)
    check_neighbours(base, chosen(base, np.arange(60) != which))
    check_neighbours(base, chosen(base, np.append(np.arange(60), which)))  # a duplicate joins its twin
    other = chosen(base, slice(None), images=base.images.copy())
    other.images[which] = 255 - other.images[which]
    check_neighbours(base, other, n_models=2)


def test_without_ids_an_exchange_may_touch_two_shards() -> None:
    """That is what unit_moves = 2 stands for: were it 1, the figure for exchanging one record would be too small."""
    base, seen = data(n_ids=None), set()
    for which in range(20):
        other = chosen(base, slice(None), images=base.images.copy())
        other.images[which] = 255 - other.images[which]
        seen.add(moved_shards(clean(base)[1], clean(other)[1]))
    assert seen == {1, 2}


def test_shards_are_secret_and_even() -> None:
    records = chosen(data(3000, 3000), slice(None))
    first, second = (assign(records, 10, key) for key in (b"k" * 32, b"j" * 32))
    counts = np.bincount(first, minlength=10)
    assert len(counts) == 10
    assert ((counts - 300) ** 2 / 300).sum() < 40
    assert 0.05 < (first == second).mean() < 0.15  # chance: another key says nothing of this one
    assert assign(data(0, 1), 10, b"k").shape == (0,)
    assert assign(data(0, None), 10, b"k").shape == (0,)


IDS = np.array(["0", "1", "2", "3", "4", "é", "", "a longer one"])


def test_the_shards_are_those_of_earlier_versions() -> None:
    """Golden: a run that a later version resumes must find its shards again, or it would pay for another sum."""
    records = chosen(data(8), slice(None), images=np.arange(8 * 16, dtype=np.uint8).reshape(8, 1, 4, 4), ids=IDS)
    of_ids = assign(records, 10, b"k" * 32)
    assert of_ids.dtype == np.int64
    assert of_ids.tolist() == [6, 3, 6, 1, 5, 5, 2, 4]
    numbers = chosen(records, slice(None), ids=np.arange(8))
    assert assign(numbers, 10, b"k" * 32).tolist() == [6, 3, 6, 1, 5, 1, 8, 5]
    assert assign(chosen(records, slice(None), ids=None), 10, b"k" * 32).tolist() == [7, 5, 7, 8, 6, 2, 8, 8]
    first_pixels: dict[int, list[int]] = {}

    def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        pixels = (images[:, 0, 0, 0] * 127.5 + 127.5).round().int()
        first_pixels[generator.initial_seed()] = (pixels // 16).tolist()
        return lambda x: torch.zeros(len(x), C)

    clean(records, train=train)
    assert first_pixels == {1: [2, 7], 2: [5], 3: [0], 4: [3, 6], 6: [1, 4]}


def test_a_trainer_is_given_the_good_records_of_its_shard_and_no_others() -> None:
    """A malformed one does not take the others of its shard with it."""
    images = np.linspace(-3, 5, 6 * 16, dtype=np.float32).reshape(6, 1, 4, 4)
    unit = torch.from_numpy(((images.astype(np.float64) + 3) / 4 - 1).astype(np.float32))
    images[1, 0, 2, 3] = math.nan
    records = chosen(data(6), slice(None), images=images, labels=np.array([0, 1, 2, 0, 1, 2]), value_range=(-3.0, 5.0))
    records.labels[3:5] = -1, C
    seen: list[tuple[Tensor, Tensor]] = []

    def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        order = images[:, 0, 0, 0].argsort()
        seen.append((images[order], labels[order]))
        return lambda x: torch.zeros(len(x), C)

    clean(records, n_shards=1, train=train)
    ((given, labels),) = seen
    assert given.dtype == torch.float32
    assert torch.allclose(given, unit[[0, 2, 5]], atol=1e-6)
    assert labels.tolist() == [0, 2, 2]


def test_every_shard_has_a_seed_of_its_own() -> None:
    drawn: list[float] = []

    def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        drawn.append(float(torch.rand(1, generator=generator)))
        return lambda x: torch.zeros(len(x), C)

    clean(data(), train=train)
    assert len(set(drawn)) == len(drawn) == K


def test_an_empty_shard_votes_all_the_same() -> None:
    """One vote a query, by no record, and not all for one class: most shards of a small data set are empty."""
    votes_of_nobody, _ = clean(data(0, 1), n_shards=30)
    steps = 2**ensemble.VOTE_BITS
    assert (votes_of_nobody == 30 // C * steps).all()
    one = chosen(data(1, 1), slice(None))
    moved = clean(one, n_shards=30)[0] - votes_of_nobody
    assert (moved**2).sum() <= 2 * Q * steps**2
    malformed = chosen(one, slice(None), images=np.full((1, 1, 4, 4), np.nan, np.float32))
    assert (clean(malformed, n_shards=30)[0] == votes_of_nobody).all()
    assert Nobody(4, 1)(QUERIES[:2]).tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


SCORES = {
    "nan": torch.full((Q, C), math.nan),
    "one nan": torch.tensor([math.nan, 1.0, 2.0]).repeat(Q, 1),
    "nan and below zero": torch.tensor([math.nan, -2.0, -1.0]).repeat(Q, 1),
    "inf": torch.tensor([math.inf, -math.inf, math.inf]).repeat(Q, 1),
    "-inf": torch.full((Q, C), -math.inf),
    "huge": torch.tensor([1e30, 1e38, -1e38]).repeat(Q, 1),
    "probabilities": torch.tensor([0.4, 0.4, 0.2]).repeat(Q, 1),
    "half": torch.ones(Q, C, dtype=torch.float16),
    "whole": torch.ones(Q, C, dtype=torch.int32),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_model_votes_once_whatever_it_returns(name: str) -> None:
    cast = one_vote(lambda x: SCORES[name], QUERIES, C)
    assert cast.shape == (Q, C)
    assert ((cast == 0) | (cast == 1)).all()
    assert (cast.sum(dim=1) == 1).all()
    if name in ("one nan", "nan and below zero"):
        assert (cast[:, 2] == 1).all()


def test_a_model_that_writes_into_its_queries_moves_nobody_elses_vote() -> None:
    def meddling(x: Tensor) -> Tensor:
        x.fill_(0)
        return torch.zeros(len(x), C)

    seen = QUERIES.clone()
    one_vote(meddling, seen, C)
    assert torch.equal(seen, QUERIES)


@pytest.mark.parametrize("shape", [(Q, C + 1), (Q, C - 1), (Q - 1, C), (Q,), (Q, C, 1), (1, C)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TeacherError, match="shape"):
        one_vote(lambda x: torch.zeros(shape), QUERIES, C)


def fixed(weights: Tensor) -> Model:
    return lambda x: x.flatten(1) @ weights.T


OWNERS = [fixed(torch.randn(C, 16, generator=torch.Generator().manual_seed(k))) for k in range(K)]


@pytest.mark.parametrize("which", range(K))
@pytest.mark.usefixtures("silent")
def test_an_owner_moves_one_vote_a_query(which: int, place: Place) -> None:
    held = place(OWNERS, where="a")
    before = held.release_reserved(held.reserve(votes()), 0, QUERIES)
    other = list(OWNERS)
    other[which] = lambda x: torch.full((len(x), C), math.nan)
    held = place(other, where="b")
    moved = held.release_reserved(held.reserve(votes()), 0, QUERIES) - before
    assert float(moved.square().sum(dim=1).max()) <= 2
    held = place(OWNERS[::-1], where="c")
    assert torch.equal(held.release_reserved(held.reserve(votes()), 0, QUERIES), before)


def vectors(**change: Any) -> ShardSum:
    return ShardSum(**{"name": "vectors", "dim": Q * C, "n_models": K, "noise_multiplier": 5.0} | change)


Release = Callable[[Ensemble, Reservation, int, Tensor], Tensor]
WAYS = [(votes(), Ensemble.release_reserved), (vectors(), Ensemble.release_vectors)]


@pytest.mark.parametrize(("query", "release"), WAYS)
@pytest.mark.usefixtures("silent")
def test_processes_share_the_models_and_agree_on_the_queries(query: Any, release: Release, place: Place) -> None:
    held = place(OWNERS)
    reserved = held.reserve(query)
    whole = release(held, reserved, 0, QUERIES)
    other = QUERIES.clone()
    other[-1, 0, -1, -1] = torch.nextafter(other[-1, 0, -1, -1], torch.tensor(1.0))
    parts, agreed = [], []
    for rank in (0, 1):
        mine = OneOfTwo(rank)
        part = Ensemble.of_models(OWNERS, C, held._ledger, Vault.open(held._vault.folder / str(rank)), ranks=mine)
        part._vault.run = held._vault.run
        parts.append(release(part, reserved, 0, QUERIES))
        release(part, reserved, 0, QUERIES)
        release(part, reserved, 0, other)
        assert len(part._models) == (K + 1 - rank) // 2  # type: ignore[arg-type]
        agreed.append(mine.agreed)
    assert torch.equal(parts[0] + parts[1], whole)
    first, again, another = agreed[0]
    assert agreed[0] == agreed[1]
    assert first == again != another


@pytest.mark.parametrize(("query", "release"), WAYS)
def test_a_reservation_of_other_models_or_a_made_up_one_buys_nothing(
    query: Any, release: Release, place: Place
) -> None:
    held = place(data())
    facts = {**vars(query), "n_models": K + 1}
    more = Ensemble.of_models([*OWNERS, OWNERS[0]], C, NoLedger(), held._vault)  # type: ignore[arg-type]
    more._ledger = held._ledger
    with pytest.raises(ConfigError, match="is about other"):
        release(held, more.reserve(type(query)(**facts)), 0, QUERIES)
    reserved = held.reserve(query)
    quiet = type(query)(**vars(query) | {"noise_multiplier": 0.1})
    for forged in (
        Reservation(quiet, 1, reserved.line),
        Reservation(query, 2, reserved.line),
        Reservation(query, 1, 0),
    ):
        with pytest.raises(LedgerError, match="not on the ledger"):
            release(held, forged, 0, QUERIES)
    with pytest.raises(ValueError, match="below the 1"):
        release(held, reserved, 1, QUERIES)
    assert held._models is None


@pytest.mark.parametrize(("query", "release"), WAYS)
def test_models_are_made_once_and_told_of(query: Any, release: Any, place: Place) -> None:
    train = Training()
    held, told = place(data(), train), []  # type: tuple[Ensemble, list[float]]
    reserved = held.reserve(query, 2)
    release(held, reserved, 0, QUERIES, progress=told.append)
    train.shards.clear()
    release(held, reserved, 1, QUERIES, progress=told.append)
    assert told == [*((k + 1) / K for k in range(K)), 1.0]  # as they are made, and at once where they are
    assert set(train.shards) == {0}  # the check's made-up shards: no other seed, so no model was made again


@pytest.mark.parametrize(("query", "release"), WAYS)
def test_the_worst_that_the_check_saw_is_kept(query: Any, release: Release, place: Place) -> None:
    held, found, asked = place(OWNERS), iter([0.25, 0.125, 0.5]), []  # type: tuple[Ensemble, Any, list[Any]]

    def check(*given: Any) -> float:
        asked.append(given)
        return float(next(found))

    held = Ensemble(K, C, lambda _: OWNERS, held._ledger, held._vault, "owner", check)
    reserved = held.reserve(query)
    seen = []
    for _ in range(3):
        release(held, reserved, 0, QUERIES)
        seen.append(dict(held.checks))
    assert seen == [{query.name: worst} for worst in (0.25, 0.25, 0.5)]
    for queries, width in asked:
        assert torch.equal(queries, QUERIES[:PROBE])
        assert width == C


def test_the_noise_is_the_stated_one(place: Place) -> None:
    """σ·√(2Q) votes on every entry, normal, and other for every release."""
    n, sigma = 4000, 0.4
    queries = torch.zeros(n, 1, 4, 4)
    held = place([lambda x: torch.tensor([1.0, 0.0, 0.0]).repeat(len(x), 1)] * K)
    reserved = held.reserve(votes(n_queries=n, noise_multiplier=sigma), 2)
    drawn = [held.release_reserved(reserved, i, queries).double() - torch.tensor([K, 0, 0]) for i in (0, 1)]
    std = sigma * math.sqrt(2 * n)
    for noise in drawn:
        flat = noise.flatten().numpy() / std
        assert abs(flat.std() - 1) < 4.9 * math.sqrt(0.5 / flat.size)
        assert abs(flat.mean()) < 4.9 / math.sqrt(flat.size)
        assert kstest(flat, "norm").pvalue > 1e-4
        assert float((noise * 2**ensemble.VOTE_BITS - (noise * 2**ensemble.VOTE_BITS).round()).abs().max()) < 1e-2
    pair = torch.corrcoef(torch.stack([noise.flatten() for noise in drawn]))
    assert abs(float(pair[0, 1])) < 4.9 / math.sqrt(3 * n)


def test_resumed_it_gives_the_same_bytes(place: Place, tmp_path: Path) -> None:
    def run(n: int, records: LabelledImages) -> list[Tensor]:
        held = place(records)
        reserved = held.reserve(votes(), 2)
        return [held.release_reserved(reserved, i, QUERIES) for i in range(n)]

    first, second = run(1, data()), run(2, data())
    assert torch.equal(first[0], second[0])
    assert not torch.equal(second[0], second[1])
    ledger = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    assert torch.equal(torch.stack(run(2, data(seed=1))), torch.stack(second))  # answered: nothing is read again
    for path in (tmp_path / "a" / "vault").glob("*.npy"):
        path.unlink()  # killed after the commitments
    assert torch.equal(torch.stack(run(2, data())), torch.stack(second))
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == ledger
    for path in (tmp_path / "a" / "vault").glob("*.npy"):
        path.unlink()
    assert not torch.equal(run(1, data(seed=1))[0], second[0])  # another sum: charged anew
    assert len((tmp_path / "a" / "ledger.jsonl").read_bytes().splitlines()) == len(ledger.splitlines()) + 1


WRONG = [
    {"n_classes": C + 1},
    {"n_models": K + 1},
    {"n_models": K - 1},
    {"unit_moves": 2},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_query_about_something_else_is_refused_before_the_charge(change: Any, place: Place, tmp_path: Path) -> None:
    held = place(data())
    before = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    for query in (votes(**change), GaussianSum(name="s", dim=1, noise_multiplier=9.0)):
        with pytest.raises(ConfigError):
            held.reserve(query)
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == before
    assert held._models is None


def test_without_ids_one_move_is_refused(place: Place) -> None:
    held = place(data(n_ids=None))
    with pytest.raises(ConfigError, match="units"):
        held.reserve(votes(unit_moves=1))
    held.release_reserved(held.reserve(votes(unit_moves=2)), 0, QUERIES)


def test_another_number_of_queries_is_refused(place: Place) -> None:
    held = place(data())
    reserved = held.reserve(votes())
    with pytest.raises(ConfigError, match="queries"):
        held.release_reserved(reserved, 0, QUERIES[:-1])
    assert held._models is None


def test_past_the_budget_no_model_is_trained(place: Place, tmp_path: Path) -> None:
    held = place(data(), cap=(accounting.epsilon([votes().part()], 1e-5), 1e-5))
    held.reserve(votes())
    before = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    with pytest.raises(BudgetError):
        held.reserve(votes(name="more"))
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == before
    assert held._models is None


def test_charged_on_disk_before_a_model_is_trained(place: Place, tmp_path: Path) -> None:
    seen: list[str] = []

    class Noting(Training):
        def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
            lines = ledgers.parse((tmp_path / "a" / "ledger.jsonl").read_bytes())
            seen.append(lines[-1]["type"])
            return super().__call__(images, labels, generator)

    held = place(data(), Noting())
    assert not seen
    held.release_reserved(held.reserve(votes()), 0, QUERIES)
    assert set(seen) == {"intent"}


@pytest.mark.parametrize(("n_ids", "unit"), [(15, "record"), (None, "id"), (15, "owner")])
def test_a_ledger_counts_by_one_unit(n_ids: int | None, unit: str, place: Place) -> None:
    """ε by the id on a ledger by the record, or the other way about, would be a sum of two things."""
    with pytest.raises(LedgerError, match="counts by"):
        place(data(n_ids=n_ids), unit=unit)
    with pytest.raises(LedgerError, match="counts by"):
        place(OWNERS, where="owners", unit="id")


def test_the_ledger_says_whose(place: Place) -> None:
    for source, unit, moves in ((data(), "id", 1), (data(n_ids=None), "record", 2), (OWNERS, "owner", 1)):
        held = place(source, where=unit)
        held.release_reserved(held.reserve(votes(unit_moves=moves)), 0, QUERIES)
        lines = held._ledger.lines
        assert lines[0]["unit"] == held.unit == unit
        assert ledgers.parts(lines) == [(1.0, 5.0, 1)]
        once, exchanged = ledgers.spent(lines, 1e-5), ledgers.spent(lines, 1e-5, relation="replace_one")
        assert exchanged == pytest.approx(accounting.gaussian_epsilon(5.0 / moves, 1e-5), rel=1e-3)
        assert once == pytest.approx(accounting.gaussian_epsilon(5.0, 1e-5), rel=1e-3)
        assert held.checks == {"votes": 0.0}


def test_records_with_ids_answer_no_sums(tmp_path: Path) -> None:
    """An id may have many records, each of which moves a sum by C: ε by the id would be false."""
    with Ledger.open(tmp_path / "l", cap=(9.0, 1e-5), data="toy", unit="id") as ledger:
        door = PrivateData(data(), ledger, Vault.open(tmp_path / "v"))
        query = GaussianSum(name="s", dim=16, noise_multiplier=50.0)
        with pytest.raises(ConfigError, match="ids"):
            door.release(query, lambda x, y: x.flatten(1))
        with pytest.raises(ConfigError, match="ids"):
            door.reserve(query)
        assert ledgers.parts(ledger.lines) == []


def test_one_run_may_sum_and_vote(place: Place, tmp_path: Path) -> None:
    """Both handles share the list of what a resumed run charged: neither takes the other's line."""
    sums = GaussianSum(name="count", dim=1, noise_multiplier=5.0)

    def run() -> tuple[Tensor, Tensor, int]:
        with Ledger.open(tmp_path / "l", cap=(1e6, 1e-5), data="toy") as ledger:
            door = PrivateData(data(n_ids=None), ledger, Vault.open(tmp_path / "v"))
            count = door.release(sums, lambda x, y: torch.ones(len(x), 1))
            held = door.shards(K, Training())
            cast = held.release_reserved(held.reserve(votes(unit_moves=2)), 0, QUERIES)
            assert set(door.checks) == {"count", "votes"}
            return count, cast, len(ledger.lines)

    first, again = run(), run()
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert first[2] == again[2] == 3


class Shared:
    """One network for all shards, trained on and on."""

    def __init__(self, *, copy: bool) -> None:
        self.weights, self.copy = torch.zeros(C, 16), copy

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        self.weights.index_add_(0, labels, images.flatten(1))
        return fixed(self.weights.clone() if self.copy else self.weights)


class Overwritten:
    """One network for all shards, begun anew for each: in the end all models are the last shard's."""

    def __init__(self) -> None:
        self.weights = torch.zeros(C, 16)

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        self.weights.zero_().index_add_(0, labels, images.flatten(1))
        return fixed(self.weights)


def by_global_chance(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
    return fixed(torch.rand(C, 16) + images.mean())


def by_global_scale() -> Any:
    """Normalises with the largest pixel of all shards so far."""
    scale = [0.0]

    def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        scale[0] = max(scale[0], float(images.abs().sum()))
        weights = torch.zeros(C, 16).index_add_(0, labels, images.flatten(1) / scale[0])
        return lambda x: (x.flatten(1) @ weights.T).softmax(dim=1)

    return train


def classes_it_saw(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
    """As scikit-learn does: a column for every class of the shard, and none for the others."""
    return lambda x: torch.zeros(len(x), int((labels > 0).sum().clamp(max=1)) + 1)


def batch_norm(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, C))
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=generator)
    network(images)
    return network.eval()


LEAKS: dict[str, Callable[[], Any]] = {
    "warm start": lambda: Shared(copy=True),
    "one network": lambda: Shared(copy=False),
    "overwritten": Overwritten,
    "global chance": lambda: by_global_chance,
    "global scale": by_global_scale,
    "classes it saw": lambda: classes_it_saw,
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_trainer_that_leaks_is_refused_before_anything_is_read(name: str, place: Place) -> None:
    held = place(data(), LEAKS[name]())
    reserved = held.reserve(votes())
    held._make = None  # type: ignore[assignment]
    with pytest.raises(TeacherError):
        held.release_reserved(reserved, 0, QUERIES)
    assert held._models is None


@pytest.mark.parametrize("train", [Training(), batch_norm], ids=["means", "batch norm in a shard"])
def test_a_good_trainer_passes(train: Any) -> None:
    assert check_trainer(train, QUERIES, (1, 4, 4), C, "cpu") == 0.0


def test_what_stands_for_an_empty_shard_stays_what_it_is() -> None:
    with pytest.raises(FrozenInstanceError):
        ensemble.Nobody(C, 1).shard = 0  # type: ignore[misc]


def test_a_trainer_is_tried_on_one_shard_then_another_then_the_first_again() -> None:
    given: list[tuple[Tensor, Tensor, Tensor]] = []

    def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        given.append((images.clone(), labels.clone(), generator.get_state()))
        images.zero_()  # they are its own
        labels.zero_()
        return lambda x: x.flatten(1)[:, :5]

    assert check_trainer(train, QUERIES, (3, 5, 4), 4, "cpu", 5) == 0.0
    x, y = probe((3, 5, 4), 4, PROBE)
    first, other, again = given
    assert len(first[0]) == len(other[0]) == 6
    assert torch.equal(torch.cat([first[0], other[0]]), x)
    assert torch.equal(torch.cat([first[1], other[1]]), y)
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))


class Drifting:
    """A trainer whose models answer by a fraction more when another was made before. Notes where its shards lie."""

    def __init__(self, fraction: float, scale: float = 1.0) -> None:
        self.fraction, self.scale, self.places = fraction, scale, []  # type: tuple[float, float, list[str]]

    def __call__(self, images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        score = self.scale * (1 + self.fraction * bool(self.places))
        self.places += [images.device.type, labels.device.type]
        return lambda x: torch.full((len(x), C), score, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_only_another_device_may_round(scale: float) -> None:
    """None is here: "meta" stands for one. On a CPU the last bit is too much; elsewhere it is 1e-4 of the largest answer."""
    for device, fraction in (("cpu", 1e-9), ("cpu", 0.5), ("meta", 1.1e-4)):
        with pytest.raises(TeacherError, match="changes by"):
            on_shards(data(), K, Drifting(fraction, scale), device=device)._check(QUERIES)
    for device, fraction in (("cpu", 0.0), ("meta", 0.9e-4)):
        train = Drifting(fraction, scale)
        held = on_shards(data(), K, train, device=device)
        assert held._check(QUERIES) == pytest.approx(fraction, rel=1e-9)
        held._count(votes(), QUERIES, None)
        assert train.places == [device] * 2 * (3 + K)


def test_no_shards_and_no_vote_by_a_sum(place: Place) -> None:
    with pytest.raises(ConfigError, match="at least one shard"):
        place(data(), n_shards=0)
