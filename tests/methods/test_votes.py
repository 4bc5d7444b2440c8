"""A shard's model: no class is favoured for being common in the shard. Features are the images themselves, [N, 1, 8, 8] of norm 1.

N records, C classes.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpdistill.errors import ConfigError
from dpdistill.methods.model import votes
from dpdistill.methods.model.votes import ShardTrainer, _shift

PLAIN: Any = SimpleNamespace(features=lambda x: x.flatten(1))


def images(n: int, label: int, generator: torch.Generator) -> Tensor:
    """Noise, a little brighter in the row of the class."""
    x = torch.randn(n, 1, 8, 8, generator=generator)
    x[:, :, label % 8] += 1.0
    return x / x.flatten(1).norm(dim=1)[:, None, None, None]


def shard(counts: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.cat([images(n, label, generator) for label, n in enumerate(counts)])
    return x, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def trained(counts: list[int], generator: torch.Generator, seed: int = 0) -> Any:
    x, y = shard(counts, generator)
    return ShardTrainer(PLAIN, 0.01, len(counts))(x, y, torch.Generator().manual_seed(seed))


def test_a_class_that_is_rare_in_every_shard_is_voted_for_as_often_as_it_occurs() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = shard([300, 300], g)
    found = torch.stack([trained([27, 3], g)(x.flatten(1)).argmax(dim=1) for _ in range(40)])
    assert 0.35 < float((found == 1).double().mean()) < 0.65
    assert float(((found.double().mean(dim=0) > 0.5).long() == y).double().mean()) > 0.9


def test_even_shards_are_as_good_as_the_plain_fit() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = shard([200, 200, 200], g)
    right = []
    for _ in range(20):
        records, labels = shard([10, 10, 10], g)
        phi = records.flatten(1).double()
        gram = phi @ phi.T + 0.01 * torch.eye(30).double()
        plain = phi.T @ torch.linalg.solve(gram, torch.nn.functional.one_hot(labels).double() - 1 / 3)
        ours = ShardTrainer(PLAIN, 0.01, 3)(records, labels, g)(x.flatten(1))
        scores = (x.flatten(1).double() @ plain, ours)
        right.append([float((s.argmax(dim=1) == y).double().mean()) for s in scores])
    plain_mean, our_mean = torch.tensor(right).mean(dim=0).tolist()
    assert plain_mean > 0.5
    assert our_mean > plain_mean - 0.01


def test_a_shard_of_one_class_votes_for_all_in_turn() -> None:
    g = torch.Generator().manual_seed(0)
    x = shard([6, 6, 6], g)[0].flatten(1)
    for seed in range(3):
        found = trained([0, 5, 0], g, seed)(x).argmax(dim=1)
        assert found.bincount(minlength=3).tolist() == [6, 6, 6]
    firsts = {int(trained([0, 5, 0], g, seed)(x).argmax(dim=1)[0]) for seed in range(20)}
    assert firsts == {0, 1, 2}


@pytest.mark.parametrize("counts", [[12, 12, 0], [1, 1, *[0] * 8], [0, 3, 0, 2, 0]], ids=str)
def test_a_class_that_a_shard_lacks_gets_no_vote(counts: list[int]) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = shard(counts, g)
    flat: Any = SimpleNamespace(
        features=lambda x: x.flatten(1)[:, :3]
    )  # few directions: all scores are near each other
    for features, queries in ((PLAIN, torch.randn(2000, 64, generator=g)), (flat, torch.randn(2000, 3, generator=g))):
        scores = ShardTrainer(features, 0.01, len(counts))(x, y, g)(queries)
        chosen = scores.argmax(dim=1).unique().tolist()
        assert set(chosen) <= {k for k, n in enumerate(counts) if n}
        assert torch.isfinite(scores).all()
        assert scores.abs().max() < 1e3  # or a leak would hide behind it: `check_trainer` is relative to the largest


def test_left_out_scores_are_those_of_a_fit_without_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both forms: fewer records than features, and more."""
    seen: list[Tensor] = []

    def noted(scores: Tensor, member: Tensor) -> Tensor:
        seen.append(scores)
        return _shift(scores, member)

    monkeypatch.setattr(votes, "_shift", noted)
    for counts in ([8, 5], [60, 50]):
        x, y = shard(counts, torch.Generator().manual_seed(0))
        ShardTrainer(PLAIN, 0.3, 2)(x, y, torch.Generator())
        phi, target = x.flatten(1).double(), torch.nn.functional.one_hot(y).double() - 0.5
        for i in (0, len(x) - 1):
            rest = torch.arange(len(x)) != i
            gram = phi[rest].T @ phi[rest] + 0.3 * torch.eye(64).double()
            alone = phi[i] @ torch.linalg.solve(gram, phi[rest].T @ target[rest])
            torch.testing.assert_close(seen[-1][i], alone)


def test_no_shard_raises_for_what_is_in_it() -> None:
    same = torch.full((4, 1, 8, 8), 1 / 8)
    for ridge in (1e-6, 1e-300):  # the second is refused by Config; even so, nothing is raised
        model = ShardTrainer(PLAIN, ridge, 2)(same, torch.tensor([0, 0, 1, 1]), torch.Generator())
        assert model(torch.ones(3, 64)).shape == (3, 2)
    with pytest.raises(ConfigError, match="ridge"):
        votes.Config(models=2, ridge=1e-7)


def test_a_problem_of_one_class_has_a_model() -> None:
    g = torch.Generator().manual_seed(0)
    assert (trained([5], g)(torch.randn(4, 64, generator=g)).argmax(dim=1) == 0).all()


def test_the_model_is_a_function_of_the_shard_alone() -> None:
    x, y = shard([9, 3], torch.Generator().manual_seed(1))
    queries = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))
    train = ShardTrainer(PLAIN, 0.01, 2)
    first = train(x, y, torch.Generator().manual_seed(0))(queries)
    train(*shard([3, 9], torch.Generator().manual_seed(3)), torch.Generator().manual_seed(0))
    assert torch.equal(train(x, y, torch.Generator().manual_seed(0))(queries), first)
    assert torch.equal(train(x, y, torch.Generator().manual_seed(0))(queries[3:4]).argmax(), first[3].argmax())


def test_the_shift_brings_clear_means_to_zero_and_leaves_what_chance_explains() -> None:
    member = torch.nn.functional.one_hot(torch.arange(2).repeat_interleave(50)).double()
    noise = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).double()
    clear = 0.01 * noise + torch.tensor([3.0, -3.0])
    means = (member / 50).T @ clear
    torch.testing.assert_close(_shift(clear, member), -means.mean(dim=0), rtol=1e-4, atol=0)
    by_chance = sum(
        bool((_shift(torch.randn(100, 2, generator=torch.Generator().manual_seed(s)).double(), member) == 0).all())
        for s in range(200)
    )
    assert 100 < by_chance < 160  # both squares below their expectation: 1 - 1/e of the draws
    assert (_shift(noise[:2], member[[0, 50]]) == 0).all()  # one record of each class: nothing is known of chance
