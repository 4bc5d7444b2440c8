"""The examples that the README names: the scripts run, at a small size, and show what they say; the settings files are read."""

import importlib.util
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dpdistill import cli

EXAMPLES = Path(__file__).parents[1] / "examples"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_flipped_label_shows_by_the_papers_way_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = loaded("flip_one_label")
    found: dict[str, Any] = {}
    for way in ("paper", "private_teacher", "votes"):
        inner = getattr(example, way)
        monkeypatch.setattr(example, way, lambda *args, way=way, inner=inner: found.setdefault(way, inner(*args)))
    for name, value in (("TRIALS", 5), ("STEPS", 40), ("SHARDS", 10), ("QUERIES", 20)):
        monkeypatch.setattr(example, name, value)
    example.main()
    said = capsys.readouterr().out
    assert "private teacher" in said
    assert "with ids" in said
    assert "no ids" in said
    assert "two teachers change (unit_moves=2)" in said
    assert min(found["paper"]) > 50
    assert statistics.median(map(abs, found["private_teacher"])) < 3
    assert set(found["votes"]) == {"with ids", "no ids"}
    assert all(statistics.median(map(abs, ratios)) < 3 for ratios in found["votes"].values())


def test_a_flipped_label_changes_one_teacher_with_ids_and_two_without(monkeypatch: pytest.MonkeyPatch) -> None:
    example, seen = loaded("flip_one_label"), []
    monkeypatch.setattr(example, "tell", lambda phi, labels, shards, queries, g: seen.append((labels, shards)) or [0.0])
    _, labels = example.worlds()
    example.votes(torch.zeros(len(labels[0]), 1), labels, torch.zeros(1, 1), torch.Generator().manual_seed(0))
    changed = []
    for worlds, shards in seen:
        held = [
            [
                list(zip((s == k).nonzero()[:, 0].tolist(), y[s == k].tolist(), strict=True))
                for k in range(example.SHARDS)
            ]
            for y, s in zip(worlds, shards, strict=True)
        ]
        changed.append(sum(one != other for one, other in zip(*held, strict=True)))
    assert changed == [1, 2]


def test_the_row_space_of_an_update_shows_its_members(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = loaded("row_space")
    monkeypatch.setattr(example, "SHADOW", 12)
    monkeypatch.setattr(example, "TRIALS", 20)
    example.main()
    lines = capsys.readouterr().out.splitlines()
    right = [int(line.split("of 20")[0].split("│")[-1]) for line in lines if "of 20" in line]
    assert len(right) == 9
    assert right[:2] == [20, 20]  # one step of the paper, whatever σ is
    assert right[3] < 18  # the same attack at the door
    assert right[5] < 18  # and on a step of DP-SGD


@pytest.mark.parametrize("verb", ["dataset", "model", "diffusion"])
def test_the_settings_files_are_read(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpdistill", verb, "--config", str(EXAMPLES / f"{verb}.toml"), "--dry-run"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "planned: ε = " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
