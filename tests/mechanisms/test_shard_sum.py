"""Sums of vectors of models on disjoint shards: what is done to one unit moves one vector, and no vector leaves its ball.

N records, K shards, Q queries, D coordinates of an answer.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor

from dpdistill.bundle import certificate
from dpdistill.data.images import LabelledImages
from dpdistill.errors import BudgetError, ConfigError, LedgerError, TeacherError
from dpdistill.mechanisms import Ensemble, PrivateData, Vault
from dpdistill.mechanisms.ensemble import Model, Nobody, one_vector
from dpdistill.mechanisms.private import Reservation
from dpdistill.privacy import Ledger, accounting
from dpdistill.privacy import ledger as ledgers
from dpdistill.privacy.queries import NoisyVotes, ShardSum

K, Q, D = 7, 5, 3
QUERIES = torch.rand(Q, 1, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
BALL = 2**20


def query(**change: Any) -> ShardSum:
    return ShardSum(**{"name": "v", "dim": Q * D, "n_models": K, "noise_multiplier": 5.0, "clip_norm": 2.5} | change)


def data(n: int = 60, n_ids: int | None = 15, seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    return LabelledImages(
        images=rng.random((n, 1, 4, 4)).astype(np.float32),
        labels=rng.integers(0, 3, n),
        class_names=("a", "b", "c"),
        source="toy",
        ids=None if n_ids is None else np.arange(n) % n_ids,
    )


def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
    weights = torch.randn(16, D, generator=generator) + images.flatten(1).sum(0)[:, None] * (1 + labels.sum())
    return lambda x: x.flatten(1) @ weights


class NoLedger:
    lines: list[Any] = []  # noqa: RUF012


def total(records: LabelledImages, n_shards: int = K, trainer: Any = train) -> np.ndarray:
    """The exact sum in grid steps, as Python integers."""
    vault = Vault(Path("/nowhere"), "run", b"k" * 32, False)
    held = Ensemble.of_shards(records, n_shards, trainer, NoLedger(), vault)  # type: ignore[arg-type]
    return held._sum(query(n_models=n_shards), QUERIES, None).astype(object)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(0, 9),
    extreme=st.sampled_from(["", "nan", "huge", "label"]),
    shards=st.sampled_from([1, 7, 40]),
)
def test_whatever_happens_under_one_id_the_sum_moves_2c_at_most(seed: int, n: int, extreme: str, shards: int) -> None:
    rng = np.random.default_rng(seed)
    base = data(30, 10, seed)
    rest = base.ids != 3
    images = rng.random((n, 1, 4, 4)).astype(np.float32) * (1e30 if extreme == "huge" else 1)
    if extreme == "nan":
        images[:] = math.nan
    other = LabelledImages(
        images=np.concatenate([base.images[rest], images]),
        labels=np.concatenate([base.labels[rest], rng.integers(0, 3, n)]),
        ids=np.concatenate([base.ids[rest], np.full(n, 3)]),  # type: ignore[index]
        class_names=base.class_names,
        source="toy",
    )
    if extreme == "label":
        other.labels[other.ids == 3] = 99
    moved = total(other, shards) - total(base, shards)
    assert (moved**2).sum() <= (2 * BALL) ** 2


def parity(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
    """A model that one record more turns round."""
    sign = 1.0 - 2 * (len(images) % 2)
    return lambda x: torch.full((len(x), D), 50.0 * sign)


def test_without_ids_an_exchange_moves_4c_and_no_more() -> None:
    """That is what unit_moves = 2 stands for: two shards' vectors turn round."""
    base, seen = data(n_ids=None), []
    for which in range(20):
        other = data(n_ids=None)
        other.images[which] = 1 - other.images[which]
        seen.append(((total(other, K, parity) - total(base, K, parity)) ** 2).sum() ** 0.5 / BALL)
    assert 3.99 < max(seen) <= 4


def test_the_sum_is_of_whole_numbers_and_in_the_direction_of_its_vectors() -> None:
    """An odd sum of 99 vectors of about 2**20 steps: float32 would hold even numbers only."""
    asked, short = query(dim=Q, n_models=99), range(5, 5 + 2 * 99, 2)
    models = [lambda x, steps=steps: torch.eye(Q, 1) * 2.5 * (1 - steps / BALL) for steps in short]
    vault = Vault(Path("/nowhere"), "run", b"k" * 32, False)
    found = Ensemble.of_models(models, 3, NoLedger(), vault)._sum(asked, QUERIES, None)  # type: ignore[arg-type]
    assert found.dtype == np.int64
    assert found.tolist() == [99 * BALL - sum(short), 0, 0, 0, 0]


