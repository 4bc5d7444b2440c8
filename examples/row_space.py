"""Find members by the row space of an update: DP-SAD's noise does not hide them at any σ; the same σ at the door does.

  .venv/bin/python examples/row_space.py

A student of one linear layer W, x_θ = W·x_r, is updated. A coin decides whether one digit, the candidate, is among the private ones. The
observer knows the candidate, the mechanism and what it releases; it says in or out, and learns its threshold from runs of its own. In the
paper's mechanism noise of any σ is put on each sample's output gradient u_i, and the update is Σ (u_i + noise)·x_rᵢᵀ: its row space is
spanned by the private x_rᵢ, whatever the noise. At the door the noise is on the sum of whole gradients: of that layer, and of the
denoiser that `dpdm` trains, in one of its own steps. Two minutes on one core.

B private images of a step, D pixels.
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import beta
from torch import Tensor

from dpdistill.data import load_images
from dpdistill.data.images import LabelledImages
from dpdistill.mechanisms import PrivateData, Vault
from dpdistill.methods import Public
from dpdistill.methods.diffusion import paper, private_denoiser
from dpdistill.models import edm
from dpdistill.privacy import GaussianSum, Ledger, epsilon

B, DELTA, LOW = 16, 1e-5, 0.01  # LOW: √(1-ᾱ)/√ᾱ at ᾱ = 0.9999
SHADOW, TRIALS = 60, 200
Release = Callable[[bool, int], Tensor]  # (candidate is in, number of the trial) -> statistic: small is "in"


def residual(update_DD: Tensor, candidate_D: Tensor) -> Tensor:
    """Share of the candidate outside the update's row space, or outside its B leading right singular vectors where there are more."""
    _, values, right = torch.linalg.svd(update_DD.double())
    right = right[: min(B, int((values > 1e-5 * values[0]).sum()))]
    c = candidate_D.double()
    return (c - right.T @ (right @ c)).norm() / c.norm()


def paper_update(
    batch_BD: Tensor, levels_B: Tensor, sigma: float, vault: Vault, name: str, g: torch.Generator
) -> Tensor:
    """Σ_i (clipped u_i + noise)·x_rᵢᵀ of `methods.diffusion.paper`, for W = 0 and a teacher that returns its input."""
    config = paper.Config(expected_records=B, batch=B, dilution=1)  # no dilution: noise of σ·C on every row
    x_r = batch_BD + levels_B[:, None] * torch.randn(batch_BD.shape, generator=g)
    x_theta = torch.zeros_like(x_r)
    rows = 2 * ((x_theta - x_r) + (x_theta - batch_BD)) / batch_BD.shape[1]  # of L_dis
    return paper.noised(paper.clipped(rows, config.clip_norm), config, sigma, vault, name).T @ x_r


def one_step(others: Tensor, candidate: Tensor, sigma: float, vault: Vault) -> Release:
    """The paper's update at one low level r."""

    def release(inside: bool, trial: int) -> Tensor:
        g = torch.Generator().manual_seed(trial)
        chosen = others[torch.randperm(len(others), generator=g)[: B - 1]]
        if inside:
            chosen = torch.cat([candidate[None], chosen])
        update = paper_update(chosen, torch.full((len(chosen),), LOW), sigma, vault, f"one-{trial}-{inside}", g)
        return residual(update, candidate)

    return release


def whole_run(others: Tensor, candidate: Tensor, sigma: float, vault: Vault, *, steps: int = 60) -> Release:
    """The paper's updates with r at random among T = 500 levels, B of 60 records in each; the smallest residual counts."""
    levels = edm.schedule(500, 0.002, 80.0, 7.0)[:-1]

    def release(inside: bool, trial: int) -> Tensor:
        g = torch.Generator().manual_seed(10**6 + trial)
        records = others[torch.randperm(len(others), generator=g)[:59]]
        if inside:
            records = torch.cat([candidate[None], records])
        seen = []
        for step in range(steps):
            rows = torch.randperm(len(records), generator=g)[:B]
            r = levels[torch.randint(500, (B,), generator=g)]
            seen.append(
                residual(paper_update(records[rows], r, sigma, vault, f"run-{trial}-{inside}-{step}", g), candidate)
            )
        return torch.stack(seen).min()

    return release


def door(others: Tensor, candidate: Tensor, sigma: float, folder: Path, *, matched: bool = False) -> Release:
    """The sound mechanism: each record's gradient in all of W clipped, summed, noise σ·C on the sum, through the door.

    `matched` takes, in place of the row space, the best test there is: the part of the sum along the candidate's own gradient.
    """
    d = candidate.numel()
    noise = LOW * torch.randn(d, generator=torch.Generator().manual_seed(0))
    query = GaussianSum(name="gradient", dim=d * d, noise_multiplier=sigma, clip_norm=1.0)

    def fn(x: Tensor, y: Tensor) -> Tensor:
        x_0 = x.flatten(1)
        x_r = x_0 + noise
        return (
            (2 * (-x_r - x_0) / d)[:, :, None].mul(x_r[:, None, :]).flatten(1)
        )  # per-record gradient of L_dis at W = 0

    seen = both_worlds(others, candidate, query, fn, folder / f"door-{sigma}-{matched}")
    own = fn(candidate.view(1, 1, 8, 8), torch.zeros(1))[0]

    def release(inside: bool, trial: int) -> Tensor:
        update = seen(inside, trial)
        return -(update @ own) if matched else residual(update.view(d, d), candidate)

    return release


