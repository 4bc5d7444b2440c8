"""Utility: a classifier learns a toy problem, from hard labels, soft labels and parts, the same way for a seed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpdistill.data.images import LabelledImages
from dpdistill.evaluation import Training, accuracy, evaluate, train_classifier, train_on_real
from dpdistill.methods.base import Synthetic
from dpdistill.models import ConvNet

QUICK = Training(epochs=20, width=8, depth=2, lr=0.05, batch=8, augment="crop_flip")


def toy(n: int, seed: int, side: int = 8) -> LabelledImages:
    """Horizontal against vertical stripes, in noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % 2
    images = rng.integers(0, 100, (n, 1, side, side), dtype=np.uint8)
    images[labels == 0, :, ::2] += 150
    images[labels == 1, :, :, ::2] += 150
    return LabelledImages(images=images, labels=labels, class_names=("rows", "columns"), source="toy")


def synthetic(n: int = 32, **changes: object) -> Synthetic:
    data = toy(n, 0)
    return Synthetic(images=torch.from_numpy(data.to_unit()), labels=torch.from_numpy(data.labels), **changes)


@pytest.mark.parametrize("bf16", [False, True])
def test_learns(bf16: bool) -> None:
    result = evaluate(synthetic(), toy(60, 1), replace(QUICK, bf16=bf16), seeds=(0, 1))
    assert result["mean"] > 0.9
    assert len(result["accuracies"]) == 2
    assert result["std"] == pytest.approx(np.std(result["accuracies"]))


def test_parts_hold_training_images() -> None:
    small = toy(48, 0, side=4)
    by_class = [torch.from_numpy(small.to_unit()[small.labels == k]) for k in (0, 1)]
    sheets = []
    for tiles in by_class:
        for four in tiles.split(4):
            sheets.append(torch.cat([torch.cat([four[0], four[1]], 2), torch.cat([four[2], four[3]], 2)], 1))
    stored = Synthetic(images=torch.stack(sheets), labels=torch.arange(2).repeat_interleave(6), parts=2)
    big = toy(60, 1, side=4)
    scaled = torch.nn.functional.interpolate(torch.from_numpy(big.to_unit()), scale_factor=2, mode="bilinear")
    model = train_classifier(stored, 2, QUICK, torch.Generator().manual_seed(0))
    assert accuracy(model, scaled.numpy(), big.labels, value_range=(-1, 1)) > 0.9


def test_soft_labels_are_what_is_learnt() -> None:
    """Soft labels that contradict the hard ones win."""
    data = synthetic()
    soft = torch.eye(2)[1 - data.labels] * 0.9 + 0.05
    flipped = Synthetic(images=data.images, labels=data.labels, soft_labels=soft)
    test = toy(60, 1)
    model = train_classifier(flipped, 2, QUICK, torch.Generator().manual_seed(0))
    assert accuracy(model, test.images, test.labels) < 0.1
    wrong = Synthetic(images=data.images, labels=data.labels, soft_labels=soft[:5])
    with pytest.raises(ValueError, match="target"):
        train_classifier(wrong, 2, QUICK, torch.Generator())


def test_same_seed_same_network_and_global_state_untouched() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (
        train_classifier(synthetic(), 2, QUICK, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_progress_ends_at_one() -> None:
    told: list[float] = []
    evaluate(synthetic(), toy(10, 1), Training(epochs=3, width=4), seeds=(0, 1), progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1


def test_learning_rate_falls_once_after_half() -> None:
    """With a drop to zero, two lengths with equally many epochs at the full rate give the same network."""
    four = Training(epochs=4, width=4, drop=0.0, augment="none", momentum=0.0)  # epochs 0, 1 and 2 at the full rate
    first, same, longer = (
        train_classifier(synthetic(), 2, replace(four, epochs=epochs), torch.Generator().manual_seed(0))
        for epochs in (4, 5, 6)
    )
    assert torch.equal(first.head.weight, same.head.weight)
    assert not torch.equal(first.head.weight, longer.head.weight)


def test_real_reference_learns() -> None:
    model = train_on_real(toy(40, 0), QUICK, torch.Generator().manual_seed(0))
    test = toy(60, 1)
    assert accuracy(model, test.images, test.labels) > 0.9


def test_accuracy_counts() -> None:
    test = toy(10, 1)
    model = ConvNet((1, 8, 8), 2, width=4)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([1.0, 0.0]))
    assert accuracy(model, test.images, test.labels, batch=3) == 0.5
    with pytest.raises(ValueError, match="label"):
        accuracy(model, test.images, test.labels[:3])


def test_refuses_settings() -> None:
    with pytest.raises(ValueError, match="epochs"):
        Training(epochs=0)
    with pytest.raises(ValueError, match="blur"):
        Training(augment="blur")


def test_refuses_what_it_cannot_compare() -> None:
    """No seed, test images of another size, and fewer classes than the synthetic ones."""
    made = Synthetic(images=torch.zeros(2, 1, 8, 8), labels=torch.tensor([0, 1]))

    def held_out(side: int, names: tuple[str, ...]) -> LabelledImages:
        pixels = np.zeros((2, 1, side, side), np.uint8)
        return LabelledImages(images=pixels, labels=np.zeros(2, np.int64), class_names=names, source="made up")

    cases = ((held_out(8, ("a", "b")), ()), (held_out(16, ("a", "b")), (0,)), (held_out(8, ("a",)), (0,)))
    for test, seeds in cases:
        with pytest.raises(ValueError, match="Expected a seed at least, and test images"):
            evaluate(made, test, Training(epochs=1, width=4), seeds=seeds)


def test_shows_the_network_after_each_epoch() -> None:
    seen: list[float] = []
    watched = train_classifier(
        synthetic(),
        2,
        QUICK,
        torch.Generator().manual_seed(0),
        after_epoch=lambda net: seen.append(float(net.head.weight.detach().norm())),
    )
    alone = train_classifier(synthetic(), 2, QUICK, torch.Generator().manual_seed(0))
    assert len(seen) == QUICK.epochs
    assert len(set(seen)) == len(seen)
    assert torch.equal(watched.head.weight, alone.head.weight)
