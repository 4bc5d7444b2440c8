"""What the benchmarks count."""

import importlib.util
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def test_the_cost_of_a_private_step_counts_what_it_brings_to_disk() -> None:
    spec = importlib.util.spec_from_file_location("benchmark_step_cost", SCRIPTS / "step_cost.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.measure("1,8,8", batch=4, multiplicity=1, repeats=1)
    parts = {name: value[0] for name, value in found.items() if isinstance(value, list)}
    ours = parts["noise"] + parts["vault"] + parts["ledger_line"] / 150
    whole = ours + sum(parts[name] for name in ("per_record_gradients", "clip_and_sum", "check"))
    assert parts["vault"] > 0
    assert found["noise_vault_and_ledger_share"] == pytest.approx(ours / whole, abs=0.02)
