"""dpdistill: release something useful from private images, with a differential-privacy guarantee that is true.

Names are loaded when they are first used, so that `import dpdistill` and verifying a release need no torch.
"""

import importlib
from typing import Any

_HOME = {
    "RunConfig": "config",
    "distil": "pipeline",
    "make_plan": "pipeline",
    "load_images": "data",
    "LabelledImages": "data",
    "ModelConfig": "config",
    "convert": "conversion",
    "from_callable": "models.teachers",
    "load_student": "bundle",
    "read_bundle": "bundle",
    "verify": "bundle",
    "evaluate": "evaluation",
    "Training": "evaluation",
    "Guarantee": "privacy",
    "GaussianSum": "privacy",
    "Ledger": "privacy",
    "PrivateData": "mechanisms",
    "METHODS": "methods",
    "DpdistillError": "errors",
}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpdistill' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
