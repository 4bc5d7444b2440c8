"""Whether a ledger, of which only the chain is known to hold, is one that a run could have written and kept its cap.

`privacy.ledger` checks every line by itself; here are the order of a run's lines, the cap, and what an accountant can
compute in reasonable time.
"""

import hashlib
import re

from ..errors import ConfigError, LedgerError, ReleaseError
from ..privacy import accounting
from ..privacy import ledger as ledgers
from ..privacy.accounting import MAX_EPSILON, Part
from ..privacy.ledger import Line
from . import certificate as certificates
from .certificate import BundleFacts

MAX_SAMPLED = 64  # different subsampled mechanisms, each seconds of work
MAX_LINES = 200_000
MAX_CAPS = 64


def check_ledger(lines: list[Line], facts: BundleFacts) -> list[str]:
    """Returns the problems of a parsed ledger; an empty list if the run is whole and the cap was kept at every line."""
    problems = _shape(lines) or _order(lines, facts)
    if problems or facts.insecure:
        return problems
    return _too_large(lines) or _past_the_cap(lines)


def check_foreseen(lines: list[Line], run: str, delta: float, insecure: bool = False) -> list[str]:
    """Returns why no release of `run` could be written from these lines: to be asked before the last of them are charged.

    The cap is not looked at: the ledger keeps it itself.
    """
    problems = _shape(lines)
    if problems or insecure:
        return problems
    problems = _too_large(lines)
    if not problems:
        try:
            certificates.epsilons(lines, run, delta)
        except ReleaseError as error:
            problems = [f"ledger.jsonl: {error}"]
    return problems


def _shape(lines: list[Line]) -> list[str]:
    """`ledger.parse` knows every type and number; names are shown on a page, and work has to end."""
    if len(lines) > MAX_LINES:
        return [f"ledger.jsonl: over {MAX_LINES} lines"]
    if sum(line["type"] == "cap" for line in lines) > MAX_CAPS:
        return [f"ledger.jsonl: the cap was changed over {MAX_CAPS} times"]
    for number, line in enumerate(lines, start=1):
        name = line["query"]["name"] if line["type"] == "intent" else ""
        if not (name.isprintable() and len(name) <= 200):
            return [f"ledger.jsonl: line {number} holds a name that is not printable"]
    first = lines[0]
    unit = first["unit"]
    for number, line in enumerate(lines, start=1):
        # Sums are over records; an exchanged record leaves its shard for another, and whatever else has a unit stays in its own.
        if line["type"] == "intent" and (line["query"].get("unit_moves") != "1") != (unit == "record"):
            return [f"ledger.jsonl: line {number} holds a mechanism of another unit than {unit!r}"]
    if first["relation"] != "add_or_remove_one" or not (unit.isascii() and unit.isalpha() and len(unit) <= 30):
        return ["ledger.jsonl: a relation or unit that the accountant does not know"]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", first["data"]):
        return ["ledger.jsonl: a data set's name that is not one"]
    return []


def _order(lines: list[Line], facts: BundleFacts) -> list[str]:
    """A run is announced once, then charges, then ends once; ours has ended, with its own method and config."""
    begun: set[str] = set()
    ended: set[str] = set()
    for number, line in enumerate(lines, start=1):
        kind, run = line["type"], line.get("run", "")
        if kind == "run" and run not in begun:
            begun.add(run)
        elif kind == "final" and run in begun - ended:
            ended.add(run)
        elif kind in ("run", "final") or (kind == "intent" and run not in begun - ended):
            return [f"ledger.jsonl: line {number} is out of the order of its run"]
    if facts.run not in ended:
        return ["ledger.jsonl: the run is not in it, or did not end"]
    mine = next(line for line in lines if line["type"] == "run" and line["run"] == facts.run)
    problems = []
    if mine["method"] != facts.method:
        problems.append("ledger.jsonl: the run used another method than the certificate's")
    if mine["config"] != hashlib.sha256(facts.config_toml.encode()).hexdigest():
        problems.append("config.toml: not the configuration that the ledger names")
    if facts.run.startswith("insecure-") and not facts.insecure:
        problems.append("certificate.json: claims a guarantee for a run whose noise came from a given seed")
    return problems


def _too_large(lines: list[Line]) -> list[str]:
    return [f"ledger.jsonl: {problem}" for problem in too_large(ledgers.parts(lines))]


def too_large(parts: list[Part]) -> list[str]:
    """Why these mechanisms are more than a verifier adds up; an empty list if they are not."""
    sampled = {(q, sigma) for q, sigma, _ in parts if q < 1}
    try:
        if len(sampled) > MAX_SAMPLED or (parts and not accounting.rdp_epsilon(parts, 1e-5) <= MAX_EPSILON):
            return [f"too much for one accounting (a Rényi ε above {MAX_EPSILON:g}, or too many kinds of release)"]
    except (ArithmeticError, ValueError):
        return ["holds mechanisms that no accountant can add up"]
    return []


def _past_the_cap(lines: list[Line]) -> list[str]:
    """ε grows with every charge: a cap was kept at every prefix if it was kept at the last charge under it."""
    charge = 0
    for index in range(1, len(lines) + 1):
        if index < len(lines) and lines[index]["type"] == "intent":
            charge = index
        elif charge and (index == len(lines) or lines[index]["type"] == "cap"):
            before, charge = lines[: charge + 1], 0
            cap_epsilon, cap_delta = certificates.cap(before)
            try:
                spent = ledgers.spent(before, cap_delta)
            except (ConfigError, LedgerError, ArithmeticError, ValueError):
                return ["ledger.jsonl: ε cannot be computed"]
            if not (spent <= cap_epsilon * (1 + 1e-6)):
                return [f"ledger.jsonl: ε passed its cap of {cap_epsilon:g} at line {len(before)}"]
    return []
