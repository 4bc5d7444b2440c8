"""Public stand-ins for private data, on which `joint`'s settings are chosen: a setting tried on private data would cost budget.

  .venv/bin/python benchmarks/proxy.py --data DIR --proxy letters --set steps=400
  .venv/bin/python benchmarks/proxy.py --data DIR --proxy objects --without noise

letters: ten classes of two Omniglot evaluation characters each, 14 drawers distorted to 2,000 images a class, 6 others to test;
         auxiliary: the background alphabets. Noise as 6,000 records a class would have it.
objects: ten superclasses of CIFAR-100 (500 images each; test images of the same); auxiliary: the ten other superclasses. Noise as 5,000
         records a class would have it.
hundred-grey: all of CIFAR-100 there in ten groups of two superclasses, grey, 28x28; no auxiliary but made-up images. Noise as for objects.
hundred-grey-strokes: the same, with Omniglot's background alphabets as auxiliary images.
Prints one JSON line: settings, accuracy by evaluation seed, and relative squared errors of the class contrasts in networks that took no
part, each under an augmentation. DIR: see common.py.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import read
from torch import Tensor

from dpdistill.config_files import build
from dpdistill.data import LabelledImages, procedural_images, to_unit
from dpdistill.evaluation import Training, evaluate
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods import Public, joint
from dpdistill.methods.joint import views
from dpdistill.models import ConvNet, Dsa
from dpdistill.privacy import Ledger, gaussian_multiplier
from dpdistill.workspace import FolderWorkspace

SUPERCLASSES = {
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
    "man-made": "bridge castle house road skyscraper",
    "omnivores": "camel cattle chimpanzee elephant kangaroo",
    "carnivores": "bear leopard lion tiger wolf",
    "aquatic mammals": "beaver dolphin otter seal whale",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "fish": "aquarium_fish flatfish ray shark trout",
    "furniture": "bed chair couch table wardrobe",
}

PAIRS = (  # all superclasses, two and two
    SUPERCLASSES["aquatic mammals"] + " " + SUPERCLASSES["fish"],
    "orchid poppy rose sunflower tulip apple mushroom orange pear sweet_pepper",
    "bottle bowl can cup plate clock keyboard lamp telephone television",
    SUPERCLASSES["insects"] + " crab lobster snail spider worm",
    SUPERCLASSES["carnivores"] + " " + SUPERCLASSES["omnivores"],
    SUPERCLASSES["man-made"] + " cloud forest mountain plain sea",
    "fox porcupine possum raccoon skunk hamster mouse rabbit shrew squirrel",
    "baby boy girl man woman " + SUPERCLASSES["reptiles"],
    SUPERCLASSES["furniture"] + " maple_tree oak_tree palm_tree pine_tree willow_tree",
    SUPERCLASSES["vehicles 1"] + " " + SUPERCLASSES["vehicles 2"],
)


def distorted(x_N1HW: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n random affine and elastic variants of strokes in [0, 1], thickened to a few pixels, in [-1, 1]."""
    x = F.interpolate(x_N1HW[torch.randint(len(x_N1HW), (n,), generator=generator)], scale_factor=2, mode="bilinear")

    def spread(reach: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * reach

    angle, sx, sy, shear = spread(0.16), 1 + spread(0.1), 1 + spread(0.1), spread(0.2)
    rows = torch.stack([angle.cos() * sx, -angle.sin() * sy + shear, spread(0.06)], 1)
    columns = torch.stack([angle.sin() * sx, angle.cos() * sy, spread(0.06)], 1)
    grid = F.affine_grid(torch.stack([rows, columns], 1), list(x.shape), align_corners=False)
    elastic = F.interpolate(torch.randn(n, 2, 5, 5, generator=generator) * 0.04, size=x.shape[2:], mode="bicubic")
    x = F.avg_pool2d(F.grid_sample(x, grid + elastic.permute(0, 2, 3, 1), align_corners=False), 2)
    gain = 1.2 + torch.rand(n, 1, 1, 1, generator=generator)
    return (F.avg_pool2d(x, 3, 1, 1) * gain * 1.6).clamp(0, 1) * 2 - 1


class StandIn(NamedTuple):
    """Images in [-1, 1], [N, C, H, W], and labels [N]; scale: what the noise of the real set's record count is divided by."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    auxiliary: Tensor
    auxiliary_labels: Tensor | None
    scale: float


def letters(folder: Path, characters: int = 2, n: int = 2000, n_test: int = 300) -> StandIn:
    """Ten classes of characters; the scale is records per class over 6,000.

    Args:
      characters: of a class.
      n, n_test: images of a class.
    """
    with np.load(folder / "omniglot28" / "test.npz", allow_pickle=False) as z:
        x, y, drawer = torch.from_numpy(z["images"]).float()[:, None] / 255, z["labels"], z["drawer"]
    rng, g = np.random.default_rng(0), torch.Generator().manual_seed(0)
    chosen = rng.permutation(np.unique(y))[: 10 * characters].reshape(10, characters)
    drawers = rng.permutation(np.arange(1, 21))
    train, test = [], []
    for k in range(10):
        mine = np.isin(y, chosen[k])
        train.append(distorted(x[torch.from_numpy(mine & np.isin(drawer, drawers[:14]))], n, g))
        test.append(distorted(x[torch.from_numpy(mine & np.isin(drawer, drawers[14:]))], n_test, g))
    labels = torch.arange(10)
    auxiliary = read(folder, "omniglot28", "train")
    return StandIn(
        torch.cat(train),
        labels.repeat_interleave(n),
        torch.cat(test),
        labels.repeat_interleave(n_test),
        torch.from_numpy(auxiliary.to_unit()),
        torch.from_numpy(auxiliary.labels),
        n / 6000,
    )


def objects(folder: Path, groups: Sequence[str] = tuple(SUPERCLASSES.values())) -> StandIn:
    """Groups of CIFAR-100's classes; the scale is records per class over 5,000."""
    found, labels = [], []
    for split in ("train", "test"):
        data = read(folder, "cifar100_subset", split)
        fine = [name.strip().lower().replace(" ", "_") for name in data.class_names]
        group = {name: k for k, names in enumerate(groups) for name in names.split()}
        y = torch.tensor([group.get(fine[label], -1) for label in data.labels])
        found += [torch.from_numpy(data.to_unit()), y]
        labels.append(torch.from_numpy(data.labels))
    x, y, xt, yt = found
    others = torch.unique(labels[0][y < 0], return_inverse=True)[1]
    return StandIn(x[y >= 0], y[y >= 0], xt[yt >= 0], yt[yt >= 0], x[y < 0], others, int((y >= 0).sum()) / 50_000)


def grey_objects(folder: Path) -> StandIn:
    """All hundred classes in ten groups, grey, 28x28; there are no others: the auxiliary images are made up."""
    found = objects(folder, PAIRS)
    x, x_test = (
        F.interpolate(z, size=(28, 28), mode="bilinear", antialias=True).mean(dim=1, keepdim=True)
        for z in (found.x, found.x_test)
    )
    made_up = torch.from_numpy(to_unit(procedural_images(4000, 1, 28, 28, 1)))
    return found._replace(x=x, x_test=x_test, auxiliary=made_up, auxiliary_labels=None)


def grey_beside_letters(folder: Path) -> StandIn:
    """The same, with the background alphabets as auxiliary set: images that have nothing to do with the records."""
    strokes = read(folder, "omniglot28", "train")
    images, labels = torch.from_numpy(strokes.to_unit()), torch.from_numpy(strokes.labels)
    return grey_objects(folder)._replace(auxiliary=images, auxiliary_labels=labels)


PROXIES = {
    "letters": letters,
    "objects": objects,
    "hundred-grey": grey_objects,
    "hundred-grey-strokes": grey_beside_letters,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--proxy", choices=tuple(PROXIES), required=True)
    parser.add_argument("--set", action="append", default=[], help="name=value for joint's Config")
    parser.add_argument("--without", choices=("none", "noise", "labels"), default="none", help="leave a part out")
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y, xt, yt, auxiliary, auxiliary_labels, scale = PROXIES[args.proxy](args.data)
    settings: dict[str, Any] = {"flip": args.proxy != "letters", **dict(item.split("=") for item in args.set)}
    config = build(joint.Config, settings)
    shape, names = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3])), tuple(str(k) for k in range(10))
    procedural = torch.from_numpy(to_unit(procedural_images(4000, *shape, args.seed)))
    nothing_given = args.proxy == "hundred-grey"
    public = Public(
        image_shape=shape,
        class_names=names,
        auxiliary=auxiliary,
        procedural=None if nothing_given else procedural,
        auxiliary_labels=None if args.without == "labels" else auxiliary_labels,
    )
    sigma = gaussian_multiplier(args.epsilon, 1e-5) * scale * (1e-3 if args.without == "noise" else 1)
    private = LabelledImages(
        images=x.numpy(), labels=y.numpy(), class_names=names, value_range=(-1, 1), source=args.proxy
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, Ledger.open(Path(scratch) / "ledger", cap=(1e12, 1e-5)) as ledger:
        handle = PrivateData(private, ledger, Vault.open(Path(scratch) / "vault"))
        workspace = FolderWorkspace(Path(scratch) / "work", seed=args.seed, quiet=True)
        synthetic = joint.run(config, public, handle, joint.plan(config, public, sigma), workspace)
    seconds = time.monotonic() - started
    test = LabelledImages(images=xt.numpy(), labels=yt.numpy(), class_names=names, value_range=(-1, 1), source="test")
    augment = "color_crop_cutout_scale_rotate" + ("_flip" if config.flip else "")
    training = Training(epochs=args.epochs, batch=64, width=64, bf16=True, augment=augment)
    value = evaluate(synthetic, test, training, seeds=range(args.eval_seeds))["accuracies"]
    print(
        json.dumps(
            {
                **vars(args),
                "data": "",
                "accuracy": value,
                "seconds": round(seconds),
                "class_error": _error(synthetic, x, y),
            }
        )
    )


@torch.no_grad()
def _error(synthetic: Any, x: Tensor, y: Tensor) -> list[float]:
    """Relative squared error of the synthetic class contrasts, in four random networks that took no part, each under an augmentation."""
    images, found = synthetic.training_images(), []
    labels = synthetic.labels.repeat_interleave(synthetic.parts**2)
    dsa = Dsa(fill=float(x.amin()), strategy="color_crop_cutout_scale_rotate")
    shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
    some = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))[:4000]
    for seed in range(900, 904):
        g = torch.Generator().manual_seed(seed)
        view = views.View(ConvNet(shape, 1, width=64, generator=g), dsa, dsa.draw(g))

        def contrasts(pixels: Tensor, of: Tensor, view: views.View = view) -> Tensor:
            features = views.seen([view], pixels)
            means = torch.stack([features[of == k].mean(dim=0) for k in range(10)])
            return means - means.mean(dim=0)

        real = contrasts(x[some], y[some])
        found.append(round(float((contrasts(images, labels) - real).square().sum() / real.square().sum()), 3))
    return found


if __name__ == "__main__":
    main()
