"""Teach the networks of some views on public images, so that they see more of what tells things apart. Nothing private is near.

Sources: distribution matching with trained networks beside random ones is IDM (Zhao et al. 2023), there trained on the real images;
images without labels, each a class of its own under augmentation, are Exemplar-CNN (Dosovitskiy et al. 2014).
A images, B of a batch, N views.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import Dsa
from ...models.precision import autocast
from ..base import Public, Workspace
from .views import View

BATCH = 64
EXEMPLARS = 1000  # images that are a class each
SHARES = (0, 0.25, 1)  # of the lessons


def lessons(n: int, operations: int, most: int) -> list[int]:
    """Steps for each of n views: a random network, one taught a little and one taught `most` for each operation of the augmentation."""
    return [round(most * SHARES[i // max(1, operations) % len(SHARES)]) for i in range(n)]


def lesson_of(public: Public, open_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Returns images and labels [A]: the person's own public ones, or some that are a class each."""
    if public.auxiliary_labels is not None:
        return public.auxiliary, public.auxiliary_labels
    return open_BCHW[:EXEMPLARS], torch.arange(min(len(open_BCHW), EXEMPLARS))


def teach(
    views: Sequence[View], images_ACHW: Tensor, labels_A: Tensor, steps: Sequence[int], dsa: Dsa, workspace: Workspace
) -> None:
    """Trains each view's network for its steps, in place, with a head that is thrown away. A stopped run goes on with the same bytes."""
    taught = [i for i, n in enumerate(steps) if n > 0]
    for i in workspace.track(taught, "teaching networks on public images"):
        saved = workspace.load(f"network-{i}")
        if saved is not None:
            views[i].network.load_state_dict(saved)
            continue
        _train(views[i], images_ACHW, labels_A, steps[i], dsa, workspace.generator("teaching", i), workspace.device)
        workspace.save(f"network-{i}", views[i].network.state_dict())


def _train(
    view: View, images: Tensor, labels: Tensor, steps: int, dsa: Dsa, generator: torch.Generator, device: torch.device
) -> None:
    network = view.network
    head = nn.Linear(network.embed_dim, int(labels.max()) + 1)
    nn.init.normal_(head.weight, std=1 / math.sqrt(network.embed_dim), generator=generator)
    nn.init.zeros_(head.bias)
    head.to(device)
    network.features.requires_grad_()
    learned = [*network.features.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(learned, lr=0.01, momentum=0.9, weight_decay=5e-4)  # as in `evaluation`
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        x = dsa.apply(images[rows].to(device), dsa.draw_batch(generator, BATCH))
        with autocast(device):
            loss = F.cross_entropy(head(network.embed(x)).float(), labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.requires_grad_(False)
