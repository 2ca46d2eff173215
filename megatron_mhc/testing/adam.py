"""The Adam that Megatron gets on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class PlainAdam(torch.optim.Optimizer):
    """Adam and AdamW with apex's constructor and state: `step` in the group, fp32 moments."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ):
        self.adam_w_mode = bool(adam_w_mode)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = int(group.get("step", 0)) + 1
            for parameter in group["params"]:
                # Transformer Engine's keeps a state of every shard, also of those without elements.
                if isinstance(parameter, DTensor):
                    self._state(parameter)
                if parameter.grad is not None:
                    self._update(group, parameter)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        state, gradient = self._state(parameter), parameter.grad.float()
        if self.adam_w_mode:
            parameter.mul_(1 - lr * decay)
        else:
            gradient = gradient + decay * parameter
        mean = state["exp_avg"].lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (square / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, scale, value=-lr / (1 - beta1 ** group["step"]))
