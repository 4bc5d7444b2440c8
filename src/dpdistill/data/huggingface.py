"""What Hugging Face `datasets` writes into a schema: its features, as JSON. Only the class names are used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from dpdistill.errors import InputError

MAX_JSON_BYTES = 2**20


def class_names_of(path: object, metadata: Mapping[bytes, bytes] | None, label_column: str) -> list[str] | None:
    """Returns the names of the ClassLabel feature of a column, or None if the schema declares none.

    Args:
      metadata: of the Arrow schema.

    Raises:
      InputError: the JSON is too large, repeats a key, or its names are not a list of str.
    """
    text = (metadata or {}).get(b"huggingface")
    if text is None:
        return None
    if len(text) > MAX_JSON_BYTES:
        raise InputError(path, "has oversized Hugging Face metadata", "write it again with datasets")
    try:
        # Depth is bounded by the size above; beyond Python's own limit this raises RecursionError.
        tree = json.loads(text, object_pairs_hook=no_repeats, parse_constant=no_constants)
    except (ValueError, RecursionError):
        raise InputError(path, "has damaged Hugging Face metadata", "write it again with datasets") from None
    feature: Any = tree
    for key in ("info", "features", label_column):
        feature = feature.get(key) if isinstance(feature, dict) else None
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return None
    names = feature.get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(path, "has a ClassLabel without a list of names", "remove it, and --set class_names=A,B,…")
    return names


def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; two equal keys are refused, since readers disagree on which one counts."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("repeated key")
    return tree


def no_constants(name: str) -> NoReturn:
    """Refuses NaN and Infinity, which are not JSON."""
    raise ValueError("not a JSON number")