def dp_sgd(others: Tensor, candidate: Tensor, sigma: float, folder: Path) -> Release:
    """One real step of `methods.diffusion.private_denoiser`, at low levels; the row space is that of its first layer's noisy gradient."""
    config = private_denoiser.DenoiserConfig(
        expected_records=B,
        expected_batch=B,
        multiplicity=1,
        width=B,  # as many rows as images
        depth=1,
        p_mean=math.log(LOW),
        p_std=1e-3,
        label_dropout=0.0,
    )
    public = Public(image_shape=(1, 8, 8), class_names=("digit",), auxiliary=torch.zeros(1, 1, 8, 8))
    model = private_denoiser.network(config, public, torch.Generator().manual_seed(0))
    fn = private_denoiser.record_gradient(model, config, torch.Generator().manual_seed(0))
    query = private_denoiser.planned(config, public, sigma).query
    seen = both_worlds(others, candidate, query, fn, folder / f"dp-sgd-{sigma}")
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}

    def release(inside: bool, trial: int) -> Tensor:
        parts = dict(zip(sizes, seen(inside, trial).split_with_sizes(list(sizes.values())), strict=True))
        return residual(parts["first.weight"].view(B, -1), candidate)

    return release


def both_worlds(
    others: Tensor, candidate: Tensor, query: GaussianSum, fn: Callable[[Tensor, Tensor], Tensor], folder: Path
) -> Release:
    """Returns (candidate is in, number of the trial) -> the noisy sum, of a door with the candidate and of one without."""
    handles = []
    for inside in (False, True):
        pixels = torch.cat([candidate[None], others[: B - 1]]) if inside else others[: B - 1]
        records = LabelledImages(
            images=((pixels + 1) / 2).reshape(-1, 1, 8, 8).numpy(),
            labels=torch.zeros(len(pixels), dtype=torch.int64).numpy(),
            class_names=("digit",),
            source="digits",
        )
        place = folder / str(inside)
        ledger = Ledger.open(place / "ledger.jsonl", cap=(1e9, DELTA), data="digits", unit="record")
        handle = PrivateData(records, ledger, Vault.open(place / "vault"), micro_batch=B)
        handles.append((handle, handle.reserve(query, SHADOW + TRIALS)))

    def seen(inside: bool, trial: int) -> Tensor:
        handle, held = handles[inside]
        return handle.release_reserved(held, trial, fn)[0]

    return seen


def audit(release: Release) -> tuple[int, float]:
    """Returns how many of TRIALS coin flips are guessed, and a lower bound (95 %) on ε from the errors of both kinds."""
    coins = (torch.rand(SHADOW + TRIALS, generator=torch.Generator().manual_seed(1)) < 0.5).tolist()
    seen = [float(release(coin, trial)) for trial, coin in enumerate(coins)]
    own = sorted(zip(seen[:SHADOW], coins[:SHADOW], strict=True))  # the observer's own runs
    right = [sum(coin for _, coin in own[:i]) + sum(not coin for _, coin in own[i:]) for i in range(SHADOW + 1)]
    best = max(range(SHADOW + 1), key=right.__getitem__)
    edge = (own[max(best - 1, 0)][0] + own[min(best, SHADOW - 1)][0]) / 2
    judged = list(zip(seen[SHADOW:], coins[SHADOW:], strict=True))
    false_in = sum(value <= edge for value, coin in judged if not coin)
    false_out = sum(value > edge for value, coin in judged if coin)
    n_in = sum(coins[SHADOW:])
    high = [upper(false_in, TRIALS - n_in), upper(false_out, n_in)]
    bounds = [math.log((1 - DELTA - high[i]) / high[1 - i]) for i in (0, 1) if high[i] < 1 - DELTA]
    return TRIALS - false_in - false_out, max([0.0, *bounds])


def upper(errors: int, n: int) -> float:
    """Clopper and Pearson's upper limit for a rate of errors, 97.5 %: two of them hold together with 95 %."""
    return 1.0 if errors >= n else float(beta.ppf(0.975, errors + 1, n - errors))


def main() -> None:
    torch.set_num_threads(1)
    digits = torch.from_numpy(load_images("digits:train").to_unit()).flatten(1)
    candidate, others = digits[0], digits[1:]
    table = Table("release", "σ", "ε claimed", "guessed right", "ε at least")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vault = Vault.open(folder / "vault")
        for sigma in (10.0, 1000.0):
            claimed = f"{epsilon([(1.0, sigma, 1)], DELTA):.3f}"
            row(table, "paper, one low step", sigma, claimed, one_step(others, candidate, sigma, vault))
        claimed = f"{epsilon([(B / 60, 10.0, 60)], DELTA):.2f}"
        row(table, "paper, 60 random steps", 10.0, claimed, whole_run(others, candidate, 10.0, vault))
        for sigma in (10.0, 0.5):
            claimed = f"{epsilon([(1.0, sigma, 1)], DELTA):.3f}"
            row(table, "door, row space", sigma, claimed, door(others, candidate, sigma, folder))
            best = door(others, candidate, sigma, folder, matched=True)
            row(table, "door, best test", sigma, claimed, best)
            row(table, "DP-SGD step, row space", sigma, claimed, dp_sgd(others, candidate, sigma, folder))
    Console().print(table)
    print(
        f"ε claimed: what noise of σ·C on a sum proves (δ = {DELTA:g}). The paper's noise is on output gradients, and its update shows\n"
        "the inputs: more noise makes the update larger and its row space no less exact. ε at least: from the errors, 95 %."
    )


def row(table: Table, name: str, sigma: float, claimed: str, release: Release) -> None:
    right, bound = audit(release)
    table.add_row(name, f"{sigma:g}", claimed, f"{right} of {TRIALS}", f"{bound:.2f}")


if __name__ == "__main__":
    main()
