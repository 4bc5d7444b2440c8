"""From a configuration to a release folder: the one way through the house.

check the input → calibrate (no data) → open the ledger → run the method behind the door → write the bundle → forget the key.
Everything that can be wrong is found before a record is read by a method and before anything is charged.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import torch

from .bundle import BundleFacts, product_of, product_of_sampler, write_bundle
from .bundle.ledger_check import check_foreseen
from .bundle.reading import run_of
from .bundle.release import restore
from .config import RunConfig, check_device_name
from .config_files import config_hash
from .errors import ConfigError, InputError, LedgerError, ReleaseError, StorageError
from .files import MAX_TOML, read_small
from .home import Contents, check_home, home, releases
from .mechanisms import Door, Vault, joined
from .methods import Sampler, Student, Synthetic
from .methods.shared.diverged import mended
from .planning import Plan, auxiliary_of, make_plan, with_way
from .privacy import Ledger, Planned, accounting
from .privacy import ledger as ledgers
from .privacy.disk import write_atomically
from .privacy.guarantee import shown
from .sources import Source, open_source
from .state import begin, check_same_run, check_target, forget, forget_rest, holds, is_of, state_of
from .workspace import FolderWorkspace

if TYPE_CHECKING:
    from .models.teachers import Teacher

NEW_RUN = "run-xxxxxxxxxxxxxxxx"  # stands for the name of a run that has none yet: those that have are in hex
P = ParamSpec("P")


def resumable(run: Callable[P, Path]) -> Callable[P, Path]:
    """Decorates a command on a configuration: what the disk refuses, somewhere in the middle, is one line that says the way out."""

    @functools.wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Path:
        try:
            return run(*args, **kwargs)
        except OSError as error:
            raise StorageError(error) from error

    return wrapped


@resumable
def distil(
    config: RunConfig,
    models: "Sequence[Teacher] | None" = None,
    *,
    quiet: bool = False,
    insecure_seed: int | None = None,
) -> Path:
    """Distils a data set into a release folder, or goes on where the same command was stopped.

    Args:
      config: what the person decided.
      models: of many owners, to vote in place of those in a folder.
      quiet: shows no progress.
      insecure_seed: for tests only: reproducible noise; the release then says NOT PRIVATE and does not verify.

    Returns:
      The release folder.

    Raises:
      DpdistillError: one line that says the way out. Nothing was charged, unless the ledger says so.
    """
    with joined(config.device) as ranks, ExitStack() as stack:
        config = with_way(config)
        check_device(config.device)
        source = open_source(config, models)
        plan = make_plan(config, source.image_shape, source.class_names, source.models)
        ranks.agree(plan.toml.encode)
        held = _hold(config, plan, source, insecure_seed, stack) if ranks.first else _elsewhere()
        if ranks.lead(lambda: held is None) or held is None:
            return Path(config.out)  # it was there already
        handle = source.handle(held.ledger, held.vault, ranks)
        workspace = FolderWorkspace(
            held.work, seed=config.seed, device=config.device, quiet=quiet, checks=handle.checks, ranks=ranks
        )
        made = plan.method.run(plan.settings, plan.public, handle, plan.releases, workspace)
        if ranks.first:
            _hand_out(config, plan, source, held, handle, made)
    return Path(config.out)


@dataclass(frozen=True)
class Held:
    """What the first process of a run holds, and no other: the ledger, the noise key, and the folder for checkpoints."""

    ledger: Ledger
    vault: Vault
    work: Path


def _elsewhere() -> Held:
    return Held(Ledger.elsewhere(), Vault.elsewhere(), Path(os.devnull))


def _hold(config: RunConfig, plan: Plan, source: Source, insecure_seed: int | None, stack: ExitStack) -> Held | None:
    """Opens the ledger until the end of `stack`, and the vault, and announces the run. None where its release is there already."""
    out, state = Path(config.out), state_of(config)
    restore(out, lambda found: _same(found, plan, source))
    if _there(out, plan, source):
        forget_rest(state, plan.toml, source.contents)
        return None
    check_target(out)
    check_same_run(state, plan.toml, source.contents)
    ledger_path = source.ledger()
    check_home()  # before a ledger is begun
    cap = (config.budget or config.epsilon, config.delta)
    ledger = stack.enter_context(Ledger.open(ledger_path, cap=cap, unit=source.unit))
    stack.callback(ledger.take_back)  # at the end; where the run began, there is more
    vault = (
        _vault(state, plan.toml, source.contents, insecure_seed) if state.exists() else None
    )  # else later: a refused run leaves nothing behind
    left = plan.releases[len(_planned(ledger, vault.run)) :] if vault else plan.releases
    cap = ledger.cap if config.budget is None else (config.budget, ledger.cap[1])
    _check_foreseen(config, plan, ledger, vault.run if vault else NEW_RUN, left, cap, insecure_seed is not None)
    if left:  # of a run that goes on, too: another may have been let in since
        ledger.check_affordable([planned.part for planned in left], cap)
    releases()  # it is needed at the end: that it cannot be made is found out before anything is charged
    ledger.raise_cap(cap)  # last, or a refused run would leave it behind
    vault = vault or _vault(state, plan.toml, source.contents, insecure_seed)
    # Checkpoints derive from releases of one key on one ledger: with another of either, they would bring in what it did not charge.
    work = state / "work" / f"{vault.run}-{ledger.lines[0]['hash'][:16]}"
    ledger.start(vault.run, config.method, config_hash(plan.toml))
    return Held(ledger, vault, work)


def _there(out: Path, plan: Plan, source: Source) -> bool:
    """Whether the release lies there already. Raises ReleaseError where something else does."""
    if not os.path.lexists(out):
        return False
    if not _same(out, plan, source):
        raise ReleaseError(
            f"{out} exists and holds something else, a release with other settings, or, as far as {home()} knows, other data's "
            "release; choose another --out, give the options that it was made with, or remove it"
        )
    return True


def outlook(config: RunConfig, plan: Plan, source: Source) -> list[str]:
    """What a run would meet, a line each: its place, and what its ledger has left.

    Reads what the run would read, charges nothing and makes no release or ledger.

    Raises:
      DpdistillError: as the run would, before it charges anything.
    """
    check_device(config.device)
    out, state = Path(config.out), state_of(config)
    if _there(out, plan, source):
        return [f"release: {out} is there already; nothing would be charged"]
    check_target(out)
    check_same_run(state, plan.toml, source.contents)
    stopped = (state / "run.json").exists()
    goes_on = [f"release: the run that was stopped in {state} would go on"] if stopped else []
    # Without a key there is no ledger yet, and asking for its name would make one.
    known = config.ledger is not None or (home() / "key").exists()
    path = source.ledger() if known else None
    there = path is not None and os.path.exists(path) and os.path.getsize(path) > 0
    ledger = Ledger.shown(path, read_small(path, ledgers.MAX_BYTES)) if path and there else None
    if ledger is None or not ledger.lines:  # a crash within its first line leaves none
        cap = config.budget or config.epsilon
        return [*goes_on, f"ledger: a new one would begin, with a cap of ε = {cap:g} at δ = {config.delta:g}"]
    ledger.check_unit(source.unit)
    cap = ledger.cap if config.budget is None else (config.budget, ledger.cap[1])
    spent = ledgers.spent(ledger.lines, cap[1])
    left = f"ledger: {path} has spent ε = {shown(spent)} of {cap[0]:g} at δ = {cap[1]:g}"
    run = Vault.run_of(state / "vault") or NEW_RUN
    to_come = plan.releases[len(_planned(ledger, run)) :]
    _check_foreseen(config, plan, ledger, run, to_come, cap, insecure=False)
    parts = [planned.part for planned in to_come]
    if parts:
        ledger.check_affordable(parts, cap)
    whole = accounting.epsilon([*ledgers.parts(ledger.lines), *parts], cap[1])
    return [*goes_on, f"{left}; this run would make it {shown(whole)}"]


def _vault(state: Path, toml: str, contents: Contents, insecure_seed: int | None) -> Vault:
    """The noise key of the run in a state folder, which is begun if it is new."""
    begin(state, toml, contents)
    return Vault.open(state / "vault", insecure_seed=insecure_seed)


def _planned(ledger: Ledger, run: str) -> list[ledgers.Line]:
    """What a run has been charged of its plan, in order."""
    return [line for line in ledger.intents(run) if not line["again"]]


def _check_foreseen(
    config: RunConfig,
    plan: Plan,
    ledger: Ledger,
    run: str,
    left: list[Planned],
    cap: tuple[float, float],
    insecure: bool,
) -> None:
    """Raises LedgerError where no release could be written once the run has ended: before anything of it is charged."""
    lines = ledger.foreseen(run, config.method, config_hash(plan.toml), left, cap)
    for problem in check_foreseen(lines, run, config.delta, insecure):
        way = (
            "leave --budget out"
            if cap != ledger.cap
            else "choose another method, another δ, fewer steps, or a smaller ε"
        )
        raise LedgerError(
            f"{ledger.path}: no release of this run could be verified ({problem}); nothing was charged for it; {way}"
        )


def _hand_out(config: RunConfig, plan: Plan, source: Source, held: Held, handle: Door, made: Any) -> None:
    """Writes the release, if the run asked for what it planned, and forgets the key."""
    ledger, vault = held.ledger, held.vault
    planned = [(p.query.describe(), p.count) for p in plan.releases]
    charged = [(line["query"], line["count"]) for line in _planned(ledger, vault.run)]
    if planned != charged:
        raise LedgerError("the method asked for other releases than it planned; this is a bug, and nothing was written")
    ledger.finish(vault.run)
    facts = BundleFacts(
        method=config.method,
        run=vault.run,
        delta=config.delta,
        class_names=source.class_names,
        image_shape=source.image_shape,
        per_class=config.per_class,
        config_toml=plan.toml,
        ledger_raw=ledger.path.read_bytes(),
        checks=handle.checks,
        auxiliary=auxiliary_of(config),
        insecure=vault.insecure,
        seed=config.seed,
    )
    whose = read_small(state_of(config) / "run.json", MAX_TOML)
    write_atomically(releases() / f"{vault.run}.json", whose)  # first: a crash may come after the release
    write_result(Path(config.out), made, facts)
    forget(
        state_of(config), vault
    )  # under the ledger's lock: the same command, given twice, must not begin in its remains


def check_alone(way: str) -> None:
    """Raises ConfigError where several processes run a way that reads nothing through the door: they would all do the same."""
    with joined() as ranks:
        if ranks.world > 1:
            raise ConfigError(
                f"{way} divides no pass over records, so more processes bring nothing; leave torchrun out"
            )


def check_device(device: str) -> None:
    """Raises ConfigError where the asked device is none, or not there."""
    check_device_name(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this machine or this build of torch has none; leave --device out")


def write_result(out: Path, made: Synthetic | Student | Sampler, facts: BundleFacts) -> Path:
    """Writes what a method made, whatever came of its fit."""
    made = mended(made)
    if isinstance(made, Synthetic):
        return write_bundle(out, made, facts)
    facts = dataclasses.replace(facts, figures=made.figures)
    product = (
        product_of(made, facts.class_names)
        if isinstance(made, Student)
        else product_of_sampler(made, facts.class_names)
    )
    return write_bundle(out, made.images, facts, product)


def _same(folder: Path, plan: Plan, source: Source) -> bool:
    """Whether this is a finished release of this configuration and these records, on a ledger that this data's goes on from: then it is
    the answer."""
    if not holds(folder / "config.toml", plan.toml) or (folder / "conversion.toml").exists():  # that has others
        return False
    ledger = source.ledger()
    try:
        mine, all_runs = (read_small(path, ledgers.MAX_BYTES) for path in (folder / "ledger.jsonl", ledger))
        known = home() / "releases" / f"{run_of(folder)}.json"
    except (InputError, ReleaseError):
        return False
    return all_runs.startswith(mine) and is_of(known, plan.toml, source.contents)
