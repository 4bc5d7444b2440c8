"""Per-record gradients by `torch.func`: exact for any module without batch statistics."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .recordwise import RecordFunction


def per_record_gradient(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> RecordFunction:
    """Returns fn(x [B, C, H, W], y [B]) -> [B, P]: each record's own gradient of `loss` with respect to all P parameters.

    Args:
      model: maps [1, C, H, W] to logits [1, K].
      loss: maps logits [1, K] and a label [1] to a scalar.
    """
    names = [name for name, _ in model.named_parameters()]

    def one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, parameters, (x[None],)), y[None])

    def fn(x: Tensor, y: Tensor) -> Tensor:
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        gradients = vmap(grad(one), in_dims=(None, 0, 0))(parameters, x, y)
        return torch.cat([gradients[name].flatten(1) for name in names], dim=1)

    return fn
