"""What NDPDC and Dosser both decide: images that match sums of Poisson samples by class. All of it is public.

q sampling_prob, L group_size, C clip_norm, M per_class.
"""

from dataclasses import dataclass

from ...errors import ConfigError
from ...models.augment import FULL_STRATEGY, Dsa
from .bounds import NORMS, RATES, check_bounds


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """Settings of both; the defaults are the papers'.

    Attributes:
      per_class: M, stored images per class.
      parts: 2 stores 2x2 training images in each (PEA); 1 stores plain images.
      group_size: L, records of a class that a release is expected to hold: the factor in the matching target.
      expected_records_per_class: public guess of a class' size; q is group_size over it. Never taken from the data.
      sampling_prob: q itself, instead of the line above.
      clip_norm: C, in units of the features.
      width: channels of the random networks.
      depth: of them; None is 3, the papers', or less on images below 16x16 (`fitting_depth`).
      augment: strategy of `Dsa`; leave out "flip" for digits. Not used where per_class is 1, as in the papers.
      lr, momentum: of the images' optimiser.
      class_steps: an optimiser step for each class in turn, as in Dosser; False is one for all classes, as in NDPDC.
      checkpoint_steps: steps between checkpoints; does not change the result.
    """

    per_class: int = 10
    parts: int = 1
    group_size: float = 50.0
    expected_records_per_class: int | None = None
    sampling_prob: float | None = None
    clip_norm: float = 1.0
    width: int = 128
    depth: int | None = None
    augment: str = FULL_STRATEGY
    lr: float = 1.0
    momentum: float = 0.5
    class_steps: bool = False
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("per_class", "parts", "expected_records_per_class", "width", "depth", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"Expected {name} of at least 1, got {value}.")
        check_bounds(self, NORMS, "group_size", "clip_norm")
        check_bounds(self, RATES, "lr")
        if not (0 <= self.momentum < 1):
            raise ConfigError(f"Expected momentum in [0, 1), got {self.momentum}.")
        try:
            Dsa(strategy=self.augment)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @property
    def rate(self) -> float:
        """q, from public numbers only."""
        if (self.sampling_prob is None) == (self.expected_records_per_class is None):
            raise ConfigError(
                "this method samples: give one of expected_records_per_class (a public guess) and sampling_prob, with --set"
            )
        if self.sampling_prob is not None:
            return self.sampling_prob
        return min(1.0, self.group_size / (self.expected_records_per_class or 1))

    @property
    def dsa(self) -> Dsa:
        return Dsa(strategy=self.augment if self.per_class > 1 else "none")
