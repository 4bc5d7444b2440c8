"""bfloat16 is for machines that have it: elsewhere it costs an order of magnitude, and a run would take hours."""

from pathlib import Path

import pytest
import torch

import dpdistill
from dpdistill.models import precision


@pytest.mark.parametrize("has_it", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_only_where_it_is_wanted_and_quick(monkeypatch: pytest.MonkeyPatch, has_it: bool, wanted: bool) -> None:
    monkeypatch.setattr(precision, "is_fast", lambda kind: has_it)
    a = torch.ones(3, 3)
    with precision.autocast("cpu", wanted):
        assert (a @ a).dtype == (torch.bfloat16 if has_it and wanted else torch.float32)


def test_a_cpu_is_asked() -> None:
    quick = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert precision.is_fast("cpu") is bool(quick)


def test_other_devices_keep_float32() -> None:
    assert not precision.is_fast("meta")


def test_nothing_else_turns_bfloat16_on() -> None:
    """Every method goes through `precision`, so that none is slow where the machine has no bfloat16."""
    root = Path(dpdistill.__file__).parent
    users = [p.relative_to(root).as_posix() for p in root.rglob("*.py") if "torch.autocast" in p.read_text()]
    assert users == ["models/precision.py"]
