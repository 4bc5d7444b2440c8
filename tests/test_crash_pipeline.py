"""kill -9, power loss, torn writes, a full disk and I/O errors at every call that changes the disk: the same command goes on, to the byte.

`helpers/crash_harness.py` says how. Here: every call of the cheapest way, and some of each kind of release. All: tools/crash_campaign.py.
"""

import errno
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import crash_cases
from crash_cases import cases
from crash_harness import ERRORS, KINDS, TORN, Case, Disk, Fault, File, Site, Study, Violation, content, forked
from dpdistill import cli, home, state
from dpdistill.bundle.verification import verify
from dpdistill.config import RunConfig
from dpdistill.mechanisms import Vault, vault
from dpdistill.methods import DIFFUSION_METHODS, METHODS, MODEL_METHODS
from dpdistill.pipeline import distil
from dpdistill.privacy import ledger as ledgers
from dpdistill.privacy.disk import sync_directory


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    with cases(tmp_path_factory.mktemp("inputs")) as make:
        yield make


@pytest.fixture(scope="module")
def toy(make: Callable[[str], Case], tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(make("toy"), tmp_path_factory.mktemp("toy"))


def toy_config(case: Case, place: Path) -> RunConfig:
    return RunConfig(data=str(case.inputs / "private.npz"), out=str(place / "out"), per_class=1, method="toy")


def numbers(study: Study, kind: str, path: str) -> list[int]:
    """The calls of one kind on files or folders like this."""
    found = [f"{number} {study.where(number)}" for number in range(1, len(study.calls) + 1)]
    return [int(text.split()[0]) for text in found if re.match(rf"\d+ {kind} {path},", text)]


def test_the_whole_way_passes_every_room(toy: Study) -> None:
    assert {name.split(":")[0] for name in toy.points} == {
        *("ledger", "file", "door", "workspace", "release", "vault", "state")
    }
    assert toy.points.count("door: summed") == 3
    assert toy.points.count("ledger: line on disk") == 5  # the first, run, two charges, final
    assert toy.points[-1] == "state: removed"
    assert len(toy.calls) > 120
    assert [event[0] for event in toy.events if event[0] in ("read", "emit")] == ["read", "emit"] * 3


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_at_every_call(kind: str, part: int, toy: Study) -> None:
    attempts = list(toy.attempts([kind], [0], all_variants=False))
    calls = [call for call, _ in toy.calls]
    wanted = {
        "kill": len(calls),
        "power": 2 * (len(calls) + 1),
        "torn": calls.count("write"),
        **{error: sum(call in kinds for call in calls) for error, (_, kinds) in ERRORS.items()},
    }
    assert len(attempts) == wanted[kind]
    for attempt in attempts[part::3]:
        attempt()
    assert toy.site().start(Fault("kill", len(calls) + 1)) == 0  # there is no other call


def test_random_faults_one_after_another(toy: Study) -> None:
    met = [toy.campaign(seed) for seed in range(10)]
    assert {kind for kinds in met for kind in kinds} == set(KINDS)


def test_every_method_has_a_command_that_is_broken() -> None:
    ways = {name.partition("-")[0] for name in crash_cases.NAMES} | {"conversion"}  # which "attested" is
    assert {*METHODS, *MODEL_METHODS, *DIFFUSION_METHODS} - {"toy"} <= ways


# One of each kind of release and of each way to make it: `make long` tries all methods at every call.
@pytest.mark.parametrize("name", ["joint", "teacher", "votes", "attested", "dpsad", "paper"])
def test_every_kind_of_release_at_some_calls(name: str, make: Callable[[str], Case], tmp_path: Path) -> None:
    study = Study(make(name), tmp_path)
    attempts = list(study.attempts(KINDS, all_variants=False))
    for attempt in attempts[len(attempts) // 6 :: len(attempts) // 3]:
        attempt()
    released = numbers(study, "fsync", r"\.")[-1]  # the release is in place, and the key not yet forgotten
    study.strike(Fault("kill", released))
    assert sum(tried for tried, _ in study.counts.values()) >= 4


def test_an_audit_at_some_of_its_own_calls(make: Callable[[str], Case], tmp_path: Path) -> None:
    """Wherever it is stopped, the release is there or is put back, also by the command that made it, and nothing is paid twice."""
    study = Study(make("audit"), tmp_path)
    (released,) = numbers(study, "rmdir", r"out\.state")
    (aside,), (_, swapped) = numbers(study, "rename", "out"), numbers(study, "rename", r"out\.partial")
    assert released < aside == swapped - 1
    for number in (*range(released + 5, aside, 12), aside, swapped, swapped + 1, swapped + 3):
        study.strike(Fault("kill", number))
        study.strike(Fault("eio", number, lasting=number == swapped))


def test_killed_and_the_budget_is_raised(make: Callable[[str], Case], toy: Study, tmp_path: Path) -> None:
    """The cap is a decision of its own: a resumed run with another budget goes on, and charges nothing twice."""
    plain = make("toy")
    site = Site(plain, tmp_path / "place")
    assert site.start(Fault("kill", len(toy.calls) // 2)) == -signal.SIGKILL
    site.case = Case("raised", lambda place: distil(replace(toy_config(plain, place), budget=2.0), quiet=True))
    assert site.start() == 0, site.said
    lines = ledgers.parse((site.place / "out" / "ledger.jsonl").read_bytes())
    assert [line["type"] for line in lines].count("intent") == 2
    assert [line["type"] for line in lines].count("cap") == 1
    assert verify(site.place / "out").ok


def test_a_real_limit_is_one_line_and_exit_code_2(
    make: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fault of ours: the kernel refuses files above a size, to every writer there is."""
    plain = make("toy")
    monkeypatch.setenv("DPDISTILL_HOME", str(tmp_path / "home"))
    command = ["dpdistill", "dataset", "--data", str(plain.inputs / "private.npz"), "--method", "toy"]
    command += ["--out", str(tmp_path / "out"), "--per-class", "1"]

    reader, writer = os.pipe()  # not a file: it would have the limit too

    def limited(size: int) -> None:
        sys.argv, sys.stdout, sys.stderr = command, io.StringIO(), os.fdopen(writer, "w")
        sys.dont_write_bytecode = True  # else Python 3.11 leaves halves of modules in its cache, for all
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            cli.main()
        finally:
            sys.stderr.flush()

    codes = []
    for size in (0, 100, 300, 700, 1200, 3000, 10_000):
        codes.append(forked(partial(limited, size)))
        said = os.read(reader, 2**16).decode().splitlines()
        (line,) = [text for text in said if text.startswith("dpdistill: ")]
        assert os.strerror(errno.EFBIG) in line
        assert str(tmp_path) in line
        assert not (tmp_path / "out").exists()
    assert set(codes) == {2}
    assert forked(partial(limited, 10**9)) == 0
    assert verify(tmp_path / "out").ok
    assert (tmp_path / "out" / "ledger.jsonl").read_bytes().count(b'"intent"') == 2


# The harness has to notice. Each of these is a bug that it found here, or might.


def test_a_ledger_line_that_was_written_but_not_synced_is_not_relied_on(
    toy: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between write and fsync; the next process reads the line, and the power goes after it released under it."""
    number = numbers(toy, "fsync", r"home/ledgers/.*")[
        3
    ]  # after the start's, the first line's and the run's: the first charge's
    toy.strike(Fault("kill", number))
    site = toy.site()
    assert site.start(Fault("kill", number)) == -signal.SIGKILL
    monkeypatch.setattr(ledgers, "_settle", lambda *_: None)
    with pytest.raises(Violation, match="a power cut would forget the charge"):
        site.finish(toy.expected)


@pytest.mark.parametrize("place", [ledgers, vault])
def test_new_folders_are_synced_into_those_above(
    place: Any, make: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        home, "sync_directories", sync_directory
    )  # else it does the ledger's work, in one home for both
    Study(make("toy"), tmp_path / "sources")
    monkeypatch.setattr(place, "sync_directories", sync_directory)
    with pytest.raises(Violation, match="a power cut would"):
        Study(make("toy"), tmp_path / "both")


@pytest.mark.parametrize(
    ("place", "name", "call", "path", "said"),
    [
        (vault, "sync_directory", "fsync", "out.state/vault", "a power cut would lose"),
        (state, "sync_directory", "fsync", r"\.", "the key goes before the release is on disk"),
    ],
)
def test_a_name_that_was_not_synced_is_not_relied_on(
    place: Any, name: str, call: str, path: str, said: str, toy: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a rename and its folder's fsync: the next process syncs before it goes on."""
    monkeypatch.setattr(place, name, lambda _: None)
    toy.seen.clear()

    def kill_all() -> None:
        for number in numbers(toy, call, path):
            toy.strike(Fault("kill", number))

    with pytest.raises(Violation, match=said):
        kill_all()


def test_noise_without_a_commitment_is_noticed(
    make: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vault, "binds", lambda *_: True)
    with pytest.raises(Violation, match="unbind its noise"):
        Study(make("toy"), tmp_path)


def test_a_raw_error_is_noticed(toy: Study, tmp_path: Path) -> None:
    (number, *_) = numbers(toy, "write", r"out\.state/work/.*")
    toy.strike(Fault("enospc", number))
    undressed = Case("undressed", lambda place: distil.__wrapped__(toy_config(toy.case, place), quiet=True))
    site = Site(undressed, tmp_path / "place")
    fault = Fault("enospc", number)
    with pytest.raises(Violation, match="a traceback"):
        site.judge(fault, site.start(fault), toy.expected)


def test_what_is_written_past_the_tap_is_noticed(tmp_path: Path) -> None:
    past = Case("past", lambda place: shutil.copyfile(__file__, place / "copy"))
    with pytest.raises(Violation, match="past the tap"):
        Site(past, tmp_path / "place").start()


def test_what_a_power_cut_may_leave() -> None:
    """Of an unsynced write nothing, all, a part, or zeros; of an unsynced rename either name, and never neither."""
    left = {content(File(b"old new", b"old"), random.Random(seed)) for seed in range(200)}
    assert {b"old", b"old new", b"old ne", b"old\0\0\0\0", b"old n\0\0"} <= left
    assert all(raw.startswith(b"old") for raw in left)
    disk = Disk.of({"x": b"1"}, {})
    for event in (("create", "x.partial", True), ("write", "x.partial", 0, b"2"), ("rename", "x.partial", "x")):
        disk.play(event)
    assert disk.tree("lost") == {"x": b"1"}
    trees = [disk.tree("any", random.Random(seed)) for seed in range(200)]
    assert {tree["x"] for tree in trees} == {b"1", b"2", b"", b"\0"}
    disk.play(("fsync", "x"))
    disk.play(("fsync", "."))
    assert disk.tree("lost") == {"x": b"2"}
    assert len(TORN) == 3
