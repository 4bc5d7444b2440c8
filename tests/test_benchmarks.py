"""What the benchmarks count, and what they write."""

import argparse
import importlib.util
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from behind_the_door import made_up_public
from dpdistill.methods import Synthetic

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


def squares(path: Path, shape: list[Any]) -> Path:
    """A feature network: the squares of an image's pixels along some public directions, [B, 5]."""
    pixels = math.prod(shape[1:])
    weights = np.random.default_rng(0).normal(size=(pixels, 5)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Flatten", ["x"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "w"], ["z"]),
        onnx.helper.make_node("Mul", ["z", "z"], ["y"]),
    ]
    given, found = (onnx.helper.make_tensor_value_info(name, 1, size) for name, size in (("x", shape), ("y", None)))
    held = [onnx.numpy_helper.from_array(weights, "w")]
    graph = onnx.helper.make_graph(nodes, "g", [given], [found], held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("batch", ["n", 4])
def test_frechet_s_distance_in_the_space_of_a_network_that_is_given(
    batch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    script = loaded("judging")
    features = script.network_features(str(squares(tmp_path / "net.onnx", [batch, 3, 16, 16])))
    g = torch.Generator().manual_seed(0)
    x, other = torch.rand(30, 1, 8, 8, generator=g) * 2 - 1, torch.rand(41, 3, 16, 16, generator=g) * 2 - 1
    weights = np.random.default_rng(0).normal(size=(3 * 256, 5)).astype(np.float32)
    larger = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", antialias=True).numpy()
    a, b = (np.square(part.reshape(len(part), -1) @ weights) for part in (larger.repeat(3, axis=1), other.numpy()))
    np.testing.assert_allclose(features(x), a, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features(other), b, rtol=1e-4, atol=1e-4)
    # ‖μ - ν‖² + tr(A + B - 2 (AB)^½), the root's trace from the eigenvalues of AB.
    covs = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(covs[0] @ covs[1]).real).sum()
    wanted = np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.trace(covs[0] + covs[1]) - 2 * root
    assert script.frechet(features(x), features(other)) == pytest.approx(wanted, rel=1e-4)
    assert script.frechet(features(x), features(x)) == pytest.approx(0, abs=1e-3 * wanted)
    with pytest.raises(SystemExit, match="take images"):
        script.network_features(str(squares(tmp_path / "flat.onnx", ["n", 64])))


def test_a_student_s_steps_are_rows_of_one_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is lost and how much faster it is, for each number of steps, against the same teacher of the same release."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = loaded("diffusion")
    facts: dict[str, Any] = {"dataset": "digits", "epsilon": "1", "seconds": 60.0, "peak_gib": 1.0, "device": "cpu"}
    facts |= dict.fromkeys(("mlp", "logistic", "frechet", "precision", "recall"), 0.5) | {"epoch": "chosen"}
    lines = []
    for seed in (0, 1):
        for setting, note, accuracy, seconds in (
            ("teacher", "lr=1", 0.9, 20.0),
            ("student", "lr=1", 0.89, 4.0),
            ("student", "lr=1, steps=1", 0.87, 2.0),
        ):
            steps = {"steps": 1 if "steps" in note else 2} if setting == "student" else {}
            run = {"setting": setting, "note": note, "accuracy": accuracy, "sampling_seconds": seconds, "seed": seed}
            lines.append(json.dumps({**facts, **run, **steps}))
    monkeypatch.setattr(script, "DOCS", tmp_path)
    monkeypatch.setattr(script, "RUNS", tmp_path / "diffusion.runs.jsonl")
    script.RUNS.write_text("\n".join(lines))
    script.table()
    pairs = (tmp_path / "diffusion.md").read_text().split("points of CNN accuracy lost")[1].splitlines()[2:]
    assert pairs == ["| digits | 1 | 1.0 | 5.0 | 2 | 2 | lr=1 |", "| digits | 1 | 3.0 | 10.0 | 1 | 2 | lr=1, steps=1 |"]


def test_a_second_distance_is_in_the_table_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    script, judging = loaded("diffusion"), loaded("judging")
    net = str(squares(tmp_path / "net.onnx", ["n", 1, 8, 8]))
    monkeypatch.setattr(judging.Judge, "plain", lambda *_: 0.5)
    monkeypatch.setattr(judging.Judge, "cnn", lambda *_: 0.5)
    records, test = script.both(argparse.Namespace(), "digits")
    judge = judging.Judge(test, script.public_of(records, 0), judging.network_features(net))
    made = Synthetic(images=torch.from_numpy(records.to_unit()), labels=torch.from_numpy(records.labels))
    found = judge(made, 0)
    assert 0 < found["frechet_given"] != found["frechet"] > 0
    facts = {
        "dataset": "digits",
        "setting": "dpmerf",
        "epsilon": "1",
        "seconds": 60.0,
        "peak_gib": 1.0,
        "device": "cpu",
        "seed": 0,
    }
    monkeypatch.setattr(script, "DOCS", tmp_path)
    monkeypatch.setattr(script, "RUNS", tmp_path / "diffusion.runs.jsonl")
    bare = {key: value for key, value in found.items() if key != "frechet_given"}
    script.RUNS.write_text(json.dumps({**facts, **bare, "note": ""}))
    script.table()
    assert "given" not in (tmp_path / "diffusion.md").read_text() + (tmp_path / "diffusion.json").read_text()
    with script.RUNS.open("a") as file:
        file.write("\n" + json.dumps({**facts, **found, "note": "features=net.onnx"}))
    script.table()
    rows = {row["note"]: row for row in json.loads((tmp_path / "diffusion.json").read_text())}
    assert "frechet_given" not in rows[""]
    assert rows["features=net.onnx"]["frechet_given"] == round(found["frechet_given"], 4)
    head, line, *table = (tmp_path / "diffusion.md").read_text().splitlines()[1:5]
    assert {row.count("|") for row in (head, line, *table)} == {16}
    assert [row.split("|")[9].strip() for row in table] == ["–", f"{found['frechet_given']:.1f}"]


def test_the_cost_of_a_private_step_counts_what_it_brings_to_disk() -> None:
    script = loaded("step_cost")
    found = script.measure("1,8,8", batch=4, multiplicity=1, repeats=1)
    parts = {name: value[0] for name, value in found.items() if isinstance(value, list)}
    ours = parts["noise"] + parts["vault"] + parts["ledger_line"] / 150
    whole = ours + sum(parts[name] for name in ("per_record_gradients", "clip_and_sum", "check"))
    assert parts["vault"] > 0
    assert found["noise_vault_and_ledger_share"] == pytest.approx(ours / whole, abs=0.02)


def test_the_cost_of_sampling_is_a_ratio_within_each_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of ours: a teacher takes 8 and 12 seconds, its student 1, 2 and 4. Images of 8x8 have no fine mixture."""
    script, clock = loaded("sampling_cost"), 0.0
    lasts = itertools.cycle([8.0, 1.0, 2.0, 4.0, 12.0, 1.0, 2.0, 4.0])
    begun = itertools.cycle([True, False])

    def process_time() -> float:
        nonlocal clock
        clock += 0.0 if next(begun) else next(lasts)
        return clock

    monkeypatch.setattr(script.time, "process_time", process_time)
    found = {row.pop("teacher"): row for row in script.measure("1,8,8", count=20, repeats=2)}
    assert list(found) == ["mixture", "corrected", "from scratch"]
    for row in found.values():
        assert row == {
            "seconds": [10.0, 8.0, 12.0],
            "times_as_fast_in_1": [10.0, 8.0, 12.0],
            "times_as_fast_in_2": [5.0, 4.0, 6.0],
            "times_as_fast_in_4": [2.5, 2.0, 3.0],
        }
    assert "fine mixture" in script.teachers(made_up_public(1, 16))
