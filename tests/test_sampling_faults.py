"""Sampling onto a disk that is full, fails, is stopped or loses power: one line that names the place, and nothing that looks finished.

Every call that changes the disk is refused once, as the crash campaigns do (`helpers/crash_harness.py`), for each form of output.
"""

import os
import random
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from crash_harness import Disk, Fault, Tap, Tree, forked, noted, on_disk, put
from dpdistill import cli, sampling
from dpdistill.errors import InputError

FORMS = ("made", "made.npz", "made.parquet")
HARD_LIMIT = resource.RLIM_INFINITY


class Drawer:
    """In the place of a released model: grey images that depend on class and seed. Batch number `stop_at` comes with a Ctrl-C."""

    image_shape, class_names = (1, 4, 4), ("cat", "dog")

    def __init__(self, stop_at: int = 0) -> None:
        self.stop_at = stop_at

    def __call__(self, labels: torch.Tensor, steps: int, generator: torch.Generator) -> torch.Tensor:
        self.stop_at -= 1
        if self.stop_at == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.rand(len(labels), 1, 4, 4, generator=generator) * 2 - 1


@pytest.fixture(autouse=True)
def _release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "load_sampler", lambda release, device: Drawer())
    monkeypatch.setattr(sampling, "AT_ONCE", 1)  # so that a call has the same number each time


def made(place: Path, form: str, log: Path, fault: Fault | None = None) -> int:
    """Five images into `place`; returns how many calls changed the disk."""
    tap = Tap(place, log, fault)
    try:
        with tap.installed():
            sampling.sample("release", place / form, 5, batch=2, quiet=True)
    finally:
        os.close(tap.log)
    return tap.calls


def wanted(tmp_path: Path, form: str) -> tuple[Tree, int]:
    """What an undisturbed run leaves, and after how many calls."""
    place = tmp_path / "good"
    place.mkdir()
    calls = made(place, form, tmp_path / "log")
    return on_disk(place), calls


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", ["enospc", "eio"])
@pytest.mark.parametrize("form", FORMS)
def test_a_disk_that_does_not_take_it(form: str, kind: str, lasting: bool, tmp_path: Path) -> None:
    good, calls = wanted(tmp_path, form)
    refused = 0
    for at in range(1, calls + 1):
        place = tmp_path / str(at)
        place.mkdir()
        try:
            made(place, form, tmp_path / f"log {at}", Fault(kind, at, lasting))
        except InputError as error:
            refused += 1
            said = str(error)
            assert said.startswith(
                f"{place / form}: could not be written ({os.strerror(28 if kind == 'enospc' else 5)})"
            )
            assert said.endswith("(make room there or choose another --out)")
            left = {path.split("/")[0] for path in on_disk(place)}
            assert left <= {f"{form}.partial"}  # what a failing disk does not let go is called partial
            assert not left or kind == "eio"
            made(place, form, tmp_path / f"again {at}")
        assert on_disk(place) == good
    assert refused >= 4


@pytest.mark.parametrize("form", FORMS)
def test_a_power_cut_or_a_kill_leaves_all_or_nothing(form: str, tmp_path: Path) -> None:
    good, _ = wanted(tmp_path, form)
    disk, rng = Disk(), random.Random(0)
    whole = 0
    states = []
    for event in noted(tmp_path / "log"):
        disk.play(event)
        states += [disk.tree("live"), disk.tree("lost"), *(disk.tree("any", rng) for _ in range(8))]
    for state in states:
        finished = {path: raw for path, raw in state.items() if path.split("/")[0] == form}
        assert finished in ({}, good)
        whole += bool(finished)
    assert whole > 1  # also in states that a power cut leaves
    for state in states[:: len(states) // 10]:
        if form not in state:
            place = tmp_path / "after"
            put(place, state)
            sampling.sample("release", place / form, 5, batch=2, quiet=True)
            assert on_disk(place) == good


@pytest.mark.parametrize("form", FORMS)
def test_the_system_itself_refuses(form: str, tmp_path: Path) -> None:
    """No fault of ours: the kernel takes no file above 40 bytes."""

    def work() -> None:
        sys.dont_write_bytecode = True  # else Python 3.11 leaves halves of modules in its cache, for all
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, HARD_LIMIT))
        with pytest.raises(InputError, match="File too large"):
            sampling.sample("release", tmp_path / form, 5, quiet=True)

    assert forked(work) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["full", "stopped"])
def test_the_command_ends_with_one_line(
    how: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started with Ctrl-C ignored
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(sys, "argv", ["dpdistill", "sample", "r", "--out", str(place / form), "--count", "600"])
    monkeypatch.setattr(sampling, "load_sampler", lambda release, device: Drawer(stop_at=2 if how == "stopped" else 0))
    tap = Tap(place, tmp_path / "log", Fault("enospc", 5, lasting=True) if how == "full" else None)
    with tap.installed(), pytest.raises(SystemExit) as stop:
        cli.main()
    os.close(tap.log)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("sampling")] == lines[-1:]
    if how == "full":
        assert stop.value.code == 2
        assert lines[-1].startswith(f"dpdistill: {place / form}: could not be written (No space left on device)")
    else:
        assert stop.value.code == 130
        assert lines[-1] == "dpdistill: stopped; the same command begins anew"
    assert list(place.iterdir()) == []
    monkeypatch.setattr(sampling, "load_sampler", lambda release, device: Drawer())
    result: Any = None
    try:
        cli.main()
    except SystemExit as end:
        result = end.code
    assert not result
    assert [path.name for path in place.iterdir()] == [form]
