"""Votes of shard teachers on public stand-ins for private data: how many shards and queries, and what to expect, without private data.

  .venv/bin/python benchmarks/proxy_votes.py --data DIR --proxy letters --per-shard 60 --queries 8000
  .venv/bin/python benchmarks/proxy_votes.py --data DIR --proxy objects-hundred --pair 0 4 --per-shard 20 --records 1600 --skew 0.8 0.3

Proxies as in proxy.py and proxy_teacher.py; --pair A B: two classes of one in colour alone, in grey. Shards hold --per-shard of the proxy's
records; the noise is that of a data set of --records of them, cut into as large shards. With --skew, a shard's classes are as uneven as
a person's records: their shares are drawn from a Dirichlet distribution of those concentrations (one for each class, or one for all), and
shards are made while records last. Prints one JSON line for each ε: accuracy on the proxy's test images of the classifier fitted to the
noisy votes (the student's teacher), and of a single shard's. DIR: see common.py.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from proxy_teacher import PROXIES
from torch import Tensor

from dpdistill.data import procedural_images, to_unit
from dpdistill.methods.base import Public
from dpdistill.methods.model.prior import Prior
from dpdistill.methods.model.votes import Config, ShardTrainer, embed, fit_votes, queries
from dpdistill.methods.shared.linear import public_images, untrained
from dpdistill.models.linear import OPPONENT
from dpdistill.privacy import gaussian_multiplier
from dpdistill.workspace import FolderWorkspace

DELTA = 1e-5


def even(n: int, per_shard: int, g: torch.Generator) -> Iterator[Tensor]:
    """Rows of shards as they come."""
    n_shards = n // per_shard
    yield from torch.randperm(n, generator=g)[: n_shards * per_shard].view(n_shards, -1)


def pair(x: Tensor, y: Tensor, classes: list[int]) -> tuple[Tensor, Tensor]:
    """Images of two classes, 0 and 1 from now on: 28x28, in grey."""
    chosen = torch.isin(y, torch.tensor(classes))
    brightness = torch.tensor(OPPONENT[0])[:, None, None]
    return (x[chosen] * brightness).sum(dim=1, keepdim=True)[:, :, 2:30, 2:30], (y[chosen] == classes[1]).long()


def skewed(y: Tensor, per_shard: int, concentrations: list[float], g: torch.Generator) -> Iterator[Tensor]:
    """Rows of shards whose classes are uneven, until a class has too few records left."""
    k = int(y.max()) + 1
    left = [rows[torch.randperm(len(rows), generator=g)] for rows in ((y == c).nonzero().flatten() for c in range(k))]
    while True:
        gamma = torch._standard_gamma(torch.tensor(concentrations, dtype=torch.float64).expand(k), generator=g)
        wanted = torch.multinomial(gamma, per_shard, replacement=True, generator=g).bincount(minlength=k).tolist()
        if any(n > len(rows) for n, rows in zip(wanted, left, strict=True)):
            return
        yield torch.cat([rows[:n] for n, rows in zip(wanted, left, strict=True)])
        left = [rows[n:] for n, rows in zip(wanted, left, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data sets (see common.py)")
    parser.add_argument("--proxy", choices=tuple(PROXIES), default="letters")
    parser.add_argument("--per-shard", type=int, default=60)
    parser.add_argument("--records", type=int, default=60_000)
    parser.add_argument("--queries", type=int, default=Config(models=1).queries)
    parser.add_argument("--ridge", type=float, default=Config(models=1).ridge)
    parser.add_argument("--epsilon", type=float, nargs="*", default=[1.0, 3.0, 10.0])
    parser.add_argument("--pair", type=int, nargs=2, help="two classes of a proxy in colour, in grey")
    parser.add_argument("--skew", type=float, nargs="*", default=[], help="concentrations of a shard's classes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y, x_test, y_test, *_ = PROXIES[args.proxy](Path(args.data))
    if args.pair:
        (x, y), (x_test, y_test) = pair(x, y, args.pair), pair(x_test, y_test, args.pair)
    n_classes = int(y.max()) + 1
    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    made_up = torch.from_numpy(to_unit(procedural_images(4000, *shape, args.seed)))
    public = Public(image_shape=shape, class_names=tuple(map(str, range(n_classes))), auxiliary=made_up)
    config = Config(models=1, queries=args.queries, ridge=args.ridge)
    with tempfile.TemporaryDirectory() as scratch:
        workspace = FolderWorkspace(Path(scratch), seed=args.seed, quiet=True)
        model = untrained(config.teacher_dims, public)
        model.fit_public(public_images(public), workspace.generator("teacher-features"))
        asked = embed(model, queries(config, Prior(config, public, workspace), None, workspace, 0), "cpu")
    train = ShardTrainer(model, args.ridge, n_classes)
    g = torch.Generator().manual_seed(args.seed)
    shards = list(even(len(x), args.per_shard, g) if not args.skew else skewed(y, args.per_shard, args.skew, g))
    n_shards = len(shards)
    if not shards:
        raise SystemExit("a class has too few records for one shard: give a smaller --per-shard, or larger --skew")
    votes, alone = torch.zeros(len(asked), n_classes), []
    phi_test = embed(model, x_test, "cpu")
    for rows in shards:
        shard = train(x[rows], y[rows], g)
        votes += F.one_hot(shard(asked).argmax(dim=1), n_classes)
        alone.append(float((shard(phi_test).argmax(dim=1) == y_test).double().mean()))
    models = args.records / args.per_shard
    for epsilon in args.epsilon:
        std = math.sqrt(2 * args.queries) * gaussian_multiplier(epsilon, DELTA) / models
        shares = votes / n_shards + std * torch.randn(votes.shape, generator=g)
        weights = fit_votes(asked, shares)
        right = float(((phi_test @ weights.T).argmax(dim=1) == y_test).double().mean())
        facts = {
            "epsilon": epsilon,
            "models": models,
            "std": round(std, 4),
            "accuracy": right,
            "shards": n_shards,
            "one_shard": sum(alone) / len(alone),
        }
        print(json.dumps({**vars(args), **facts}))


if __name__ == "__main__":
    main()
