"""The guest book: an append-only, hash-chained file of every private release on one data set.

One canonical JSON object per line; `hash` = SHA-256 of the previous line's hash and of this line without its hash. A line is on
disk (fsync) before a record is read, so a crash over-counts and never under-counts. ε is computed from these lines and from
nothing else. The bytes depend on no record: a data set with one record more gives the same file.
Format: docs/ledger.md.
"""

import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import BudgetError, ConfigError, LedgerError
from . import accounting
from .accounting import Part, Relation
from .disk import sync_directories
from .faults import point
from .guarantee import round_up, shown
from .queries import Planned, Query, parse_query

FORMAT = "dpdistill-ledger-1"
MAX_BYTES = 64 * 2**20
_START = "0" * 64
_FIRST = b'{"cap_delta":"'  # how every ledger begins
_MARKS = (_FIRST, FORMAT.encode(), b'"hash":"')  # one of which is left where one is damaged
MOST_TORN = 4096  # bytes that a crash within the first line may leave
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEYS = {
    "open": {"format", "data", "unit", "relation", "cap_epsilon", "cap_delta"},
    "cap": {"cap_epsilon", "cap_delta"},
    "run": {"run", "method", "config"},
    "intent": {"run", "count", "query", "again"},
    "final": {"run"},
}

Line = dict[str, Any]


def canonical(body: Line) -> bytes:
    """The one way to write a line: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def line_hash(previous: str, body: Line) -> str:
    return hashlib.sha256(previous.encode() + canonical(body)).hexdigest()


def parse_line(raw: bytes, previous: str, number: int) -> Line:
    """Returns one checked line. Raises LedgerError with its number unless every byte is as it was written."""
    try:
        line: Line = json.loads(raw)
        body = {key: value for key, value in line.items() if key != "hash"}
        genuine = line["hash"] == line_hash(previous, body) and canonical(line) == raw  # so no key is there twice
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        genuine = False
    if not genuine:
        raise LedgerError(f"line {number} of the ledger is damaged or out of place; restore the file, never edit it")
    kind, wanted = line.get("type"), _KEYS.get(str(line.get("type")))
    if wanted is None or set(body) != wanted | {"type"} or (kind == "open") != (number == 1):
        raise LedgerError(f"line {number} of the ledger has type {kind!r} or fields that this version does not know")
    if kind == "open" and line["format"] != FORMAT:
        raise LedgerError(f"the ledger's format is {line['format']!r}, wanted {FORMAT!r}")
    if kind == "intent":
        line_part(line)
    if kind in ("open", "cap"):
        _line_cap(line)
    if not all(isinstance(line[name], str) for name in wanted - {"count", "query"}):
        raise LedgerError(f"line {number} of the ledger holds a field of another kind")
    return line


def check_cap(cap: tuple[float, float]) -> tuple[float, float]:
    """Returns the cap as two floats. Raises ConfigError unless it is a finite ε > 0 and a δ that ε can be computed at."""
    epsilon, delta = float(cap[0]), float(cap[1])
    if not (0 < epsilon < math.inf):
        raise ConfigError(f"Expected a budget epsilon that is finite and > 0, got {epsilon}.")
    accounting.check_delta(delta)
    return epsilon, delta


def _line_cap(line: Line) -> tuple[float, float]:
    """The cap on an open or cap line. Raises LedgerError unless it is one, written in the one way."""
    try:
        cap = check_cap((line["cap_epsilon"], line["cap_delta"]))
        if (repr(cap[0]), repr(cap[1])) != (line["cap_epsilon"], line["cap_delta"]):
            raise ValueError(line)
    except Exception as error:
        why = f" ({error})" if isinstance(error, ConfigError) else ""  # whose words hold numbers alone
        raise LedgerError(f"the ledger holds a cap that is none{why}") from error
    return cap


def line_part(line: Line, relation: Relation = "add_or_remove_one") -> Part:
    """What the accountant needs of an intent line. Raises LedgerError unless it is a mechanism that it knows."""
    try:
        # Refuses every other mechanism, field or way to write a number.
        part = parse_query(line["query"]).part(line["count"], relation)
        accounting.check_part(*part)
    except Exception as error:  # whatever is wrong, an unaccountable line must stop everything
        raise LedgerError("the ledger holds a mechanism that this version cannot account for") from error
    return part


def parse(raw: bytes) -> list[Line]:
    """Returns all lines of a ledger's bytes, in order. Raises LedgerError on the first that is not genuine."""
    if not raw.endswith(b"\n"):
        raise LedgerError("the ledger does not end with a whole line")
    lines: list[Line] = []
    for number, text in enumerate(io.BytesIO(raw), start=1):  # one by one: the first that is not ours ends it
        lines.append(parse_line(text[:-1], lines[-1]["hash"] if lines else _START, number))
    return lines


