"""An optimiser for small convolutional networks that have few steps: AdamW for vectors, orthogonal momentum for convolutions.

Source: Jordan et al. (2024), "Muon". Nothing here is private.
R rows, C columns of a weight seen as a matrix.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose step for a convolution is made orthogonal, so that no direction lags behind; AdamW for the rest.

    Source: Jordan et al. (2024), "Muon". The step of an R x C matrix has singular values near sqrt(max(1, R / C)).

    Args:
      matrix_lr: of convolutions.
      lr: of the head, biases and norms.

    Attributes:
      scale: what both rates are multiplied by at the next step; a schedule sets it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, matrix_lr: float, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"matrix_lr": matrix_lr, "lr": lr, "weight_decay": weight_decay})
        self.scale = 1.0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    matrix = p.ndim == 4
                    lr = self.scale * group["matrix_lr" if matrix else "lr"]
                    move = (_matrix_move if matrix else _adam_move)(p.grad, self.state[p])
                    p.mul_(1 - lr * group["weight_decay"]).sub_(move, alpha=lr)


def _matrix_move(gradient: Tensor, state: dict[str, Tensor], momentum: float = 0.95) -> Tensor:
    """Nesterov momentum, made orthogonal."""
    if not state:
        state["exp_avg"] = torch.zeros_like(gradient)
    state["exp_avg"].mul_(momentum).add_(gradient)
    move = orthogonal(gradient.add(state["exp_avg"], alpha=momentum).flatten(1))
    return move.view_as(gradient) * max(1.0, move.shape[0] / move.shape[1]) ** 0.5


def _adam_move(gradient: Tensor, state: dict[str, Tensor], betas: tuple[float, float] = (0.9, 0.98)) -> Tensor:
    """Adam's step for a learning rate of 1."""
    if not state:
        state |= {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(gradient),
            "exp_avg_sq": torch.zeros_like(gradient),
        }
    state["step"] += 1
    state["exp_avg"].lerp_(gradient, 1 - betas[0])
    state["exp_avg_sq"].lerp_(gradient.square(), 1 - betas[1])
    first, second = (1 - beta ** float(state["step"]) for beta in betas)
    return state["exp_avg"] / first / ((state["exp_avg_sq"] / second).sqrt() + 1e-8)


def orthogonal(m_RC: Tensor) -> Tensor:
    """Returns a matrix of the same singular vectors and singular values near 1, by five Newton-Schulz steps."""
    x = m_RC / (m_RC.norm() + 1e-12)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x
