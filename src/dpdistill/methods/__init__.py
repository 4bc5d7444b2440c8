"""The methods. A new one is one module with `Config`, `plan` and `run` (see `base`), a line here, a proof page and an example."""

from typing import cast

from . import dosser, joint, ndpdc
from .base import Method, Public, Synthetic, Workspace

METHODS: dict[str, Method] = {
    "joint": cast(Method, joint),
    "dosser": cast(Method, dosser),
    "ndpdc": cast(Method, ndpdc),
}

__all__ = ["METHODS", "Method", "Public", "Synthetic", "Workspace"]
