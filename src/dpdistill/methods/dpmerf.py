"""DP-MERF, the baseline: one release of each class' mean random Fourier features, and images of a generator fitted to it.

Source, privacy, and where it differs from the paper: `shared.embedding`. Proof: docs/privacy/gaussian_sum.md, once, for vectors of norm 1.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from ..mechanisms import PrivateData
from ..privacy import Planned
from .base import Public, Synthetic, Workspace
from .shared import embedding
from .shared.embedding import EmbeddingConfig


@dataclass(frozen=True, kw_only=True)
class Config(EmbeddingConfig):
    """Public settings, beside the embedding's and the generator's.

    Attributes:
      per_class: M, images drawn from the generator for each class.
    """

    per_class: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_class < 1:
            raise ConfigError(f"Expected per_class of at least 1, got {self.per_class}.")


def plan(config: Config, public: Public, noise_multiplier: float) -> list[Planned]:
    """One full-batch sum, by class."""
    return [embedding.planned("dpmerf", config, public, noise_multiplier)]


def run(config: Config, public: Public, private: PrivateData, plan: list[Planned], workspace: Workspace) -> Synthetic:
    """One release, then a conditional generator fitted to it."""
    query: Any = plan[0].query
    model = embedding.fit("dpmerf", config, query, public, private, workspace)
    labels = torch.arange(public.n_classes).repeat_interleave(config.per_class)
    return embedding.draw(model, config, labels, public.n_classes, workspace)
