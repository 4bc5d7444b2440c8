"""PyTorch's default weights, from a generator of our own: the same numbers on every device, and the global random state is left alone."""

import torch
from torch import nn


@torch.no_grad()
def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Draws weights and biases of all convolutions and linear layers anew, in their order, from U(±1/sqrt(fan_in)).

    Args:
      generator: a CPU generator.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
