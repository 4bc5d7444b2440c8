"""The only code that sees private records or draws privacy noise."""

from .answers import noisy_rows
from .ensemble import Ensemble
from .gradients import per_record_gradient
from .private import Door, PrivateData
from .ranks import ALONE, Ranks, joined
from .vault import Vault

__all__ = [
    "ALONE",
    "Door",
    "Ensemble",
    "PrivateData",
    "Ranks",
    "Vault",
    "joined",
    "noisy_rows",
    "per_record_gradient",
]
