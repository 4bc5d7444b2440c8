"""The private linear teacher on public stand-ins for private data: checks of its settings, which scans of this kind chose.

  .venv/bin/python benchmarks/proxy_teacher.py --data DIR --proxy letters --epsilon 1 --records 60000 --set steps=25
  .venv/bin/python benchmarks/proxy_teacher.py --data DIR --proxy objects --public procedural

Proxies: see proxy.py. Two are larger, since few drawings and few records overfit: letters-five, of five characters a class, and
objects-hundred, all of CIFAR-100's subset in ten groups. The door is simulated: every step sums all records' clipped gradients and adds
Gaussian noise, as large against the proxy's records as it would be against --records of them. Prints one JSON line: settings, accuracy of
the averaged and of the last head.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from common import peak_gib
from proxy import PAIRS, letters, objects
from torch import Tensor

from dpdistill.config_files import build
from dpdistill.data import procedural_images, to_unit
from dpdistill.models.linear import LinearTeacher
from dpdistill.privacy import gaussian_multiplier

PROXIES = {
    "letters": letters,
    "objects": objects,
    "letters-five": lambda folder: letters(folder, 5, 3000, 600),
    "objects-hundred": lambda folder: objects(folder, PAIRS),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Full-batch noisy gradient descent on the head.

    Attributes:
      steps: releases, each with noise multiplier s sqrt(steps), where s is that of one release with the whole budget.
      reach: lr · steps is `reach` times records / s: how far noise may carry the head.
      reach_max: largest lr · steps: beyond it a head fits the training records.
      momentum, clip_norm: of the sum of clipped gradients; lr multiplies it over clip_norm and the number of records.
      tail: share of the last steps whose heads are averaged.
      smoothing: of labels.
      dim, whitening, floor, offset: of the features, see LinearTeacher.
      n_auxiliary, n_procedural: public images that the features are fitted to.
    """

    steps: int = 25
    reach: float = 1.0
    reach_max: float = 16000.0
    momentum: float = 0.5
    clip_norm: float = 0.25
    tail: float = 0.5
    smoothing: float = 0.0
    dim: int = 500
    whitening: float = 0.5
    floor: float = 0.01
    offset: float = 0.1
    n_auxiliary: int = 2500
    n_procedural: int = 2000


def train(
    recipe: Recipe, x_BD: Tensor, y_B: Tensor, n_classes: int, s: float, records: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns heads [K, D], averaged over the tail and last, of features of norm 1; noise as `records` would have it."""
    lr = min(recipe.reach * records / s, recipe.reach_max) / recipe.steps
    std = s * recipe.steps**0.5 * recipe.clip_norm * len(x_BD) / records
    target = F.one_hot(y_B, n_classes).float() * (1 - recipe.smoothing) + recipe.smoothing / n_classes
    head, velocity, total, n_averaged = *torch.zeros(3, n_classes, x_BD.shape[1]).unbind(), 0
    for step in range(recipe.steps):
        residual = torch.softmax(x_BD @ head.T, dim=1) - target  # with |x| = 1 the norm of a record's gradient
        residual *= (recipe.clip_norm / residual.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
        noise = torch.randn(head.shape, generator=generator) * std
        gradient = (residual.T @ x_BD + noise) / (recipe.clip_norm * len(x_BD))
        velocity = recipe.momentum * velocity + (1 - recipe.momentum) * gradient
        head = head - lr * velocity
        if step >= recipe.steps * (1 - recipe.tail):
            total, n_averaged = total + head, n_averaged + 1
    return (total / n_averaged if n_averaged else head), head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--proxy", choices=tuple(PROXIES), required=True)
    parser.add_argument("--share", type=float, default=1.0, help="of the budget, that the teacher has")
    parser.add_argument("--set", action="append", default=[], help="name=value for Recipe")
    parser.add_argument("--public", choices=("both", "auxiliary", "procedural"), default="both")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0])
    parser.add_argument("--records", type=int, nargs="+", default=[60000])
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = build(Recipe, dict(item.split("=") for item in args.set))
    x, y, xt, yt, auxiliary, *_ = PROXIES[args.proxy](args.data)
    shape, n_classes = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])), 10
    started, generator = time.monotonic(), torch.Generator().manual_seed(0)
    chosen = auxiliary[
        torch.randperm(len(auxiliary), generator=generator)[: recipe.n_auxiliary]
    ]  # none in objects-hundred
    procedural = torch.from_numpy(to_unit(procedural_images(recipe.n_procedural, *shape, 0)))
    parts = {"both": [chosen, procedural], "auxiliary": [chosen], "procedural": [procedural]}[args.public]
    shared = {f.name for f in fields(Recipe)} & {"dim", "whitening", "floor", "offset"}
    teacher = LinearTeacher(shape, n_classes, **{k: v for k, v in asdict(recipe).items() if k in shared})
    teacher.fit_public(torch.cat(parts), generator)
    fitted = time.monotonic()
    train_BD, test_BD = (torch.cat([teacher.features(batch) for batch in images.split(100)]) for images in (x, xt))
    mapped = time.monotonic()
    accuracy: dict[str, list[list[float]]] = {}
    for epsilon in args.epsilon:
        for records in args.records:
            rows = accuracy.setdefault(f"epsilon {epsilon:g}, {records} records", [])
            for seed in range(args.seeds):
                noise = torch.Generator().manual_seed(seed)
                s = gaussian_multiplier(epsilon, 1e-5) / args.share**0.5
                heads = train(recipe, train_BD, y, n_classes, s, records, noise)
                rows.append([round(float(((test_BD @ w.T).argmax(dim=1) == yt).double().mean()), 4) for w in heads])
    print(
        json.dumps(
            {
                "proxy": args.proxy,
                "public": args.public,
                **asdict(recipe),
                "accuracy_averaged_last": accuracy,
                "seconds_fit": round(fitted - started),
                "seconds_features": round(mapped - fitted),
                "seconds_training": round((time.monotonic() - mapped) / args.seeds / len(accuracy), 1),
                "peak_gib": round(peak_gib(), 2),
            }
        )
    )


if __name__ == "__main__":
    main()
