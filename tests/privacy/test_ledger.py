"""The guest book: the chain, torn tails, failing disks, the lock, the cap, and random histories that must never under-count."""

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dpdistill.errors import BudgetError, ConfigError, LedgerError
from dpdistill.privacy import GaussianSum, Ledger, Planned, accounting
from dpdistill.privacy import ledger as ledgers

CAP = (50.0, 1e-5)


def query(sigma: float = 20.0, name: str = "s") -> GaussianSum:
    return GaussianSum(name=name, dim=3, noise_multiplier=sigma)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger of five lines, closed."""
    place = tmp_path / "deep" / "ledger.jsonl"
    with Ledger.open(place, cap=CAP, data="toy") as ledger:
        ledger.start("run-1", "joint", "c0ffee")
        ledger.reserve("run-1", query())
        ledger.reserve("run-1", query(40.0, "t"), 3)
        ledger.finish("run-1")
    return place


def reopened(path: Path, raw: bytes) -> list[ledgers.Line]:
    """What the ledger holds after its file became `raw`."""
    path.write_bytes(raw)
    with Ledger.open(path, cap=CAP) as ledger:
        return ledger.lines


def rechained(lines: list[ledgers.Line]) -> bytes:
    """A forger's file: these bodies with a chain that fits."""
    previous, raw = "0" * 64, b""
    for line in lines:
        body = {key: value for key, value in line.items() if key != "hash"}
        previous = ledgers.line_hash(previous, body)
        raw += ledgers.canonical({**body, "hash": previous}) + b"\n"
    return raw


def test_reads_back_and_is_private_to_its_owner(path: Path) -> None:
    with Ledger.open(path, cap=(1.0, 1e-9)) as ledger:
        assert [line["type"] for line in ledger.lines] == ["open", "run", "intent", "intent", "final"]
        assert ledger.cap == CAP  # the cap given later is not the cap
        assert ledgers.parts(ledger.lines) == [(1.0, 20.0, 1), (1.0, 40.0, 3)]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert ledgers.parse(path.read_bytes()) == ledger.lines


def test_same_calls_give_the_same_bytes(path: Path, tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "again.jsonl", cap=CAP, data="toy") as ledger:
        ledger.start("run-1", "joint", "c0ffee")
        ledger.reserve("run-1", query())
        ledger.reserve("run-1", query(40.0, "t"), 3)
        ledger.finish("run-1")
        ledger.finish("run-1")
        ledger.start("run-1", "joint", "c0ffee")
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()


