"""The guest book: an append-only, hash-chained file of every private release on one data set.

One canonical JSON object per line; `hash` = SHA-256 of the previous line's hash and of this line without its hash. A line is on
disk (fsync) before a record is read, so a crash over-counts and never under-counts. ε is computed from these lines and from
nothing else. The bytes depend on no record: a data set with one record more gives the same file.
Format: docs/ledger.md.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import BudgetError, LedgerError
from . import accounting
from .accounting import Part, Relation
from .faults import point
from .guarantee import round_up
from .queries import GaussianSum

FORMAT = "dpdistill-ledger-1"
MAX_BYTES = 64 * 2**20
_START = "0" * 64
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEYS = {
    "open": {"format", "data", "unit", "relation", "cap_epsilon", "cap_delta"},
    "cap": {"cap_epsilon", "cap_delta"},
    "run": {"run", "method", "config"},
    "intent": {"run", "count", "query", "again"},
    "final": {"run"},
}
_QUERY_KEYS = set(GaussianSum(name="", dim=1, noise_multiplier=1.0).describe())

Line = dict[str, Any]


def canonical(body: Line) -> bytes:
    """The one way to write a line: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def line_hash(previous: str, body: Line) -> str:
    return hashlib.sha256(previous.encode() + canonical(body)).hexdigest()


def _no_repeats(pairs: list[tuple[str, Any]]) -> Line:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("repeated key")
    return dict(pairs)


def parse_line(raw: bytes, previous: str, number: int) -> Line:
    """Returns one checked line. Raises LedgerError with its number unless every byte is as it was written."""
    try:
        line = json.loads(raw, object_pairs_hook=_no_repeats)
        body = {key: value for key, value in line.items() if key != "hash"}
        genuine = line["hash"] == line_hash(previous, body) and canonical(line) == raw
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
    return line


def line_part(line: Line) -> Part:
    """What the accountant needs of an intent line. Raises LedgerError unless it is a mechanism that it knows."""
    query = line["query"]
    try:
        if set(query) != _QUERY_KEYS or query["mechanism"] != "gaussian_sum":
            raise ValueError(query)
        part = (float(query["sampling_prob"]), float(query["noise_multiplier"]), int(line["count"]))
        accounting.check_part(*part)
    except Exception as error:  # whatever is wrong, an unaccountable line must stop everything
        raise LedgerError("the ledger holds a mechanism that this version cannot account for") from error
    return part


def parse(raw: bytes) -> list[Line]:
    """Returns all lines of a ledger's bytes, in order. Raises LedgerError on the first that is not genuine."""
    if not raw.endswith(b"\n"):
        raise LedgerError("the ledger does not end with a whole line")
    lines: list[Line] = []
    for number, text in enumerate(raw[:-1].split(b"\n"), start=1):
        lines.append(parse_line(text, lines[-1]["hash"] if lines else _START, number))
    return lines


