"""What `joint` could do without its pool: images fitted straight to class means under a few fixed random networks, on public stand-ins.

  .venv/bin/python benchmarks/proxy_means.py --data DIR --proxy letters --networks 16
  .venv/bin/python benchmarks/proxy_means.py --data DIR --proxy hundred-grey --networks 0

letters: as in proxy.py. hundred-grey: all of CIFAR-100 there in ten groups of two superclasses, grey, 28x28.
`--networks N`: each sees the images under one augmentation of its own, and its class means have the noise that 40 % of the budget of ε = 1
leaves with 6,000 records a class, clipped at the 80 % quantile of their norm. 0 is fresh networks and the means of 300 images of each class
drawn anew for each, without noise: not private, what a target without limit gives. Images begin as samples of one Gaussian a class in 64
principal coordinates, also without noise. A sketch: no door, no ledger.
Prints one JSON line: accuracy by evaluation seed, and the squared error of the images' class contrasts in networks that took no part,
relative to the contrasts. DIR: see common.py.
"""

import argparse
import json
import math
import time
from pathlib import Path

import proxy
import torch
import torch.nn.functional as F
from torch import Tensor

from dpdistill.data import LabelledImages
from dpdistill.evaluation import Training, evaluate
from dpdistill.methods import Synthetic
from dpdistill.methods.joint.matching import packed
from dpdistill.models import ConvNet, Dsa, expand
from dpdistill.privacy import gaussian_multiplier

K, PER_CLASS, PARTS, GAIN, WIDTH, REPEATS, LR = 10, 10, 2, 8, 32, 8, 0.04
SHARE, RECORDS = 0.4, 6000  # of the budget for the means; of a class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--proxy", choices=("letters", "hundred-grey"), required=True)
    parser.add_argument("--networks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.proxy == "letters":
        x, y, xt, yt, _, _ = proxy.letters(args.data)
    else:
        x, y, xt, yt, _, _ = proxy.objects(args.data, proxy.PAIRS)
        x, xt = grey(x), grey(xt)
    started = time.monotonic()
    some = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))[:10_000]
    x, y = x[some], y[some]
    dsa = Dsa(
        strategy="color_crop_cutout_scale_rotate" + ("" if args.proxy == "letters" else "_flip"), fill=float(x.amin())
    )
    images = fitted(x, y, dsa, args.networks, args.steps, args.epsilon, torch.Generator().manual_seed(args.seed))
    made = Synthetic(images=images, labels=torch.arange(K).repeat_interleave(PER_CLASS), parts=PARTS, gain=GAIN)
    test = LabelledImages(
        images=xt.numpy(), labels=yt.numpy(), class_names=tuple("0123456789"), value_range=(-1, 1), source="test"
    )
    training = Training(epochs=100, batch=64, width=64, bf16=True, augment=dsa.strategy)
    line = {
        **vars(args),
        "data": "",
        "fit_seconds": round(time.monotonic() - started),
        "error": errors(made, x[:4000], y[:4000], dsa),
        "accuracy": evaluate(made, test, training, seeds=(0, 1))["accuracies"],
    }
    print(json.dumps(line))


def grey(x: Tensor) -> Tensor:
    return F.interpolate(x, size=(28, 28), mode="bilinear", antialias=True).mean(dim=1, keepdim=True)


def embedded(network: ConvNet, x: Tensor, dsa: Dsa, draw: Tensor) -> Tensor:
    return torch.cat([network.embed(dsa.apply(part, draw)) for part in x.split(100)])


def class_means(features: Tensor, y: Tensor) -> Tensor:
    return torch.stack([features[y == k].mean(dim=0) for k in range(K)])


def fitted(x: Tensor, y: Tensor, dsa: Dsa, networks: int, steps: int, epsilon: float, g: torch.Generator) -> Tensor:
    """Returns stored images [K·M, 1, H, W]."""
    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    tiles = PER_CLASS * PARTS**2

    def target() -> tuple[ConvNet, Tensor, Tensor, Tensor]:
        """A network, its augmentation, the mean of its features, and of those of each class from there."""
        network, draw = ConvNet(shape, 1, width=WIDTH, generator=g).requires_grad_(False), dsa.draw(g)
        rows = torch.arange(len(y))
        if not networks:
            rows = torch.cat(
                [(y == k).nonzero().flatten()[torch.randperm(int((y == k).sum()), generator=g)[:300]] for k in range(K)]
            )
        features = embedded(network, x[rows], dsa, draw)
        centre = features.mean(dim=0)
        means = class_means(features - centre, y[rows])
        if networks:
            clip = float((features - centre).norm(dim=1).quantile(0.8)) * math.sqrt(
                networks
            )  # of all networks' together
            noise = clip * gaussian_multiplier(epsilon, 1e-5) / math.sqrt(SHARE) / RECORDS
            means = means + noise * torch.randn(means.shape, generator=g)
        return network, draw, centre, means

    images = packed(gaussian_samples(x, y, tiles, g), PARTS, GAIN).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=LR / GAIN, betas=(0.9, 0.99))
    bank = [target() for _ in range(networks)]
    one = bank[0] if bank else target()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR / GAIN * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))
        if bank:
            one = bank[int(torch.randint(networks, (1,), generator=g))]
        elif step % REPEATS == 0:
            one = target()
        network, draw, centre, means = one
        mine = (embedded(network, expand(images, PARTS, GAIN), dsa, draw) - centre).view(K, tiles, -1).mean(dim=1)
        loss = (means - mine).square().sum() / means.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(-1, 1)
    return images.detach()


def gaussian_samples(x: Tensor, y: Tensor, n: int, g: torch.Generator) -> Tensor:
    """n images of each class, of its Gaussian in 64 principal coordinates: about what a released mixture begins with."""
    flat, mean = x.flatten(1), x.flatten(1).mean(dim=0)
    axes = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:64]
    drawn = []
    for k in range(K):
        z = (flat[y == k] - mean) @ axes.T
        root = torch.linalg.cholesky(torch.cov(z.T) + 1e-4 * torch.eye(64))
        drawn.append((z.mean(dim=0) + torch.randn(n, 64, generator=g) @ root.T) @ axes + mean)
    return torch.cat(drawn).view(-1, *x.shape[1:]).clamp(-1, 1)


@torch.no_grad()
def errors(made: Synthetic, x: Tensor, y: Tensor, dsa: Dsa) -> list[float]:
    """Of the class contrasts, in three networks of width 64 that took no part, each under an augmentation."""
    found = []
    labels = made.labels.repeat_interleave(PARTS**2)
    for seed in range(900, 903):
        g = torch.Generator().manual_seed(seed)
        network, draw = (
            ConvNet((int(x.shape[1]), int(x.shape[2]), int(x.shape[3])), 1, width=64, generator=g),
            dsa.draw(g),
        )
        real, mine = (
            class_means(embedded(network, pixels, dsa, draw), of)
            for pixels, of in ((x, y), (made.training_images(), labels))
        )
        real, mine = real - real.mean(dim=0), mine - mine.mean(dim=0)
        found.append(round(float((mine - real).square().sum() / real.square().sum()), 3))
    return found


if __name__ == "__main__":
    main()