def test_what_is_foreseen_is_what_will_be(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment of a run: from nothing of it to all of it."""
    plan = [Planned(query()), Planned(query(40.0, "t"), 3)]
    with Ledger.open(path, cap=CAP) as ledger:
        raw, cap = path.read_bytes(), (60.0, CAP[1])
        foreseen = ledger.foreseen("run-2", "joint", "c0ffee", plan, cap)
        assert path.read_bytes() == raw
        ledger.raise_cap(cap)
        ledger.start("run-2", "joint", "c0ffee")
        for number, planned in enumerate(plan):
            assert ledger.foreseen("run-2", "joint", "c0ffee", plan[number:], cap) == foreseen
            ledger.reserve("run-2", planned.query, planned.count)
        assert ledger.foreseen("run-2", "joint", "c0ffee", [], cap) == foreseen
        ledger.finish("run-2")
        assert ledger.lines == foreseen == ledger.foreseen("run-2", "joint", "c0ffee", [], cap)
        size = path.stat().st_size
        monkeypatch.setattr(ledgers, "MAX_BYTES", size)
        ledger.foreseen("run-2", "joint", "c0ffee", [], cap)
        with pytest.raises(LedgerError, match="no room for this run"):
            ledger.foreseen("run-3", "joint", "c0ffee", [], cap)
        assert path.stat().st_size == size


@pytest.mark.parametrize("spare", [0, -1])
def test_what_is_foreseen_has_room_to_the_byte(spare: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [Planned(query()), Planned(query(40.0, "t"), 3)]
    with Ledger.open(path, cap=CAP) as ledger:
        lines = ledger.foreseen("a-longer-name", "joint", "c0ffee", plan, (60.0, CAP[1]))
        monkeypatch.setattr(ledgers, "MAX_BYTES", sum(len(ledgers.canonical(line)) + 1 for line in lines) + spare)
        if spare < 0:
            with pytest.raises(LedgerError, match="no room for this run"):
                ledger.foreseen("a-longer-name", "joint", "c0ffee", plan, (60.0, CAP[1]))
        else:
            assert ledger.foreseen("a-longer-name", "joint", "c0ffee", plan, (60.0, CAP[1])) == lines


def test_a_ledger_to_look_at(path: Path) -> None:
    """From its file's bytes, mended as the next run would: it is not locked, and refuses to be written."""
    raw = path.read_bytes()
    with Ledger.open(path, cap=CAP):
        ledger = Ledger.shown(path, raw + b'{"again":"')
        assert (ledger.path, ledger.lines, ledger.cap) == (path, ledgers.parse(raw), CAP)
        with pytest.raises(LedgerError, match="the ledger is closed"):
            ledger.raise_cap((60.0, 1e-5))
        ledger.close()
    assert Ledger.shown(path, b'{"cap_delta":"1e').lines == Ledger.shown(path, b"").lines == []
    for other in (b"notes\n", b"notes"):
        with pytest.raises(LedgerError, match=f"^{re.escape(str(path))}: not one of our ledgers"):
            Ledger.shown(path, other)


def test_a_locked_ledger_costs_no_descriptor(path: Path) -> None:
    with Ledger.open(path, cap=CAP):
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(LedgerError, match="another run"):
                Ledger.open(path, cap=CAP)
        assert len(os.listdir("/proc/self/fd")) == before


def test_every_flipped_byte_is_refused(path: Path) -> None:
    raw = path.read_bytes()
    for place in range(len(raw)):
        for flip in (0x01, 0x20, 0x80):
            changed = raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :]
            with pytest.raises(LedgerError):
                ledgers.parse(changed)
            if place % 3 == 0 or place == len(raw) - 1:
                with pytest.raises(LedgerError):
                    reopened(path, changed)


def test_reordered_spliced_and_doubled_lines_are_refused(path: Path, tmp_path: Path) -> None:
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    with Ledger.open(tmp_path / "other.jsonl", cap=CAP, data="other") as other:
        other.reserve("run-1", query())
    foreign = (tmp_path / "other.jsonl").read_bytes().splitlines(keepends=True)
    bad = [
        [*lines[:2], lines[3], lines[2], *lines[4:]],
        lines[:2] + lines[3:],
        lines[1:],
        lines + lines[-1:],
        lines[:3] + lines[2:],
        [foreign[0], *lines[1:]],
        [*lines, foreign[1]],
        [b"\n", *lines],
        [*lines, b"\n"],
        [lines[0], b"\n", *lines[1:]],
    ]
    for version in bad:
        with pytest.raises(LedgerError):
            reopened(path, b"".join(version))
    for cut in range(len(lines[0]) + 1, len(raw) - len(lines[-1]), 7):  # bytes lost in the middle
        with pytest.raises(LedgerError):
            reopened(path, raw[:cut] + raw[cut + 5 :])


def test_a_torn_last_line_is_cut_wherever_it_tore(path: Path) -> None:
    raw = path.read_bytes()
    whole = raw[: raw[:-1].rfind(b"\n") + 1]
    for cut in range(len(whole), len(raw) - 1):
        assert len(reopened(path, raw[:cut])) == 4
        assert path.read_bytes() == whole
    assert len(reopened(path, whole + bytes(100))) == 4  # a power cut may leave zeros
    for tail in (b"", b"\0", bytes(50)):  # whole but for its newline: it may have been on disk, so it is not forgotten
        assert len(reopened(path, raw[:-1] + tail)) == 5
        assert path.read_bytes() == raw
    forged = raw[:-1].replace(b'"run-1"', b'"run-2"')
    for tail in (raw[:-1] + b"x", raw[:-1] + b"X", raw[:-1] + b" ", raw[:-1] + b"\0x", forged):  # whole, and not ours
        with pytest.raises(LedgerError):
            reopened(path, tail)
        assert path.read_bytes() == tail
    assert len(reopened(path, raw[:20])) == 1  # the very first line tore: a new ledger begins


