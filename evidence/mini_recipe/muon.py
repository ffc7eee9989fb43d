"""Muon in float32. `torch.optim.Muon` uses bfloat16, which CPUs without bfloat16 emulate at a tenth of the speed."""

from collections import defaultdict

import torch
from torch import nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Keller Jordan's quintic polynomial


def orthogonalised(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return nearly orthogonal matrices with the same row and column spaces, by Newton-Schulz iteration.

    Args:
        matrices: float32, (count, rows, columns).

    Returns:
        float32, (count, rows, columns), with singular values of about 1.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Optimizer for matrices whose steps are orthogonalised momentum, with the root mean square of AdamW's steps (0.2).

    Args:
        params: parameters with two dimensions.
        lr: learning rate.
        momentum: Nesterov momentum.
        weight_decay: decoupled weight decay.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters; parameters of the same shape are orthogonalised in one batch."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                updates = orthogonalised(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)

    def _momentum(self, parameter: nn.Parameter, momentum: float) -> torch.Tensor:
        buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(buffer, momentum)