def sync_directory(path: Path) -> None:
    """Makes names in `path` survive a power cut (a file's own fsync does not cover its directory entry)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Ledger:
    """One data set's ledger, held under an exclusive lock from `open` to `close`.

    Attributes:
      lines: everything written so far.
    """

    def __init__(self, path: Path, descriptor: int, lines: list[Line]) -> None:
        self.path, self._descriptor, self.lines = path, descriptor, lines

    @classmethod
    def open(cls, path: Path, *, cap: tuple[float, float], data: str | None = None, unit: str = "record") -> "Ledger":
        """Opens or begins the ledger at `path`.

        Args:
          path: its file; the folder is made, readable by the owner only.
          cap: (ε, δ) that all runs together may cost, used when the ledger begins; see `raise_cap`.
          data: public name of the data set; a random one where not given.

        Raises:
          LedgerError: damaged, or another process holds it. A torn last line (a crash while writing) is cut off: its
            release had not happened.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise LedgerError(f"{path}: another run is using this data set's ledger; wait for it to end") from error
        try:
            if os.fstat(descriptor).st_size > MAX_BYTES:
                raise LedgerError(f"{path}: a ledger over {MAX_BYTES} bytes is not one of ours")
            with os.fdopen(os.dup(descriptor), "rb") as file:
                raw = file.read()
            whole = raw[: raw.rfind(b"\n") + 1]
            lines = parse(whole) if whole else []
            if len(whole) < len(raw):
                os.ftruncate(descriptor, len(whole))
                os.fsync(descriptor)
            ledger = cls(path, descriptor, lines)
            if not lines:
                name = data or "data-" + secrets.token_hex(8)
                if not _ID.fullmatch(name):
                    raise LedgerError(f"a data set's name is letters, digits, '.', '_' and '-', at most 64; got {name!r}")
                accounting.epsilon([], cap[1])  # refuses a delta out of range
                opening = {"format": FORMAT, "data": name, "unit": unit, "relation": "add_or_remove_one"}
                ledger._append({"type": "open", **opening, "cap_epsilon": repr(float(cap[0])), "cap_delta": repr(float(cap[1]))})
                sync_directory(path.parent)
            return ledger
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Gives up the lock."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, body: Line) -> Line:
        line = {**body, "hash": line_hash(self.lines[-1]["hash"] if self.lines else _START, body)}
        raw = canonical(line) + b"\n"
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        point("ledger: before the line")
        try:
            written = 0
            while written < len(raw):
                written += os.write(self._descriptor, raw[written:])
                point("ledger: line written, not yet on disk")
            os.fsync(self._descriptor)
        except OSError as error:  # disk full, I/O error: leave no half line behind a later good one
            os.ftruncate(self._descriptor, end)
            raise LedgerError(f"{self.path}: the ledger could not be written ({error.strerror}); nothing was read") from error
        point("ledger: line on disk")
        self.lines.append(line)
        return line

    @property
    def cap(self) -> tuple[float, float]:
        """(ε, δ) that all runs together may cost."""
        last = next(line for line in reversed(self.lines) if line["type"] in ("open", "cap"))
        return float(last["cap_epsilon"]), float(last["cap_delta"])

    def raise_cap(self, cap: tuple[float, float]) -> None:
        """Records a new cap: a person's decision, and visible in every later certificate."""
        accounting.epsilon([], cap[1])
        if cap != self.cap:
            self._append({"type": "cap", "cap_epsilon": repr(float(cap[0])), "cap_delta": repr(float(cap[1]))})

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

    def check_affordable(self, extra: Iterable[Part]) -> None:
        """Raises BudgetError if `extra` on top of everything recorded passes the cap. Writes and reads nothing."""
        cap_epsilon, cap_delta = self.cap
        total = accounting.epsilon([*parts(self.lines), *extra], cap_delta)
        if not (total <= cap_epsilon):
            spent = accounting.epsilon(parts(self.lines), cap_delta)
            raise BudgetError(
                f"the ledger of this data has spent ε = {round_up(spent):g} of its cap {cap_epsilon:g} (δ = {cap_delta:g}), and this "
                f"would make it {round_up(total):g}; nothing was read (--budget {round_up(total, 2):g} raises the cap, on the record)"
            )

    def reserve(self, run: str, query: GaussianSum, count: int = 1, again: str = "") -> int:
        """Charges `count` releases of `query`, and returns the line's index once it is on disk.

        Args:
          again: which earlier release this one repeats, where a resumed run could not reproduce it; empty for a planned one.

        Raises:
          BudgetError: the cap would be passed. Nothing was charged.
        """
        self.check_affordable([query.part(count)])
        self._append({"type": "intent", "run": run, "count": count, "query": query.describe(), "again": again})
        return len(self.lines) - 1


def parts(lines: Iterable[Line], run: str | None = None) -> list[Part]:
    """The mechanisms of all intent lines, or of one run's."""
    return [line_part(line) for line in lines if line["type"] == "intent" and run in (None, line["run"])]


def spent(lines: Iterable[Line], delta: float, run: str | None = None, relation: Relation = "add_or_remove_one") -> float:
    """ε of everything in a ledger's lines, or of one run: from the lines alone."""
    return accounting.epsilon(parts(lines, run), delta, relation)
