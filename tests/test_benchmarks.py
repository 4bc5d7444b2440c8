"""What the benchmarks count, and what they write."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_a_run_without_noise_has_no_epsilon_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    script = loaded("model")
    monkeypatch.setattr(script, "DOCS", tmp_path)
    monkeypatch.setattr(script, "RUNS", tmp_path / "model.runs.jsonl")
    run = {"dataset": "mnist", "setting": "opaque", "unit": "record", "accuracy": 0.5, "seconds": 60.0, "peak_gib": 1.0}
    lines = [json.dumps({**run, "epsilon": epsilon, "device": "cpu", "note": "x"}) for epsilon in ("inf", "10")]
    script.RUNS.write_text("\n".join(lines))
    script.table()
    rows = json.loads((tmp_path / "model.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert sorted(str(row["epsilon"]) for row in rows) == ["10.0", "None"]
    assert "| mnist | opaque | inf |" in (tmp_path / "model.md").read_text()


def test_the_cost_of_a_private_step_counts_what_it_brings_to_disk() -> None:
    script = loaded("step_cost")
    found = script.measure("1,8,8", batch=4, multiplicity=1, repeats=1)
    parts = {name: value[0] for name, value in found.items() if isinstance(value, list)}
    ours = parts["noise"] + parts["vault"] + parts["ledger_line"] / 150
    whole = ours + sum(parts[name] for name in ("per_record_gradients", "clip_and_sum", "check"))
    assert parts["vault"] > 0
    assert found["noise_vault_and_ledger_share"] == pytest.approx(ours / whole, abs=0.02)
