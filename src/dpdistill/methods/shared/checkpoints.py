"""Checkpoints of a training loop: what a stopped run needs to go on with the same bytes. Nothing here is private.

A loop of plain tensors saves them under their names and comes back by `resume`; one of networks and optimisers by `saved` and `restore`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def resume(state: Mapping[str, Tensor] | None, fresh: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Returns the step to go on from, and the tensors there: those saved if there are any, else `fresh` at step 0."""
    if state is None:
        return 0, dict(fresh)
    return int(state["step"]), {name: state[name].to(value.device) for name, value in fresh.items()}


def saved(
    step: int, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Returns all that `restore` needs: weights as `part:name`, and what an optimiser keeps for each as `part:name:key`.

    Args:
      modules: by part. An optimiser has the name of the part that it trains.
    """
    state = {"step": torch.tensor(step)}
    for part, module in modules.items():
        for name, weight in module.named_parameters():
            state[f"{part}:{name}"] = weight.detach()
            if part in optimizers:
                kept = optimizers[part].state.get(weight, {})
                state |= {f"{part}:{name}:{key}": value for key, value in kept.items()}
    return state


@torch.no_grad()
def restore(
    state: Mapping[str, Tensor] | None,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> int:
    """Puts what `saved` returned back into the same parts; returns the step to go on from, 0 without a checkpoint."""
    if state is None:
        return 0
    weights = {f"{part}:{name}": weight for part, m in modules.items() for name, weight in m.named_parameters()}
    for name, weight in weights.items():
        weight.copy_(state[name])
    for name, value in state.items():
        owner, _, key = name.rpartition(":")
        if owner in weights:
            optimizer = optimizers[owner.partition(":")[0]]
            # A step count stays on the CPU, where the optimiser put it, but for a fused one.
            there = key != "step" or optimizer.defaults.get("fused")
            optimizer.state[weights[owner]][key] = value.to(weights[owner].device) if there else value.clone()
    return int(state["step"])