def test_a_forged_chain_with_unknown_content_is_refused(path: Path) -> None:
    good = ledgers.parse(path.read_bytes())
    assert rechained(good) == path.read_bytes()
    intent = good[2]

    def but(**change: object) -> list[ledgers.Line]:
        return [*good[:2], {**intent, **change}, *good[3:]]

    bad = [
        but(type="note"),
        but(extra=1),
        but(count=1.9),
        but(count="1"),
        but(count=True),
        but(count=0),
        but(count=-1),
        but(count=None),
        but(run=3),
        but(again=None),
        but(query=None),
        but(query=[]),
        but(query={}),
        *(
            but(query=intent["query"] | {key: value})
            for key in intent["query"]
            for value in (1, "nan", "", "1e999", "0x10", None)
        ),
        [{**good[0], "format": "dpdistill-ledger-2"}, *good[1:]],
        *([{**good[0], "cap_epsilon": value}, *good[1:]] for value in ("nan", "inf", "-1.0", "50", "1e2", 50.0, "")),
        *([{**good[0], "cap_delta": value}, *good[1:]] for value in ("nan", "0.0", "1.0", "1e-12", None)),
        [*good, good[0]],
        good[1:],
    ]
    bad = [lines for lines in bad if lines[2].get("query", {}) is None or lines != good]
    for lines in bad:
        if (
            len(lines) > 2
            and isinstance(lines[2].get("query"), dict)
            and lines[2]["query"].get("name") in ("nan", "", "1e999", "0x10")
        ):
            continue  # a name may be any text
        with pytest.raises(LedgerError):
            ledgers.parse(rechained(lines))


def test_json_tricks_are_refused(path: Path) -> None:
    raw = path.read_bytes()
    first = raw.splitlines()[0]
    previous = json.loads(first)["hash"]
    for text in (
        b'{"run":"a","run":"b","type":"final","hash":"x"}',
        b'{"type":"final","run":NaN,"hash":"x"}',
        b"[" * 100_000,
        b'"text"',
        b"7",
        b"null",
        b"{}",
        b"\xff\xfe",
        '{"type":"final"}'.encode("utf-16"),
        b'{"type":"final","run":' + b"9" * 5000 + b',"hash":"x"}',
    ):
        with pytest.raises(LedgerError):
            ledgers.parse(first + b"\n" + text + b"\n")
    body = {"type": "final", "run": "run-1"}
    line = {**body, "hash": ledgers.line_hash(previous, body)}
    assert len(ledgers.parse(first + b"\n" + ledgers.canonical(line) + b"\n")) == 2
    for loose in (json.dumps(line).encode(), ledgers.canonical(line) + b" ", ledgers.canonical(line) + b"\r"):
        with pytest.raises(LedgerError):  # the same content in other bytes
            ledgers.parse(first + b"\n" + loose + b"\n")


@pytest.mark.parametrize("raw", [b"", b"\n", b"{", b'{"type":"open"}'])
def test_parse_wants_whole_lines(raw: bytes) -> None:
    with pytest.raises(LedgerError):
        ledgers.parse(raw)


def test_one_holder_at_a_time(path: Path) -> None:
    with Ledger.open(path, cap=CAP), pytest.raises(LedgerError, match="another run"):
        Ledger.open(path, cap=CAP)
    Ledger.open(path, cap=CAP).close()


def test_a_ledger_may_be_descriptor_0(path: Path) -> None:
    """The first number that is free, where a run was started without a standard input. A program started by the run does not get it."""
    kept = os.dup(0)
    try:
        os.close(0)
        with Ledger.open(path, cap=CAP) as ledger:
            assert ledger._descriptor == 0
            assert not os.get_inheritable(0)
            ledger.finish("run-9")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(0)
    finally:
        os.dup2(kept, 0)
        os.close(kept)
    with Ledger.open(path, cap=CAP) as ledger:
        assert (ledger.lines[-1]["type"], ledger.lines[-1]["run"]) == ("final", "run-9")


def test_a_whole_ledger_is_not_cut(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "ftruncate", lambda *_: pytest.fail("cut"))
    for _ in range(2):
        Ledger.open(path, cap=CAP).close()


def test_a_closed_ledger_writes_nothing(path: Path) -> None:
    ledger = Ledger.open(path, cap=CAP)
    ledger.close()
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.reserve("run-1", query())


