"""Utility: train a fresh ConvNet on the synthetic images, and measure its accuracy on real test images.

Source: the evaluation of Zhao & Bilen (2021), as used by NDPDC and Dosser.
Accuracy on a private test set is not private: what this file returns belongs outside the release, and must not
choose it.
M training images, C channels, H, W size, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .data.images import LabelledImages, to_unit
from .methods.base import Synthetic
from .models import ConvNet, Dsa
from .models.augment import FULL_STRATEGY
from .models.convnet import quick_pooling
from .models.precision import autocast


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the classifier is trained. The defaults are the literature's protocol.

    Attributes:
      epochs: passes over the training images; the learning rate falls to `drop` of itself after half of them.
      batch: images per step.
      lr, momentum, weight_decay: of stochastic gradient descent.
      width, depth: of the ConvNet.
      augment: strategy of `Dsa`, applied to every batch, each image with parameters of its own; "none" for none.
      bf16: bfloat16 where the device is quick in it (`models.precision`): 1.5 to 1.7 times as fast on CPUs with AMX or AVX-512.
    """

    epochs: int = 1000
    batch: int = 256
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    drop: float = 0.1
    width: int = 128
    depth: int = 3
    augment: str = FULL_STRATEGY
    bf16: bool = False

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.width) < 1:
            raise ValueError(f"Expected {self.epochs=}, {self.batch=} and {self.width=} of at least 1.")
        Dsa(strategy=self.augment)


def train_classifier(
    synthetic: Synthetic,
    n_classes: int,
    training: Training,
    generator: torch.Generator,
    progress: Callable[[float], None] | None = None,
    *,
    device: str = "cpu",
    after_epoch: Callable[[ConvNet], None] | None = None,
) -> ConvNet:
    """Returns a ConvNet trained from scratch on a synthetic set: cross-entropy with its soft labels, else its labels.

    Args:
      n_classes: K.
      generator: for weights, order and augmentation; a CPU generator.
      progress: told the fraction of the epochs done.
      after_epoch: shown the network after each epoch, in training mode; leaves it as it is.
    """
    images = synthetic.training_images().to(device)
    hard = synthetic.labels.repeat_interleave(synthetic.parts**2)
    targets = (hard if synthetic.soft_labels is None else synthetic.soft_labels.float()).to(device)
    if not (len(images) == len(targets) > 0):
        raise ValueError(f"Expected a target for each of {len(images)} training images, got {len(targets)}.")
    _, channels, height, width = images.shape
    model = ConvNet(
        (channels, height, width), n_classes, width=training.width, depth=training.depth, generator=generator
    ).to(device)
    if training.bf16:
        quick_pooling(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay
    )
    dsa = Dsa(strategy=training.augment)
    for epoch in range(training.epochs):
        if epoch == training.epochs // 2 + 1:
            optimizer.param_groups[0]["lr"] *= training.drop
        for rows in torch.randperm(len(images), generator=generator).split(training.batch):
            x = dsa.apply(images[rows], dsa.draw_batch(generator, len(rows)))
            with autocast(device, training.bf16):
                loss = F.cross_entropy(model(x).float(), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if after_epoch:
            after_epoch(model)
        if progress:
            progress((epoch + 1) / training.epochs)
    return model.eval()


def train_on_real(
    train: LabelledImages,
    training: Training,
    generator: torch.Generator,
    progress: Callable[[float], None] | None = None,
    *,
    device: str = "cpu",
) -> ConvNet:
    """Returns the same network trained on the real records, without privacy: the reference line. Never release it."""
    real = Synthetic(images=torch.from_numpy(train.to_unit()), labels=torch.from_numpy(train.labels))
    return train_classifier(real, train.n_classes, training, generator, progress, device=device)


@torch.no_grad()
def accuracy(
    model: ConvNet,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    value_range: tuple[float, float] = (0.0, 1.0),
    batch: int = 500,
) -> float:
    """Returns the share of images that the model labels rightly.

    Args:
      images: [N, C, H, W], uint8, or float within `value_range`.
      labels: [N].
    """
    if not (len(images) == len(labels) > 0):
        raise ValueError(f"Expected a label for each of {len(images)} images, got {len(labels)}.")
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(images), batch):
        x = torch.from_numpy(to_unit(images[start : start + batch], value_range)).to(device)
        right += int((model(x).argmax(dim=1).cpu().numpy() == labels[start : start + batch]).sum())
    return right / len(images)


def evaluate(
    synthetic: Synthetic,
    test: LabelledImages,
    training: Training,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Callable[[float], None] | None = None,
    *,
    device: str = "cpu",
) -> dict[str, float | list[float]]:
    """Returns the test accuracy of networks trained on a synthetic set, one for each seed.

    Returns:
      `mean` and `std` (population, over the seeds) and `accuracies`, all in [0, 1]. Not private in the test set.

    Raises:
      ValueError: no seed, or test images of another shape, or fewer classes, than the synthetic ones.
    """
    shapes = tuple(synthetic.images.shape[1:]), tuple(test.images.shape[1:])
    if not (seeds and shapes[0] == shapes[1] and int(synthetic.labels.max()) < test.n_classes):
        raise ValueError(
            f"Expected a seed at least, and test images {shapes[0]} of {int(synthetic.labels.max()) + 1} classes or more, got "
            f"{len(seeds)} seeds, images {shapes[1]} and {test.n_classes} classes."
        )
    accuracies = []
    for index, seed in enumerate(seeds):

        def part(fraction: float, index: int = index) -> None:
            if progress:
                progress((index + fraction) / len(seeds))

        generator = torch.Generator().manual_seed(seed)
        model = train_classifier(synthetic, test.n_classes, training, generator, part, device=device)
        accuracies.append(accuracy(model, test.images, test.labels, value_range=test.value_range))
    return {"mean": float(np.mean(accuracies)), "std": float(np.std(accuracies)), "accuracies": accuracies}
