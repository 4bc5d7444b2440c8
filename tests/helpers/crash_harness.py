"""Breaks runs on purpose: kill -9, power loss, torn writes, a full disk and I/O errors, at every call that changes the disk.

A run is a forked child, and `Tap` stands between it and the disk: every call that changes something below the run's place has a number,
is noted in a log outside the place, and fails where it is told to. `Disk` reads the log back and knows what a power cut may leave: of a
file what its last fsync covered, of a folder the names that its own last fsync covered, and of anything later all, nothing or a part. So
one uninterrupted run gives every state that a crash can leave; each is put on the real disk, and the same command must end with the
same bytes. The idea is ALICE's (Pillai et al., OSDI 2014).

The noise key is a constant here, so that all runs can be compared; `Disk` notes when one is drawn, and refuses it once there is a charge.
"""

import builtins
import errno
import functools
import gc
import hashlib
import io
import os
import pickle
import random
import re
import secrets
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from dpdistill import planning
from dpdistill.bundle import certificate, verification
from dpdistill.errors import DpdistillError
from dpdistill.mechanisms.private import Door
from dpdistill.models import scattering
from dpdistill.privacy import accounting, faults, queries
from dpdistill.privacy import ledger as ledgers

Tree = dict[str, bytes | None]  # content of files, None for folders, by their path below the place
Event = tuple[Any, ...]  # (kind, ...): a call that changed the disk, or what the run did meanwhile
CALLS = ("create", "write", "truncate", "fsync", "rename", "mkdir", "unlink", "rmdir")
FULL = ("create", "write", "fsync", "rename", "mkdir")  # the calls that a full disk may refuse
ERRORS = {"enospc": (errno.ENOSPC, FULL), "eio": (errno.EIO, CALLS)}
KINDS = ("kill", "power", "torn", *ERRORS)
TORN = (0.0, 0.5, 1.0)  # shares of a write that reach the file: its first byte, half, all but its last byte


class Violation(AssertionError):
    """A promise that did not hold."""


def expect(holds: object, what: str) -> None:
    if not holds:
        raise Violation(what)


@dataclass(frozen=True)
class Fault:
    """What happens at one call.

    Attributes:
      kind: "kill" (before the call), "torn" (within a write), "enospc" or "eio" (the call fails).
      at: number of the call, from 1; a call of a kind that cannot fail so does not.
      lasting: all later calls fail as well.
      share: of a torn write that reaches the file.
    """

    kind: str
    at: int
    lasting: bool = False
    share: float = 0.5


def torn_at(share: float, size: int) -> int:
    """Bytes of a torn write that reach the file."""
    return min(max(1, int(share * (size - 1))), size)


@functools.cache
def with_points(loaded: int) -> list[ModuleType]:
    """Modules that pass points, looked up before a fork: a child that looks at every module copies the memory of all of them."""
    found = [module for name, module in sys.modules.items() if name.startswith("dpdistill.")]
    return [module for module in found if getattr(module, "point", None) is faults.point]