def mended(raw: bytes) -> bytes:
    """Returns a ledger's bytes without what a crash during a write may leave: a part of the last line, and zeros.

    A last line that lacks nothing but its newline gets it back. It may have been on disk, so its release may have happened, and cutting it
    would forget a charge; `parse` refuses it where it is not genuine.

    Raises:
      LedgerError: nothing in it looks like one of ours, or, where there is no whole line, it is not the start of a first one.
    """
    end = raw.rfind(b"\n") + 1
    tail = raw[end:].rstrip(b"\0")
    torn = len(raw) <= MOST_TORN and tail[: len(_FIRST)] == _FIRST[: len(tail)]
    ours = any(mark in raw[:MOST_TORN] for mark in _MARKS)  # a damaged one is restored, and not passed by
    if not (ours if end else torn):
        raise LedgerError(
            "not one of our ledgers, or not as it was written; restore the file, or name another"
        )  # and not to be cut: it is somebody's
    try:
        json.JSONDecoder().raw_decode(tail.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return raw[:end]
    return raw[:end] + tail + b"\n"


def _settle(descriptor: int, raw: bytes, whole: bytes) -> None:
    """Makes the file hold `whole` instead of `raw`, and makes it last.

    Also where they are the same: a process that was killed between writing a line and its fsync left it to be read, not to be relied on.
    """
    if raw != whole:
        os.ftruncate(descriptor, len(whole))
    if not raw.startswith(whole):  # a newline was lost
        os.lseek(descriptor, -1, os.SEEK_END)
        os.write(descriptor, b"\n")
    os.fsync(descriptor)


def _failed(path: Path, error: OSError) -> LedgerError:
    why = f"the ledger could not be read or written ({error.strerror})"
    return LedgerError(f"{path}: {why}; nothing else was read; once it can be, the same command goes on")


class Ledger:
    """One data set's ledger, held under an exclusive lock from `open` to `close`.

    Attributes:
      lines: everything written so far.
    """

    def __init__(self, path: Path, descriptor: int, lines: list[Line]) -> None:
        self.path, self._descriptor, self.lines = path, descriptor, lines
        self._pid, self._end = os.getpid(), sum(len(canonical(line)) + 1 for line in lines)
        self._unsure = False  # whether a write stopped half-way, so that the file may hold what `lines` does not
        self._begun = False  # whether the first line is this process's own

    @classmethod
    def open(cls, path: Path, *, cap: tuple[float, float], data: str | None = None, unit: str = "record") -> "Ledger":
        """Opens or begins the ledger at `path`.

        Args:
          path: its file; the folder is made, readable by the owner only.
          cap: (ε, δ) that all runs together may cost, used when the ledger begins; see `raise_cap`.
          data: public name of the data set; a random one where not given. A ledger that bears another name is refused.

        Raises:
          LedgerError: damaged, or another process holds it. A torn last line (a crash while writing) is cut off: its
            release had not happened. See `mended`.
        """
        cap = check_cap(cap)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise _failed(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise LedgerError(f"{path}: another run is using this data set's ledger; wait for it to end") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode) or os.fstat(descriptor).st_size > MAX_BYTES:
                raise LedgerError(f"{path}: no regular file of at most {MAX_BYTES} bytes, so not one of our ledgers")
            with os.fdopen(os.dup(descriptor), "rb") as file:
                raw = file.read()
            try:
                whole = mended(raw)
                lines = parse(whole) if whole else []
            except LedgerError as error:
                raise LedgerError(f"{path}: {error}") from error.__cause__
            _settle(descriptor, raw, whole)
            ledger = cls(path, descriptor, lines)
            if lines and data and data != lines[0]["data"]:
                raise LedgerError(f"{path}: this ledger belongs to other data, {lines[0]['data']!r}")
            ledger.check_unit(unit)
            if not lines:
                name = data or "data-" + secrets.token_hex(8)
                if not _ID.fullmatch(name):
                    raise LedgerError(
                        f"a data set's name is letters, digits, '.', '_' and '-', at most 64; got {name!r}"
                    )
                ledger._begun = True
                opening = {"format": FORMAT, "data": name, "unit": unit, "relation": "add_or_remove_one"}
                ledger._append({"type": "open", **opening, "cap_epsilon": repr(cap[0]), "cap_delta": repr(cap[1])})
            sync_directories(path.parent)  # each time: a crash may have come between the first line and this
            return ledger
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                raise _failed(path, error) from error
            raise

    @classmethod
    def shown(cls, path: Path, raw: bytes) -> "Ledger":
        """A ledger to look at, from its file's bytes: it refuses to be written. Raises LedgerError where it is none."""
        try:
            whole = mended(raw)
            return cls(path, -1, parse(whole) if whole else [])
        except LedgerError as error:
            raise LedgerError(f"{path}: {error}") from error.__cause__

    @classmethod
    def elsewhere(cls) -> "Ledger":
        """A stand-in where another process of the run holds the ledger: it has no line, and refuses to write any."""
        return cls(Path(os.devnull), -1, [])

    def take_back(self) -> None:
        """Removes the first line, if it is this handle's own and no other followed: a run that is refused sets no cap for the next."""
        if self._begun and len(self.lines) == 1 and self._descriptor >= 0 and self._pid == os.getpid():
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
                self.lines, self._end = [], 0

    def close(self) -> None:
        """Gives up the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, body: Line) -> None:
        line = {**body, "hash": line_hash(self.lines[-1]["hash"] if self.lines else _START, body)}
        raw = canonical(line) + b"\n"
        if self._descriptor < 0 or self._pid != os.getpid():
            raise LedgerError(
                f"{self.path}: the ledger is closed, or was opened by the process this one was forked from; nothing was read"
            )
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        if self._unsure or end != self._end:
            raise LedgerError(
                f"{self.path}: a write failed or another hand wrote into the ledger; open it again; nothing was read"
            )
        if end + len(raw) > MAX_BYTES:
            raise LedgerError(f"{self.path}: the ledger is full ({MAX_BYTES} bytes); nothing was charged")
        point("ledger: before the line")
        self._unsure = True  # until the line is on disk and in `lines`, whatever interrupts
        try:
            written = 0
            while written < len(raw):
                written += os.write(self._descriptor, raw[written:])
                point("ledger: line written, not yet on disk")
            os.fsync(self._descriptor)
        except OSError as error:  # disk full, I/O error: leave no half line behind a later good one
            with suppress(OSError):
                os.ftruncate(self._descriptor, end)
                os.fsync(self._descriptor)
            raise _failed(self.path, error) from error
        point("ledger: line on disk")
        self.lines.append(line)
        self._end, self._unsure = end + len(raw), False

    @property
    def cap(self) -> tuple[float, float]:
        """(ε, δ) that all runs together may cost."""
        last = next(line for line in reversed(self.lines) if line["type"] in ("open", "cap"))
        return _line_cap(last)

    def raise_cap(self, cap: tuple[float, float]) -> None:
        """Records a new cap: a person's decision, and visible in every later certificate."""
        cap = check_cap(cap)
        if cap != self.cap:
            self._append({"type": "cap", "cap_epsilon": repr(cap[0]), "cap_delta": repr(cap[1])})

    def start(self, run: str, method: str, config: str) -> None:
        """Announces a run, once. `config` is the hash of its public configuration."""
        if not any(line["type"] == "run" and line["run"] == run for line in self.lines):
            self._append({"type": "run", "run": run, "method": method, "config": config})

    def finish(self, run: str) -> None:
        """Marks a run as complete, once."""
        if not any(line["type"] == "final" and line["run"] == run for line in self.lines):
            self._append({"type": "final", "run": run})

    def intents(self, run: str) -> list[Line]:
        """All intent lines of a run, in order."""
        return [line for line in self.lines if line["type"] == "intent" and line["run"] == run]

    def foreseen(
        self, run: str, method: str, config: str, left: Iterable[Planned], cap: tuple[float, float]
    ) -> list[Line]:
        """Returns the lines as they will be when the run has ended, after the releases that are `left` to it. Writes nothing.

        Args:
          run, method, config: as `start` is given them.
          cap: as `raise_cap` is given it.

        Raises:
          LedgerError: there is no room for so many lines.
        """
        mine = {line["type"] for line in self.lines if line.get("run") == run}
        bodies: list[Line] = []
        if cap != self.cap:
            bodies.append({"type": "cap", "cap_epsilon": repr(cap[0]), "cap_delta": repr(cap[1])})
        if "run" not in mine:
            bodies.append({"type": "run", "run": run, "method": method, "config": config})
        for p in left:
            bodies.append({"type": "intent", "run": run, "count": p.count, "query": p.query.describe(), "again": ""})
        if "final" not in mine:
            bodies.append({"type": "final", "run": run})
        lines, size = list(self.lines), self._end
        for body in bodies:
            lines.append({**body, "hash": line_hash(lines[-1]["hash"], body)})
            size += len(canonical(lines[-1])) + 1
        if size > MAX_BYTES:
            raise LedgerError(
                f"{self.path}: the ledger has no room for this run ({MAX_BYTES} bytes); nothing was charged"
            )
        return lines

    def check_unit(self, unit: str) -> None:
        """Raises LedgerError where the ledger counts by another unit."""
        if self.lines and unit != self.lines[0]["unit"]:
            raise LedgerError(
                f"{self.path}: this ledger protects each {self.lines[0]['unit']}, and the run would each {unit}: one account counts by one "
                "unit. A second account by --ledger does not know of this one: what a person loses is the sum of both"
            )

    def check_affordable(self, extra: Iterable[Part], cap: tuple[float, float] | None = None) -> None:
        """Raises BudgetError if `extra` on top of everything recorded passes the cap, or another that is thought of. Writes and reads
        nothing."""
        cap_epsilon, cap_delta = cap or self.cap
        total = accounting.epsilon([*parts(self.lines), *extra], cap_delta)
        if not (total <= cap_epsilon):
            spent = accounting.epsilon(parts(self.lines), cap_delta)
            raise BudgetError(
                f"the ledger of this data has spent ε = {shown(spent)} of its cap {cap_epsilon:g} (δ = {cap_delta:g}), and this "
                f"would make it {shown(total)}; nothing was charged (--budget {shown(round_up(total, 2))} raises the cap, on the record)"
            )

    def reserve(self, run: str, query: Query, count: int = 1, again: str = "") -> int:
        """Charges `count` releases of `query`, and returns the line's index once it is on disk.

        Args:
          again: which earlier release this one repeats, where a resumed run could not reproduce it; empty for a planned one.

        Raises:
          BudgetError: the cap would be passed. Nothing was charged.
        """
        self.check_affordable([query.part(count)])
        self._append({"type": "intent", "run": run, "count": count, "query": query.describe(), "again": again})
        return len(self.lines) - 1


def parts(lines: Iterable[Line], run: str | None = None, relation: Relation = "add_or_remove_one") -> list[Part]:
    """The mechanisms of all intent lines, or of one run's."""
    return [line_part(line, relation) for line in lines if line["type"] == "intent" and run in (None, line["run"])]


def spent(
    lines: Iterable[Line], delta: float, run: str | None = None, relation: Relation = "add_or_remove_one"
) -> float:
    """ε of everything in a ledger's lines, or of one run: from the lines alone."""
    return accounting.epsilon(parts(lines, run, relation), delta, relation)
