"""The release folder: written whole or not at all, read, checked by a stranger, shown to a person. Nothing here needs torch to verify."""

from .certificate import BundleFacts
from .release import load_student, product_of, product_of_sampler, read_bundle, write_bundle
from .report import write_report
from .verification import Verdict, verify

__all__ = [
    "BundleFacts",
    "Verdict",
    "load_student",
    "product_of",
    "product_of_sampler",
    "read_bundle",
    "verify",
    "write_bundle",
    "write_report",
]
