"""Who was in? Guessed from the released things alone, as a stranger would: no shadow models, no noisy sums. A modest attack: it shows
little where little leaks, and a weak attack proves nothing.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.images import LabelledImages
from ..methods import Sampler, Student, Synthetic
from ..models import few_step
from . import bounds
from .result import Membership
from .twin import Made, Twin

SIZE = 0.01  # share of false alarms
_BATCH = 256


def measure(twin: Twin, made: Made) -> tuple[Membership, ...]:
    """Attacks a twin's result: its records against those held out, and its canaries by their coins."""
    attacks = ATTACKS[type(made)]
    found = []
    for name, score in attacks.items():
        inside, outside = score(made, twin.records), score(made, twin.others)
        found.append(_result("records", name, inside, outside, twin))
        all_canaries = score(made, twin.canaries)
        found.append(_result("canaries", name, all_canaries[twin.included], all_canaries[~twin.included], twin))
    return tuple(found)


def _result(who: str, attack: str, inside: NDArray[np.float64], outside: NDArray[np.float64], twin: Twin) -> Membership:
    allowed = min(1.0, math.exp(min(twin.config.epsilon, 50.0)) * SIZE + twin.config.delta)
    return Membership(
        who=who,
        attack=attack,
        members=len(inside),
        others=len(outside),
        auc=bounds.auc(inside, outside),
        power=bounds.power_at(inside, outside, SIZE),
        power_allowed=allowed,
    )


def nearest(made: Synthetic | Sampler, records: LabelledImages) -> NDArray[np.float64]:
    """Minus the distance to the nearest released image of the record's class."""
    shown = made.images if isinstance(made, Sampler) else made
    images = shown.training_images().flatten(1)
    labels = shown.labels.repeat_interleave(shown.parts**2)
    x, y = torch.from_numpy(records.to_unit()).flatten(1), torch.from_numpy(records.labels)
    best = torch.full((len(x),), -math.inf)
    for k in labels.unique():
        mine = y == k
        best[mine] = -torch.cdist(x[mine], images[labels == k]).amin(dim=1)
    best[best == -math.inf] = (
        best[best > -math.inf].min() if (best > -math.inf).any() else 0.0
    )  # a class that nothing was released of
    return best.double().numpy()


def loss(made: Student, records: LabelledImages) -> NDArray[np.float64]:
    """Minus the student's cross-entropy on the record."""
    x, y = torch.from_numpy(records.to_unit()), torch.from_numpy(records.labels)
    model = made.model.cpu().eval()
    with torch.no_grad():
        logits = torch.cat([model(part) for part in x.split(_BATCH)])
    return -torch.nn.functional.cross_entropy(logits, y, reduction="none").double().numpy()


def denoising(made: Sampler, records: LabelledImages) -> NDArray[np.float64]:
    """Minus the mean squared error with which the model takes noise off the record, over all levels but the highest."""
    x, y = few_step.encoded(few_step.padded(torch.from_numpy(records.to_unit()))), torch.from_numpy(records.labels)
    noise = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(0))
    total = torch.zeros(len(x))
    with torch.no_grad():
        for t in range(few_step.LEVELS - 1):
            for start in range(0, len(x), _BATCH):
                some = slice(start, start + _BATCH)
                level = torch.full((len(x[some]),), t)
                found = few_step.clean(made.model, few_step.noisy(x[some], level, noise), level, y[some])
                total[some] -= (found - x[some]).square().flatten(1).mean(dim=1)
    return total.double().numpy()


ATTACKS = {
    Synthetic: {"distance to the nearest image": nearest},
    Student: {"loss of the student": loss},
    Sampler: {"distance to the nearest sample": nearest, "denoising loss": denoising},
}
