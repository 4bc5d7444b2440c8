"""What is promised: queries, accounting, the ledger, the guarantee. No torch, so that a third party can verify a release without it."""

from .accounting import epsilon, gaussian_multiplier
from .guarantee import Guarantee
from .ledger import Ledger
from .queries import GaussianSum, NoisyVotes, Planned, ShardSum, calibrate

__all__ = [
    "GaussianSum",
    "Guarantee",
    "Ledger",
    "NoisyVotes",
    "Planned",
    "ShardSum",
    "calibrate",
    "epsilon",
    "gaussian_multiplier",
]
