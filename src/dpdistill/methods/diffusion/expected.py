"""What to expect of a diffusion model before anything is spent: figures of docs/benchmarks/diffusion.md, and whose images they are of.

Nothing here is private, and nothing is foretold: a person's images are other images.
"""

from dataclasses import dataclass

from ..base import Public

ALIKE = 4.0  # times as many records, and as much ε, as a figure may be away


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Right answers on real test images, in %, of a small ConvNet trained on samples alone: of the default's student, and of `dpdm`'s.

    Attributes:
      images: whose; channels: of them; records: how many.
    """

    images: str
    channels: int
    records: int
    epsilon: float
    default: int
    dpdm: int | None = None


FIGURES = (
    Measured(images="handwritten digits", channels=1, records=1437, epsilon=1, default=88, dpdm=73),
    Measured(images="handwritten digits", channels=1, records=1437, epsilon=10, default=96, dpdm=93),
    Measured(images="MNIST", channels=1, records=60_000, epsilon=1, default=94, dpdm=27),
    Measured(images="MNIST", channels=1, records=60_000, epsilon=10, default=96),
    Measured(images="Fashion-MNIST", channels=1, records=60_000, epsilon=1, default=73),
    Measured(images="Fashion-MNIST", channels=1, records=60_000, epsilon=10, default=81),
    Measured(images="CIFAR-10", channels=3, records=50_000, epsilon=1, default=30),
)


def figures(public: Public, records: int, epsilon: float) -> list[Measured]:
    """Those of images of as many channels, about as many records and about this ε; of two, those of the nearer ε. Of one class: none."""

    def apart(one: float, other: float) -> float:
        return max(one / other, other / one)

    near = [
        figure
        for figure in FIGURES
        if public.n_classes > 1
        and figure.channels == public.image_shape[0]
        and max(apart(figure.records, records), apart(figure.epsilon, epsilon)) <= ALIKE
    ]
    nearest = min((apart(figure.epsilon, epsilon) for figure in near), default=0.0)
    return [figure for figure in near if apart(figure.epsilon, epsilon) == nearest]
