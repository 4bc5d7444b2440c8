"""The only code that sees private records or draws privacy noise."""

from .gradients import per_record_gradient
from .private import PrivateData
from .vault import Vault

__all__ = ["PrivateData", "Vault", "per_record_gradient"]