class Tap:
    """Numbers, notes and breaks the calls by which this process changes the disk below `place`. fsync itself is left out: it is slow."""

    def __init__(self, place: Path, log: Path, fault: Fault | None = None) -> None:
        self.root, self.fault, self.calls = os.path.realpath(place), fault, 0
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.real: dict[str, Any] = {
            name: getattr(os, name)
            for name in ("open", "write", "fsync", "ftruncate", "rename", "replace", "mkdir", "unlink", "rmdir")
        }
        self.real_open = io.open
        self.passing_points = with_points(len(sys.modules))

    def note(self, *event: object) -> None:
        self.real["write"](self.log, pickle.dumps(event))

    def below(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path as seen from the place, or None where it lies elsewhere."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        whole = os.path.normpath(os.path.join(folder, os.fspath(path)))
        if whole != self.root and not whole.startswith(self.root + "/"):
            return None
        return whole[len(self.root) + 1 :] or "."

    def passing(self, kind: str, *paths: Any, torn: Callable[[int], None] | None = None, size: int = 0) -> None:
        """Passes a numbered call of this kind: dies or raises where the fault says so."""
        self.calls += 1
        fault = self.fault
        if fault is None or self.calls < fault.at or (self.calls > fault.at and not fault.lasting):
            return
        if fault.kind == "torn" and torn:
            torn(torn_at(fault.share, size))
        if fault.kind in ("kill", "torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        number, kinds = ERRORS[fault.kind]
        if kind in kinds:
            if fault.kind == "enospc" and torn:
                torn(size // 2)  # a full disk takes what fits
            raise OSError(number, os.strerror(number), *(str(path) for path in paths))

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where = self.below(path, dir_fd)
        if where is None or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return self.real["open"](path, flags, mode, dir_fd=dir_fd)
        there = os.path.lexists(path)
        self.passing("create", path)
        descriptor: int = self.real["open"](path, flags, mode, dir_fd=dir_fd)
        self.note("open" if there else "create", where, bool(flags & os.O_TRUNC))
        return descriptor

    def write(self, descriptor: int, data: Any) -> int:
        where = self.below(descriptor)
        if where is None:
            return self.real["write"](descriptor, data)
        raw = bytes(data)

        def some(size: int) -> None:
            at = os.lseek(descriptor, 0, os.SEEK_CUR)
            self.real["write"](descriptor, raw[:size])
            self.note("write", where, at, raw[:size])

        self.passing("write", torn=some, size=len(raw))
        some(len(raw))
        return len(raw)

    def fsync(self, descriptor: int) -> None:
        where = self.below(descriptor)
        if where is not None:
            self.passing("fsync")
            self.note("fsync", where)

    def ftruncate(self, descriptor: int, size: int) -> None:
        where = self.below(descriptor)
        if where is not None:
            self.passing("truncate")
            self.note("truncate", where, size)
        self.real["ftruncate"](descriptor, size)

    def rename(self, source: Any, target: Any) -> None:
        where, there = self.below(source), self.below(target)
        if where is not None:
            self.passing("rename", source, target)
        self.real["rename"](source, target)
        if where is not None:
            self.note("rename", where, there)

    def change(self, kind: str, path: Any, *args: Any, dir_fd: int | None = None) -> None:
        """mkdir, unlink and rmdir."""
        where = self.below(path, dir_fd)
        above = os.path.dirname(os.path.abspath(path)) if dir_fd is None else "/"
        if where is None or (kind == "mkdir" and (os.path.lexists(path) or not os.path.isdir(above))):
            return self.real[kind](path, *args, dir_fd=dir_fd)  # it changes nothing
        self.passing(kind, path)
        self.real[kind](path, *args, dir_fd=dir_fd)
        self.note(kind, where)
        return None

    def io_open(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """`open` for Python's own files: the same file on top of the calls above."""
        if not set(mode) & set("wax+") or self.below(file) is None:
            return self.real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int):
            new = {"w": os.O_CREAT | os.O_TRUNC, "x": os.O_CREAT | os.O_EXCL, "a": os.O_CREAT | os.O_APPEND}
            access = os.O_RDWR if "+" in mode else os.O_WRONLY
            file = self.open(file, access | os.O_CLOEXEC | new.get(mode.strip("bt+"), 0), 0o666)
        tap = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return tap.write(self.fileno(), data)

        raw = Raw(file, "r+" if "+" in mode else "w", closefd)
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def noisy(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Around the one place where noise is added: notes what is about to be read, and what came out."""

        def wrapped(door: Any, held: Any, index: int, exact_sum: Callable[[str], Any]) -> Any:
            last = [door._name(held.line, index)]

            def reading(attempt: str) -> Any:
                last[0] = attempt
                self.note("read", attempt)
                return exact_sum(attempt)

            released = inner(door, held, index, reading)
            self.note("emit", last[0], hashlib.sha256(released.numpy().tobytes()).hexdigest())
            return released

        return wrapped

    def drawn(self, n: int, byte: bytes) -> bytes:
        self.note("drawn", n)
        return byte * n

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            patch = mock.patch.object
            for name in ("open", "write", "fsync", "ftruncate", "rename"):
                stack.enter_context(patch(os, name, getattr(self, name)))
            stack.enter_context(patch(os, "replace", self.rename))
            for name in ("mkdir", "unlink", "rmdir"):
                stack.enter_context(patch(os, name, functools.partial(self.change, name)))
            stack.enter_context(patch(io, "open", self.io_open))
            stack.enter_context(patch(builtins, "open", self.io_open))
            stack.enter_context(patch(Door, "_noisy", self.noisy(Door._noisy)))
            stack.enter_context(patch(secrets, "token_bytes", lambda n: self.drawn(n, b"K")))
            stack.enter_context(patch(secrets, "token_hex", lambda n: self.drawn(n, b"K").hex()))
            for module in self.passing_points:
                stack.enter_context(patch(module, "point", functools.partial(self.note, "point")))
            yield


class File:
    """Its content, and what of it the last fsync covered."""

    def __init__(self, live: bytes = b"", synced: bytes = b"") -> None:
        self.live, self.synced = live, synced


class Folder:
    """Its names, and those that its last fsync covered; `late` are the changes since, in order."""

    def __init__(self) -> None:
        self.live: dict[str, File | Folder] = {}
        self.synced: dict[str, File | Folder] = {}
        self.late: list[dict[str, File | Folder | None]] = []

    def change(self, names: dict[str, "File | Folder | None"]) -> None:
        self.late.append(names)
        apply(self.live, names)

    def sync(self) -> None:
        self.synced, self.late = dict(self.live), []


def apply(names: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, node in changes.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """The place as the calls left it, and what of it outlives a power cut. Checks the order of things as it goes.

    Attributes:
      emitted: the hash of every noisy sum that left the door, by its release.
    """

    def __init__(self) -> None:
        self.root, self.emitted = Folder(), dict[str, str]()

    @classmethod
    def of(cls, tree: Tree, emitted: dict[str, str]) -> "Disk":
        """All of a tree, and all of it on disk."""
        disk = cls()
        disk.emitted = dict(emitted)
        for path, content in tree.items():
            folder, name = disk.find(path)
            folder.live[name] = Folder() if content is None else File(content, content)
        for folder in disk.folders():
            folder.sync()
        return disk

    def folders(self) -> list[Folder]:
        found = [self.root]
        for folder in found:
            found += [node for node in folder.live.values() if isinstance(node, Folder)]
        return found

    def find(self, path: str) -> tuple[Folder, str]:
        *above, name = path.split("/")
        folder = self.root
        for part in above:
            folder = folder.live[part]  # type: ignore[assignment]
        return folder, name

    def node(self, path: str) -> Any:
        folder, name = self.find(path)
        return self.root if path == "." else folder.live[name]

    def play(self, event: Event) -> None:
        """One event of a run. Raises Violation where a record is read before its charge would outlive a power cut, and the like."""
        kind, rest = event[0], event[1:]
        if kind in ("create", "open"):
            folder, name = self.find(rest[0])
            if kind == "create":
                folder.change({name: File()})
            elif rest[1]:
                folder.live[name].live = b""  # type: ignore[union-attr]
        elif kind == "write":
            file, at, data = self.node(rest[0]), rest[1], rest[2]
            file.live = file.live[:at] + data + file.live[at + len(data) :]
        elif kind == "truncate":
            file, size = self.node(rest[0]), rest[1]
            file.live = file.live[:size].ljust(size, b"\0")
        elif kind == "fsync":
            node = self.node(rest[0])
            if isinstance(node, Folder):
                node.sync()
            else:
                node.synced = node.live
        elif kind == "rename":
            (source, name), (target, other) = map(self.find, rest)
            if name == "key":
                expect(self.released(self.tree("lost")), "the key goes before the release is on disk")
            node = source.live[name]
            expect(source is target, "renamed into another folder, which is not modelled")
            source.change({name: None, other: node})
        elif kind == "mkdir":
            folder, name = self.find(rest[0])
            folder.change({name: Folder()})
        elif kind in ("unlink", "rmdir"):
            folder, name = self.find(rest[0])
            folder.change({name: None})
        elif kind == "read":
            left = self.tree("lost")
            expect(charge_of(rest[0], left), f"{rest[0]}: a record is read, and a power cut would forget the charge")
            expect("out.state/vault/key" in left, "a record is read, and a power cut would lose the key")
        elif kind == "emit":
            name, digest = rest
            left = self.tree("lost")
            bound = f"out.state/vault/{name}"
            expect(bound + ".commitment" in left, f"{name}: left the door, and a power cut would unbind its noise")
            expect(bound + ".npy" in left, f"{name}: left the door, and a power cut would lose it")
            expect(self.emitted.setdefault(name, digest) == digest, f"{name}: two different noisy sums left the door")
        elif kind == "drawn":
            expect(not charges(self.tree()), "a key is drawn after something was charged")

    def released(self, left: Tree) -> bool:
        now = {path: content for path, content in self.tree().items() if f"{path}/".startswith("out/")}
        return bool(now) and now == {path: left.get(path) for path in now} and set(now) <= set(left)

    def tree(self, policy: str = "live", rng: random.Random | None = None) -> Tree:
        """What is there now ("live"), or after a power cut: what was synced ("lost"), or any of what it may be ("any", from `rng`)."""
        found: Tree = {}

        def walk(folder: Folder, above: str) -> None:
            names = folder.live
            if policy != "live":
                names = dict(folder.synced)
                for change in self.kept(folder.late, rng):
                    apply(names, change)
            for name, node in sorted(names.items()):
                if isinstance(node, Folder):
                    found[above + name] = None
                    walk(node, above + name + "/")
                else:
                    found[above + name] = node.live if policy == "live" else content(node, rng)

        walk(self.root, "")
        return found

    @staticmethod
    def kept(late: list[dict[str, Any]], rng: random.Random | None) -> list[dict[str, Any]]:
        """The unsynced changes of a folder that a power cut leaves: none; or all, the first few or any of them."""
        if rng is None:
            return []
        how = rng.choice(("none", "all", "first", "any"))
        if how == "any":
            return [change for change in late if rng.random() < 0.5]
        return late[: {"none": 0, "all": len(late), "first": rng.randint(0, len(late))}[how]]


def content(file: File, rng: random.Random | None) -> bytes:
    """What a power cut leaves of a file: what was synced, what was written, a part of it, or zeros in the place of a part."""
    if rng is None or file.live == file.synced:
        return file.synced
    same = len(os.path.commonprefix([file.live, file.synced]))  # noqa: RUF071, bytes and no paths
    cut = rng.randint(same, len(file.live))
    parts = (file.synced[cut:], b"", bytes(len(file.live) - cut))
    return rng.choice((file.synced, file.live, *(file.live[:cut] + part for part in parts)))


def on_disk(place: Path) -> Tree:
    """All files and folders below a place."""
    found = sorted(place.rglob("*"))
    return {str(path.relative_to(place)): path.read_bytes() if path.is_file() else None for path in found}


def put(place: Path, tree: Tree) -> None:
    """Makes the place hold this tree and nothing else."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for path, raw in tree.items():
        if raw is None:
            (place / path).mkdir(mode=0o700)
        else:
            (place / path).write_bytes(raw)


def fingerprint(tree: Tree) -> str:
    return hashlib.sha256(pickle.dumps(sorted(tree.items()))).hexdigest()


def ledger_of(tree: Tree) -> bytes:
    """The data set's ledger, or nothing; two would each count only itself."""
    found = [raw for path, raw in tree.items() if re.fullmatch(r"home/ledgers/[^/]*\.jsonl", path)]
    expect(len(found) <= 1, "one data set has two ledgers")
    return (found[0] if found else b"") or b""


def charges(tree: Tree) -> list[dict[str, Any]]:
    """The whole intent lines of a ledger. Raises Violation where its whole lines are no genuine chain."""
    raw = ledger_of(tree)
    whole = raw[: raw.rfind(b"\n") + 1]
    try:
        lines = ledgers.parse(whole) if whole else []
    except DpdistillError as error:
        raise Violation(f"the ledger is damaged: {error}") from error
    return [line for line in lines if line["type"] == "intent"]


def charge_of(name: str, tree: Tree) -> bool:
    """Whether the ledger has charged a release of this name."""
    _, line, index = name.split("-")
    return any(charge["hash"].startswith(line) and int(index) < charge["count"] for charge in charges(tree))


def noted(log: Path) -> list[Event]:
    """What a tap wrote down."""
    found = []
    with open(log, "rb") as file:
        while file.peek(1):
            found.append(pickle.load(file))
    return found


def forked(work: Callable[[], object]) -> int:
    """Runs work() in a fork, which pays for no import. Returns 0, 1 where it raised, -9 where it was killed, or what it exited with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@dataclass(frozen=True)
class Case:
    """A command to break.

    Attributes:
      start: runs it, given its place: the release is to be `place / "out"`.
      proved: its release verifies; the papers' own forms do not, by design.
      inputs: where its inputs lie.
      repeats: given again when all is done, it answers with the release. The paper's diffusion cannot know from which records that is.
      checked: fingerprints of the releases that were verified.
    """

    name: str
    start: Callable[[Path], object]
    proved: bool = True
    inputs: Path = Path()
    repeats: bool = True
    checked: set[str] = field(default_factory=set, compare=False)


@dataclass
class Site:
    """One place, and all that happened in it.

    Attributes:
      said: what the last process printed as its error.
    """

    case: Case
    place: Path
    disk: Disk = field(default_factory=Disk)
    said: str = ""
    events: list[Event] = field(default_factory=list)

    def start(self, fault: Fault | None = None) -> int:
        """Runs the command in a forked child. Returns its exit code: 0, 1 (a traceback), 2 (one line), or -9 where it was killed."""
        self.place.mkdir(parents=True, exist_ok=True)
        log, said = (self.place.with_name(self.place.name + end) for end in (".log", ".said"))
        for path in (log, said):
            path.write_bytes(b"")
        tap = Tap(self.place, log, fault)

        def work() -> None:
            os.environ["DPDISTILL_HOME"] = str(self.place / "home")
            try:
                with tap.installed():
                    self.case.start(self.place)
            except DpdistillError as error:
                said.write_text(str(error))
                sys.exit(2)
            except BaseException:
                said.write_text(traceback.format_exc())
                raise

        status = forked(work)
        os.close(tap.log)
        self.said, self.events = said.read_text(), noted(log)
        for event in self.events:
            self.disk.play(event)
        expect(self.disk.tree() == on_disk(self.place), "something was written past the tap")
        return status

    def lay(self, disk: Disk) -> None:
        """Makes the place what this disk holds."""
        self.disk = disk
        put(self.place, disk.tree())

    def check(self) -> None:
        """What holds at every moment: no half release, a genuine ledger, and a charge for every noisy sum that left the door."""
        tree = self.disk.tree()
        charges(tree)
        for name in self.disk.emitted:
            expect(charge_of(name, tree), f"{name} left the door, and the ledger does not say so")
        release = fingerprint({path: raw for path, raw in tree.items() if path.split("/")[0] == "out"})
        if "out" in tree and release not in self.case.checked:  # the same bytes need no second look
            if self.case.proved:
                verdict = verification.verify(self.place / "out")
                expect(verdict.ok, f"a release that does not verify: {verdict.problems}")
            else:
                verification.inspect(self.place / "out")
            self.case.checked.add(release)

    def finish(self, expected: Tree) -> None:
        """The same command, undisturbed, has to end with the same bytes, and these have to outlive a power cut."""
        if not self.done:
            status = self.start()
            expect(status == 0, f"the same command does not go on: {self.said}")
        self.compare(expected)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do, and the command would say so rather than do it again."""
        tree = self.disk.tree()
        return not self.case.repeats and "out" in tree and "out.state" not in tree

    def compare(self, expected: Tree) -> None:
        found = self.disk.tree()
        apart = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        expect(not apart, f"other bytes than the uninterrupted run: {apart}")
        expect(self.disk.released(self.disk.tree("lost")), "done, and a power cut would lose the release")
        expect(ledger_of(self.disk.tree("lost")) == ledger_of(found), "done, and a power cut would lose charges")
        self.check()

    def judge(self, fault: Fault, status: int, expected: Tree) -> None:
        """What holds after a process that met a fault, or ended before it did."""
        died = fault.kind in ("kill", "torn")
        expect(status in (0, -9 if died else 2), f"a traceback, or no fault: {status}, {self.said}")
        if status == 2:
            self.refused()
        if status == 0:
            self.compare(expected)
        else:
            self.check()

    def refused(self) -> None:
        """A disk that refuses is one line that names the place and the reason, and says the way out."""
        lines = self.said.strip().splitlines()
        expect(len(lines) == 1, f"not one line: {self.said}")
        reasons = [os.strerror(number) for number, _ in ERRORS.values()]
        expect(str(self.place) in lines[0] and any(reason in lines[0] for reason in reasons), f"unclear: {lines[0]}")
        ways = ("the same command goes on", "try again", "choose another --out", "name one with --ledger")
        expect(any(way in lines[0] for way in ways), f"no way out: {lines[0]}")


@dataclass
class Study:
    """One command, broken in every way; `seen` saves recovering from one state twice.

    Attributes:
      expected: what the uninterrupted run leaves.
      events: what it did, in order.
      counts: faults tried and states recovered, by kind of fault.
    """

    case: Case
    folder: Path
    expected: Tree = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    counts: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        warm = self.folder / "warm"  # here, so that the children find everything imported and computed
        with mock.patch.dict(os.environ, {"DPDISTILL_HOME": str(warm / "home")}):
            self.case.start(warm)
        shutil.rmtree(warm)
        gc.freeze()  # or every child's collector would copy all that was imported
        site = self.site()
        expect(site.start() == 0, f"{self.case.name} does not run: {site.said}")
        self.expected, self.events = on_disk(site.place), site.events
        site.compare(self.expected)
        expect(sorted({name.split("/")[0] for name in self.expected}) in (["home", "out"], ["out"]), "leftovers")

    def site(self) -> Site:
        place = self.folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        return Site(self.case, place)

    @property
    def calls(self) -> list[tuple[str, int]]:
        """The kinds of the calls, in order, and how many bytes they wrote; call number n is calls[n - 1]."""
        made = [event for event in self.events if event[0] in (*CALLS, "open")]
        return [("create" if e[0] == "open" else e[0], len(e[3]) if e[0] == "write" else 0) for e in made]

    def attempts(
        self, kinds: Iterable[str], seeds: Iterable[int] = (), *, all_variants: bool = True
    ) -> Iterator[Callable[[], None]]:
        """Every fault at every call, as something to do that raises Violation.

        Args:
          kinds: of `KINDS`.
          seeds: of further outcomes of each power cut, beside the one in which nothing unsynced is left.
          all_variants: of a torn write every share in `TORN`, of an error both one and lasting ones; or one of these, in turn.
        """
        for number, (call, size) in enumerate(self.calls, start=1):
            if "kill" in kinds:
                yield functools.partial(self.strike, Fault("kill", number))
            if "torn" in kinds and call == "write":
                for share in TORN[:size] if all_variants else TORN[number % 3 :][:1]:
                    yield functools.partial(self.strike, Fault("torn", number, share=share))
            for kind in [kind for kind in ERRORS if kind in kinds and call in ERRORS[kind][1]]:
                for lasting in (False, True) if all_variants else (number % 2 == 0,):
                    yield functools.partial(self.strike, Fault(kind, number, lasting))
        if "power" in kinds:
            yield from self.power_cuts(seeds)

    def power_cuts(self, seeds: Iterable[int]) -> Iterator[Callable[[], None]]:
        """What a power cut leaves before each call, and at the end, from the record of the uninterrupted run."""
        disk, number = Disk(), 0
        for event in [*self.events, ("end",)]:
            if event[0] in (*CALLS, "open", "end"):
                number += 1
                for rng in (None, *(random.Random(f"{seed} {number}") for seed in seeds)):
                    left = Disk.of(disk.tree("lost" if rng is None else "any", rng), disk.emitted)
                    yield functools.partial(self.recover, number, left)
            disk.play(event)

    def recover(self, number: int, left: Disk) -> None:
        """From what a power cut left: the same command has to end with the same bytes."""
        with self.blaming("power", number):
            if self.fresh("power", left):
                site = self.site()
                site.lay(left)
                site.check()
                site.finish(self.expected)

    def strike(self, fault: Fault) -> None:
        """One fault: the process dies, or says so in one line, or no harm is done. The same command has to end with the same bytes."""
        with self.blaming(fault.kind, fault.at):
            site = self.site()
            status = site.start(fault)
            expect(status or fault.kind in ERRORS, "the process was not killed")
            site.judge(fault, status, self.expected)
            if self.fresh(fault.kind, site.disk) and status:
                site.finish(self.expected)

    @contextmanager
    def blaming(self, kind: str, number: int) -> Iterator[None]:
        """Says in a Violation what was done and where."""
        try:
            yield
        except Violation as error:
            raise Violation(f"{self.case.name}, {kind} at call {number} ({self.where(number)}): {error}") from error

    def fresh(self, kind: str, disk: Disk) -> bool:
        """Counts a fault that left this, and says whether nothing has recovered from the same yet."""
        state = fingerprint(disk.tree()) + fingerprint(disk.tree("lost"))
        tried = self.counts.setdefault(kind, [0, 0])
        tried[0] += 1
        tried[1] += state not in self.seen
        if state in self.seen:
            return False
        self.seen.add(state)
        return True

    @property
    def points(self) -> list[str]:
        """The names of the numbered points that the run passed."""
        return [event[1] for event in self.events if event[0] == "point"]

    def where(self, number: int) -> str:
        """The call, and the point that the run had passed last."""
        passed, point = 0, "start"
        for event in self.events:
            if event[0] == "point":
                point = event[1]
            passed += event[0] in (*CALLS, "open")
            if passed == number and event[0] != "point":
                return f"{event[0]} {event[1]}, after {point!r}"
        return "the end"

    def campaign(self, seed: int, crashes: int = 12) -> dict[str, int]:
        """Random faults, one process after another, each going on from what the last left. Returns how many of each kind there were."""
        rng, site, met = random.Random(f"{self.case.name} {seed}"), self.site(), dict[str, int]()
        history: list[str] = []
        try:
            for _ in range(rng.randint(2, crashes)):
                if site.done:
                    break
                # A campaign has to get somewhere: late calls are as likely as early ones, and many processes die early.
                at = rng.randint(1, rng.choice((12, 40, len(self.calls))))
                kind = rng.choice(("kill", "torn", "power", "power", "enospc", "eio"))
                fault = Fault("kill" if kind == "power" else kind, at, rng.random() < 0.3, rng.random())
                status = site.start(fault)
                history.append(f"{kind} {at}: {status}")
                met[kind] = met.get(kind, 0) + (status != 0)
                site.judge(fault, status, self.expected)
                if kind == "power":
                    left = site.disk.tree(*(("lost", None) if rng.random() < 0.4 else ("any", rng)))
                    site.lay(Disk.of(left, site.disk.emitted))
                    site.check()
            site.finish(self.expected)
        except Violation as error:
            raise Violation(f"{self.case.name}, campaign {seed}, {'; '.join(history)}: {error}") from error
        return met


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same answer to what is written the same way: arguments may be lists."""
    known: dict[str, Any] = {}

    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        key = repr(args)
        if key not in known:
            known[key] = function(*args)
        return known[key]

    return wrapped


@contextmanager
def quick() -> Iterator[None]:
    """What is the same in every run is computed once."""
    same = (
        (accounting, "gaussian_multiplier"),
        (queries, "gaussian_multiplier"),
        (accounting, "gaussian_epsilon"),
        (accounting, "rdp_epsilon"),
        (certificate, "software"),
        (planning, "procedural_images"),
        (scattering, "_wavelet"),
    )
    with ExitStack() as stack:
        for place, name in same:
            stack.enter_context(mock.patch.object(place, name, remembered(getattr(place, name))))
        yield
