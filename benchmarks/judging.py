"""How good synthetic images are: classifiers trained on them alone, and how near they lie to a test set in a space of features.

N images, C channels, H, W size, D features.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdistill.data import LabelledImages
from dpdistill.evaluation import Training, train_classifier
from dpdistill.methods import Public, Synthetic
from dpdistill.models.linear import LinearTeacher

FLIP = {"cifar10"}  # sets whose mirror images are of the same class: a public fact


class Judge:
    """Says how good synthetic images are, by a test set."""

    def __init__(self, test: LabelledImages, public: Public, given: Callable[[Tensor], Tensor] | None = None) -> None:
        self.x, self.y = torch.from_numpy(test.to_unit()), torch.from_numpy(test.labels)
        self.features = LinearTeacher(test.image_shape, test.n_classes)
        self.features.fit_public(public.auxiliary, torch.Generator().manual_seed(0))
        self.real = self.embed(self.x)
        self.given, self.real_given = given, given and given(self.x)
        self.flip = test.source in FLIP

    def embed(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.features.features(part) for part in x.split(250)])[:, :-1].double()

    def __call__(self, made: Synthetic, seed: int) -> dict[str, Any]:
        shuffled = torch.randperm(len(made.images), generator=torch.Generator().manual_seed(seed))
        x, y = made.images[shuffled], made.labels[shuffled]
        n = len(x) // 10  # held out: they choose the epoch
        parts = x[n:], y[n:], x[:n], y[:n]
        found = {
            "logistic": self.plain(*parts, 0, seed),
            "mlp": self.plain(*parts, 256, seed),
            "cnn": self.cnn(*parts, seed),
        }
        fake = self.embed(x)
        return {
            **found,
            "epoch": "chosen",
            "accuracy": found["cnn"],
            "frechet": 1000 * frechet(fake, self.real),  # features have norm 1
            **({"frechet_given": frechet(self.given(x), self.real_given)} if self.given else {}),
            **near(fake, self.real),
        }

    def plain(self, x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, hidden: int, seed: int) -> float:
        """Softmax regression on pixels, or one hidden layer: AdamW, 20 epochs, its rate falling to 0."""
        g, d, k = torch.Generator().manual_seed(seed), x[0].numel(), int(self.y.max()) + 1
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Flatten(), *([nn.Linear(d, hidden), nn.ReLU()] if hidden else []), nn.Linear(hidden or d, k)
        )
        optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.01)
        epochs = 20
        best = Best(held_x, held_y)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / epochs)
            for rows in torch.randperm(len(x), generator=g).split(64):
                loss = F.cross_entropy(net(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            best(net)
        return self.accuracy(best.restore(net))

    def accuracy(self, net: nn.Module) -> float:
        return float((guesses(net, self.x) == self.y).float().mean())

    def cnn(self, x: Tensor, y: Tensor, held_x: Tensor, held_y: Tensor, seed: int) -> float:
        """The ConvNet of `evaluate`, width 32, moved and scaled images; about 3,000 steps whatever the number of images."""
        side = x.shape[-1]
        augment = "crop_scale_rotate" + ("_flip" if self.flip else "")
        epochs = max(5, round(3000 * 64 / len(x)))
        training = Training(
            epochs=epochs, batch=64, lr=0.02, width=32, depth=2 if side <= 16 else 3, augment=augment, bf16=side > 16
        )
        best = Best(held_x, held_y)
        generator = torch.Generator().manual_seed(seed)
        net = train_classifier(
            Synthetic(images=x, labels=y), int(self.y.max()) + 1, training, generator, after_epoch=best
        )
        return self.accuracy(best.restore(net))


def guesses(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(part).argmax(dim=1) for part in x.split(500)])


class Best:
    """Keeps a classifier as it was when it was best on held-out synthetic images: the last such epoch."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.right, self.weights = x, y, -1, {}

    def __call__(self, net: nn.Module) -> None:
        right = int((guesses(net, self.x) == self.y).sum())
        if right >= self.right:
            self.right, self.weights = right, {name: value.clone() for name, value in net.state_dict().items()}

    def restore(self, net: nn.Module) -> nn.Module:
        net.load_state_dict(self.weights)
        return net


def frechet(fake: Tensor, real: Tensor) -> float:
    """Fréchet distance of two Gaussians with the features' means and covariances; features [N, D] in float64."""
    a, b = np.cov(fake.numpy(), rowvar=False), np.cov(real.numpy(), rowvar=False)
    apart = float(np.square(fake.mean(0).numpy() - real.mean(0).numpy()).sum())
    root = scipy.linalg.sqrtm(a @ b).real
    return apart + float(np.trace(a) + np.trace(b) - 2 * np.trace(root))


def network_features(path: str) -> Callable[[Tensor], Tensor]:
    """Returns fn(x [N, C, H, W] in [-1, 1]) -> [N, D] in float64: what an ONNX network says of images, fitted to what its input asks."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    if len(given.shape) != 4:
        raise SystemExit(f"Expected {path} to take images [B, C, H, W], got an input of shape {given.shape}.")
    batch, channels, *sides = (size if isinstance(size, int) else None for size in given.shape)

    def fn(x: Tensor) -> Tensor:
        found = []
        for part in x.split(batch or 50):
            n, size = len(part), [wanted or own for wanted, own in zip(sides, part.shape[2:], strict=True)]
            if size != list(part.shape[2:]):
                part = F.interpolate(part, size, mode="bilinear", antialias=True)
            if channels not in (None, part.shape[1]):
                part = part.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
            part = F.pad(part, (0, 0) * 3 + (0, (batch or n) - n))  # a file may name its batch
            (out, *_) = session.run(None, {given.name: part.numpy()})
            found.append(torch.from_numpy(out)[:n].flatten(1).double())
        return torch.cat(found)

    return fn


def near(fake: Tensor, real: Tensor, k: int = 3, n: int = 3000) -> dict[str, float]:
    """Precision and recall: share of one set inside the other's k-nearest-neighbour balls."""
    fake, real = fake[:n], real[:n]

    def radii(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values

    between = torch.cdist(fake, real)
    return {
        "precision": float((between <= radii(real)[None]).any(dim=1).float().mean()),
        "recall": float((between.T <= radii(fake)[None]).any(dim=1).float().mean()),
    }