def test_a_forked_child_writes_nothing(path: Path) -> None:
    """Parent and child share the lock; were both to write, each would break the other's chain."""
    raw = path.read_bytes()
    with Ledger.open(path, cap=CAP) as ledger:
        assert forked(lambda: _expect_refusal(ledger)) == 0
        assert path.read_bytes() == raw
        ledger.reserve("run-1", query())


def _expect_refusal(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="forked"):
        ledger.reserve("run-1", query())


def forked(work: Callable[[], None]) -> int:
    """Runs `work` in a forked child; returns its exit status, 0 if nothing was raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_another_hand_in_the_file_is_noticed(path: Path) -> None:
    with Ledger.open(path, cap=CAP) as ledger:
        with open(path, "ab") as file:
            file.write(b"x")
        with pytest.raises(LedgerError, match="another hand"):
            ledger.reserve("run-1", query())


@pytest.mark.parametrize("place", ["folder", "fifo", "under a file", "huge", "not quite huge"])
def test_a_path_that_is_no_ledger_is_one_line(place: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if place == "folder":
        path.mkdir()
    elif place == "fifo":
        os.mkfifo(path)
    elif place == "under a file":
        path.write_bytes(b"")
        path = path / "ledger"
    else:
        with open(path, "wb") as file:
            file.truncate(64 * 2**20 + (place == "huge"))  # docs/ledger.md says how much
    why = {"huge": "no regular file of at most 67108864 bytes", "not quite huge": "or name another"}
    with pytest.raises(LedgerError, match=why.get(place)):
        Ledger.open(path, cap=CAP)


def test_a_ledger_of_other_data_is_refused(path: Path) -> None:
    with pytest.raises(LedgerError, match="other data"):
        Ledger.open(path, cap=CAP, data="elsewhere")
    with pytest.raises(LedgerError, match=r"protects each record, and the run would each patient.*sum of both"):
        Ledger.open(path, cap=CAP, unit="patient")


@pytest.mark.parametrize("name", ["", "a b", "../x", "é", "x" * 65, "-a"])
def test_a_name_is_plain(name: str, tmp_path: Path) -> None:
    if name:
        with pytest.raises(LedgerError, match="name"):
            Ledger.open(tmp_path / "l", cap=CAP, data=name)


@pytest.mark.parametrize(
    "cap", [(0, 1e-5), (-1, 1e-5), (math.nan, 1e-5), (math.inf, 1e-5), (1, 0), (1, 1), (1, math.nan)]
)
def test_a_cap_is_a_number(cap: tuple[float, float], path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Ledger.open(tmp_path / "l", cap=cap)
    with Ledger.open(path, cap=CAP) as ledger, pytest.raises(ConfigError):
        ledger.raise_cap(cap)


def test_the_cap_refuses_before_writing_and_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "l"
    tight = (accounting.epsilon([(1.0, 5.0, 2)], 1e-5), 1e-5)
    with Ledger.open(path, cap=tight) as ledger:
        ledger.reserve("r", query(5.0))
        before = path.read_bytes()
        with pytest.raises(BudgetError, match="nothing was charged"):
            ledger.reserve("r", query(5.0), 2)
        assert path.read_bytes() == before
        ledger.reserve("r", query(5.0))
    with Ledger.open(path, cap=(1e9, 1e-5)) as ledger:
        before = path.read_bytes()
        with pytest.raises(BudgetError):
            ledger.reserve("another run", query(1e4, "tiny"))
        assert path.read_bytes() == before
        ledger.raise_cap((tight[0] + 1, 1e-5))
        ledger.raise_cap((tight[0] + 1, 1e-5))
        ledger.reserve("r", query(1e4))
    with Ledger.open(path, cap=CAP) as ledger:
        assert [line["type"] for line in ledger.lines] == ["open", "intent", "intent", "cap", "intent"]
        assert ledger.cap == (tight[0] + 1, 1e-5)


def test_an_accountant_that_gives_nan_affords_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.open(path, cap=CAP) as ledger:
        monkeypatch.setattr(accounting, "epsilon", lambda *_: math.nan)
        with pytest.raises((BudgetError, ConfigError)):
            ledger.check_affordable([(1.0, 1.0, 1)])


@pytest.mark.parametrize("fault", ["write ENOSPC", "half write", "fsync EIO", "truncate fails too", "interrupt"])
def test_a_failing_disk_charges_nothing_or_too_much(fault: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    ledger = Ledger.open(path, cap=CAP)
    write, calls = os.write, [0]

    def broken_write(descriptor: int, data: bytes) -> int:
        calls[0] += 1
        if fault == "half write" and calls[0] == 1:
            return write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def broken_fsync(descriptor: int) -> None:
        if fault == "interrupt":
            raise KeyboardInterrupt
        raise OSError(errno.EIO, "Input/output error")

    def broken_truncate(descriptor: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        if "write" in fault:
            patch.setattr(os, "write", broken_write)
        else:
            patch.setattr(os, "fsync", broken_fsync)
        if "truncate" in fault:
            patch.setattr(os, "ftruncate", broken_truncate)
        with pytest.raises((LedgerError, KeyboardInterrupt)):
            ledger.reserve("run-1", query())
    with pytest.raises(LedgerError, match="open it again"):  # this handle no longer knows what is on disk
        ledger.reserve("run-1", query())
    ledger.close()
    with Ledger.open(path, cap=CAP) as ledger:
        assert ledgers.parts(ledger.lines)[:2] == [(1.0, 20.0, 1), (1.0, 40.0, 3)]
        if fault not in ("truncate fails too", "interrupt"):
            assert path.read_bytes() == before
        ledger.reserve("run-1", query())
    ledgers.parse(path.read_bytes())


def test_on_disk_before_it_counts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync comes after the write and before `reserve` returns; a new ledger's directory entry is synced as well."""
    events: list[str] = []
    write, fsync = os.write, os.fsync

    def spy_write(descriptor: int, data: bytes) -> int:
        events.append("write")
        return write(descriptor, data)

    def spy_fsync(descriptor: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        events.append("fsync folder" if is_folder else "fsync")
        fsync(descriptor)

    monkeypatch.setattr(os, "write", spy_write)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    with Ledger.open(path, cap=CAP) as ledger:
        assert events[0] == "fsync"  # a process that was killed may have written the last line, and no more
        assert set(events[1:]) == {"fsync folder"}
        events.clear()
        ledger.reserve("run-1", query())
        assert events == ["write", "fsync"]
    events.clear()
    with Ledger.open(path.parent / "new" / "l", cap=CAP):
        assert events[:3] == ["fsync", "write", "fsync"]
        assert set(events[3:]) == {"fsync folder"}


def test_the_lock_outlives_no_holder(path: Path) -> None:
    ledger = Ledger.open(path, cap=CAP)
    with open(path, "rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ledger.close()
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class Histories(RuleBasedStateMachine):
    """Random reservations, crashes, torn tails and failing writes. True: what was handed out; recorded: what the file says."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.jsonl"
        self.handed_out: list[accounting.Part] = []
        self.cap = 3.0

    @initialize()
    def begin(self) -> None:
        self.ledger = Ledger.open(self.path, cap=(self.cap, 1e-5), data="toy")

    @rule(sigma=st.sampled_from([3.0, 8.0, 30.0, 200.0]), count=st.integers(1, 4), run=st.sampled_from(["a", "b"]))
    def reserve(self, sigma: float, count: int, run: str) -> None:
        try:
            self.ledger.reserve(run, query(sigma), count)
        except BudgetError:
            total = accounting.group([*self.handed_out, (1.0, sigma, count)])[0][1]
            assert accounting.gaussian_epsilon(total, 1e-5) > self.cap * 0.999  # it refuses only what it must
        else:
            self.handed_out.append((1.0, sigma, count))

    @rule(torn=st.integers(0, 60), late=st.booleans())
    def crash(self, torn: int, late: bool) -> None:
        """The process dies: before the next line, in its middle, or after it was on disk and before it was used."""
        if late:
            try:
                self.ledger.reserve("late", query(50.0))
            except BudgetError:
                torn = 0
        self.ledger.close()
        if torn and not late:
            body = {"type": "final", "run": "x" * 60}
            with open(self.path, "ab") as file:
                file.write(ledgers.canonical(body)[:torn])
        self.ledger = Ledger.open(self.path, cap=(99.0, 1e-3))

    @rule(torn=st.integers(0, 40))
    def disk_full(self, torn: int) -> None:
        write = os.write

        def half(descriptor: int, data: bytes) -> int:
            write(descriptor, data[:torn])
            raise OSError(errno.ENOSPC, "No space left on device")

        os.write = half
        try:
            with pytest.raises((LedgerError, BudgetError)):
                self.ledger.reserve("full", query(300.0))
        finally:
            os.write = write
        self.ledger.close()
        self.ledger = Ledger.open(self.path, cap=(99.0, 1e-3))

    @rule(more=st.floats(0.1, 1.0))
    def raise_cap(self, more: float) -> None:
        self.cap += more
        self.ledger.raise_cap((self.cap, 1e-5))

    @invariant()
    def never_under_counts_and_never_passes_the_cap(self) -> None:
        if not hasattr(self, "ledger"):
            return
        on_disk = ledgers.parts(ledgers.parse(self.path.read_bytes()))
        true, recorded = (
            (accounting.group(parts) or ((1.0, math.inf, 1),))[0][1] for parts in (self.handed_out, on_disk)
        )
        assert recorded <= true * (1 + 1e-12)
        assert self.ledger.cap == (self.cap, 1e-5)
        if on_disk:
            assert accounting.gaussian_epsilon(recorded, 1e-5) <= self.cap

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
        self.folder.cleanup()


def _no_pld(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsampled Gaussians have a closed form; histories need thousands of them."""
    monkeypatch.setattr(accounting, "_pld_epsilon", lambda *_: 0.0)


def test_random_histories(monkeypatch: pytest.MonkeyPatch) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    _no_pld(monkeypatch)
    run_state_machine_as_test(
        Histories, settings=settings(max_examples=40, stateful_step_count=20, deadline=None, derandomize=True)
    )


@pytest.mark.parametrize("raw", [b"Dear Diary", b"{", b'{"cap_delta":', b'{"cap_delta":"1e-05","cap_eps'])
def test_a_file_that_is_no_ledger_is_not_cut(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "l.jsonl"
    path.write_bytes(raw)
    if raw.startswith(b"{"):  # what a crash in the first line leaves
        Ledger.open(path, cap=(1, 1e-5)).close()
        assert len(ledgers.parse(path.read_bytes())) == 1
        return
    with pytest.raises(LedgerError, match="not one of our ledgers"):
        Ledger.open(path, cap=(1, 1e-5))
    assert path.read_bytes() == raw


def test_what_no_run_followed_can_be_taken_back(tmp_path: Path) -> None:
    """A first line, and nothing else: neither another's, nor one that another line followed."""
    path = tmp_path / "l.jsonl"
    with Ledger.open(path, cap=(1.0, 1e-5)) as ledger:
        ledger.take_back()
        assert (path.read_bytes(), ledger.lines) == (b"", [])
    with Ledger.open(path, cap=(3.0, 1e-5)) as ledger:
        pass
    with Ledger.open(path, cap=(1.0, 1e-5)) as ledger:
        ledger.take_back()  # another's
        assert ledger.cap == (3.0, 1e-5)
    path.unlink()
    with Ledger.open(path, cap=(3.0, 1e-5)) as ledger:
        ledger.start("r", "m", "0" * 64)
        ledger.take_back()
        assert len(ledgers.parse(path.read_bytes())) == 2


def test_a_first_line_is_taken_back_where_the_second_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "l.jsonl"
    with Ledger.open(path, cap=(1.0, 1e-5)) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
            with pytest.raises(LedgerError, match="No space left"):
                ledger.start("r", "m", "0" * 64)
        ledger.take_back()
        assert path.read_bytes() == b""


def test_a_damaged_ledger_is_not_passed_by_as_no_ledger(path: Path) -> None:
    with Ledger.open(path, cap=CAP) as ledger:
        ledger.start("r", "m", "0" * 64)
    raw = path.read_bytes()
    for place in (2, raw.index(b"ledger-1")):
        path.write_bytes(raw[:place] + b"#" + raw[place + 1 :])
        with pytest.raises(LedgerError, match="line 1 of the ledger is damaged"):
            Ledger.open(path, cap=CAP)


def test_a_line_is_written_in_one_way_and_hashed_with_the_one_before() -> None:
    body = {"b": 1, "a": {"é": "ü", "c": [1, "x"]}}
    raw = b'{"a":{"c":[1,"x"],"\\u00e9":"\\u00fc"},"b":1}'
    assert ledgers.canonical(body) == raw
    assert ledgers.line_hash("ab", body) == hashlib.sha256(b"ab" + raw).hexdigest()
    for odd in (math.nan, math.inf):
        with pytest.raises(ValueError):
            ledgers.canonical({"a": odd})


def test_the_first_line_says_everything(path: Path) -> None:
    first = json.loads(path.read_bytes().splitlines()[0])
    relation = {"unit": "record", "relation": "add_or_remove_one"}
    cap = {"cap_epsilon": "50.0", "cap_delta": "1e-05"}
    assert first == {
        "type": "open",
        "format": "dpdistill-ledger-1",
        "data": "toy",
        **relation,
        **cap,
        "hash": first["hash"],
    }
    assert ledgers.parse(path.read_bytes())[0]["hash"] == ledgers.line_hash(
        "0" * 64, {k: first[k] for k in first if k != "hash"}
    )
    intent = json.loads(path.read_bytes().splitlines()[2])
    facts = {"run": "run-1", "count": 1, "query": query().describe(), "again": ""}
    assert intent == {"type": "intent", **facts, "hash": intent["hash"]}
    with Ledger.open(path.parent / "other", cap=CAP) as ledger:
        assert re.fullmatch("data-[0-9a-f]{16}", ledger.lines[0]["data"])
        assert ledger.path == path.parent / "other"


def test_a_folder_and_a_file_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Ledger.open(tmp_path / "a" / "b" / "ledger", cap=CAP).close()
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "b" / "ledger").stat().st_mode & 0o777 == 0o600


def test_a_raised_cap_counts_from_its_line_on(path: Path) -> None:
    with Ledger.open(path, cap=CAP) as ledger:
        n = len(ledger.lines)
        ledger.raise_cap(CAP)
        assert len(ledger.lines) == n
        ledger.raise_cap((60.0, 1e-6))
        assert ledger.cap == (60.0, 1e-6)
        assert (len(ledger.lines), ledger.lines[-1]["type"]) == (n + 1, "cap")
        ledger.start("run-1", "joint", "c0ffee")
        ledger.finish("run-1")
        assert len(ledger.lines) == n + 1  # a run begins once, and ends once
    lines = ledgers.parse(path.read_bytes())
    for bad in ("60", "nan", "-1.0"):
        with pytest.raises(LedgerError, match="cap that is none"):
            ledgers.parse(rechained([*lines[:-1], {**lines[-1], "cap_epsilon": bad}]))


def test_the_intents_of_a_run_are_its_own(path: Path) -> None:
    with Ledger.open(path, cap=CAP) as ledger:
        ledger.reserve("run-2", query())
        assert ledger.intents("run-1") == ledger.lines[2:4]
        assert ledger.intents("run-2") == ledger.lines[5:]
        assert ledger.intents("run-3") == []
        lines = ledger.lines
    for run, expected in (("run-1", lines[2:4]), ("run-2", lines[5:]), (None, [*lines[2:4], lines[5]])):
        wanted = [ledgers.line_part(line) for line in expected]
        assert ledgers.parts(lines, run) == wanted
        assert ledgers.spent(lines, 1e-6, run) == accounting.epsilon(wanted, 1e-6)
        for relation in ("add_or_remove_one", "replace_one"):
            assert ledgers.spent(lines, 1e-6, run, relation) == accounting.epsilon(wanted, 1e-6, relation)


def test_a_first_line_may_be_torn_and_no_longer_than_one(tmp_path: Path) -> None:
    begun = b'{"cap_delta":"' + b"1" * 4082
    assert len(begun) == 4096
    assert ledgers.mended(begun) == b""
    assert ledgers.mended(b"") == b""
    with pytest.raises(LedgerError, match="not one of our ledgers"):
        ledgers.mended(begun + b"1")


def test_a_whole_last_line_that_is_damaged_is_refused_and_not_cut(path: Path) -> None:
    """A byte that is no UTF-8 and a lost newline: the line may have been on disk, so it must not be forgotten."""
    raw = path.read_bytes()
    damaged = raw[:-1].replace(b'"final"', b'"fin\xffl"')
    with pytest.raises(LedgerError, match="line 5"):
        reopened(path, damaged)
    assert path.read_bytes() == damaged


def test_a_full_ledger_takes_no_line_and_loses_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.open(path, cap=CAP) as ledger:
        size = path.stat().st_size
        ledger.finish("run-2")
        line = path.stat().st_size - size
        monkeypatch.setattr(ledgers, "MAX_BYTES", size + 2 * line)
        ledger.finish("run-3")
        assert path.stat().st_size == ledgers.MAX_BYTES
        with pytest.raises(LedgerError, match="full"):
            ledger.finish("run-4")
    n = len(reopened(path, path.read_bytes()))
    monkeypatch.setattr(ledgers, "MAX_BYTES", size + 3 * line - 1)
    with Ledger.open(path, cap=CAP) as ledger, pytest.raises(LedgerError, match="full"):
        ledger.finish("run-4")
    assert len(ledgers.parse(path.read_bytes())) == n
    monkeypatch.setattr(ledgers, "MAX_BYTES", size)
    with pytest.raises(LedgerError, match="no regular file of at most"):
        Ledger.open(path, cap=CAP)


def test_a_disk_that_takes_a_few_bytes_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    with Ledger.open(path, cap=CAP) as ledger, monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:70]))
        ledger.reserve("run-1", query())
        lines = ledger.lines
    assert ledgers.parse(path.read_bytes()) == lines