def test_2c_is_reached() -> None:
    """Not C: a model's vector may turn round."""
    rows = torch.ones(Q, D) * 50
    there, back = (one_vector(lambda x, s=sign: rows * s, QUERIES, query()) for sign in (1, -1))  # type: ignore[misc]
    assert float((there - back).double().norm()) > 1.999 * BALL


WILD = st.sampled_from([math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-45, 0.0, 1.0, -3.0])


@given(st.lists(WILD, min_size=Q * D, max_size=Q * D), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_a_vector_is_in_the_ball_whatever_a_model_returns(values: list[float], dtype: torch.dtype) -> None:
    rows = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(Q, D)
    grid = one_vector(lambda x: rows, QUERIES, query())
    assert sum(int(v) ** 2 for v in grid) <= BALL**2
    if not torch.isfinite(rows).all():
        assert not grid.any()


@pytest.mark.parametrize("shape", [(Q, D + 1), (Q - 1, D), (Q * D,), (Q, D, 1), (1, D)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TeacherError, match="shape"):
        one_vector(lambda x: torch.zeros(shape), QUERIES, query())


def test_nobody_is_zero_whatever_the_width() -> None:
    assert not one_vector(Nobody(3, 0), QUERIES, query()).any()
    assert not total(data(0, 1), 30).any()


def place(folder: Path, records: LabelledImages, cap: float = 1e6, trainer: Any = train) -> tuple[Ensemble, Ledger]:
    (folder / "vault").mkdir(parents=True, exist_ok=True)
    (folder / "vault" / "key").write_bytes(b"k" * 32)
    unit = "record" if records.ids is None else "id"
    ledger = Ledger.open(folder / "ledger.jsonl", cap=(cap, 1e-5), data="toy", unit=unit)
    return PrivateData(records, ledger, Vault.open(folder / "vault")).shards(K, trainer), ledger


def test_the_noise_is_the_stated_one(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "l", cap=(1e6, 1e-5), data="toy", unit="owner") as ledger:
        held = Ensemble.of_models([lambda x: torch.zeros(Q, 2000)] * K, 3, ledger, Vault.open(tmp_path / "v"))
        asked = query(dim=Q * 2000, noise_multiplier=0.7)
        reserved = held.reserve(asked, 2)
        drawn = [held.release_vectors(reserved, i, QUERIES).double() for i in (0, 1)]
    for noise in drawn:
        assert noise.shape == (Q, 2000)
        flat = noise.flatten().numpy() / (0.7 * 2 * 2.5)
        assert abs(flat.std() - 1) < 4.9 * math.sqrt(0.5 / flat.size)
        assert kstest(flat, "norm").pvalue > 1e-4
    assert abs(float(torch.corrcoef(torch.stack([n.flatten() for n in drawn]))[0, 1])) < 4.9 / math.sqrt(Q * 2000)


def test_resumed_it_gives_the_same_bytes(tmp_path: Path) -> None:
    def run(records: LabelledImages) -> list[Tensor]:
        held, ledger = place(tmp_path, records)
        with ledger:
            reserved = held.reserve(query(), 2)
            return [held.release_vectors(reserved, i, QUERIES) for i in (0, 1)]

    first = run(data())
    assert not torch.equal(*first)
    lines = (tmp_path / "ledger.jsonl").read_bytes()
    assert torch.equal(torch.stack(run(data(seed=1))), torch.stack(first))  # answered: nothing is read again
    for path in (tmp_path / "vault").glob("*.npy"):
        path.unlink()  # killed after the commitments
    assert torch.equal(torch.stack(run(data())), torch.stack(first))
    assert (tmp_path / "ledger.jsonl").read_bytes() == lines
    for path in (tmp_path / "vault").glob("*.npy"):
        path.unlink()
    assert not torch.equal(run(data(seed=1))[0], first[0])  # another sum: charged anew
    assert len((tmp_path / "ledger.jsonl").read_bytes().splitlines()) > len(lines.splitlines())


@pytest.mark.parametrize("change", [{"n_models": K + 1}, {"n_models": K - 1}, {"unit_moves": 2}], ids=str)
def test_a_query_about_something_else_is_refused_before_the_charge(change: Any, tmp_path: Path) -> None:
    held, ledger = place(tmp_path, data())
    with ledger, pytest.raises(ConfigError, match="models or units"):
        held.reserve(query(**change))
    assert ledgers.parts(ledger.lines) == []
    assert held._models is None


@pytest.mark.parametrize("n", [0, Q - 1, Q + 1])
def test_queries_that_do_not_fit_are_refused(n: int, tmp_path: Path) -> None:
    held, ledger = place(tmp_path, data())
    with ledger:
        reserved = held.reserve(query())
        with pytest.raises(ConfigError, match="other queries"):
            held.release_vectors(reserved, 0, QUERIES.repeat(2, 1, 1, 1)[:n])
        with pytest.raises(ConfigError, match="is not a vote"):
            held.release_reserved(reserved, 0, QUERIES)
        with pytest.raises(LedgerError, match="not on the ledger"):
            held.release_vectors(Reservation(query(), 1, 0), 0, QUERIES)
    assert held._models is None


def test_an_answer_has_any_width(tmp_path: Path) -> None:
    """Not one column for each class, as a vote has."""
    width = D - 1
    held, ledger = place(tmp_path, data(), trainer=lambda x, y, generator: lambda x: x.flatten(1)[:, :width])
    with ledger:
        assert held.n_classes == D
        assert held.release_vectors(held.reserve(query(dim=Q * width)), 0, QUERIES).shape == (Q, width)


def test_one_query_is_enough_and_a_vote_is_no_sum(tmp_path: Path) -> None:
    held, ledger = place(tmp_path, data())
    vote = NoisyVotes(name="vote", n_queries=1, n_classes=3, n_models=K, noise_multiplier=5.0, unit_moves=1)
    with ledger:
        assert held.release_vectors(held.reserve(query(dim=D)), 0, QUERIES[:1]).shape == (1, D)
        with pytest.raises(ConfigError, match="is not a sum over models"):
            held.release_vectors(held.reserve(vote), 0, QUERIES[:1])


def test_past_the_budget_no_model_is_trained(tmp_path: Path) -> None:
    held, ledger = place(tmp_path, data(), cap=accounting.epsilon([query().part()], 1e-5))
    with ledger:
        held.reserve(query())
        with pytest.raises(BudgetError):
            held.reserve(query(name="more"))
    assert held._models is None


def test_a_trainer_that_leaks_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    sums: list[Tensor] = []

    def leaking(images: Tensor, labels: Tensor, generator: torch.Generator) -> Model:
        sums.append(images.mean())
        return lambda x: x.flatten(1)[:, :D] * torch.stack(sums).mean()

    held, ledger = place(tmp_path, data(), trainer=leaking)
    with ledger:
        reserved = held.reserve(query())
        held._make = None  # type: ignore[assignment]
        with pytest.raises(TeacherError, match="another shard"):
            held.release_vectors(reserved, 0, QUERIES)


@pytest.mark.parametrize(("n_ids", "moves"), [(15, 1), (None, 2)])
def test_what_the_ledger_and_a_certificate_say(n_ids: int | None, moves: int, tmp_path: Path) -> None:
    held, ledger = place(tmp_path, data(n_ids=n_ids))
    with ledger:
        held.release_vectors(held.reserve(query(unit_moves=moves)), 0, QUERIES)
        lines = held._ledger.lines
        assert held.checks == {"v": 0.0}
    once, exchanged = ledgers.spent(lines, 1e-5), ledgers.spent(lines, 1e-5, relation="replace_one")
    assert once == pytest.approx(accounting.gaussian_epsilon(5.0, 1e-5), rel=1e-3)
    assert exchanged == pytest.approx(accounting.gaussian_epsilon(5.0 / moves, 1e-5), rel=1e-3)
    (mechanism,) = certificate._mechanisms(lines, lines[-1]["run"])
    assert certificate.shape(mechanism) == (1, Q * D)
    assert certificate._randomness([mechanism], False)["coordinates"] == Q * D
