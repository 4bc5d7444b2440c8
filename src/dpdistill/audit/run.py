"""All audits of one release, in order: the kernel, a twin with canaries, the controls, membership, two worlds. Then into the release."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.release import check_aside, restore
from ..bundle.verification import Checked, open_release
from ..errors import ConfigError
from ..pipeline import check_device
from ..planning import with_way
from . import kernel, membership, one_run, two_worlds
from .bounds import CONFIDENCE
from .bounds import one_run as bounds_of
from .result import Audit, Kernel
from .twin import Twin, configuration, public_records

EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
DRAWS, QUICK = kernel.DRAWS, 10**5
DELTA = 1e-5  # where no release names one
SAMPLED = 0.25  # rate of the sampled sum where no release names one
NO_RECORD_IN_SUMS = (
    "a canary's own vector is in no answer: models vote, so the kernel audit draws the worst pair of votes instead"
)

Passing = Callable[[str], AbstractContextManager[Callable[[float], None]]]


def silent(description: str) -> AbstractContextManager[Callable[[float], None]]:
    """Shows nothing."""
    return nullcontext(lambda fraction: None)


def kernels(
    kinds: Iterable[tuple[str, float, float]],
    delta: float,
    *,
    draws: int,
    passing: Passing = silent,
    seed: int | None = None,
) -> tuple[Kernel, ...]:
    """Audits each (mechanism, sampling rate, ε)."""
    wanted, found = list(kinds), []
    with passing("kernel: worst pairs through the door") as progress:
        for mechanism, q, epsilon in wanted:
            found.append(
                kernel.audit(mechanism, epsilon, delta, draws=draws, q=q, coins=_coins(seed, mechanism), seed=seed)
            )
            progress(len(found) / len(wanted))
    return tuple(found)


def every_kind(epsilons: Iterable[float] = EPSILONS) -> list[tuple[str, float, float]]:
    """All that the door can do, at a few ε."""
    kinds = [(name, 1.0) for name in kernel.DRAW] + [("gaussian_sum", SAMPLED)]
    return [(name, q, epsilon) for name, q in kinds for epsilon in epsilons]


def kinds_of(certificate: dict[str, Any], epsilon: float) -> list[tuple[str, float, float]]:
    """The kinds of release that a certificate names, each at the whole ε."""
    found = set()
    for mechanism in certificate["mechanisms"]:
        q = float(mechanism.get("sampling_prob", "1.0"))
        found.add((mechanism["mechanism"], q, epsilon))
        if (
            mechanism["mechanism"] == "gaussian_sum" and int(mechanism["grid_bits"]) > 24 and q == 1
        ):  # only those of features are so fine
            found.add(("rank_one_sum", q, epsilon))
    return sorted(found)


def audit_release(
    path: Path,
    *,
    data: str = "digits",
    auxiliary: str = "none",
    device: str = "cpu",
    most_canaries: int = one_run.MOST_CANARIES,
    runs: int = 0,
    quick: bool = False,
    passing: Passing = silent,
    quiet: bool = True,
    seed: int | None = None,
) -> Audit:
    """Audits a release by a twin on public data.

    Args:
      runs: of the two-world audit, in each world; 0 leaves it out.
      quick: fewer draws, and the twin stops after its last noisy sum: no result, so no membership inference.
      seed: for tests only: coins and noise that repeat.

    Raises:
      ReleaseError: the release is not what it says.
      ConfigError: it has no ledger of its own, so there is nothing to audit; or `runs` of its method cannot be made.
    """
    place = Path(os.path.realpath(path))  # of a link, what it leads to
    restore(place)  # first: an audit that was killed may have left nothing there
    checked = open_release(path)
    check_aside(place, set(checked.files))
    if checked.facts.basis != "proved":
        raise ConfigError(
            f"{path}: it rests on no private release of ours (basis {checked.facts.basis!r}): nothing to audit"
        )
    config = configuration(checked.certificate, checked.facts.config_toml, data, auxiliary, device)
    check_device(config.device)
    if runs and not two_worlds.possible(config):
        raise ConfigError(
            f"{path}: no two-world audit of {with_way(config).method!r}, whose runs take too long to be made thousands of times; "
            "leave --two-worlds out"
        )
    if runs == 1:
        raise ConfigError(
            "--two-worlds needs two runs in each world at least: half of them choose what the others are judged by"
        )
    if runs:
        two_worlds.prepare(config)  # now: the rest takes minutes
    claimed = _claim(checked)
    records = public_records(data, checked.facts.image_shape)
    found = kernels(
        kinds_of(checked.certificate, config.epsilon),
        config.delta,
        draws=QUICK if quick else DRAWS,
        passing=passing,
        seed=seed,
    )
    coins = _coins(seed, "canaries")
    twin = Twin.of(config, records, most_canaries, coins)
    blind = twin.plan.releases[0].query.describe()["mechanism"] in ("noisy_votes", "shard_sum")
    judged, said = None, ()
    if not (quick and blind):
        told, made = twin.run(whole=not quick, seed=seed, quiet=quiet)
        if not blind:
            judged = one_run.judge(
                told.scores(), twin.included, told.releases, claimed, config.delta, _coins(seed, "null")
            )
            broken, _ = twin.run(noise=0.1, whole=False, seed=seed, quiet=quiet)
            judged = one_run.with_broken(judged, bounds_of(broken.scores(), twin.included, config.delta))
        if made is not None:
            said = membership.measure(twin, made)
    pairs = ()
    if runs:
        with passing(f"two worlds: {2 * runs} whole runs") as progress:
            pairs = two_worlds.audit(config, runs, progress=progress, seed=seed)
    return Audit(
        epsilon=claimed,
        delta=config.delta,
        confidence=CONFIDENCE,
        twin="" if quick and blind else f"{_public_name(data)}, {len(twin.records.labels)} public records",
        blind=NO_RECORD_IN_SUMS if blind else "",
        kernel=found,
        one_run=judged,
        two_worlds=pairs,
        membership=said,
    )


def _public_name(data: str) -> str:
    """The last part of what the user named, as far as it is plain: a release names no path of a machine."""
    return "".join(c for c in Path(data).name if c.isascii() and (c.isalnum() or c in "._-"))[:60] or "images"


def _claim(checked: Checked) -> float:
    return float(checked.guarantee.epsilon)


def _coins(seed: int | None, label: str) -> np.random.Generator:
    """A generator of its own for each purpose: from the operating system, but for tests."""
    key = secrets.token_bytes(32) if seed is None else str(seed).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key + label.encode()).digest(), "big"))