def test_what_failed_is_taken_off_the_disk_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    truncate, fsync = os.ftruncate, os.fsync

    def failing(descriptor: int) -> None:
        events.append("fsync")
        if len(events) == 1:
            raise OSError(errno.EIO, "Input/output error")
        fsync(descriptor)

    monkeypatch.setattr(os, "ftruncate", lambda *facts: (events.append("truncate"), truncate(*facts)))
    with Ledger.open(path, cap=CAP) as ledger:
        monkeypatch.setattr(os, "fsync", failing)
        events.clear()
        with pytest.raises(
            LedgerError, match=re.escape(f"{path}: the ledger could not be read or written (Input/output error); ")
        ):
            ledger.reserve("run-1", query())
        assert events == ["fsync", "truncate", "fsync"]
    events.clear()
    with pytest.raises(LedgerError, match="could not be read or written"):
        Ledger.open(path, cap=CAP)


def test_points_at_which_a_crash_is_tried(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger.open(path, cap=CAP) as ledger:
        monkeypatch.setenv("DPDISTILL_POINTS", str(tmp_path / "points"))
        ledger.reserve("run-1", query())
    passed = (tmp_path / "points").read_text().splitlines()
    assert passed == ["ledger: before the line", "ledger: line written, not yet on disk", "ledger: line on disk"]


def test_a_ledger_that_is_elsewhere_or_closed_touches_no_file(path: Path) -> None:
    away = Ledger.elsewhere()
    assert (away.path, away.lines) == (Path(os.devnull), [])
    with pytest.raises(LedgerError, match="closed"):
        away.finish("run-9")
    closed = Ledger.open(path, cap=CAP)
    closed.close()
    closed.close()
    away.close()
    for ledger in (away, closed):
        with pytest.raises(LedgerError, match="closed"):
            ledger.finish("run-9")


def test_a_cap_below_what_the_accountant_can_do_is_named() -> None:
    """Versions before took a δ of 1e-30: such a ledger is not damaged, and is not said to be."""
    body = {"type": "open", "format": ledgers.FORMAT, "data": "d", "unit": "record", "relation": "add_or_remove_one"}
    body |= {"cap_epsilon": "1.0", "cap_delta": "1e-12"}
    line = {**body, "hash": ledgers.line_hash("0" * 64, body)}
    other = {**body, "cap_delta": "none"}
    with pytest.raises(LedgerError, match=r"^the ledger holds a cap that is none$"):
        ledgers.parse(ledgers.canonical({**other, "hash": ledgers.line_hash("0" * 64, other)}) + b"\n")
    with pytest.raises(LedgerError, match=r"a cap that is none \(Expected delta in \[1e-10, 1\), got 1e-12"):
        ledgers.parse(ledgers.canonical(line) + b"\n")
